"""The vLLM-shaped front, over SmolLM2 itself."""

from __future__ import annotations

import asyncio
import itertools
import threading

import pytest

from nbengine import BeamSearchParams, RequestOutputKind, SamplingParams
from nbengine.errors import InvalidField, InvalidRequest

GREEDY = SamplingParams(temperature=0, max_tokens=12)
STORY = "Once upon a time"


def text(outputs):
    return [o.outputs[0].text for o in outputs]


class TestGenerate:
    def test_a_text_token_ids_and_mappings_give_the_same(self, smollm2):
        ids = smollm2.get_tokenizer().encode(STORY)
        (expected,) = smollm2.generate(STORY, GREEDY, use_tqdm=False)
        assert len(expected.outputs[0].text) > 10
        for prompt in (ids, {"prompt": STORY}, {"prompt_token_ids": ids}):
            (out,) = smollm2.generate(prompt, GREEDY, use_tqdm=False)
            assert out.outputs[0].text == expected.outputs[0].text
            assert out.prompt_token_ids == ids

    def test_a_batch_comes_back_in_order_with_its_own_params(self, smollm2):
        prompts = [STORY, "The capital of France is", [1, 2, 3]]
        params = [GREEDY.clone(max_tokens=n, ignore_eos=True) for n in (9, 2, 5)]
        outputs = smollm2.generate(prompts, params, use_tqdm=False)
        assert [len(o.outputs[0].token_ids) for o in outputs] == [9, 2, 5]
        assert [o.prompt for o in outputs] == [*prompts[:2], None]
        assert "Paris" in text(outputs)[1]
        assert all(o.finished and o.outputs[0].finish_reason == "length" for o in outputs)

    def test_a_batch_equals_its_prompts_one_by_one(self, smollm2):
        prompts = [STORY, "The capital of France is", "def fibonacci(n):"]
        together = text(smollm2.generate(prompts, GREEDY, use_tqdm=False))
        assert together == [text(smollm2.generate(p, GREEDY, use_tqdm=False))[0] for p in prompts]

    def test_samples_of_one_prompt_differ_and_are_ordered(self, smollm2):
        params = SamplingParams(n=3, temperature=1.0, seed=5, max_tokens=12)
        (out,) = smollm2.generate(STORY, params, use_tqdm=False)
        assert [o.index for o in out.outputs] == [0, 1, 2]
        assert len({o.text for o in out.outputs}) == 3

    def test_repeated_prompt_reports_its_cached_tokens(self, smollm2):
        ids = list(range(100, 140))
        smollm2.generate(ids, GREEDY, use_tqdm=False)
        (out,) = smollm2.generate(ids, GREEDY, use_tqdm=False)
        assert out.num_cached_tokens == 32

    @pytest.mark.parametrize(
        ("prompts", "params"),
        [
            ([], None),
            ([STORY, ""], None),
            ([STORY, STORY], [GREEDY]),
            ([STORY], {"temperature": 0}),
            (7, None),
        ],
    )
    def test_a_bad_batch_is_refused_whole(self, smollm2, prompts, params):
        with pytest.raises((InvalidRequest, InvalidField)):
            smollm2.generate(prompts, params, use_tqdm=False)
        assert not smollm2.engine.has_work

    def test_progress_bar_can_be_silenced(self, smollm2, capfd):
        smollm2.generate(STORY, GREEDY, use_tqdm=False)
        assert "prompts" not in capfd.readouterr().err
        smollm2.generate(STORY, GREEDY)
        assert "Processed prompts: 100%" in capfd.readouterr().err

    def test_calls_from_several_threads_share_the_batch(self, smollm2):
        prompts = [STORY, "The capital of France is", "Water boils at"]
        expected = text(smollm2.generate(prompts, GREEDY, use_tqdm=False))
        results = {}

        def call(prompt):
            results[prompt] = text(smollm2.generate(prompt, GREEDY, use_tqdm=False))[0]

        threads = [threading.Thread(target=call, args=(p,)) for p in prompts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert [results[p] for p in prompts] == expected


class TestStops:
    def test_a_stop_string_is_cut_even_inside_a_token(self, smollm2):
        (full,) = text(smollm2.generate(STORY, GREEDY.clone(max_tokens=20), use_tqdm=False))
        stop = full[7:12]
        for include in (False, True):
            params = GREEDY.clone(max_tokens=20, stop=[stop], include_stop_str_in_output=include)
            (out,) = smollm2.generate(STORY, params, use_tqdm=False)
            end = full.index(stop) + (len(stop) if include else 0)
            assert out.outputs[0].text == full[:end]
            assert out.outputs[0].finish_reason == "stop"
            assert out.outputs[0].stop_reason == stop

    def test_bad_words_and_logit_bias_keep_words_out(self, smollm2):
        prompt = "The capital of France is"
        (plain,) = text(smollm2.generate(prompt, GREEDY, use_tqdm=False))
        assert "Paris" in plain
        (out,) = text(smollm2.generate(prompt, GREEDY.clone(bad_words=["Paris"]), use_tqdm=False))
        assert "Paris" not in out

    def test_end_of_sequence_ends_a_chat_and_leaves_no_trace_in_its_text(self, smollm2):
        (out,) = smollm2.chat(
            [{"role": "user", "content": "Say hi."}], GREEDY.clone(max_tokens=100), use_tqdm=False
        )
        assert out.outputs[0].finish_reason == "stop"
        assert out.outputs[0].stop_reason is None
        assert "<|im_end|>" not in out.outputs[0].text


class TestChat:
    def test_answers_through_the_models_own_template(self, smollm2):
        question = [{"role": "user", "content": "What is the capital of France?"}]
        (out,) = smollm2.chat(question, GREEDY.clone(max_tokens=24), use_tqdm=False)
        assert "Paris" in out.outputs[0].text
        assert out.prompt.startswith("<|im_start|>system")

    def test_several_conversations_are_a_batch(self, smollm2):
        talks = [[{"role": "user", "content": f"Count to {n}."}] for n in ("two", "three")]
        outputs = smollm2.chat(talks, GREEDY, use_tqdm=False)
        assert len(outputs) == 2
        assert outputs[0].prompt != outputs[1].prompt

    @pytest.mark.parametrize(
        "messages",
        [
            [],
            [{"role": "user"}],
            [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
            [{"content": "hi"}],
        ],
    )
    def test_messages_that_make_no_sense_are_refused(self, smollm2, messages):
        with pytest.raises(InvalidRequest):
            smollm2.chat(messages, GREEDY, use_tqdm=False)


class TestStreams:
    def test_cumulative_and_delta_agree_with_generate(self, smollm2):
        (expected,) = text(smollm2.generate(STORY, GREEDY, use_tqdm=False))
        cumulative = [o.outputs[0].text for o in smollm2.stream(STORY, GREEDY)]
        assert cumulative[-1] == expected
        assert all(b.startswith(a) for a, b in itertools.pairwise(cumulative))
        delta = GREEDY.clone(output_kind=RequestOutputKind.DELTA)
        pieces = list(smollm2.stream(STORY, delta))
        assert "".join(o.outputs[0].text for o in pieces) == expected
        assert sum(len(o.outputs[0].token_ids) for o in pieces) == 12

    def test_async_streams_run_together(self, smollm2):
        prompts = [STORY, "The capital of France is"]
        expected = text(smollm2.generate(prompts, GREEDY, use_tqdm=False))

        async def one(prompt):
            last = None
            async for output in smollm2.astream(prompt, GREEDY):
                last = output.outputs[0].text
            return last

        async def both():
            return await asyncio.gather(*map(one, prompts))

        assert asyncio.run(both()) == expected

    def test_leaving_an_async_stream_aborts_it(self, smollm2):
        async def first_piece():
            stream = smollm2.astream(STORY, GREEDY.clone(max_tokens=500))
            async for output in stream:
                await stream.aclose()
                return output.outputs[0].text

        assert asyncio.run(first_piece())
        smollm2.engine.step()  # waits for the abort, which is queued before it
        assert not smollm2.engine.has_work

    def test_a_chat_streams_too(self, smollm2):
        question = [{"role": "user", "content": "What is the capital of France?"}]
        last = list(smollm2.stream(question, GREEDY.clone(max_tokens=24)))[-1]
        assert "Paris" in last.outputs[0].text


class TestBeamSearch:
    def test_beams_come_best_first_with_the_prompts_text(self, smollm2):
        params = BeamSearchParams(beam_width=3, max_tokens=5, ignore_eos=True)
        (result,) = smollm2.beam_search(STORY, params)
        scores = [beam.cum_logprob for beam in result.sequences]
        assert scores == sorted(scores, reverse=True)
        assert all(beam.text.startswith(STORY) for beam in result.sequences)
        assert len({tuple(beam.tokens) for beam in result.sequences}) == 3
        assert smollm2.engine.scheduler.pool.num_held == 0
