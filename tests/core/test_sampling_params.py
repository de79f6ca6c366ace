"""What may be asked of the sampler: every refusal names its field, everything accepted is plain."""

from __future__ import annotations

import copy
import math
import pickle
import subprocess
import sys
from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from nbengine.core.sampling_params import (
    MAX_NUM_SAMPLES,
    MIN_TEMPERATURE,
    BeamSearchParams,
    RequestOutputKind,
    SamplingParams,
    validate_for_model,
    validate_prompt_token_ids,
)
from nbengine.errors import InvalidField, InvalidRequest

NAN, INF = math.nan, math.inf
HUGE = 10**400
UNPRINTABLE = 10**5000

REFUSED = {
    "n": [0, -1, MAX_NUM_SAMPLES + 1, 2**63, UNPRINTABLE, True, 1.0, "2", None, NAN],
    "presence_penalty": [-2.01, 2.01, NAN, INF, -INF, True, "1", None, HUGE],
    "frequency_penalty": [-2.01, 2.01, NAN, INF, True, "1", None],
    "repetition_penalty": [0, 0.0, -1, NAN, INF, False, "1", None, 1e-300, 1e300],
    "temperature": [-0.1, -1, NAN, INF, -INF, True, "0", None, HUGE, 1e39],
    "top_p": [0, 0.0, -0.5, 1.0001, NAN, INF, True, "1", None],
    "top_k": [-2, 2**63, True, 5.0, "5", None, NAN],
    "min_p": [-0.01, 1.01, NAN, INF, True, "0", None],
    "seed": [2**63, -(2**63) - 1, True, 1.0, "1", NAN],
    "stop": ["", ["a", ""], [1], 1, b"a", [b"a"], {"a": 1}, [None]],
    "stop_token_ids": [[-1], [True], [1.0], ["1"], "1", 1, [2**63], {1: 1}],
    "ignore_eos": [0, 1, None, "yes"],
    "max_tokens": [0, -1, True, 1.0, "1", 2**63, NAN],
    "min_tokens": [-1, True, 1.0, "1", None, 17],
    "logprobs": [-2, True, 1.0, "1", 2**63],
    "prompt_logprobs": [-2, True, 1.0, "1", 2**63],
    "detokenize": [1, None],
    "skip_special_tokens": [1, None],
    "include_stop_str_in_output": [1, None],
    "logit_bias": [
        [(1, 1.0)],
        {-1: 1.0},
        {True: 1.0},
        {1.0: 1.0},
        {"x": 1.0},
        {"-1": 1.0},
        {"1_0": 1.0},
        {" 1": 1.0},
        {"٣": 1.0},
        {"9" * 5000: 1.0},
        {2**63: 1.0},
        {1: 1.0, "1": 2.0},
        {1: NAN},
        {1: INF},
        {1: 100.5},
        {1: -101},
        {1: True},
        {1: "1"},
        {1: None},
    ],
    "allowed_token_ids": [[], (), [-1], [True], [1.5], "12", 5, [2**63]],
    "bad_words": ["", ["ok", ""], [1], 1],
    "output_kind": [0, "DELTA", None, True],
}


@pytest.mark.parametrize(
    ("field", "value"),
    [(field, value) for field, values in REFUSED.items() for value in values],
    ids=lambda v: v if isinstance(v, str) and v.isidentifier() else "value",
)
def test_a_value_out_of_range_or_of_the_wrong_type_is_refused_by_name(field, value):
    with pytest.raises(InvalidField) as refusal:
        SamplingParams(**{field: value})
    assert refusal.value.field == field
    assert str(refusal.value).startswith(field)


def test_defaults_are_those_a_vllm_user_knows():
    params = SamplingParams()
    assert (params.n, params.max_tokens, params.min_tokens, params.seed) == (1, 16, 0, None)
    assert (params.temperature, params.top_p, params.top_k, params.min_p) == (1.0, 1.0, 0, 0.0)
    assert (params.presence_penalty, params.frequency_penalty) == (0.0, 0.0)
    assert params.repetition_penalty == 1.0
    assert (params.logprobs, params.prompt_logprobs) == (None, None)
    assert params.detokenize and params.skip_special_tokens
    assert not params.ignore_eos and not params.include_stop_str_in_output
    assert (params.logit_bias, params.allowed_token_ids) == (None, None)
    assert not params.stop and not params.stop_token_ids and not params.bad_words
    assert params.output_kind is RequestOutputKind.CUMULATIVE


