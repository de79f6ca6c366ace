"""gemv: against torch's product, the same row at every batch size, and its refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from nbengine.kernels.op import Op
from nbengine.kernels.ops import gemv
from nbengine.kernels.program import Program


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_it_is_a_linear_layer_plus_a_residual_that_it_may_write_over(
    program_for: Callable[[Op], Program], dtype: torch.dtype
) -> None:
    program = program_for(gemv.OP)
    device = program.device
    x, weight = torch.randn(3, 96, device=device), torch.randn(24, 96, device=device)
    bias, residual = torch.randn(24, device=device), torch.randn(3, 24, device=device)
    x, weight, bias, residual = (t.to(dtype) for t in (x, weight, bias, residual))
    expected = linear(x.float(), weight.float(), bias.float()) + residual
    gemv.launch(program, out=residual, x=x, weight=weight, bias=bias, residual=residual)
    tolerance = 1e-5 if dtype == torch.float32 else 1.6e-2
    torch.testing.assert_close(residual.float(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("dtype", "size_out", "size_in"),
    [
        (torch.float32, 21, 648),
        (torch.float16, 21, 648),
        (torch.float16, 74, 328),  # more weight rows to a block from 9 rows on, on the emulator
        (torch.float16, 4600, 72),  # and on a GPU of 132 multiprocessors
    ],
)
def test_a_row_is_the_same_in_every_batch(
    program_for: Callable[[Op], Program], dtype: torch.dtype, size_out: int, size_in: int
) -> None:
    program = program_for(gemv.OP)
    x = torch.randn(16, size_in, device=program.device).to(dtype)
    weight = torch.randn(size_out, size_in, device=program.device).to(dtype)

    def product(first: int, last: int) -> Tensor:
        shape = last - first, size_out
        out = torch.full(shape, torch.nan, dtype=dtype, device=program.device)
        gemv.launch(program, out=out, x=x[first:last], weight=weight)
        return out

    whole = product(0, 16)
    for first, last in ((0, 1), (4, 5), (15, 16), (3, 8), (2, 10), (0, 9)):
        assert torch.equal(product(first, last), whole[first:last])


@pytest.mark.parametrize("multiprocessors", [2, 72, 108, 132])
def test_the_warps_that_share_a_sum_do_not_depend_on_the_rows(multiprocessors: int) -> None:
    for size_out in range(8, 40_000, 56):
        few, many = (gemv.shape(rows, size_out, multiprocessors) for rows in (8, 9))
        assert few[0] == many[0]


def test_small_matrices_are_spread_over_the_device() -> None:
    """The products of a model of 7 billion parameters, on 132 multiprocessors: a wave of blocks
    that is nearly full, or many."""
    shapes = {size_out: gemv.shape(1, size_out, 132) for size_out in (3584, 4608, 8192, 152064)}
    assert shapes == {3584: (16, 4, 1), 4608: (8, 1, 5), 8192: (8, 4, 2), 152064: (8, 4, 2)}


def test_rows_do_not_meet(program_for: Callable[[Op], Program]) -> None:
    """NaN in a row of x, or in one of the weight, stays in its row or column."""
    program = program_for(gemv.OP)
    x = torch.randn(9, 64, device=program.device).half()
    weight = torch.randn(40, 64, device=program.device).half()
    x[3, 5] = weight[17, 60] = torch.nan
    out = torch.full((9, 40), torch.nan, dtype=torch.float16, device=program.device)
    gemv.launch(program, out=out, x=x, weight=weight)
    expected = torch.zeros(9, 40, dtype=torch.bool, device=program.device)
    expected[3], expected[:, 17] = True, True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"x": torch.zeros(17, 64), "out": torch.zeros(17, 5)},
            "x has 17 rows: gemv takes 1 to 16",
        ),
        ({"x": torch.zeros(2, 63), "weight": torch.zeros(5, 63)}, "K=63 of torch.float32 .* 4"),
        ({"weight": torch.zeros(5, 32)}, r"weight has the shape \[5, 32\], and needs \[5, 64\]"),
        ({"weight": torch.zeros(64, 5).T}, "weight .* must be contiguous"),
        ({"bias": torch.zeros(4)}, r"bias has the shape \[4\], and needs \[5\]"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    arguments = {"out": torch.zeros(2, 5), "x": torch.zeros(2, 64), "weight": torch.zeros(5, 64)}
    with pytest.raises(ValueError, match=message):
        gemv.launch(None, **arguments | change)
