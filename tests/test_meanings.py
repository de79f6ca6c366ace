"""What the fields of params and outputs mean, for a model whose every answer is "Hello world": one
token a character, in a real engine with its sampler replaced by a script."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from nbengine import LLM, RequestOutputKind, SamplingParams

TEXT = "Hello world"
EOS = 2
PROMPT = "Say hello"


def token(char):
    return ord(char) - 30 if char != " " else 258


@pytest.fixture
def scripted(make, tiny_tokenizer):
    """`scripted(answer)`: an LLM that answers with these characters (or ids), then with `!`."""

    def scripted(answer=TEXT, **fields):
        ids = [token(c) if isinstance(c, str) else c for c in answer]
        llm = LLM.__new__(LLM)
        llm.engine = engine = make(tokenizer=tiny_tokenizer, **fields)

        def sample(logits, rows):
            places = [len(row.tokens) - row.num_prompt_tokens for row in rows]
            tokens = [ids[at] if at < len(ids) else token("!") for at in places]
            return SimpleNamespace(
                token_ids=[[t] * len(r.sample_indices) for t, r in zip(tokens, rows, strict=True)],
                logprobs=[None] * len(rows),
                errors={},
            )

        engine._runner.sampler.sample = sample
        return llm

    return scripted


def ending(llm, **fields):
    """(text, tokens as characters, finish reason, stop reason) of one request."""
    params = SamplingParams(**{"max_tokens": 11} | fields)
    (request,) = llm.generate(PROMPT, params, use_tqdm=False)
    (out,) = request.outputs
    return out.text, len(out.token_ids), out.finish_reason, out.stop_reason


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("Hello world", 11, "length", None)),
        ({"max_tokens": 1}, ("H", 1, "length", None)),
        # A stop string that the last allowed token completes is a stop, not a length.
        ({"max_tokens": 5, "stop": "lo"}, ("Hel", 5, "stop", "lo")),
        ({"max_tokens": 1, "stop": "H"}, ("", 1, "stop", "H")),
        ({"max_tokens": 5, "stop": "lo w"}, ("Hello", 5, "length", None)),
        ({"stop": ["zz", "o w"]}, ("Hell", 7, "stop", "o w")),
        ({"stop": "o w", "include_stop_str_in_output": True}, ("Hello w", 7, "stop", "o w")),
        # No stop string is complete before min_tokens tokens are there.
        ({"stop": "l", "min_tokens": 4}, ("Hel", 4, "stop", "l")),
        ({"stop": "l", "min_tokens": 5}, ("Hello wor", 10, "stop", "l")),
        ({"stop_token_ids": [token("o")]}, ("Hell", 5, "stop", token("o"))),
        ({"stop_token_ids": [token("o")], "max_tokens": 5}, ("Hell", 5, "stop", token("o"))),
        ({"stop_token_ids": [token("o")], "min_tokens": 6}, ("Hello w", 8, "stop", token("o"))),
        (
            {"stop_token_ids": [token("o")], "include_stop_str_in_output": True},
            ("Hello", 5, "stop", token("o")),
        ),
        # The token is looked at before the text that it completes.
        ({"stop": "lo", "stop_token_ids": [token("o")]}, ("Hell", 5, "stop", token("o"))),
        ({"detokenize": False}, ("", 11, "length", None)),
        (
            {"detokenize": False, "stop_token_ids": [token("o")]},
            ("", 5, "stop", token("o")),
        ),
        ({"max_tokens": None, "stop": "!!"}, ("Hello world", 13, "stop", "!!")),
    ],
)
def test_endings(scripted, fields, expected):
    assert ending(scripted(), **fields) == expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, ("Hi", 3, "stop", None)),
        ({"ignore_eos": True, "max_tokens": 4}, ("Hi!", 4, "length", None)),
        (
            {"ignore_eos": True, "max_tokens": 4, "skip_special_tokens": False},
            ("Hi</s>!", 4, "length", None),
        ),
        ({"skip_special_tokens": False}, ("Hi", 3, "stop", None)),
        (
            {"skip_special_tokens": False, "include_stop_str_in_output": True},
            ("Hi</s>", 3, "stop", None),
        ),
        ({"stop_token_ids": [EOS]}, ("Hi", 3, "stop", EOS)),
        ({"ignore_eos": True, "stop_token_ids": [EOS]}, ("Hi", 3, "stop", EOS)),
        ({"min_tokens": 4, "max_tokens": 5}, ("Hi!!", 5, "length", None)),
    ],
)
def test_the_end_of_sequence(scripted, fields, expected):
    assert ending(scripted(["H", "i", EOS]), **fields) == expected


def test_a_prompt_one_short_of_the_context_gets_one_token(scripted):
    llm = scripted(max_model_len=64)
    (out,) = llm.generate("x" * 63, SamplingParams(max_tokens=None), use_tqdm=False)
    assert (out.outputs[0].text, out.outputs[0].finish_reason) == ("H", "length")


@pytest.mark.parametrize("kind", RequestOutputKind)
def test_generate_gives_the_whole_output_whatever_its_kind(scripted, kind):
    assert ending(scripted(), output_kind=kind)[0] == TEXT


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (RequestOutputKind.CUMULATIVE, ["H", "He", "He", "Hel", "Hel"]),
        (RequestOutputKind.DELTA, ["H", "e", "", "l", ""]),
        (RequestOutputKind.FINAL_ONLY, ["Hel"]),
    ],
)
def test_streams_hold_back_what_may_become_a_stop_string(scripted, kind, texts):
    params = SamplingParams(max_tokens=11, stop="lo", output_kind=kind)
    outputs = list(scripted().stream(PROMPT, params))
    assert [o.outputs[0].text for o in outputs] == texts
    assert [o.finished for o in outputs] == [False] * (len(texts) - 1) + [True]
    assert outputs[-1].outputs[0].stop_reason == "lo"


def test_priorities_of_one_call_order_its_requests(scripted):
    llm = scripted(scheduling_policy="priority", max_num_seqs=1)
    outputs = llm.generate(
        ["a", "b", "c"], SamplingParams(max_tokens=2), priority=[2, 0, 1], use_tqdm=False
    )
    finished = [o.metrics.finished_time for o in outputs]
    assert finished[1] < finished[2] < finished[0]
    assert [o.prompt for o in outputs] == ["a", "b", "c"]


def test_salts_separate_the_prompts_of_one_call(scripted):
    llm = scripted()
    prompt = "x" * 40
    salted = [{"prompt": prompt, "cache_salt": s} for s in ("A", "B", "A")]
    one = SamplingParams(max_tokens=1)
    assert [llm.generate(p, one, use_tqdm=False)[0].num_cached_tokens for p in salted] == [0, 0, 32]


class TestWithTheRealSampler:
    PARAMS = SamplingParams(temperature=1.0, seed=11, max_tokens=8, ignore_eos=True)

    def test_the_same_seed_gives_the_same_sample_in_any_request(self, make, tiny_tokenizer):
        llm = LLM.__new__(LLM)
        llm.engine = make(tokenizer=tiny_tokenizer)
        several = self.PARAMS.clone(n=3)
        one, again, three = (
            o.outputs
            for o in llm.generate([PROMPT] * 3, [self.PARAMS, self.PARAMS, several], use_tqdm=False)
        )
        assert one[0].token_ids == again[0].token_ids == three[0].token_ids
        for seed in (-(2**63), 2**63 - 1, 0, -2):
            (out,) = llm.generate(PROMPT, self.PARAMS.clone(seed=seed), use_tqdm=False)
            assert len(out.outputs[0].token_ids) == 8

    def test_logprobs_show_special_tokens_and_none_without_detokenising(self, make, tiny_tokenizer):
        engine = make(tokenizer=tiny_tokenizer)
        params = self.PARAMS.clone(logprobs=0, prompt_logprobs=0, allowed_token_ids=[EOS])
        for detokenize in (True, False):
            name = engine.add_request([5, EOS], params.clone(detokenize=detokenize))
            engine.run()
            out = engine.output(name)
            entry = out.outputs[0].logprobs[0][EOS]
            scored = out.prompt_logprobs[1][EOS]
            shown = "</s>" if detokenize else None
            assert (entry.decoded_token, scored.decoded_token) == (shown, shown)
            assert out.outputs[0].text == ""
