"""What a dashboard shows at one moment: gathered between two steps, then turned into what a page
can draw. No widget is touched here.

`gather` runs on the engine's thread and only copies; `Frame.state` and `Frame.buffers` do the rest
on the caller's. Every frame is whole: a page that missed some, or that connects late, needs only
the next one.
"""

from __future__ import annotations

import traceback
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from nbengine.core.records import StepRecord, Wait
from nbengine.core.request import Status
from nbengine.core.snapshot import SequenceView, Snapshot
from nbengine.engine import Engine
from nbengine.errors import EngineClosed, NbengineError, UnknownRequest
from nbengine.jupyter.block_map import colour_index
from nbengine.jupyter.views import budget_parts, events_of, tail, why_it_waits
from nbengine.outputs import RequestOutput

MAX_SEQUENCES = 100
"""Rows of the queue table; the block map knows all."""
MAX_LOG = 30
MAX_FINISHED = 6
TEXT_TAIL = 170
SPEED_WINDOW = 2.0
"""Seconds over which tokens per second are counted."""


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
class Frame:
    """An engine at one moment."""

    snapshot: Snapshot
    is_running: bool
    failure: Notice | None
    """What ended the last background run."""
    records: tuple[StepRecord, ...]
    """The latest steps, newest first."""
    tokens_per_second: float
    """Output tokens."""
    finished: tuple[RequestOutput, ...]
    """The latest requests to end, newest first."""

    @property
    def request_ids(self) -> set[str]:
        """Unfinished requests."""
        return {s.request_id for s in (*self.snapshot.running, *self.snapshot.waiting)}

    def state(self) -> dict[str, Any]:
        """All but the blocks, as JSON data."""
        snapshot = self.snapshot
        sequences = (*snapshot.running, *snapshot.waiting)
        waits = why_it_waits(self.records[0] if self.records else None)
        return {
            "step": snapshot.step,
            "policy": snapshot.policy,
            "is_running": self.is_running,
            "num_running": len(snapshot.running),
            "num_waiting": len(snapshot.waiting),
            "tokens_per_second": round(self.tokens_per_second, 1),
            "block_size": snapshot.block_size,
            "num_blocks": snapshot.num_blocks,
            "num_held": snapshot.num_held_blocks,
            "num_cached": len(snapshot.cached_blocks),
            "sequences": [self._sequence(seq, waits) for seq in sequences[:MAX_SEQUENCES]],
            "num_more_sequences": max(0, len(sequences) - MAX_SEQUENCES),
            "running": [
                [seq.seq_id, colour_index(seq.seq_id), len(seq.block_table), _fill(seq, snapshot)]
                for seq in snapshot.running
            ],
            "finished": [_finished(output) for output in self.finished],
            "log": [_step(record) for record in self.records],
        }

    def _sequence(self, seq: SequenceView, waits: dict[str, Wait]) -> dict[str, Any]:
        return {
            "id": seq.seq_id,
            "request": seq.request_id,
            "colour": colour_index(seq.seq_id),
            "status": str(seq.status),
            "num_prompt": seq.num_prompt_tokens,
            "num_tokens": seq.num_tokens,
            "num_computed": seq.num_computed_tokens,
            "max_tokens": seq.max_total_tokens,
            "num_cached": seq.num_cached_tokens,
            "num_preemptions": seq.num_preemptions,
            "num_blocks": len(seq.block_table),
            "text": tail(seq.text, TEXT_TAIL),
            "why": self._why(seq, waits),
        }

    def _why(self, seq: SequenceView, waits: dict[str, Wait]) -> str:
        """In a few words, why it got less than it wanted; `Engine.why` says more."""
        wait = waits.get(seq.seq_id)
        if wait is not None:
            numbers = f" ({wait.needed} needed, {wait.available} left)" if wait.needed else ""
            return f"{'slowed' if wait.got else 'waits'}: {wait.cause}{numbers}"
        if seq.status is Status.RUNNING:
            return ""
        head = next((w for w in waits.values() if not w.got), None)
        if head is not None and any(head.seq_id == s.seq_id for s in self.snapshot.waiting):
            return f"waits behind {head.seq_id}"
        return "waits for the next step"

    def buffers(self) -> dict[str, bytes]:
        """The blocks, as arrays of uint32: every running sequence's block table one after the
        other, and the cached blocks, next to be evicted first."""
        tables = array("I")
        for seq in self.snapshot.running:
            tables.extend(seq.block_table)
        return {
            "tables": tables.tobytes(),
            "cached": array("I", self.snapshot.cached_blocks).tobytes(),
        }


