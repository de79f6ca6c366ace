"""`Implementation`: one way to compute an op, whatever it is written in.

An op can be computed by its own `.cu`, by another one that a user writes, by the plain torch
reference, by an alternative that the op names (in CuTe DSL) or by any Python function: each becomes
one callable that takes the op's arguments by name. `implement` is the one place that tells them
apart.
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from nbengine.errors import NbengineError, shown
from nbengine.kernels.op import Op
from nbengine.kernels.ops import OPS
from nbengine.kernels.program import Program
from nbengine.kernels.source import CUDA_ROOT, Source, is_text

Backend = Literal["cuda", "emulated", "reference"]
"""What runs an op's own source: a GPU, this machine's CPU, or torch in its place."""


class UnknownOp(NbengineError, AttributeError):
    """No op has this name."""


def op_named(op: str | Op) -> Op:
    """Raises `UnknownOp`, listing the ops that there are."""
    if isinstance(op, Op):
        return op
    if op not in OPS:
        close = difflib.get_close_matches(str(op), OPS, n=1)
        meant = f" (did you mean {close[0]!r}?)" if close else ""
        raise UnknownOp(f"there is no op {op!r}{meant}; the ops are {', '.join(OPS)}")
    return OPS[op]


@dataclass(frozen=True, slots=True, repr=False)
class Implementation:
    """`call(**arguments)` computes the op into its output arguments."""

    op: Op
    language: str
    """"CUDA C", "CUDA C, emulated", "torch" or "Python"."""
    origin: str
    """Its file, or the function's name."""
    call: Callable[..., None]
    is_own: bool = False
    """It is what the op comes with, and not what somebody put in its place."""
    is_capturable: bool = False
    """A call on a GPU is known to be launches alone, which a CUDA graph can hold."""
    source: Source | None = None
    """Of CUDA C."""

    def __str__(self) -> str:
        return f"{self.origin} ({self.language})"

    def __repr__(self) -> str:
        return f"{self.op.name}: {self}"


Implementable = Implementation | str | Path | Source | Program | Callable[..., None] | None
"""What `implement` takes; see there."""


def implement(
    op: Op,
    what: Implementable,
    device: torch.device,
    backend: Backend | None = None,
    *,
    checks: bool = False,
) -> Implementation:
    """Make an implementation of `op` on `device`.

    Args:
        what: None (the op's own), CUDA C (a `Source`, the path of a `.cu`, or its text), a
            `Program`, an `Implementation`, "reference", a name in `op.alternatives`, or a function
            that takes the op's arguments by name.
        backend: that of None and of CUDA C; default: "cuda" on a GPU, else "emulated".
        checks: emulate with the checks for races, wild accesses and missing barriers.

    Raises:
        ValueError: a string that is none of these, an `Implementation` of another op.
        TypeError: something else that is none of these.
        FileNotFoundError: no such `.cu`.
        ImportError: an alternative whose package is not installed.
    """
    what = with_text_read(op, what)
    if isinstance(what, Implementation):
        if what.op.name != op.name:
            raise ValueError(f"{what} is an implementation of {what.op.name}, not of {op.name}")
        return what
    backend = backend or ("cuda" if device.type == "cuda" else "emulated")
    if what is None:
        if backend == "reference":
            return Implementation(op, "torch", "reference", op.reference, is_own=True)
        own = _program(Source.of_op(op.source), device, backend, checks)
        origin, is_cuda = f"cuda/{op.source}", backend == "cuda"
        call = _launching(op, own)
        return Implementation(op, _language(backend), origin, call, True, is_cuda, own.source)
    if isinstance(what, str):
        return _named(op, what)
    if isinstance(what, Source):
        on = "emulated" if backend == "reference" else backend
        what = _program(what, device, on, checks)
    if not isinstance(what, Program):
        if not callable(what):
            raise TypeError(f"{op.name} can't be implemented by {shown(what)}: {_give(op)}")
        return Implementation(op, "Python", _title(what), what)
    is_cuda = what.device.type == "cuda"
    language, origin = _language("cuda" if is_cuda else "emulated"), short_name(what.source.name)
    call = _launching_anothers(op, what)
    return Implementation(op, language, origin, call, is_capturable=is_cuda, source=what.source)


def with_text_read(
    op: Op, what: Implementable
) -> Implementation | str | Source | Program | Callable[..., None] | None:
    """CUDA C by its path or text becomes a `Source`, which later edits do not change; a string that
    is left is a name."""
    if isinstance(what, str) and is_text(what):
        return Source(what, f"{op.name}.cu (a string)")
    if isinstance(what, Path) or (isinstance(what, str) and what.endswith(".cu")):
        return Source.read(what)
    return what


def _named(op: Op, name: str) -> Implementation:
    if name == "reference":
        return Implementation(op, "torch", "reference", op.reference)
    if name not in op.alternatives:
        raise ValueError(f"{op.name} has no implementation {shown(name)}: {_give(op)}")
    module, _, function = op.alternatives[name].partition(":")
    try:
        call = getattr(importlib.import_module(module), function)
    except ImportError as error:
        raise ImportError(
            f"{op.name} as {name!r} needs a package that is not installed ({error}): "
            f"pip install 'nbengine[{name}]'"
        ) from error
    return Implementation(op, "Python", f"{name}: {module}", call, is_capturable=True)


def _give(op: Op) -> str:
    there = ", ".join(["reference", *op.alternatives])
    return f"give the path of a .cu, its text, a function, or one of {there}"


def _program(source: Source, device: torch.device, backend: Backend, checks: bool) -> Program:
    if backend == "cuda":
        from nbengine.kernels.launcher import CudaProgram

        return CudaProgram(source, device)
    from nbengine.kernels.emulator import EmulatedProgram

    return EmulatedProgram(source, checks=checks)


def _launching(op: Op, compiled: Program) -> Callable[..., None]:
    return functools.partial(op.launch, compiled)


def _launching_anothers(op: Op, compiled: Program) -> Callable[..., None]:
    def call(**arguments: Any) -> None:
        op.launch_on(compiled, arguments)

    return call


def _language(backend: Backend) -> str:
    return "CUDA C" if backend == "cuda" else "CUDA C, emulated"


def short_name(name: str) -> str:
    """The project's own sources by their short names."""
    path = Path(name)
    return f"cuda/{path.name}" if path.parent == CUDA_ROOT else name


def _title(function: Callable[..., Any]) -> str:
    name = getattr(function, "__qualname__", type(function).__name__)
    return f"{getattr(function, '__module__', '')}.{name}".lstrip(".")
