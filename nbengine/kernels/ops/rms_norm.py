"""rms_norm: RMSNorm with the residual's addition fused, for layers and for heads."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.program import Program


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
    rows may be slices of wider ones. The weight is float32.
    """
    size = weight.shape[-1]
    num_sets = weight.numel() // size
    threads = min(1024, max(32, -(-size * x.element_size() // 16 // 32) * 32))
    kernel = program.kernel("rms_norm", x.dtype, size, threads, residual is not None)
    kernel[x.shape[0] * num_sets, threads](
        out, x, residual, weight, num_sets, x.stride(0), out.stride(0), eps
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
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        for tokens, size in ((1, 64), (3, 576), (2, 4096), (1, 8192)):
            for with_residual in (False, True):
                yield _case(dtype, tokens, 0, size, with_residual)
        yield _case(dtype, 3, 5, 128, False)


def _case(dtype: torch.dtype, tokens: int, sets: int, size: int, with_residual: bool) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        device = generator.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        shape = (tokens, sets, size) if sets else (tokens, size)
        weight = torch.rand(shape[1:], generator=generator, device=device) + 0.5
        wide = normal(tokens, *(n + 2 if sets and i == 0 else n for i, n in enumerate(shape[1:])))
        return {
            "out": torch.full(shape, torch.nan, dtype=dtype, device=device),
            "x": wide[:, :sets] if sets else wide,
            "weight": weight,
            "eps": 1e-5,
            "residual": normal(tokens, size) if with_residual else None,
        }

    name = f"{str(dtype)[6:]}-{tokens}x{f'{sets}x' if sets else ''}{size}"
    return Case(name + ("-residual" if with_residual else ""), make)


def tolerance(arguments: Arguments) -> Tolerance:
    relative = {torch.float32: 1e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}
    return Tolerance(relative[arguments["out"].dtype], 1e-5)


def cost(arguments: Arguments) -> Cost:
    x, residual = arguments["x"], arguments["residual"]
    tensors = 2 if residual is None else 4
    return Cost(tensors * x.numel() * x.element_size(), 4 * x.numel())


OP = Op(
    name="rms_norm",
    source="rms_norm.cu",
    outputs=("out", "residual"),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
)
