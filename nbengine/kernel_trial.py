"""`try_kernel`: everything that is to be known about a kernel before it runs an engine's op.

One call compiles CUDA C in an op's place, verifies it against the reference (on the op's grid and,
with an engine, on the live KV cache), accounts for registers, shared memory and occupancy, measures
it against what runs the op now and against the roofline, and, if asked, swaps it in. `%%nb_kernel`
shows what it returns; a script calls it as well (inside `progress_to(print)` it tells how far it
is). What can't be had on this machine is said in
`Trial.notes`, one line each, and never left out silently.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from html import escape
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nbengine.errors import InvalidField, NotEnoughMemory
from nbengine.kernels.arguments import cloned
from nbengine.kernels.bench import Benched, Measurement, measure
from nbengine.kernels.compiler import Cubin, architecture_for, supported_architectures
from nbengine.kernels.display import table_html, table_text
from nbengine.kernels.emulator import Counters, EmulatedKernel, EmulatedProgram
from nbengine.kernels.implementation import (
    Implementation,
    implement,
    op_named,
    with_text_read,
)
from nbengine.kernels.op import Arguments, Case, Op
from nbengine.kernels.planned import cubins, resources
from nbengine.kernels.program import kernel_device
from nbengine.kernels.report import KernelReport
from nbengine.kernels.roofline import roofline
from nbengine.kernels.source import Source
from nbengine.kernels.table import Swapped
from nbengine.kernels.timing import collect
from nbengine.kernels.toolchain import ToolchainMissing
from nbengine.kernels.verification import Verified, verify_implementation
from nbengine.progress import say

if TYPE_CHECKING:
    from nbengine.engine import Engine
    from nbengine.engine_kernels import EngineKernels

ARCHITECTURE = "sm_90"
"""What resources are worked out for where no GPU is there and none was named."""


@dataclass(frozen=True, slots=True)
class Counted:
    """The emulator's counters of one call, summed over its kernels, beside those of the version
    that the kernel is compared to. None where that one is no CUDA C."""

    new: Counters
    current: Counters | None

    def rows(self) -> list[tuple[str, ...]]:
        return [
            (
                field.name.replace("_", " "),
                f"{getattr(self.new, field.name):,}",
                *(() if self.current is None else (f"{getattr(self.current, field.name):,}",)),
            )
            for field in fields(Counters)
        ]

    def headers(self) -> tuple[str, ...]:
        return ("counted by the emulator", "new", *(() if self.current is None else ("current",)))


@dataclass(frozen=True, slots=True, repr=False)
class Trial:
    """What `try_kernel` found. Printed, or shown by a notebook, it is a report."""

    op: str
    source: Source
    """Its text, and the file that debuggers open (`source.path`)."""
    device: str
    """What it ran on."""
    call: str
    """The call whose launches `resources` and `counted` are of."""
    verified: Verified
    resources: tuple[KernelReport, ...]
    """Of each kernel that the call launches; empty where NVRTC is not installed."""
    counted: Counted | None
    """None on a GPU."""
    benched: Benched | None
    """None where it was not timed; `notes` say why."""
    swapped: Swapped | None
    """None unless it was asked for."""
    notes: tuple[str, ...]
    """What could not be had, and why."""

    @property
    def title(self) -> str:
        return f"{self.source.name}, {self.device}"

    def __str__(self) -> str:
        parts = [self.title, f"{self.verified!r}", *self.notes]
        parts += [f"\n{report}" for report in self.resources]
        if self.counted is not None:
            parts.append("\n" + table_text(self.counted.headers(), self.counted.rows()))
        if self.benched is not None:
            parts.append(f"\n{self.benched!r}")
        if self.swapped is not None:
            parts.append(f"\nswapped in: {self.swapped.now}, before {self.swapped.before}")
        return "\n".join(parts)

    __repr__ = __str__

    def _repr_html_(self) -> str:
        parts = [f"<b>{escape(self.title)}</b>", self.verified._repr_html_()]
        parts += [f"<div>{escape(note)}</div>" for note in self.notes]
        if self.benched is not None:
            parts.append(self.benched._repr_html_())
        tables = [report._repr_html_() for report in self.resources]
        if self.counted is not None:
            tables.append(table_html(self.counted.headers(), self.counted.rows()))
        parts.append(
            "<div style='display:flex;flex-wrap:wrap;gap:0 2em;align-items:flex-start'>"
            f"{''.join(tables)}</div>"
        )
        if self.swapped is not None:
            said = f"swapped in: {self.swapped.now}, before {self.swapped.before}"
            parts.append(f"<div><b>{escape(said)}</b></div>")
        return "".join(parts)


def try_kernel(
    op: str,
    what: Source | str,
    engine: Engine | None = None,
    *,
    swap: bool = False,
    emulate: bool = False,
    case: str | None = None,
    architecture: str | None = None,
    measured: bool = True,
) -> Trial:
    """Compile, verify, account for, measure and perhaps swap in a kernel.

    Args:
        what: CUDA C in the op's place: a `Source`, the path of a `.cu`, or its text.
        engine: whose live calls it must agree on, and whose version it is compared to.
        swap: put it into the engine once it has agreed on the whole grid and on live tensors.
        emulate: verify it on this machine's CPU, with every check, whatever the engine runs on.
        case: only the calls of the op's grid with this part in their names (`float16`, `1x64`); for
            a quick try.
        architecture: to account for resources (`sm_80`); default: this GPU's, or sm_90.
        measured: time it, on a GPU.

    Raises:
        CompileError: with the lines that the compiler refuses.
        Mismatch: with the first element that differs from the reference.
        EmulationError: a race, a missing barrier, a wild access, with its line.
        UnknownOp, InvalidField, and `ValueError` for what is no CUDA C.
    """
    found = op_named(op)
    source = with_text_read(found, what)
    if not isinstance(source, Source):
        raise InvalidField("what", what, "a trial is of CUDA C: give its text, or a path")
    cases = found.cases_named(case)
    _check_architecture(architecture)
    ops, why_none = _ops_of(engine)
    if swap and engine is None:
        why_none += " (in a notebook %nb_load MODEL; on a CPU with --kernels emulated)"
    if swap and ops is None:
        raise InvalidField("swap", swap, f"there is nothing to swap it into: {why_none}")
    if swap and case is not None:
        raise InvalidField("case", case, "what is swapped in must agree on the whole grid")
    on = torch.device("cpu") if emulate else ops.device if ops else kernel_device(None)

    notes = [] if ops else [f"verified on the op's grid alone: {why_none}"]
    live = ops.live_calls(op)[op] if ops else []
    call, arguments = _shown_call(found, cases, live, on)
    reports = _resources(found, source, arguments, architecture, notes)
    verified, candidate = None, None
    if ops and ops.device == on:
        candidate = ops.candidate(op, source)
        verified = ops.verify(candidate, cases if case else None)
        new = candidate.fast
    else:
        new = implement(found, source, on, checks=True)
        verified = verify_implementation(new, on, cases)
        if ops:
            notes.append("emulated on the op's grid; live calls are for the GPU, without --emulate")

    current = ops.implementation(op) if ops else implement(found, None, on)
    counted = benched = None
    if on.type == "cpu":
        counted = _counted(found, source, current, arguments)
        why = "emulated" if torch.cuda.is_available() else "no GPU here"
        notes.append(f"{why}: not timed, because the emulator's time says nothing about a GPU's")
    elif measured:
        of_batch = [Case("the engine's batch", lambda _: cloned(live[-1]))] if live else []
        shapes = [*of_batch, *found.bench_cases()]

        def timed() -> Benched | None:
            return _benched(new, current, shapes, on, notes)

        benched = ops.between_steps(timed) if ops else timed()
    swapped = None
    if swap and ops:
        if candidate is None:  # emulated so far
            candidate = ops.candidate(op, source)
            verified = ops.verify(candidate)
        swapped = ops.put(candidate, verified)
    device = torch.cuda.get_device_name(on) if on.type == "cuda" else "emulated on this CPU"
    return Trial(
        op, source, device, call, verified, reports, counted, benched, swapped, tuple(notes)
    )


def _ops_of(engine: Engine | None) -> tuple[EngineKernels | None, str]:
    """An engine's ops; or None, and why."""
    if engine is None:
        return None, "no engine is loaded"
    try:
        return engine.kernels, ""
    except InvalidField as error:
        return None, error.problem


