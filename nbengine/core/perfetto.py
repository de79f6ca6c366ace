"""A run as a timeline for ui.perfetto.dev or chrome://tracing: `to_perfetto(records, path)`.

A file of trace events (JSON, times in microseconds from the first step). Steps are one track, their
phases inside them; each sequence has a track of what it did: it waits, computes chunks of its
prompt, decodes, is preempted; and there are counters of blocks, tokens and queues. On a track no
slice overlaps another that it does not hold: states begin and end where steps do.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nbengine.core.records import StepRecord

_STEPS, _REQUESTS = 1, 2  # process ids
NS_OF_A_TIMELESS_STEP = 1_000_000

Event = dict[str, Any]


def to_perfetto(records: Iterable[StepRecord], path: str | Path) -> Path:
    """Write the timeline of records that follow each other; returns where it is. Steps that took no
    time, those of a simulation by steps, are drawn as a millisecond each.

    Raises:
        OSError: the file can't be written.
    """
    path = Path(path)
    document = {"traceEvents": events_of(records), "displayTimeUnit": "ms"}
    path.write_text(json.dumps(document, separators=(",", ":")), encoding="utf-8")
    return path


def events_of(records: Iterable[StepRecord]) -> list[Event]:
    """The trace events: names of tracks first, then all else by time, what holds before what it
    holds."""
    records = tuple(records)
    timeline = _Timeline(records)
    for record in records:
        timeline.draw(record)
    timeline.close()
    timeline.events.sort(key=lambda event: event["ts"])  # stable: a step before its phases
    return [*timeline.names, *timeline.events]


@dataclass(slots=True)
class _Track:
    """One sequence's: the slice that is open, and what it takes to name the next one."""

    tid: int
    state: str
    since: int
    args: dict[str, Any] = field(default_factory=dict)
    has_caught_up: bool = False
    """All its known tokens are computed, so the next one that it computes is a decoded one."""
    has_output: bool = False


