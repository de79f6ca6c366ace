"""Going back in an engine with a real model, and stopping where something happens."""

from __future__ import annotations

import gc
import itertools
import weakref

import pytest

from nbengine import BeamSearchParams, SamplingParams
from nbengine.errors import InvalidField, UnknownRequest, UnknownStep
from nbengine.outputs import RequestOutputKind
from tests.waiting import eventually

GREEDY = SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
SEEDED = SamplingParams(temperature=1, seed=3, max_tokens=24, ignore_eos=True, n=2, logprobs=2)
UNSEEDED = SamplingParams(temperature=1, max_tokens=24, ignore_eos=True)
BEAMS = BeamSearchParams(beam_width=3, max_tokens=12, ignore_eos=True)
PROMPTS = [[5 + i, *range(20 + i, 20 + i + length)] for i, length in enumerate((3, 40, 17, 33))]
PARAMS = [GREEDY, SEEDED, UNSEEDED, BEAMS]


@pytest.fixture
def busy(make):
    """Four requests of different kinds in few blocks, and the fourth a little later."""

    def busy(**fields):
        engine = make(
            **{"num_gpu_blocks_override": 11, "max_model_len": 128, "max_num_batched_tokens": 32}
            | fields
        )
        for i in range(3):
            engine.add_request(PROMPTS[i], PARAMS[i], request_id=f"r{i}")
        engine.step(4)
        engine.add_request(PROMPTS[3], PARAMS[3], request_id="r3")
        return engine

    return busy


def told(engine):
    """All that a caller can know of every request: tokens, text, reasons, logprobs."""
    outputs = [engine.output(f"r{i}") for i in range(4)]
    return [
        [(o.token_ids, o.text, o.finish_reason, o.stop_reason, o.logprobs) for o in output.outputs]
        for output in outputs
    ]


def said(engine):
    """The same without logprobs, whose last bits depend on the batch; only how many there are."""
    return [[(*o[:4], o[4] and len(o[4])) for o in outputs] for outputs in told(engine)]


class TestStateAt:
    def test_every_step_is_rebuilt_as_it_was(self, busy):
        engine = busy()
        live = {}
        while engine.has_work:
            record = engine.step()
            live[record.step] = engine.snapshot()
        assert any(r.preempted for r in engine.history), "blocks were meant to run out"
        for step, snapshot in live.items():
            rebuilt = engine.state_at(step)
            assert rebuilt.free_blocks == snapshot.free_blocks
            assert rebuilt.cached_blocks == snapshot.cached_blocks
            assert rebuilt.contents == snapshot.contents
            assert [s.block_table for s in rebuilt.running] == [
                s.block_table for s in snapshot.running
            ]
            assert [(s.seq_id, s.token_ids) for s in (*rebuilt.running, *rebuilt.waiting)] == [
                (s.seq_id, s.token_ids) for s in (*snapshot.running, *snapshot.waiting)
            ]
        before_the_first = engine.state_at(0)
        assert before_the_first.num_free_blocks == 11 and not before_the_first.running

    def test_a_step_that_was_not_taken_is_unknown(self, busy):
        engine = busy()
        with pytest.raises(UnknownStep, match="those after steps 0 to 4"):
            engine.state_at(5)
        with pytest.raises(UnknownStep):
            engine.rewind(-1)
        assert engine.history[-1].step == 4, "nothing was lost"


