"""What a dashboard tells its page: a whole frame to begin with, then differences.

`gather` copies what is needed on the engine's thread, between two steps, in little time. A `Feed`,
which the publisher's thread owns, knows what the page was told, and turns a `Moment` into the next
message: what changed in the rows of the queues, steps that are new, blocks that are no longer what they
were. `past` makes a message of an earlier step, from the history alone. No widget is touched here.
"""

from __future__ import annotations

import time
import traceback
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from typing import Any

from nbengine.core.history import History
from nbengine.core.records import StepRecord, Wait
from nbengine.core.request import Sequence, Status
from nbengine.engine import Engine
from nbengine.errors import EngineClosed, NbengineError, UnknownRequest
from nbengine.jupyter.block_map import colour_index, describe_block
from nbengine.jupyter.cells import BlockCells, Slots, encode_steps
from nbengine.jupyter.views import record_html, tail, why_it_waits
from nbengine.outputs import RequestMetrics, RequestOutput

MAX_SEQUENCES = 64
"""Rows of the queue table; the block map and the timeline know all."""
MAX_STEPS = 400
"""Steps in one message: a page asks for others when it comes to show them."""
MAX_FINISHED = 6
TEXT_TAIL = 170
LONGEST_HOLD_OFF = 0.02
"""Seconds that a running engine may take from one step to the computing of the next."""
SECONDS_OF_A_LAUNCH = 0.001
"""A device has nothing to do until a step's kernels are launched, and that is Python's work too."""
SPEED_TOKENS = 20
"""A request's speed is that of so many of its latest tokens."""
SPEED_WINDOW = 2.0
"""Seconds over which tokens per second are counted."""

Message = tuple[dict[str, Any], list[bytes]]


@dataclass(frozen=True, slots=True)
class Notice:
    """What a page shows of an error. Text, because an exception's traceback would keep the engine
    alive."""

    text: str
    detail: str = ""
    """The traceback, where it is the program's error and not the user's."""

    @classmethod
    def of(cls, error: BaseException, prefix: str = "") -> Notice:
        if isinstance(error, NbengineError):
            return cls(f"{prefix}{error}")
        detail = "".join(traceback.format_exception(error))
        return cls(f"{prefix}{type(error).__name__}: {error}", detail)


@dataclass(frozen=True, slots=True)
class Moment:
    """An engine between two steps."""

    step: int
    num_cuts: int
    """How often the history's end was cut off: what was told of later steps is void then."""
    num_untold: int
    """Releases of blocks that no record tells yet."""
    first_step: int
    """The first one that the history holds, or the next one."""
    policy: str
    budget: int
    max_budget: int
    is_running: bool
    failure: Notice | None
    """What ended the last background run."""
    stopped: str | None
    """The breakpoint that it stopped at."""
    records: tuple[StepRecord, ...]
    """The latest of those that the feed has not told yet, oldest first."""
    cells: BlockCells | None
    """Made anew where records alone do not reach."""
    rows: tuple[dict[str, Any], ...]
    num_running: int
    num_waiting: int
    tails: array[int]
    """uint32 pairs: the last block of each running sequence, and its slots in use."""
    selected: array[int]
    """uint32: the block table of the sequence that the page asked about."""
    block: dict[str, Any] | None
    """The block that the page asked about, as `describe_block` tells of it."""
    num_held: int
    num_cached: int
    num_blocks: int
    block_size: int
    time: float
    """Seconds on the engine's clock."""
    cost: float
    """Seconds for which the engine's thread was held."""
    finished: tuple[dict[str, Any], ...]
    """The latest requests to end, newest first."""


def gather(
    engine: Engine, feed: Feed, selected: str | None = None, block: int | None = None
) -> Moment:
    """The engine's state now, with the table of sequence `selected` and all about `block`. While the
    engine runs, this returns when its next step is being computed.

    Raises:
        EngineClosed
    """
    future = engine.submit(lambda: _gather(engine, feed, selected, block))
    while True:
        try:
            moment = future.result(timeout=0.5)
            if moment.is_running and engine.is_computing.wait(LONGEST_HOLD_OFF):
                time.sleep(SECONDS_OF_A_LAUNCH)
            return moment
        except TimeoutError:  # a long step, or an engine that was closed before it came to this
            if engine.is_closed and future.cancel():
                raise EngineClosed("the engine was closed") from None


