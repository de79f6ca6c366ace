"""The scheduler's contract, case by case, with numbers that can be checked by hand."""

from __future__ import annotations

import copy
from typing import Any, ClassVar

import pytest

from nbengine.core.records import Cause, Phases
from nbengine.core.request import Status
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams
from nbengine.core.scheduler import SchedulerConfig
from nbengine.errors import CacheBusy, InvalidRequest, RequestTooLarge, UnknownRequest


def amounts(record):
    return list(record.scheduled.values())


def outputs(live):
    return [seq.output_token_ids for seq in live.sequences]


class TestTokenBudget:
    def test_three_long_prompts_share_a_budget_of_1024_in_chunks_of_400(self, bench):
        b = bench(num_blocks=1000, max_num_batched_tokens=1024, long_prefill_token_threshold=400)
        for _ in range(3):
            b.add(800)
        first, second, third = b.step(), b.step(), b.step()
        assert amounts(first) == [400, 400, 224]
        assert amounts(second) == [400, 400, 224]
        assert amounts(third) == [1, 1, 352]
        assert not first.sampled, "no prompt is complete after one step"
        assert list(second.sampled) == ["req-0", "req-1"]
        assert list(third.sampled) == ["req-0", "req-1", "req-2"]

    def test_a_chunk_cut_short_says_why(self, bench):
        b = bench(num_blocks=1000, max_num_batched_tokens=1024, long_prefill_token_threshold=400)
        for _ in range(3):
            b.add(800)
        waits = {w.seq_id: w for w in b.step().waits}
        assert waits["req-0"].cause is Cause.LONG_PREFILL
        assert (waits["req-0"].wanted, waits["req-0"].got) == (800, 400)
        assert waits["req-2"].cause is Cause.TOKEN_BUDGET
        assert (waits["req-2"].needed, waits["req-2"].available) == (400, 224)

    def test_without_chunking_nobody_overtakes_the_head_of_the_queue(self, bench):
        b = bench(num_blocks=100, max_num_batched_tokens=100, enable_chunked_prefill=False)
        b.add(60)
        b.add(80)
        b.add(10)
        record = b.step()
        assert record.scheduled == {"req-0": 60}
        assert record.waits[-1].seq_id == "req-1"
        assert (record.waits[-1].needed, record.waits[-1].available) == (80, 40)
        assert b.step().scheduled == {"req-0": 1, "req-1": 80, "req-2": 10}

    def test_seats_are_limited_and_the_record_says_so(self, bench):
        b = bench(num_blocks=100, max_num_seqs=2)
        for _ in range(3):
            b.add(4)
        record = b.step()
        assert list(record.scheduled) == ["req-0", "req-1"]
        wait = record.waits[-1]
        assert (wait.seq_id, wait.cause, wait.needed, wait.available) == (
            "req-2",
            Cause.SEATS,
            1,
            0,
        )


