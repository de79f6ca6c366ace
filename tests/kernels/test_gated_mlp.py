"""gated_mlp: against the decoder's own operation, extreme gates, more elements than 2^31."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nbengine.kernels.op import Op
from nbengine.kernels.ops import gated_mlp
from nbengine.kernels.program import Program
from nbengine.models.ops import silu_and_mul
from tests.gpu import needs_gpu


def test_silu_gates_as_the_decoder_does(program_for: Callable[[Op], Program]) -> None:
    program = program_for(gated_mlp.OP)
    gate_up = 5 * torch.randn(3, 2 * 96, device=program.device)
    out = torch.full((3, 96), torch.nan, device=program.device)
    gated_mlp.launch(program, out=out, gate_up=gate_up)
    torch.testing.assert_close(out, silu_and_mul(gate_up), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_extreme_gates_are_shut_or_open(
    program_for: Callable[[Op], Program], activation: str
) -> None:
    program = program_for(gated_mlp.OP)
    gate = torch.tensor([[-1e30, -200.0, -88.0, 0.0, 88.0, 200.0, 1e30, torch.nan]])
    gate = gate.to(program.device)
    out = torch.full_like(gate, torch.nan)
    gate_up = torch.cat((gate, torch.ones_like(gate)), -1)
    gated_mlp.launch(program, out=out, gate_up=gate_up, activation=activation)
    assert (out[0, :3].abs() < 1e-6).all()
    torch.testing.assert_close(out[0, 3:7], gate[0, 3:7])
    assert out[0, 7].isnan()


@needs_gpu
def test_rows_whose_elements_pass_2_to_the_31() -> None:
    """65,600 x 37,888 = 2.49e9 elements of gate_up, and a grid of more than 65,535 rows."""
    from nbengine.kernels.launcher import CudaProgram
    from nbengine.kernels.source import Source

    rows, size = 65_600, 18_944
    program = CudaProgram(Source.of_op(gated_mlp.OP.source), torch.device("cuda"))
    gate_up = torch.empty(rows, 2 * size, dtype=torch.bfloat16, device="cuda").normal_()
    out = torch.full((rows, size), torch.nan, dtype=torch.bfloat16, device="cuda")
    gated_mlp.launch(program, out=out, gate_up=gate_up)
    for chunk in range(0, rows, 4100):
        part = slice(chunk, chunk + 4100)
        expected = torch.empty_like(out[part])
        gated_mlp.reference(out=expected, gate_up=gate_up[part])
        torch.testing.assert_close(out[part], expected, rtol=1.6e-2, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gate_up": torch.zeros(2, 64)}, r"gate_up has the shape \[2, 64\], and needs \[2, 128\]"),
        ({"out": torch.zeros(2, 128)[:, ::2]}, "out .* must be contiguous"),
        ({"activation": "relu"}, "activation='relu': there are silu, gelu_tanh"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, object], message: str) -> None:
    arguments = {"out": torch.zeros(2, 64), "gate_up": torch.zeros(2, 128)}
    with pytest.raises(ValueError, match=message):
        gated_mlp.launch(None, **arguments | change)
