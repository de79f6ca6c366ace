"""Why: in words and as data, what became of a request and what it waits for.

`explain` puts together the scheduler's present queues and the step records of the past; it decides
nothing and keeps nothing. `Engine.why` calls it between two steps. Of a finished request it knows
what the history still holds.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from html import escape
from typing import Any

from nbengine.core.history import History
from nbengine.core.records import Admission, Cause, Finish, Fork, Preemption, StepRecord, Wait
from nbengine.core.request import Sequence, Status
from nbengine.core.scheduler import Scheduler
from nbengine.errors import UnknownRequest


@dataclass(frozen=True, slots=True)
class Queueing:
    """The place of a waiting sequence, and what there is for it now."""

    policy: str
    ahead: tuple[str, ...]
    """Who is admitted before it, the head of the queue first."""
    num_blocks_needed: int
    num_blocks_available: int
    num_blocks: int
    num_seats_needed: int
    num_seats_left: int
    head_wait: tuple[int, Wait] | None
    """(step, why the head of the queue was not admitted in it); None before the next step."""


@dataclass(frozen=True, slots=True)
class SequenceExplanation:
    """One sequence. The past is as complete as the history; each `(step, what)` is the latest."""

    seq_id: str
    status: Status
    num_prompt_tokens: int
    """0 for one that has ended and whose admission the history does not reach."""
    num_output_tokens: int
    """For one that has ended: of those that the history reaches."""
    num_computed_tokens: int
    queueing: Queueing | None
    """Of a waiting or preempted sequence."""
    added_in: int | None
    """The first step after the request was added."""
    computed: tuple[int, int] | None
    """(step, tokens)."""
    wait: tuple[int, Wait] | None
    """When it last got less than it wanted."""
    admission: tuple[int, Admission] | None
    first_admission: tuple[int, Admission] | None
    """Not the latest, but the first: that of the prompt."""
    preemption: tuple[int, Preemption] | None
    num_preemptions: int
    fork: tuple[int, Fork] | None
    """Of a further sample or beam: where it split from another."""
    finish: tuple[int | None, Finish] | None
    """The step is None where the history no longer reaches it."""

    def __str__(self) -> str:
        head, *rest = self.lines()
        return "\n".join([head, *(f"  {line}" for line in rest)])

    def lines(self) -> Iterator[str]:
        """The explanation in words, the state first and then the past, latest first."""
        yield f"{self.seq_id}: {self._state()}"
        if self.queueing:
            yield from self._queueing_lines(self.queueing)
        elif self.wait and not self.finish:
            step, wait = self.wait
            yield f"step {step}: {wait}"
        if self.preemption:
            step, p = self.preemption
            match p.mode:
                case "swap":
                    how = f"{_count(p.num_blocks, 'block')} swapped to host memory"
                case "rewind":
                    how = f"the engine went back, {_count(p.num_lost_tokens, 'token')} to compute again"
                case "error":
                    how = f"the step failed, {_count(p.num_lost_tokens, 'token')} to compute again"
                case _:
                    how = f"{_count(p.num_lost_tokens, 'token')} to compute again"
            whom = "" if p.in_favour_of == p.seq_id else f" in favour of {p.in_favour_of}"
            times = f"; {self.num_preemptions} times so far" if self.num_preemptions > 1 else ""
            yield f"preempted in step {step}{whom}: {how}{times}"
        for label, admission in (("resumed", self.admission), ("admitted", self.first_admission)):
            if admission and (label == "admitted" or admission != self.first_admission):
                step, entry = admission
                yield f"{label} in step {step}: {entry.prefix}"
        if self.fork:
            step, fork = self.fork
            yield f"split from {fork.parent} in step {step}"
        elif self.added_in is not None:
            yield f"added before step {self.added_in}"

    def _state(self) -> str:
        if self.finish:
            step, finish = self.finish
            because = {
                "stop": f"at stop {finish.stop_reason!r}"
                if finish.stop_reason is not None
                else "at the end of the text",
                "length": "at its length limit",
                "abort": "aborted",
                "error": f"by an error: {finish.stop_reason}",
                "pruned": "because its beam was not among the best",
            }.get(finish.reason, finish.reason)
            tokens = _count(self.num_output_tokens, "output token")
            when = f" in step {step}" if step is not None else ""
            return f"finished{when}, {because}, after {tokens}"
        if self.status is Status.FINISHED:
            return "has ended since the last step; the record of the next one will say how"
        known = self.num_prompt_tokens + self.num_output_tokens
        computed = f"{self.num_computed_tokens} of {known} tokens computed"
        if self.status is Status.RUNNING and self.computed:
            latest, n = self.computed
            return f"running, {computed}, {n} of them in step {latest}"
        return f"{self.status}, {computed}"

    def _queueing_lines(self, queue: Queueing) -> Iterator[str]:
        if self.wait and self.wait[1].cause is Cause.SIBLINGS:
            yield "waits for the other beams of its request"
            return
        if not queue.ahead:
            yield f"is next in the queue ({queue.policy})"
        else:
            place = f"is number {len(queue.ahead) + 1} in the queue ({queue.policy})"
            yield f"{place}, behind {queue.ahead[-1]}"
        if queue.head_wait:
            step, wait = queue.head_wait
            who = f"the head, {wait.seq_id}, " if queue.ahead else ""
            yield f"step {step}: {who}{wait}"
        else:
            yield "no step was taken since the head of the queue came there"
        yield (
            f"now it needs {_count(queue.num_blocks_needed, 'block')} at most, "
            f"{queue.num_blocks_available} of {queue.num_blocks} are available; and "
            f"{_count(queue.num_seats_needed, 'seat')}, {queue.num_seats_left} left"
        )


@dataclass(frozen=True, slots=True)
class Explanation:
    """What `explain` found. `print` it, show it in a cell, or read its fields or `facts`."""

    name: str
    step: int
    """The number of steps taken when it was asked for."""
    sequences: tuple[SequenceExplanation, ...]
    """The request's sequences in the order in which they came to be, or the one asked for."""

    @property
    def facts(self) -> dict[str, Any]:
        """All of it as plain data that JSON can hold."""
        result: dict[str, Any] = _plain(self)
        return result

    def __str__(self) -> str:
        return "\n".join(map(str, self.sequences))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        printer.text(str(self))

    def _repr_html_(self) -> str:
        blocks = []
        for seq in self.sequences:
            head, *rest = seq.lines()
            items = "".join(f"<li>{escape(line)}</li>" for line in rest)
            blocks.append(f"<b>{escape(head)}</b><ul>{items}</ul>")
        return "".join(blocks)


