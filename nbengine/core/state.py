"""The scheduler's state as data of its own, and how a record moves it one step on.

`State.of(scheduler)` copies queues, sequences, block tables, reference counts, free list and prefix
cache; `State.apply(record)` takes the next step's record and nothing else, so that whatever it
agrees with the scheduler on is known to be in the records. `Keyframe` is the same, packed, from
which the history rebuilds any step. A state never shares what may change with a scheduler, nor with
another state.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from nbengine.core.prefix_cache import BlockContent
from nbengine.core.records import PREFIX_CACHE, BlockMove, Finish, StepRecord
from nbengine.core.request import LiveRequest, Sequence, Status
from nbengine.core.snapshot import Snapshot, view_of

if TYPE_CHECKING:
    from nbengine.core.scheduler import Scheduler


class State:
    """What the scheduler holds after step `step`."""

    __slots__ = (
        "block_size", "cached", "contents", "free", "live", "policy", "ref_counts", "sequences",
        "step",
    )  # fmt: skip

    step: int
    policy: str
    """The name of the policy's class."""
    block_size: int
    live: dict[str, LiveRequest]
    """Unfinished requests by id."""
    sequences: dict[str, Sequence]
    """Their sequences by id, those included that have ended before the others."""
    ref_counts: list[int]
    free: dict[int, None]
    """The free list: the last is handed out next."""
    cached: dict[int, None]
    """Blocks nobody holds that keep a prefix, next to be evicted first."""
    contents: dict[int, BlockContent]
    """What the prefix cache remembers, held blocks too."""

    @classmethod
    def of(cls, scheduler: Scheduler) -> State:
        """The scheduler's, between two steps."""
        return Keyframe(scheduler).state()

    @property
    def running(self) -> list[Sequence]:
        """In the policy's order."""
        return self._in_order(lambda status: status is Status.RUNNING)

    @property
    def waiting(self) -> list[Sequence]:
        """In the order in which they will be admitted, the preempted ones too."""
        return self._in_order(lambda status: status in (Status.WAITING, Status.PREEMPTED))

    def _in_order(self, belongs: Callable[[Status], bool]) -> list[Sequence]:
        found = [seq for seq in self.sequences.values() if belongs(seq.status)]
        return sorted(found, key=lambda seq: seq.order)

    def snapshot(self, text_of: Callable[[Sequence], str] = lambda _: "") -> Snapshot:
        """As immutable data for views; `text_of` gives a sequence's output text."""
        return Snapshot(
            self.step,
            self.policy,
            tuple(view_of(seq, text_of(seq)) for seq in self.running),
            tuple(view_of(seq, text_of(seq)) for seq in self.waiting),
            self.block_size,
            tuple(self.ref_counts),
            tuple(self.free),
            tuple(self.cached),
            dict(self.contents),
        )

    # ------------------------------------------------------------------ one step on

    def apply(self, record: StepRecord) -> None:
        """Move on to `record`'s step, which must be the next one."""
        assert record.step == self.step + 1, f"step {record.step} after {self.step}"
        self.step, self.policy = record.step, record.policy
        finished, released = list(record.finished), list(record.released)
        self._apply_arrivals(record, finished, released)
        for seq_id, rank in record.ranked.items():
            if (seq := self.sequences.get(seq_id)) is not None:
                seq.order = (rank, seq.request.arrival, seq.index)
        self._apply_scheduling(record)
        self._apply_results(record)
        self._apply_tables(record, released)
        self._apply_endings(record, finished)
        self._apply_pool(record)

    def batch_of(self, record: StepRecord) -> list[tuple[Sequence, int]]:
        """What `record`'s step, which must be the next one, computed: each sequence as it was then,
        with the blocks that it had, and how many of its tokens. It leaves the state amid that step."""
        assert record.step == self.step + 1, f"step {record.step} after {self.step}"
        finished, released = list(record.finished), list(record.released)
        self._apply_arrivals(record, finished, released)
        self._apply_scheduling(record)
        batch = {seq_id: self.sequences[seq_id] for seq_id in record.scheduled}
        self._grow_tables(record, batch)
        for seq_id, n in record.scheduled.items():
            seq = batch[seq_id]
            seq.num_computed_tokens -= n
            given_back = [len(blocks) for name, blocks in released if name == seq_id]
            if sum(given_back) == len(seq.block_table):
                given_back.pop()  # when it had been computed: it ended
            del seq.block_table[: sum(given_back)]
        return [(batch[seq_id], n) for seq_id, n in record.scheduled.items()]

    def _enter(self, live: LiveRequest) -> None:
        self.live[live.request.request_id] = live
        self.sequences |= {seq.seq_id: seq for seq in live.sequences}

    def _apply_arrivals(
        self, record: StepRecord, finished: list[Finish], released: list[BlockMove]
    ) -> None:
        """What became of earlier owners of their names is taken out of the other two."""
        for request in record.added:
            self._drop_namesakes(request.request_id, finished, released)
            self._enter(LiveRequest.of(request))

    def _drop_namesakes(
        self, request_id: str, finished: list[Finish], released: list[BlockMove]
    ) -> None:
        """A name that is taken anew: whoever had it ended before, perhaps since the last step."""
        live = self.live.pop(request_id, None)
        for seq in live.sequences if live else ():
            del self.sequences[seq.seq_id]
            if not seq.is_finished:
                finished.remove(next(f for f in finished if f.seq_id == seq.seq_id))
            if seq.block_table:
                released.remove(BlockMove(seq.seq_id, tuple(seq.block_table)))

    def _apply_scheduling(self, record: StepRecord) -> None:
        sequences = self.sequences
        for preemption in record.preempted:
            if preemption.mode == "rewind":
                continue  # the keyframe of the rewind has it
            seq = sequences[preemption.seq_id]
            seq.status = Status.PREEMPTED
            seq.num_preemptions += preemption.num_blocks > 0
            if preemption.mode != "swap":
                seq.num_computed_tokens = 0
        for swap in record.swapped_out:
            sequences[swap.seq_id].host_blocks = list(swap.host_blocks)
        for admission in record.admitted:
            seq = sequences[admission.seq_id]
            seq.status = Status.RUNNING
            num_hit_tokens = admission.prefix.num_hit_tokens
            if not seq.host_blocks:
                seq.num_computed_tokens = num_hit_tokens
            if not admission.resumed:
                seq.num_cached_tokens = num_hit_tokens
        for swap in record.swapped_in:
            sequences[swap.seq_id].host_blocks = []
        for seq_id, n in record.scheduled.items():
            sequences[seq_id].num_computed_tokens += n

    def _apply_results(self, record: StepRecord) -> None:
        sequences = self.sequences
        for seq_id, candidates in record.candidates.items():
            sequences[seq_id].candidates = list(candidates)
        shared = {move.seq_id for move in record.shared}
        for parent, name in record.forked:
            origin = sequences[parent]
            live = self.live[origin.request.request_id]
            child = sequences[name] = origin.fork(int(name.partition("#")[2]))
            child.candidates = origin.candidates  # until it has its token, below
            live.sequences.append(child)
            if child.candidates is not None:
                live.num_indices = child.index + 1
            if name in shared:
                child.status = Status.RUNNING
                child.num_computed_tokens = origin.num_computed_tokens
            else:  # there was no seat, and it waits to be computed anew
                child.status = Status.PREEMPTED
        for seq_id, token in record.sampled.items():
            seq = sequences[seq_id]
            seq.tokens.append(token)
            seq.pending_forks = 0
            if seq.candidates is not None:
                seq.cumulative_logprob += dict(seq.candidates)[token]
                seq.candidates = None
        for request_id, hypothesis in record.hypotheses:
            self.live[request_id].hypotheses.append(hypothesis)

    def _apply_tables(self, record: StepRecord, released: list[BlockMove]) -> None:
        # A sequence takes blocks at the end of its table and gives back all of it at once. So,
        # whatever the order, what was released is the front of what it had and took.
        sequences = self.sequences
        self._grow_tables(record, sequences)
        for move in released:
            if move.seq_id == PREFIX_CACHE:
                continue
            seq = sequences[move.seq_id]
            num_blocks = len(move.blocks)
            assert tuple(seq.block_table[:num_blocks]) == move.blocks, (record.step, move, seq)
            del seq.block_table[:num_blocks]

    def _grow_tables(self, record: StepRecord, sequences: Mapping[str, Sequence]) -> None:
        """Theirs alone."""
        for seq_id, source, destination in record.copied:
            if seq_id in sequences:
                table = sequences[seq_id].block_table
                table[table.index(source)] = destination
        for seq_id, blocks in (*record.shared, *record.allocated):
            if seq_id in sequences:
                sequences[seq_id].block_table += blocks

    def _apply_endings(self, record: StepRecord, finished: list[Finish]) -> None:
        sequences = self.sequences
        for preemption in record.preempted:
            if preemption.mode == "error":  # at the end of the step, whatever came before
                seq = sequences[preemption.seq_id]
                seq.status, seq.num_computed_tokens = Status.PREEMPTED, 0
                seq.host_blocks = []
                if preemption.num_blocks:  # it was to compute, and is not a beam swapped out idle
                    seq.candidates = None
        for finish in finished:
            seq = sequences[finish.seq_id]
            seq.end(finish.reason, finish.stop_reason)
            live = self.live[seq.request.request_id]
            if finish.reason == "pruned":
                live.sequences.remove(seq)
                del sequences[seq.seq_id]
            if live.is_finished:
                del self.live[seq.request.request_id]
                for other in live.sequences:
                    del sequences[other.seq_id]

    def _apply_pool(self, record: StepRecord) -> None:
        """Reference counts are sums. The free list and the cached blocks lie in the order in which
        each block was last given back; so it is enough to take out what was taken, and to put what
        nobody holds in the end where its last release puts it."""
        counts, free, cached, contents = self.ref_counts, self.free, self.cached, self.contents
        for block in record.evicted:
            del contents[block]
        for _, block, content in record.cached:
            contents[block] = content
        taken = [block for move in record.allocated for block in move.blocks]
        taken += [block for move in record.shared for block in move.blocks]
        for _, source, destination in record.copied:
            counts[source] -= 1
            taken.append(destination)
        for block in taken:
            counts[block] += 1
            free.pop(block, None)
            cached.pop(block, None)
        for move in record.released:
            if move.seq_id != PREFIX_CACHE:
                for block in move.blocks:
                    counts[block] -= 1
        for move in record.released:
            for block in reversed(move.blocks):
                free.pop(block, None)
                cached.pop(block, None)
                if not counts[block]:
                    (cached if block in contents else free)[block] = None


