"""`planned`: which kernels an op launches for a call, and in which grids, without launching any; and
`cubins`, `resources`: those kernels compiled for a GPU of some architecture, which need not be there,
and what they take of it.

An op's `launch` chooses its specialisation and its grid by the arguments' shapes. It is given a
program here whose kernels note down how they are launched.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from nbengine.kernels import compiler
from nbengine.kernels.op import Arguments, Op
from nbengine.kernels.program import MAX_SHARED_BYTES, MAX_THREADS, Kernel, Program
from nbengine.kernels.report import KernelReport, limits_of
from nbengine.kernels.source import Parameter, Source, launch_bound

Three = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class PlannedLaunch:
    """One launch of a call."""

    kernel: str
    """With its template arguments."""
    parameters: tuple[Parameter, ...]
    grid: Three
    block: Three
    shared_bytes: int
    """Dynamic."""

    @property
    def num_threads(self) -> int:
        """Of a block."""
        return math.prod(self.block)

    @property
    def size(self) -> str:
        """In words."""
        shared = f", {self.shared_bytes:,} bytes of shared memory" if self.shared_bytes else ""
        num_blocks = math.prod(self.grid)
        return (
            f"{num_blocks:,} block{'s' * (num_blocks != 1)} of "
            f"{self.num_threads} thread{'s' * (self.num_threads != 1)}{shared}"
        )

    def __str__(self) -> str:
        return f"{self.kernel} with {self.size}"


def planned(
    op: Op, source: Source, arguments: Arguments, architecture: str | None = None
) -> tuple[PlannedLaunch, ...]:
    """The launches of one call, in order, on a device with the shared memory of `architecture`
    (default: of sm_90). Nothing is compiled. On a CPU the number of multiprocessors is the
    emulator's.

    Raises:
        CompileError: the source has no kernel that the op launches.
        ValueError, LaunchError: what a launch of these arguments would raise.
    """
    plan = _Plan(source, _device_of(arguments), architecture)
    op.launch_on(plan, arguments)
    return tuple(plan.launches)


def resources(
    op: Op, source: Source, arguments: Arguments, architecture: str
) -> tuple[KernelReport, ...]:
    """Of each kernel that the call launches, at its launch's shape. Raises as `cubins` does."""
    found = {cubin.expression: cubin for cubin in cubins(op, source, arguments, architecture)}
    shapes = {
        (launch.kernel, launch.num_threads, launch.shared_bytes): None
        for launch in planned(op, source, arguments, architecture)
    }
    return tuple(found[kernel].report(threads, shared) for kernel, threads, shared in shapes)


def cubins(
    op: Op, source: Source, arguments: Arguments, architecture: str
) -> tuple[compiler.Cubin, ...]:
    """Each kernel that the call launches, compiled by NVRTC for `architecture`.

    Raises:
        CompileError: it does not compile.
        ToolchainMissing: NVRTC is not installed.
    """
    launches = planned(op, source, arguments, architecture)
    kernels = dict.fromkeys(launch.kernel for launch in launches)
    return tuple(compiler.compile(source, kernel, architecture) for kernel in kernels)


class _Plan(Program):
    def __init__(self, source: Source, device: torch.device, architecture: str | None) -> None:
        super().__init__(source, device)
        self.limits = limits_of(architecture or "sm_90") or Program.limits
        self.launches: list[PlannedLaunch] = []

    def _make(self, expression: str) -> _PlannedKernel:
        return _PlannedKernel(self, expression)


class _PlannedKernel(Kernel):
    def __init__(self, plan: _Plan, expression: str) -> None:
        super().__init__(plan.source, expression, plan.device)
        self.max_threads = launch_bound(plan.source, expression) or MAX_THREADS
        self.max_shared_bytes = MAX_SHARED_BYTES
        self._launched = plan.launches

    def launch(
        self, grid: Three, block: Three, shared_bytes: int, arguments: tuple[Any, ...]
    ) -> None:
        self._launched.append(PlannedLaunch(self.name, self.parameters, grid, block, shared_bytes))


def _device_of(arguments: Arguments) -> torch.device:
    """A GPU's, where some tensors are pinned."""
    devices = [x.device for x in arguments.values() if isinstance(x, Tensor)]
    return next((device for device in devices if device.type == "cuda"), torch.device("cpu"))
