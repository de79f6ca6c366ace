"""quantized_gemv: products of up to 16 rows with a weight matrix in 4 or 8 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import normal, poison, sliced, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.ops import dequantize
from nbengine.kernels.ops.gemv import MAX_ROWS, multiprocessors
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense, check_rows


def launch(
    program: Program,
    *,
    out: Tensor,
    x: Tensor,
    codes: Tensor,
    scales: Tensor,
    bias: Tensor | None = None,
) -> None:
    """out `[M, N]` = x `[M, K]` @ weight `[N, K]`^T + bias `[N]`, of the weight that `dequantize`
    gives for the codes in x's dtype, float16 or bfloat16.

    Rows of x may be slices of wider ones. A row's result is the same at every M.

    Raises:
        ValueError: shapes or the dtype do not fit, M is not 1 to 16, or K is no multiple of 8.
    """
    num_rows, size_in = x.shape
    size_out = codes.shape[0]
    check_rows("x", x, num_rows, size_in)
    dequantize.check_quantized(codes, scales, size_out, size_in)
    check_dense("out", out, num_rows, size_out, alignment=out.element_size())
    if bias is not None:
        check_dense("bias", bias, size_out, alignment=bias.element_size())
    if not 1 <= num_rows <= MAX_ROWS:
        raise ValueError(f"x has {num_rows} rows: quantized_gemv takes 1 to {MAX_ROWS}")
    if x.element_size() != 2:
        raise ValueError(f"x is of {x.dtype}: tensor cores take float16 and bfloat16")
    # 32 warps to a multiprocessor, or 16 with twice the registers. How many share a row decides the
    # order of its sum, and so must not depend on num_rows.
    warps = 16 if size_out <= 32 * multiprocessors(program.device) else 8
    of_x = -(-num_rows // 8)
    tiles = of_x if codes.dtype == torch.uint8 else 1
    blocks = 32 // (warps * tiles)
    kernel = program.kernel(
        "quantized_gemv", x.dtype, codes.dtype, scales.dtype, warps, tiles, of_x, blocks
    )
    kernel[-(-size_out // (16 * tiles)), warps * 32](
        out, x, codes, scales, bias, num_rows, size_out, size_in, x.stride(0)
    )


def reference(
    *, out: Tensor, x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None
) -> None:
    weight = x.new_empty(codes.shape[0], x.shape[1])
    dequantize.reference(out=weight, codes=codes, scales=scales)
    total = x.double() @ weight.double().T
    out.copy_(total if bias is None else total + bias)


def cases() -> Iterator[Case]:
    for dtype in (torch.float16, torch.bfloat16):
        for bits in (4, 8):
            for rows, size_out, size_in in (
                (1, 74, 576),
                (3, 16, 1536),
                (5, 33, 72),
                (8, 20, 4864),
                (16, 2, 264),
                (12, 90, 200),
                (2, 4600, 8),  # with fewer warps to a row, on 132 multiprocessors too
                (12, 4600, 8),
            ):
                yield _case(dtype, bits, rows, size_out, size_in, rows % 2 == 1)


def _case(
    dtype: torch.dtype, bits: int, rows: int, size_out: int, size_in: int, with_bias: bool
) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        codes, scales = dequantize.quantized(generator, bits, size_out, size_in)
        return {
            "out": poison(generator, dtype, rows, size_out),
            "x": sliced(normal(generator, dtype, rows, size_in), 8, 16),
            "codes": codes,
            "scales": scales,
            "bias": normal(generator, dtype, size_out) if with_bias else None,
        }

    words = f"{bits}bit", f"{rows}x{size_out}x{size_in}", "bias" if with_bias else ""
    return Case(title(dtype, *words), make)


def bench_cases() -> Iterator[Case]:
    """The products of a layer, as for gemv, and logits in 8 bits."""
    hidden, mlp, vocabulary = 3584, 18944, 152064
    for rows in (1, 8, 16):
        for bits in (4, 8):
            for size_out in (4608, hidden, 2 * mlp):
                yield _case(torch.bfloat16, bits, rows, size_out, hidden, False)
            yield _case(torch.bfloat16, bits, rows, hidden, mlp, False)
        yield _case(torch.bfloat16, 8, rows, vocabulary, hidden, False)


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance.of_rounding(arguments["out"].dtype)


def cost(arguments: Arguments) -> Cost:
    x, codes = arguments["x"], arguments["codes"]
    moved = sum(tensor.nbytes for tensor in arguments.values() if tensor is not None)
    return Cost(moved, 2 * len(x) * len(codes) * x.shape[1])


OP = Op(
    name="quantized_gemv",
    source="quantized_gemv.cu",
    outputs=("out",),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
)
