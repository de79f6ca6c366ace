"""Deterministic simulation: one integer drives a whole life of the real scheduler and pools.

After FoundationDB (Zhou et al., 2021, section 4): a seed draws a configuration, a workload and
faults, and a virtual clock makes the run repeat exactly. The executor is a `FakeDevice`, which sees
every block that does not hold the past of who reads it. After every step the invariants are
checked, and a `State` that the records alone move on must equal the scheduler's. Now and then the
life goes back to an earlier step. In the end every output must be what an engine with endless
memory and no faults gives, and everything admitted must have finished.

    python -m nbengine.core.lives --seeds 100000   # many lives, on all cores
    python -m nbengine.core.lives --seed 17        # one of them again, step by step
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from random import Random
from typing import Any

from nbengine.core.block_pool import BlockPool, Refused
from nbengine.core.fake_device import VOCAB_SIZE, FakeDevice, undisturbed_outputs
from nbengine.core.history import History
from nbengine.core.plan import StepOutput, StepPlan
from nbengine.core.policies import Policy
from nbengine.core.records import Phases, StepRecord
from nbengine.core.request import LiveRequest, Request, Sequence, Status
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams
from nbengine.core.scheduler import Scheduler, SchedulerConfig
from nbengine.core.state import Keyframe, State
from nbengine.errors import CacheBusy, InvalidRequest, RequestTooLarge

# ---------------------------------------------------------------------- what a seed draws


class InjectedFault(RuntimeError):
    """A failure that the simulation caused on purpose."""


class FlakyPool(BlockPool):
    """A pool whose allocations fail now and then, by refusing or by raising."""

    def __init__(self, num_blocks: int, block_size: int, fails: Callable[[], str]) -> None:
        super().__init__(num_blocks, block_size)
        self.fails = fails

    def allocate(self, n: int) -> list[int] | Refused:
        match self.fails():
            case "refuse":
                return Refused(n, self.num_available)
            case "raise":
                raise InjectedFault("out of memory in allocate")
        return super().allocate(n)


class LastComeFirstServed:
    """A policy that a user might write."""

    def rank(self, sequence: Sequence) -> int:
        return -sequence.request.arrival


class FewestOutputTokensFirst:
    """Ranks that change with every token."""

    dynamic = True

    def rank(self, sequence: Sequence) -> int:
        return len(sequence.tokens) - sequence.num_prompt_tokens


class Moody:
    """By parity of the arrival; raises now and then."""

    dynamic = True

    def __init__(self, raises: Callable[[], bool]) -> None:
        self.raises = raises

    def rank(self, sequence: Sequence) -> int:
        if self.raises():
            raise InjectedFault("the policy failed")
        return sequence.request.arrival % 2


def draw_config(rng: Random) -> SchedulerConfig:
    """Small numbers, so that everything runs out."""
    size = rng.choice([2, 4, 8, 16])
    return SchedulerConfig(
        num_blocks=rng.choice([rng.randint(2, 12), rng.randint(8, 40), 200]),
        block_size=size,
        max_num_batched_tokens=rng.choice([rng.randint(1, 12), rng.randint(8, 64), 256]),
        max_num_seqs=rng.choice([rng.randint(1, 4), rng.randint(3, 8), 32]),
        enable_chunked_prefill=rng.random() < 0.7,
        enable_prefix_caching=rng.random() < 0.8,
        long_prefill_token_threshold=rng.choice([0, 0, rng.randint(1, 20)]),
        preemption_mode=rng.choice(["recompute", "swap"]),
        num_host_blocks=rng.choice([0, rng.randint(1, 8), 40]),
    )


def draw_request(rng: Random, arrival: int, config: SchedulerConfig) -> Request:
    """A request that mostly fits, and mostly shares the start of its prompt with others."""
    capacity = config.num_blocks * config.block_size
    longest = max(1, min(96, int(capacity * rng.choice([0.3, 0.7, 1.1]))))
    document = Random(rng.randrange(3))  # one of three texts, always the same ones
    prompt = [document.randrange(VOCAB_SIZE) for _ in range(rng.randint(1, longest))]
    if rng.random() < 0.6:
        fork = rng.randrange(len(prompt))
        prompt[fork:] = [rng.randrange(VOCAB_SIZE) for _ in prompt[fork:]]
    max_tokens = rng.randint(1, rng.choice([2, 8, 24]))
    width = rng.choice([1, 1, 1, 2, rng.randint(2, 5)])
    stops = frozenset(rng.sample(range(VOCAB_SIZE), rng.choice([0, 0, 3])))
    params: SamplingParams | BeamSearchParams
    if rng.random() < 0.2:
        params = BeamSearchParams(
            beam_width=width, max_tokens=max_tokens, ignore_eos=rng.random() < 0.5
        )
    else:
        params = SamplingParams(
            n=width, max_tokens=max_tokens, min_tokens=rng.randint(0, max_tokens)
        )
    return Request(
        request_id=f"r{arrival if rng.random() < 0.8 else 0}",  # a name may be taken again
        prompt_token_ids=tuple(prompt),
        params=params,
        arrival=arrival,
        priority=rng.randint(-2, 2),
        cache_salt=rng.choice([None, None, None, "", "a"]),
        seed=rng.getrandbits(32),
        eos_token_ids=stops,
        stop_token_ids=stops,
        max_total_tokens=len(prompt) + max_tokens,
    )


@dataclass(slots=True)
class Faults:
    """How often each kind happens, per chance to happen."""

    allocation_refused: float = 0.0
    allocation_raises: float = 0.0
    step_raises: float = 0.0
    result_missing: float = 0.0
    sequence_error: float = 0.0
    slow_step: float = 0.0
    policy_raises: float = 0.0

    @classmethod
    def draw(cls, rng: Random) -> Faults:
        if rng.random() < 0.4:
            return cls()
        return cls(*(rng.choice([0, 0, 0.02, 0.1]) for _ in range(7)))


# ---------------------------------------------------------------------- one life


class Life:
    """The life that `seed` draws. `watch` is called with every sealed record."""

    def __init__(self, seed: int, watch: Callable[[Life, StepRecord], None] | None = None) -> None:
        self.seed, self.watch = seed, watch
        self.rng = rng = Random(seed)
        self.now = 0.0
        self.config = draw_config(rng)
        self.faults = Faults.draw(rng)
        self.device = FakeDevice(self.config)
        self.scheduler = Scheduler(self.config, self._draw_policy(), clock=lambda: self.now)
        self.scheduler.pool = FlakyPool(
            self.config.num_blocks, self.config.block_size, self._allocation_fails
        )
        self.requests: dict[str, Request] = {}
        self.admitted: list[LiveRequest] = []
        """Every request that was not refused, nor undone."""
        self.added_since: list[Request] = []
        """Requests that were admitted since the last step."""
        self.state = State.of(self.scheduler)
        """Moved on by records alone."""
        self.history = History()
        self.history.keep(Keyframe(self.scheduler))
        self.rewound_to: set[int] = set()
        self.num_steps = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._draw_events()

    def run(self) -> Life:
        """Live it to the end.

        Raises:
            AssertionError: an invariant does not hold.
        """
        scheduler = self.scheduler
        quiet_steps = 0
        while self._events or scheduler.has_work:
            if not scheduler.has_work:
                self.now = max(self.now, self._events[0][0])
            while self._events and self._events[0][0] <= self.now:
                heapq.heappop(self._events)[2]()
            if not self.is_noisy:
                quiet_steps += 1
                assert quiet_steps <= 5000, f"no end in sight: {scheduler.running[:3]}"
            self.step()
        self._check_end()
        return self

    @property
    def is_noisy(self) -> bool:
        """Faults happen as long as something is still to arrive."""
        return bool(self._events)

    def step(self) -> StepRecord:
        scheduler = self.scheduler
        ran_before = list(scheduler.running)
        owed_a_word: set[str] = set()
        try:
            plan = scheduler.schedule()
            planned = _laid_out(plan.scheduled)
            owed_a_word = self._check_plan(plan, ran_before)
            output = self._execute(plan)
            scheduler.commit(output)
        except InjectedFault as fault:
            record = scheduler.take_back(fault)
            planned = []
        else:
            record = scheduler.seal(Phases())
        self.num_steps += 1
        silent = owed_a_word - {wait.seq_id for wait in record.waits}
        assert not silent, f"no word on why {silent} got less than wanted"
        self._check_state(record)
        assert _laid_out(self.history.batch_at(record.step)) == planned, "the batch as told"
        if self.watch:
            self.watch(self, record)
        return record

    def _execute(self, plan: StepPlan) -> StepOutput:
        faults = self.faults
        self.now += 40.0 if self._strikes(faults.slow_step) else 1.0
        # Faults like the moments in which most can go wrong.
        weight = 5 if plan.swap_out or plan.swap_in or plan.copies else 1
        if self._strikes(faults.step_raises * weight):
            if self.rng.random() < 0.5:
                self.device.execute(plan)
            self.device.scramble(plan)
            raise InjectedFault("the step failed on the device")
        output = self.device.execute(plan)
        for seq, _ in plan.scheduled:
            if self._strikes(faults.sequence_error):
                output.errors[seq.seq_id] = InjectedFault("not a number")
            elif self._strikes(faults.result_missing):
                output.samples.pop(seq.seq_id, None)
                output.candidates.pop(seq.seq_id, None)
        return output

    # ---------------------------------------------------------------- events and faults

    def _strikes(self, probability: float) -> bool:
        return probability > 0 and self.is_noisy and self.rng.random() < probability

    def _allocation_fails(self) -> str:
        if self._strikes(self.faults.allocation_raises):
            return "raise"
        return "refuse" if self._strikes(self.faults.allocation_refused) else ""

    def _policy_raises(self) -> bool:
        return self._strikes(self.faults.policy_raises)

    def _draw_policy(self) -> Policy | type | str:
        policies: list[Policy | type | str]
        policies = ["fcfs", "fcfs", "priority", "sjf", LastComeFirstServed, FewestOutputTokensFirst]
        if self.faults.policy_raises:
            policies += [Moody(self._policy_raises)] * 3
        return self.rng.choice(policies)

    def _draw_events(self) -> None:
        rng = self.rng
        at = 0.0
        mean_gap = rng.choice([0.2, 2.0, 10.0])
        for arrival in range(rng.randint(1, 12)):
            request = draw_request(rng, arrival, self.config)
            self._at(at, self._add, request)
            if rng.random() < 0.15:
                self._at(at + rng.uniform(0, 12), self._abort, request.request_id)
            at += rng.expovariate(1 / mean_gap)
        at += rng.uniform(0, 40)
        for _ in range(rng.choice([0, 0, 1, 4])):
            self._at(rng.uniform(0, at), rng.choice([self._set_policy, self._reset_prefix_cache]))
        for _ in range(rng.choice([0, 0, 0, 1, 3])):
            self._at(rng.uniform(0, at), self._rewind)
        self._at(at, lambda: None)  # from here on it is quiet

    def _at(self, when: float, do: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._events, (when, len(self._events), lambda: do(*args)))

    def _add(self, request: Request) -> None:
        scheduler, config = self.scheduler, self.config
        computed = max(request.max_total_tokens - 1, request.num_prompt_tokens)
        can_fit = (
            computed <= config.num_blocks * config.block_size
            and request.num_sequences <= config.max_num_seqs
            and (config.enable_chunked_prefill or computed <= config.max_num_batched_tokens)
        )
        in_use = scheduler.live.get(request.request_id)
        try:
            live = scheduler.add(request)
        except RequestTooLarge:
            assert not can_fit
        except InvalidRequest:
            assert in_use
        except InjectedFault:
            pass
        else:
            assert can_fit and not in_use, f"{request} should have been refused"
            self.admitted.append(live)
            self.added_since.append(request)
            self.requests[request.request_id] = request
            return
        assert scheduler.live.get(request.request_id) is in_use

    def _abort(self, request_id: str) -> None:
        if request_id in self.scheduler.live:
            for seq in self.scheduler.abort(request_id):
                assert seq.is_finished and seq.finish_reason == "abort"
            if self.rng.random() < 0.5:  # at once again, under the same name
                request = self.requests[request_id]
                self._add(replace(request, arrival=100 + request.arrival))

    def _set_policy(self) -> None:
        before = self.scheduler.policy
        try:
            self.scheduler.set_policy(self._draw_policy())
        except InjectedFault:
            assert self.scheduler.policy is before

    def _reset_prefix_cache(self) -> None:
        pool = self.scheduler.pool
        num_held, num_cached = pool.num_held, pool.num_cached
        try:
            assert self.scheduler.reset_prefix_cache() == num_cached
            assert not num_held and not len(pool.prefix_cache)
        except CacheBusy:
            assert num_held and pool.num_cached == num_cached

    def _rewind(self) -> None:
        scheduler, history = self.scheduler, self.history
        undone = scheduler.step_count - self.rng.randint(0, scheduler.step_count)
        state = history.state_at(scheduler.step_count - undone)
        alive, step = dict(state.live), state.step
        try:
            scheduler.rewind(state)
        except InjectedFault:
            assert scheduler.step_count == step + undone
            return
        alive_again = {id(live.request): live for live in alive.values()}
        dropped = {id(r) for record in history.cut(step) for r in record.added}
        dropped |= {id(r) for r in self.added_since}
        self.added_since.clear()
        self.admitted = [
            alive_again.get(id(live.request), live)
            for live in self.admitted
            if id(live.request) not in dropped
        ]
        history.keep(Keyframe(scheduler))
        self.state = State.of(scheduler)
        self.rewound_to.add(step)

    # ---------------------------------------------------------------- invariants

    def _check_plan(self, plan: StepPlan, ran_before: list[Sequence]) -> set[str]:
        """Judge the decisions; returns who got less than it wanted, and must be told why."""
        config, scheduler = self.config, self.scheduler
        computing = [seq for seq, _ in plan.scheduled]
        assert len(set(computing)) == len(computing), "scheduled twice"
        assert plan.num_tokens <= config.max_num_batched_tokens, "over the budget"
        for seq, n in plan.scheduled:
            assert seq.status is Status.RUNNING and 0 < n <= seq.num_uncomputed_tokens, seq
            assert n == seq.num_uncomputed_tokens or config.enable_chunked_prefill, "a chunk"
            if config.enable_chunked_prefill and config.long_prefill_token_threshold:
                assert n <= config.long_prefill_token_threshold, "over the threshold"
        owed = {seq.seq_id for seq, n in plan.scheduled if n < seq.num_uncomputed_tokens}
        owed |= {seq.seq_id for seq in scheduler.running if seq not in computing}

        lost = [seq for seq in ran_before if seq.status is Status.PREEMPTED and not seq.is_idle]
        for victim in lost:
            last = max((seq.order for seq in scheduler.running), default=victim.order)
            assert last <= victim.order, f"{victim} was preempted before one behind it"
        left = [seq for seq in scheduler.waiting if not seq.is_idle]
        if left:
            head = min(left, key=lambda seq: seq.order)
            owed.add(head.seq_id)
            for seq in computing:
                if seq not in ran_before:
                    assert seq.order < head.order, f"{seq} overtook {head}"
        if not isinstance(scheduler.policy, Moody):
            for seq in (*scheduler.waiting, *scheduler.running):
                rank = scheduler.policy.rank(seq)
                assert seq.order == (rank, seq.request.arrival, seq.index), "a stale rank"
        if not self.is_noisy and scheduler.has_work:
            assert computing, "there is work, and nobody computes"
        return owed

    def _check_state(self, record: StepRecord) -> None:
        scheduler, pool, host_pool = self.scheduler, self.scheduler.pool, self.scheduler.host_pool
        pool.check_integrity()
        host_pool.check_integrity()
        queued = scheduler.running + scheduler.waiting
        holders = Counter(block for seq in queued for block in seq.block_table)
        assert [holders[b] for b in range(pool.num_blocks)] == pool.ref_counts, "reference counts"
        held = Counter(block for seq in queued for block in seq.host_blocks)
        assert [held[b] for b in range(host_pool.num_blocks)] == host_pool.ref_counts, "host"
        assert pool.num_free + pool.num_cached + pool.num_held == pool.num_blocks
        assert (record.num_free_blocks, record.num_cached_blocks, record.num_held_blocks) == (
            pool.num_free, pool.num_cached, pool.num_held,
        )  # fmt: skip
        assert not pool.num_cached or self.config.enable_prefix_caching

        seats = 0
        for seq in scheduler.running:
            seats += 1 + seq.pending_forks
            assert seq.status is Status.RUNNING and not seq.host_blocks
            assert len(seq.block_table) * pool.block_size >= seq.num_computed_tokens
        for seq in scheduler.waiting:
            assert seq.status in (Status.WAITING, Status.PREEMPTED)
            assert not seq.block_table, f"{seq} waits and holds device blocks"
            assert bool(seq.num_computed_tokens) == bool(seq.host_blocks)
        assert seats == scheduler.num_seats_taken <= self.config.max_num_seqs, "seats"
        for queue in (scheduler.running, scheduler.waiting):
            assert queue == sorted(queue, key=lambda seq: seq.order), "a queue out of order"
        unfinished = {s for live in scheduler.live.values() for s in live.sequences}
        assert {s for s in unfinished if not s.is_finished} == set(queued), "lost a sequence"
        assert len(queued) == len(set(queued)), "a sequence queues twice"
        self._check_records(record)

    def _check_records(self, record: StepRecord) -> None:
        """The records alone tell where everything stands; that no token is computed twice or
        skipped follows, because the state counts them."""
        self.state.apply(record)
        self.history.append(record)
        self.added_since.clear()
        if self.num_steps % 7 == 0:
            self.history.keep(Keyframe(self.scheduler))
        now = State.of(self.scheduler)
        assert (self.state.step, self.state.policy) == (now.step, now.policy)
        assert self.state.ref_counts == now.ref_counts, "reference counts as told"
        assert list(self.state.free) == list(now.free), "the free list as told"
        assert list(self.state.cached) == list(now.cached), "cached blocks as told"
        assert list(self.state.contents.items()) == list(now.contents.items()), "prefixes as told"
        assert self.state.live.keys() == now.live.keys(), "requests as told"
        for name, live in now.live.items():
            told = self.state.live[name]
            assert told.request is live.request
            assert (told.hypotheses, told.num_indices) == (live.hypotheses, live.num_indices)
            for one, other in zip(told.sequences, live.sequences, strict=True):
                assert _facts(one) == _facts(other), (_facts(one), _facts(other))

    def _check_end(self) -> None:
        scheduler = self.scheduler
        assert not scheduler.live and not scheduler.num_seats_taken
        assert not scheduler.pool.num_held and not scheduler.host_pool.num_held
        for live in self.admitted:
            self._check_outputs(live)

    def _check_outputs(self, live: LiveRequest) -> None:
        """What was not aborted and met no fault is whole; the rest is right as far as it goes."""
        request = live.request
        expected = undisturbed_outputs(request)
        cut_short = {seq for seq in live.sequences if seq.finish_reason in ("abort", "error")}
        if isinstance(request.params, BeamSearchParams):
            found = [hypothesis.token_ids for hypothesis in live.hypotheses]
            assert cut_short or found == expected, (request.request_id, found, expected)
            return
        for seq in live.sequences:
            output = tuple(seq.output_token_ids)
            whole = expected[seq.index]
            assert seq.is_finished
            assert output == (whole[: len(output)] if seq in cut_short else whole), (seq, output)
        assert cut_short or len(live.sequences) == request.num_sequences


def _laid_out(batch: Iterable[tuple[Sequence, int]]) -> list[tuple[object, ...]]:
    """What an executor reads of it."""
    return [
        (seq.seq_id, tuple(seq.tokens), seq.num_computed_tokens, tuple(seq.block_table), n)
        for seq, n in batch
    ]


def _facts(seq: Sequence) -> tuple[object, ...]:
    """All of a sequence but what follows from the rest."""
    names = [field.name for field in fields(seq) if field.name not in ("contents",)]
    if seq.is_finished:  # how far it had come in the cache is nobody's business any more
        names.remove("num_computed_tokens")
    return tuple((name, getattr(seq, name)) for name in names)


# ---------------------------------------------------------------------- many lives


def replay_command(seed: int) -> str:
    return f"python -m nbengine.core.lives --seed {seed}"


def try_seed(seed: int) -> tuple[int, str, int]:
    """(seed, what went wrong or "", steps)."""
    life = Life(seed)
    try:
        life.run()
    except Exception as error:
        return seed, f"{type(error).__name__}: {error}", life.num_steps
    return seed, "", life.num_steps


def try_seeds(seeds: range, num_processes: int) -> bool:
    """Live them all, telling how it goes; whether all went well."""
    began = last_told = time.perf_counter()
    num_steps = num_failed = 0
    with multiprocessing.Pool(num_processes) as pool:
        lives = pool.imap_unordered(try_seed, seeds, chunksize=20)
        for done, (seed, error, steps) in enumerate(lives, 1):
            num_steps += steps
            if error:
                num_failed += 1
                print(f"seed {seed}: {error}\n    {replay_command(seed)}", flush=True)
            now = time.perf_counter()
            if now - last_told > 5 or done == len(seeds):
                last_told = now
                print(
                    f"{done:,} of {len(seeds):,} seeds, {num_steps:,} steps, {num_failed} failed, "
                    f"{done / (now - began):,.0f} seeds/s",
                    flush=True,
                )
    return not num_failed


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nbengine.core.lives")
    parser.add_argument("--seeds", type=int, default=2000, help="how many lives")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="live this one only, and print its steps")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args(arguments)
    if not __debug__:
        parser.error("the invariants are assertions, which python -O leaves out")
    if options.seed is not None:
        life = Life(options.seed, watch=lambda _, record: print(record))
        print(life.config, life.faults, sep="\n")
        life.run()
        return 0
    seeds = range(options.first, options.first + options.seeds)
    return 0 if try_seeds(seeds, options.processes) else 1


if __name__ == "__main__":
    sys.exit(main())