def test_the_ends_of_every_range_are_accepted():
    SamplingParams(
        n=MAX_NUM_SAMPLES,
        presence_penalty=-2,
        frequency_penalty=2,
        top_p=1,
        top_k=2**63 - 1,
        min_p=1,
        seed=-(2**63),
        max_tokens=1,
        min_tokens=1,
        logprobs=-1,
        prompt_logprobs=0,
        logit_bias={0: -100, 1: 100},
    )
    SamplingParams(max_tokens=None, min_tokens=2**63 - 1, seed=2**63 - 1, min_p=0, top_p=1e-9)


def test_numbers_are_stored_as_plain_python_numbers():
    params = SamplingParams(
        n=np.int64(2),
        temperature=1,
        top_p=np.float32(0.5),
        top_k=np.int32(7),
        stop_token_ids=np.array([3, 4]),
        logit_bias={"5": 1, np.int64(6): np.float64(2)},
    )
    assert (type(params.n), type(params.temperature), type(params.top_p)) == (int, float, float)
    assert params.stop_token_ids == (3, 4)
    assert all(type(token_id) is int for token_id in params.stop_token_ids)
    assert params.logit_bias == {5: 1.0, 6: 2.0}
    assert all(type(bias) is float for bias in params.logit_bias.values())


def test_one_stop_string_is_a_list_of_one():
    assert SamplingParams(stop="###").stop == SamplingParams(stop=["###"]).stop == ("###",)


def test_minus_one_means_off_for_top_k_and_unset_for_seed():
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(seed=-1).seed is None


def test_a_tiny_temperature_is_raised_and_zero_is_greedy():
    assert SamplingParams(temperature=1e-6).temperature == MIN_TEMPERATURE
    assert not SamplingParams(temperature=1e-6).greedy
    assert SamplingParams(temperature=0).greedy
    assert SamplingParams(temperature=-0.0).greedy


def test_several_greedy_samples_are_refused_because_they_would_be_equal():
    with pytest.raises(InvalidField, match="greedy") as refusal:
        SamplingParams(n=2, temperature=0)
    assert refusal.value.field == "n"


def test_stop_strings_need_text_to_look_in():
    with pytest.raises(InvalidField, match="detokenize"):
        SamplingParams(stop=["x"], detokenize=False)
    SamplingParams(stop=[], detokenize=False)


def test_min_tokens_may_equal_but_not_pass_max_tokens():
    SamplingParams(min_tokens=4, max_tokens=4)
    with pytest.raises(InvalidField, match="max_tokens=4") as refusal:
        SamplingParams(min_tokens=5, max_tokens=4)
    assert (refusal.value.field, refusal.value.value) == ("min_tokens", 5)


def test_later_changes_to_the_callers_lists_and_dicts_change_nothing():
    stop, ids, bias, words = ["a"], [1], {1: 1.0}, ["w"]
    params = SamplingParams(
        stop=stop, stop_token_ids=ids, allowed_token_ids=ids, logit_bias=bias, bad_words=words
    )
    before = copy.deepcopy(params)
    stop.append("")
    ids.append(-1)
    bias[-1] = NAN
    words[0] = ""
    assert params == before


def test_params_are_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError):
        SamplingParams().n = 2
    with pytest.raises(TypeError):
        SamplingParams(2)
    with pytest.raises(TypeError, match="best_off"):
        SamplingParams(best_off=2)


def test_clone_changes_what_is_named_and_validates_it():
    params = SamplingParams(temperature=0.5, stop="x", logit_bias={1: 2.0})
    clone = params.clone(n=3)
    assert (clone.n, clone.temperature, clone.stop, clone.logit_bias) == (3, 0.5, ("x",), {1: 2.0})
    assert params.n == 1 and clone.logit_bias is not params.logit_bias
    with pytest.raises(InvalidField):
        params.clone(top_p=0)


def test_params_can_be_hashed_copied_and_pickled():
    params = SamplingParams(logit_bias={1: 1.0}, stop=["a"])
    assert hash(params) == hash(params.clone())
    assert copy.deepcopy(params) == pickle.loads(pickle.dumps(params)) == params


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("beam_width", 0),
        ("beam_width", True),
        ("beam_width", MAX_NUM_SAMPLES + 1),
        ("max_tokens", 0),
        ("max_tokens", None),
        ("temperature", -1),
        ("temperature", NAN),
        ("length_penalty", INF),
        ("length_penalty", "1"),
        ("ignore_eos", 1),
        ("include_stop_str_in_output", None),
    ],
)
def test_beam_search_refuses_bad_values_by_name(field, value):
    with pytest.raises(InvalidField) as refusal:
        BeamSearchParams(**{"beam_width": 2, "max_tokens": 8, field: value})
    assert refusal.value.field == field