class TestPrefixCache:
    def test_17_identical_tokens_sent_twice_hit_16(self, bench):
        b = bench(num_blocks=100)
        b.add([7] * 17)
        b.run()
        again = b.add([7] * 17)
        b.run()
        assert again.sequences[0].num_cached_tokens == 16

    def test_exactly_32_tokens_sent_twice_hit_16_because_the_last_is_always_computed(self, bench):
        b = bench(num_blocks=100)
        b.add(list(range(32)))
        b.run()
        again = b.add(list(range(32)))
        b.run()
        assert again.sequences[0].num_cached_tokens == 16

    def test_salts_separate_tenants(self, bench):
        b = bench(num_blocks=100)
        b.add([7] * 40, cache_salt="alice")
        b.run()
        other = b.add([7] * 40, cache_salt="bob")
        record = b.step()
        assert other.sequences[0].num_cached_tokens == 0
        assert "never seen" in str(record.admitted[0].prefix.cause)
        same = b.add([7] * 40, cache_salt="alice")
        b.run()
        assert same.sequences[0].num_cached_tokens == 32

    def test_a_miss_names_the_first_block_and_token_that_differ(self, bench):
        b = bench(num_blocks=100)
        b.add(list(range(48)))
        b.run()
        changed = list(range(48))
        changed[20] = 999
        b.add(changed)
        prefix = b.step().admitted[0].prefix
        assert (prefix.num_hit_tokens, prefix.block_index, prefix.position) == (16, 1, 20)
        assert (prefix.token_id, prefix.cached_token_id) == (999, 20)

    def test_reset_is_refused_while_blocks_are_held(self, bench):
        b = bench(num_blocks=100)
        b.add(40)
        b.step()
        with pytest.raises(CacheBusy, match="3 of 100"):
            b.scheduler.reset_prefix_cache()
        b.run()
        assert b.scheduler.reset_prefix_cache() > 0
        assert b.scheduler.pool.num_free == 100

    def test_hits_that_leave_no_room_for_the_rest_are_not_taken(self, bench):
        b = bench(num_blocks=6)
        b.add(list(range(33)), max_tokens=1)
        b.run()  # leaves blocks 0 and 1 cached
        b.add(48, max_tokens=2)
        b.step()  # holds three more
        late = b.add(list(range(60)), max_tokens=2)
        before = b.scheduler.pool.ref_counts.copy()
        record = b.step()
        assert record.waits[-1].seq_id == late.request.request_id
        assert record.waits[-1].cause is Cause.BLOCKS
        assert b.scheduler.pool.ref_counts[:2] == before[:2] == [0, 0]


class TestPreemption:
    def two_of_80_in_10_blocks(self, bench, **config):
        b = bench(num_blocks=10, **config)
        return b, b.add(80), b.add(80)

    def test_second_sequence_is_preempted_when_the_first_needs_a_sixth_block(self, bench):
        b, first, second = self.two_of_80_in_10_blocks(bench)
        b.step()
        assert [len(r.sequences[0].block_table) for r in (first, second)] == [5, 5]
        record = b.step()
        assert len(first.sequences[0].block_table) == 6
        assert second.sequences[0].status is Status.PREEMPTED
        assert record.preempted[0].seq_id == "req-1"
        assert record.preempted[0].in_favour_of == "req-0"
        assert record.preempted[0].num_lost_tokens == 80
        assert b.scheduler.pool.num_available == 4

    @pytest.mark.parametrize(
        "mode", [{}, {"preemption_mode": "swap", "num_host_blocks": 10}], ids=["recompute", "swap"]
    )
    def test_preemption_changes_no_output(self, bench, mode):
        b, *tight = self.two_of_80_in_10_blocks(bench, **mode)
        records = b.run()
        assert any(r.preempted for r in records)
        roomy = bench(num_blocks=1000)
        free = [roomy.add(80), roomy.add(80)]
        roomy.run()
        assert [outputs(r) for r in tight] == [outputs(r) for r in free]
        assert all(len(o) == 8 for r in tight for o in outputs(r))

    def test_swap_loses_no_computed_token(self, bench):
        b, *_ = self.two_of_80_in_10_blocks(bench, preemption_mode="swap", num_host_blocks=10)
        b.run()
        assert b.executor.num_computed == {"req-0": 87, "req-1": 87}
        assert b.scheduler.host_pool.num_free == 10

    def test_without_host_blocks_swap_falls_back_to_recompute(self, bench):
        b, *_ = self.two_of_80_in_10_blocks(bench, preemption_mode="swap", num_host_blocks=2)
        records = b.run()
        assert [p.mode for r in records for p in r.preempted] == ["recompute"]

    def test_recompute_keeps_generated_tokens_and_repeats_none(self, bench):
        b, _, second = self.two_of_80_in_10_blocks(bench)
        b.step()
        first_token = second.sequences[0].output_token_ids
        records = b.run()
        assert second.sequences[0].output_token_ids[:1] == first_token
        assert sum("req-1" in r.sampled for r in records) == 7
        # 80 + 7 of the first; of the second 80, then all 81 again but 64 cached ones, then 6.
        assert b.executor.num_computed == {"req-0": 87, "req-1": 80 + (81 - 64) + 6}

    def test_a_preempted_prompt_takes_up_no_seat_and_no_block(self, bench):
        b, _, second = self.two_of_80_in_10_blocks(bench)
        b.step()
        b.step()
        assert second.sequences[0].block_table == []
        assert b.scheduler.num_seats_taken == 1
        assert b.scheduler.waiting == second.sequences

    def test_nobody_is_admitted_into_blocks_that_were_just_taken_from_another(self, bench):
        b, *_ = self.two_of_80_in_10_blocks(bench)
        b.add(4)
        b.step()
        record = b.step()
        assert not record.admitted
        assert (record.waits[-1].cause, record.waits[-1].behind) == (Cause.PREEMPTION, "req-0")


