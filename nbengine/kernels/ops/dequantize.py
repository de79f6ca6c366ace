"""dequantize: weights out of 4 or 8 bits, for products of many rows by a library."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import FLOATS, poison, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense

GROUP = 32
"""Codes of a row that share a scale and a minimum, in 4 bits. Rows are padded to whole groups."""

_THREADS = 256


def launch(program: Program, *, out: Tensor, codes: Tensor, scales: Tensor) -> None:
    """out `[N, K]` = the weights that the codes stand for.

    Of 4 bits, codes are uint8 `[N, groups * 16]` (the code of k = 2b in the low half of byte b,
    that of 2b + 1 in the high one) and scales float16 `[N, groups, 2]`: weight = scale * code +
    minimum. Of 8 bits, codes are int8 `[N, groups * 32]` and scales float32 `[N]`: weight = scale *
    code. Here groups is K / 32, rounded up.

    Raises:
        ValueError: shapes do not fit, or K is no multiple of 8.
    """
    size_out, size_in = out.shape
    check_dense("out", out, size_out, size_in)
    check_quantized(codes, scales, size_out, size_in)
    kernel = program.kernel("dequantize", out.dtype, codes.dtype, scales.dtype, _THREADS)
    items = size_out * (size_in // 8)
    kernel[-(-items // _THREADS), _THREADS](out, codes, scales, size_out, size_in)


def check_quantized(codes: Tensor, scales: Tensor, size_out: int, size_in: int) -> None:
    """Raises `ValueError` unless these are the codes and scales of a weight `[N, K]`."""
    if size_in % 8:
        raise ValueError(f"K={size_in} must be a multiple of 8")
    groups = -(-size_in // GROUP)
    if codes.dtype == torch.int8:
        check_dense("codes", codes, size_out, groups * GROUP)
        check_dense("scales", scales, size_out, alignment=4)
    else:
        check_dense("codes", codes, size_out, groups * GROUP // 2)
        check_dense("scales", scales, size_out, groups, 2, alignment=4)


def reference(*, out: Tensor, codes: Tensor, scales: Tensor) -> None:
    size_in = out.shape[1]
    if codes.dtype == torch.int8:
        out.copy_(codes[:, :size_in].float() * scales[:, None])
        return
    groups = torch.stack((codes & 15, codes >> 4), dim=-1).view(len(codes), -1, GROUP).float()
    scale, minimum = scales.float().unbind(-1)
    out.copy_((groups * scale[..., None] + minimum[..., None]).flatten(1)[:, :size_in])


def quantized(
    generator: torch.Generator, bits: int, size_out: int, size_in: int
) -> tuple[Tensor, Tensor]:
    """Random codes and scales, of weights around 1 / sqrt(K)."""
    device = generator.device
    groups = -(-size_in // GROUP)
    size = size_in**-0.5

    def uniform(*shape: int) -> Tensor:
        return (0.5 + torch.rand(shape, generator=generator, device=device)) * size

    if bits == 8:
        shape = size_out, groups * GROUP
        codes = torch.randint(-128, 128, shape, generator=generator, device=device)
        return codes.to(torch.int8), uniform(size_out) / 64
    shape = size_out, groups * GROUP // 2
    codes = torch.randint(256, shape, generator=generator, device=device).to(torch.uint8)
    scale = uniform(size_out, groups) / 5
    return codes, torch.stack((scale, -8 * scale + uniform(size_out, groups) / 5), dim=-1).half()


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for bits in (4, 8):
            for size_out, size_in in ((5, 576), (3, 72), (2, 4864), (1, 8)):
                yield _case(dtype, bits, size_out, size_in)


def _case(dtype: torch.dtype, bits: int, size_out: int, size_in: int) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        codes, scales = quantized(generator, bits, size_out, size_in)
        out = poison(generator, dtype, size_out, size_in)
        return {"out": out, "codes": codes, "scales": scales}

    return Case(title(dtype, f"{bits}bit", f"{size_out}x{size_in}"), make)


def bench_cases() -> Iterator[Case]:
    for bits in (4, 8):
        yield _case(torch.bfloat16, bits, 37888, 3584)


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance.of_rounding(arguments["out"].dtype)


def cost(arguments: Arguments) -> Cost:
    out = arguments["out"]
    moved = sum(arguments[name].nbytes for name in ("out", "codes", "scales"))
    return Cost(moved, 2 * out.numel())


OP = Op(
    name="dequantize",
    source="dequantize.cu",
    outputs=("out",),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
)
