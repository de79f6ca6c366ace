"""`Program` and `Kernel`: what the two backends have in common.

A program is one source on one device; a kernel is one of its functions with its template arguments
filled in, compiled when first asked for. `kernel[grid, block](x, y, n)` launches it, after the
arguments were checked against its parameters.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch

from nbengine.kernels.source import (
    C_TYPES,
    Parameter,
    Source,
    TemplateArgument,
    instantiation,
    parameters,
)

Dim3 = int | tuple[int, ...]


class Program(ABC):
    """A source on a device. Kernels are compiled once and kept."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device = source, device
        self._kernels: dict[tuple[Any, ...], Kernel] = {}

    def kernel(self, name: str, *template_arguments: TemplateArgument) -> Kernel:
        """The function `name` for these template arguments: dtypes, ints, bools, or C text."""
        key = (name, *template_arguments)
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = self._make(instantiation(name, template_arguments))
        return found

    @abstractmethod
    def _make(self, expression: str) -> Kernel: ...


class Kernel(ABC):
    """A compiled function. Index it with `[grid, block]` or `[grid, block, shared_bytes]`, each of
    grid and block an int or up to three, and call the result."""

    def __init__(self, source: Source, expression: str, device: torch.device) -> None:
        self.name = expression
        self.device = device
        self.parameters = parameters(source, expression)

    def __getitem__(self, config: tuple[Any, ...]) -> Launch:
        grid, block, *shared = config
        return Launch(self, _three(grid), _three(block), shared[0] if shared else 0)

    @abstractmethod
    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: tuple[Any, ...],
    ) -> None: ...

    def check(self, arguments: tuple[Any, ...]) -> None:
        """Raises `LaunchError` naming the first argument that does not fit its parameter."""
        if len(arguments) != len(self.parameters):
            names = ", ".join(f"{p.c_type} {p.name}" for p in self.parameters)
            raise LaunchError(
                f"{self.name} takes {len(self.parameters)} arguments ({names}), not "
                f"{len(arguments)}"
            )
        for parameter, argument in zip(self.parameters, arguments, strict=True):
            problem = _problem(parameter, argument, self.device)
            if problem:
                raise LaunchError(f"{self.name}: {parameter.name} {problem}")


class LaunchError(TypeError):
    """An argument does not fit the kernel's parameter."""


class Launch:
    """A kernel with its grid."""

    __slots__ = ("block", "grid", "kernel", "shared_bytes")

    def __init__(
        self,
        kernel: Kernel,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
    ) -> None:
        self.kernel, self.grid, self.block = kernel, grid, block
        self.shared_bytes = shared_bytes

    def __call__(self, *arguments: Any) -> None:
        """Tensors for pointers (None for a null pointer), numbers for the rest, in the kernel's
        order. A grid of no blocks does nothing."""
        self.kernel.check(arguments)
        if 0 not in self.grid:
            self.kernel.launch(self.grid, self.block, self.shared_bytes, arguments)


def _three(dim: Dim3) -> tuple[int, int, int]:
    given = (dim,) if isinstance(dim, int) else tuple(dim)
    x, y, z = (*given, 1, 1, 1)[:3]
    return x, y, z


def _problem(parameter: Parameter, argument: Any, device: torch.device) -> str | None:
    if not parameter.is_pointer:
        if isinstance(argument, bool | int | float):
            return None
        return f"is a {parameter.c_type}, not a {type(argument).__name__}"
    if argument is None:
        return None
    if not isinstance(argument, torch.Tensor):
        return f"is a {parameter.c_type}: give a tensor or None, not a {type(argument).__name__}"
    wanted = parameter.c_type.removesuffix("*")
    if wanted in C_TYPES.values() and C_TYPES.get(argument.dtype) != wanted:
        return f"points to {wanted}, and the tensor holds {argument.dtype}"
    if argument.device != device and not argument.is_pinned():
        return f"must be on {device}, and the tensor is on {argument.device}"
    return None