def explain(scheduler: Scheduler, history: History, name: str) -> Explanation:
    """Explain a request (all its sequences) or one sequence, by id.

    Raises:
        UnknownRequest: it is neither in the scheduler nor in the history.
    """
    request_id = name.partition("#")[0]
    live = scheduler.live.get(request_id)
    present = {seq.seq_id: seq for seq in live.sequences} if live else {}
    past = _Past(history, request_id)
    names = list(dict.fromkeys((*past.num_output_tokens, *present)))
    if name != request_id:
        names = [seq_id for seq_id in names if seq_id == name]
    if not names:
        kept = f"steps {history[-len(history)].step} to {history[-1].step}" if history else "none"
        raise UnknownRequest(
            f"nothing is known of {name!r}: it is not in the queues, and the history ({kept}) does "
            "not mention it"
        )
    return Explanation(
        name,
        scheduler.step_count,
        tuple(_explain(scheduler, past, seq_id, present.get(seq_id)) for seq_id in names),
    )


class _Past:
    """What the records tell of one request, from when it was added (a name may be used again)."""

    def __init__(self, history: History, request_id: str) -> None:
        self.last = next(reversed(history), None)
        self.records: list[StepRecord] = []  # latest first
        self.added_in: int | None = None
        for record in reversed(history):
            self.records.append(record)
            if any(request.request_id == request_id for request in record.added):
                self.added_in = record.step
                break
        self.num_output_tokens: dict[str, int] = {}
        """By sequence, in the order in which the records first mention them."""
        self.forks: dict[str, tuple[int, Fork]] = {}
        counts = self.num_output_tokens
        for record in reversed(self.records):
            ended = (finish.seq_id for finish in record.finished)
            added = (request.request_id for request in record.added)
            for seq_id in (*added, *record.scheduled, *ended):
                if seq_id.partition("#")[0] == request_id:
                    counts.setdefault(seq_id, 0)
            for fork in record.forked:
                if fork.child.partition("#")[0] == request_id:
                    self.forks[fork.child] = record.step, fork
                    counts[fork.child] = counts.get(fork.parent, 0)
            for seq_id in counts.keys() & record.sampled.keys():
                counts[seq_id] += 1

    def latest(self, events: str, seq_id: str) -> list[tuple[Any, Any]]:
        """(step, event) of the records' field `events` that concern the sequence, latest first."""
        return [
            (record.step, event)
            for record in self.records
            for event in reversed(getattr(record, events))
            if event.seq_id == seq_id
        ]

    def wait_in_last_step(self, seq_id: str) -> tuple[int, Wait] | None:
        waits = self.last.waits if self.last else ()
        return next(((self.last.step, w) for w in waits if self.last and w.seq_id == seq_id), None)