class _Timeline:
    """Reads records in order. Times inside are integers of nanoseconds, so that what touches in
    truth touches in the file."""

    def __init__(self, records: tuple[StepRecord, ...]) -> None:
        self.names: list[Event] = []
        self.events: list[Event] = []
        self.tracks: dict[str, _Track] = {}
        """Of sequences that have not ended, by id."""
        self.computing: set[str] = set()
        """Those that computed in the step before."""
        self._num_tracks = 0
        self._is_timed = any(record.phases.total for record in records)
        self._zero = records[0].time if records else 0.0
        self._begins = self._times(records)
        self._end = 0
        self._name("process_name", "steps", _STEPS)
        self._name("process_name", "requests", _REQUESTS)
        self._name("thread_name", "steps", _STEPS, 1)

    def _times(self, records: tuple[StepRecord, ...]) -> dict[int, tuple[int, int]]:
        """Step to its begin and end; an end is never behind the next begin."""
        if not self._is_timed:
            unit = NS_OF_A_TIMELESS_STEP
            return {r.step: (k * unit, (k + 1) * unit) for k, r in enumerate(records)}
        begins = [self._ns(record.time) for record in records]
        ends = [self._ns(record.time + record.phases.total) for record in records]
        limits = [*begins[1:], max(ends, default=0)]
        return {
            record.step: (begin, max(begin, min(end, limit)))
            for record, begin, end, limit in zip(records, begins, ends, limits, strict=True)
        }

    def _ns(self, seconds: float) -> int:
        return max(0, round((seconds - self._zero) * 1e9))

    # ------------------------------------------------------------------ a step

    def draw(self, record: StepRecord) -> None:
        begin, end = self._begins[record.step]
        self._draw_step(record, begin, end)
        for finish in record.finished:
            if finish.reason == "abort":  # between the steps
                self._finish(finish.seq_id, finish.reason, begin)
        for request in record.added:
            arrived = begin
            if self._is_timed:
                arrived = min(begin, self._ns(request.arrival_time))
            self._open(request.request_id, "waiting", arrived)
        self._draw_events(record, begin)
        self._draw_states(record, begin)
        for seq_id in (*record.sampled, *record.candidates):
            if track := self.tracks.get(seq_id):
                track.has_caught_up = track.has_output = True
        for parent, child in record.forked:
            track = self._open(child, "begins", end)
            if origin := self.tracks.get(parent):
                track.has_caught_up = track.has_output = origin.has_caught_up
        for finish in record.finished:
            if finish.reason != "abort":
                self._finish(finish.seq_id, finish.reason, end)
        self._end = end

    def _draw_step(self, record: StepRecord, begin: int, end: int) -> None:
        name = f"step {record.step}: {record.num_tokens} tokens"
        args: dict[str, Any] = {
            "policy": record.policy,
            "token budget": record.token_budget,
            "computed": record.scheduled,
        }
        if record.waits:
            args["waits"] = {wait.seq_id: str(wait) for wait in record.waits}
        if record.error:
            self._instant(
                f"step {record.step} was taken back", begin, _STEPS, 1, error=record.error
            )
        self._slice(name, begin, end, _STEPS, 1, args)
        at = record.time
        for phase, seconds in record.phases._asdict().items():
            start, at = self._ns(at), at + seconds
            if seconds:
                self._slice(phase, min(start, end), min(self._ns(at), end), _STEPS, 1)
        self._counter("tokens a step", begin, computed=record.num_tokens)
        self._counter(
            "KV blocks",
            end,
            held=record.num_held_blocks,
            cached=record.num_cached_blocks,
            free=record.num_free_blocks,
        )
        self._counter("sequences", end, running=record.num_running, waiting=record.num_waiting)

    def _draw_events(self, record: StepRecord, begin: int) -> None:
        """Who was admitted, and who lost its blocks, when the step was scheduled."""
        for admission in record.admitted:
            track = self._track(admission.seq_id, "waiting")
            name = "resumed" if admission.resumed else "admitted"
            hit = admission.prefix.num_hit_tokens
            name += f", {hit} tokens cached" if hit else ""
            self._instant(name, begin, _REQUESTS, track.tid, prefix=str(admission.prefix))
        for seq_id, in_favour_of, mode, num_lost_tokens, num_blocks in record.preempted:
            track = self._track(seq_id, "running")
            self._instant(
                f"preempted ({mode})",
                begin,
                _REQUESTS,
                track.tid,
                **{"for": in_favour_of, "tokens lost": num_lost_tokens, "blocks": num_blocks},
            )
            track.has_caught_up = track.has_caught_up and mode == "swap"
            self._state(track, "swapped out" if mode == "swap" else "preempted", begin)

    def _draw_states(self, record: StepRecord, begin: int) -> None:
        for seq_id, n in record.scheduled.items():
            track = self._track(seq_id, "running")
            if track.has_caught_up and n == 1:
                if track.state != "decode":
                    self._state(track, "decode", begin)
            else:
                what = "recompute" if track.has_output else "prefill"
                self._state(track, f"{what} {n}", begin, {"tokens": n})
            track.has_caught_up = False
        lost = {preemption.seq_id for preemption in record.preempted}
        for seq_id in self.computing - record.scheduled.keys() - lost:
            if track_or_none := self.tracks.get(seq_id):
                waits = {wait.seq_id: str(wait) for wait in record.waits}
                args = {"why": waits[seq_id]} if seq_id in waits else {}
                self._state(track_or_none, "computes nothing", begin, args)
        self.computing = set(record.scheduled)

    def close(self) -> None:
        """End what is still open where the last step does."""
        for track in self.tracks.values():
            self._state(track, "", self._end)

    # ------------------------------------------------------------------ tracks

    def _track(self, seq_id: str, state: str) -> _Track:
        """A sequence's; for one that was there before the first record, from there on."""
        return self.tracks.get(seq_id) or self._open(seq_id, state, 0)

    def _open(self, seq_id: str, state: str, at: int) -> _Track:
        if before := self.tracks.pop(seq_id, None):  # the records do not tell how it ended
            self._state(before, "", at)
        self._num_tracks += 1
        tid = _REQUESTS + self._num_tracks  # the viewers want no thread twice, in no process
        self._name("thread_name", seq_id, _REQUESTS, tid)
        self.names.append(_metadata("thread_sort_index", _REQUESTS, tid, sort_index=tid))
        track = self.tracks[seq_id] = _Track(tid, state, at)
        return track

    def _state(
        self, track: _Track, state: str, at: int, args: dict[str, Any] | None = None
    ) -> None:
        """End the slice that is open, and begin the next."""
        if at > track.since:
            self._slice(track.state, track.since, at, _REQUESTS, track.tid, track.args)
        track.state, track.since, track.args = state, max(at, track.since), args or {}

    def _finish(self, seq_id: str, reason: str, at: int) -> None:
        if track := self.tracks.pop(seq_id, None):
            self._state(track, "", at)
            self._instant(f"finished: {reason}", at, _REQUESTS, track.tid)

    # ------------------------------------------------------------------ events

    def _name(self, kind: str, name: str, pid: int, tid: int = 0) -> None:
        self.names.append(_metadata(kind, pid, tid, name=name))

    def _slice(
        self,
        name: str,
        begin: int,
        end: int,
        pid: int,
        tid: int,
        args: dict[str, Any] | None = None,
    ) -> None:
        self._event("X", name, begin, args, pid=pid, tid=tid, dur=(end - begin) / 1000)

    def _instant(self, name: str, at: int, pid: int, tid: int, **args: Any) -> None:
        self._event("i", name, at, args, pid=pid, tid=tid, s="t")  # of this one thread

    def _counter(self, name: str, at: int, **values: int) -> None:
        self._event("C", name, at, values, pid=_STEPS)

    def _event(
        self, kind: str, name: str, at: int, args: dict[str, Any] | None, **fields: Any
    ) -> None:
        event = {"ph": kind, "cat": "nbengine", "name": name, "ts": at / 1000, **fields}
        self.events.append({**event, "args": args} if args else event)


def _metadata(kind: str, pid: int, tid: int, **args: Any) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "ts": 0, "args": args}
