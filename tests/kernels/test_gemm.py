"""gemm: to the last bit what gemv gives, at any number of rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear

from nbengine.kernels.op import Op
from nbengine.kernels.ops import gemm, gemv
from nbengine.kernels.program import Program
from nbengine.kernels.verification import verify


def test_it_agrees_with_the_reference_on_its_grid(program_for: Callable[[Op], Program]) -> None:
    verify(gemm.OP, program_for(gemm.OP))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("size_out", "size_in"),
    [
        (21, 648),  # K ends inside a step
        (74, 1600),  # steps that are no multiple of the parts
        (16, 3200),  # 16 parts, on the emulator
        (120, 8),
    ],
)
def test_a_row_is_the_one_that_gemv_gives(
    program_for: Callable[[Op], Program], dtype: torch.dtype, size_out: int, size_in: int
) -> None:
    of_few, of_many = program_for(gemv.OP), program_for(gemm.OP)
    device = of_few.device
    x = torch.randn(150, size_in, device=device).to(dtype)
    weight = torch.randn(size_out, size_in, device=device).to(dtype)
    bias = torch.randn(size_out, device=device).to(dtype)
    # The rounded sums themselves, taken off again: what is left shows their last bits as floats.
    residual = -linear(x.float(), weight.float(), bias.float()).to(dtype)

    def product(program: Program, op: Op, first: int, last: int) -> Tensor:
        rows = slice(first, last)
        out = torch.full((last - first, size_out), torch.nan, dtype=dtype, device=device)
        added = {"bias": bias, "residual": residual[rows]}
        op.launch(program, out=out, x=x[rows], weight=weight, **added)
        return out

    whole = product(of_many, gemm.OP, 0, 150)
    for first, last in ((0, 16), (5, 6), (40, 52), (120, 136), (149, 150)):
        assert torch.equal(product(of_few, gemv.OP, first, last), whole[first:last])
    for first, last in ((3, 4), (7, 140)):
        assert torch.equal(product(of_many, gemm.OP, first, last), whole[first:last])


def test_as_many_parts_as_gemv_has_warps_on_any_device() -> None:
    """On a large one, too: whose blocks of gemv are those of `gemv.shape`."""
    for multiprocessors in (2, 72, 108, 132):
        for size_out in range(8, 40_000, 104):
            of_few = {gemv.shape(rows, size_out, multiprocessors)[0] for rows in (1, 8, 9, 16)}
            assert of_few == {gemv.shape(1, size_out, multiprocessors)[0]}


def test_rows_do_not_meet(program_for: Callable[[Op], Program]) -> None:
    """NaN in a row of x, or in one of the weight, stays in its row or column."""
    program = program_for(gemm.OP)
    x = torch.randn(20, 64, device=program.device).half()
    weight = torch.randn(70, 64, device=program.device).half()
    x[3, 5] = weight[67, 60] = torch.nan
    out = torch.full((20, 70), torch.nan, dtype=torch.float16, device=program.device)
    gemm.launch(program, out=out, x=x, weight=weight)
    expected = torch.zeros(20, 70, dtype=torch.bool, device=program.device)
    expected[3], expected[:, 67] = True, True
    assert torch.equal(out.isnan(), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, 32).half()}, r"weight has the shape \[5, 32\], and needs"),
        (
            {"x": torch.zeros(20, 63).half(), "weight": torch.zeros(5, 63).half()},
            "K=63 of torch.float16 must be a multiple of 8",
        ),
        (
            {"x": torch.zeros(20, 64), "weight": torch.zeros(5, 64), "out": torch.zeros(20, 5)},
            "x is of torch.float32: tensor cores take float16 and bfloat16",
        ),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], message: str) -> None:
    arguments = {"out": torch.zeros(20, 5), "x": torch.zeros(20, 64), "weight": torch.zeros(5, 64)}
    arguments = {name: tensor.half() for name, tensor in arguments.items()}
    with pytest.raises(ValueError, match=message):
        gemm.launch(None, **arguments | change)