class TestForks:
    def test_samples_share_the_prompt_and_copy_only_the_partly_filled_block(self, bench):
        b = bench(num_blocks=100)
        live = b.add(40, params=SamplingParams(n=3, max_tokens=4, seed=1))
        record = b.step()
        assert [f.child for f in record.forked] == ["req-0#1", "req-0#2"]
        assert b.scheduler.pool.num_held == 3
        record = b.step()
        assert [c.source for c in record.copied] == [2, 2], "the last holder writes in place"
        assert b.scheduler.pool.num_held == 5
        b.run()
        assert len({tuple(o) for o in outputs(live)}) == 3
        assert [len(o) for o in outputs(live)] == [4, 4, 4]
        assert b.scheduler.num_seats_taken == 0

    def test_a_full_last_block_needs_no_copy(self, bench):
        b = bench(num_blocks=100)
        b.add(32, params=SamplingParams(n=3, max_tokens=4, seed=1))
        records = b.run()
        assert not any(r.copied for r in records)

    def test_seats_are_kept_for_the_samples_to_come(self, bench):
        b = bench(num_blocks=100, max_num_seqs=3)
        b.add(40, params=SamplingParams(n=3, max_tokens=4, seed=1))
        b.add(4)
        record = b.step()
        assert list(record.scheduled) == ["req-0"]
        assert (record.waits[-1].cause, record.waits[-1].available) == (Cause.SEATS, 0)


class TestBeams:
    def reference(self, b, prompt, width, max_tokens):
        """Beam search over the fake model, written as plainly as can be."""
        from tests.core.conftest import candidates

        class Past:
            def __init__(self, tokens, request):
                self.tokens, self.request = tokens, request

        request = b.scheduler.live["req-0"].request
        beams = [([*prompt], 0.0)]
        for _ in range(max_tokens):
            grown = [
                ([*tokens, token], total + logprob)
                for tokens, total in beams
                for token, logprob in candidates(Past(tokens, request), 2 * width)
            ]
            beams = sorted(grown, key=lambda beam: -beam[1])[:width]
        return [tuple(tokens[len(prompt) :]) for tokens, _ in beams]

    @pytest.mark.parametrize("num_blocks", [100, 5])
    def test_beams_equal_a_plain_search_also_when_they_preempt_each_other(self, bench, num_blocks):
        b = bench(num_blocks=num_blocks, block_size=8, max_num_seqs=4)
        prompt = list(range(20))
        live = b.add(prompt, params=BeamSearchParams(beam_width=3, max_tokens=12))
        expected = self.reference(b, prompt, 3, 12)
        records = b.run()
        assert [h.token_ids for h in live.hypotheses] == expected
        assert any(r.preempted for r in records) == (num_blocks == 5)
        assert b.scheduler.num_seats_taken == 0
        assert b.scheduler.pool.num_held == 0

    def test_beams_that_have_every_seat_never_lose_what_they_computed(self, bench):
        b = bench(num_blocks=100, block_size=8, max_num_seqs=3)
        b.add(20, params=BeamSearchParams(beam_width=3, max_tokens=12))
        records = b.run()
        assert any(f.reason == "pruned" for r in records for f in r.finished)
        assert sum(r.num_tokens for r in records) == 20 + 3 * 11
        assert len(records) == 12

    def test_beams_share_their_common_past(self, bench):
        b = bench(num_blocks=100, block_size=8)
        b.add(64, params=BeamSearchParams(beam_width=4, max_tokens=8))
        most = max(r.num_held_blocks for r in b.run())
        assert most <= 8 + 4 * 2


