"""The engine's past: the latest step records, bounded in number and in bytes."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from nbengine.core.records import StepRecord
from nbengine.errors import UnknownRequest


class History:
    """Records by step number, oldest dropped first. Iterates oldest to newest."""

    def __init__(self, max_records: int = 10_000, max_bytes: int = 64 << 20) -> None:
        self.max_records, self.max_bytes = max_records, max_bytes
        self.nbytes = 0
        self._records: deque[StepRecord] = deque()

    def append(self, record: StepRecord) -> None:
        self._records.append(record)
        self.nbytes += record.nbytes
        while len(self._records) > self.max_records or (
            self.nbytes > self.max_bytes and len(self._records) > 1
        ):
            self.nbytes -= self._records.popleft().nbytes

    def __len__(self) -> int:
        return len(self._records)

    def __iter__(self) -> Iterator[StepRecord]:
        return iter(tuple(self._records))  # a copy: the engine's thread may append meanwhile

    def __reversed__(self) -> Iterator[StepRecord]:
        return reversed(tuple(self._records))

    def __getitem__(self, step: int) -> StepRecord:
        """The record of step `step` (the engine's first is 1); negative counts from the newest.

        Raises:
            UnknownRequest: the step has not been taken, or its record was dropped.
        """
        records = self._records
        first = records[0].step if records else 1
        index = step - first if step > 0 else len(records) + step
        if not 0 <= index < len(records):
            kept = f"steps {records[0].step} to {records[-1].step}" if records else "no step yet"
            raise UnknownRequest(f"no record of step {step}: the history holds {kept}")
        return records[index]

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
