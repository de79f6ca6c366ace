"""The past, rebuilt: queues, block tables and prefix cache as a run's records tell them.

A `Replay` starts empty and is fed every `StepRecord` from the first on. It looks at nothing else
(but the prompts' lengths, which records leave out), so that whatever it agrees with the scheduler
on is known to be in the records. The simulation compares the two after every step.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from nbengine.core.records import BlockMove, StepRecord
from nbengine.core.request import Request, Status


@dataclass(slots=True)
class SequenceState:
    """One sequence between two steps."""

    num_tokens: int
    """Prompt and output tokens."""
    output_token_ids: list[int] = field(default_factory=list)
    status: Status = Status.WAITING
    num_computed_tokens: int = 0
    block_table: list[int] = field(default_factory=list)
    host_blocks: list[int] = field(default_factory=list)


class Replay:
    """Unfinished sequences by id, and the prefix cache, after the last record applied."""

    def __init__(self) -> None:
        self.sequences: dict[str, SequenceState] = {}
        self.cached: dict[int, bytes] = {}
        """Block to the digest of what it is remembered to hold."""

    def apply(self, record: StepRecord, requests: Mapping[str, Request]) -> None:
        """One step on. `requests` holds at least those that the record calls `added`."""
        sequences = self.sequences
        finished = [finish.seq_id for finish in record.finished]
        released = list(record.released)
        for request_id in record.added:
            for seq_id in [s for s in sequences if s.partition("#")[0] == request_id]:
                # A name that is taken anew: whoever had it ended before, also since the last step.
                finished.remove(seq_id)
                table = tuple(sequences.pop(seq_id).block_table)
                if table:
                    released.remove(BlockMove(seq_id, table))
            sequences[request_id] = SequenceState(requests[request_id].num_prompt_tokens)

        for preemption in record.preempted:
            seq = sequences[preemption.seq_id]
            seq.status = Status.PREEMPTED
            if preemption.mode != "swap":
                seq.num_computed_tokens = 0
        for swap in record.swapped_out:
            sequences[swap.seq_id].host_blocks = list(swap.host_blocks)
        for admission in record.admitted:
            seq = sequences[admission.seq_id]
            seq.status = Status.RUNNING
            if not seq.host_blocks:
                seq.num_computed_tokens = admission.prefix.num_hit_tokens
        for swap in record.swapped_in:
            sequences[swap.seq_id].host_blocks = []
        for seq_id, n in record.scheduled.items():
            sequences[seq_id].num_computed_tokens += n

        shared = {move.seq_id for move in record.shared}
        for parent, child in record.forked:
            origin = sequences[parent]
            sequences[child] = SequenceState(origin.num_tokens, list(origin.output_token_ids))
            if child in shared:  # else there was no seat, and it waits to be computed anew
                sequences[child].status = Status.RUNNING
                sequences[child].num_computed_tokens = origin.num_computed_tokens
            else:
                sequences[child].status = Status.PREEMPTED
        for seq_id, token in record.sampled.items():
            sequences[seq_id].num_tokens += 1
            sequences[seq_id].output_token_ids.append(token)

        for seq_id, source, destination in record.copied:
            blocks = sequences[seq_id].block_table
            blocks[blocks.index(source)] = destination
        # A sequence takes blocks at the end of its table and gives back all of it at once. So,
        # whatever the order, what was released is the front of what it had and took.
        for move in (*record.shared, *record.allocated):
            sequences[move.seq_id].block_table += move.blocks
        for move in released:
            seq = sequences[move.seq_id]
            num_blocks = len(move.blocks)
            assert tuple(seq.block_table[:num_blocks]) == move.blocks, (record.step, move, seq)
            del seq.block_table[:num_blocks]

        for preemption in record.preempted:
            if preemption.mode == "error":  # at the end of the step, whatever came before
                seq = sequences[preemption.seq_id]
                seq.status, seq.num_computed_tokens = Status.PREEMPTED, 0
                seq.host_blocks = []
        for seq_id in finished:
            del sequences[seq_id]

        for block in record.evicted:
            del self.cached[block]
        for _, block, digest in record.cached:
            self.cached[block] = digest