def _shown_call(
    op: Op, cases: Sequence[Case], live: Sequence[Arguments], device: torch.device
) -> tuple[str, Arguments]:
    """The call that is accounted for: the engine's, or one of the grid in bfloat16."""
    if live and _device_type(live[-1]) == device.type:
        return "the engine's batch", live[-1]
    case = next((case for case in cases if case.name.startswith("bfloat16")), cases[0])
    return case.name, case.make(torch.Generator(device).manual_seed(0))


def _device_type(arguments: Arguments) -> str:
    on_gpu = any(isinstance(x, Tensor) and x.is_cuda for x in arguments.values())
    return "cuda" if on_gpu else "cpu"


def _resources(
    op: Op, source: Source, arguments: Arguments, architecture: str | None, notes: list[str]
) -> tuple[KernelReport, ...]:
    try:
        return resources(op, source, arguments, architecture or _architecture())
    except ToolchainMissing as error:
        notes.append(f"no registers and no occupancy: {error}")
        return ()


def _check_architecture(name: str | None) -> None:
    if name is not None and name.rstrip("af") not in supported_architectures():
        known = ", ".join(supported_architectures())
        raise InvalidField("architecture", name, f"NVRTC compiles for {known}")


def _architecture() -> str:
    if torch.cuda.is_available():
        return architecture_for(torch.cuda.get_device_capability())
    return ARCHITECTURE


