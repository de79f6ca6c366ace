"""The scheduler: which sequences compute how many tokens in a step, and with which blocks.

A step is `plan = schedule()`, then an executor's work, then `commit(output)` and `seal()`; a step
that failed anywhere is `take_back(error)` instead. Between steps: `add` and `abort`.

There is one rule in place of a prefill and a decode phase: every sequence has tokens that are
known and not yet computed. Running sequences get theirs first, then waiting ones are admitted, all
in the policy's order and out of one token budget. Memory is taken block by block when it is
needed; when it runs out, the last running sequence in the policy's order is preempted.

Invariants: waiting sequences hold no device blocks; both queues are sorted by `Sequence.order`;
nobody is admitted past a waiting sequence that the policy puts before it; and every admitted
sequence, alone in the pool, would fit.
"""

from __future__ import annotations

import time
from bisect import insort
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

from nbengine.core import beam
from nbengine.core.block_pool import BlockPool, HostPool, Refused
from nbengine.core.plan import StepOutput, StepPlan
from nbengine.core.policies import Policy, make_policy
from nbengine.core.prefix_cache import MissCause, PrefixLookup
from nbengine.core.records import (
    PREFIX_CACHE,
    Admission,
    BlockCopy,
    BlockMove,
    BlockSwap,
    CachedPrefix,
    Cause,
    Finish,
    Fork,
    Phases,
    Preemption,
    StepJournal,
    StepRecord,
    Wait,
)
from nbengine.core.request import LiveRequest, Request, Sequence, Status
from nbengine.core.sampling_params import BeamSearchParams
from nbengine.core.state import State
from nbengine.errors import InvalidRequest, RequestTooLarge, UnknownRequest

_BY_ORDER = attrgetter("order")


