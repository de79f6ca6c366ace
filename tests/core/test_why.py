"""`explain`: the reasons, in words and as data, with numbers that can be checked by hand."""

from __future__ import annotations

import json

import pytest

from nbengine.core.history import History
from nbengine.core.lives import Life
from nbengine.core.prefix_cache import MissCause
from nbengine.core.records import Cause, Phases
from nbengine.core.request import Status
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams
from nbengine.core.why import explain
from nbengine.errors import UnknownRequest


class Told:
    """A bench with a history, and `why`."""

    def __init__(self, b, **history):
        self.b, self.history = b, History(**history)

    def step(self, n=1):
        for _ in range(n):
            self.history.append(self.b.step())

    def run(self):
        while self.b.scheduler.has_work:
            self.step()

    def why(self, name):
        explanation = explain(self.b.scheduler, self.history, name)
        assert json.loads(json.dumps(explanation.facts))["name"] == name
        assert explanation.sequences[0].seq_id in explanation._repr_html_()
        return explanation


@pytest.fixture
def told(bench):
    def make(policy="fcfs", history=None, **config):
        return Told(bench(policy, **{"num_blocks": 100} | config), **history or {})

    return make


class TestWaiting:
    def test_the_head_waits_for_blocks(self, told):
        t = told(num_blocks=10)
        t.b.add(80)
        t.b.add(96)
        t.step()
        seq = t.why("req-1").sequences[0]
        assert seq.status is Status.WAITING
        step, wait = seq.queueing.head_wait
        assert (step, wait.cause, wait.needed, wait.available) == (1, Cause.BLOCKS, 6, 5)
        words = str(t.why("req-1"))
        assert "is next in the queue (Fcfs)" in words
        assert "needs 6 blocks, 5 available" in words
        assert "5 of 10 are available" in words

    def test_others_wait_behind_it_and_know_what_it_waits_for(self, told):
        t = told(num_blocks=10)
        for size in (80, 96, 4, 4):
            t.b.add(size)
        t.step()
        seq = t.why("req-3").sequences[0]
        assert seq.queueing.ahead == ("req-1", "req-2")
        assert seq.queueing.head_wait[1].seq_id == "req-1"
        words = str(t.why("req-3"))
        assert "is number 3 in the queue (Fcfs), behind req-2" in words
        assert "the head, req-1, computed nothing: needs 6 blocks, 5 available" in words

    def test_seats(self, told):
        t = told(max_num_seqs=2)
        t.b.add(4)
        t.b.add(4, params=SamplingParams(n=2, seed=1))
        t.step()
        words = str(t.why("req-1"))
        assert "needs 2 seats (max_num_seqs), 1 left" in words

    def test_the_budget(self, told):
        t = told(max_num_batched_tokens=100, enable_chunked_prefill=False)
        t.b.add(60)
        t.b.add(80)
        t.step()
        assert "40 tokens of the step's budget (max_num_batched_tokens) were left, 80 needed" in (
            str(t.why("req-1"))
        )

    def test_before_any_step(self, told):
        t = told()
        t.b.add(80)
        explanation = t.why("req-0")
        assert explanation.step == 0
        assert explanation.sequences[0].queueing.head_wait is None
        assert "no step was taken" in str(explanation)
        assert "needs 5 blocks at most, 100 of 100 are available" in str(explanation)

    def test_a_preempted_sequence_knows_for_whom_and_what_it_lost(self, told):
        t = told(num_blocks=10)
        t.b.add(80)
        t.b.add(80)
        t.step(2)
        seq = t.why("req-1").sequences[0]
        step, preemption = seq.preemption
        assert (step, preemption.in_favour_of, preemption.num_lost_tokens) == (2, "req-0", 80)
        assert seq.queueing.num_blocks_available == 4
        words = str(t.why("req-1"))
        assert "preempted in step 2 in favour of req-0: 80 tokens to compute again" in words
        assert "blocks ran out in this step (req-0 needed some)" in words

    def test_a_swapped_one_lost_nothing(self, told):
        t = told(num_blocks=10, preemption_mode="swap", num_host_blocks=9)
        t.b.add(80)
        t.b.add(80)
        t.step(2)
        assert "in favour of req-0: 5 blocks swapped to host memory" in str(t.why("req-1"))

    def test_beams_wait_for_their_siblings(self, told):
        t = told(num_blocks=5, block_size=8, max_num_seqs=4)
        t.b.add(20, params=BeamSearchParams(beam_width=3, max_tokens=12))
        seen = set()
        while t.b.scheduler.has_work:
            t.step()
            if t.b.scheduler.live:
                seen.update(
                    line
                    for seq in t.why("req-0").sequences
                    for line in seq.lines()
                    if "other beams" in line
                )
        assert seen