class TestRewind:
    @pytest.mark.parametrize("step", [1, 4, 6, 11, 17])
    def test_the_continuation_is_the_same(self, busy, step):
        engine = busy()
        engine.run()
        whole, last = said(engine), engine.history[-1].step
        rewound = engine.rewind(step)
        assert engine.history[-1].step == step and len(rewound.dropped) == last - step
        if step < 5:  # the fourth request came after step 4
            with pytest.raises(UnknownRequest):
                engine.output("r3")
            engine.add_request(PROMPTS[3], PARAMS[3], request_id="r3")
        engine.run()
        assert said(engine) == whole
        assert rewound.num_equal == rewound.num_expected > 0 and not rewound.divergences

    def test_outputs_are_cut_back_at_once(self, busy):
        engine = busy()
        was = {}
        while engine.has_work:
            record = engine.step()
            was[record.step] = told(engine)
        engine.rewind(9)
        assert told(engine) == was[9]
        snapshot = engine.snapshot()
        assert not snapshot.running and snapshot.num_held_blocks == 0
        assert {s.status for s in snapshot.waiting} <= {"preempted", "waiting"}
        engine.step()
        assert "the engine went back" in str(engine.why("r0"))

    def test_it_can_be_done_again_and_again(self, busy):
        engine = busy()
        engine.run()
        whole = said(engine)
        for step in (15, 12, 8, 5):
            engine.rewind(step)
            engine.step(3)
        engine.run()
        assert said(engine) == whole

    def test_a_request_that_came_later_is_gone_and_one_that_was_aborted_later_lives(self, make):
        engine = make()
        engine.add_request(PROMPTS[0], GREEDY, request_id="a")
        engine.step(3)
        engine.abort("a")
        ended = []
        engine.add_request(PROMPTS[1], GREEDY, request_id="b", subscriber=ended.append)
        engine.step(2)
        engine.rewind(3)
        assert ended[-1].outputs[0].finish_reason == "abort"
        assert [s.seq_id for s in engine.snapshot().waiting] == ["a"]
        engine.run()
        assert len(engine.output("a").outputs[0].token_ids) == 24

    def test_a_name_that_was_taken_again_is_the_earlier_request_again(self, make):
        engine = make()
        engine.add_request(PROMPTS[0], GREEDY, request_id="a")
        engine.run()
        first = engine.output("a")
        engine.add_request(PROMPTS[1], GREEDY, request_id="a")
        engine.step(2)
        engine.rewind(3)
        engine.run()
        again = engine.output("a")
        assert again.prompt_token_ids == first.prompt_token_ids
        assert again.outputs[0].token_ids == first.outputs[0].token_ids

    def test_a_stream_goes_on_from_there(self, make):
        engine = make()
        delta = SamplingParams(
            temperature=0, max_tokens=10, ignore_eos=True, output_kind=RequestOutputKind.DELTA
        )
        parts = []
        engine.add_request(PROMPTS[0], delta, request_id="a", subscriber=parts.append)
        engine.step(8)
        engine.rewind(5)
        engine.run()
        tokens = list(itertools.chain(*(p.outputs[0].token_ids for p in parts)))
        whole = engine.output("a").outputs[0].token_ids
        assert tokens == whole[:8] + whole[5:], "what came after step 5 came again"

    def test_a_token_that_differs_is_reported_with_both_logits(self, make):
        engine = make()
        engine.add_request(PROMPTS[0], GREEDY, request_id="a")
        engine.run()
        was = engine.output("a").outputs[0].token_ids
        rewound = engine.rewind(5)
        weight = engine.model.head.weight
        weight[was[9]] *= -1  # the model has changed: this token's logit is another one
        engine.run()
        (divergence,) = rewound.divergences
        now = engine.output("a").outputs[0].token_ids
        assert now[: divergence.position] == was[: divergence.position]
        assert (divergence.token_id, divergence.expected_token_id) == (
            now[divergence.position],
            was[divergence.position],
        )
        assert divergence.logit > divergence.expected_logit, "greedy takes the largest"
        assert divergence.step == engine.history[divergence.step].step
        assert f"was {divergence.expected_token_id}" in str(rewound)
        assert not rewound.is_watching

    def test_a_policy_that_raises_leaves_everything_as_it_is(self, busy):
        engine = busy()
        broken = False

        class Policy:
            def rank(self, sequence):
                if broken:
                    raise RuntimeError("the policy broke")
                return 0

        engine.set_policy(Policy)
        engine.step(3)
        before, broken = told(engine), True
        with pytest.raises(RuntimeError, match="the policy broke"):
            engine.rewind(2)
        broken = False
        assert told(engine) == before and engine.history[-1].step == 7
        engine.run()
        assert all(output[0][2] == "length" for output in told(engine))

    def test_with_swapped_sequences(self, busy):
        engine = busy(preemption_mode="swap", num_gpu_blocks_override=10)
        engine.run()
        whole = said(engine)
        step = next(r.step for r in engine.history if r.swapped_out)
        engine.rewind(step)
        engine.run()
        assert said(engine) == whole


