"""Bad input, by every way in: each is refused at once (a stream too, before it is iterated) by its
own exception, which says what was wrong, with the numbers, and what to do; and a request that is
running meanwhile ends as if nothing had happened."""

from __future__ import annotations

import contextlib
import json
import math
import shutil

import numpy as np
import pytest
import torch

from nbengine import LLM, BeamSearchParams, Engine, SamplingParams
from nbengine.errors import (
    InvalidField,
    InvalidRequest,
    ModelNotFound,
    NbengineError,
    NotEnoughMemory,
    RequestTooLarge,
    UnsupportedModel,
    WeightsError,
)

GOOD = [5, 20, 21, 22]
PARAMS = SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
BEAMS = {"beam_width": 2, "max_tokens": 4}
HUGE = 2**70

WAYS = {
    "add_request": lambda llm, prompt, params: llm.engine.add_request(prompt, params),
    "generate": lambda llm, prompt, params: llm.generate([prompt], params, use_tqdm=False),
    "generate_among_good_ones": lambda llm, prompt, params: llm.generate(
        [GOOD, prompt, GOOD], params, use_tqdm=False
    ),
    "stream": lambda llm, prompt, params: llm.stream(prompt, params),
    "astream": lambda llm, prompt, params: llm.astream(prompt, params),
    "beam_search": lambda llm, prompt, params: llm.beam_search([prompt], BeamSearchParams(**BEAMS)),
}
"""(llm, prompt, params). Nothing is iterated or awaited."""

WITH_PARAMS = [way for way in WAYS if way != "beam_search"]
ROUNDABOUT = {
    "chat": lambda llm, params: llm.chat(
        [{"role": "user", "content": "hi"}], params, use_tqdm=False
    ),
    **{way: lambda llm, params, call=WAYS[way]: call(llm, GOOD, params) for way in WITH_PARAMS},
}
"""(llm, params), with a good prompt."""


@pytest.fixture(scope="module")
def llm(tiny_llama, tiny_tokenizer):
    with LLM(
        tiny_llama,
        tokenizer=tiny_tokenizer,
        max_model_len=100,
        num_gpu_blocks_override=8,
        max_num_seqs=4,
        dtype="float32",
    ) as llm:
        yield llm


@pytest.fixture(scope="module")
def expected(llm):
    (out,) = llm.generate([GOOD], PARAMS, use_tqdm=False)
    return out.outputs[0].token_ids


@pytest.fixture
def bystander(llm, expected):
    """Runs a step before the test and the rest after it; nothing else may be left by then."""
    engine = llm.engine
    name = engine.add_request(GOOD, PARAMS)
    engine.step()
    yield
    assert engine.has_work
    snapshot = engine.snapshot()
    assert [s.request_id for s in (*snapshot.running, *snapshot.waiting)] == [name]
    assert not engine.requests.driven
    engine.run()
    assert engine.output(name).outputs[0].token_ids == expected
    assert engine.scheduler.pool.num_held == 0


@contextlib.contextmanager
def refused(kind, words):
    with pytest.raises(kind, match=words) as caught:
        yield caught
    assert isinstance(caught.value, NbengineError)
    assert len(str(caught.value)) < 600