class TestPolicies:
    def finishing_order(self, b):
        return [f.seq_id for r in b.run() for f in r.finished]

    def test_fcfs_admits_in_order_of_arrival(self, bench):
        b = bench(num_blocks=100, max_num_seqs=1)
        for size in (30, 10, 20):
            b.add(size)
        assert self.finishing_order(b) == ["req-0", "req-1", "req-2"]

    def test_sjf_admits_the_shortest_first(self, bench):
        b = bench("sjf", num_blocks=100, max_num_seqs=1)
        for size in (30, 10, 20):
            b.add(size)
        assert self.finishing_order(b) == ["req-1", "req-2", "req-0"]

    def test_priority_admits_the_smallest_number_first(self, bench):
        b = bench("priority", num_blocks=100, max_num_seqs=1)
        for priority in (2, 1, 1):
            b.add(10, priority=priority)
        assert self.finishing_order(b) == ["req-1", "req-2", "req-0"]

    def test_a_policy_is_any_object_with_a_rank(self, bench):
        class LongestFirst:
            def rank(self, sequence):
                return -sequence.num_prompt_tokens

        b = bench(LongestFirst, num_blocks=100, max_num_seqs=1)
        for size in (10, 30, 20):
            b.add(size)
        assert self.finishing_order(b) == ["req-1", "req-2", "req-0"]

    def test_a_new_policy_reorders_the_queue(self, bench):
        b = bench(num_blocks=100, max_num_seqs=1)
        for size in (30, 10, 20):
            b.add(size)
        b.scheduler.set_policy("sjf")
        assert self.finishing_order(b) == ["req-1", "req-2", "req-0"]

    def test_the_policy_chooses_the_victim(self, bench):
        b = bench("priority", num_blocks=10)
        b.add(80, priority=5)
        b.add(80, priority=1)
        b.step()
        assert b.step().preempted[0].seq_id == "req-0"


class TestRunningOrder:
    def test_a_running_sequence_without_budget_says_so_and_goes_on_later(self, bench):
        b = bench(num_blocks=100, max_num_batched_tokens=8)
        for _ in range(10):
            b.add(1, max_tokens=4)
        b.step()
        b.step()
        record = b.step()
        starved = [w.seq_id for w in record.waits if w.cause is Cause.TOKEN_BUDGET]
        assert starved == ["req-8"], "8 run; the head of the queue finds no token left"
        b.run()

    def test_a_dynamic_policy_is_asked_in_every_step(self, bench):
        class Favourite:
            dynamic = True
            name = "req-0"

            def rank(self, sequence):
                return sequence.seq_id != self.name

        policy = Favourite()
        b = bench(policy, num_blocks=100, max_num_seqs=1)
        for _ in range(4):
            b.add(1, max_tokens=2)
        b.step()
        policy.name = "req-2"
        records = b.run()
        assert [a.seq_id for r in records for a in r.admitted] == ["req-2", "req-1", "req-3"]