class TestFork:
    def test_with_nothing_changed_it_is_what_happened(self, busy):
        engine = busy()
        engine.run()
        for step in (0, 4, 9):
            forked = engine.fork(step)
            real = [record for record in engine.history if record.step > step]
            assert len(forked) == len(real)
            for mine, record in zip(forked, real, strict=True):
                assert mine.scheduled == record.scheduled and mine.sampled == record.sampled
                assert mine.allocated == record.allocated and mine.preempted == record.preempted

    def test_it_does_not_touch_the_engine(self, busy):
        engine = busy()
        engine.run(4)
        before = engine.snapshot(), told(engine), len(engine.history)
        forked = engine.fork(2, "sjf", num_blocks=40, max_num_batched_tokens=8)
        assert max(record.num_tokens for record in forked) == 8
        assert (engine.snapshot(), told(engine), len(engine.history)) == before
        engine.run()
        assert all(output[0][2] == "length" for output in told(engine))


class TestBreakpoints:
    @pytest.mark.parametrize(
        ("name", "field"),
        [
            ("preemption", "preempted"),
            ("finish", "finished"),
            ("eviction", "evicted"),
            ("copy_on_write", "copied"),
            ("out_of_blocks", "waits"),
            ("prefix_miss", "admitted"),
        ],
    )
    def test_run_stops_exactly_there(self, busy, name, field):
        engine = busy()
        engine.rewind(0)
        for i, params in enumerate(PARAMS):
            engine.add_request(PROMPTS[i], params, request_id=f"r{i}")
        engine.break_on(name)
        record = engine.run()
        assert engine.stopped_at.record is record and getattr(record, field)
        assert engine.has_work
        assert f"stopped at '{name}'" in str(engine.stopped_at)

    def test_until_takes_the_same_names(self, busy):
        engine = busy()
        record = engine.run(until="finish")
        assert record.finished and engine.stopped_at is None
        with pytest.raises(InvalidField, match="the names are preemption"):
            engine.run(until="preemtion")

    def test_a_function_and_removal(self, busy):
        engine = busy()
        at = engine.break_on(lambda record: record.step in (6, 8))
        assert engine.run().step == 6
        assert engine.step(5).step == 8
        assert at.num_hits == 2 and engine.breakpoints == (at,)
        at.remove()
        engine.run()
        assert not engine.has_work and engine.stopped_at is None and not engine.breakpoints

    def test_a_background_run_pauses_there(self, busy):
        engine = busy()
        engine.break_on("finish")
        engine.start()
        eventually(lambda: not engine.is_running)
        assert engine.stopped_at.record.finished and engine.has_work

    def test_a_condition_that_raises_stops_once_and_says_so(self, busy):
        engine = busy()
        engine.break_on(lambda record: record.nonsense)
        assert engine.run().step == 5
        assert "has no attribute 'nonsense'" in str(engine.stopped_at)
        engine.run()
        assert not engine.has_work

    def test_whoever_waits_for_an_answer_still_gets_it(self, make):
        engine = make()
        engine.break_on(lambda record: True)
        *_, last = engine.stream(PROMPTS[0], GREEDY)
        assert last.finished and len(last.outputs[0].token_ids) == 24


class TestTheBudgetLive:
    def test_it_applies_from_the_next_step_on(self, make):
        engine = make(max_num_batched_tokens=32)
        engine.add_request(PROMPTS[1], GREEDY)
        engine.set_max_num_batched_tokens(8)
        assert engine.step().num_tokens == 8
        engine.set_max_num_batched_tokens(32)
        assert engine.step().num_tokens == 32

    def test_no_more_than_there_are_buffers_for(self, make):
        engine = make(max_num_batched_tokens=32)
        with pytest.raises(InvalidField, match="started with 32"):
            engine.set_max_num_batched_tokens(33)
        with pytest.raises(InvalidField, match="positive"):
            engine.set_max_num_batched_tokens(0)


