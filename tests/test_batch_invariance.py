"""`batch_invariant=True`: a request's logits are the same to the last bit, whatever a step holds
besides. Each way to run a model is asked for the logits of the same requests: one alone after the
other, then together with the steps cut as unkindly as a scheduler can."""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import nbengine.cpu
from nbengine import BeamSearchParams, Engine, SamplingParams
from nbengine.execution.sampler import Sampler
from tests.gpu import needs_gpu
from tests.smollm2 import smollm2_path
from tests.tiny_models import CONFIGS, SERVED, random_tokens, save_reference

GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
REQUESTS = {
    "short": (random_tokens(5, seed=5), GREEDY.clone(logprobs=3)),
    "long": (random_tokens(40, seed=40), GREEDY),
    "scored": (random_tokens(18, seed=18), GREEDY.clone(prompt_logprobs=2)),
    "samples": (random_tokens(17, seed=17), GREEDY.clone(n=3, temperature=1.0, top_p=0.9, seed=5)),
    "beams": (
        random_tokens(33, seed=33),
        BeamSearchParams(beam_width=2, max_tokens=6, ignore_eos=True),
    ),
    "one": (random_tokens(1, seed=1), GREEDY.clone(temperature=1.0, seed=7)),
}
FEW_BLOCKS = {"num_gpu_blocks_override": 12, "max_model_len": 64, "swap_space": 0.01}
"""That don't do for all requests at once."""


@dataclass
class Found:
    """What an engine computed."""

    logits: dict[tuple[str, int], Tensor] = field(default_factory=dict)
    """By sequence and position: each that a token was sampled from."""
    outputs: dict[str, Any] = field(default_factory=dict)
    """By request: ids, log-probabilities of outputs and prompt, scores of beams."""


@pytest.fixture
def logits(monkeypatch: pytest.MonkeyPatch) -> dict[tuple[str, int], Tensor]:
    """Everything that is sampled from, as it is."""
    seen: dict[tuple[str, int], Tensor] = {}
    sample = Sampler.sample

    def seen_and_sampled(self: Sampler, logits: Tensor, rows: Any) -> Any:
        for row, values in zip(rows, logits, strict=True):
            seen[row.seq_id, len(row.tokens)] = values.to("cpu", copy=True)
        return sample(self, logits, rows)

    monkeypatch.setattr(Sampler, "sample", seen_and_sampled)
    return seen


class Lab:
    """One model, run in one way."""

    def __init__(self, model: Path, logits: dict[tuple[str, int], Tensor], **fields: Any) -> None:
        self.model, self.logits, self.fields = model, logits, fields

    def engine(self, **fields: Any) -> Engine:
        settings = {"skip_tokenizer_init": True, "max_model_len": 128, "block_size": 8}
        settings |= {"num_gpu_blocks_override": 64, "batch_invariant": True}
        return Engine(model=self.model, **settings | self.fields | fields)

    def run(self, engine: Engine, names: Collection[str] = REQUESTS, num_others: int = 0) -> Found:
        """These requests together, and what they gave; and others beside them."""
        self.logits.clear()
        for seed in range(num_others):
            engine.add_request(random_tokens(1 + seed % 9, seed=seed), GREEDY)
        for name in names:
            engine.add_request(*REQUESTS[name], request_id=name)
        engine.run()
        found = Found({at: x for at, x in self.logits.items() if at[0].partition("#")[0] in names})
        for name in names:
            output = engine.output(name)
            assert all(o.finish_reason == "length" for o in output.outputs)
            of_samples = [(o.token_ids, o.logprobs, o.cumulative_logprob) for o in output.outputs]
            found.outputs[name] = of_samples, output.prompt_logprobs
        return found

    def alone(self, **fields: Any) -> Found:
        """One request after the other, whole prompts at once, and nothing kept from one to the
        next."""
        every = Found()
        with self.engine(enable_prefix_caching=False, **fields) as engine:
            for name in REQUESTS:
                found = self.run(engine, [name])
                every.logits |= found.logits
                every.outputs |= found.outputs
        return every


def differing(found: Found, expected: Found) -> list[tuple[str, int]]:
    assert found.logits.keys() == expected.logits.keys()
    return [at for at in found.logits if not torch.equal(found.logits[at], expected.logits[at])]


