"""A state made to stand under other numbers: fewer or more blocks, seats, host blocks, no caching.

For forks. What has to go goes in the order in which the scheduler itself would give it up: cached
blocks the longest unused first, running sequences the last in the policy's order first. Block ids
beyond the new end move to the lowest free ones, since nothing depends on which block is which.
"""

from __future__ import annotations

from nbengine.core.records import Preemption
from nbengine.core.request import Sequence, Status
from nbengine.core.scheduler import SchedulerConfig
from nbengine.core.state import State


def refit(state: State, config: SchedulerConfig) -> list[Preemption]:
    """Change `state`, in which every request would fit `config` if it were alone, so that all of it
    does. Returns who lost its blocks, which are computed again."""
    if not config.enable_prefix_caching:
        state.contents.clear()
        state.free |= dict.fromkeys(reversed(state.cached))
        state.cached.clear()
    lost = _fit_running(state, config)
    _fit_host(state, config.num_host_blocks)
    _fit_blocks(state, config.num_blocks)
    return lost


def drop(state: State, request_id: str) -> None:
    """Take a request out of `state`, with all that it holds."""
    for seq in state.live.pop(request_id).sequences:
        _release(state, seq)
        del state.sequences[seq.seq_id]


def _release(state: State, seq: Sequence) -> None:
    counts = state.ref_counts
    for block in reversed(seq.block_table):
        counts[block] -= 1
        if not counts[block]:
            (state.cached if block in state.contents else state.free)[block] = None
    seq.block_table, seq.host_blocks, seq.num_computed_tokens = [], [], 0


def _fit_running(state: State, config: SchedulerConfig) -> list[Preemption]:
    """Preempt until blocks and seats are enough for whoever runs on."""
    lost = []
    running = state.running
    num_held = sum(1 for count in state.ref_counts if count)
    num_seats = sum(1 + seq.pending_forks for seq in running)
    while num_held > config.num_blocks or num_seats > config.max_num_seqs:
        seq = running.pop()
        lost.append(Preemption(seq.seq_id, seq.seq_id, "fork", seq.num_computed_tokens, 0))
        num_seats -= 1 + seq.pending_forks
        num_held -= sum(state.ref_counts[block] == 1 for block in seq.block_table)
        _release(state, seq)
        seq.status = Status.PREEMPTED
        seq.num_preemptions += 1
    return lost


def _fit_host(state: State, num_host_blocks: int) -> None:
    """What was swapped out, and now finds no room, is computed again."""
    swapped = [seq for seq in state.waiting if seq.host_blocks]
    while sum(len(seq.host_blocks) for seq in swapped) > num_host_blocks:
        _release(state, swapped.pop())
    taken = {block for seq in swapped for block in seq.host_blocks}
    if all(block < num_host_blocks for block in taken):
        return
    lowest_free = (block for block in range(num_host_blocks) if block not in taken)
    for seq in swapped:
        seq.host_blocks = [b if b < num_host_blocks else next(lowest_free) for b in seq.host_blocks]


def _fit_blocks(state: State, num_blocks: int) -> None:
    """Drop what is cached and finds no room, and name the blocks 0 to `num_blocks` - 1."""
    counts, free, cached, contents = state.ref_counts, state.free, state.cached, state.contents
    before = len(counts)
    if num_blocks >= before:
        counts += [0] * (num_blocks - before)
        # The last of the free list is handed out next: the new blocks when there are no others.
        state.free = dict.fromkeys([*range(num_blocks - 1, before - 1, -1), *free])
        return
    num_held = before - len(free) - len(cached)
    while num_held + len(cached) > num_blocks:
        block = next(iter(cached))
        del cached[block], contents[block]
        free[block] = None
    room = iter(sorted(block for block in free if block < num_blocks))
    new = {b: b if b < num_blocks else next(room) for b in range(before) if b not in free}
    state.ref_counts = [0] * num_blocks
    for old, block in new.items():
        state.ref_counts[block] = counts[old]
    taken = set(new.values())
    state.free = {block: None for block in free if block < num_blocks and block not in taken}
    state.cached = {new[block]: None for block in cached}
    state.contents = {new[block]: content for block, content in contents.items()}
    for seq in state.sequences.values():
        seq.block_table = [new[block] for block in seq.block_table]