class TestARewindWhileOthersListen:
    def test_a_stream_that_ends_leaves_the_request_that_lives_again_alone(self, make):
        engine = make()
        stream = engine.stream(PROMPTS[0], GREEDY, request_id="a")
        next(stream)
        eventually(lambda: not engine.has_work)
        engine.rewind(3)
        assert list(stream)[-1].finished, "what was computed is still delivered"
        assert engine.has_work, "its request lives again, and is nobody's to abort"
        engine.run()
        assert engine.output("a").outputs[0].finish_reason == "length"

    def test_a_stream_that_is_gone_leaves_its_namesake_alone(self, make):
        engine = make()
        engine.add_request(PROMPTS[1], GREEDY, request_id="a")
        engine.run()
        stream = engine.stream(PROMPTS[0], GREEDY, request_id="a")
        next(stream)
        engine.rewind(3)
        *_, last = stream
        assert last.finished
        engine.run()
        again = engine.output("a")
        assert again.prompt_token_ids == PROMPTS[1]
        assert again.outputs[0].finish_reason == "length"

    @pytest.mark.parametrize("where", ["condition", "subscriber", "listener"])
    def test_it_ends_the_run_that_it_is_called_in(self, make, where):
        engine = make()
        seen, heard = [], []

        def back(record):
            if record.step == 6 and not seen:
                seen.append(engine.rewind(3))

        def told(output):
            if len(output.outputs[0].token_ids) == 6 and not seen:
                seen.append(engine.rewind(3))

        engine.add_request(
            PROMPTS[0], GREEDY, request_id="a", subscriber=told if where == "subscriber" else None
        )
        engine.add_request(PROMPTS[2], GREEDY, request_id="b", subscriber=heard.append)
        if where == "condition":
            engine.break_on(back)
        elif where == "listener":
            engine.on_step(back)
        engine.run()
        assert engine.history[-1].step == 3 and seen[0].step == 3
        for name in ("a", "b"):
            output = engine.output(name)
            assert len(output.metrics.token_times) == len(output.outputs[0].token_ids) == 3
        if where == "listener":  # the only one of them that comes after the subscribers
            assert len(heard[-1].outputs[0].token_ids) == 6
        else:
            assert len(heard[-1].outputs[0].token_ids) == 5, "what is no more is not told"
        engine.step(5)
        assert engine.history[-1].step == 8
        engine.run()
        assert not seen[0].divergences and seen[0].num_equal == seen[0].num_expected

    def test_a_request_that_no_step_has_seen_is_gone_too(self, make):
        engine = make()
        engine.add_request(PROMPTS[0], GREEDY, request_id="a")
        engine.step(2)
        heard = []
        engine.add_request(PROMPTS[1], GREEDY, request_id="b", subscriber=heard.append)
        engine.rewind(1)
        assert heard[-1].outputs[0].finish_reason == "abort"
        with pytest.raises(UnknownRequest):
            engine.output("b")

    def test_whoever_is_told_of_the_end_may_ask_again(self, make):
        engine = make()
        engine.add_request(PROMPTS[0], GREEDY, request_id="a")
        engine.step(2)
        again = []

        def told(output):
            if output.finished and not again:
                assert len(engine.output("a").outputs[0].token_ids) == 1, "it is back already"
                again.append(engine.add_request(PROMPTS[1], GREEDY, request_id="b"))

        engine.add_request(PROMPTS[1], GREEDY, request_id="b", subscriber=told)
        engine.step()
        engine.rewind(1)
        assert again == ["b"]
        engine.run()
        assert engine.output("b").outputs[0].finish_reason == "length"

    def test_a_sample_that_had_ended_is_not_told_again(self, make, tiny_tokenizer):
        engine = make(tokenizer=str(tiny_tokenizer), skip_tokenizer_init=False)
        letters = {
            "temperature": 1,
            "seed": 3,
            "n": 2,
            "max_tokens": 24,
            "allowed_token_ids": [*range(35, 93)],
        }
        engine.add_request(PROMPTS[0], SamplingParams(**letters), request_id="plain")
        engine.run()
        first, second = (o.token_ids for o in engine.output("plain").outputs)
        stop = next(t for t in first[2:10] if t not in second)
        parts = []
        delta = SamplingParams(
            stop_token_ids=[stop], output_kind=RequestOutputKind.DELTA, **letters
        )
        engine.add_request(PROMPTS[0], delta, request_id="a", subscriber=parts.append)
        record = engine.run(until="finish")
        engine.step(2)
        assert engine.has_work and record.finished[0].seq_id == "a"
        engine.rewind(record.step + 1)
        del parts[:]
        engine.run()
        assert all(not part.outputs[0].text for part in parts)
        told = "".join(part.outputs[1].text for part in parts)
        assert told and engine.output("a").outputs[1].text.endswith(told)