def assert_same(found: Found, expected: Found) -> None:
    assert not differing(found, expected)
    assert found.outputs == expected.outputs


def check(lab: Lab) -> None:
    """All that the mode promises."""
    expected = lab.alone()
    for mode in ("recompute", "swap"):
        unkind = FEW_BLOCKS | {"max_num_batched_tokens": 7, "preemption_mode": mode}
        with lab.engine(**unkind) as engine:
            assert_same(lab.run(engine), expected)
            assert mode in {p.mode for r in engine.history for p in r.preempted}
    with lab.engine() as engine:
        assert_same(lab.run(engine), expected)
        assert max(len(r.scheduled) for r in engine.history) >= len(REQUESTS)
        assert_same(lab.run(engine, list(reversed(REQUESTS))), expected)
        assert sum(r.num_hit_tokens for r in engine.history) >= 32 + 16 + 32


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Directories of models by family, made when first asked for."""
    directory = tmp_path_factory.mktemp("models")

    @cache
    def model(family: str) -> Path:
        save_reference(family, directory)
        return directory / family

    return model


def cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch, compiled: bool) -> None:
    """Have the CPU's own kernels, or do as if there were no C++ compiler."""
    request.addfinalizer(nbengine.cpu.kernels.cache_clear)
    nbengine.cpu.kernels.cache_clear()
    if not compiled:
        monkeypatch.setenv("NBENGINE_CPU_KERNELS", "0")
    elif nbengine.cpu.kernels() is None:
        pytest.skip("needs a C++ compiler")


@pytest.fixture
def compiled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(request, monkeypatch, compiled=True)


@pytest.fixture(params=[True, False], ids=["compiled", "torch"])
def on_cpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu(request, monkeypatch, compiled=request.param)


QUANTIZATIONS = [None, "int8", "int4"]


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("family", CONFIGS)
def test_in_the_cpus_own_kernels(models, logits, family, quantization):
    check(Lab(models(family), logits, device="cpu", quantization=quantization))


@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["llama-tied-odd-sizes", "qwen2-windows"])
def test_in_torchs_operations(models, on_cpu, logits, family, dtype, quantization):
    fields = {"dtype": dtype, "quantization": quantization}
    check(Lab(models(family), logits, device="cpu", kernels="torch", **fields))


EMULATED = [
    ("served-llama", "float32", None),
    ("served-llama", "bfloat16", "int4"),
    ("served-mistral", "bfloat16", None),
    ("served-qwen2", "float16", "int8"),
    ("served-qwen3", "float32", "int4"),
]


@pytest.mark.parametrize(("family", "dtype", "quantization"), EMULATED)
def test_in_emulated_kernels(models, logits, family, dtype, quantization):
    fields = {"dtype": dtype, "quantization": quantization}
    check(Lab(models(family), logits, device="cpu", kernels="emulated", **fields))


@needs_gpu
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [
        *((family, "bfloat16") for family in SERVED),
        *(("served-llama", x) for x in ("float32", "float16")),
    ],
)
def test_on_a_gpu(models, logits, family, dtype, quantization):
    fields = {"dtype": dtype, "quantization": quantization}
    check(Lab(models(family), logits, device="cuda", kernels="cuda", **fields))