class TestPoliciesThatFail:
    """A policy is a user's code: what it raises changes nothing."""

    class Fickle:
        dynamic = True
        rank_of: ClassVar[dict[str, Any]] = {}

        def rank(self, sequence):
            rank = self.rank_of.get(sequence.seq_id, 0)
            if isinstance(rank, Exception):
                raise rank
            return rank

    def state(self, b):
        s = b.scheduler
        return list(s.waiting), list(s.running), [q.order for q in s.waiting + s.running], s.policy

    @pytest.mark.parametrize("num_seqs", [1, 8])
    @pytest.mark.parametrize("rank", ["a string", ValueError("no rank")])
    def test_add_raises_and_leaves_no_trace(self, bench, rank, num_seqs):
        policy = self.Fickle()
        policy.rank_of = {"req-1": rank, "req-2": rank}
        b = bench(policy, num_blocks=100, max_num_seqs=num_seqs)
        b.add(4)
        with pytest.raises((TypeError, ValueError)):
            b.add(4)
        b.step()  # the next has only running ones to compare with
        with pytest.raises((TypeError, ValueError)):
            b.add(4)
        assert list(b.scheduler.live) == ["req-0"] and not b.scheduler.waiting
        b.run()

    @pytest.mark.parametrize("rank", ["a string", ValueError("no rank")])
    def test_set_policy_raises_and_the_old_one_stays_in_force(self, bench, rank):
        policy = self.Fickle()
        policy.rank_of = {"req-0": 7, "req-2": rank}
        b = bench(num_blocks=100, max_num_seqs=2)
        for _ in range(4):
            b.add(4)
        b.step()
        before = self.state(b)
        with pytest.raises((TypeError, ValueError)):
            b.scheduler.set_policy(policy)
        assert self.state(b) == before
        b.run()

    @pytest.mark.parametrize("rank", ["a string", ValueError("no rank")])
    def test_a_step_in_which_it_raises_is_taken_back(self, bench, rank):
        policy = self.Fickle()
        b = bench(policy, num_blocks=100, max_num_seqs=2)
        for _ in range(4):
            b.add(4)
        b.step()
        before = self.state(b)
        policy.rank_of = {"req-2": rank}
        with pytest.raises((TypeError, ValueError)) as error:
            b.scheduler.schedule()
        assert b.scheduler.take_back(error.value).error
        assert self.state(b) == before
        policy.rank_of = {}
        b.run()