def _gather(engine: Engine, feed: Feed, selected: str | None, block: int | None) -> Moment:
    began = time.perf_counter()
    scheduler, history, pool = engine.scheduler, engine.history, engine.scheduler.pool
    step, num_new = scheduler.step_count, scheduler.step_count - feed.step
    cells = None
    is_cut = history.num_cuts != feed.num_cuts
    is_lost = feed.cells is None or not 0 <= num_new <= min(MAX_STEPS, len(history))
    if is_cut or is_lost:
        num_new = min(MAX_STEPS, len(history))
    # What no record tells yet is in the cells once they are made anew; then the record that does tell
    # it must not be applied to them.
    num_untold = scheduler.num_untold_releases
    is_untold = num_untold != feed.num_untold or (num_new > 0 and feed.num_untold > 0)
    if is_cut or is_lost or is_untold:
        cells = BlockCells(
            pool.num_blocks,
            scheduler.running,
            pool.cached_blocks(),
            pool.prefix_cache.content_of,
            step,
            feed.slots,
        )
    records = tuple(history[-k] for k in range(num_new, 0, -1))
    waits = why_it_waits(history[-1] if len(history) else None)
    head = next((w.seq_id for w in waits.values() if not w.got), None)
    requests = engine.requests
    queued = [*scheduler.running[:MAX_SEQUENCES], *scheduler.waiting[:MAX_SEQUENCES]]
    rows = [
        _row(seq, requests.text_of(seq), requests[seq.request.request_id].metrics, waits, head)
        for seq in queued[:MAX_SEQUENCES]
    ]
    tails, table = _tables(scheduler.running, pool.block_size, selected)
    return Moment(
        step=step,
        num_cuts=history.num_cuts,
        num_untold=num_untold,
        first_step=history[-len(history)].step if len(history) else step + 1,
        policy=type(scheduler.policy).__name__,
        budget=scheduler.config.max_num_batched_tokens,
        max_budget=engine.config.max_num_batched_tokens,
        is_running=engine.is_running,
        failure=None
        if engine.error is None
        else Notice.of(engine.error, "The background run stopped. "),
        stopped=None if engine.stopped_at is None else str(engine.stopped_at),
        records=records,
        cells=cells,
        rows=tuple(rows),
        num_running=len(scheduler.running),
        num_waiting=len(scheduler.waiting),
        tails=tails,
        selected=table,
        block=None
        if block is None
        else describe_block(
            block,
            step,
            pool.block_size,
            scheduler.running,
            pool.cached_blocks(),
            pool.prefix_cache.content_of,
        ),
        num_held=pool.num_held,
        num_cached=pool.num_cached,
        num_blocks=pool.num_blocks,
        block_size=pool.block_size,
        time=engine.clock(),
        finished=tuple(_finished(engine, feed, records)),
        cost=time.perf_counter() - began,
    )


def _row(
    seq: Sequence,
    text: str,
    metrics: RequestMetrics | None,
    waits: dict[str, Wait],
    head: str | None,
) -> dict[str, Any]:
    return {
        "id": seq.seq_id,
        "request": seq.request.request_id,
        "colour": colour_index(seq.seq_id),
        "status": str(seq.status),
        "num_prompt": seq.num_prompt_tokens,
        "num_tokens": len(seq.tokens),
        "num_computed": seq.num_computed_tokens,
        "max_tokens": seq.request.max_total_tokens,
        "num_cached": seq.num_cached_tokens,
        "num_preemptions": seq.num_preemptions,
        "num_blocks": len(seq.block_table),
        "text": text,
        "ttft": _rounded(metrics.ttft) if metrics else None,
        "speed": _speed(metrics.token_times) if metrics else None,
        "why": _why(seq, waits, head),
    }


def _shown(row: dict[str, Any]) -> dict[str, Any]:
    """With the end of its text. Not on the engine's thread, for which so much text is much."""
    return row | {"text": tail(row["text"], TEXT_TAIL)}


def _news(row: dict[str, Any], told: dict[str, Any] | None) -> dict[str, Any]:
    """What a page does not know of a row yet, and the row's id."""
    if told is None:
        return row
    return {key: value for key, value in row.items() if key == "id" or told[key] != value}


def _speed(times: list[float]) -> float | None:
    """Tokens a second, of the latest: a pause is soon forgotten."""
    latest = times[-SPEED_TOKENS - 1 :]
    elapsed = latest[-1] - latest[0] if latest else 0
    return round((len(latest) - 1) / elapsed, 1) if elapsed else None


def _rounded(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 4)


def _why(seq: Sequence, waits: dict[str, Wait], head: str | None) -> str:
    """In a few words, why it got less than it wanted; `Engine.why` says more."""
    wait = waits.get(seq.seq_id)
    if wait is not None:
        numbers = f" ({wait.needed} needed, {wait.available} left)" if wait.needed else ""
        return f"{'slowed' if wait.got else 'waits'}: {wait.cause}{numbers}"
    if seq.status is Status.RUNNING:
        return ""
    return f"waits behind {head}" if head is not None else "waits for the next step"


