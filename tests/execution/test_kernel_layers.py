"""The model on the op table computes what it computes in torch, for every family, whoever runs the
ops: their torch references, the emulated kernels, or a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
import transformers

import nbengine.cpu
from nbengine.config import EngineConfig
from nbengine.errors import InvalidField
from nbengine.kernels.table import Kernels
from nbengine.models import kernel_layers
from nbengine.models.config import ModelConfig
from nbengine.models.kernel_layers import KernelLayers, choose_kernels, unserved
from nbengine.models.registry import load_model
from tests.gpu import needs_gpu
from tests.tiny_models import (
    CONFIGS,
    SERVED,
    PagedRun,
    assert_same_logits,
    random_tokens,
    reference_logits,
    save_reference,
)

ARCHITECTURE = {"architectures": ["LlamaForCausalLM"]}
BACKENDS = ["reference", "emulated", pytest.param("cuda", marks=needs_gpu)]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory) -> dict[str, tuple[Path, transformers.PreTrainedModel]]:
    directory = tmp_path_factory.mktemp("served")
    return {name: (directory / name, save_reference(name, directory)) for name in SERVED}


def load(path: Path, backend: str, dtype: torch.dtype = torch.float32, **options: object):
    device = torch.device("cuda" if backend == "cuda" else "cpu")
    decoder = load_model(path, dtype=dtype, device=device, for_kernels=True, **options)
    decoder.kernel_layers = KernelLayers(decoder, Kernels(device, backend))
    return decoder


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("family", SERVED)
def test_logits_are_those_of_transformers_in_chunks_and_decodes(checkpoints, family, backend):
    path, reference = checkpoints[family]
    tokens = random_tokens(27)
    run = PagedRun(load(path, backend))
    ours = run.in_chunks(tokens, 11, 12, 1)
    assert_same_logits(ours.cpu(), reference_logits(reference, tokens), 1e-3)


@pytest.mark.parametrize("backend", ["reference", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("family", SERVED)
def test_in_half_precision_logits_stay_close(checkpoints, family, dtype, backend):
    path, reference = checkpoints[family]
    tokens = random_tokens(27)
    ours = PagedRun(load(path, backend, dtype)).in_chunks(tokens, 11, 12, 1)
    tolerance = 0.02 if dtype == torch.float16 else 0.1
    assert_same_logits(ours.cpu(), reference_logits(reference, tokens), tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("quantization", ["int8", "int4"])
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-3), (torch.float16, 0.02), (torch.bfloat16, 0.1)]
)
def test_quantised_weights_give_what_they_give_on_a_cpu(
    checkpoints, backend, quantization, dtype, tolerance
):
    path, _ = checkpoints["served-qwen3"]
    tokens = random_tokens(27)
    on_cpu = PagedRun(load_model(path, dtype=torch.float32, quantization=quantization))
    expected = on_cpu.in_chunks(tokens, 27)
    if nbengine.cpu.kernels() is None:  # torch's operations round x to bfloat16
        tolerance = 0.1
    run = PagedRun(load(path, backend, dtype, quantization=quantization))
    assert_same_logits(run.in_chunks(tokens, 20, 5, 1).cpu(), expected, tolerance)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mixed_batch_gives_each_sequence_what_it_gets_alone(checkpoints, backend):
    decoder = load(checkpoints["served-llama"][0], backend)
    long, short, fresh = random_tokens(41), random_tokens(9, seed=1), random_tokens(18, seed=2)
    alone = [PagedRun(decoder).in_chunks(t, 8) for t in (long, short, fresh)]

    run = PagedRun(decoder, seed=3)
    a, b, c = (run.sequence(t) for t in (long, short, fresh))
    run.step((a, 40), (b, 8))
    decode_a, decode_b, chunk = run.step((a, 1), (b, 1), (c, 18))
    assert_same_logits(decode_a, alone[0][-1:], 1e-4)
    assert_same_logits(decode_b, alone[1][-1:], 1e-4)
    assert_same_logits(chunk, alone[2], 1e-4)


def config_of(name: str) -> ModelConfig:
    return ModelConfig.from_hf((CONFIGS | SERVED)[name].to_dict() | ARCHITECTURE)


def test_shapes_that_kernels_do_not_serve_are_named():
    assert unserved(config_of("served-llama"), torch.bfloat16, None) is None
    odd = config_of("llama-tied-odd-sizes")
    assert "head_dim is 10" in (unserved(odd, torch.bfloat16, None) or "")
    fours = dataclasses.replace(config_of("served-llama"), hidden_size=100)
    assert unserved(fours, torch.float32, None) is None
    assert "multiples of 8" in (unserved(fours, torch.float32, "int4") or "")


class TestChoice:
    CPU = torch.device("cpu")

    def choose(self, **fields: object) -> Kernels | None:
        settings = EngineConfig(model="m", **fields)
        return choose_kernels(settings, config_of("served-llama"), torch.float32, self.CPU)

    def test_auto_on_a_cpu_is_its_own_compiled_kernels(self):
        assert self.choose() is None

    def test_torch_is_no_kernels(self):
        assert self.choose(kernels="torch") is None

    def test_emulated_on_a_cpu(self):
        kernels = self.choose(kernels="emulated")
        assert kernels is not None and kernels.backend == "emulated"

    def test_cuda_on_a_cpu_is_refused(self):
        with pytest.raises(InvalidField, match="need a CUDA device"):
            self.choose(kernels="cuda")

    def test_quantised_weights_are_served(self):
        assert self.choose(kernels="emulated", quantization="int4") is not None

    def test_on_a_gpu_without_nvidias_packages_auto_is_torch_and_cuda_is_refused(
        self, monkeypatch, caplog
    ):
        monkeypatch.setattr(kernel_layers, "_missing_toolchain", lambda: "install nbengine[cuda]")
        config, gpu = config_of("served-llama"), torch.device("cuda")
        auto = EngineConfig(model="m")
        assert choose_kernels(auto, config, torch.bfloat16, gpu) is None
        assert "install nbengine[cuda]" in caplog.text
        by_name = EngineConfig(model="m", kernels="cuda")
        with pytest.raises(InvalidField, match=r"install nbengine\[cuda\]"):
            choose_kernels(by_name, config, torch.bfloat16, gpu)