@needs_gpu
@pytest.mark.parametrize("quantization", QUANTIZATIONS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_torchs_operations_on_a_gpu(models, logits, dtype, quantization):
    fields = {"dtype": dtype, "quantization": quantization}
    check(Lab(models("mistral"), logits, device="cuda", kernels="torch", **fields))


@pytest.mark.parametrize(
    ("kernels", "dtype", "quantization"),
    [
        ("auto", "float32", None),
        ("auto", "float32", "int4"),
        ("emulated", "float32", None),
        pytest.param("cuda", "bfloat16", None, marks=needs_gpu),
        pytest.param("cuda", "bfloat16", "int4", marks=needs_gpu),
    ],
)
def test_in_more_rows_than_a_product_takes_at_once(models, logits, kernels, dtype, quantization):
    device = "cuda" if kernels == "cuda" else "cpu"
    fields = {"device": device, "dtype": dtype, "quantization": quantization}
    lab = Lab(models("served-llama"), logits, kernels=kernels, **fields)
    expected = lab.alone()
    for max_num_batched_tokens in (2048, 40):
        limits = {"max_num_batched_tokens": max_num_batched_tokens, "num_gpu_blocks_override": 200}
        with lab.engine(**limits) as engine:
            assert_same(lab.run(engine, num_others=20), expected)
            assert max(len(r.sampled) for r in engine.history) > 20


@pytest.mark.parametrize("quantization", [None, "int4"])
def test_a_real_model_on_two_threads(logits, quantization):
    """SmolLM2, whose 4-bit weights are a GGUF file's own."""
    limits = {"max_model_len": 256, "max_num_batched_tokens": 33, "num_gpu_blocks_override": 80}
    lab = Lab(smollm2_path(), logits, device="cpu", quantization=quantization, **limits)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected = lab.alone(max_num_batched_tokens=2048)
        with lab.engine() as engine:
            assert_same(lab.run(engine, num_others=13), expected)
    finally:
        torch.set_num_threads(before)


@pytest.mark.usefixtures("compiled")
def test_without_the_mode_the_last_bits_depend_on_the_chunks(models, logits):
    """So that these tests can fail."""
    lab = Lab(models("llama2"), logits, device="cpu", batch_invariant=False)
    expected = lab.alone()
    with lab.engine(max_num_batched_tokens=7) as engine:
        assert differing(lab.run(engine), expected)


WAYS = [
    pytest.param("llama2", {"quantization": "int4"}, id="compiled"),
    pytest.param(
        "qwen2-windows",
        {"kernels": "torch", "dtype": "bfloat16", "quantization": "int8"},
        id="torch",
    ),
    pytest.param("served-llama", {"kernels": "emulated", "dtype": "bfloat16"}, id="emulated"),
]


def differ_after_a_rewind(lab: Lab) -> bool:
    """Run all requests in few blocks, go back a few times, and say whether anything is another."""
    with lab.engine(**FEW_BLOCKS, max_num_batched_tokens=19, preemption_mode="swap") as engine:
        expected = lab.run(engine)
        last = engine.history[-1].step
        for step in (last // 2, 2):
            lab.logits.clear()
            rewound = engine.rewind(step)
            engine.run()
            assert rewound.num_expected and lab.logits
            outputs = {}
            for name in REQUESTS:
                output = engine.output(name)
                of_samples = [
                    (o.token_ids, o.logprobs, o.cumulative_logprob) for o in output.outputs
                ]
                outputs[name] = of_samples, output.prompt_logprobs
            again = [torch.equal(x, expected.logits[at]) for at, x in lab.logits.items()]
            if not all(again) or outputs != expected.outputs or rewound.divergences:
                return True
    return False


def differ_in_a_probe(lab: Lab) -> bool:
    """Whether a probe sees other logits than those that a token was sampled from in a full step."""
    with lab.engine(max_num_batched_tokens=19) as engine:
        expected = lab.run(engine, [name for name in REQUESTS if name != "beams"])
        num_probed = 0
        for record in list(engine.history)[::3]:
            state = engine.history.state_at(record.step)
            for name in record.sampled.keys() & state.sequences.keys():
                if name.partition("#")[0] not in state.live or (
                    record.forked and name.startswith("samples")
                ):
                    continue  # it ended, or all its samples were drawn from one row
                probe = engine.probe(name, record.step)
                num_probed += 1
                row = expected.logits[name, len(probe.token_ids)]
                if not torch.equal(probe.logits, row[: len(probe.logits)].float()):
                    return True
        assert num_probed > 10
    return False


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize(("family", "fields"), WAYS)
@pytest.mark.parametrize("differ", [differ_after_a_rewind, differ_in_a_probe])
def test_in_time_travel(models, logits, differ, family, fields):
    assert not differ(Lab(models(family), logits, device="cpu", **fields))


@pytest.mark.usefixtures("compiled")
@pytest.mark.parametrize("differ", [differ_after_a_rewind, differ_in_a_probe])
def test_without_the_mode_time_travel_shows(models, logits, differ):
    assert differ(Lab(models("llama2"), logits, device="cpu", batch_invariant=False))