def _tables(
    running: Iterable[Sequence], block_size: int, selected: str | None
) -> tuple[array[int], array[int]]:
    """`Moment.tails` and `Moment.selected`."""
    tails, table = array("I"), array("I")
    for seq in running:
        tails.extend((seq.block_table[-1], _used(seq, block_size)))
        if seq.seq_id == selected:
            table.extend(seq.block_table)
    return tails, table


def _used(seq: Sequence, block_size: int) -> int:
    """Slots of its last block that hold keys and values."""
    used = seq.num_computed_tokens - (len(seq.block_table) - 1) * block_size
    return max(0, min(block_size, used))


def _finished(
    engine: Engine, feed: Feed, records: Iterable[StepRecord]
) -> Iterable[dict[str, Any]]:
    """The latest that ended, newest first: those of new records, then those known before."""
    names: dict[str, None] = {}
    for record in reversed(tuple(records)):
        for finish in reversed(record.finished):
            names.setdefault(finish.seq_id.partition("#")[0])
        if len(names) >= MAX_FINISHED:
            break
    ended = [*names, *(name for name in feed.alive if name not in names)]
    live = engine.scheduler.live
    outputs = [_output_of(engine, name) for name in ended if name not in live]
    shown = [_ended_row(output) for output in outputs if output is not None]
    new = {row["id"] for row in shown}
    shown += [row for row in feed.finished if row["id"] not in new and row["id"] not in live]
    return shown[:MAX_FINISHED]


def _output_of(engine: Engine, name: str) -> RequestOutput | None:
    try:
        return engine.output(name)
    except UnknownRequest:
        return None


def _ended_row(output: RequestOutput) -> dict[str, Any]:
    samples, metrics = output.outputs, output.metrics
    return {
        "id": output.request_id,
        "colour": colour_index(output.request_id),
        "reason": ", ".join(sorted({s.finish_reason or "" for s in samples} - {""})) or "abort",
        "num_prompt": len(output.prompt_token_ids),
        "num_output": sum(len(s.token_ids) for s in samples),
        "num_cached": output.num_cached_tokens,
        "ttft": _rounded(metrics.ttft),
        "speed": round(1 / metrics.tpot, 1) if metrics.tpot else None,
        "text": tail(samples[0].text, TEXT_TAIL) if samples else "",
    }


class _Rates:
    """How fast tokens come, and how many prompt tokens the prefix cache spared, of the latest steps."""

    def __init__(self) -> None:
        self._steps: deque[StepRecord] = deque(maxlen=1000)
        self._num_sampled = 0
        self._lookups: deque[tuple[int, int]] = deque(maxlen=100)

    def add(self, records: Iterable[StepRecord]) -> None:
        for record in records:
            if len(self._steps) == self._steps.maxlen:
                self._num_sampled -= len(self._steps[0].sampled)
            self._steps.append(record)
            self._num_sampled += len(record.sampled)
            self._lookups += [
                (a.prefix.num_hit_tokens, a.prefix.num_tokens) for a in record.admitted
            ]

    def tokens_per_second(self, now: float) -> float:
        """Output tokens, of `SPEED_WINDOW`, or a few steps if steps are slow."""
        steps = self._steps
        if not steps:
            return 0.0
        window = max(SPEED_WINDOW, 4 * steps[-1].phases.total)
        while steps and now - steps[0].time > window:
            self._num_sampled -= len(steps.popleft().sampled)
        return self._num_sampled / (now - steps[0].time) if steps and now > steps[0].time else 0.0

    @property
    def hit_rate(self) -> float | None:
        """Of the prompt tokens of the latest admissions; None before the first."""
        looked_up = sum(n for _, n in self._lookups)
        return sum(hit for hit, _ in self._lookups) / looked_up if looked_up else None


# ---------------------------------------------------------------------- messages


