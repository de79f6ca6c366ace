"""Runs side by side: what a policy, or other numbers, did to waiting, preemptions and blocks.

`compare(a, b)` takes simulations, forks, histories or plain sequences of records, reads nothing but
records, and shows itself as a table and a picture. Time is counted in steps, in which alone runs
with and without a model can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

from nbengine.core.records import StepRecord
from nbengine.errors import InvalidField


class Spread(NamedTuple):
    """Some numbers in four; all 0 where there are none."""

    mean: float
    p50: float
    p90: float
    max: float

    @classmethod
    def of(cls, values: Iterable[int]) -> Spread:
        """Percentiles are values that occur: the smallest that so many do not exceed."""
        ordered = sorted(values)
        if not ordered:
            return cls(0.0, 0, 0, 0)
        p50, p90 = (ordered[math.ceil(len(ordered) * part) - 1] for part in (0.5, 0.9))
        return cls(sum(ordered) / len(ordered), p50, p90, ordered[-1])


@dataclass(frozen=True, slots=True)
class Figures:
    """One run in numbers."""

    num_steps: int
    num_arrived: int
    """Requests that arrived, and those that were there from the beginning and then ran."""
    num_finished: int
    """Requests that came to their end; not those that were aborted or failed."""
    num_unstarted: int
    """Requests that arrived, of which nothing was computed."""
    num_refused: int
    """Requests that a simulation left out, because they could never fit."""
    num_tokens: int
    """Computed, those that were computed again included."""
    num_output_tokens: int
    waiting: Spread
    """Steps between a request's arrival and the one that first computed some of it: 0 if that was
    the next. Requests that were there from the beginning count from there."""
    first_token: Spread
    """Steps from a request's arrival to its first output token: 1 if the next step gave it."""
    num_preemptions: int
    num_lost_tokens: int
    """Tokens that were computed and had to be computed again."""
    num_hit_tokens: int
    """Tokens that came from the prefix cache."""
    mean_held: float
    peak_held: int
    num_blocks: int
    """KV blocks: held on average over the steps, at most, and in all."""

    @property
    def tokens_per_step(self) -> float:
        return self.num_tokens / max(1, self.num_steps)

    @property
    def output_tokens_per_step(self) -> float:
        return self.num_output_tokens / max(1, self.num_steps)


@dataclass(frozen=True, slots=True)
class Run:
    """One run under its name, with what the picture shows: a number for each step."""

    name: str
    figures: Figures
    held_blocks: tuple[int, ...]
    num_waiting: tuple[int, ...]


@dataclass(frozen=True, slots=True, repr=False)
class Comparison:
    """Runs side by side. It shows itself as a table, in a notebook with a picture."""

    runs: tuple[Run, ...]

    def __getitem__(self, name: str) -> Figures:
        """One run's figures."""
        for run in self.runs:
            if run.name == name:
                return run.figures
        raise KeyError(f"no run {name!r}: there are {', '.join(run.name for run in self.runs)}")

    def rows(self) -> list[tuple[str, ...]]:
        """What is counted, then each run's figure; behind all but the first run's, by how much it
        is more or less than that."""
        return [
            (label, *_cells([value(run.figures) for run in self.runs])) for label, value in _ROWS
        ]

    @property
    def headers(self) -> tuple[str, ...]:
        return ("", *(run.name for run in self.runs))

    def __repr__(self) -> str:
        from nbengine.jupyter.views import table_text

        return table_text(self.headers, self.rows())

    def _repr_html_(self) -> str:
        from nbengine.jupyter.comparison import comparison_html

        return comparison_html(self)


def compare(*runs: Any, **named: Any) -> Comparison:
    """Put runs side by side: `compare(fcfs, sjf)`, `compare(before=history, after=simulated)`.

    A run is a `Simulated`, a `History`, or any sequence of records that follow each other. One that
    is given no name has that of its policy. The first is what the others are measured against.

    Raises:
        InvalidField: there is no run, or one holds something else than records.
    """
    if not runs and not named:
        raise InvalidField("runs", (), "give at least one")
    compared: dict[str, Run] = {}
    for name, run in (*((None, run) for run in runs), *named.items()):
        records = _records_of(name or "runs", run)
        plain = name or getattr(run, "policy", None) or (records[-1].policy if records else "empty")
        label, number = str(plain), 1
        while label in compared:
            number += 1
            label = f"{plain} ({number})"
        compared[label] = Run(
            label,
            figures_of(records, len(getattr(run, "refused", ()))),
            tuple(r.num_held_blocks for r in records),
            tuple(r.num_waiting for r in records),
        )
    return Comparison(tuple(compared.values()))


def _records_of(name: str, run: Any) -> tuple[StepRecord, ...]:
    try:
        records = tuple(run)
    except TypeError:
        records = (run,)
    if any(not isinstance(record, StepRecord) for record in records):
        raise InvalidField(name, run, "must be a simulation, a history or records of steps")
    return records


