"""`Kernels`: the implementations of the ops that one engine uses.

`kernels.rms_norm(out=..., x=..., ...)` runs whatever implements `rms_norm` now. Each op is bound at
its first use, so that a call costs an attribute look-up more than the launch. `swap` puts another
implementation in an op's place once it has agreed with the reference, on the op's grid and on the
arguments of real calls (`record`); `restore` takes it back. Both are for the thread that calls the
ops, between two steps; what runs an op may be asked on any. Whoever holds CUDA graphs compares
`version` before a replay, and drops them when it has moved: a graph goes on calling what was
captured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from typing import Any

import torch
from torch import Tensor

from nbengine.kernels.arguments import cloned
from nbengine.kernels.display import table_html, table_text
from nbengine.kernels.implementation import (
    Backend,
    Implementable,
    Implementation,
    implement,
    op_named,
    with_text_read,
)
from nbengine.kernels.op import Arguments, Op
from nbengine.kernels.ops import OPS
from nbengine.kernels.source import Source
from nbengine.kernels.verification import Verified, verify_implementation, verify_live


class Kernels:
    """The ops as attributes. See the module."""

    def __init__(self, device: torch.device | str, backend: Backend | None = None) -> None:
        """A set for tensors on `device`. The backend is "cuda" on a GPU and "reference" elsewhere
        unless it is given; "emulated" runs the CUDA C on this machine's CPU, slowly.

        Raises:
            ValueError: a backend that can't run on this device.
        """
        self.device = torch.device(device)
        self.backend: Backend = backend or ("cuda" if self.device.type == "cuda" else "reference")
        wanted = {"cuda": "cuda", "emulated": "cpu"}.get(self.backend, self.device.type)
        if self.backend not in ("cuda", "emulated", "reference") or wanted != self.device.type:
            raise ValueError(
                f"kernels={self.backend!r} does not go with device {self.device}: on a GPU use "
                '"cuda" or "reference", on a CPU "emulated" or "reference"'
            )
        self.version = 0
        """Grows whenever another implementation takes an op's place."""
        self._implementations: dict[str, Implementation] = {}
        self._own: dict[str, Implementation] = {}

    def __getattr__(self, name: str) -> Callable[..., None]:
        # Reached once for each op: from then on the bound call is an attribute of its own. Another
        # thread may get here at the same time, or swap the op meanwhile: what is bound stays.
        if name.startswith("_"):
            raise AttributeError(name)
        made = implement(op_named(name), None, self.device, self.backend)
        own = self._own.setdefault(name, made)
        now = self._implementations.setdefault(name, own)
        call: Callable[..., None] = self.__dict__.setdefault(name, now.call)
        return call

    @property
    def implementations(self) -> Implementations:
        """What runs each op now."""
        return Implementations(tuple(self.implementation(name) for name in OPS))

    def implementation(self, op: str | Op) -> Implementation:
        """What runs this op now."""
        name = op_named(op).name
        if name not in self._implementations:
            getattr(self, name)
        return self._implementations[name]

    @property
    def is_capturable(self) -> bool:
        """Whether a CUDA graph can hold the calls of all ops: a Python function that took an op's
        place may wait for the device, which ends a capture."""
        return all(each.is_capturable for each in tuple(self._implementations.values()))

    def candidate(self, op: str | Op, what: Implementable) -> Candidate:
        """`what` as it is now, to be verified and then put in place; see `swap`. It changes nothing,
        and may be called on any thread."""
        found = op_named(op)
        what = Source.of_op(found.source) if what is None else with_text_read(found, what)
        checked = implement(found, what, self.device, self._compiling, checks=True)
        fast = checked
        if isinstance(what, Source) and self._compiling == "emulated":
            fast = implement(found, what, self.device, self._compiling)
        return Candidate(checked, dataclasses.replace(fast, is_own=False))

    def put(self, candidate: Candidate, verified: Verified) -> Swapped:
        """The end of a swap."""
        before = self.implementation(candidate.fast.op)
        self._bind(candidate.fast)
        self.version += 1
        return Swapped(before, candidate.fast, verified)

    def swap(
        self,
        op: str | Op,
        what: Implementable,
        *,
        live_arguments: Iterable[Arguments] | None = None,
    ) -> Swapped:
        """Verify `what` on the op's grid and on these calls' arguments, then put it in place.

        Args:
            what: CUDA C (text, path, `Source`), a `Program`, a Python function, "reference", or
                the name of an alternative ("cute").
            live_arguments: of calls that the engine made, as `record` keeps them.

        Raises:
            Mismatch: it differs from the reference; what ran the op still does.
            CompileError: it does not compile; the same.
        """
        candidate = self.candidate(op, what)
        verified = verify_implementation(candidate.checked, self.device)
        if live_arguments is not None:
            verified = verify_live(candidate.checked, live_arguments, verified)
        return self.put(candidate, verified)

    def restore(self, op: str | Op) -> Implementation:
        """Put the op's own implementation back, if another is in its place."""
        found = op_named(op)
        if not self.implementation(found).is_own:
            self._bind(self._own[found.name])
            self.version += 1
        return self.implementation(found)

    def record(self, op: str | Op, num_calls: int = 1) -> Recording:
        """Keep the arguments of the op's next `num_calls` calls, as they were before each.

        Calls that a graph is being captured from are not kept, and those of a replayed graph are
        not seen: run a step without graphs. Nothing is recorded any more once there are enough, or
        after `Recording.stop`.
        """
        name = op_named(op).name
        call = self.implementation(name).call
        recording = Recording(OPS[name], num_calls, lambda: self._unwrap(name, recorded))

        def recorded(**arguments: Any) -> None:
            recording.take(arguments)
            call(**arguments)

        self.__dict__[name] = recorded
        return recording

    @property
    def _compiling(self) -> Backend:
        """A user's CUDA C runs emulated beside the reference."""
        if self.backend == "reference":
            return "cuda" if self.device.type == "cuda" else "emulated"
        return self.backend

    def _bind(self, implementation: Implementation) -> None:
        name = implementation.op.name
        self._implementations[name] = implementation
        self.__dict__[name] = implementation.call

    def _unwrap(self, name: str, recorded: Callable[..., None]) -> None:
        if self.__dict__[name] is recorded:  # else a swap took its place
            self.__dict__[name] = self._implementations[name].call

    def __repr__(self) -> str:
        swapped = sum(not each.is_own for each in tuple(self._implementations.values()))
        note = f", {swapped} swapped" if swapped else ""
        return f"Kernels({str(self.device)!r}, {self.backend!r}{note})"


