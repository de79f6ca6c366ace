"""The scheduler's whole state at one moment, as plain immutable data for views."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from nbengine.core.request import Sequence, Status
from nbengine.core.scheduler import Scheduler
from nbengine.errors import UnknownRequest


@dataclass(frozen=True, slots=True)
class SequenceView:
    """One unfinished sequence."""

    seq_id: str
    request_id: str
    status: Status
    priority: int
    arrival_time: float
    num_prompt_tokens: int
    num_tokens: int
    """Prompt and output tokens known."""
    num_computed_tokens: int
    max_total_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    block_table: tuple[int, ...]
    num_host_blocks: int
    text: str
    """Output text so far."""

    @property
    def num_output_tokens(self) -> int:
        return self.num_tokens - self.num_prompt_tokens


@dataclass(frozen=True, slots=True, repr=False)
class Snapshot:
    """Queues and blocks after step `step`. It shows itself as a table and a block map."""

    step: int
    policy: str
    running: tuple[SequenceView, ...]
    """In the policy's order."""
    waiting: tuple[SequenceView, ...]
    """In the order in which they will be admitted."""
    block_size: int
    ref_counts: tuple[int, ...]
    """Holders of each block."""
    cached_blocks: tuple[int, ...]
    """Blocks nobody holds that keep a prefix, next to be evicted first."""
    num_hashed_blocks: int
    """Blocks in the prefix cache, held or not."""

    @property
    def num_blocks(self) -> int:
        return len(self.ref_counts)

    @property
    def num_held_blocks(self) -> int:
        return sum(1 for count in self.ref_counts if count)

    @property
    def num_free_blocks(self) -> int:
        return self.num_blocks - self.num_held_blocks - len(self.cached_blocks)

    def sequence(self, seq_id: str) -> SequenceView:
        """One unfinished sequence.

        Raises:
            UnknownRequest: none has this id (any more).
        """
        for seq in (*self.running, *self.waiting):
            if seq.seq_id == seq_id:
                return seq
        raise UnknownRequest(f"no unfinished sequence {seq_id!r} after step {self.step}")

    def holders(self) -> dict[int, list[str]]:
        """Held block to the sequences whose tables name it."""
        result: dict[int, list[str]] = {}
        for seq in self.running:
            for block in seq.block_table:
                result.setdefault(block, []).append(seq.seq_id)
        return result

    def __repr__(self) -> str:
        from nbengine.jupyter.views import snapshot_text

        return snapshot_text(self)

    def _repr_html_(self) -> str:
        from nbengine.jupyter.views import snapshot_html

        return snapshot_html(self)


def take_snapshot(scheduler: Scheduler, text_of: Callable[[Sequence], str]) -> Snapshot:
    """A snapshot of `scheduler`; `text_of` gives a sequence's output text."""

    def view(seq: Sequence) -> SequenceView:
        request = seq.request
        return SequenceView(
            seq.seq_id,
            request.request_id,
            seq.status,
            request.priority,
            request.arrival_time,
            request.num_prompt_tokens,
            len(seq.tokens),
            seq.num_computed_tokens,
            request.max_total_tokens,
            seq.num_cached_tokens,
            seq.num_preemptions,
            tuple(seq.block_table),
            len(seq.host_blocks),
            text_of(seq),
        )

    pool = scheduler.pool
    return Snapshot(
        scheduler.step_count,
        type(scheduler.policy).__name__,
        tuple(map(view, scheduler.running)),
        tuple(map(view, scheduler.waiting)),
        pool.block_size,
        tuple(pool.ref_counts),
        pool.cached_blocks(),
        len(pool.prefix_cache),
    )
