"""What would have happened: forks of lives that did happen, and whole simulated runs."""

from __future__ import annotations

import dataclasses
from random import Random

import pytest

from nbengine.core import simulate as module
from nbengine.core.fake_device import FakeDevice, pasts
from nbengine.core.lives import Faults, Life
from nbengine.core.records import Phases
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams
from nbengine.core.scheduler import SchedulerConfig
from nbengine.core.simulate import StepTime, fork, simulate
from nbengine.core.trace import Trace, TracedOutput, TracedRequest
from nbengine.errors import InvalidField, UnknownStep


@pytest.fixture
def live(monkeypatch):
    """A whole life in which nothing fails or is rewound, and its policy in each step."""
    monkeypatch.setattr(Faults, "draw", classmethod(lambda cls, rng: cls()))
    monkeypatch.setattr(Life, "_rewind", lambda self: None)

    def live(seed):
        policies = {}

        def watch(life, record):
            policies[record.step] = life.scheduler.policy

        return Life(seed, watch).run(), policies

    return live


def timeless(records):
    return [dataclasses.replace(record, time=0.0, phases=Phases()) for record in records]


def steps_until_first_token(run):
    """Request id to the step in which its first token came."""
    first = {}
    for record in run:
        for seq_id in record.sampled:
            first.setdefault(seq_id, record.step)
    return first