def figures_of(records: Iterable[StepRecord], num_refused: int = 0) -> Figures:
    """A run in numbers."""
    records = tuple(records)
    reader = _Reader()
    for record in records:
        reader.read(record)
    held = [record.num_held_blocks for record in records]
    last = records[-1] if records else None
    return Figures(
        num_steps=len(records),
        num_arrived=reader.num_arrived,
        num_finished=reader.num_finished,
        num_unstarted=len(reader.arrived),
        num_refused=num_refused,
        num_tokens=sum(record.num_tokens for record in records),
        num_output_tokens=sum(len(record.sampled) for record in records),
        waiting=Spread.of(reader.waiting),
        first_token=Spread.of(reader.first_token),
        num_preemptions=sum(len(record.preempted) for record in records),
        num_lost_tokens=sum(p.num_lost_tokens for record in records for p in record.preempted),
        num_hit_tokens=sum(record.num_hit_tokens for record in records),
        mean_held=sum(held) / max(1, len(held)),
        peak_held=max(held, default=0),
        num_blocks=last.num_held_blocks + last.num_cached_blocks + last.num_free_blocks
        if last
        else 0,
    )


class _Reader:
    """Follows each request from its arrival to its first token, and to its end."""

    def __init__(self) -> None:
        self.arrived: dict[str, int] = {}
        """Requests of which nothing is computed yet, and the step before which they arrived."""
        self.computing: dict[str, int] = {}
        """Those that have no output token yet."""
        self.unfinished: dict[str, set[str]] = {}
        """Request id to those of its sequences that have not ended, as far as they are known."""
        self.waiting: list[int] = []
        self.first_token: list[int] = []
        self.num_arrived = self.num_finished = 0
        self._first_step: int | None = None

    def read(self, record: StepRecord) -> None:
        step = record.step
        if self._first_step is None:
            self._first_step = step
        aborted = {finish.seq_id for finish in record.finished if finish.reason == "abort"}
        for name in {seq_id.partition("#")[0] for seq_id in aborted}:
            self._forget(name)
        for request in record.added:
            self._forget(request.request_id)
            self.arrived[request.request_id] = step
            self.unfinished[request.request_id] = {request.request_id}
            self.num_arrived += 1
        for admission in record.admitted:
            name = admission.seq_id
            if name not in self.arrived and name not in self.computing and not admission.resumed:
                self.arrived[name] = self._first_step  # it was there from the beginning
                self.unfinished[name] = {name}
                self.num_arrived += 1
            if name in self.arrived and not record.error:
                since = self.computing[name] = self.arrived.pop(name)
                self.waiting.append(step - since)
        for name in [name for name in self.computing if name in record.sampled]:
            self.first_token.append(step - self.computing.pop(name) + 1)
        for parent, child in record.forked:
            self.unfinished.setdefault(parent.partition("#")[0], {parent}).add(child)
        for seq_id, reason, _ in record.finished:
            if reason != "abort":
                self._finish(seq_id, reason)

    def _forget(self, name: str) -> None:
        """It was aborted, or its name is taken anew."""
        self.arrived.pop(name, None)
        self.computing.pop(name, None)
        self.unfinished.pop(name, None)

    def _finish(self, seq_id: str, reason: str) -> None:
        name = seq_id.partition("#")[0]
        unfinished = self.unfinished.setdefault(name, {seq_id})
        unfinished.discard(seq_id)
        if not unfinished:
            self.num_finished += reason != "error"
            self._forget(name)


_ROWS = (
    ("steps", lambda f: f.num_steps),
    ("requests finished", lambda f: f.num_finished),
    ("requests never begun", lambda f: f.num_unstarted),
    ("requests refused", lambda f: f.num_refused),
    ("output tokens a step", lambda f: f.output_tokens_per_step),
    ("tokens computed a step", lambda f: f.tokens_per_step),
    ("steps waited: mean", lambda f: f.waiting.mean),
    ("steps waited: median", lambda f: f.waiting.p50),
    ("steps waited: 90% within", lambda f: f.waiting.p90),
    ("steps waited: longest", lambda f: f.waiting.max),
    ("steps to first token: mean", lambda f: f.first_token.mean),
    ("steps to first token: median", lambda f: f.first_token.p50),
    ("steps to first token: 90% within", lambda f: f.first_token.p90),
    ("steps to first token: longest", lambda f: f.first_token.max),
    ("preemptions", lambda f: f.num_preemptions),
    ("tokens lost to them", lambda f: f.num_lost_tokens),
    ("tokens from the prefix cache", lambda f: f.num_hit_tokens),
    ("blocks held: mean", lambda f: f.mean_held),
    ("blocks held: most", lambda f: f.peak_held),
    ("blocks in all", lambda f: f.num_blocks),
)


def _cells(values: list[float]) -> list[str]:
    first, *others = values
    return [_shown(first), *(f"{_shown(value)}{_change(first, value)}" for value in others)]


def _shown(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def _change(before: float, after: float) -> str:
    if before == after:
        return ""
    if not before:
        return f" (+{_shown(after)})"
    percent = round(100 * (after - before) / before)
    return f" ({percent:+,}%)" if percent else ""