class TestRunning:
    def test_a_chunk_of_a_long_prompt(self, told):
        t = told(num_blocks=1000, max_num_batched_tokens=1024, long_prefill_token_threshold=400)
        for _ in range(3):
            t.b.add(800)
        t.step()
        first, third = (t.why(f"req-{k}").sequences[0] for k in (0, 2))
        assert (first.wait[1].cause, first.computed) == (Cause.LONG_PREFILL, (1, 400))
        assert (third.wait[1].needed, third.wait[1].available) == (400, 224)
        assert "running, 224 of 800 tokens computed, 224 of them in step 1" in str(third)
        assert "step 1: computed 224 of 800 tokens: 224 tokens of the step's budget" in str(third)

    def test_who_gets_all_it_wants_waits_for_nothing(self, told):
        t = told(max_num_batched_tokens=64)
        t.b.add(80)
        t.step(2)
        seq = t.why("req-0").sequences[0]
        assert (seq.wait, seq.computed, seq.queueing) == (None, (2, 16), None)

    def test_why_the_prefix_missed(self, told):
        t = told()
        t.b.add(list(range(48)))
        t.run()
        t.b.add([*range(20), 999, *range(21, 48)])
        t.b.add([5, 6, 7])
        t.step()
        step, admission = t.why("req-1").sequences[0].first_admission
        assert (step, admission.prefix.cause) == (9, MissCause.DIFFERS)
        assert "admitted in step 9: 16 of 48 tokens came from the prefix cache: block 1 is the" in (
            str(t.why("req-1"))
        )
        assert "shorter than one block" in str(t.why("req-2"))

    def test_an_admission_after_a_preemption_is_told_apart_from_the_first(self, told):
        t = told(num_blocks=10)
        t.b.add(80)
        t.b.add(80)
        while "resumed" not in str(t.why("req-1")):
            t.step()
        words = str(t.why("req-1"))
        assert "admitted in step 1" in words and "preempted in step 2" in words

    def test_samples_are_explained_together_or_one_by_one(self, told):
        t = told()
        t.b.add(20, params=SamplingParams(n=3, max_tokens=4, seed=1))
        t.step(2)
        assert [seq.seq_id for seq in t.why("req-0").sequences] == ["req-0", "req-0#1", "req-0#2"]
        (one,) = t.why("req-0#1").sequences
        assert one.fork[1].parent == "req-0"
        assert "split from req-0 in step 1" in str(one)

    def test_a_failed_step_says_that_tokens_are_computed_again(self, told):
        t = told()
        t.b.add(20)
        t.step()
        t.b.scheduler.schedule()
        t.history.append(t.b.scheduler.take_back(RuntimeError("out of memory")))
        assert "preempted in step 2: the step failed, 20 tokens to compute again" in (
            str(t.why("req-0"))
        )


