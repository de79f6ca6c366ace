"""gemv: products of up to 16 rows with a weight matrix, at the speed the weight can be read."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import FLOATS, normal, poison, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import PACK_BYTES, check_dense, check_rows

MAX_ROWS = 16


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

    Rows of x may be slices of wider ones; out may be the residual. A row's result is the same at
    every M.

    Raises:
        ValueError: shapes do not fit, M is not 1 to 16, or K is no multiple of a 16-byte pack.
    """
    check_product(out, x, weight, bias, residual)
    (num_rows, size_in), size_out = x.shape, weight.shape[0]
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"x has {num_rows} rows: gemv takes 1 to {MAX_ROWS}")
    arguments = (out, x, weight, bias, residual, num_rows, size_out, size_in, x.stride(0))
    count = multiprocessors(program.device)
    if x.dtype == torch.float32:
        rows_of_x = 1 << (num_rows - 1).bit_length()
        wanted = 8 if size_out >= 128 * count else 2  # 16 warps to a multiprocessor
        rows = min(wanted, 32 // rows_of_x)
        kernel = program.kernel("gemv_float", x.dtype, 4, rows, rows_of_x)
        kernel[-(-size_out // (4 * rows)), 128](*arguments)
        return
    warps, tiles, blocks = shape(num_rows, size_out, count)
    kernel = program.kernel("gemv", x.dtype, warps, tiles, 1 if num_rows <= 8 else 2, blocks)
    kernel[-(-size_out // (8 * tiles)), warps * 32](*arguments)


def check_product(
    out: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None
) -> None:
    """Raises `ValueError` unless these are the operands of a product, and K whole packs of 16
    bytes."""
    (num_rows, size_in), size_out = x.shape, weight.shape[0]
    check_rows("x", x, num_rows, size_in)
    check_dense("weight", weight, size_out, size_in)
    check_dense("out", out, num_rows, size_out, alignment=out.element_size())
    if bias is not None:
        check_dense("bias", bias, size_out, alignment=bias.element_size())
    if residual is not None:
        check_dense("residual", residual, num_rows, size_out, alignment=out.element_size())
    pack = PACK_BYTES // x.element_size()
    if size_in % pack:
        raise ValueError(f"K={size_in} of {x.dtype} must be a multiple of {pack}")


SHAPES = ((8, 4, 2), (8, 2, 3), (8, 1, 5), (16, 4, 1))
"""Warps of a block, its weight rows in tiles of 8, and the blocks that a multiprocessor holds at once.
More rows to a block mean fewer reads of x."""


@functools.lru_cache(maxsize=1024)
def shape(num_rows: int, size_out: int, multiprocessors: int) -> tuple[int, int, int]:
    """The first shape whose blocks leave the device nowhere idle for long, or the one that comes
    nearest.

    They run in waves of as many as the device holds, the last of which is seldom full. The warps
    decide the order of a sum, and so must not depend on num_rows.
    """

    def busy(shape: tuple[int, int, int]) -> float:
        _, tiles, at_once = shape
        blocks, slots = -(-size_out // (8 * tiles)), at_once * multiprocessors
        return min(0.95, blocks / (-(-blocks // slots) * slots))

    best = max(SHAPES, key=busy)
    if best == (8, 1, 5) and num_rows > 8:  # for which its threads have too few registers
        return 8, 2, 3
    return best


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """The emulated device is so small that small matrices reach every shape."""
    if device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


def reference(
    *,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
) -> None:
    total = x.double() @ weight.double().T
    if bias is not None:
        total += bias
    if residual is not None:
        total += residual
    out.copy_(total)


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for rows, size_out, size_in in (
            (1, 74, 576),
            (3, 16, 1536),
            (5, 33, 64),
            (8, 20, 4864),
            (16, 2, 264),
        ):
            yield case(dtype, rows, size_out, size_in, rows % 2 == 1, rows > 3)
    for rows, size_out, size_in in (
        *((7, 90, 72), (12, 74, 136), (9, 120, 200), (2, 120, 8)),  # every shape of a block
        *((2, 4600, 8), (12, 4600, 8), (7, 6140, 8), (2, 8190, 8), (12, 8190, 8)),  # of 132 SMs
    ):
        yield case(torch.bfloat16, rows, size_out, size_in, False, True)
    for rows, size_out, size_in in ((1, 300, 132), (5, 300, 36), (2, 16900, 8)):  # eight to a warp
        yield case(torch.float32, rows, size_out, size_in, True, False)


def case(
    dtype: torch.dtype,
    rows: int,
    size_out: int,
    size_in: int,
    with_bias: bool,
    with_residual: bool,
) -> Case:
    """Of that many rows of x and a weight `[size_out, size_in]`."""

    def make(generator: torch.Generator) -> Arguments:
        return {
            "out": poison(generator, dtype, rows, size_out),
            "x": normal(generator, dtype, rows, size_in),
            "weight": normal(generator, dtype, size_out, size_in) / size_in**0.5,
            "bias": normal(generator, dtype, size_out) if with_bias else None,
            "residual": normal(generator, dtype, rows, size_out) if with_residual else None,
        }

    words = ("bias" if with_bias else "", "residual" if with_residual else "")
    return Case(title(dtype, f"{rows}x{size_out}x{size_in}", *words), make)


def bench_cases() -> Iterator[Case]:
    """The products of a layer (q, k and v; attention's output; gate and up; down), then logits."""
    hidden, mlp, vocabulary = 3584, 18944, 152064
    for rows in (1, 8, 16):
        for size_out, size_in in ((4608, hidden), (hidden, hidden), (2 * mlp, hidden)):
            yield case(torch.bfloat16, rows, size_out, size_in, False, False)
        yield case(torch.bfloat16, rows, hidden, mlp, False, False)
        yield case(torch.bfloat16, rows, vocabulary, hidden, False, False)


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance.of_rounding(arguments["out"].dtype)


def cost(arguments: Arguments) -> Cost:
    out, x, weight = arguments["out"], arguments["x"], arguments["weight"]
    added = [arguments[name] for name in ("bias", "residual") if arguments[name] is not None]
    tensors = (out, x, weight, *added)
    elements = sum(tensor.numel() for tensor in tensors)
    return Cost(elements * out.element_size(), 2 * x.shape[0] * weight.numel())


OP = Op(
    name="gemv",
    source="gemv.cu",
    outputs=("out",),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
)