BAD_PROMPTS = {
    "no_ids": ([], InvalidRequest, "empty"),
    "no_text": ("", InvalidRequest, "empty"),
    "nothing": (None, InvalidRequest, "prompt"),
    "number": (7.5, InvalidRequest, "float"),
    "negative_id": ([5, -1], InvalidRequest, "token 1 has id -1.*0 to 499"),
    "id_beyond_the_vocabulary": ([5, 500], InvalidRequest, "token 1 has id 500.*0 to 499"),
    "huge_id": ([HUGE], InvalidRequest, "0 to 499"),
    "absurd_id": ([10**5000], InvalidRequest, "0 to 499"),
    "bool_id": ([True, 5], InvalidRequest, "token 0 is True .bool"),
    "float_id": ([5, 6.0], InvalidRequest, "token 1 is 6.0 .float"),
    "nan_id": ([math.nan], InvalidRequest, "float"),
    "text_among_ids": ([5, "x"], InvalidRequest, "token 1 is 'x'"),
    "none_among_ids": ([5, None], InvalidRequest, "NoneType"),
    "nested_ids": ([5, [6]], InvalidRequest, "list"),
    "float_array": (np.array([1.0, 2.0]), InvalidRequest, "float"),
    "array_without_dimensions": (np.array(5), InvalidRequest, "ndarray"),
    "tensor_without_dimensions": (torch.tensor(5), InvalidRequest, "Tensor"),
    "endless": (iter(int, 1), InvalidRequest, "callable_iterator"),
    "longer_than_memory": (range(10**15), InvalidRequest, "999999999999901"),
    "bytes": (b"abc", InvalidRequest, "bytes"),
    "as_long_as_the_model": ([5] * 100, InvalidRequest, "100 tokens.*is 100.*shorten.* by 1,"),
    "text_as_long_as_the_model": ("x" * 100, InvalidRequest, "100 tokens.*is 100"),
    "text_too_long_to_look_at": ("x" * 10**7, InvalidRequest, "10,000,000 characters.*100"),
    "half_a_surrogate_pair": ("ab\ud800", InvalidRequest, "character 2"),
    "empty_mapping": ({}, InvalidRequest, "prompt_token_ids"),
    "unknown_key": ({"prompt": "x", "salt": "y"}, InvalidRequest, "'salt'.*cache_salt"),
    "text_of_bytes": ({"prompt": b"x"}, InvalidRequest, "bytes"),
    "ids_of_a_mapping": ({"prompt_token_ids": {5: 6}}, InvalidRequest, "dict"),
    "empty_salt": ({"prompt": "x", "cache_salt": ""}, InvalidField, "cache_salt=''.*1 to 128"),
    "huge_salt": ({"prompt": "x", "cache_salt": "s" * 10**6}, InvalidField, "1 to 128"),
    "number_as_salt": ({"prompt": "x", "cache_salt": 5}, InvalidField, "cache_salt=5"),
}


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("case", BAD_PROMPTS)
def test_bad_prompts(llm, case, way):
    prompt, kind, words = BAD_PROMPTS[case]
    with refused(kind, words):
        WAYS[way](llm, prompt, PARAMS)