@dataclass(frozen=True, slots=True)
class Fit:
    """Whether a request could run to its end if it were alone, and the numbers."""

    num_blocks_needed: int
    num_blocks: int
    num_sequences: int
    max_num_seqs: int
    num_tokens_in_one_step: int | None
    """Without chunked prefill: what the token budget must hold."""
    max_num_batched_tokens: int

    @property
    def fits(self) -> bool:
        return (
            self.num_blocks_needed <= self.num_blocks
            and self.num_sequences <= self.max_num_seqs
            and (self.num_tokens_in_one_step or 0) <= self.max_num_batched_tokens
        )

    def __bool__(self) -> bool:
        return self.fits

    def __str__(self) -> str:
        told = [
            f"{self.num_blocks_needed} of {self.num_blocks} blocks at most",
            f"{self.num_sequences} of {self.max_num_seqs} seats",
        ]
        if self.num_tokens_in_one_step is not None:
            told.append(
                f"{self.num_tokens_in_one_step} of {self.max_num_batched_tokens} tokens in one step"
            )
        return f"{'fits' if self.fits else 'can never fit'}: needs {', '.join(told)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """The numbers that the scheduler works with; `EngineConfig` documents and checks them."""

    num_blocks: int
    block_size: int = 16
    max_num_batched_tokens: int = 2048
    max_num_seqs: int = 256
    enable_chunked_prefill: bool = True
    enable_prefix_caching: bool = True
    long_prefill_token_threshold: int = 0
    """Most tokens of one prompt in a step; 0 sets no bound."""
    preemption_mode: str = "recompute"
    """`recompute` or `swap`."""
    num_host_blocks: int = 0
    """Blocks of host memory for swapping; with none left, preemption is by recompute."""


class Scheduler:
    """Owns the queues and the block pools; decides, and computes nothing."""

    def __init__(
        self,
        config: SchedulerConfig,
        policy: str | Policy | type = "fcfs",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.config = config
        self.policy = make_policy(policy)
        self.clock = clock
        self.pool = BlockPool(config.num_blocks, config.block_size)
        self.host_pool = HostPool(config.num_host_blocks, config.block_size)
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.live: dict[str, LiveRequest] = {}
        """Unfinished requests by id."""
        self.step_count = 0
        self.num_seats_taken = 0
        """Running sequences, and the further samples that they will split into."""
        self._journal = StepJournal()
        self._plan = StepPlan()
        self._began = 0.0

    @property
    def has_work(self) -> bool:
        return bool(self.waiting or self.running)

    @property
    def num_untold_releases(self) -> int:
        """How often blocks were given back since the last record, as by an abort."""
        return len(self._journal.released)

    # ------------------------------------------------------------------ between steps

    def add(self, request: Request) -> LiveRequest:
        """Queue a request. Whatever is raised, nothing has changed.

        Raises:
            RequestTooLarge: it could never run to its end here, whatever else is running.
            InvalidRequest: its id is in use or contains `#`, or its prompt is empty.
            Exception: whatever a user's policy raises; TypeError for a rank that does not compare
                with the others.
        """
        if "#" in request.request_id:
            raise InvalidRequest(
                f"request id {request.request_id!r} contains '#', which sets off the index of a "
                "sample in sequence ids: choose another"
            )
        if request.request_id in self.live:
            raise InvalidRequest(
                f"request id {request.request_id!r} is in use: choose another, or none"
            )
        self.check_fits(request)
        live = LiveRequest.of(request)
        (seq,) = live.sequences
        rank = self.policy.rank(seq)
        seq.order = (rank, request.arrival, seq.index)
        if self.running:
            _ = seq.order < self.running[0].order  # raises now, if ever
        insort(self.waiting, seq, key=_BY_ORDER)  # last of all that may raise
        self.live[request.request_id] = live
        self._journal.added.append(request)
        self._journal.ranked[seq.seq_id] = rank
        return live

    def fit(self, request: Request) -> Fit:
        """Whether the request could run if it were alone; from any thread."""
        config = self.config
        # The last token is sampled and never computed, so it needs no slot.
        most = max(request.max_total_tokens - 1, request.num_prompt_tokens)
        return Fit(
            self._num_blocks(most),
            config.num_blocks,
            request.num_sequences,
            config.max_num_seqs,
            None if config.enable_chunked_prefill else most,
            config.max_num_batched_tokens,
        )

    def check_fits(self, request: Request) -> None:
        """Whether the request could run if it were alone; from any thread.

        Raises:
            RequestTooLarge, InvalidRequest: as `add`.
        """
        config = self.config
        if not request.prompt_token_ids:
            raise InvalidRequest(f"request {request.request_id}: the prompt is empty")
        fit = self.fit(request)
        needed, most = fit.num_blocks_needed, fit.num_tokens_in_one_step or 0
        if needed > config.num_blocks:
            raise RequestTooLarge(
                f"request {request.request_id} needs {needed} blocks of {config.block_size} tokens "
                f"({request.num_prompt_tokens} prompt tokens, at most {request.max_total_tokens} "
                f"in all), but there are {config.num_blocks} blocks: lower max_tokens, shorten "
                "the prompt, or give the engine more KV memory",
                needed=needed,
                available=config.num_blocks,
            )
        if request.num_sequences > config.max_num_seqs:
            raise RequestTooLarge(
                f"request {request.request_id} asks for {request.num_sequences} sequences at "
                f"once, but max_num_seqs is {config.max_num_seqs}",
                needed=request.num_sequences,
                available=config.max_num_seqs,
            )
        if most > config.max_num_batched_tokens:
            raise RequestTooLarge(
                f"request {request.request_id} may come to {most} tokens, which must fit one step "
                f"because chunked prefill is off, but max_num_batched_tokens is "
                f"{config.max_num_batched_tokens}: raise it or enable_chunked_prefill",
                needed=most,
                available=config.max_num_batched_tokens,
            )

    def abort(self, request_id: str) -> list[Sequence]:
        """End a request now; returns its sequences that were still unfinished.

        Raises:
            UnknownRequest: there is no unfinished request of this id.
        """
        live = self.live.get(request_id)
        if live is None:
            raise UnknownRequest(f"no unfinished request {request_id!r}")
        return self._end(live, "abort")

    def _end(
        self, live: LiveRequest, reason: str, stop_reason: str | None = None
    ) -> list[Sequence]:
        unfinished = [seq for seq in live.sequences if not seq.is_finished]
        for seq in unfinished:
            self.finish(seq, reason, stop_reason)
        return unfinished

    def finish(self, seq: Sequence, reason: str, stop_reason: int | str | None = None) -> None:
        """End a sequence and give back all it holds. For one that this step has already finished,
        correct the reason (a stop string found in the text of its last token)."""
        if not seq.is_finished:
            self._leave_queue(seq)
            self._release_blocks(seq)
            seq.end(reason)
            if self.live[seq.request.request_id].is_finished:
                del self.live[seq.request.request_id]
        seq.finish_reason, seq.stop_reason = reason, stop_reason
        self._journal.finished[seq] = Finish(seq.seq_id, reason, stop_reason)

    def set_policy(self, policy: str | Policy | type) -> None:
        """Replace the policy; takes effect in the next step."""
        policy = make_policy(policy)
        self._rank_all(policy)  # if it raises, the old one stays in force
        self.policy = policy

    def set_max_num_batched_tokens(self, num_tokens: int) -> None:
        """Replace the token budget; takes effect in the next step."""
        self.config = replace(self.config, max_num_batched_tokens=num_tokens)

    def reset_prefix_cache(self) -> int:
        """Forget every cached prefix; see `BlockPool.reset_prefix_cache`."""
        freed = self.pool.cached_blocks()
        count = self.pool.reset_prefix_cache()
        self._journal.evicted += freed
        self._journal.released.append(BlockMove(PREFIX_CACHE, freed))
        return count

    def rewind(self, state: State) -> None:
        """Go back to an earlier state of this scheduler, which takes it over. Every sequence is cut
        back to the tokens that it had, and whoever held blocks waits, preempted, to be computed
        again: no block is as it was then. What the prefix cache knows stays true, and stays.

        Raises:
            Exception: whatever a user's policy raises; nothing has changed then.
        """
        unfinished = [seq for seq in state.sequences.values() if not seq.is_finished]
        orders = orders_of(self.policy, unfinished)
        for seq in (*self.running, *self.waiting):
            self._release_blocks(seq)
        self._journal = StepJournal()
        for seq, order in orders.items():
            if seq.status is Status.RUNNING:
                self._journal.preempted.append(
                    Preemption(seq.seq_id, seq.seq_id, "rewind", seq.num_computed_tokens, 0)
                )
                seq.status = Status.PREEMPTED
            seq.order, seq.num_computed_tokens = order, 0
            seq.block_table, seq.host_blocks = [], []
        self.live = state.live
        self.running, self.waiting = [], list(orders)
        self.num_seats_taken = 0
        self.step_count = state.step

    def restore(self, state: State, preempted: Iterable[Preemption] = ()) -> None:
        """Stand exactly where another scheduler, with as many blocks and this policy, stood at
        `state`, which this one, that has done nothing yet, takes over: device and host memory hold
        what they held then. The next record tells of `preempted`."""
        assert not self.live and not self.step_count
        self.pool.restore(state.ref_counts, state.free, state.cached, state.contents)
        self.running, self.waiting, self.live = state.running, state.waiting, state.live
        host_counts = [0] * self.config.num_host_blocks
        for block in (block for seq in self.waiting for block in seq.host_blocks):
            host_counts[block] = 1
        free = [block for block, count in enumerate(host_counts) if not count]
        self.host_pool.restore(host_counts, reversed(free), (), {})
        self.num_seats_taken = sum(1 + seq.pending_forks for seq in self.running)
        self.step_count = state.step
        self._journal.preempted += preempted

    # ------------------------------------------------------------------ a step

    def schedule(self) -> StepPlan:
        """Decide the next step and take its blocks. Whatever is raised in here (by a policy, say),
        `take_back` puts right."""
        self._began = self.clock()
        self._plan = plan = StepPlan()
        if getattr(self.policy, "dynamic", False):
            self._rank_all(self.policy)
        budget, blocks_spoken_for = self._schedule_running(plan)
        self._admit(plan, budget, blocks_spoken_for)
        return plan

    def _schedule_running(self, plan: StepPlan) -> tuple[int, int]:
        """Give running sequences their tokens. Returns the budget left, and the blocks that
        prompts which are now partly computed will still need."""
        config, running, journal = self.config, self.running, self._journal
        size = config.block_size
        ref_counts = self.pool.ref_counts
        scheduled, amounts = plan.scheduled, journal.scheduled
        budget = config.max_num_batched_tokens
        spoken_for = 0
        i = 0
        while i < len(running):
            seq = running[i]
            i += 1
            computed = seq.num_computed_tokens
            wanted = n = len(seq.tokens) - computed
            if wanted != 1:
                if seq.candidates is not None:
                    journal.waits.append(Wait(seq.seq_id, Cause.SIBLINGS, 0, 0))
                    continue
                n = self._chunk(seq, wanted, budget)
                if n < wanted:
                    spoken_for += self._num_blocks(len(seq.tokens)) - max(
                        self._num_blocks(computed + n), len(seq.block_table)
                    )
            elif not budget:
                n = 0
                journal.waits.append(Wait(seq.seq_id, Cause.TOKEN_BUDGET, 1, 0, 1, 0))
            if not n:
                continue
            table = seq.block_table
            first = computed // size
            needs_room = (computed + n - 1) // size >= len(table)
            if (needs_room or ref_counts[table[first]] > 1) and not self._make_room(plan, seq, n):
                break  # it was preempted, and with it all behind it
            scheduled.append((seq, n))
            amounts[seq.seq_id] = n
            budget -= n
        return budget, spoken_for

    def _chunk(self, seq: Sequence, wanted: int, budget: int) -> int:
        """How many of `wanted` tokens of a prompt go into this step; notes why not all."""
        config = self.config
        n = wanted
        threshold = config.long_prefill_token_threshold
        if 0 < threshold < n and config.enable_chunked_prefill:
            n = threshold
            cause, needed, available = Cause.LONG_PREFILL, wanted, threshold
        if n > budget:
            cause, needed, available = Cause.TOKEN_BUDGET, n, budget
            n = budget if config.enable_chunked_prefill else 0
        if n < wanted:
            self._journal.waits.append(Wait(seq.seq_id, cause, wanted, n, needed, available))
        return n

    def _make_room(self, plan: StepPlan, seq: Sequence, n: int) -> bool:
        """Blocks for `seq`'s next `n` tokens: new ones at the end of its table, and a copy of a
        partly filled one that it shares. Preempts from the end of the running queue until they
        are there; False if `seq` itself had to go."""
        pool, table = self.pool, seq.block_table
        end = self._num_blocks(seq.num_computed_tokens + n)
        first = seq.num_computed_tokens // self.config.block_size
        copy = first < len(table) and pool.ref_counts[table[first]] > 1
        num_new = end - len(table)
        while isinstance(blocks := pool.allocate(num_new + copy), Refused):
            victim = self._victim(seq)
            refused = blocks
            self._preempt(plan, victim, in_favour_of=seq)
            if victim is seq:
                self._journal.waits.append(
                    Wait(
                        seq.seq_id,
                        Cause.BLOCKS,
                        n,
                        0,
                        refused.needed,
                        refused.available,
                    )
                )
                return False
            # A preempted sharer may have made the copy unnecessary.
            copy = first < len(table) and pool.ref_counts[table[first]] > 1
        if copy:
            source, destination = table[first], blocks.pop()
            pool.release([source])
            table[first] = destination
            plan.copies.append((source, destination))
            self._journal.copied.append(BlockCopy(seq.seq_id, source, destination))
        if blocks:
            table += blocks
            self._journal.allocated.append(BlockMove(seq.seq_id, tuple(blocks)))
        return True

    def _victim(self, seq: Sequence) -> Sequence:
        """Who gives up its blocks: the last running sequence, unless that is the asking one and
        an idle beam could go instead."""
        last = self.running[-1]
        if last is not seq:
            return last
        return next((s for s in reversed(self.running) if s.is_idle), seq)

    def _preempt(
        self, plan: StepPlan, seq: Sequence, in_favour_of: Sequence, mode: str | None = None
    ) -> None:
        """Take a running sequence's blocks; it waits, with its tokens kept."""
        num_blocks = len(seq.block_table)
        computed = seq.num_computed_tokens
        mode = mode or self.config.preemption_mode
        if mode == "swap" and not self._swap_out(plan, seq):
            mode = "recompute"
        self._leave_queue(seq)
        self._release_device_blocks(seq)
        if mode != "swap":
            seq.num_computed_tokens = 0
        seq.status = Status.PREEMPTED
        seq.num_preemptions += 1
        insort(self.waiting, seq, key=_BY_ORDER)
        self._journal.preempted.append(
            Preemption(
                seq.seq_id,
                in_favour_of.seq_id,
                mode,
                0 if mode == "swap" else computed,
                num_blocks,
            )
        )

    def _swap_out(self, plan: StepPlan, seq: Sequence) -> bool:
        used = seq.block_table[: self._num_blocks(seq.num_computed_tokens)]
        host_blocks = self.host_pool.allocate(len(used))
        if not used or isinstance(host_blocks, Refused):
            return False
        seq.host_blocks = host_blocks
        plan.swap_out += zip(used, host_blocks, strict=True)
        self._journal.swapped_out.append(BlockSwap(seq.seq_id, tuple(used), tuple(host_blocks)))
        return True

    def _admit(self, plan: StepPlan, budget: int, blocks_spoken_for: int) -> None:
        """Let waiting sequences in, in the policy's order, until one does not fit."""
        journal = self._journal
        while (seq := self._head()) is not None:
            wanted = seq.num_uncomputed_tokens
            if plan.scheduled and journal.preempted and journal.preempted[-1].num_blocks:
                behind = journal.preempted[-1].in_favour_of  # for want of blocks, in this step
                if behind != seq.seq_id:  # else it is the one that found none, and said so
                    journal.waits.append(
                        Wait(seq.seq_id, Cause.PREEMPTION, wanted, 0, behind=behind)
                    )
                return
            seats = 1 + seq.pending_forks
            left = self.config.max_num_seqs - self.num_seats_taken
            if seats > left:
                if not plan.scheduled and self._preempt_idle(plan, seq):
                    continue
                journal.waits.append(Wait(seq.seq_id, Cause.SEATS, wanted, 0, seats, left))
                return
            n, refused = self._try_admit(plan, seq, budget, blocks_spoken_for)
            if refused is not None:
                if not plan.scheduled and self._preempt_idle(plan, seq):
                    continue
                journal.waits.append(
                    Wait(seq.seq_id, Cause.BLOCKS, wanted, 0, refused.needed, refused.available)
                )
                return
            if not n:
                return
            budget -= n
            blocks_spoken_for += self._num_blocks(len(seq.tokens)) - len(seq.block_table)

    def _head(self) -> Sequence | None:
        """The first waiting sequence that has something to compute."""
        for seq in self.waiting:
            if not seq.is_idle:
                return seq
        return None

    def _preempt_idle(self, plan: StepPlan, seq: Sequence) -> bool:
        """Nobody can run and the head does not fit: beams that only wait for their siblings must
        give way, or the sibling would wait for ever."""
        idle = [s for s in self.running if s.is_idle]
        for victim in idle:
            self._preempt(plan, victim, in_favour_of=seq)
        return bool(idle)

    def _try_admit(
        self, plan: StepPlan, seq: Sequence, budget: int, blocks_spoken_for: int
    ) -> tuple[int, Refused | None]:
        """Admit the head of the queue if all of it would fit beside what running prompts still
        need. Returns the tokens it got; a refusal changes nothing."""
        pool, journal = self.pool, self._journal
        total = len(seq.tokens)
        hits: list[int] = []
        no_lookup = self._why_no_lookup(seq)
        if no_lookup is None:
            pool.prefix_cache.extend_contents(seq.contents, seq.tokens, seq.request.cache_salt)
            hits = pool.prefix_cache.lookup(seq.contents, total)
        num_hit_tokens = len(hits) * self.config.block_size
        computed = seq.num_computed_tokens if seq.host_blocks else num_hit_tokens
        needed = self._num_blocks(total) - len(hits)
        available = pool.num_available - pool.num_idle(hits) - blocks_spoken_for
        if needed > available:
            return 0, Refused(needed, available)
        wanted = total - computed
        n = self._chunk(seq, wanted, budget)
        if not n:
            return 0, None
        pool.share(hits)  # first, so that none of them is evicted for the rest
        seq.block_table = hits
        if hits:
            journal.shared.append(BlockMove(seq.seq_id, tuple(hits)))
        try:
            blocks = pool.allocate(self._num_blocks(computed + n) - len(hits))
        except BaseException:
            self._release_device_blocks(seq)
            raise
        if isinstance(blocks, Refused):
            self._release_device_blocks(seq)
            return 0, blocks
        seq.block_table = hits + blocks
        seq.num_computed_tokens = computed
        if blocks:
            journal.allocated.append(BlockMove(seq.seq_id, tuple(blocks)))
        if seq.host_blocks:
            self._swap_in(plan, seq)
        resumed = seq.status is Status.PREEMPTED
        if not resumed:
            seq.num_cached_tokens = num_hit_tokens
        prefix = (
            PrefixLookup(total, 0, no_lookup)
            if no_lookup is not None
            else pool.prefix_cache.explain(
                seq.contents, seq.tokens, len(hits), seq.request.cache_salt
            )
        )
        journal.admitted.append(Admission(seq.seq_id, prefix, resumed))
        self.waiting.remove(seq)
        self._run(seq)
        plan.scheduled.append((seq, n))
        journal.scheduled[seq.seq_id] = n
        return n, None

    def _why_no_lookup(self, seq: Sequence) -> MissCause | None:
        """The reason not to look for the sequence's prefix in the cache, if there is one."""
        if not self.config.enable_prefix_caching:
            return MissCause.DISABLED
        if seq.host_blocks:
            return MissCause.SWAPPED
        if seq.needs_every_prompt_token:
            return MissCause.PROMPT_LOGPROBS
        return None

    def _swap_in(self, plan: StepPlan, seq: Sequence) -> None:
        device = seq.block_table[: len(seq.host_blocks)]
        plan.swap_in += zip(seq.host_blocks, device, strict=True)
        self._journal.swapped_in.append(
            BlockSwap(seq.seq_id, tuple(device), tuple(seq.host_blocks))
        )
        self._release_host_blocks(seq)

    # ------------------------------------------------------------------ after the work

    def commit(self, output: StepOutput) -> list[Sequence]:
        """Take the step's results: tokens appended, full blocks cached, samples forked, sequences
        that reached a stop token or a length limit finished. Returns the sequences (beams apart)
        that got a token."""
        size = self.config.block_size
        caching = self.config.enable_prefix_caching
        running = Status.RUNNING
        samples, candidates, errors = output.samples, output.candidates, output.errors
        sampled = self._journal.sampled
        beams: dict[str, LiveRequest] = {}
        advanced: list[Sequence] = []
        for seq, n in self._plan.scheduled:
            if seq.status is not running:
                continue  # it ended with a sibling beam that failed
            seq_id = seq.seq_id
            seq.num_computed_tokens = computed = seq.num_computed_tokens + n
            if errors and seq_id in errors:
                self._fail(seq, str(errors[seq_id]))
                continue
            if caching and computed % size < n:  # the step filled a block, or several
                self._cache_full_blocks(seq, (computed - n) // size, computed // size)
            known = seq.tokens
            if computed < len(known):
                continue
            if candidates and seq_id in candidates:
                seq.candidates = candidates[seq_id]
                self._journal.candidates[seq_id] = tuple(seq.candidates)
                beams[seq.request.request_id] = self.live[seq.request.request_id]
                continue
            tokens = samples.get(seq_id, [])
            if len(tokens) != 1 + seq.pending_forks:
                self._fail(seq, f"the executor returned {len(tokens)} tokens for this sequence")
                continue
            advanced.append(seq)
            if seq.pending_forks:
                advanced += self._fork_samples(seq, tokens)
                continue
            (token,) = tokens
            sampled[seq_id] = token
            known.append(token)
            request = seq.request
            if token in request.stop_token_ids or len(known) >= request.max_total_tokens:
                self._check_stop(seq, token)
        for live in beams.values():
            if not live.is_finished:  # by an error of another of its beams
                self._advance_beams(live)
        return advanced

    def _fail(self, seq: Sequence, error: str) -> None:
        """End a sequence that could not be computed; of a beam search, all beams."""
        if isinstance(seq.request.params, BeamSearchParams):
            self._end(self.live[seq.request.request_id], "error", error)
        else:
            self.finish(seq, "error", error)

    def _cache_full_blocks(self, seq: Sequence, start: int, end: int) -> None:
        """Enter the now computed blocks `start` to `end` of the table into the prefix cache."""
        pool = self.pool
        pool.prefix_cache.extend_contents(seq.contents, seq.tokens, seq.request.cache_salt)
        for content, block in zip(seq.contents[start:end], seq.block_table[start:end], strict=True):
            if pool.remember(content, block):
                self._journal.cached.append(CachedPrefix(seq.seq_id, block, content))

    def _fork_samples(self, seq: Sequence, tokens: list[int]) -> list[Sequence]:
        """The prompt of a request with n > 1 is computed: one sequence a sample from here on, each
        with its own first token and all sharing the prompt's blocks. Returns the new ones."""
        num_forks, seq.pending_forks = seq.pending_forks, 0
        self.num_seats_taken -= num_forks
        children = [self._fork(seq, index + 1) for index in range(num_forks)]
        for sample, token in zip((seq, *children), tokens, strict=True):
            self._journal.sampled[sample.seq_id] = token
            sample.tokens.append(token)
            self._check_stop(sample, token)
        return children

    def _fork(self, seq: Sequence, index: int) -> Sequence:
        """A sequence with the same tokens, sharing the blocks of a running `seq`. Where there is
        no seat for it, it waits and recomputes."""
        child = seq.fork(index)
        self.live[seq.request.request_id].sequences.append(child)
        self._journal.forked.append(Fork(seq.seq_id, child.seq_id))
        if seq.status is Status.RUNNING and self.num_seats_taken < self.config.max_num_seqs:
            child.num_computed_tokens = seq.num_computed_tokens
            child.block_table = list(seq.block_table)
            self.pool.share(child.block_table)
            self._journal.shared.append(BlockMove(child.seq_id, tuple(child.block_table)))
            self._run(child)
        else:
            child.status = Status.PREEMPTED
            insort(self.waiting, child, key=_BY_ORDER)
        return child

    def _check_stop(self, seq: Sequence, token: int) -> None:
        """Whether `token`, just appended, ends the sequence."""
        request = seq.request
        assert not isinstance(request.params, BeamSearchParams)
        num_output = len(seq.tokens) - request.num_prompt_tokens
        if token in request.stop_token_ids and num_output >= request.params.min_tokens:
            # As in vLLM: no stop reason for the end of sequence, unless it was asked for by id.
            asked_for = token in (request.params.stop_token_ids or ())
            self.finish(seq, "stop", token if asked_for else None)
        elif len(seq.tokens) >= request.max_total_tokens:
            self.finish(seq, "length")

    def _advance_beams(self, live: LiveRequest) -> None:
        """One step of beam search, once every beam of the request has its candidates."""
        request = live.request
        params = request.params
        assert isinstance(params, BeamSearchParams)
        beams = [seq for seq in live.sequences if not seq.is_finished]
        if not all(seq.is_idle for seq in beams):
            return
        survivors, ended = beam.expand(beams, params, request.eos_token_ids)
        live.hypotheses += ended
        self._journal.hypotheses += [(request.request_id, hypothesis) for hypothesis in ended]
        for seq in beams:
            seq.candidates = None
            if seq.pending_forks:  # the seats kept for the beams that now come into being
                if seq.status is Status.RUNNING:
                    self.num_seats_taken -= seq.pending_forks
                seq.pending_forks = 0
        heirs_of: dict[str, list[beam.Continuation]] = {}
        for survivor in survivors:
            heirs_of.setdefault(survivor.parent.seq_id, []).append(survivor)
        for seq in beams:  # first, so that the heirs of others find seats and blocks
            if seq.seq_id not in heirs_of:
                self.finish(seq, "pruned")
                live.sequences.remove(seq)
        heirs: list[Sequence] = []
        for seq in list(live.sequences):
            first, *others = heirs_of[seq.seq_id]
            children = [self._fork(seq, live.next_index()) for _ in others]
            for heir, continuation in zip((seq, *children), (first, *others), strict=True):
                heir.tokens.append(continuation.token_id)
                heir.cumulative_logprob = continuation.cumulative_logprob
                self._journal.sampled[heir.seq_id] = continuation.token_id
                heirs.append(heir)
        is_over = not heirs or len(heirs[0].tokens) >= request.max_total_tokens
        if is_over:
            live.hypotheses += [beam.finished_beam(seq, params) for seq in heirs]
            live.hypotheses.sort(key=lambda h: -h.score)
            del live.hypotheses[params.beam_width :]
        if is_over:
            for seq in heirs:
                self.finish(seq, "length")

    def take_back(self, error: BaseException) -> StepRecord:
        """A step failed: none of what it computed or copied may be trusted. Every sequence it
        touched keeps its tokens and will compute them again."""
        journal = self._journal
        swapped_out = {swap.seq_id for swap in journal.swapped_out}
        for seq in self.waiting:
            if seq.seq_id in swapped_out:  # what was to be copied there never arrived
                journal.preempted.append(
                    Preemption(seq.seq_id, seq.seq_id, "error", seq.num_computed_tokens, 0)
                )
                self._release_host_blocks(seq)
                seq.num_computed_tokens = 0
        for seq, _ in self._plan.scheduled:
            if seq.status is Status.RUNNING:
                seq.candidates = None
                self._preempt(self._plan, seq, in_favour_of=seq, mode="error")
        journal.scheduled.clear()
        return self.seal(Phases(), error=f"{type(error).__name__}: {error}")

    def seal(self, phases: Phases, error: str | None = None) -> StepRecord:
        """Close the step's record."""
        journal, pool = self._journal, self.pool
        self._journal, self._plan = StepJournal(), StepPlan()
        journal.evicted += pool.evicted
        pool.evicted.clear()
        self.step_count += 1
        return StepRecord(
            step=self.step_count,
            time=self._began,
            phases=phases,
            error=error,
            policy=type(self.policy).__name__,
            token_budget=self.config.max_num_batched_tokens,
            scheduled=journal.scheduled,
            sampled=journal.sampled,
            candidates=journal.candidates,
            hypotheses=tuple(journal.hypotheses),
            waits=tuple(journal.waits),
            added=tuple(journal.added),
            ranked=journal.ranked,
            admitted=tuple(journal.admitted),
            preempted=tuple(journal.preempted),
            forked=tuple(journal.forked),
            finished=tuple(journal.finished.values()),
            allocated=tuple(journal.allocated),
            shared=tuple(journal.shared),
            copied=tuple(journal.copied),
            swapped_out=tuple(journal.swapped_out),
            swapped_in=tuple(journal.swapped_in),
            cached=tuple(journal.cached),
            evicted=tuple(journal.evicted),
            released=tuple(journal.released),
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            num_free_blocks=pool.num_free,
            num_cached_blocks=pool.num_cached,
            num_held_blocks=pool.num_held,
        )

    # ------------------------------------------------------------------ queues and blocks

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)

    def _rank_all(self, policy: Policy) -> None:
        """Order both queues by `policy`; if it raises, or its ranks do not compare, not at all."""
        orders = orders_of(policy, (*self.running, *self.waiting))
        changed = {seq.seq_id: o[0] for seq, o in orders.items() if o != seq.order}
        self._journal.ranked |= changed
        for seq, order in orders.items():
            seq.order = order
        self.running = [seq for seq in orders if seq.status is Status.RUNNING]
        self.waiting = [seq for seq in orders if seq.status is not Status.RUNNING]

    def _run(self, seq: Sequence) -> None:
        seq.status = Status.RUNNING
        self.num_seats_taken += 1 + seq.pending_forks
        insort(self.running, seq, key=_BY_ORDER)

    def _leave_queue(self, seq: Sequence) -> None:
        if seq.status is Status.RUNNING:
            self.running.remove(seq)
            self.num_seats_taken -= 1 + seq.pending_forks
        else:
            self.waiting.remove(seq)

    def _release_blocks(self, seq: Sequence) -> None:
        self._release_device_blocks(seq)
        self._release_host_blocks(seq)

    def _release_device_blocks(self, seq: Sequence) -> None:
        if seq.block_table:
            self.pool.release(seq.block_table)
            self._journal.released.append(BlockMove(seq.seq_id, tuple(seq.block_table)))
            seq.block_table = []

    def _release_host_blocks(self, seq: Sequence) -> None:
        self.host_pool.release(seq.host_blocks)
        seq.host_blocks = []


def orders_of(
    policy: Policy, sequences: Iterable[Sequence]
) -> dict[Sequence, tuple[Any, int, int]]:
    """Each one's place in every queue, in that order; together, because they must all compare."""
    orders = {seq: (policy.rank(seq), seq.request.arrival, seq.index) for seq in sequences}
    return {seq: orders[seq] for seq in sorted(orders, key=orders.__getitem__)}