class TestLimits:
    @pytest.mark.parametrize("size", [8, 16, 32, 64, 128, 256])
    def test_block_sizes(self, bench, size):
        b = bench(num_blocks=4, block_size=size)
        b.add([7] * (2 * size + 1), max_tokens=4)
        assert [len(m.blocks) for m in b.step().allocated] == [3]
        b.run()
        again = b.add([7] * (2 * size + 1), max_tokens=4)
        b.run()
        assert again.sequences[0].num_cached_tokens == 2 * size

    def test_blocks_hold_16_tokens_unless_told_otherwise(self):
        assert SchedulerConfig(num_blocks=1).block_size == 16

    def test_without_chunking_a_request_must_fit_one_step_even_when_it_is_recomputed(self, bench):
        b = bench(num_blocks=100, max_num_batched_tokens=64, enable_chunked_prefill=False)
        with pytest.raises(RequestTooLarge, match="may come to 65 tokens") as refusal:
            b.add(60, max_tokens=6)
        assert (refusal.value.needed, refusal.value.available) == (65, 64)
        b.add(60, max_tokens=5)
        b.run()

    def test_an_empty_prompt_is_refused(self, bench):
        with pytest.raises(InvalidRequest, match="empty"):
            bench(num_blocks=100).add([])

    @pytest.mark.parametrize("mode", ["recompute", "swap"])
    @pytest.mark.parametrize("moment", range(14))
    def test_abort_at_any_moment_frees_all_it_held_and_disturbs_nobody(self, bench, moment, mode):
        """Samples, beams and plain requests in few blocks: some wait, some are swapped out."""

        def begin():
            b = bench(num_blocks=9, block_size=8, preemption_mode=mode, num_host_blocks=6)
            kinds = [
                SamplingParams(n=3, max_tokens=9, seed=1),
                BeamSearchParams(beam_width=2, max_tokens=9),
                SamplingParams(max_tokens=9),
            ]
            return b, [b.add(20, params=params) for params in kinds]

        calm, expected = begin()
        calm.run()
        for victim in range(3):
            b, lives = begin()
            for _ in range(moment):
                if b.scheduler.has_work:
                    b.step()
            name = f"req-{victim}"
            if name in b.scheduler.live:
                ended = b.scheduler.abort(name)
                assert {seq.finish_reason for seq in ended} == {"abort"}
                held = {x for s in b.scheduler.running for x in s.block_table}
                assert b.scheduler.pool.num_held == len(held)
            b.run()
            assert b.scheduler.pool.num_held == b.scheduler.host_pool.num_held == 0
            for k in {0, 2} - {victim}:
                assert outputs(lives[k]) == outputs(expected[k])

    @pytest.mark.parametrize("request_id", ["req-0", "a#1"])
    def test_an_id_in_use_or_like_that_of_a_sample_is_refused(self, bench, request_id):
        b = bench(num_blocks=100)
        b.add(4)
        with pytest.raises(InvalidRequest, match="choose another"):
            b.add(4, request_id=request_id)
        assert len(b.scheduler.waiting) == 1

    def test_a_request_that_can_never_fit_is_refused_with_the_numbers(self, bench):
        b = bench(num_blocks=4)
        with pytest.raises(RequestTooLarge, match=r"needs 5 blocks.*there are 4") as refusal:
            b.add(60, max_tokens=6)
        assert (refusal.value.needed, refusal.value.available) == (5, 4)
        b.add(60, max_tokens=5)  # 64 computed tokens: the last one is sampled only
        b.run()

    def test_more_samples_than_seats_are_refused(self, bench):
        b = bench(num_blocks=40, max_num_seqs=2)
        with pytest.raises(RequestTooLarge, match="3 sequences"):
            b.add(4, params=SamplingParams(n=3, seed=1))

    def test_abort_frees_everything_at_any_moment(self, bench):
        b = bench(num_blocks=10)
        b.add(80)
        b.add(80)
        b.add(80)
        b.step()
        for name in ("req-0", "req-2"):  # one running, one waiting
            b.scheduler.abort(name)
        b.run()
        assert b.scheduler.pool.num_held == 0
        with pytest.raises(UnknownRequest):
            b.scheduler.abort("req-0")

    def test_a_name_may_be_taken_again_as_soon_as_its_owner_has_ended(self, bench):
        b = bench(num_blocks=10)
        b.add(20)
        b.step()
        b.scheduler.abort("req-0")
        b.add(8, max_tokens=1, request_id="req-0")
        record = b.step()
        assert [r.request_id for r in record.added] == ["req-0"]
        assert [(f.seq_id, f.reason) for f in record.finished] == [
            ("req-0", "abort"),
            ("req-0", "length"),
        ]

    def test_stop_token_ends_a_sequence_and_frees_its_blocks_at_once(self, bench):
        probe = bench(num_blocks=100)
        live = probe.add([1, 2, 3])
        probe.run()
        third = live.sequences[0].output_token_ids[2]
        b = bench(num_blocks=100)
        live = b.add([1, 2, 3], stop_token_ids=frozenset({third}))
        records = b.run()
        assert len(records) == 3
        assert live.sequences[0].finish_reason == "stop"
        assert records[-1].num_held_blocks == 0


