"""Deterministic simulation: one integer drives a whole life of the real scheduler and pools.

After FoundationDB (Zhou et al., 2021, section 4): a seed draws a configuration, a workload and
faults, and a virtual clock makes the run repeat exactly. The executor is a fake device whose KV
cache holds, in the place of keys and values, a hash of the whole past that each slot was computed
from. So a block that is shared wrongly, written without a copy, remembered too early, swapped to
the wrong place or read stale is seen at the first token that looks at it. After every step the
invariants are checked; in the end every output must be what an engine with endless memory and no
faults gives, and everything admitted must have finished.

    python -m nbengine.core.simulate --seeds 100000   # many lives, on all cores
    python -m nbengine.core.simulate --seed 17        # one of them again, step by step
"""

from __future__ import annotations

import argparse
import heapq
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import accumulate
from random import Random
from typing import Any, NoReturn

from nbengine.core.block_pool import BlockPool, Refused
from nbengine.core.plan import StepOutput, StepPlan
from nbengine.core.policies import Policy
from nbengine.core.records import Phases, StepRecord
from nbengine.core.replay import Replay
from nbengine.core.request import LiveRequest, Request, Sequence, Status
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams
from nbengine.core.scheduler import Scheduler, SchedulerConfig
from nbengine.errors import CacheBusy, InvalidRequest, RequestTooLarge

VOCAB_SIZE = 61


class InjectedFault(RuntimeError):
    """A failure that the simulation caused on purpose."""


# ---------------------------------------------------------------------- a model without a model


def pasts(tokens: list[int], salt: str | None) -> list[int]:
    """For each position a number that stands for its keys and values: it depends on every token
    up to there, and on the salt, so that a hit across tenants is seen too."""
    root = 0 if salt is None else 1 + int.from_bytes(salt.encode(), "big")
    return list(accumulate(tokens, lambda past, token: hash((past, token)), initial=root))[1:]


def next_token(past: int, seed: int, index: int) -> int:
    return hash((past, seed, index)) % VOCAB_SIZE


def next_candidates(past: int, n: int) -> list[tuple[int, float]]:
    """The `n` likeliest next tokens, all different, with their log-probabilities."""
    tokens = [(past + k * 7) % VOCAB_SIZE for k in range(n)]
    scored = [(token, -1 - hash((past, token)) % 2**40 / 2**40) for token in tokens]
    return sorted(scored, key=lambda candidate: -candidate[1])


def undisturbed_outputs(request: Request) -> list[tuple[int, ...]]:
    """What the request's samples (or best beams) are, with endless memory and nothing amiss."""
    prompt, salt = list(request.prompt_token_ids), request.cache_salt
    outputs = []
    if isinstance(request.params, BeamSearchParams):
        return _undisturbed_beams(request, request.params)
    for index in range(request.params.n):
        tokens = list(prompt)
        while len(tokens) < request.max_total_tokens:
            tokens.append(next_token(pasts(tokens, salt)[-1], request.seed, index))
            num_output = len(tokens) - len(prompt)
            if tokens[-1] in request.stop_token_ids and num_output >= request.params.min_tokens:
                break
        outputs.append(tuple(tokens[len(prompt) :]))
    return outputs


def _undisturbed_beams(request: Request, params: BeamSearchParams) -> list[tuple[int, ...]]:
    beams = [(list(request.prompt_token_ids), 0.0)]
    ended: list[tuple[float, tuple[int, ...]]] = []  # (score, output)
    start, width = len(beams[0][0]), params.beam_width
    while beams and len(beams[0][0]) < request.max_total_tokens:
        grown = []
        for tokens, total in beams:
            past = pasts(tokens, request.cache_salt)[-1]
            for token, logprob in next_candidates(past, 2 * width):
                if token in request.eos_token_ids and not params.ignore_eos:
                    score = (total + logprob) / len(tokens) ** params.length_penalty
                    ended.append((score, tuple(tokens[start:])))
                else:
                    grown.append(([*tokens, token], total + logprob))
        beams = sorted(grown, key=lambda beam: -beam[1])[:width]
    for tokens, total in beams:
        ended.append((total / len(tokens) ** params.length_penalty, tuple(tokens[start:])))
    return [output for _, output in sorted(ended, key=lambda e: -e[0])[:width]]