FLOATS = (
    "presence_penalty", "frequency_penalty", "repetition_penalty", "temperature", "top_p", "min_p",
)  # fmt: skip
INTEGERS = ("n", "top_k", "seed", "max_tokens", "min_tokens", "logprobs", "prompt_logprobs")
BOOLEANS = ("ignore_eos", "detokenize", "skip_special_tokens", "include_stop_str_in_output")
BAD_PARAMS = [
    *((name, value) for name in FLOATS for value in (math.nan, math.inf, -math.inf, True, "1")),
    *((name, value) for name in FLOATS for value in (HUGE**20, -0.5 if name[0] not in "pf" else 3)),
    *((name, value) for name in INTEGERS for value in (True, 1.0, math.nan, "1", HUGE, -HUGE)),
    *((name, value) for name in BOOLEANS for value in (1, 0, "yes", None)),
    ("n", 0), ("n", -1), ("n", 16385),
    ("top_p", 0), ("top_p", 1.01), ("top_k", -2), ("min_p", 1.01),
    ("max_tokens", 0), ("max_tokens", -1), ("min_tokens", -1), ("min_tokens", 17),
    ("logprobs", -2), ("logprobs", 21), ("logprobs", -1),
    ("prompt_logprobs", -2), ("prompt_logprobs", 21),
    ("stop", ""), ("stop", [""]), ("stop", [5]), ("stop", 5),
    ("stop_token_ids", 5), ("stop_token_ids", [-1]), ("stop_token_ids", [500]),
    ("stop_token_ids", [True]), ("stop_token_ids", [HUGE]),
    ("allowed_token_ids", []), ("allowed_token_ids", [500]), ("allowed_token_ids", [1.5]),
    ("logit_bias", {500: 1.0}), ("logit_bias", {-1: 1.0}), ("logit_bias", {5: math.nan}),
    ("logit_bias", {5: 101}), ("logit_bias", {True: 1.0}), ("logit_bias", [5]),
    ("bad_words", [""]), ("bad_words", [5]), ("output_kind", 1), ("output_kind", "delta"),
]  # fmt: skip


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("way", ROUNDABOUT)
@pytest.mark.parametrize(("name", "value"), BAD_PARAMS, ids=lambda v: f"{v!r:.20}")
def test_bad_sampling_params_name_field_and_value(llm, way, name, value):
    with refused(InvalidField, name) as caught:
        ROUNDABOUT[way](llm, SamplingParams(**{name: value}))
    assert caught.value.field == name


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("way", ROUNDABOUT)
@pytest.mark.parametrize(
    ("params", "kind", "words"),
    [
        ({"temperature": 0}, InvalidField, "params"),
        ("greedy", InvalidField, "params"),
        (SamplingParams, InvalidField, "params"),
        (SamplingParams(min_tokens=100, max_tokens=100), InvalidField, "min_tokens=100.*fit"),
        (SamplingParams(n=5), RequestTooLarge, "5 sequences.*max_num_seqs is 4"),
        (SamplingParams(bad_words=["\ud800"]), InvalidRequest, "surrogate"),
    ],
    ids=["dict", "text", "class", "min_tokens", "n", "bad_words"],
)
def test_params_of_another_kind_or_too_large_for_this_engine(llm, way, params, kind, words):
    with refused(kind, words):
        ROUNDABOUT[way](llm, params)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    "fields",
    [
        {"beam_width": 0}, {"beam_width": True}, {"beam_width": HUGE}, {"beam_width": 2.0},
        {"beam_width": 251}, {"max_tokens": 0}, {"max_tokens": None}, {"max_tokens": math.inf},
        {"temperature": math.nan}, {"temperature": -1}, {"length_penalty": math.inf},
        {"length_penalty": True}, {"ignore_eos": 1}, {"include_stop_str_in_output": None},
    ],
    ids=str,
)  # fmt: skip
def test_bad_beams(llm, fields):
    with refused(InvalidField, next(iter(fields))):
        llm.beam_search(GOOD, BeamSearchParams(**BEAMS | fields))


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("params", [None, PARAMS, {"beam_width": 2}])
def test_beam_search_takes_beam_search_params_only(llm, params):
    with refused(InvalidField, "BeamSearchParams"):
        llm.beam_search(GOOD, params)