class TestTimesAfterARewind:
    def test_they_are_those_of_the_steps_that_are_left(self, make):
        """Blocks run out, so one sample waits, and gets its tokens in steps of its own."""
        engine = make(num_gpu_blocks_override=5, max_model_len=64)
        params = SamplingParams(temperature=1, seed=3, n=2, max_tokens=24, ignore_eos=True)
        engine.add_request(PROMPTS[1], params, request_id="a")
        were = {}
        while engine.has_work:
            step = engine.step().step
            were[step] = engine.metrics("a").token_times
        assert any(r.preempted for r in engine.history), "blocks were meant to run out"
        for step in sorted(were, reverse=True)[1:]:
            engine.rewind(step)
            assert engine.metrics("a").token_times == were[step]


class TestBreakpointsAndWhoWaits:
    def test_where_the_run_stopped_is_not_forgotten_for_who_waits(self, make):
        engine = make()
        engine.add_request(PROMPTS[1], GREEDY, request_id="a")
        at = engine.break_on(lambda record: record.step == 5)
        stream = engine.stream(PROMPTS[0], GREEDY)
        engine.start()
        *_, last = stream
        assert last.finished and not engine.is_running
        assert engine.stopped_at.breakpoint is at and engine.stopped_at.record.step == 5
        engine.start()
        assert engine.stopped_at is None

    def test_a_condition_whose_answer_is_neither_true_nor_false(self, make):
        class Unclear:
            def __bool__(self):
                raise ValueError("ambiguous")

        engine = make()
        heard = []
        engine.add_request(PROMPTS[0], GREEDY, request_id="a", subscriber=heard.append)
        engine.break_on(lambda record: Unclear())
        assert engine.run().step == 1 and "ambiguous" in str(engine.stopped_at)
        assert len(heard) == 1, "the step's output is delivered all the same"
        engine.run()
        assert heard[-1].finished


class TestWhatIsNotKept:
    def test_logprobs_of_a_request_whose_name_was_taken_are_none_not_misplaced(self, make):
        engine = make()
        params = SamplingParams(
            temperature=0, max_tokens=9, ignore_eos=True, logprobs=1, prompt_logprobs=1
        )
        engine.add_request(PROMPTS[0], params, request_id="a")
        engine.run()
        was = engine.output("a").outputs[0].token_ids
        engine.add_request(
            PROMPTS[1], GREEDY, request_id="a"
        )  # the first one's output is forgotten
        engine.step()
        for step in (4, 0):
            engine.rewind(step)
            if step == 0:
                engine.add_request(PROMPTS[0], params, request_id="a")
            engine.run()
            output = engine.output("a")
            assert output.outputs[0].token_ids == was
            assert (output.outputs[0].logprobs is None) == (step == 4)
            assert (output.prompt_logprobs is None) == (step == 4)

    def test_logits_are_kept_only_while_there_is_something_to_compare(self, make, monkeypatch):
        engine = make()
        kept = []
        compute = engine._runner.compute

        def seen(prepared):
            kept.append(prepared.plan.keeps_logits)
            return compute(prepared)

        monkeypatch.setattr(engine._runner, "compute", seen)
        engine.add_request(PROMPTS[0], GREEDY, request_id="a")
        engine.add_request(PROMPTS[1], GREEDY, request_id="b")
        engine.run(8)
        rewound = engine.rewind(4)
        engine.step(2)
        engine.abort("a", "b")  # so that its tokens never come again
        engine.add_request(PROMPTS[2], GREEDY, request_id="c")
        engine.run(6)
        assert rewound.num_equal == 4 and kept == [False] * 8 + [True] * 2 + [False] * 6
        alive = weakref.ref(engine.rewind(10))
        del rewound
        gc.collect()
        assert alive() is None, "nobody can read it, so its records are not kept"


def test_forks_and_states_while_the_engine_runs_in_the_background(busy):
    engine = busy()
    engine.start()
    forks = []
    while engine.has_work and len(forks) < 10:
        step = engine.history[-1].step
        forks.append((step, engine.fork(step - 1), engine.state_at(step)))
    assert forks
    for step, forked, state in forks:
        assert forked.history[step].scheduled == engine.history[step].scheduled
        assert state.step == step
