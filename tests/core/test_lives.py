"""The simulation: 2,000 lives of the scheduler, and proof that it sees the bugs it is there for."""

from __future__ import annotations

import inspect
import textwrap
import time

import pytest

from nbengine.core.block_pool import BlockPool
from nbengine.core.lives import Life, replay_command
from nbengine.core.prefix_cache import PrefixCache
from nbengine.core.scheduler import Scheduler
from nbengine.core.state import State

NUM_SEEDS = 2000
NUM_PARTS = 20

REGRESSIONS = {
    2049: "an error of one beam after the candidates of another were taken",
    2077: "an error of one beam, and a sibling later in the same step",
    2131: "a step taken back that had swapped a sequence out",
    2163: "a name aborted and taken again before the next step",
}


def live(seed):
    try:
        return Life(seed).run()
    except Exception as error:
        error.add_note(f"again, step by step: {replay_command(seed)}")
        raise


@pytest.mark.parametrize("part", range(NUM_PARTS))
def test_every_life_keeps_the_invariants_and_ends(part, record_property):
    began = time.process_time()
    for seed in range(part, NUM_SEEDS, NUM_PARTS):
        live(seed)
    record_property("simulated_seeds", NUM_SEEDS // NUM_PARTS)
    record_property("cpu_seconds", time.process_time() - began)


@pytest.mark.parametrize("seed", REGRESSIONS, ids=str)
def test_lives_that_once_went_wrong(seed):
    live(seed)


def test_a_seed_always_lives_the_same_life():
    def life(seed):
        told = []
        Life(seed, watch=lambda _, record: told.append(record)).run()
        return told

    for seed in range(20):
        assert life(seed) == life(seed)


def test_the_seeds_meet_everything_there_is_to_meet():
    """A simulation in which nothing happens proves nothing."""
    seen = set()

    def watch(_, record):
        seen.update("prefix cache reset" for move in record.released if not move.seq_id)
        seen.update(f"preempted by {p.mode}" for p in record.preempted)
        seen.update(f"finished by {f.reason}" for f in record.finished)
        seen.update(f"waits for {w.cause}" for w in record.waits)
        seen.update(f"prefix: {a.prefix.cause}" for a in record.admitted)
        for event in ("copied", "swapped_out", "swapped_in", "evicted", "forked", "cached"):
            if getattr(record, event):
                seen.add(event)
        if record.error:
            seen.add(record.error)

    for seed in range(200):
        Life(seed, watch).run()
    assert seen >= {
        "preempted by recompute",
        "preempted by swap",
        "preempted by error",
        *(f"finished by {r}" for r in ("stop", "length", "abort", "error", "pruned")),
        *(
            f"waits for {c}"
            for c in (
                "token budget",
                "long prefill threshold",
                "blocks",
                "seats",
                "sibling beams",
                "preemption in this step",
            )
        ),
        "prefix: differs",
        "prefix: never seen",
        "prefix: shorter than one block",
        "prefix: whole prefix found",
        "InjectedFault: out of memory in allocate",
        "InjectedFault: the step failed on the device",
        "InjectedFault: the policy failed",
        *("copied", "swapped_out", "swapped_in", "evicted", "forked", "cached"),
        *("preempted by rewind", "prefix cache reset"),
    }


def test_any_step_is_rebuilt_exactly_as_it_was():
    """Queues, tables, counts, prefixes and free list of every step that the history reaches."""
    num_states = 0
    for seed in range(60):
        live = {}

        def remember(life, record, live=live):
            live[record.step] = State.of(life.scheduler).snapshot()

        life = Life(seed, remember).run()
        for step in range(1, life.history[-1].step + 1):
            if step not in life.rewound_to:
                assert life.history.state_at(step).snapshot() == live[step], (seed, step)
                num_states += 1
    assert num_states > 1000


# Each breaks one line of the scheduler or of the pools: (method, code, what it becomes).
MUTATIONS = {
    "no copy on write": (Scheduler._make_room, "if copy:", "if False:"),
    "the copy is not sent to the device": (
        Scheduler._make_room,
        "plan.copies.append((source, destination))",
        "pass",
    ),
    "a block is cached before it is full": (
        Scheduler.commit,
        "self._cache_full_blocks(seq, (computed - n) // size, computed // size)",
        "self._cache_full_blocks(seq, (computed - n) // size, "
        "min(-(-computed // size), len(seq.contents)))",
    ),
    "a beam that ended with its sibling goes on": (
        Scheduler.commit,
        "if seq.status is not running:",
        "if False:",
    ),
    "a search that has failed is advanced": (
        Scheduler.commit,
        "if not live.is_finished:",
        "if True:",
    ),
    "abort forgets to release": (
        Scheduler.finish,
        "self._release_blocks(seq)",
        "reason == 'abort' or self._release_blocks(seq)",
    ),
    "a hit may cover the last token": (
        PrefixCache.lookup,
        "(num_tokens - 1) // self.block_size",
        "num_tokens // self.block_size",
    ),
    "salts are ignored": (PrefixCache.extend_contents, "tokens, salt)", "tokens, None)"),
    "the queue's second may overtake": (
        Scheduler._head,
        "for seq in self.waiting:",
        "for seq in self.waiting[1:] + self.waiting[:1]:",
    ),
    "the first is preempted instead of the last": (
        Scheduler._victim,
        "last = self.running[-1]",
        "last = self.running[0]",
    ),
    "hits are not shared before the rest is allocated": (
        Scheduler._try_admit,
        "pool.share(hits)  # first, so that none of them is evicted for the rest",
        "pass",
    ),
    "eviction leaves the digest behind": (
        BlockPool.allocate,
        "self.prefix_cache.forget(block)",
        "pass",
    ),
    "recompute keeps the computed tokens": (
        Scheduler._preempt,
        "seq.num_computed_tokens = 0",
        "pass",
    ),
    "a swap restores the blocks in reverse": (
        Scheduler._swap_in,
        "zip(seq.host_blocks, device, strict=True)",
        "zip(seq.host_blocks[::-1], device, strict=True)",
    ),
    "swapped sequences keep their host blocks": (
        Scheduler._swap_in,
        "self._release_host_blocks(seq)",
        "seq.host_blocks = []",
    ),
    "forks share without counting": (
        Scheduler._fork,
        "self.pool.share(child.block_table)",
        "pass",
    ),
    "seats for forks are not kept": (
        Scheduler._admit,
        "seats = 1 + seq.pending_forks",
        "seats = 1",
    ),
    "a failed step's swaps are trusted": (
        Scheduler.take_back,
        "swapped_out = {swap.seq_id for swap in journal.swapped_out}",
        "swapped_out = set()",
    ),
    "a failed step counts as computed": (
        Scheduler.take_back,
        "if seq.status is Status.RUNNING:",
        "if False:",
    ),
    "a refusal loses a reference": (
        Scheduler._try_admit,
        "self._release_device_blocks(seq)\n        return 0, blocks",
        "seq.block_table = []; return 0, blocks",
    ),
    "idle beams never give way": (
        Scheduler._preempt_idle,
        "idle = [s for s in self.running if s.is_idle]",
        "idle = []",
    ),
    "one token over the budget": (
        Scheduler._chunk,
        "n = budget if",
        "n = budget + 1 if",
    ),
    "a stop token is overlooked": (Scheduler._check_stop, "num_output >=", "num_output - 1 >="),
    "a rewind keeps the blocks of the present": (
        Scheduler.rewind,
        "self._release_blocks(seq)",
        "pass",
    ),
    "a rewind trusts the blocks of the past": (
        Scheduler.rewind,
        "seq.order, seq.num_computed_tokens = order, 0",
        "seq.order = order",
    ),
    "a reset of the prefix cache leaves no trace": (
        Scheduler.reset_prefix_cache,
        "self._journal.released.append(BlockMove(PREFIX_CACHE, freed))",
        "pass",
    ),
    "a wait without a word": (
        Scheduler._chunk,
        "if n < wanted:",
        "if False:",
    ),
}


@pytest.mark.parametrize("name", MUTATIONS)
def test_a_broken_scheduler_is_caught(name, monkeypatch):
    method, code, mutated = MUTATIONS[name]
    source = textwrap.dedent(inspect.getsource(method))
    assert source.count(code) >= 1, "the code has changed: adapt the mutation"
    namespace = dict(method.__globals__)
    exec(compile(source.replace(code, mutated), f"<{name}>", "exec"), namespace)
    owner = {"Scheduler": Scheduler, "BlockPool": BlockPool, "PrefixCache": PrefixCache}[
        method.__qualname__.partition(".")[0]
    ]
    monkeypatch.setattr(owner, method.__name__, namespace[method.__name__])
    for seed in range(200):
        try:
            Life(seed).run()
        except Exception as caught:
            print(f"seed {seed}: {type(caught).__name__}: {caught}")
            return
    pytest.fail(f"200 lives did not notice: {name}")
