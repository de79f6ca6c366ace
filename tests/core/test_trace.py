"""Traces: what they keep of a run, that files come back whole or not at all, and drawn ones."""

from __future__ import annotations

import dataclasses
import json

import pytest

from nbengine.core.history import History
from nbengine.core.lives import Life
from nbengine.core.sampling_params import BeamSearchParams, SamplingParams
from nbengine.core.simulate import simulate
from nbengine.core.state import Keyframe
from nbengine.core.trace import Trace, TracedOutput, TracedRequest
from nbengine.errors import InvalidField, TraceError, UnknownStep


class TestOfARun:
    def test_numbers_of_each_request(self, recorded):
        b = recorded(num_blocks=100)
        b.add(20, max_tokens=3, arrival_time=100.0, priority=2)
        b.step()
        b.step()
        b.add(40, params=SamplingParams(n=2, max_tokens=2), arrival_time=101.5)
        b.run()
        first, second = Trace.of(b.history)
        assert first == TracedRequest(
            request_id="req-0",
            arrival_step=1,
            arrival_time=0.0,
            num_prompt_tokens=20,
            hash_ids=(0,),
            outputs=(
                dataclasses.replace(
                    first.outputs[0],
                    num_tokens=3,
                    hash_ids=(),
                    finish_reason="length",
                    finish_step=3,
                ),
            ),
            max_tokens=3,
            priority=2,
        )
        assert (second.arrival_step, second.arrival_time) == (3, 1.5)
        assert [o.num_tokens for o in second.outputs] == [2, 2]
        assert [o.finish_step for o in second.outputs] == [4, 4]

    def test_the_next_turn_of_a_conversation_shares_what_was_generated(self, recorded):
        b = recorded(num_blocks=100)
        turn = b.add(24, max_tokens=20)  # blocks 0 and 1, of which 8 tokens were generated
        b.run()
        b.add(turn.sequences[0].tokens + [5] * 20)
        b.run()
        one, two = Trace.of(b.history)
        assert (one.hash_ids, one.outputs[0].hash_ids) == ((0,), (1,))
        assert two.hash_ids == (0, 1, 2, 3)
        simulated = simulate(Trace.of(b.history), b.scheduler.config)
        hits = [r.num_hit_tokens for r in b.history]
        assert [r.num_hit_tokens for r in simulated] == hits
        assert max(hits) == 32

    def test_equal_blocks_behind_others_are_not_the_same(self, recorded):
        b = recorded(num_blocks=100)
        for first in (1, 2, 1):
            b.add([first] * 16 + [7] * 17)
        b.run()
        assert [r.hash_ids for r in Trace.of(b.history)] == [(0, 1), (2, 3), (0, 1)]

    def test_samples_share_the_blocks_of_the_prompt_alone(self, recorded):
        b = recorded(num_blocks=100)
        b.add(24, params=SamplingParams(n=2, max_tokens=30))
        b.run()
        (traced,) = Trace.of(b.history)
        assert traced.hash_ids == (0,)
        assert [output.hash_ids for output in traced.outputs] == [(1, 2), (3, 4)]

    def test_equal_prompts_under_two_salts_share_nothing(self, recorded):
        b = recorded(num_blocks=100)
        for salt in ("alice", None, "bob", "alice"):
            b.add([7] * 20, cache_salt=salt)
        b.run()
        trace = Trace.of(b.history)
        assert [r.hash_ids for r in trace] == [(0,), (1,), (2,), (0,)]
        assert [r.cache_salt for r in trace] == [0, None, 1, 0]

    def test_neither_tokens_nor_salts_get_out(self, recorded, tmp_path):
        b = recorded(num_blocks=100)
        b.add([123456] * 40, cache_salt="a secret")
        b.run()
        Trace.of(b.history).save(tmp_path / "trace")
        text = (tmp_path / "trace").read_text()
        assert "123456" not in text and "secret" not in text

    def test_how_each_ended(self, recorded):
        b = recorded(num_blocks=100)
        b.add(20, max_tokens=50)
        b.add(20, max_tokens=50, params=BeamSearchParams(beam_width=2, max_tokens=4))
        b.add(20, params=SamplingParams(max_tokens=50, prompt_logprobs=1), max_total_tokens=70)
        for _ in range(6):
            b.step()
        b.scheduler.abort("req-0")
        b.step()
        aborted, beams, unfinished = Trace.of(b.history)
        assert (aborted.outputs[0].finish_reason, aborted.outputs[0].finish_step) == ("abort", 7)
        assert aborted.outputs[0].num_tokens == 6
        assert (beams.beam_width, beams.outputs[0].num_tokens) == (2, 4)
        assert beams.outputs[0].finish_step == 4
        assert (unfinished.outputs[0].finish_reason, unfinished.missing) == (None, "end")
        assert unfinished.scores_prompt and not aborted.scores_prompt
        assert "1 without their end" in repr(Trace.of(b.history))

    def test_what_the_history_reaches_only_partly_is_marked(self, recorded):
        b = recorded(num_blocks=100)
        b.add(20, max_tokens=3)
        b.add(20, max_tokens=30, arrival_time=9.0)
        for _ in range(5):
            b.step()
        b.history = History()  # the first has ended by now
        b.history.keep(Keyframe(b.scheduler))
        b.add(20, max_tokens=2, arrival_time=12.0)
        b.run()
        trace = Trace.of(b.history)
        there, new = trace
        assert (there.request_id, there.missing, there.arrival_step) == ("req-1", "beginning", 1)
        assert there.outputs[0].num_tokens == 30, "those before are known too"
        assert (new.missing, new.arrival_step, new.arrival_time) == ("", 1, 3.0)
        assert trace.first_step == 6
        assert "1 without their beginning" in repr(trace)

    def test_without_any_state_there_is_no_telling(self):
        with pytest.raises(UnknownStep, match="no keyframe"):
            Trace.of(History())

    def test_any_life_makes_a_trace_that_can_be_saved_and_simulated(self, tmp_path):
        """Faults, beams, rewinds and reused names too; beams and what failed go otherwise."""
        for seed in range(60):
            life = Life(seed).run()
            trace = Trace.of(life.history)
            trace.save(tmp_path / "trace.jsonl")
            assert Trace.load(tmp_path / "trace.jsonl") == trace
            simulated = simulate(trace, life.config, max_steps=10_000)
            assert simulated.end == "finished", seed
            assert not simulated.refused