class TestFork:
    def test_with_nothing_changed_what_did_happen_happens_again(self, live):
        """At any step of any life, beams and swapped ones too: the records are the same."""
        num_forks = num_steps = 0
        seen = set()
        for seed in range(100):
            life, policies = live(seed)
            real = timeless(life.history)
            for k in {0, *Random(seed).choices(range(len(real)), k=2)}:
                policy = policies[k + 1]
                if k and policies[k] is not policy:
                    continue  # it changed just then, and the ranks are told once more
                unchanged = [r for r in real[k:] if policies[r.step] is policy]
                forked = timeless(fork(life.history, k, life.config, policy))
                num_same = min(len(forked), len(unchanged))
                assert forked[:num_same] == unchanged[:num_same], (seed, k)
                if len(unchanged) == len(real) - k:
                    assert not any(r.scheduled for r in unchanged[num_same:]), (seed, k)
                num_forks, num_steps = num_forks + 1, num_steps + num_same
                for record in forked:
                    for event in ("candidates", "copied", "swapped_in", "evicted", "forked"):
                        seen |= {event} if getattr(record, event) else set()
                    seen |= {finish.reason for finish in record.finished}
                    seen |= {"reset" for move in record.released if not move.seq_id}
        assert num_forks > 200 and num_steps > 3000
        assert seen == {
            *("candidates", "copied", "swapped_in", "evicted", "forked", "reset"),
            *("stop", "length", "abort", "pruned"),
        }

    def test_with_other_numbers_every_block_still_holds_what_its_reader_expects(
        self, live, monkeypatch
    ):
        """The fake device, filled as the state at the fork says, sees each wrong block."""
        execute = module._Run._execute
        seen = set()

        def checked(run, plan):
            scheduler = run.scheduler
            if not hasattr(scheduler, "device"):
                scheduler.device = FakeDevice(scheduler.config)
                fill(scheduler.device, run.history.state_at(scheduler.step_count))
            scheduler.pool.check_integrity()
            scheduler.host_pool.check_integrity()
            assert scheduler.num_seats_taken <= scheduler.config.max_num_seqs
            scheduler.device.execute(plan)
            return execute(run, plan)

        class Scheduler(module.Scheduler):
            """With a place for its device."""

        monkeypatch.setattr(module, "Scheduler", Scheduler)
        monkeypatch.setattr(module._Run, "_execute", checked)
        for seed in range(150):
            life, _ = live(seed)
            rng, config, history = Random(seed), life.config, life.history
            k = rng.randrange(1 + len(history) // 2)
            changes = {
                "num_blocks": config.num_blocks * rng.choice([2, 3, 8]) // 4,
                "max_num_seqs": rng.choice([1, config.max_num_seqs, 20]),
                "max_num_batched_tokens": rng.choice([3, config.max_num_batched_tokens]),
                "num_host_blocks": rng.choice([0, 2, 50]),
                "preemption_mode": rng.choice(["recompute", "swap"]),
                "enable_prefix_caching": rng.random() < 0.7,
            }
            policy = rng.choice(["fcfs", "sjf", "priority"])
            changed = fork(history, k, config, policy, max_steps=5000, **changes)
            assert changed.end in ("finished", "unknown token"), seed
            for record in changed:
                changed.history.state_at(record.step)  # the records follow from each other
                seen |= {f"preempted by {p.mode}" for p in record.preempted}
            seen |= {"refused"} if changed.refused else set()
        assert seen == {
            *("preempted by fork", "preempted by swap", "preempted by recompute", "refused"),
        }

    def test_whatever_failed_in_truth_the_fork_goes_on_to_its_end(self):
        """Steps that failed, sequences that ended in error, rewinds: none of it happens again."""
        num_errors = 0
        for seed in range(80):
            life = Life(seed).run()
            k = Random(seed).randrange(len(life.history))
            forked = fork(life.history, k, life.config, "fcfs", max_steps=10_000)
            assert forked.end == "finished", seed
            assert not any(record.error for record in forked)
            num_errors += sum(f.reason == "error" for r in forked for f in r.finished)
        assert num_errors, "a sequence that failed ends in error where its tokens do"

    def test_a_fork_leaves_the_run_that_it_was_made_from_alone(self, recorded):
        b = recorded(num_blocks=10)
        b.add(80, max_tokens=30)
        b.add(70, max_tokens=30)
        for _ in range(8):
            b.step()
        before = b.history.state_at(8).snapshot()
        fork(b.history, 4, b.scheduler.config, "sjf", num_blocks=8)
        assert b.history.state_at(8).snapshot() == before
        assert [seq.num_computed_tokens for seq in b.scheduler.running] == [87]

    def test_two_prompts_of_80_need_not_preempt_each_other_in_12_blocks(self, recorded):
        """In 10 blocks both start with 5, and the second is preempted for the first's sixth."""
        b = recorded(num_blocks=10)
        b.add(80, max_tokens=10)
        b.add(80, max_tokens=10)
        b.run()
        assert [r.step for r in b.history if r.preempted] == [2]
        larger = fork(b.history, 1, b.scheduler.config, "fcfs", num_blocks=12)
        assert not any(r.preempted for r in larger)
        assert [r.step for r in larger] == list(range(2, 11)), "10 tokens each, in 10 steps"
        assert larger.history[2].allocated[0].blocks == (10,), "the new blocks come last"
        assert larger.end == "finished"

    def test_with_fewer_blocks_the_cached_go_first_and_then_the_last_that_runs(self, recorded):
        b = recorded(num_blocks=20)
        b.add(48, max_tokens=1)  # leaves 3 cached blocks
        b.step()
        b.add(64, max_tokens=9)
        b.add(64, max_tokens=9)
        b.step()
        before = b.history.state_at(2)
        assert (len(before.cached), sum(before.ref_counts)) == (3, 8)
        b.run()

        nine = fork(b.history, 2, b.scheduler.config, "fcfs", num_blocks=9).history.state_at(2)
        (kept,) = nine.cached
        oldest_first = list(before.cached)
        assert nine.contents[kept] == before.contents[oldest_first[-1]]
        assert [seq.seq_id for seq in nine.running] == ["req-1", "req-2"]

        seven = fork(b.history, 2, b.scheduler.config, "fcfs", num_blocks=7)
        state = seven.history.state_at(2)
        assert [seq.seq_id for seq in state.running] == ["req-1"]
        assert sorted(state.contents) == list(range(7)), "3 blocks of req-2's are still cached"
        (lost, *_) = seven.history[3].preempted
        assert (lost.seq_id, lost.mode, lost.num_lost_tokens) == ("req-2", "fork", 64)

    def test_blocks_that_others_share_are_not_gained_by_a_preemption(self, recorded):
        """Three samples share 4 blocks and have one each: in 5 blocks one of them can run."""
        b = recorded(num_blocks=20)
        b.add(64, params=SamplingParams(n=3, max_tokens=9))
        b.run()
        assert [r.num_held_blocks for r in b.history][:2] == [4, 7]
        five = fork(b.history, 2, b.scheduler.config, "fcfs", num_blocks=5)
        assert [seq.seq_id for seq in five.history.state_at(2).running] == ["req-0"]
        assert five.end == "finished"

    def test_seats_kept_for_samples_are_gained_by_a_preemption(self, recorded):
        b = recorded(num_blocks=100, max_num_batched_tokens=64)
        b.add(20, max_tokens=9)
        b.add(20, max_tokens=9)
        b.add(90, params=SamplingParams(n=3, max_tokens=9))  # 5 seats, in the middle of its prompt
        b.run()
        three = fork(b.history, 1, b.scheduler.config, "fcfs", max_num_seqs=3)
        running = three.history.state_at(1).running
        assert [seq.seq_id for seq in running] == ["req-0", "req-1"]

    def test_what_was_swapped_out_and_finds_no_room_is_computed_again(self, recorded):
        """Swapped out are req-2, into host blocks 0 to 3, and then req-1, into 4 to 9."""
        b = recorded(num_blocks=12, preemption_mode="swap", num_host_blocks=10)
        for _ in range(3):
            b.add(60, max_tokens=60)
        b.run()
        k = next(r.step for r in b.history if r.preempted and r.preempted[0].seq_id == "req-1")
        waiting = b.history.state_at(k).waiting
        assert [seq.host_blocks for seq in waiting] == [[4, 5, 6, 7, 8, 9], [0, 1, 2, 3]]
        six = fork(b.history, k, b.scheduler.config, "fcfs", num_host_blocks=6)
        one, two = six.history.state_at(k).waiting
        assert (one.host_blocks, one.num_computed_tokens) == ([4, 5, 0, 1, 2, 3], 96)
        assert (two.host_blocks, two.num_computed_tokens) == ([], 0)
        assert six.end == "finished"

    def test_new_blocks_are_handed_out_after_the_free_ones(self, recorded):
        b = recorded(num_blocks=6)
        b.add(40, max_tokens=2)
        b.run()
        free = list(b.history.state_at(1).free)
        larger = fork(b.history, 1, b.scheduler.config, "fcfs", num_blocks=8)
        assert list(larger.history.state_at(1).free) == [7, 6, *free]

    def test_with_fewer_seats_the_last_that_runs_waits(self, recorded):
        b = recorded(num_blocks=100)
        for _ in range(3):
            b.add(20, max_tokens=4)
        b.run()
        one = fork(b.history, 1, b.scheduler.config, "fcfs", max_num_seqs=1)
        assert [list(r.scheduled) for r in one][:4] == [["req-0"]] * 3 + [["req-1"]]
        assert one.end == "finished"

    def test_who_can_never_fit_is_refused_with_the_numbers(self, recorded):
        b = recorded(num_blocks=20)
        b.add(200, max_tokens=9)  # 13 blocks
        b.add(20, max_tokens=9)
        b.step()
        b.add(170, max_tokens=9)  # 12 blocks
        b.run()
        small = fork(b.history, 1, b.scheduler.config, "fcfs", num_blocks=5)
        assert [(r.request_id, r.needed, r.available) for r in small.refused] == [
            ("req-0", 13, 5),
            ("req-2", 12, 5),
        ]
        assert {seq for r in small for seq in r.scheduled} == {"req-1"}
        assert "req-2 needs 12 blocks" in repr(small)

    def test_another_policy_ranks_those_too_who_have_waited_before(self, recorded):
        b = recorded(num_blocks=100, max_num_seqs=1)
        for length in (40, 30, 20):
            b.add(length, max_tokens=3)
        b.run()
        fair = fork(b.history, 1, b.scheduler.config, "fcfs")
        sjf = fork(b.history, 1, b.scheduler.config, "sjf")
        assert list(steps_until_first_token(fair)) == ["req-0", "req-1", "req-2"]
        assert list(steps_until_first_token(sjf)) == ["req-0", "req-2", "req-1"]

    def test_it_ends_where_the_tokens_of_an_unfinished_request_are_no_longer_known(self, recorded):
        b = recorded(num_blocks=100, max_num_batched_tokens=16)
        b.add(32, max_tokens=100)
        for _ in range(6):  # two chunks; tokens in steps 2 to 6
            b.step()
        faster = fork(b.history, 0, b.scheduler.config, "fcfs", max_num_batched_tokens=64)
        assert faster.end == "unknown token"
        assert [len(r.sampled) for r in faster] == [1] * 5, "5 tokens were known, one step earlier"

    def test_a_request_that_was_aborted_ends_where_its_tokens_do(self, recorded):
        b = recorded(num_blocks=100, max_num_batched_tokens=16)
        b.add(32, max_tokens=100)
        b.add(8, max_tokens=30)
        for _ in range(6):
            b.step()
        b.scheduler.abort("req-0")
        b.run()
        same = fork(b.history, 0, b.scheduler.config, "fcfs")
        assert not same.cut_short
        faster = fork(b.history, 0, b.scheduler.config, "fcfs", max_num_batched_tokens=64)
        assert faster.cut_short == ("req-0",)
        (finish,) = next(r.finished for r in faster if r.finished)
        assert (finish.seq_id, finish.reason) == ("req-0", "abort")
        assert faster.end == "finished"

    def test_beams_of_an_aborted_request_end_together(self, recorded):
        b = recorded(num_blocks=100, max_num_batched_tokens=16)
        b.add(32, params=BeamSearchParams(beam_width=2, max_tokens=50))
        for _ in range(5):
            b.step()
        b.scheduler.abort("req-0")
        b.add(5, max_tokens=1)
        b.step()
        faster = fork(b.history, 0, b.scheduler.config, "fcfs", max_num_batched_tokens=64)
        ended = [f for r in faster for f in r.finished if f.seq_id != "req-1"]
        assert {f.reason for f in ended} - {"pruned"} == {"abort"}
        assert faster.end == "finished"

    def test_a_beam_whose_candidates_are_known_ends_with_one_whose_are_not(self, recorded):
        """With a budget of 1, the search is aborted between its two beams."""
        b = recorded(num_blocks=100, max_num_batched_tokens=1)
        b.add(3, params=BeamSearchParams(beam_width=2, max_tokens=50))
        b.add(1, max_tokens=1)
        for _ in range(4):
            b.step()
        assert [len(r.candidates) for r in b.history] == [0, 0, 1, 1]
        b.scheduler.abort("req-0")
        b.run()
        faster = fork(b.history, 0, b.scheduler.config, "fcfs", max_num_batched_tokens=64)
        ended = {f.reason for r in faster for f in r.finished if f.seq_id != "req-1"}
        assert ended == {"abort"}

    def test_a_stop_string_ends_a_sequence_where_it_did(self, recorded):
        """The scheduler knows nothing of text: an engine ends the sequence after the step."""
        b = recorded(num_blocks=100)
        live = b.add(20, params=SamplingParams(max_tokens=50, stop="x"))
        b.step()
        plan = b.scheduler.schedule()
        b.scheduler.commit(b.executor.execute(plan))
        b.scheduler.finish(live.sequences[0], "stop", "x")
        b.history.append(b.scheduler.seal(Phases()))
        again = fork(b.history, 0, b.scheduler.config, "fcfs")
        assert timeless(again) == timeless(b.history)
        assert again.history[-1].finished[0].stop_reason == "x"

    def test_a_name_that_is_still_in_use_gets_another(self, recorded):
        b = recorded(num_blocks=100, max_num_batched_tokens=64)
        b.add(64, max_tokens=1, request_id="chat")
        b.step()
        b.add(10, max_tokens=1, request_id="chat")
        b.run()
        slower = fork(b.history, 0, b.scheduler.config, "fcfs", max_num_batched_tokens=32)
        assert [f.seq_id for r in slower for f in r.finished] == ["chat", "chat~1"]

    def test_a_fork_can_be_forked(self, recorded):
        b = recorded(num_blocks=10)
        b.add(80, max_tokens=10)
        b.add(80, max_tokens=10)
        b.run()
        larger = fork(b.history, 0, b.scheduler.config, "fcfs", num_blocks=12)
        smaller = fork(larger.history, 5, larger.config, "fcfs", num_blocks=10)
        assert [p.seq_id for r in smaller for p in r.preempted][:1] == ["req-1"]
        again = fork(larger.history, 5, larger.config, "fcfs")
        assert timeless(again) == timeless(larger)[5:]

    @pytest.mark.parametrize(
        ("changes", "problem"),
        [
            ({"num_blocks": 0}, "num_blocks=0: must be an integer, at least 1"),
            ({"max_num_seqs": 2.5}, "max_num_seqs=2.5: must be an integer"),
            ({"block_size": 8}, "lies in blocks of 16"),
            ({"budget": 8}, "budget=8: the numbers are num_blocks, block_size"),
            ({"preemption_mode": "drop"}, "must be one of"),
            ({"enable_chunked_prefill": 1}, "must be True or False"),
            ({"max_steps": 0}, "must be positive"),
        ],
    )
    def test_numbers_that_cannot_be_are_named(self, recorded, changes, problem):
        b = recorded(num_blocks=10)
        b.add(8)
        b.run()
        with pytest.raises(InvalidField, match=problem):
            fork(b.history, 1, b.scheduler.config, "fcfs", **changes)

    def test_a_step_that_the_history_does_not_reach_is_unknown(self, recorded):
        b = recorded(num_blocks=10)
        b.add(8)
        b.run()
        with pytest.raises(UnknownStep, match="no state after step 99"):
            fork(b.history, 99, b.scheduler.config, "fcfs")


def fill(device, state):
    """Write what `state` says that the blocks hold."""
    size = device.size
    for seq in state.sequences.values():
        known = pasts(seq.tokens, seq.request.cache_salt)[: seq.num_computed_tokens]
        table, memory = (seq.block_table, device.kv) if seq.block_table else (
            seq.host_blocks, device.host,
        )  # fmt: skip
        for i, past in enumerate(known if table else ()):
            memory[table[i // size] * size + i % size] = past
    for block, content in state.contents.items():
        tokens, each = [], content
        while each is not None:
            tokens[:0], each = each.token_ids, each.parent
        whole = pasts(tokens, content.salt)[-size:]
        slots = slice(block * size, (block + 1) * size)
        assert device.kv[slots] in ([None] * size, whole), "a block of two contents"
        device.kv[slots] = whole


def request(name, arrival_step, prompt, output, **fields):
    """Of so many prompt and output tokens."""
    max_tokens = fields.pop("max_tokens", output)
    reason = "length" if max_tokens == output else "stop"
    return TracedRequest(
        request_id=name,
        arrival_step=arrival_step,
        num_prompt_tokens=prompt,
        outputs=(TracedOutput(num_tokens=output, finish_reason=reason),),
        max_tokens=max_tokens,
        **fields,
    )


class TestSimulate:
    def test_a_trace_of_a_life_is_lived_again_step_by_step(self, live, monkeypatch):
        """Not the same tokens, but all that they decide: who computes how many, who waits and why,
        who hits how much of the prefix cache, what is evicted, and when all end."""
        monkeypatch.setattr(Life, "_reset_prefix_cache", lambda self: None)
        num_lives = 0
        seen = set()
        for seed in range(250):
            life, policies = live(seed)
            policy, *others = {id(p): p for p in policies.values()}.values()
            added = [request for record in life.history for request in record.added]
            beams = any(isinstance(r.params, BeamSearchParams) for r in added)
            if others or beams or any(r.arrival >= 100 for r in added):
                continue  # traces keep neither changes of the policy, candidates, nor odd ranks
            again = simulate(Trace.of(life.history), life.config, policy)
            told, real = list(map(decisions, again)), list(map(decisions, life.history))
            assert told == real[: len(told)], seed
            assert not any(scheduled for scheduled, *_ in real[len(told) :]), seed
            num_lives += 1
            for record in again:
                seen |= {finish.reason for finish in record.finished}
                for event in ("preempted", "evicted", "forked", "shared"):
                    seen |= {event} if getattr(record, event) else set()
        assert num_lives > 50
        assert seen == {
            *("stop", "length", "abort", "preempted", "evicted", "forked", "shared"),
        }

    def test_sjf_lets_the_short_one_pass(self):
        trace = Trace(
            requests=(request("a", 1, 20, 4), request("b", 1, 20, 9), request("c", 2, 20, 2))
        )
        fcfs = simulate(trace, num_blocks=100, max_num_seqs=1)
        sjf = simulate(trace, num_blocks=100, max_num_seqs=1, policy="sjf")
        assert steps_until_first_token(fcfs) == {"a": 1, "b": 5, "c": 14}
        assert steps_until_first_token(sjf) == {"a": 1, "c": 5, "b": 7}
        assert (fcfs.policy, len(fcfs), fcfs.end) == ("fcfs", 15, "finished")

    def test_sjf_ranks_by_what_was_asked_for_and_not_by_what_it_came_to(self):
        trace = Trace(
            requests=(
                request("first", 1, 20, 3),
                request("asks for 500", 1, 20, 2, max_tokens=500),
                request("asks for 9", 1, 20, 9),
            )
        )
        sjf = simulate(trace, None, "sjf", num_blocks=100, max_num_seqs=1)
        assert list(steps_until_first_token(sjf)) == ["first", "asks for 9", "asks for 500"]
        ended = {f.seq_id: f.reason for r in sjf for f in r.finished}
        assert ended == {"first": "length", "asks for 9": "length", "asks for 500": "stop"}

    def test_a_policy_may_be_a_class_written_in_a_cell(self):
        class LongestFirst:
            def rank(self, sequence):
                return -sequence.num_prompt_tokens

        trace = Trace(requests=(request("a", 1, 20, 1), request("b", 1, 30, 1)))
        simulated = simulate(trace, None, LongestFirst, num_blocks=100, max_num_seqs=1)
        assert list(steps_until_first_token(simulated)) == ["b", "a"]
        assert simulated.policy == "LongestFirst"

    def test_what_can_never_fit_is_reported_and_stops_nothing(self):
        trace = Trace(requests=(request("large", 1, 200, 9), request("small", 1, 20, 9)))
        simulated = simulate(trace, num_blocks=5)
        ((name, reason, needed, available),) = simulated.refused
        assert (name, needed, available) == ("large", 13, 5)
        assert "large needs 13 blocks of 16 tokens" in reason
        assert [f.seq_id for r in simulated for f in r.finished] == ["small"]
        assert simulated.end == "finished"

    def test_steps_without_work_pass_until_the_next_arrival(self):
        trace = Trace(requests=(request("a", 1, 20, 2), request("b", 6, 20, 1)))
        simulated = simulate(trace, num_blocks=100)
        assert [list(r.scheduled) for r in simulated] == [["a"], ["a"], [], [], [], ["b"]]

    def test_by_time_requests_arrive_during_the_steps_before(self):
        """Steps of 1 s and 0.1 s a token: the first takes 3 s, in which b arrives, and c does not."""
        trace = Trace(
            requests=(
                request("a", 1, 20, 3, arrival_time=0.0),
                request("b", 1, 10, 1, arrival_time=2.9),
                request("c", 1, 10, 1, arrival_time=60.0),
            )
        )
        simulated = simulate(trace, num_blocks=100, step_time=(1, 0.1))
        assert [r.scheduled for r in simulated] == [
            {"a": 20}, {"a": 1, "b": 10}, {"a": 1}, {"c": 10},
        ]  # fmt: skip
        assert [r.time for r in simulated] == pytest.approx([0.0, 3.0, 5.1, 60.0])
        assert [r.phases.total for r in simulated] == pytest.approx([3.0, 2.1, 1.1, 2.0])

    def test_time_does_not_go_back_when_a_request_came_in_the_last_step_of_all_others(self):
        trace = Trace(
            requests=(
                request("a", 1, 20, 1, arrival_time=0.0),
                request("b", 1, 10, 1, arrival_time=2.5),
            )
        )
        simulated = simulate(trace, num_blocks=100, step_time=(1, 0.1))
        assert [r.time for r in simulated] == pytest.approx([0.0, 3.0])

    def test_a_prompt_that_is_scored_takes_nothing_from_the_cache(self):
        scored = dataclasses.replace(request("b", 2, 40, 1), hash_ids=(0, 1), scores_prompt=True)
        plain = dataclasses.replace(scored, request_id="c", scores_prompt=False)
        first = dataclasses.replace(request("a", 1, 40, 1), hash_ids=(0, 1))
        simulated = simulate(Trace(requests=(first, scored, plain)), num_blocks=100)
        assert [a.prefix.num_hit_tokens for r in simulated for a in r.admitted] == [0, 0, 32]

    def test_max_steps_bounds_it(self):
        trace = Trace(requests=(request("a", 1, 20, 50),))
        simulated = simulate(trace, max_steps=7, num_blocks=100)
        assert (len(simulated), simulated.end) == (7, "max_steps")

    def test_beams_take_as_many_rounds_as_they_did(self):
        trace = Trace(
            requests=(
                request("stopped", 1, 20, 5, max_tokens=30, beam_width=3),
                request("whole", 1, 20, 7, beam_width=2),
            )
        )
        simulated = simulate(trace, num_blocks=100)
        last = {f.seq_id.partition("#")[0]: r.step for r in simulated for f in r.finished}
        assert last == {"stopped": 5, "whole": 7}
        assert any(r.copied for r in simulated), "beams share blocks, and part"

    def test_a_simulation_has_a_history_like_an_engines(self):
        trace = Trace(requests=tuple(request(f"r{i}", 1, 40, 200) for i in range(3)))
        simulated = simulate(trace, num_blocks=100)
        assert simulated.history[150].num_running == 3
        assert len(simulated.history.state_at(150).running) == 3
        assert list(simulated) == list(simulated.records) == list(simulated.history)

    @pytest.mark.parametrize("block_size", [8, 24])
    def test_blocks_must_be_made_of_the_traces(self, block_size):
        trace = Trace(requests=(request("a", 1, 20, 5),))
        with pytest.raises(InvalidField, match="in steps of 16 tokens"):
            simulate(trace, num_blocks=10, block_size=block_size)
        assert len(simulate(trace, num_blocks=10, block_size=32)) == 5

    @pytest.mark.parametrize("step_time", [1, (0, 0), (-1, 2), "ab", (float("nan"), 1)])
    def test_a_step_must_take_time(self, step_time):
        trace = Trace(requests=(request("a", 1, 20, 5),))
        with pytest.raises(InvalidField, match="two numbers of seconds"):
            simulate(trace, num_blocks=10, step_time=step_time)


def decisions(record):
    """All of a record but which tokens, and which blocks."""
    return (
        record.scheduled,
        list(record.sampled),
        record.waits,
        [(a.seq_id, a.prefix.num_hit_tokens, a.resumed) for a in record.admitted],
        record.preempted,
        record.forked,
        [(f.seq_id, f.reason) for f in record.finished],
        [(move.seq_id, len(move.blocks)) for move in (*record.allocated, *record.shared)],
        (record.num_held_blocks, record.num_cached_blocks, len(record.evicted)),
    )


class TestStepTime:
    def records(self, bench, *points):
        (record,) = _one(bench)
        return [
            dataclasses.replace(record, scheduled={"req-0": n}, phases=Phases(execute=seconds))
            for n, seconds in points
        ]

    def test_a_line_through_the_steps(self, bench):
        fitted = StepTime.fit(self.records(bench, (10, 0.3), (20, 0.4), (40, 0.6)))
        assert fitted == pytest.approx((0.2, 0.01))
        assert fitted.of(100) == pytest.approx(1.2)

    def test_a_first_step_that_compiles_moves_it_little(self, bench):
        steps = [(tokens, 0.2 + 0.01 * tokens) for tokens in (1, 2, 3, 4, 5, 60, 60) * 3]
        fitted = StepTime.fit(self.records(bench, (60, 30.0), *steps))
        assert fitted == pytest.approx((0.2, 0.01), rel=0.01)

    def test_neither_number_is_below_zero(self, bench):
        assert StepTime.fit(self.records(bench, (10, 0.4), (20, 0.2))) == pytest.approx((0.3, 0))
        assert StepTime.fit(self.records(bench, (10, 0.1), (30, 0.9)))[0] == 0
        assert StepTime.fit(self.records(bench, (10, 0.3), (10, 0.5))) == pytest.approx((0.4, 0))

    def test_steps_without_times_say_so(self, bench):
        with pytest.raises(InvalidField, match="none took any time"):
            StepTime.fit(_one(bench))


def _one(bench):
    b = bench(num_blocks=10)
    b.add(8, max_tokens=1)
    return b.run()


def test_the_config_may_be_any_that_has_the_numbers():
    from nbengine import EngineConfig

    engine = EngineConfig(model="m", num_gpu_blocks_override=7, max_num_seqs=3, block_size=32)
    assert module._config_of(engine, {}) == SchedulerConfig(
        num_blocks=7, max_num_seqs=3, block_size=32
    )
    with pytest.raises(InvalidField, match="give the number of host blocks"):
        module._config_of(dataclasses.replace(engine, preemption_mode="swap"), {})
    numbers = module._config_of(SchedulerConfig(num_blocks=7, max_num_seqs=3), {"num_blocks": 9})
    assert numbers == SchedulerConfig(num_blocks=9, max_num_seqs=3)
    with pytest.raises(InvalidField, match="give the number of KV blocks"):
        module._config_of(None, {})
    with pytest.raises(InvalidField, match="must be a SchedulerConfig or an EngineConfig"):
        module._config_of("fcfs", {"num_blocks": 5})