@dataclass(frozen=True, slots=True)
class Candidate:
    """What a swap verifies and what it puts in place: one and the same, or the same source emulated
    with the checks and without."""

    checked: Implementation
    fast: Implementation


@dataclass(frozen=True, slots=True)
class Recording:
    """Arguments of calls, in `calls` once they were made. Give them to `swap`."""

    op: Op
    num_calls: int
    _release: Callable[[], None] = field(repr=False)
    calls: list[Arguments] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return len(self.calls) >= self.num_calls

    def take(self, arguments: Arguments) -> None:
        """Keep one call's arguments: of large tensors what `Op.compact` leaves, of the others and
        of all that the op writes a copy. An input of 64 MiB or more is a weight, and is kept as it
        is: it does not change."""
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return
        if self.op.compact is not None:
            arguments = self.op.compact(arguments)
        self.calls.append(cloned(arguments, lambda name, x: _is_kept_by_copy(self.op, name, x)))
        if self.is_complete:
            self._release()

    def stop(self) -> None:
        """Record no more."""
        self._release()


def _is_kept_by_copy(op: Op, name: str, tensor: Tensor) -> bool:
    return name in op.outputs or tensor.numel() * tensor.element_size() < 64 << 20


@dataclass(frozen=True, slots=True)
class Swapped:
    """What a swap did."""

    before: Implementation
    now: Implementation
    verified: Verified

    def __str__(self) -> str:
        return f"{self.now.op.name}: {self.now}, before {self.before}\n{self.verified}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        rows = [(self.now.op.name, str(self.now), str(self.before))]
        return table_html(("op", "now", "before"), rows) + self.verified._repr_html_()


@dataclass(frozen=True, slots=True)
class Implementations(Sequence[Implementation]):
    """What runs each op."""

    rows: tuple[Implementation, ...]

    def __iter__(self) -> Iterator[Implementation]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        return self.rows[index]

    def _table(self) -> list[tuple[str, ...]]:
        return [
            (
                row.op.name,
                row.origin,
                row.language,
                "" if row.is_own else "swapped",
                ", ".join(row.op.alternatives),
            )
            for row in self.rows
        ]

    def __str__(self) -> str:
        return f"{table_text(_HEADERS, self._table())}\n{_ALTERNATIVES}"

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return f"{table_html(_HEADERS, self._table())}<div>{escape(_ALTERNATIVES)}</div>"


_HEADERS = ("op", "runs", "language", "", "alternatives")
_ALTERNATIVES = (
    "alternatives: further kernels of the op, which swap takes by name, as in "
    'engine.kernels.swap("rms_norm", "cute"); cute is one in CuTe DSL, for a GPU, and needs '
    "pip install 'nbengine[cute]'"
)