HEADER = {
    "format": "nbengine trace", "version": 1, "num_requests": 1,
    "block_size": 16, "first_step": 1, "num_unknown": 0,
}  # fmt: skip
OUTPUT = {"num_tokens": 2}
REQUEST = {
    "request_id": "a", "arrival_step": 1, "num_prompt_tokens": 5, "outputs": [OUTPUT],
    "max_tokens": 4,
}  # fmt: skip


class TestFiles:
    def test_a_trace_comes_back_as_it_was(self, tmp_path):
        trace = Trace.synthetic(50, num_prefixes=2, priorities=(0, 5), seed=3)
        trace.save(tmp_path / "trace.jsonl")
        assert Trace.load(tmp_path / "trace.jsonl") == trace
        assert len((tmp_path / "trace.jsonl").read_text().splitlines()) == 51

    def test_a_line_may_leave_out_what_has_a_default(self, tmp_path):
        path = tmp_path / "trace.jsonl"
        path.write_text("\n".join(map(json.dumps, (HEADER, REQUEST))))
        (request,) = Trace.load(path)
        assert request.outputs == (TracedOutput(num_tokens=2),)

    @pytest.mark.parametrize(
        ("lines", "problem"),
        [
            ([], "line 0: the file is empty"),
            (["{"], "line 1: Expecting property name"),
            ([[1]], "line 1: it is no JSON object"),
            ([{"format": "csv"}], "line 1: the file is no nbengine trace"),
            ([HEADER | {"version": 9}], "line 1: it has version 9, and known is 1"),
            ([HEADER | {"more": 9}], "line 1: the header has"),
            ([HEADER], "line 2: the file ends after 0 of 1 requests"),
            ([HEADER, REQUEST, REQUEST], "line 4: the file ends after 2 of 1 requests"),
            ([HEADER | {"block_size": 0}, REQUEST], "block_size=0: must be an integer, 1 to"),
            ([HEADER, REQUEST | {"arrival_step": 0}], "line 2: arrival_step=0"),
            ([HEADER, REQUEST | {"num_prompt_tokens": 10**12}], "line 2: num_prompt_tokens=1000"),
            ([HEADER, REQUEST | {"num_prompt_tokens": True}], "line 2: num_prompt_tokens=True"),
            ([HEADER, REQUEST | {"max_tokens": 1}], "line 2: num_tokens=2: above max_tokens=1"),
            ([HEADER, REQUEST | {"request_id": "a#1"}], "line 2: request_id='a#1'"),
            ([HEADER, REQUEST | {"hash_ids": "01"}], "line 2: hash_ids must be a list"),
            ([HEADER, REQUEST | {"hash_ids": [-1]}], "line 2: hash_ids=-1"),
            ([HEADER, REQUEST | {"outputs": []}], "line 2: outputs='0 of them'"),
            ([HEADER, REQUEST | {"outputs": [5]}], "line 2: outputs must be a list of objects"),
            ([HEADER, REQUEST | {"more": 1}], "line 2: .* unexpected keyword argument 'more'"),
            ([HEADER, '{"arrival_time": NaN}'], "line 2: NaN is no number"),
            ([HEADER, "[" * 100_000], "line 2"),
            (
                [HEADER, REQUEST | {"outputs": [OUTPUT | {"finish_reason": "died"}]}],
                "line 2: finish_reason='died'",
            ),
            (
                [HEADER, REQUEST | {"arrival_step": 5}, REQUEST],
                "line 3: arrival_step=1: requests are in order, and before it came 5",
            ),
        ],
    )
    def test_a_bad_line_is_refused_with_its_number_and_the_reason(self, tmp_path, lines, problem):
        path = tmp_path / "trace.jsonl"
        path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
        with pytest.raises(TraceError, match=problem):
            Trace.load(path)

    def test_a_file_of_bytes_is_refused(self, tmp_path):
        path = tmp_path / "trace.jsonl"
        path.write_bytes(b"\x80\x04\x95")
        with pytest.raises(TraceError, match="line 0"):
            Trace.load(path)