def _counted(op: Op, source: Source, current: Implementation, arguments: Arguments) -> Counted:
    say("counting what it reads and writes")
    ran = current.source
    before = None if ran is None else counters(op, ran, arguments)
    return Counted(counters(op, source, arguments), before)


def counters(op: Op, source: Source, arguments: Arguments) -> Counters:
    """The emulator's counters of one call, which changes nothing of `arguments`: summed over the
    kernels that it launches, of each its last launch."""
    program = EmulatedProgram(source, counters=True)
    op.launch_on(program, cloned(arguments))
    counted = [kernel.counters for kernel in program.kernels if isinstance(kernel, EmulatedKernel)]
    return Counters(
        *(sum(getattr(each, field.name) for each in counted) for field in fields(Counters))
    )


def _benched(
    new: Implementation,
    current: Implementation,
    cases: Sequence[Case],
    device: torch.device,
    notes: list[str],
) -> Benched | None:
    """Of each shape that fits the memory that is free beside the engine."""
    try:
        ceiling = roofline(device)
    except NotEnoughMemory as error:
        notes.append(f"not timed, for want of a roofline to hold it against: {error}")
        return None
    rows: list[Measurement] = []
    for case in cases:
        try:
            rows.append(measure(new, current, case, ceiling, device))
        except torch.OutOfMemoryError:
            notes.append(f"{case.name} was not timed: it does not fit the memory that is free")
            collect()
    return Benched(new.op.name, str(new), str(current), ceiling, tuple(rows))


def source_now(op: str, engine: Engine | None = None) -> Source:
    """Of what runs the op: in the engine, or the op's own.

    Raises:
        UnknownOp
        InvalidField: what runs it is no CUDA C.
    """
    found = op_named(op)
    ops, _ = _ops_of(engine)
    if ops is None:
        return Source.of_op(found.source)
    now = ops.implementation(op)
    if now.source is None:
        raise InvalidField("op", op, f"{now} runs it, which has no CUDA C")
    return now.source


def compiled_now(
    op: str,
    engine: Engine | None = None,
    *,
    case: str | None = None,
    architecture: str | None = None,
) -> tuple[Cubin, ...]:
    """The kernels that one call of the op launches now, with their PTX and machine code: a call of
    the engine's batch, or (with `case`, or without an engine) of the op's grid. Compiled by NVRTC for
    `architecture`, which needs no GPU.

    Raises:
        UnknownOp, InvalidField
        ToolchainMissing: NVRTC is not installed.
    """
    _check_architecture(architecture)
    source, found = source_now(op, engine), op_named(op)
    ops, _ = _ops_of(engine)
    cases = found.cases_named(case)
    live = ops.live_calls(op)[op] if ops and case is None else []
    on = ops.device if ops else torch.device("cpu")
    _, arguments = _shown_call(found, cases, live, on)
    return cubins(found, source, arguments, architecture or _architecture())
