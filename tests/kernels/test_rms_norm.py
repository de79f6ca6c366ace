"""rms_norm: against the decoder's own operation, in place, rows apart, and its refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nbengine.kernels.op import Op
from nbengine.kernels.ops import rms_norm
from nbengine.kernels.program import Program
from nbengine.models.ops import RmsNorm


@pytest.mark.parametrize("shape", [(3, 576), (3, 5, 64)], ids=["layer", "heads"])
def test_it_norms_as_the_decoder_does(
    program_for: Callable[[Op], Program], shape: tuple[int, ...]
) -> None:
    program = program_for(rms_norm.OP)
    x, weight = torch.randn(shape, device=program.device), torch.rand(shape[1:])
    weight = weight.to(program.device)
    out = torch.full_like(x, torch.nan)
    rms_norm.launch(program, out=out, x=x, weight=weight, eps=1e-6)
    torch.testing.assert_close(out, RmsNorm(weight, 1e-6)(x), rtol=1e-5, atol=1e-5)


def test_the_residual_takes_x_and_the_result_may_take_the_place_of_x(
    program_for: Callable[[Op], Program],
) -> None:
    program = program_for(rms_norm.OP)
    x = torch.tensor([[3.0, 0.0] * 32, [0.0, 8.0] * 32], device=program.device)
    residual = torch.tensor([[0.0, 4.0] * 32, [6.0, 0.0] * 32], device=program.device)
    weight = torch.ones(64, device=program.device)
    rms_norm.launch(program, out=x, x=x, weight=weight, eps=0.0, residual=residual)
    sums = torch.tensor([[3.0, 4.0] * 32, [6.0, 8.0] * 32], device=program.device)
    assert torch.equal(residual, sums)
    torch.testing.assert_close(
        x, torch.tensor([3.0, 4.0] * 32).to(x) / 12.5**0.5 * torch.ones_like(x)
    )


@pytest.mark.parametrize("shape", [(5, 576), (5, 3, 128)], ids=["layer", "heads"])
def test_a_row_is_the_same_alone_and_beside_a_row_of_nan(
    program_for: Callable[[Op], Program], shape: tuple[int, ...]
) -> None:
    program = program_for(rms_norm.OP)
    x = torch.randn(shape, device=program.device).half()
    x[1] = torch.nan
    weight = torch.rand(shape[1:], device=program.device)
    together, alone = torch.full_like(x, torch.nan), torch.full_like(x, torch.nan)
    rms_norm.launch(program, out=together, x=x, weight=weight, eps=1e-5)
    for row in (0, 2, 3, 4):
        part = slice(row, row + 1)
        rms_norm.launch(program, out=alone[part], x=x[part], weight=weight, eps=1e-5)
    kept = [0, 2, 3, 4]
    assert not together[kept].isnan().any() and torch.equal(together[kept], alone[kept])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.ones(32)}, r"weight has the shape \[32\], and needs \[64\]"),
        ({"out": torch.zeros(3, 64)}, r"out has the shape \[3, 64\], and needs \[2, 64\]"),
        ({"residual": torch.zeros(4, 64)[::2]}, r"residual .* must be contiguous"),
        (
            {name: torch.zeros(2, 3, 64) for name in ("out", "x")}
            | {"weight": torch.ones(3, 64), "residual": torch.zeros(2, 64)},
            r"x \[2, 3, 64\] has heads",
        ),
        ({"x": torch.zeros(64, 2).T}, r"x \[2, 64\] has the strides .* each row must be dense"),
        ({"x": torch.zeros(2, 65)[:, 1:]}, r"x .* must start at multiples of 16 bytes"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_their_numbers(
    change: dict[str, torch.Tensor], message: str
) -> None:
    arguments = {"out": torch.zeros(2, 64), "x": torch.zeros(2, 64), "weight": torch.ones(64)}
    with pytest.raises(ValueError, match=message):
        rms_norm.launch(None, **arguments | change, eps=1e-5)
