"""The scheduler's whole state at one moment, as plain immutable data for views."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from nbengine.core.prefix_cache import BlockContent
from nbengine.core.request import Sequence, Status
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
    num_computed_tokens: int
    max_total_tokens: int
    num_cached_tokens: int
    num_preemptions: int
    block_table: tuple[int, ...]
    host_blocks: tuple[int, ...]
    """Where its keys and values are while it is swapped out."""
    token_ids: tuple[int, ...]
    """Prompt, then output."""
    text: str
    """Output text so far."""

    @property
    def num_tokens(self) -> int:
        """Prompt and output tokens known."""
        return len(self.token_ids)

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
    free_blocks: tuple[int, ...]
    """Blocks that hold nothing of use; the last is handed out next."""
    cached_blocks: tuple[int, ...]
    """Blocks nobody holds that keep a prefix, next to be evicted first."""
    contents: Mapping[int, BlockContent]
    """What the prefix cache remembers of each block, held ones too: hash and tokens."""

    @property
    def num_blocks(self) -> int:
        return len(self.ref_counts)

    @property
    def num_held_blocks(self) -> int:
        return sum(1 for count in self.ref_counts if count)

    @property
    def num_free_blocks(self) -> int:
        return len(self.free_blocks)

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


def view_of(seq: Sequence, text: str) -> SequenceView:
    """An unfinished sequence with its output text."""
    request = seq.request
    return SequenceView(
        seq.seq_id,
        request.request_id,
        seq.status,
        request.priority,
        request.arrival_time,
        request.num_prompt_tokens,
        seq.num_computed_tokens,
        request.max_total_tokens,
        seq.num_cached_tokens,
        seq.num_preemptions,
        tuple(seq.block_table),
        tuple(seq.host_blocks),
        tuple(seq.tokens),
        text,
    )
