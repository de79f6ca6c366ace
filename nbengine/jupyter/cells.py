"""Every KV block as one number, kept up to date from step records: what a live block map draws.

`BlockCells` is made once from the scheduler's tables, between two steps, and then moved on by the
records alone, in time proportional to what happened and not to how many blocks there are. It tells
which cells have changed since it was last asked, so that only those travel to a page.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from itertools import islice

from nbengine.core.records import PREFIX_CACHE, StepRecord
from nbengine.core.request import Sequence
from nbengine.jupyter.block_map import BlockKind, colour_index

_MOST_REFS = 255


class Slots(dict[str, int]):
    """Sequences as small numbers, in the order in which a page first hears of them: a name that is
    new gets the next one when it is looked up."""

    def __missing__(self, seq_id: str) -> int:
        slot = self[seq_id] = len(self)
        return slot

    def names(self, start: int = 0) -> list[tuple[int, str, int]]:
        """(slot, sequence id, colour) from slot `start` on."""
        names = islice(self, start, None)
        return [(slot, name, colour_index(name)) for slot, name in enumerate(names, start)]


class BlockCells:
    """A cell is `kind | references << 2 | slot << 10`: a `BlockKind`, at most 255 references, and
    the slot of the sequence that has held the block longest."""

    def __init__(
        self,
        num_blocks: int,
        running: Iterable[Sequence],
        cached: Iterable[int],
        prefixes: Iterable[int],
        step: int,
        slots: Slots,
    ) -> None:
        """As after `step`. `cached` are the blocks that nobody holds, `prefixes` all that the prefix
        cache remembers."""
        self.step = step
        self._slots = slots
        self._holders: dict[int, list[int]] = {}
        for seq in running:
            slot = slots[seq.seq_id]
            for block in seq.block_table:
                self._holders.setdefault(block, []).append(slot)
        self._prefixes = set(prefixes)
        self.cells = array("I", bytes(4 * num_blocks))
        """uint32 `[num_blocks]`."""
        self.since = array("I", [step]) * num_blocks
        """uint32 `[num_blocks]`: the step in which each cell became what it is, as far as is known."""
        for block in (*self._holders, *cached):
            self.cells[block] = self._cell(block)
        self._changed: set[int] = set()

    def apply(self, record: StepRecord) -> None:
        """Move on to the record's step."""
        slots, holders = self._slots, self._holders
        touched: list[int] = []
        for seq_id, source, destination in record.copied:
            slot = slots[seq_id]
            self._give_back(source, slot)
            holders.setdefault(destination, []).append(slot)
            touched += (source, destination)
        for move in (*record.allocated, *record.shared):
            slot = slots[move.seq_id]
            for block in move.blocks:
                holders.setdefault(block, []).append(slot)
            touched += move.blocks
        for move in record.released:
            touched += move.blocks
            if move.seq_id != PREFIX_CACHE:
                slot = slots[move.seq_id]
                for block in move.blocks:
                    self._give_back(block, slot)
        self._prefixes.difference_update(record.evicted)
        self._prefixes.update(entry.block for entry in record.cached)
        touched += record.evicted
        self.step = record.step
        for block in touched:
            cell = self._cell(block)
            if cell != self.cells[block]:
                self.cells[block] = cell
                self.since[block] = record.step
                self._changed.add(block)

    def _give_back(self, block: int, slot: int) -> None:
        holders = self._holders[block]
        holders.remove(slot)
        if not holders:
            del self._holders[block]

    def _cell(self, block: int) -> int:
        holders = self._holders.get(block)
        if holders:
            kind = BlockKind.SHARED if len(holders) > 1 else BlockKind.HELD
            return kind | min(len(holders), _MOST_REFS) << 2 | holders[0] << 10
        return BlockKind.CACHED if block in self._prefixes else BlockKind.FREE

    def changes(self) -> array[int]:
        """uint32 pairs (block, cell) of what changed since the last call."""
        pairs = array("I")
        for block in sorted(self._changed):
            pairs.append(block)
            pairs.append(self.cells[block])
        self._changed.clear()
        return pairs


# ------------------------------------------------------------------ steps

PREFILL, DECODE, WAIT, PREEMPTED, FINISHED, HIT, SWAPPED, REWOUND, ADDED = range(1, 10)
"""What happened to a sequence in a step; see `encode_steps`."""
_PREEMPTIONS = {"swap": SWAPPED, "rewind": REWOUND}
ROW_NUMBERS = 18
_MOST = (1 << 24) - 1
_PREFILLS, _DECODES_ONE = PREFILL << 24, DECODE << 24 | 1


def encode_steps(records: Iterable[StepRecord], slots: Slots) -> tuple[array[float], array[int]]:
    """Steps as a timeline draws them.

    Returns:
        float64 `[num_steps, 18]`: step, time, seconds of the four phases, tokens, budget, output
        tokens, prefix-hit tokens, tokens looked up, blocks held, cached and free, sequences running
        and waiting, whether the step was taken back, number of entries (-1: the same as those of the
        step before); and all entries, uint32 pairs (slot, code << 24 | n): tokens computed, wanted,
        lost or hit, by the code.
    """
    rows, entries = array("d"), array("I")
    before = None
    for record in records:
        if before is not None and _happens_again(before, record):
            rows.extend((*_numbers(record), -1))
            continue
        before = record
        start = len(entries)
        sampled = record.sampled
        for request in record.added:
            entries.extend((slots[request.request_id], ADDED << 24))
        for admission in record.admitted:
            if hit := admission.prefix.num_hit_tokens:
                entries.extend((slots[admission.seq_id], HIT << 24 | min(hit, _MOST)))
        entries.extend(
            [
                word
                for seq_id, n in record.scheduled.items()
                for word in (
                    slots[seq_id],
                    _DECODES_ONE if n == 1 and seq_id in sampled else _PREFILLS | n,
                )
            ]
        )
        for wait in record.waits:
            if not wait.got:
                entries.extend((slots[wait.seq_id], WAIT << 24 | min(wait.wanted, _MOST)))
        for preemption in record.preempted:
            code = _PREEMPTIONS.get(preemption.mode, PREEMPTED)
            lost = min(preemption.num_lost_tokens, _MOST)
            entries.extend((slots[preemption.seq_id], code << 24 | lost))
        for finish in record.finished:
            entries.extend((slots[finish.seq_id], FINISHED << 24))
        rows.extend((*_numbers(record), (len(entries) - start) // 2))
    return rows, entries


def _happens_again(before: StepRecord, record: StepRecord) -> bool:
    """Most steps decode the same sequences as the one before, and nothing else happens."""
    return (
        record.scheduled == before.scheduled
        and record.sampled.keys() == before.sampled.keys()
        and record.waits == before.waits
        and not (record.added or record.admitted or record.preempted or record.finished)
        and not (before.added or before.admitted or before.preempted or before.finished)
    )


def _numbers(record: StepRecord) -> tuple[float, ...]:
    return (
        record.step, record.time, *record.phases, record.num_tokens, record.token_budget,
        len(record.sampled), record.num_hit_tokens,
        sum(a.prefix.num_tokens for a in record.admitted),
        record.num_held_blocks, record.num_cached_blocks, record.num_free_blocks,
        record.num_running, record.num_waiting, record.error is not None,
    )  # fmt: skip