class TestSynthetic:
    def test_a_seed_always_draws_the_same(self):
        assert Trace.synthetic(30, seed=1) == Trace.synthetic(30, seed=1)
        assert Trace.synthetic(30, seed=1) != Trace.synthetic(30, seed=2)

    def test_rate_and_lengths_are_as_asked_for(self):
        trace = Trace.synthetic(4000, rate=2.0, prompt_tokens=100, output_tokens=50, seed=5)
        assert trace.requests[-1].arrival_step == pytest.approx(2000, rel=0.06)
        prompts = sorted(r.num_prompt_tokens for r in trace)
        assert prompts[2000] == pytest.approx(100, rel=0.06)
        # One standard deviation above the median lies a sixth of them.
        assert sum(n > 100 * 2.0138 for n in prompts) / 4000 == pytest.approx(0.1587, abs=0.02)
        assert all(r.num_output_tokens <= r.max_tokens for r in trace)

    def test_without_spread_all_are_alike(self):
        trace = Trace.synthetic(10, prompt_tokens=33, output_tokens=5, spread=0)
        assert {(r.num_prompt_tokens, r.num_output_tokens, r.max_tokens) for r in trace} == {
            (33, 5, 8)
        }

    def test_a_length_may_be_drawn_by_a_function(self):
        trace = Trace.synthetic(20, prompt_tokens=lambda rng: rng.choice([7, 9]))
        assert {r.num_prompt_tokens for r in trace} == {7, 9}

    def test_shared_beginnings_hit_the_prefix_cache(self):
        trace = Trace.synthetic(
            6, rate=0.01, num_prefixes=1, prefix_tokens=64, prompt_tokens=20, spread=0
        )
        simulated = simulate(trace, num_blocks=100)
        assert [a.prefix.num_hit_tokens for r in simulated for a in r.admitted] == [0] + [64] * 5

    @pytest.mark.parametrize(
        "fields",
        [
            {"rate": 0}, {"rate": float("inf")}, {"spread": -1}, {"prompt_tokens": 0},
            {"priorities": ()}, {"num_prefixes": -1}, {"output_tokens": lambda rng: 0},
            {"block_size": 0},
        ],
        ids=", ".join,
    )  # fmt: skip
    def test_a_number_out_of_range_is_named(self, fields):
        with pytest.raises(InvalidField, match=next(iter(fields))):
            Trace.synthetic(2, **fields)
