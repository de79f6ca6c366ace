"""The script of a run: what arrives and is aborted before which step, and which tokens all get.

`Script.of` reads it out of step records, for a fork or a trace; a trace writes one too
(`Trace.script`); `simulate` plays it to a scheduler. A script knows nothing of blocks, chunks or
preemptions: what it says of a request holds under any policy and with any numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from nbengine.core.records import PREFIX_CACHE, Finish, StepRecord
from nbengine.core.request import Request, Sequence
from nbengine.core.sampling_params import BeamSearchParams
from nbengine.core.state import State

Candidates = list[tuple[int, float]]


class Ending(NamedTuple):
    """How a sequence ended, and before (an abort) or in which step."""

    finish: Finish
    step: int
    time: float
    """Seconds on the engine's clock when that step began."""
    has_token: bool
    """Whether the sequence got its last token in that very step."""


@dataclass(slots=True, eq=False)
class Part:
    """One request's part in the script."""

    request: Request
    tokens: dict[int, list[int]] = field(default_factory=lambda: {0: []})
    """The output tokens of each sample (or beam), as far as they are known."""
    endings: dict[int, Ending] = field(default_factory=dict)
    """By sample (or beam); none for one whose end is not known."""
    unfinished: set[str] = field(default_factory=set)
    """While records are read: the ids of its sequences that have not ended."""
    candidates: dict[tuple[str, int], Candidates] = field(default_factory=dict)
    """Beams: by sequence id and number of output tokens."""
    draw_candidates: Callable[[Sequence], Candidates | None] | None = None
    """Beams of a trace, which knows no candidates: makes them up."""

    @property
    def is_beam_search(self) -> bool:
        return isinstance(self.request.params, BeamSearchParams)

    def ending_of(self, index: int) -> Ending | None:
        """Of a sample; all beams of a request end as its last one did."""
        if self.is_beam_search and not self.unfinished:
            return next(reversed(self.endings.values()), None)
        return self.endings.get(index)

    def token(self, index: int, position: int) -> int | None:
        """A sample's output token; None for one that is not known."""
        tokens = self.tokens.get(index, ())
        return tokens[position] if position < len(tokens) else None

    def candidates_of(self, beam: Sequence) -> Candidates | None:
        """What a beam may go on with; None if that is not known."""
        if self.draw_candidates is not None:
            return self.draw_candidates(beam)
        num_output = len(beam.tokens) - beam.num_prompt_tokens
        return self.candidates.get((beam.seq_id, num_output))


class Event(NamedTuple):
    """Something that happens from outside, after step `step - 1` and before step `step`."""

    step: int
    time: float
    """Seconds on the engine's clock: of an arrival the request's own, else when `step` began."""
    kind: str
    """`arrival`, `abort`, or `reset` of the prefix cache."""
    part: Part | None = None


class Script:
    """Events in the order in which they happen, and the parts of all requests."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.present: dict[str, Part] = {}
        """Requests that are there from the beginning, by id."""
        self.unknown: set[str] = set()
        """Requests that the records tell of, but whose arrival they do not hold."""
        self._live: dict[str, Part] = {}

    @classmethod
    def of(cls, records: Iterable[StepRecord], state: State | None = None) -> Script:
        """What happened in `records`, which follow each other; `state` is the one before them."""
        script = cls()
        if state is not None:
            for name, live in state.live.items():
                part = Part(live.request, {s.index: s.output_token_ids for s in live.sequences})
                part.unfinished = {s.seq_id for s in live.sequences if not s.is_finished}
                part.endings = {
                    s.index: Ending(
                        Finish(s.seq_id, s.finish_reason or "", s.stop_reason),
                        state.step,
                        0.0,
                        False,
                    )
                    for s in live.sequences
                    if s.is_finished
                }
                script.present[name] = part
        script._live = dict(script.present)
        for record in records:
            script._read(record)
        return script

    def _read(self, record: StepRecord) -> None:
        live = self._live
        step, time = record.step, record.time
        aborted = [finish for finish in record.finished if finish.reason == "abort"]
        for request in record.added:
            while request.request_id in live and aborted:  # whoever had this name before
                self._abort(aborted, record)
            part = Part(request, unfinished={request.request_id})
            live[request.request_id] = part
            self.events.append(Event(step, request.arrival_time, "arrival", part))
        while aborted:
            self._abort(aborted, record)
        # After the aborts, because it is refused as long as any sequence holds blocks.
        resets = sum(move.seq_id == PREFIX_CACHE for move in record.released)
        self.events += [Event(step, time, "reset")] * resets
        self._read_results(record)

    def _abort(self, aborted: list[Finish], record: StepRecord) -> None:
        """Take the next aborted sequence from the list: the first of its request, or another one,
        which changes nothing any more."""
        finish = aborted.pop(0)
        if found := self._part_of(finish.seq_id):
            part, _ = found
            self.events.append(Event(record.step, record.time, "abort", part))
            self._end(part, finish, record, has_token=False)

    def _read_results(self, record: StepRecord) -> None:
        for seq_id, candidates in record.candidates.items():
            if found := self._part_of(seq_id):
                part, index = found
                part.candidates[seq_id, len(part.tokens[index])] = list(candidates)
        for parent, child in record.forked:
            if found := self._part_of(parent):
                part, index = found
                part.tokens[int(child.partition("#")[2])] = list(part.tokens[index])
                part.unfinished.add(child)
        for seq_id, token in record.sampled.items():
            if found := self._part_of(seq_id):
                part, index = found
                part.tokens[index].append(token)
        for finish in record.finished:
            if finish.reason != "abort" and (found := self._part_of(finish.seq_id)):
                self._end(found[0], finish, record, finish.seq_id in record.sampled)

    def _part_of(self, seq_id: str) -> tuple[Part, int] | None:
        """A sequence's part and index."""
        name, _, index = seq_id.partition("#")
        part = self._live.get(name)
        if part is None:
            self.unknown.add(name)
            return None
        return part, int(index or 0)

    def _end(self, part: Part, finish: Finish, record: StepRecord, has_token: bool) -> None:
        name, _, index = finish.seq_id.partition("#")
        part.endings[int(index or 0)] = Ending(finish, record.step, record.time, has_token)
        part.unfinished.discard(finish.seq_id)
        if not part.unfinished:
            del self._live[name]
