"""`Requests`: what callers know of, by id: the unfinished requests, and the last ones that finished.

Text, logprobs and times are gathered here while steps are taken, and delivered to subscribers. The
engine's thread owns it and calls it between the moves of a step; the scheduler knows the same
requests by their sequences and nothing of their callers.
"""

from __future__ import annotations

import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from collections.abc import Sequence as Seq

from nbengine.core.logprobs import Logprob
from nbengine.core.plan import StepOutput, StepPlan
from nbengine.core.records import StepRecord
from nbengine.core.request import LiveRequest, Sequence
from nbengine.core.sampling_params import SamplingParams
from nbengine.errors import UnknownRequest
from nbengine.outputs import RequestMetrics, RequestOutput, RequestState, Subscriber
from nbengine.tokenizer import Tokenizer

MAX_FINISHED_KEPT = 1000
"""Finished requests whose outputs can still be asked for."""
MAX_FINISHED_SIZE = 2_000_000
"""And their tokens and logprobs together: some 100 MB."""

Expected = dict[tuple[int, int], tuple[list[int], int]]
"""By (rank of arrival, sample): all tokens that it had come to, of which it still has the first so
many."""

_log = logging.getLogger("nbengine")


class Requests:
    """See the module. Iterates over the ids of unfinished requests."""

    def __init__(self) -> None:
        self.unfinished: dict[str, RequestState] = {}
        self.driven: set[str] = set()
        """Unfinished ones whose callers wait for them: while there are any, steps are taken in the
        background even if the engine is paused."""
        self._finished: OrderedDict[str, RequestState] = OrderedDict()  # oldest first
        self._finished_size = 0

    def __contains__(self, name: str) -> bool:
        """Whether it is known, finished or not."""
        return name in self.unfinished or name in self._finished

    def __getitem__(self, name: str) -> RequestState:
        """One that is unfinished, or has not been forgotten.

        Raises:
            UnknownRequest: it was never added, or finished long ago.
        """
        state = self.unfinished.get(name) or self._finished.get(name)
        if state is None:
            raise UnknownRequest(f"no request {name!r}")
        return state

    def add(self, state: RequestState) -> None:
        """A new one; an earlier one of its id is forgotten."""
        self._forget(state.request_id)
        self.unfinished[state.request_id] = state

    def of(self, subscriber: Subscriber, names: Iterable[str]) -> list[str]:
        """Which of `names` are unfinished and the caller's who subscribed, or had, with `subscriber`:
        a rewind may have brought back a namesake, or one whose last output was sent before."""
        states = (self.unfinished[name] for name in names if name in self.unfinished)
        return [
            state.request_id
            for state in states
            if state.subscriber is subscriber
            or (state.subscriber is None and state.request_id in self.driven)  # it failed
        ]

    def text_of(self, seq: Sequence) -> str:
        """An unfinished request's sequence's output text."""
        return self.unfinished[seq.request.request_id].text_of(seq)

    # ------------------------------------------------------------------ a step

    def take(
        self,
        plan: StepPlan,
        output: StepOutput,
        advanced: list[Sequence],
        finish: Callable[[Sequence, str, str], None],
    ) -> None:
        """Text, stop strings and logprobs of the sequences that got a token; `finish(sequence,
        reason, stop reason)` ends those whose text says so, or fails."""
        if output.prompt_logprobs:
            for seq, _ in plan.scheduled:
                if rows := output.prompt_logprobs.get(seq.seq_id):
                    end = min(seq.num_computed_tokens + 1, seq.num_prompt_tokens)
                    state = self.unfinished[seq.request.request_id]
                    state.take_prompt_logprobs(end - len(rows), rows)
        for seq in advanced:
            state = self.unfinished[seq.request.request_id]
            try:
                stop = state.update(seq, _logprobs_of(seq, output))
            except Exception as error:  # one sequence's text must not end the others
                finish(seq, "error", f"{type(error).__name__}: {error}")
                continue
            if stop is not None:
                finish(seq, "stop", stop)

    def deliver(self, record: StepRecord, now: float) -> None:
        """Times and outputs of the requests that a step moved on, once it is over."""
        moved: dict[str, RequestState] = {}
        for admission in record.admitted:
            state = self._of(admission.seq_id)
            if state is not None and state.metrics.first_scheduled_time is None:
                state.metrics.first_scheduled_time = record.time
        for seq_id in record.sampled:
            state = self._of(seq_id)
            if state is not None:
                moved[state.request_id] = state
        for state in moved.values():
            state.metrics.token_times.append(now)
        for finish in record.finished:
            state = self._of(finish.seq_id)
            if state is not None and state.finished:  # it may be an aborted one's successor
                moved[state.request_id] = state
        for name, state in moved.items():
            if self.unfinished.get(name) is not state:
                continue  # a subscriber of this step has aborted it, or rewound
            if state.finished:
                self.retire(state, now)
            elif state.subscriber is not None and state.wants_every_output:
                _send(state, state.next_output())

    def tell_all(self, error: BaseException) -> None:
        """What ended a step that callers wait for reaches them, and nobody is waited for any more."""
        self.driven.clear()
        for state in list(self.unfinished.values()):
            if state.subscriber is not None:
                _send(state, error)

    def _of(self, seq_id: str) -> RequestState | None:
        """The request of a sequence, unless it has been aborted since."""
        return self.unfinished.get(seq_id.partition("#")[0])

    def retire(self, state: RequestState, now: float) -> None:
        """Move a finished request to the finished ones, with its last output sent."""
        name = state.request_id
        del self.unfinished[name]
        self.driven.discard(name)
        state.metrics.finished_time = now
        if state.subscriber is not None:
            _send(state, state.next_output())
        state.retire()
        self._finished[name] = state
        self._finished_size += state.size
        while len(self._finished) > MAX_FINISHED_KEPT or (
            self._finished_size > MAX_FINISHED_SIZE and len(self._finished) > 1
        ):
            self._forget(next(iter(self._finished)))

    def _forget(self, name: str) -> None:
        state = self._finished.pop(name, None)
        if state is not None:
            self._finished_size -= state.size

    # ------------------------------------------------------------------ a rewind

    def rewind(
        self,
        alive: Mapping[str, LiveRequest],
        dropped: Seq[StepRecord],
        tokenizer: Tokenizer | None,
    ) -> tuple[Expected, Seq[RequestState]]:
        """Go back to `alive`, the unfinished requests of an earlier step; `dropped` are the steps
        since. Those that came later are gone, those that ended later live again. Returns the tokens
        that are gone, beams apart: their names change with their ancestry; and the requests that
        are, whose subscribers are still to be told."""
        before = {**self._finished, **self.unfinished}
        gone = [
            state
            for name, state in self.unfinished.items()
            if name not in alive or alive[name].request is not state.live.request
        ]
        for state in gone:
            del self.unfinished[state.request_id]
            self.driven.discard(state.request_id)
        then = dropped[0].time if dropped else math.inf  # when the first of them began
        for record in dropped:
            for request in record.added:
                self._forget(request.request_id)
        expected: Expected = {}
        for name, live in alive.items():
            was = before.get(name)
            if was is None or was.live.request is not live.request:  # it ended long ago
                metrics = RequestMetrics(live.request.arrival_time)
                was = RequestState(live, None, tokenizer, metrics)
            elif isinstance(live.request.params, SamplingParams):
                known = {seq.index: len(seq.tokens) for seq in live.sequences}
                for seq in was.live.sequences:
                    num_known = known.get(seq.index, seq.num_prompt_tokens)  # it may split again
                    expected[live.request.arrival, seq.index] = seq.tokens, num_known
            self.add(was.rewound(live, then))
        return expected, gone

    def tell_gone(self, gone: Iterable[RequestState], now: float) -> None:
        """The last output of requests that a rewind undid."""
        for state in gone:
            for seq in state.live.sequences:
                if not seq.is_finished:
                    seq.end("abort")
            state.metrics.finished_time = now
            if state.subscriber is not None:
                _send(state, state.next_output())


def _send(state: RequestState, output: RequestOutput | BaseException) -> None:
    """A subscriber that fails harms nobody else."""
    assert state.subscriber is not None
    try:
        state.subscriber(output)
    except Exception:
        _log.exception("the subscriber of %s failed, and is not called again", state.request_id)
        state.subscriber = None


def _logprobs_of(seq: Sequence, output: StepOutput) -> dict[int, Logprob] | None:
    """Of the token that `seq` just got. Samples that have just been forked were all drawn from
    the row of the first, whose id is the request's."""
    rows = output.logprobs.get(seq.seq_id)
    if rows is None:
        rows = output.logprobs.get(seq.request.request_id)
    if rows is None:
        return None
    return rows[seq.index if len(rows) > 1 else 0]
