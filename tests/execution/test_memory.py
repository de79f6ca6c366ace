"""Free memory is divided before anything is loaded, and the numbers are true."""

import pytest
import torch
import transformers

from nbengine.config import EngineConfig
from nbengine.errors import NotEnoughMemory
from nbengine.execution import memory
from nbengine.execution.memory import GIB, Measured, free_host_memory, plan_memory, weight_bytes
from nbengine.models.config import ModelConfig
from nbengine.models.registry import load_model
from tests.tiny_models import CONFIGS, save_reference

# Llama 3.1 8B: 8.03 billion parameters, 128 KiB of KV a token in half precision.
CONFIG = ModelConfig(
    architecture="LlamaForCausalLM",
    vocab_size=128_256,
    hidden_size=4096,
    intermediate_size=14_336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
    max_position_embeddings=131_072,
)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def free(monkeypatch: pytest.MonkeyPatch) -> None:
    set_free(monkeypatch, 64)


def set_free(monkeypatch: pytest.MonkeyPatch, gib: float) -> None:
    monkeypatch.setattr(memory, "free_host_memory", lambda: int(gib * GIB))


def plan(measured: Measured | None = None, **fields):
    settings = EngineConfig(model="any", **fields)
    return plan_memory(CONFIG, settings, dtype=torch.bfloat16, device=CPU, measured=measured)


def test_a_cpu_keeps_its_kv_cache_small_unless_one_sequence_needs_more():
    budget = plan()
    assert budget.block_bytes == 16 * 128 * 1024
    assert budget.kv_cache == 2 * GIB
    assert budget.num_blocks == 1024
    assert budget.max_model_len == budget.num_kv_tokens == 16_384  # what fits, as none was asked
    long = plan(max_model_len=32_768)
    assert long.kv_cache == 4 * GIB
    assert long.max_model_len == 32_768


def test_what_was_measured_counts_and_no_position_is_promised_beyond_the_rope_table():
    measured = Measured(64 * GIB, weights=GIB, activations=GIB, max_positions=4096)
    budget = plan(measured)
    assert (budget.weights, budget.activations, budget.is_measured) == (GIB, GIB, True)
    assert budget.num_kv_tokens > budget.max_model_len == 4096


def test_no_more_blocks_are_made_than_sequences_can_fill():
    assert plan(max_model_len=1000, max_num_seqs=2).num_blocks == 2 * 63


def test_parts_and_reserve_add_up_to_what_was_free():
    budget = plan()
    parts = (budget.weights, budget.activations, budget.kv_cache, budget.reserve)
    assert sum(parts) == budget.available == 64 * GIB
    assert budget.weights == pytest.approx(8.03e9 * 2, rel=0.01)


def test_a_model_that_does_not_fit_is_refused_with_sizes_and_suggestions(monkeypatch):
    set_free(monkeypatch, 12)
    words = r"weights 15.02 GiB.*of 10.80 GiB usable.*12.00 GiB free.*quantization='int8'"
    with pytest.raises(NotEnoughMemory, match=words):
        plan()
    assert plan(quantization="int8").num_blocks > 100  # as it said


def test_a_context_that_does_not_fit_is_refused_with_one_that_does(monkeypatch):
    set_free(monkeypatch, 20)
    with pytest.raises(NotEnoughMemory, match="131072 tokens do not fit") as caught:
        plan(max_model_len=131_072)
    fitting = int(str(caught.value).split("try max_model_len=")[1].split(",")[0])
    assert plan(max_model_len=fitting).num_kv_tokens == fitting


def test_blocks_can_be_counted_out_by_hand():
    assert plan(num_gpu_blocks_override=10).num_blocks == 10
    assert plan(num_gpu_blocks_override=10).max_model_len == 160
    assert plan(num_gpu_blocks_override=10, max_model_len=160).num_blocks == 10
    with pytest.raises(NotEnoughMemory, match="at most"):
        plan(num_gpu_blocks_override=10**6)
    with pytest.raises(NotEnoughMemory, match=r"needs 11 blocks.*lower max_model_len to 160"):
        plan(num_gpu_blocks_override=10, max_model_len=161)


def test_swap_space_is_counted_in_blocks_of_host_memory():
    assert plan(swap_space=1.0, preemption_mode="swap").num_host_blocks == 512
    assert plan().num_host_blocks == 0


def test_the_budget_prints_what_it_holds():
    text = str(plan(swap_space=1.0, preemption_mode="swap"))
    for words in ("weights", "15.02 GiB", "1,024 blocks of 16 = 16,384 tokens", "reserve", "512"):
        assert words in text
    assert "16,384 tokens" in plan()._repr_html_()


@pytest.mark.parametrize("name", ["llama-tied-odd-sizes", "qwen3", "llama2"])
def test_the_estimate_of_the_weights_is_what_loading_takes(tmp_path, name):
    save_reference(name, tmp_path)
    decoder = load_model(tmp_path / name, dtype="bfloat16", max_model_len=1)
    estimate = weight_bytes(decoder.config, torch.bfloat16, None, 1)
    assert estimate == pytest.approx(decoder.nbytes, rel=0.03)  # norms are kept in float32
    assert decoder.config.num_parameters == _num_parameters(name)


def _num_parameters(name: str) -> int:
    with torch.device("meta"):
        return transformers.AutoModelForCausalLM.from_config(CONFIGS[name]).num_parameters()


def test_a_containers_limit_counts_where_it_is_less(tmp_path):
    meminfo, group = tmp_path / "meminfo", tmp_path / "cgroup"
    meminfo.write_text("MemTotal:  9000 kB\nMemAvailable:    8000 kB\n")
    assert free_host_memory(meminfo, group) == 8000 * 1024  # no cgroups at all
    group.mkdir()
    (group / "memory.current").write_text("1000000\n")
    (group / "memory.max").write_text("max\n")
    assert free_host_memory(meminfo, group) == 8000 * 1024
    (group / "memory.max").write_text("3000000\n")
    assert free_host_memory(meminfo, group) == 2_000_000


def test_without_meminfo_half_of_the_memory_counts_as_free(tmp_path):
    assert GIB // 4 < free_host_memory(tmp_path / "none", tmp_path / "none") < 2**50


class TestAShareOfAGpu:
    """`gpu_memory_utilization` is vLLM's: one engine's share of the whole, whoever has the rest."""

    GPU = torch.device("cuda", 0)

    @pytest.fixture(autouse=True)
    def gpu(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (42 * GIB, 80 * GIB))
        monkeypatch.setattr(memory, "give_back_memory", lambda: None)

    def plan(self, **fields: object):
        settings = EngineConfig(model="any", **fields)
        return plan_memory(CONFIG, settings, dtype=torch.bfloat16, device=self.GPU)

    def test_beside_another_engine_it_is_the_same_share(self):
        budget = self.plan(gpu_memory_utilization=0.45)
        used = budget.weights + budget.activations + budget.kv_cache
        assert 0.45 * 80 * GIB - budget.block_bytes < used <= 0.45 * 80 * GIB

    def test_a_share_that_is_not_free_is_refused_with_the_one_that_is(self):
        words = r"0.9 is 72.00 GiB of the 80.00 GiB of cuda:0, and 42.00 GiB are free: .* 0.52 or"
        with pytest.raises(NotEnoughMemory, match=words):
            self.plan()

    def test_for_blocks_that_were_counted_what_is_free_will_do(self):
        assert self.plan(num_gpu_blocks_override=1000).num_blocks == 1000
        with pytest.raises(NotEnoughMemory, match="at most"):
            self.plan(num_gpu_blocks_override=14_000)  # of 2 MiB, beside 15 GiB of weights