class TestFaults:
    def test_a_swap_that_was_taken_back_is_recorded_as_lost(self, bench):
        b = bench(num_blocks=10, preemption_mode="swap", num_host_blocks=10)
        b.add(80)
        second = b.add(80)
        b.step()
        b.scheduler.schedule()
        record = b.scheduler.take_back(RuntimeError("out of memory"))
        lost = {p.seq_id: p.num_lost_tokens for p in record.preempted if p.mode == "error"}
        assert lost == {"req-1": 80, "req-0": 80}
        assert second.sequences[0].host_blocks == []
        assert b.scheduler.host_pool.num_held == 0
        b.run()

    def test_beams_survive_a_commit_that_raises(self, bench):
        b = bench(num_blocks=100)
        live = b.add([1, 2, 3], params=BeamSearchParams(beam_width=2, max_tokens=4))
        b.add(4)
        output = b.executor.execute(b.scheduler.schedule())
        output.samples["req-1"] = None
        with pytest.raises(TypeError) as error:
            b.scheduler.commit(output)
        b.scheduler.take_back(error.value)
        b.run()
        calm = bench(num_blocks=100)
        expected = calm.add([1, 2, 3], params=BeamSearchParams(beam_width=2, max_tokens=4))
        calm.run()
        assert [h.token_ids for h in live.hypotheses] == [h.token_ids for h in expected.hypotheses]

    @pytest.mark.parametrize("failing", ["req-0", "req-0#1"])
    def test_an_error_of_one_beam_ends_its_siblings_in_the_same_step(self, bench, failing):
        b = bench(num_blocks=100, block_size=8)
        beams = b.add(15, params=BeamSearchParams(beam_width=2, max_tokens=12))
        other = b.add(15, max_tokens=3)
        b.step()
        plan = b.scheduler.schedule()  # position 15: a block is full when this step is done
        output = b.executor.execute(plan)
        output.errors[failing] = ValueError("not a number")
        b.scheduler.commit(output)
        b.scheduler.seal(Phases())
        assert {seq.finish_reason for seq in beams.sequences} == {"error"}
        b.run()
        assert other.sequences[0].finish_reason == "length"
        assert b.scheduler.pool.num_held == 0

    def test_a_step_that_fails_is_taken_back_and_loses_nothing(self, bench):
        b = bench(num_blocks=100)
        live = b.add(40, params=SamplingParams(n=2, max_tokens=6, seed=3))
        b.step()
        b.scheduler.schedule()
        record = b.scheduler.take_back(RuntimeError("out of memory"))
        assert record.error == "RuntimeError: out of memory"
        assert {p.mode for p in record.preempted} == {"error"}
        b.scheduler.pool.check_integrity()
        b.run()
        calm = bench(num_blocks=100)
        expected = calm.add(40, params=SamplingParams(n=2, max_tokens=6, seed=3))
        calm.run()
        assert outputs(live) == outputs(expected)


class TestState:
    def test_a_copy_of_the_scheduler_goes_on_alone_and_to_the_same_end(self, bench):
        """State is explicit: what a copy does touches nothing of the original."""
        b = bench(num_blocks=9, block_size=8, preemption_mode="swap", num_host_blocks=6)
        b.add(20, params=SamplingParams(n=3, max_tokens=9, seed=1))
        b.add(20, params=BeamSearchParams(beam_width=2, max_tokens=9))
        for _ in range(4):
            b.step()
        twin = copy.deepcopy(b)
        first = [r.sampled for r in twin.run()]
        second = [r.sampled for r in b.run()]
        assert first == second and first

    def test_records_of_equal_runs_are_equal(self, bench):
        def records():
            b = bench(num_blocks=10)
            b.scheduler.clock = iter(range(100)).__next__
            b.add(80)
            b.add(80)
            return b.run()

        assert records() == records()

    def test_a_record_reads_as_a_sentence(self, bench):
        b = bench(num_blocks=10)
        b.add(80)
        b.add(80)
        b.step()
        record = b.step()
        assert str(record) == (
            "step 2: 1/2048 tokens; req-0 1; preempted req-1 for req-0 (recompute, 80 tokens lost);"
            " req-1 computed nothing: blocks ran out in this step (req-0 needed some), so nobody was "
            "admitted"
        )
        assert "req-1" in record._repr_html_()

    def test_one_that_finds_no_block_itself_is_told_of_once(self, bench):
        b = bench(num_blocks=11)
        b.add(90, max_tokens=40)
        b.add(80, max_tokens=40)
        b.step()
        assert str(b.step()).endswith(
            "preempted req-1 when no block was left for it (recompute, 80 tokens lost); "
            "req-1 computed nothing: needs 1 block, 0 available"
        )


class TestRewind:
    def test_all_who_ran_are_computed_again_in_one_step_if_they_fit(self, recorded):
        """Those who lost their blocks to the rewind did not lose them for want of blocks."""
        b = recorded(num_blocks=100)
        for _ in range(3):
            b.add(20, max_tokens=9)
        b.step()
        b.step()
        b.scheduler.rewind(b.history.state_at(1))
        record = b.step()
        assert record.scheduled == {"req-0": 5, "req-1": 5, "req-2": 5}, "16 are in the cache"
        assert not record.waits
