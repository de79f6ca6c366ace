"""`Program` and `Kernel`: what the two backends have in common.

A program is one source on one device; a kernel is one of its functions with its template arguments
filled in, compiled when first asked for. `kernel[grid, block](x, y, n)` launches it. What is checked
here is checked on both backends, so that a launch that passes on one is not refused on the other:
the shape of the grid, and each argument against its parameter.

A tensor that is given for a pointer
- holds what the parameter points to (`source.POINTEES`),
- lies on the program's device, or in pinned memory, which a GPU reads over the bus,
- is dense in its last dimension, and no two of its elements share an address. Rows may be slices of
  wider rows: a kernel that takes strides reads them in place. One that takes none must be given
  `x.contiguous()`, which only the caller can know.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from math import inf
from typing import Any

import torch
from torch import Tensor

from nbengine.errors import InvalidField, NbengineError, shown
from nbengine.kernels.report import LIMITS
from nbengine.kernels.source import (
    POINTEES,
    Parameter,
    Source,
    TemplateArgument,
    instantiation,
    parameters,
)

Dim3 = int | tuple[int, ...]

MAX_GRID = (2**31 - 1, 65_535, 65_535)
MAX_BLOCK = (1024, 1024, 64)
MAX_THREADS = 1024
MAX_SHARED_BYTES = LIMITS["sm_90"].block_shared_bytes
"""Of one block, static and dynamic, on the devices that have the most."""
_KEPT_LAUNCHES = 1024


class LaunchError(NbengineError, TypeError):
    """A launch was refused: its grid is not a possible one, or an argument does not fit the
    kernel's parameter."""


def kernel_device(device: torch.device | str | None) -> torch.device:
    """`device`, or the GPU where there is one and the CPU elsewhere.

    Raises:
        InvalidField: kernels can't run there, or there is no such GPU.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device is None:
        return torch.device("cuda" if num_gpus else "cpu")
    found = torch.device(device)
    if found.type not in ("cuda", "cpu"):
        problem = 'kernels run on an NVIDIA GPU ("cuda"), or emulated on a CPU ("cpu")'
        raise InvalidField("device", str(device), problem)
    if found.type == "cuda" and (found.index or 0) >= num_gpus:
        problem = f"torch sees {num_gpus or 'no'} NVIDIA GPU{'s' * (num_gpus > 1)} here"
        raise InvalidField("device", str(device), f'{problem}; on "cpu" kernels are emulated')
    return found


class UnfitArguments(LaunchError):
    """What is wrong is the arguments, for the kernel's parameters: their number, or one of them."""

    def __init__(self, message: str, kernel: str) -> None:
        super().__init__(message)
        self.kernel = kernel
        """With its template arguments."""


class Program(ABC):
    """A source on a device. Kernels are compiled once and kept."""

    limits = LIMITS["sm_90"]
    """Of the device's multiprocessors: an op chooses its tiles by the shared memory that they have.
    The emulator has those of sm_90."""

    def __init__(self, source: Source, device: torch.device) -> None:
        self.source, self.device = source, device
        self._kernels: dict[tuple[Any, ...], Kernel] = {}

    def kernel(self, name: str, *template_arguments: TemplateArgument) -> Kernel:
        """The function `name` for these template arguments: dtypes, ints, bools, or C text."""
        key = (name, *template_arguments)  # True and 1 are one key, and in C one argument
        found = self._kernels.get(key)
        if found is None:
            found = self._kernels[key] = self._make(instantiation(name, template_arguments))
        return found

    @property
    def kernels(self) -> tuple[Kernel, ...]:
        """Those that were asked for so far."""
        return tuple(self._kernels.values())

    @abstractmethod
    def _make(self, expression: str) -> Kernel: ...