@pytest.mark.usefixtures("bystander")
def test_more_beams_than_seats_are_refused_with_the_numbers(llm):
    with refused(RequestTooLarge, "5 sequences.*max_num_seqs is 4"):
        llm.beam_search(GOOD, BeamSearchParams(**BEAMS | {"beam_width": 5}))


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("way", ["add_request", "stream", "astream"])
@pytest.mark.parametrize(
    "options",
    [
        {"priority": 1.5}, {"priority": True}, {"priority": 2**63}, {"priority": math.nan},
        {"request_id": ""}, {"request_id": "a#1"}, {"request_id": 5}, {"request_id": "x" * 257},
        {"cache_salt": ""}, {"cache_salt": "x" * 129}, {"cache_salt": b"x"},
    ],
    ids=lambda options: f"{options!r:.30}",
)  # fmt: skip
def test_bad_options(llm, way, options):
    call = getattr(llm.engine if way == "add_request" else llm, way)
    with refused(InvalidField, next(iter(options))):
        call(GOOD, PARAMS, **options)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    ("prompts", "options", "kind", "words"),
    [
        ([], {}, InvalidRequest, "empty"),
        (7, {}, InvalidRequest, "int"),
        (None, {}, InvalidRequest, "NoneType"),
        (b"abc", {}, InvalidRequest, "bytes"),
        (["x", 5], {}, InvalidRequest, "int"),
        (["x", "y"], {"sampling_params": [PARAMS]}, InvalidRequest, "1 sampling_params for 2"),
        (["x", "y"], {"priority": [1, 2, 3]}, InvalidRequest, "3 priority for 2"),
        (["x", "y"], {"priority": [1, 2.5]}, InvalidField, "priority=2.5"),
        (["x", "y"], {"priority": [1, HUGE]}, InvalidField, "64-bit"),
    ],
)
def test_bad_batches_are_refused_whole(llm, prompts, options, kind, words):
    with refused(kind, words):
        llm.generate(prompts, **{"sampling_params": PARAMS} | options, use_tqdm=False)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    ("messages", "options", "kind", "words"),
    [
        ([], {}, InvalidRequest, "no messages"),
        (None, {}, InvalidRequest, "NoneType"),
        (5, {}, InvalidRequest, "int"),
        ("hi", {}, InvalidRequest, "str"),
        ({"role": "user", "content": "hi"}, {}, InvalidRequest, "dict"),
        ([[]], {}, InvalidRequest, "empty"),
        ([5], {}, InvalidRequest, "int"),
        ([{"role": "king", "content": "hi"}], {}, InvalidRequest, "'king'"),
        ([{"role": "user"}], {}, InvalidRequest, "content"),
        ([{"role": "user", "content": "\ud800"}], {}, InvalidRequest, "surrogate"),
        ([{"role": "user", "content": "x" * 200}], {}, InvalidRequest, "201 tokens"),
        (..., {"chat_template_kwargs": {"messages": []}}, InvalidField, "messages"),
        (..., {"chat_template_kwargs": {"tokenizer": 5}}, InvalidField, "tokenizer"),
        (..., {"chat_template_kwargs": {5: 5}}, InvalidField, "names"),
        (..., {"chat_template_kwargs": "x"}, InvalidField, "chat_template_kwargs='x'"),
    ],
)
def test_bad_chats(llm, messages, options, kind, words):
    messages = [{"role": "user", "content": "hi"}] if messages is ... else messages
    with refused(kind, words):
        llm.chat(messages, PARAMS, use_tqdm=False, **options)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    "call",
    [
        lambda e: e.step(0), lambda e: e.step(True), lambda e: e.step(1.5),
        lambda e: e.run(0), lambda e: e.run(max_steps=-1), lambda e: e.run(math.inf),
        lambda e: e.set_policy("lifo"), lambda e: e.set_policy(5), lambda e: e.on_step(5),
        lambda e: e.add_request(GOOD, PARAMS, subscriber=5),
    ],
)  # fmt: skip
def test_bad_commands(llm, call):
    with refused(InvalidField, "="):
        call(llm.engine)


class TestWithoutATokenizer:
    @pytest.mark.parametrize("field", ["stop", "bad_words"])
    def test_words_are_refused_rather_than_never_found(self, make, field):
        with refused(InvalidField, f"{field}=.*skip_tokenizer_init"):
            make().add_request(GOOD, SamplingParams(**{field: ["x"]}))

    def test_texts_are_refused(self, make):
        with refused(InvalidRequest, "give prompt_token_ids"):
            make().add_request("hi", PARAMS)


INTEGER_FIELDS = (
    "block_size", "max_num_batched_tokens", "max_num_seqs", "max_model_len",
    "num_gpu_blocks_override", "long_prefill_token_threshold", "max_logprobs", "seed",
)  # fmt: skip
BAD_CONFIGS = [
    *((name, value) for name in INTEGER_FIELDS for value in (True, 1.5, "8", math.nan, -HUGE)),
    *(
        (name, value)
        for name in ("gpu_memory_utilization", "swap_space")
        for value in (True, math.nan, math.inf, -1, "1", HUGE**20)
    ),
    *(
        (name, value)
        for name in (
            "enable_prefix_caching", "enable_chunked_prefill", "skip_tokenizer_init",
            "enforce_eager",
            "batch_invariant",
        )
        for value in (1, 0, "yes", None)
    ),
    ("block_size", 12), ("block_size", 0), ("max_num_seqs", 0), ("max_model_len", 257),
    ("max_model_len", HUGE), ("quantization", "fp8"), ("load_format", "pt"), ("load_format", "gguf"),
    ("dtype", "int8"), ("dtype", torch.float32), ("device", "tpu"), ("device", "meta"),
    ("device", 5), ("device", None), ("device", "cuda:99"), ("preemption_mode", "drop"),
    ("scheduling_policy", "lifo"), ("scheduling_policy", 5), ("model", 5), ("model", ""),
    ("tokenizer", 5), ("tokenizer", ""), ("no_such_field", 1),
]  # fmt: skip


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("front", [Engine, LLM])
@pytest.mark.parametrize(("name", "value"), BAD_CONFIGS, ids=lambda v: f"{v!r:.20}")
def test_bad_config_names_field_and_value(tiny_llama, front, name, value):
    fields = {"model": tiny_llama, "skip_tokenizer_init": True, "num_gpu_blocks_override": 8}
    with refused(InvalidField, name) as caught:
        front(**fields | {name: value})
    assert caught.value.field == name


