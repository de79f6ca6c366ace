"""Tensors for the shape grids: random inputs, and outputs that hold nothing right yet."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


def normal(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """Standard normal values on the generator's device."""
    return torch.randn(shape, generator=generator, device=generator.device).to(dtype)


def poison(generator: torch.Generator, dtype: torch.dtype, *shape: int) -> Tensor:
    """NaN everywhere: what is not written, and what is read though it should not be, shows."""
    return torch.full(shape, torch.nan, dtype=dtype, device=generator.device)


def sliced(rows: Tensor, before: int, after: int) -> Tensor:
    """The same values as slices of wider rows: NaN in `before` and `after` elements around each (of
    the second dimension)."""
    wide = rows.new_full(
        (rows.shape[0], before + rows.shape[1] + after, *rows.shape[2:]), torch.nan
    )
    inner = wide[:, before : before + rows.shape[1]]
    inner.copy_(rows)
    return inner


def title(dtype: torch.dtype, *words: object) -> str:
    """`bfloat16-3x64-residual` of its parts; empty ones fall away."""
    return "-".join(str(word) for word in (str(dtype)[6:], *words) if word != "")
