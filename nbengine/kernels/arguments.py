"""Copies of a call's arguments, for whoever makes the call twice: `verify`, `bench`, `record`.

A copy keeps strides and what lies between the rows of a slice, a copy of pinned memory is pinned,
and two arguments that are one tensor stay one.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from nbengine.kernels.op import Arguments


def cloned(
    arguments: Arguments, wanted: Callable[[str, Tensor], bool] = lambda name, tensor: True
) -> Arguments:
    """The same arguments with copies of the tensors that `wanted(name, tensor)` picks."""
    copies: dict[int, Tensor] = {}
    result = {}
    for name, value in arguments.items():
        if isinstance(value, Tensor) and (id(value) in copies or wanted(name, value)):
            value = copies.setdefault(id(value), _clone(value))
        result[name] = value
    return result


def span(tensor: Tensor) -> Tensor:
    """The memory from the tensor's first element to its last, `[extent]`: with what lies between
    the rows of a slice."""
    if tensor.numel() == 0:
        return tensor.reshape(0)
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((extent,), (1,), tensor.storage_offset())


def nbytes(arguments: Arguments) -> int:
    """Of all the tensors' memory, each counted once."""
    tensors = {id(x): x for x in arguments.values() if isinstance(x, Tensor)}
    return sum(span(x).numel() * x.element_size() for x in tensors.values())


def _clone(tensor: Tensor) -> Tensor:
    if tensor.numel() == 0:
        return tensor.clone()
    whole = span(tensor)
    copy = torch.empty_like(whole, pin_memory=whole.is_pinned()).copy_(whole)
    return copy.as_strided(tensor.shape, tensor.stride())