@pytest.mark.parametrize("config", ["smollm2-135m", {"model": "x"}, 5])
def test_a_config_of_another_kind(config):
    with refused(InvalidField, "EngineConfig.*model="):
        Engine(config)


def broken(tiny_llama, folder, **changes):
    """A copy of the model: file name to bytes, a function of its bytes, or None to leave it out."""
    shutil.copytree(tiny_llama, folder)
    for name, change in changes.items():
        path = folder / name.replace("__", ".")
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(path.read_bytes()) if callable(change) else change)
    return folder


def with_fields(**fields):
    return lambda data: json.dumps(json.loads(data) | fields).encode()


BAD_MODELS = {
    "truncated": ({"model__safetensors": lambda d: d[:-100]}, WeightsError, "bytes.*truncated"),
    "garbage": ({"model__safetensors": bytes(range(256)) * 9}, WeightsError, "2,304 bytes"),
    "empty": ({"model__safetensors": b""}, WeightsError, "0 bytes"),
    "no_weights": ({"model__safetensors": None}, WeightsError, "no weights"),
    "no_config": ({"config__json": None}, ModelNotFound, "no config.json"),
    "config_is_no_json": ({"config__json": b"{"}, WeightsError, "config.json"),
    "unsupported_architecture": (
        {"config__json": with_fields(architectures=["GPT2LMHeadModel"])},
        UnsupportedModel,
        "GPT2LMHeadModel.*LlamaForCausalLM",
    ),
    "misshapen": ({"config__json": with_fields(hidden_size=128)}, WeightsError, r"\[500, 64\]"),
    "generation_config_is_no_json": ({"generation_config__json": b"]"}, WeightsError, "generation"),
}


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_models(tiny_llama, tmp_path, case):
    changes, kind, words = BAD_MODELS[case]
    path = broken(tiny_llama, tmp_path / "model", **changes)
    with refused(kind, words):
        LLM(path, skip_tokenizer_init=True, num_gpu_blocks_override=8)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("data", [b"", b"GGUF", b"GGUF" + bytes(100), b"GG" * 100])
def test_bad_gguf_files(tmp_path, data):
    path = tmp_path / "model.gguf"
    path.write_bytes(data)
    with refused(WeightsError, "model.gguf"):
        LLM(path)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("name", ["no-such-model", "/no/such/place", "a\0b", "x" * 5000, "\ud800"])
def test_missing_models(name):
    with refused(ModelNotFound, "model"):
        LLM(name)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize("tokenizer", ["/no/such/place", "a\0b"])
def test_missing_tokenizers(tiny_llama, tokenizer):
    with refused(ModelNotFound, "tokenizer"):
        LLM(tiny_llama, tokenizer=tokenizer)


@pytest.mark.usefixtures("bystander")
@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"num_gpu_blocks_override": 10**9}, r"10{9} blocks .* at most \d+"),
        ({"num_gpu_blocks_override": HUGE}, r"at most \d+"),
        ({"num_gpu_blocks_override": 8, "max_model_len": 129}, "needs 9 blocks.* to 128 or less"),
        ({"gpu_memory_utilization": 1e-9}, "usable.*try"),
        (
            {"max_num_batched_tokens": HUGE, "gpu_memory_utilization": 0.05},
            "activations.*smaller max_num_batched_tokens",
        ),
    ],
)
def test_too_little_memory(tiny_llama, fields, words):
    with refused(NotEnoughMemory, words):
        LLM(tiny_llama, skip_tokenizer_init=True, **fields)


def test_a_loader_that_runs_out_of_memory_is_no_bare_error_of_torch(tiny_llama, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr("nbengine.execution.runner.KVCache.allocate", fail)
    with pytest.raises(NotEnoughMemory, match="gpu_memory_utilization"):
        LLM(tiny_llama, skip_tokenizer_init=True, num_gpu_blocks_override=8)