class TestFinished:
    def test_at_its_length_limit(self, told):
        t = told()
        t.b.add(20, max_tokens=3)
        t.run()
        (seq,) = t.why("req-0").sequences
        assert seq.status is Status.FINISHED
        assert (seq.num_prompt_tokens, seq.num_output_tokens) == (20, 3)
        assert str(seq).startswith(
            "req-0: finished in step 3, at its length limit, after 3 output tokens"
        )

    def test_by_abort_error_and_stop(self, told):
        t = told()
        for _ in range(3):
            t.b.add(20)
        t.step()
        t.b.scheduler.abort("req-0")
        assert "has ended since the last step" in str(t.why("req-0"))
        output = t.b.executor.execute(t.b.scheduler.schedule())
        output.errors["req-1"] = ValueError("not a number")
        t.b.scheduler.commit(output)
        t.b.scheduler.finish(t.b.scheduler.live["req-2"].sequences[0], "stop", "\n\n")
        t.history.append(t.b.scheduler.seal(Phases()))
        assert "finished in step 2, aborted, after 1 output token" in str(t.why("req-0"))
        assert "finished in step 2, by an error: not a number" in str(t.why("req-1"))
        assert r"finished in step 2, at stop '\n\n', after 2 output tokens" in str(t.why("req-2"))

    def test_one_of_several_samples(self, told):
        t = told()
        live = t.b.add(20, params=SamplingParams(n=2, max_tokens=4, seed=1))
        t.step()
        t.b.scheduler.finish(live.sequences[1], "stop", None)
        t.step()
        assert [seq.status for seq in t.why("req-0").sequences] == ["running", "finished"]
        assert "at the end of the text" in str(t.why("req-0#1"))

    def test_beams_keep_the_tokens_of_their_ancestors(self, told):
        t = told()
        t.b.add(20, params=BeamSearchParams(beam_width=3, max_tokens=5))
        t.run()
        ended = [s for s in t.why("req-0").sequences if s.finish[1].reason == "length"]
        assert [s.num_output_tokens for s in ended] == [5, 5, 5]
        assert "not among the best" in str(t.why("req-0"))

    def test_a_name_used_again_means_its_latest_owner(self, told):
        t = told()
        t.b.add(20, max_tokens=3)
        t.run()
        t.b.add(24, max_tokens=2, request_id="req-0")
        t.run()
        (seq,) = t.why("req-0").sequences
        assert (seq.num_prompt_tokens, seq.num_output_tokens, seq.added_in) == (24, 2, 4)

    def test_the_history_says_what_it_still_holds(self, told):
        t = told(history={"max_records": 2})
        t.b.add(20, max_tokens=6)
        t.run()
        (seq,) = t.why("req-0").sequences
        assert seq.added_in is None and seq.first_admission is None
        assert seq.finish[0] == 6
        t.b.add(20, max_tokens=6)
        t.run()
        with pytest.raises(UnknownRequest, match=r"steps 11 to 12"):
            t.why("req-0")

    @pytest.mark.parametrize("name", ["req-1", "req-0#1", "", "req"])
    def test_an_unknown_name_is_refused(self, told, name):
        t = told()
        with pytest.raises(UnknownRequest, match="none"):
            t.why(name)
        t.b.add(4)
        t.step()
        with pytest.raises(UnknownRequest, match="steps 1 to 1"):
            t.why(name)


def test_every_sequence_of_every_life_can_be_explained_at_every_step():
    for seed in range(60):
        history = History(max_records=6)

        def watch(simulation, record, history=history):
            history.append(record)
            scheduler = simulation.scheduler
            for seq in (*scheduler.waiting, *scheduler.running):
                explained = explain(scheduler, history, seq.seq_id).sequences
                told = next(s for s in explained if s.seq_id == seq.seq_id)
                assert told.status is seq.status and str(told)
                assert (told.queueing is None) == (seq.status is Status.RUNNING)
            for finish in record.finished:
                assert "finished" in str(explain(scheduler, history, finish.seq_id)) or (
                    finish.seq_id.partition("#")[0] in scheduler.live  # has a new owner
                )

        Life(seed, watch).run()