def _fill(seq: SequenceView, snapshot: Snapshot) -> int:
    """Slots of its last block that hold keys and values."""
    used = seq.num_computed_tokens - (len(seq.block_table) - 1) * snapshot.block_size
    return max(0, min(snapshot.block_size, used))


def _finished(output: RequestOutput) -> dict[str, Any]:
    samples = output.outputs
    return {
        "id": output.request_id,
        "colour": colour_index(output.request_id),
        "reason": ", ".join(sorted({s.finish_reason or "" for s in samples} - {""})) or "abort",
        "num_prompt": len(output.prompt_token_ids),
        "num_output": sum(len(s.token_ids) for s in samples),
        "num_cached": output.num_cached_tokens,
        "text": tail(samples[0].text, TEXT_TAIL) if samples else "",
    }


def _step(record: StepRecord) -> dict[str, Any]:
    return {
        "step": record.step,
        "budget": record.token_budget,
        "num_tokens": record.num_tokens,
        "parts": [[colour_index(n) if n else -1, k, n] for n, k in budget_parts(record, 16)],
        "events": events_of(record),
        "ms": round(1e3 * record.phases.total, 1),
        "failed": record.error is not None,
    }


def gather(engine: Engine, before: Frame | None = None) -> Frame:
    """The engine's state now. `before` is the frame before this one, for what ended since.

    Raises:
        EngineClosed
    """
    future = engine.submit(lambda: _gather(engine, before))
    while True:
        try:
            return future.result(timeout=0.5)
        except TimeoutError:  # a long step, or an engine that was closed before it came to this
            if engine.is_closed and future.cancel():
                raise EngineClosed("the engine was closed") from None


def _gather(engine: Engine, before: Frame | None) -> Frame:
    snapshot = engine.snapshot()
    history = engine.history
    records = tuple(
        history[-k] for k in range(1, min(MAX_LOG, len(history)) + 1)
    )  # by number: the history may be long
    ended = _ended(records, before)
    alive = {s.request_id for s in (*snapshot.running, *snapshot.waiting)}
    if before is not None:
        ended += [name for name in sorted(before.request_ids - alive) if name not in ended]
    known = {output.request_id: output for output in before.finished} if before else {}
    finished = [
        output
        for name in ended
        if name not in alive and (output := _output_of(engine, name)) is not None
    ]
    finished += [o for name, o in known.items() if name not in ended and name not in alive]
    return Frame(
        snapshot,
        engine.is_running,
        None if engine.error is None else Notice.of(engine.error, "The background run stopped. "),
        records,
        _tokens_per_second(engine),
        tuple(finished[:MAX_FINISHED]),
    )


def _ended(records: Iterable[StepRecord], before: Frame | None) -> list[str]:
    """Requests of which a sequence ended since `before`, newest first."""
    since = before.snapshot.step if before is not None else 0
    names: dict[str, None] = {}
    for record in records:
        if record.step <= since or len(names) >= MAX_FINISHED:
            break
        for finish in reversed(record.finished):
            names.setdefault(finish.seq_id.partition("#")[0])
    return list(names)


def _output_of(engine: Engine, name: str) -> RequestOutput | None:
    try:
        return engine.output(name)
    except UnknownRequest:
        return None


def _tokens_per_second(engine: Engine) -> float:
    now, history = engine.clock(), engine.history
    if not len(history):
        return 0.0
    window = max(SPEED_WINDOW, 4 * history[-1].phases.total)  # a few steps, if steps are slow
    num_tokens, since = 0, now
    for k in range(1, min(1000, len(history)) + 1):
        record = history[-k]
        if now - record.time > window:
            break
        num_tokens += len(record.sampled)
        since = record.time
    return num_tokens / (now - since) if now > since else 0.0