class Kernel(ABC):
    """A compiled function. Index it with `[grid, block]` or `[grid, block, shared_bytes]`, each of
    grid and block an int or up to three, and call the result.

    Raises `CompileError` when made for a function that the source does not have."""

    max_threads = MAX_THREADS
    """Of a block. A backend that knows better says so, here and for the shared memory."""
    max_shared_bytes = MAX_SHARED_BYTES
    """The most dynamic shared memory that a launch may ask for."""

    def __init__(self, source: Source, expression: str, device: torch.device) -> None:
        self.name = expression
        self.device = device
        self.parameters = parameters(source, expression)
        self._checks = tuple(_check(parameter, device) for parameter in self.parameters)
        self._launches: dict[tuple[Any, ...], Launch] = {}

    def __getitem__(self, config: tuple[Any, ...]) -> Launch:
        """Raises `LaunchError` for a grid, block or shared memory that no device could run."""
        try:
            found = self._launches.get(config)
        except TypeError:  # unhashable, so no tuple of ints
            found = None
        if found is None:
            if len(self._launches) == _KEPT_LAUNCHES:  # grids that depend on lengths
                self._launches.clear()
            found = self._launch(config)
            self._launches[config] = found
        return found

    @abstractmethod
    def launch(
        self,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        shared_bytes: int,
        arguments: tuple[Any, ...],
    ) -> None:
        """Run it on arguments that were checked, and a grid that is not empty."""

    def check(self, arguments: tuple[Any, ...]) -> None:
        """Raises `UnfitArguments` naming the first argument that does not fit its parameter."""
        if len(arguments) != len(self.parameters):
            raise UnfitArguments(
                f"{self.name} takes {len(self.parameters)} arguments "
                f"({', '.join(map(str, self.parameters))}), not {len(arguments)}",
                self.name,
            )
        for check, argument, parameter in zip(
            self._checks, arguments, self.parameters, strict=True
        ):
            problem = check(argument)
            if problem is not None:
                raise UnfitArguments(f"{self.name}: {parameter.name} {problem}", self.name)

    def _launch(self, config: Any) -> Launch:
        if not isinstance(config, tuple) or not 2 <= len(config) <= 3:
            raise LaunchError(
                f"{self.name}[{shown(config)}]: write kernel[grid, block] or "
                "kernel[grid, block, shared_bytes], then the arguments in parentheses"
            )
        grid = self._three("grid", config[0], MAX_GRID, smallest=0)
        block = self._three("block", config[1], MAX_BLOCK, smallest=1)
        threads = block[0] * block[1] * block[2]
        if threads > self.max_threads:
            raise LaunchError(
                f"{self.name}: the block {block} has {threads:,} threads, and the kernel can be "
                f"launched with at most {self.max_threads:,}"
            )
        shared_bytes = config[2] if len(config) == 3 else 0
        if type(shared_bytes) is not int or not 0 <= shared_bytes <= self.max_shared_bytes:
            raise LaunchError(
                f"{self.name}: {shown(shared_bytes)} bytes of dynamic shared memory; a block can "
                f"have 0 to {self.max_shared_bytes:,} here"
            )
        return Launch(self, grid, block, shared_bytes)

    def _three(
        self, what: str, dim: Dim3, largest: tuple[int, int, int], smallest: int
    ) -> tuple[int, int, int]:
        given = dim if isinstance(dim, tuple) else (dim,)
        if not 1 <= len(given) <= 3 or not all(type(n) is int for n in given):
            raise LaunchError(
                f"{self.name}: the {what} is an int or a tuple of up to three, not {shown(dim)}"
            )
        x, y, z = (*given, 1, 1)[:3]
        for n, axis, most in zip((x, y, z), "xyz", largest, strict=True):
            if not smallest <= n <= most:
                raise LaunchError(
                    f"{self.name}: the {what} {given} is {n:,} along {axis}, where {smallest} to "
                    f"{most:,} are possible"
                )
        return x, y, z


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
        order. A grid of no blocks does nothing. Raises `LaunchError`."""
        self.kernel.check(arguments)
        if 0 not in self.grid:
            self.kernel.launch(self.grid, self.block, self.shared_bytes, arguments)


Check = Callable[[Any], str | None]
"""What is wrong with an argument, or None."""

_INTEGERS = {
    "char": (-(2**7), 2**7 - 1),
    "signed char": (-(2**7), 2**7 - 1),
    "unsigned char": (0, 2**8 - 1),
    "short": (-(2**15), 2**15 - 1),
    "unsigned short": (0, 2**16 - 1),
    "int": (-(2**31), 2**31 - 1),
    "unsigned int": (0, 2**32 - 1),
    "long": (-(2**63), 2**63 - 1),
    "unsigned long": (0, 2**64 - 1),
    "long long": (-(2**63), 2**63 - 1),
    "unsigned long long": (0, 2**64 - 1),
}


def _check(parameter: Parameter, device: torch.device) -> Check:
    if parameter.is_pointer:
        return _pointer_check(parameter.c_type, device)
    if parameter.c_type in _INTEGERS:
        return _integer_check(parameter.c_type, *_INTEGERS[parameter.c_type])
    if parameter.c_type == "bool":
        return lambda argument: (
            None if isinstance(argument, bool) else f"is of type bool, not {_described(argument)}"
        )
    return _float_check(parameter.c_type, 3.4028235e38 if parameter.c_type == "float" else inf)


def _float_check(c_type: str, largest: float) -> Check:
    def check(argument: Any) -> str | None:
        if not isinstance(argument, int | float):
            return f"is of type {c_type}, not {_described(argument)}"
        if -largest <= argument <= largest or argument != argument or argument in (inf, -inf):
            return None
        return f"is of type {c_type}, which holds up to {largest:.3g}, not {shown(argument)}"

    return check


def _integer_check(c_type: str, smallest: int, largest: int) -> Check:
    def check(argument: Any) -> str | None:
        if not isinstance(argument, int):
            return f"is of type {c_type}, not {_described(argument)}"
        if smallest <= argument <= largest:
            return None
        return f"is of type {c_type}, which holds {smallest:,} to {largest:,}, not {argument:,}"

    return check


def _pointer_check(c_type: str, device: torch.device) -> Check:
    pointee = c_type.removesuffix("*")
    dtypes = (torch.int64, torch.uint64) if pointee.endswith("*") else POINTEES.get(pointee)

    # The cheapest form of each question first: this runs for every tensor of every launch.
    def check(argument: Any) -> str | None:
        if argument is None:
            return None
        if type(argument) is not Tensor and not isinstance(argument, Tensor):
            return f"is of type {c_type}: give a tensor or None, not {_described(argument)}"
        if dtypes is not None and argument.dtype not in dtypes:
            return f"points to {pointee}, and the tensor holds {argument.dtype}"
        if argument.device != device and not argument.is_pinned():
            return f"must be on {device}, and the tensor is on {argument.device}"
        return None if argument.is_contiguous() else _layout_problem(argument)

    return check


def _layout_problem(tensor: Tensor) -> str | None:
    shape, stride = tuple(tensor.shape), tensor.stride()
    if shape[-1] > 1 and stride[-1] != 1:
        return (
            f"has elements {stride[-1]} apart along its last dimension (shape {shape}, strides "
            f"{stride}): give x.contiguous()"
        )
    needed = 1
    for step, size in sorted(zip(stride, shape, strict=True)):
        if size == 1:
            continue
        if step < needed:
            return (
                f"has elements that share an address (shape {shape}, strides {stride}, as after "
                "expand()): give x.contiguous()"
            )
        needed = step * (size - 1) + needed
    return None


def _described(argument: Any) -> str:
    return f"a {type(argument).__name__} ({shown(argument)})"
