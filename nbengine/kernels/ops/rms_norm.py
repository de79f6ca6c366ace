"""rms_norm: RMSNorm with the residual's addition fused, for layers and for heads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import FLOATS, normal, poison, sliced, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense, check_rows, pack_size


def launch(
    program: Program,
    *,
    out: Tensor,
    x: Tensor,
    weight: Tensor,
    eps: float,
    residual: Tensor | None = None,
) -> None:
    """out = norm(x) * weight, or with a residual `[T, size]`: residual += x, out = norm(residual).

    x and out are `[T, size]` for a weight `[size]`, `[T, sets, size]` for one `[sets, size]`; their
    rows may be slices of wider ones, and out may be x. The weight is float32. Raises `ValueError`
    for shapes that do not fit, and for a residual of heads.
    """
    num_tokens, *inner = x.shape
    size = inner[-1]
    num_sets = inner[0] if len(inner) == 2 else 1
    check_dense("weight", weight, *inner)
    check_rows("x", x, num_tokens, *inner)
    check_rows("out", out, num_tokens, *inner)
    if residual is not None:
        if num_sets > 1:
            raise ValueError(f"x {list(x.shape)} has heads, which have no residual")
        check_dense("residual", residual, num_tokens, size)
    packs = size // pack_size(size, x.element_size())
    if packs <= 32:  # rows in parts of warps, of four warps in all
        lanes = 1 << (packs - 1).bit_length()
        rows = 128 // lanes
    else:
        lanes, rows = min(512, -(-packs // 32) * 32), 1
    kernel = program.kernel("rms_norm", x.dtype, size, lanes, rows, residual is not None)
    num_rows = num_tokens * num_sets
    kernel[-(-num_rows // rows), lanes * rows](
        out, x, residual, weight, num_rows, num_sets, x.stride(0), out.stride(0), eps
    )


def reference(
    *, out: Tensor, x: Tensor, weight: Tensor, eps: float, residual: Tensor | None = None
) -> None:
    if residual is not None:
        residual += x
        x = residual
    scale = torch.rsqrt(x.float().square().mean(-1, keepdim=True) + eps)
    out.copy_(x.float() * scale * weight)


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for tokens, size in ((1, 64), (3, 576), (2, 4096)):
            for with_residual in (False, True):
                yield _case(dtype, tokens, (size,), with_residual)
        yield _case(dtype, 1, (16384,), True)
        for sets, head_dim in ((5, 64), (3, 80), (9, 128), (2, 256)):
            yield _case(dtype, 3, (sets, head_dim), False)
    yield _case(torch.bfloat16, 2, (10,), True)  # no whole packs of 16 bytes


def _case(dtype: torch.dtype, tokens: int, inner: tuple[int, ...], with_residual: bool) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        x = normal(generator, dtype, tokens, *inner)
        return {
            "out": poison(generator, dtype, tokens, *inner),
            "x": sliced(x, 0, 2) if len(inner) == 2 else x,
            "weight": torch.rand(inner, generator=generator, device=generator.device) + 0.5,
            "eps": 0.25 if with_residual else 1e-5,  # large enough to be missed; as models have it
            "residual": normal(generator, dtype, tokens, *inner) if with_residual else None,
        }

    shape = "x".join(map(str, (tokens, *inner)))
    return Case(title(dtype, shape, "residual" if with_residual else ""), make)


def bench_cases() -> Iterator[Case]:
    for tokens in (1, 128, 8192):
        yield _case(torch.bfloat16, tokens, (3584,), True)


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance.of_rounding(arguments["out"].dtype)


def cost(arguments: Arguments) -> Cost:
    x, weight, residual = arguments["x"], arguments["weight"], arguments["residual"]
    tensors = 2 if residual is None else 4
    return Cost(tensors * x.numel() * x.element_size() + weight.nbytes, 4 * x.numel())


OP = Op(
    name="rms_norm",
    source="rms_norm.cu",
    outputs=("out", "residual"),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
    alternatives={"cute": "nbengine.kernels.cute.rms_norm:launch"},
)