def _explain(
    scheduler: Scheduler, past: _Past, seq_id: str, seq: Sequence | None
) -> SequenceExplanation:
    admissions = past.latest("admitted", seq_id)
    preemptions = past.latest("preempted", seq_id)
    finishes = past.latest("finished", seq_id)
    waits = past.latest("waits", seq_id)
    computed = [(r.step, r.scheduled[seq_id]) for r in past.records if seq_id in r.scheduled]
    if seq is not None:
        status, num_computed = seq.status, seq.num_computed_tokens
        num_prompt, num_output = seq.num_prompt_tokens, len(seq.output_token_ids)
    else:
        status, num_computed = Status.FINISHED, 0
        num_output = past.num_output_tokens[seq_id]
        first = past.latest("admitted", seq_id.partition("#")[0])
        num_prompt = next((a.prefix.num_tokens for _, a in first if not a.resumed), 0)
    if seq is not None and seq.finish_reason is not None and not finishes:
        finishes = [(None, Finish(seq_id, seq.finish_reason, seq.stop_reason))]
    queueing = None
    if seq is not None and seq.status in (Status.WAITING, Status.PREEMPTED):
        queueing = _queueing(scheduler, past, seq)
        if seq.is_idle:
            waits = [(scheduler.step_count, Wait(seq_id, Cause.SIBLINGS, 0, 0))]
    elif waits and past.last and waits[0][0] != past.last.step:
        waits = []  # it has had all that it wanted since
    return SequenceExplanation(
        seq_id=seq_id,
        status=status,
        num_prompt_tokens=num_prompt,
        num_output_tokens=num_output,
        num_computed_tokens=num_computed,
        queueing=queueing,
        added_in=past.added_in,
        computed=computed[0] if computed else None,
        wait=waits[0] if waits else None,
        admission=admissions[0] if admissions else None,
        first_admission=admissions[-1] if admissions and not admissions[-1][1].resumed else None,
        preemption=preemptions[0] if preemptions else None,
        num_preemptions=seq.num_preemptions if seq else len(preemptions),
        fork=past.forks.get(seq_id),
        finish=finishes[0] if finishes and status is Status.FINISHED else None,
    )


def _queueing(scheduler: Scheduler, past: _Past, seq: Sequence) -> Queueing:
    config = scheduler.config
    queue = [other for other in scheduler.waiting if not other.is_idle]
    ahead = [] if seq.is_idle else queue[: queue.index(seq)]
    head = ahead[0] if ahead else seq
    return Queueing(
        policy=type(scheduler.policy).__name__,
        ahead=tuple(other.seq_id for other in ahead),
        num_blocks_needed=-(-len(seq.tokens) // config.block_size),
        num_blocks_available=scheduler.pool.num_available,
        num_blocks=config.num_blocks,
        num_seats_needed=1 + seq.pending_forks,
        num_seats_left=config.max_num_seqs - scheduler.num_seats_taken,
        head_wait=past.wait_in_last_step(head.seq_id),
    )


def _count(n: int, noun: str) -> str:
    return f"{n} {noun}" if n == 1 else f"{n} {noun}s"


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        return {f.name: _plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if hasattr(value, "_asdict"):
        return {key: _plain(item) for key, item in value._asdict().items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, str) else value
