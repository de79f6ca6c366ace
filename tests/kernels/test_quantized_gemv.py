"""quantized_gemv and dequantize: one weight for both, the same row at every batch size, refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nbengine.kernels.op import Op
from nbengine.kernels.ops import dequantize, quantized_gemv
from nbengine.kernels.program import Program

DTYPES = [torch.float16, torch.bfloat16]


def codes_of(bits: int, size_out: int, size_in: int, device: torch.device) -> tuple[Tensor, Tensor]:
    generator = torch.Generator(device).manual_seed(1)
    return dequantize.quantized(generator, bits, size_out, size_in)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_products_with_unit_rows_are_the_weights_that_dequantize_gives(
    program_for: Callable[[Op], Program], dtype: torch.dtype, bits: int
) -> None:
    program, other = program_for(quantized_gemv.OP), program_for(dequantize.OP)
    codes, scales = codes_of(bits, 24, 72, program.device)
    weight = torch.full((24, 72), torch.nan, dtype=dtype, device=program.device)
    dequantize.launch(other, out=weight, codes=codes, scales=scales)
    eye = torch.eye(72, dtype=dtype, device=program.device)
    for first in range(0, 72, 16):
        x = eye[first : first + 16]
        out = torch.full((len(x), 24), torch.nan, dtype=dtype, device=program.device)
        quantized_gemv.launch(program, out=out, x=x, codes=codes, scales=scales)
        assert torch.equal(out, weight[:, first : first + 16].T)


def test_every_code_becomes_its_weight(program_for: Callable[[Op], Program]) -> None:
    program = program_for(dequantize.OP)
    out = torch.full((1, 256), torch.nan, device=program.device)
    codes = torch.arange(-128, 128, device=program.device).to(torch.int8)[None]
    dequantize.launch(program, out=out, codes=codes, scales=torch.tensor([0.5]).to(program.device))
    assert out[0].tolist() == [code / 2 for code in range(-128, 128)]

    out = torch.full((1, 32), torch.nan, device=program.device)
    codes = torch.tensor([[2 * b % 16 | (2 * b + 1) % 16 << 4 for b in range(16)]])
    scales = torch.tensor([[[0.5, -3.0]]]).half()
    codes, scales = codes.to(torch.uint8).to(program.device), scales.to(program.device)
    dequantize.launch(program, out=out, codes=codes, scales=scales)
    assert out[0].tolist() == 2 * [code / 2 - 3 for code in range(16)]


def test_a_scale_and_a_minimum_of_very_different_sizes(
    program_for: Callable[[Op], Program],
) -> None:
    """The weight is exact in float, unless the minimum is nearly nothing: see nb/quantized.cuh."""
    program = program_for(dequantize.OP)
    pairs = [(1.001, 0.0), (0.1, -0.8), (0.0517, 3e-4), (-3e-6, 0.4), (0.0, -7.0), (0.7, -6e4)]
    nearly_nothing = [(2.001, 1e-7), (6e4, -3.3)]
    scales = torch.tensor([pairs + nearly_nothing]).half().to(program.device)
    codes = torch.arange(16).repeat(len(scales[0])).to(torch.uint8).to(program.device)
    codes = (codes * 17)[None]  # each code twice
    out = torch.full((1, 32 * len(scales[0])), torch.nan, device=program.device)
    dequantize.launch(program, out=out, codes=codes, scales=scales)
    scale, minimum = (x.double()[0, :, None] for x in scales.unbind(-1))
    weights = out.view(-1, 16, 2)[..., 0].double()
    exact = scale * torch.arange(16, device=program.device) + minimum
    assert torch.equal(weights[: len(pairs)], exact[: len(pairs)].float().double())
    error = (weights - exact).abs() / scale.abs().clamp(min=1e-30)
    assert error[len(pairs) :].max() <= 2**-20


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("size_out", "size_in"), [(21, 648), (74, 328), (4600, 72)])
def test_a_row_is_the_same_in_every_batch(
    program_for: Callable[[Op], Program], bits: int, size_out: int, size_in: int
) -> None:
    program = program_for(quantized_gemv.OP)
    x = torch.randn(16, size_in, device=program.device).half()
    codes, scales = codes_of(bits, size_out, size_in, program.device)

    def product(first: int, last: int) -> Tensor:
        shape = last - first, size_out
        out = torch.full(shape, torch.nan, dtype=x.dtype, device=program.device)
        quantized_gemv.launch(program, out=out, x=x[first:last], codes=codes, scales=scales)
        return out

    whole = product(0, 16)
    for first, last in ((0, 1), (15, 16), (3, 8), (0, 9)):
        assert torch.equal(product(first, last), whole[first:last])


@pytest.mark.parametrize("bits", [4, 8])
def test_nan_in_a_row_spoils_no_other(program_for: Callable[[Op], Program], bits: int) -> None:
    program = program_for(quantized_gemv.OP)
    codes, scales = codes_of(bits, 24, 72, program.device)
    x = torch.randn(3, 72, device=program.device).half()
    clean, spoilt = (torch.full((3, 24), torch.nan).to(x) for _ in range(2))
    quantized_gemv.launch(program, out=clean, x=x, codes=codes, scales=scales)
    x[1] = torch.nan
    quantized_gemv.launch(program, out=spoilt, x=x, codes=codes, scales=scales)
    assert spoilt[1].isnan().all()
    assert torch.equal(spoilt[[0, 2]], clean[[0, 2]])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": torch.zeros(17, 72).half(), "out": torch.zeros(17, 24).half()}, "x has 17 rows"),
        ({"x": torch.zeros(2, 72)}, "x is of torch.float32"),
        ({"x": torch.zeros(2, 76).half()}, "K=76 must be a multiple of 8"),
        (
            {"x": torch.zeros(2, 144).half()},
            r"codes has the shape \[24, 48\], and needs \[24, 80\]",
        ),
        ({"scales": torch.zeros(24, 2, 2).half()}, r"scales has the shape \[24, 2, 2\]"),
        ({"codes": torch.zeros(24, 96, dtype=torch.int8)}, r"scales has the shape \[24, 3, 2\]"),
        ({"out": torch.zeros(3, 24).half()}, r"out has the shape \[3, 24\]"),
        ({"bias": torch.zeros(25).half()}, r"bias has the shape \[25\]"),
    ],
)
def test_what_does_not_fit_is_refused(changes: dict[str, Tensor], message: str) -> None:
    codes, scales = codes_of(4, 24, 72, torch.device("cpu"))
    arguments = {"out": torch.zeros(2, 24).half(), "x": torch.zeros(2, 72).half()}
    with pytest.raises(ValueError, match=message):
        quantized_gemv.launch(None, **arguments | {"codes": codes, "scales": scales} | changes)