class FakeDevice:
    """Executes plans over a KV cache of pasts, and checks all that it reads."""

    def __init__(self, config: SchedulerConfig) -> None:
        self.size = config.block_size
        self.kv: list[int | None] = [None] * (config.num_blocks * self.size)
        self.host: list[int | None] = [None] * (config.num_host_blocks * self.size)

    def execute(self, plan: StepPlan) -> StepOutput:
        self._copy(plan.swap_out, self.kv, self.host)
        self._copy(plan.swap_in, self.host, self.kv)
        self._copy(plan.copies, self.kv, self.kv)
        past_of = {seq: pasts(seq.tokens, seq.request.cache_salt) for seq, _ in plan.scheduled}
        for seq, n in plan.scheduled:  # as on a real device: all are written, then read
            for i in range(seq.num_computed_tokens, seq.num_computed_tokens + n):
                self.kv[self._slot(seq, i)] = past_of[seq][i]
        output = StepOutput()
        for seq, n in plan.scheduled:
            end = seq.num_computed_tokens + n
            past = past_of[seq]
            if self._read(seq, end) != past[:end]:
                self._explain(seq, past[:end])
            if end == len(past):
                self._sample(seq, past[-1], output)
        return output

    def scramble(self, plan: StepPlan) -> None:
        """A step that fails half way leaves garbage wherever it was to write."""
        self._copy([(None, block) for _, block in plan.swap_out], self.kv, self.host)
        for _, block in (*plan.swap_in, *plan.copies):
            self._copy([(None, block)], self.kv, self.kv)
        for seq, n in plan.scheduled:
            for i in range(seq.num_computed_tokens, seq.num_computed_tokens + n):
                self.kv[self._slot(seq, i)] = None

    def _copy(self, moves: Any, source: list[int | None], destination: list[int | None]) -> None:
        """Copy blocks pairwise, reading all before writing any; a source of None is garbage."""
        size = self.size
        garbage = [None] * size
        contents = [
            garbage if block is None else source[block * size : (block + 1) * size]
            for block, _ in moves
        ]
        for (_, block), content in zip(moves, contents, strict=True):
            destination[block * size : (block + 1) * size] = content

    def _slot(self, seq: Sequence, position: int) -> int:
        return seq.block_table[position // self.size] * self.size + position % self.size

    def _read(self, seq: Sequence, end: int) -> list[int | None]:
        size = self.size
        return [past for b in seq.block_table for past in self.kv[b * size : (b + 1) * size]][:end]

    def _explain(self, seq: Sequence, expected: list[int]) -> NoReturn:
        found = self._read(seq, len(expected))
        at = next(i for i, past in enumerate(expected) if found[i : i + 1] != [past])
        what = "was never computed" if found[at] is None else "holds another past"
        raise AssertionError(
            f"{seq.seq_id} reads position {at} in block {seq.block_table[at // self.size]}, which "
            f"{what}; {seq!r}"
        )

    def _sample(self, seq: Sequence, past: int, output: StepOutput) -> None:
        request = seq.request
        if isinstance(request.params, BeamSearchParams):
            output.candidates[seq.seq_id] = next_candidates(past, 2 * request.params.beam_width)
        else:
            output.samples[seq.seq_id] = [
                next_token(past, request.seed, seq.index + k) for k in range(1 + seq.pending_forks)
            ]


# ---------------------------------------------------------------------- what a seed draws


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


class Simulation:
    """The life that `seed` draws. `watch` is called with every sealed record."""

    def __init__(
        self, seed: int, watch: Callable[[Simulation, StepRecord], None] | None = None
    ) -> None:
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
        """Every request that was not refused."""
        self.replay = Replay()
        self.num_steps = self.num_tokens = 0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._draw_events()

    def run(self) -> Simulation:
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
        before = list(scheduler.waiting), list(scheduler.running)
        try:
            plan = scheduler.schedule()
            self._check_plan(plan, *before)
            output = self._execute(plan)
            scheduler.commit(output)
        except InjectedFault as fault:
            record = scheduler.take_back(fault)
        else:
            record = scheduler.seal(Phases())
            self.num_tokens += record.num_tokens
        self.num_steps += 1
        self._check_state(record)
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

    # ---------------------------------------------------------------- invariants

    def _check_plan(self, plan: StepPlan, waiting: list[Sequence], running: list[Sequence]) -> None:
        config, scheduler = self.config, self.scheduler
        journal = scheduler._journal
        explained = {wait.seq_id for wait in journal.waits}
        computing = [seq for seq, _ in plan.scheduled]
        assert len(set(computing)) == len(computing), "scheduled twice"
        assert plan.num_tokens <= config.max_num_batched_tokens, "over the budget"
        for seq, n in plan.scheduled:
            assert 0 < n <= seq.num_uncomputed_tokens and seq.status is Status.RUNNING
            if n < seq.num_uncomputed_tokens:
                assert config.enable_chunked_prefill and seq.seq_id in explained, seq
            if config.long_prefill_token_threshold > 0 and config.enable_chunked_prefill:
                assert n <= config.long_prefill_token_threshold

        # Nobody is overtaken: who computes comes before all who could and do not.
        left = [seq for seq in scheduler.waiting if not seq.is_idle]
        admitted = {seq_id for seq_id, *_ in journal.admitted}
        if left:
            first = min(seq.order for seq in left)
            for seq in scheduler.running:
                assert seq.seq_id not in admitted or seq.order < first, f"{seq} overtook"
            head = min(left, key=lambda seq: seq.order)
            assert head.seq_id in explained, f"no word on why {head} waits"
        lost = [seq for seq in running if seq.status is Status.PREEMPTED and not seq.is_idle]
        for victim in lost:
            last = max((seq.order for seq in scheduler.running), default=victim.order)
            assert last <= victim.order, f"{victim} was preempted before one behind it"
        for seq in running:
            if seq.status is Status.RUNNING and seq not in computing:
                assert seq.seq_id in explained, f"no word on why {seq} computes nothing"
        if not self.is_noisy:
            assert plan.scheduled or not scheduler.has_work, "there is work, and nobody computes"
            for seq in (*scheduler.waiting, *scheduler.running):
                rank = scheduler.policy.rank(seq)
                assert seq.order == (rank, seq.request.arrival, seq.index), "a stale rank"

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
        self._check_replay(record)

    def _check_replay(self, record: StepRecord) -> None:
        """The records alone tell where everything stands; that no token is computed twice or
        skipped follows, because the replay counts them."""
        replay, scheduler = self.replay, self.scheduler
        replay.apply(record, self.requests)
        for seq in (*scheduler.running, *scheduler.waiting):
            told = replay.sequences[seq.seq_id]
            assert told.status is seq.status, (seq, told)
            assert told.num_computed_tokens == seq.num_computed_tokens, (seq, told)
            assert told.output_token_ids == seq.output_token_ids, (seq, told)
            assert told.block_table == seq.block_table, (seq, told)
            assert told.host_blocks == seq.host_blocks, (seq, told)
        assert len(replay.sequences) == len(scheduler.running) + len(scheduler.waiting)
        cache = scheduler.pool.prefix_cache
        assert replay.cached == {b: content.digest for b, content in cache.content_of.items()}

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


# ---------------------------------------------------------------------- many lives


def replay_command(seed: int) -> str:
    return f"python -m nbengine.core.simulate --seed {seed}"


def _try(seed: int) -> tuple[int, str, int]:
    """(seed, what went wrong or nothing, steps)."""
    simulation = Simulation(seed)
    try:
        simulation.run()
    except Exception as error:
        return seed, f"{type(error).__name__}: {error}", simulation.num_steps
    return seed, "", simulation.num_steps


def try_seeds(seeds: range, num_processes: int) -> Iterator[tuple[int, str, int]]:
    """(seed, error or "", steps) of each, as they come in."""
    if num_processes == 1:
        yield from map(_try, seeds)
        return
    with multiprocessing.Pool(num_processes) as pool:
        yield from pool.imap_unordered(_try, seeds, chunksize=50)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m nbengine.core.simulate")
    parser.add_argument("--seeds", type=int, default=1000, help="how many lives")
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--seed", type=int, help="live this one, and print its steps")
    parser.add_argument("--processes", type=int, default=multiprocessing.cpu_count())
    options = parser.parse_args(arguments)
    if options.seed is not None:
        simulation = Simulation(options.seed, watch=lambda _, record: print(record))
        print(simulation.config, simulation.faults, sep="\n")
        simulation.run()
        return 0

    began = time.perf_counter()
    failed: list[int] = []
    num_steps = 0
    seeds = range(options.first, options.first + options.seeds)
    for done, (seed, error, steps) in enumerate(try_seeds(seeds, options.processes), 1):
        num_steps += steps
        if error:
            failed.append(seed)
            print(f"\rseed {seed}: {error}\n  again: {replay_command(seed)}")
        if done % 100 == 0 or done == len(seeds):
            rate = done / (time.perf_counter() - began)
            print(
                f"\r{done:,} of {len(seeds):,} seeds, {num_steps:,} steps, {len(failed)} failed, "
                f"{rate:,.0f} seeds/s",
                end="", flush=True, file=sys.stderr,
            )  # fmt: skip
    print(file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