def test_beam_search_clone_validates():
    params = BeamSearchParams(beam_width=4, max_tokens=8, length_penalty=0.5)
    assert params.clone(max_tokens=9).length_penalty == 0.5
    with pytest.raises(InvalidField):
        params.clone(beam_width=0)


MODEL = {"vocab_size": 100, "max_model_len": 64, "num_prompt_tokens": 10}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stop_token_ids", [5, 100]),
        ("allowed_token_ids", [100]),
        ("logit_bias", {100: 1.0}),
        ("logprobs", 21),
        ("logprobs", -1),
        ("prompt_logprobs", 21),
        ("prompt_logprobs", -1),
    ],
)
def test_what_the_model_or_engine_cannot_do_is_refused_by_name(field, value):
    with pytest.raises(InvalidField) as refusal:
        validate_for_model(SamplingParams(**{field: value}), **MODEL)
    assert refusal.value.field == field


def test_the_last_id_of_the_logits_and_the_last_allowed_logprob_pass():
    params = SamplingParams(
        stop_token_ids=[99], allowed_token_ids=[99], logit_bias={99: 1}, logprobs=20
    )
    validate_for_model(params, **MODEL)


def test_all_logprobs_need_an_engine_without_limit():
    params = SamplingParams(logprobs=-1, prompt_logprobs=100)
    validate_for_model(params, **MODEL, max_logprobs=-1)
    with pytest.raises(InvalidField, match="whole vocabulary, 100"):
        validate_for_model(params, **MODEL, max_logprobs=99)
    with pytest.raises(InvalidField, match="prompt_logprobs"):
        validate_for_model(SamplingParams(prompt_logprobs=101), **MODEL, max_logprobs=-1)


def test_min_tokens_must_fit_behind_the_prompt():
    validate_for_model(SamplingParams(min_tokens=54, max_tokens=None), **MODEL)
    with pytest.raises(InvalidField, match="only 54 output tokens fit"):
        validate_for_model(SamplingParams(min_tokens=55, max_tokens=None), **MODEL)


def test_beams_need_two_candidates_each():
    validate_for_model(BeamSearchParams(beam_width=50, max_tokens=1), **MODEL)
    with pytest.raises(InvalidField, match="102 candidate"):
        validate_for_model(BeamSearchParams(beam_width=51, max_tokens=1), **MODEL)


def test_prompt_ids_become_a_tuple_of_plain_ints():
    prompt = validate_prompt_token_ids(np.array([1, 2, 99], dtype=np.int32), 100, 8)
    assert prompt == (1, 2, 99)
    assert all(type(token_id) is int for token_id in prompt)
    assert validate_prompt_token_ids(range(7), 100, 8) == tuple(range(7))


@pytest.mark.parametrize(
    ("ids", "words"),
    [
        ([], "empty"),
        ([1, True], "token 1 is True"),
        ([1, 2.0], "token 1 is 2.0"),
        (["1"], "token 0"),
        ([[1]], "token 0"),
        ([None], "NoneType"),
        ([5, -1], "token 1 has id -1"),
        ([100], "ids 0 to 99"),
        ([2**63], "ids 0 to 99"),
        (np.array([1.0]), "float64"),
        ("text", "not str"),
        (b"12", "not bytes"),
        (7, "not int"),
        (list(range(8)), "shorten the prompt by 1"),
        (list(range(10)), "shorten the prompt by 3"),
    ],
)
def test_a_prompt_that_no_engine_could_serve_is_refused_with_numbers(ids, words):
    with pytest.raises(InvalidRequest, match=words):
        validate_prompt_token_ids(ids, 100, 8)


def test_a_prompt_id_too_long_to_print_is_refused_too():
    with pytest.raises(InvalidRequest):
        validate_prompt_token_ids([UNPRINTABLE], 100, 8)


def test_importing_params_imports_no_torch():
    code = (
        "import sys, nbengine.core.sampling_params, nbengine.core.logprobs;"
        "assert not {'torch', 'numpy', 'IPython'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
