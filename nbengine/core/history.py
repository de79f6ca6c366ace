"""The engine's past: step records, and now and then a keyframe from which any state of the queues
and blocks can be rebuilt. Bounded in number and in bytes; the oldest are dropped first.

One thread appends; any thread may read meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from pathlib import Path

from nbengine.core.perfetto import to_perfetto
from nbengine.core.records import StepRecord
from nbengine.core.request import Sequence
from nbengine.core.state import Keyframe, State
from nbengine.errors import UnknownStep

MOST_STEPS_BETWEEN = 512
"""Records between two keyframes: a state is rebuilt by applying at most so many."""
FEWEST_STEPS_BETWEEN = 64


class History:
    """Records by step number. Iterates oldest to newest."""

    def __init__(self, max_records: int = 10_000, max_bytes: int = 64 << 20) -> None:
        self.max_records, self.max_bytes = max_records, max_bytes
        self.nbytes = 0
        self._records: deque[StepRecord] = deque()
        self._keyframes: deque[Keyframe] = deque()
        self.num_cuts = 0
        """How often `cut` was called."""
        self._nbytes_since = 0  # of the records since the last keyframe

    def append(self, record: StepRecord) -> None:
        self._records.append(record)
        self.nbytes += record.nbytes
        self._nbytes_since += record.nbytes
        while len(self._records) > self.max_records or (
            self.nbytes > self.max_bytes and len(self._records) > 1
        ):
            self.nbytes -= self._records.popleft().nbytes
            while self._keyframes and self._keyframes[0].step < self._records[0].step - 1:
                self.nbytes -= self._keyframes.popleft().nbytes

    @property
    def wants_keyframe(self) -> bool:
        """Whether it is time for one: they take no more memory than the records between them, so
        that a large cache does not crowd out the steps."""
        if not self._keyframes:
            return True
        last = self._keyframes[-1]
        num_steps = (self._records[-1].step if self._records else 0) - last.step
        return num_steps >= MOST_STEPS_BETWEEN or (
            num_steps >= FEWEST_STEPS_BETWEEN and self._nbytes_since >= last.nbytes
        )

    def keep(self, keyframe: Keyframe) -> None:
        """The state after the latest record (or after none)."""
        if self._keyframes and self._keyframes[-1].step == keyframe.step:
            self.nbytes -= self._keyframes.pop().nbytes  # the engine was rewound to that very step
        self._keyframes.append(keyframe)
        self.nbytes += keyframe.nbytes
        self._nbytes_since = 0

    @property
    def first_state(self) -> int:
        """The earliest step after which the state can be rebuilt.

        Raises:
            UnknownStep: there is none.
        """
        keyframes = tuple(self._keyframes)
        if not keyframes:
            raise UnknownStep("the history can rebuild no state yet: it holds no keyframe")
        return keyframes[0].step

    def state_at(self, step: int) -> State:
        """The state after step `step`, made anew; 0 is before the first.

        Raises:
            UnknownStep: the step has not been taken, or what it takes to rebuild it was dropped.
        """
        # Copies, because the engine's thread may append and drop meanwhile; the records first, because
        # then none that follows a keyframe is missing.
        records, keyframes = tuple(self._records), tuple(self._keyframes)
        known = keyframes[0].step if keyframes else None
        last = records[-1].step if records else known
        if known is None or last is None or not known <= step <= last:
            kept = "none yet" if known is None else f"those after steps {known} to {last}"
            raise UnknownStep(f"no state after step {step}: the history can rebuild {kept}")
        keyframe = next(k for k in reversed(keyframes) if k.step <= step)
        state = keyframe.state()
        if keyframe.step < step:
            first = records[0].step
            for record in records[keyframe.step + 1 - first : step + 1 - first]:
                state.apply(record)
        return state

    def batch_at(self, step: int) -> list[tuple[Sequence, int]]:
        """What step `step` computed: each sequence as it was then, with the blocks that it had, and
        how many of its tokens; empty for a step that was taken back.

        Raises:
            UnknownStep: the step has not been taken, or what it takes to rebuild it was dropped.
        """
        record = self[step]
        return self.state_at(record.step - 1).batch_of(record)

    def batches_of(self, seq_id: str) -> list[tuple[int, dict[str, int]]]:
        """The company that a sequence was computed in: (step, tokens of each sequence in it), for
        every step that computed some of it."""
        return [(r.step, r.scheduled) for r in self if seq_id in r.scheduled]

    def cut(self, step: int) -> tuple[StepRecord, ...]:
        """Drop what came after step `step`; returns the records that did, oldest first."""
        self.num_cuts += 1
        dropped: deque[StepRecord] = deque()
        while self._records and self._records[-1].step > step:
            dropped.appendleft(self._records.pop())
        while self._keyframes and self._keyframes[-1].step > step:
            self._keyframes.pop()
        since = self._keyframes[-1].step if self._keyframes else 0
        self._nbytes_since = sum(r.nbytes for r in self._records if r.step > since)
        self.nbytes = sum(r.nbytes for r in self._records) + sum(k.nbytes for k in self._keyframes)
        return tuple(dropped)

    def export(self, path: str | Path) -> Path:
        """Write the records as a timeline that ui.perfetto.dev and chrome://tracing open; returns
        where it is."""
        return to_perfetto(self, path)

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(tuple(self._records))  # a copy: the engine's thread may append meanwhile

    def __reversed__(self) -> Iterator[StepRecord]:
        return reversed(tuple(self._records))

    def __getitem__(self, step: int) -> StepRecord:
        """The record of step `step` (the engine's first is 1); negative counts from the newest.

        Raises:
            UnknownStep: the step has not been taken, or its record was dropped.
        """
        records = self._records
        while step:
            try:
                record = records[step if step < 0 else max(0, step - records[0].step)]
            except IndexError:
                break
            if step < 0 or record.step == step:
                return record
            if step < record.step and record is records[0]:
                break
            # The engine's thread dropped the oldest between two of these looks.
        kept = f"steps {records[0].step} to {records[-1].step}" if records else "no step yet"
        raise UnknownStep(f"no record of step {step}: the history holds {kept}")

    def __repr__(self) -> str:
        if not self._records:
            return "History(empty)"
        return (
            f"History(steps {self._records[0].step} to {self._records[-1].step}, "
            f"{self.nbytes / 1024:.0f} KiB)"
        )

    def _repr_html_(self) -> str:
        from nbengine.jupyter.views import history_html

        return history_html(self)