class Keyframe:
    """A scheduler's state, packed. It keeps the sequences' own lists of tokens, which only ever
    grow, and how long they were."""

    __slots__ = (
        "_block_size", "_cached", "_contents", "_free", "_live", "_num_tokens", "_policy", "nbytes",
        "step",
    )  # fmt: skip

    def __init__(self, scheduler: Scheduler) -> None:
        pool = scheduler.pool
        self.step = scheduler.step_count
        self._policy = type(scheduler.policy).__name__
        self._block_size = pool.block_size
        self._live = [
            live.with_sequences([seq.clone(seq.tokens) for seq in live.sequences])
            for live in scheduler.live.values()
        ]
        self._num_tokens = [len(seq.tokens) for live in self._live for seq in live.sequences]
        self._free = array("I", pool.free_blocks())
        self._cached = array("I", pool.cached_blocks())
        content_of = pool.prefix_cache.content_of
        self._contents = array("I", content_of), list(content_of.values())
        blocks = 4 * (len(self._free) + len(self._cached)) + 12 * len(self._contents[0])
        sequences = [seq for live in self._live for seq in live.sequences]
        self.nbytes = blocks + sum(600 + 8 * len(seq.block_table) for seq in sequences)
        """Roughly what it takes in memory, tokens and prefixes apart, which records keep too."""

    def state(self) -> State:
        """Unpacked."""
        state = State()
        state.step, state.policy, state.block_size = self.step, self._policy, self._block_size
        state.live, state.sequences = {}, {}
        lengths = iter(self._num_tokens)
        for live in self._live:
            sequences = [seq.clone(seq.tokens[: next(lengths)]) for seq in live.sequences]
            state._enter(live.with_sequences(sequences))
        num_blocks = len(self._free) + len(self._cached)
        held = [block for seq in state.sequences.values() for block in seq.block_table]
        num_blocks += len(set(held))
        state.ref_counts = [0] * num_blocks
        for block in held:
            state.ref_counts[block] += 1
        state.free = dict.fromkeys(self._free)
        state.cached = dict.fromkeys(self._cached)
        state.contents = dict(zip(*self._contents, strict=True))
        return state
