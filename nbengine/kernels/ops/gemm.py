"""gemm: products of many rows with a weight matrix, in `gemv`'s order of additions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.op import Case, Op
from nbengine.kernels.ops import gemv
from nbengine.kernels.program import Program

_ROWS, _COLUMNS = 128, 64
"""Of a block: rows of x, and of the weight."""
_THREADS = 256
_SHARED_BYTES = 4 * (_ROWS + _COLUMNS) * 128
"""Four stages of 64 elements of each row."""


def launch(
    program: Program,
    *,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    """out `[M, N]` = x `[M, K]` @ weight `[N, K]`^T + bias `[N]` + residual `[M, N]`.

    The arguments of `gemv`, float16 or bfloat16, with any number of rows; each row's result is the
    one that `gemv` gives, bit for bit. The library's product is faster, and adds up in an order that
    depends on M.

    Raises:
        ValueError: shapes or the dtype do not fit, or K is no multiple of 8.
    """
    gemv.check_product(out, x, weight, bias, residual)
    (num_rows, size_in), size_out = x.shape, weight.shape[0]
    if x.element_size() != 2:
        raise ValueError(f"x is of {x.dtype}: tensor cores take float16 and bfloat16")
    parts, *_ = gemv.shape(1, size_out, gemv.multiprocessors(program.device))
    grid = -(-num_rows // _ROWS), -(-size_out // _COLUMNS)
    program.kernel("gemm", x.dtype)[grid, _THREADS, _SHARED_BYTES](
        out, x, weight, bias, residual, num_rows, size_out, size_in, x.stride(0), parts
    )


def cases() -> Iterator[Case]:
    for dtype in (torch.float16, torch.bfloat16):
        for rows, size_out, size_in in (
            (1, 74, 576),
            (17, 16, 1096),  # with 16 parts of a sum, and fewer steps than two each
            (40, 33, 72),
            (130, 70, 200),
        ):
            yield gemv.case(dtype, rows, size_out, size_in, rows % 2 == 1, rows > 20)


def bench_cases() -> Iterator[Case]:
    """The products of a layer, as for gemv."""
    hidden, mlp = 3584, 18944
    for rows in (32, 2048):
        for size_out, size_in in ((4608, hidden), (hidden, hidden), (2 * mlp, hidden)):
            yield gemv.case(torch.bfloat16, rows, size_out, size_in, False, False)
        yield gemv.case(torch.bfloat16, rows, hidden, mlp, False, False)


OP = Op(
    name="gemm",
    source="gemm.cu",
    outputs=("out",),
    launch=launch,
    reference=gemv.reference,
    cases=cases,
    tolerance=gemv.tolerance,
    cost=gemv.cost,
    bench_cases=bench_cases,
)