class Feed:
    """What a page was told, and the next message."""

    def __init__(self) -> None:
        self.slots = Slots()
        self.cells: BlockCells | None = None
        self.step = 0
        self.num_cuts = 0
        self.num_untold = 0
        self.alive: tuple[str, ...] = ()
        """Unfinished requests among the rows that were told last."""
        self.finished: tuple[dict[str, Any], ...] = ()
        self._rows: dict[str, dict[str, Any]] = {}
        self._num_names = 0
        self._is_fresh = True
        self._rates = _Rates()

    def forget(self) -> None:
        """A page is new, or has lost a message: the next one is whole, and names anew only who is in
        it, so that a long life does not make it long."""
        self.slots = Slots()
        self._is_fresh = True
        self._rows.clear()
        self._num_names = 0
        self.cells = None

    def message(self, moment: Moment) -> Message:
        """What has changed since the last one. Buffers: numbers of steps and their entries (see
        `encode_steps`), cells (pairs of block and cell, or all of them), tails, the selected
        table."""
        is_whole = moment.cells is not None
        if moment.cells is not None:
            self.cells = moment.cells
            self._rows.clear()
            blocks = self.cells.cells
        else:
            assert self.cells is not None
            for record in moment.records:
                self.cells.apply(record)
            blocks = self.cells.changes()
        is_cut = moment.num_cuts != self.num_cuts
        if is_cut:
            self._rates = _Rates()
        self._rates.add(r for r in moment.records if r.step > self.step or is_cut)
        self.step, self.num_cuts = moment.step, moment.num_cuts
        self.num_untold = moment.num_untold
        self.alive = tuple(dict.fromkeys(row["request"] for row in moment.rows))
        self.finished = moment.finished
        rows, entries = encode_steps(moment.records, self.slots)
        told, self._rows = self._rows, {row["id"]: _shown(row) for row in moment.rows}
        news = [_news(row, told.get(name)) for name, row in self._rows.items()]
        is_fresh, self._is_fresh = self._is_fresh, False
        content = {
            "is_fresh": is_fresh,
            "is_whole": is_whole,
            "is_cut": is_cut,
            "names": self._new_names(),
            "step": moment.step,
            "first_step": moment.first_step,
            "policy": moment.policy,
            "budget": moment.budget,
            "max_budget": moment.max_budget,
            "is_running": moment.is_running,
            "stopped": moment.stopped,
            "order": [row["id"] for row in moment.rows],
            "rows": [row for row in news if len(row) > 1],
            "num_running": moment.num_running,
            "num_waiting": moment.num_waiting,
            "finished": moment.finished,
            "num_held": moment.num_held,
            "num_cached": moment.num_cached,
            "num_blocks": moment.num_blocks,
            "block_size": moment.block_size,
            "tokens_per_second": round(self._rates.tokens_per_second(moment.time), 1),
            "hit_rate": self._rates.hit_rate,
            "failure": moment.failure and asdict(moment.failure),
        }
        if moment.records:
            content["record"] = record_html(moment.records[-1])
        arrays = (rows, entries, blocks, moment.tails, moment.selected)
        return content, [each.tobytes() for each in arrays]

    def _new_names(self) -> list[tuple[int, str, int]]:
        """Of the sequences that are in this message and were in none before: so it is asked for last."""
        names = self.slots.names(self._num_names)
        self._num_names = len(self.slots)
        return names

    def steps(self, history: History, first: int, last: int) -> Message:
        """Steps that a page lacks, as far as the history has them: the latest `MAX_STEPS` of those
        asked for. Buffers as the first two of `message`."""
        first_told, last_told = max(first, last - MAX_STEPS + 1), min(last, self.step)
        # Not by number: the engine's thread may drop the oldest meanwhile.
        records = [record for record in history if first_told <= record.step <= last_told]
        arrays = encode_steps(records, self.slots)
        content = {"first": first, "last": last, "names": self._new_names()}
        return content, [each.tobytes() for each in arrays]

    def past(
        self,
        history: History,
        step: int,
        selected: str | None,
        text_of: Callable[[Sequence], str],
        metrics_of: Callable[[Sequence], RequestMetrics | None],
    ) -> Message:
        """The queues and blocks after an earlier step. Buffers: all cells, tails, the selected table.

        Raises:
            UnknownStep
        """
        state = history.state_at(step)
        record = history[step] if step >= _first_step(history) and step else None
        waits = why_it_waits(record)
        head = next((w.seq_id for w in waits.values() if not w.got), None)
        running, waiting = state.running, state.waiting
        rows = [
            _shown(_row(seq, text_of(seq), metrics_of(seq), waits, head))
            for seq in (*running, *waiting)[:MAX_SEQUENCES]
        ]
        cells = BlockCells(
            len(state.ref_counts), running, state.cached, state.contents, step, self.slots
        )
        tails, table = _tables(running, state.block_size, selected)
        content = {
            "step": step,
            "names": self._new_names(),
            "policy": state.policy,
            "rows": rows,
            "num_running": len(running),
            "num_waiting": len(waiting),
            "num_held": sum(1 for count in state.ref_counts if count),
            "num_cached": len(state.cached),
            "record": record_html(record) if record is not None else "",
        }
        arrays = (cells.cells, tails, table)
        return content, [each.tobytes() for each in arrays]


def _first_step(history: History) -> int:
    return history[-len(history)].step if len(history) else 1
