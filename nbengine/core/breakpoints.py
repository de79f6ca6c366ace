"""Breakpoints: conditions on a step's record, by name or as a function.

`Engine.break_on` pauses the engine after a step that meets one, `Engine.run(until=...)` returns
there; both take what `condition` does.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from nbengine.core.prefix_cache import MissCause
from nbengine.core.records import Cause, StepRecord
from nbengine.errors import InvalidField

Condition = Callable[[StepRecord], object]

_EVICTING = ("recompute", "swap")


def _out_of_blocks(record: StepRecord) -> bool:
    return any(wait.cause in (Cause.BLOCKS, Cause.PREEMPTION) for wait in record.waits) or any(
        preemption.mode in _EVICTING for preemption in record.preempted
    )


CONDITIONS: dict[str, Condition] = {
    "preemption": lambda r: any(p.mode in _EVICTING for p in r.preempted),
    "finish": lambda r: r.finished,
    "prefix_miss": lambda r: any(
        a.prefix.cause in (MissCause.DIFFERS, MissCause.NEVER_SEEN) for a in r.admitted
    ),
    "out_of_blocks": _out_of_blocks,
    "eviction": lambda r: r.evicted,
    "copy_on_write": lambda r: r.copied,
}
"""Someone was preempted for lack of blocks; a sequence ended; an admitted sequence found less of
its prefix in the cache than its full blocks; someone waited, or was preempted, for lack of blocks; a
cached block was evicted; a shared block was copied before it was written to."""


def condition(on: str | Condition) -> Condition:
    """A condition from its name, or itself.

    Raises:
        InvalidField: no such name, or not callable.
    """
    if isinstance(on, str):
        if on not in CONDITIONS:
            raise InvalidField("on", on, f"the names are {', '.join(CONDITIONS)}")
        return CONDITIONS[on]
    if not callable(on):
        raise InvalidField("on", on, "must be a name or a function of a StepRecord")
    return on


@dataclass(eq=False, slots=True)
class Breakpoint:
    """What `Engine.break_on` returns."""

    name: str
    holds: Condition = field(repr=False)
    is_for_once: bool = False
    num_hits: int = 0
    is_enabled: bool = True

    @classmethod
    def on(cls, on: str | Condition, *, once: bool = False) -> Breakpoint:
        """From what `condition` takes; raises what it raises."""
        holds = condition(on)
        return cls(on if isinstance(on, str) else getattr(on, "__name__", repr(on)), holds, once)

    def remove(self) -> None:
        """Never stop here again."""
        self.is_enabled = False


@dataclass(frozen=True, slots=True)
class Stop:
    """Where a breakpoint stopped the engine."""

    breakpoint: Breakpoint
    record: StepRecord
    error: Exception | None = None
    """What the condition raised: it could not be told whether it holds."""

    def __str__(self) -> str:
        why = "" if self.error is None else f", whose condition raised {self.error!r}"
        return f"stopped at {self.breakpoint.name!r}{why}: {self.record}"
