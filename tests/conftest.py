"""Models that tests share: small random ones in Hugging Face layout, and SmolLM2 itself. And the
line on simulated lives at the end of a run."""

from __future__ import annotations

import importlib.util
import json
import os
import signal

# Workers of a parallel run share the cores; more threads than cores make torch crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell has what it runs in the background ignore interrupts; some tests are about them.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

# Where there is nothing of Jupyter (a machine with a GPU, say), there is nothing of it to test.
collect_ignore = (
    [] if importlib.util.find_spec("IPython") else ["browser", "jupyter", "test_notebooks.py"]
)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what this machine can't run of the tests that tests/gpu.py marks."""
    if item.get_closest_marker("gpu") is None:
        return
    import torch

    if not torch.cuda.is_available():
        pytest.skip("needs an NVIDIA GPU")
    is_alone = os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1") == "1"
    if item.get_closest_marker("gpu_alone") is not None and not is_alone:
        pytest.skip("needs a GPU that no other worker uses: -n0 -m gpu_alone")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Tests of one file in browser/ stay together, in their order: they share a page, and go on where
    the last one left it."""
    from xdist.scheduler import LoadScopeScheduling

    class ByPage(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return file if "browser/" in file else nodeid

    return ByPage(config, log) if config.getvalue("dist") == "load" else None


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random 2-layer Llama over a vocabulary of 500 ids, with 256 positions and no tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny_llama")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        head_dim=64,  # the least that the CUDA kernels serve
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # so that logits differ clearly, and greedy paths do not loop
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """For `tiny_llama`: ids 0 to 2 are special tokens, the others single bytes, with a chat
    template. An ASCII letter has the id of its code less 30 ("A" is 35)."""
    import tokenizers

    from nbengine.detokenizer import _BYTE_OF_CHAR

    special = ["<unk>", "<s>", "</s>"]
    char_of_byte = {byte: char for char, byte in _BYTE_OF_CHAR.items()}
    order = [*range(33, 256), *range(33)]
    vocabulary = {name: i for i, name in enumerate([*special, *(char_of_byte[b] for b in order)])}
    backend = tokenizers.Tokenizer(tokenizers.models.BPE(vocabulary, []))
    backend.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(
        add_prefix_space=False, use_regex=False
    )
    backend.decoder = tokenizers.decoders.ByteLevel()
    backend.add_special_tokens(special)
    folder = tmp_path_factory.mktemp("tiny_tokenizer")
    backend.save(str(folder / "tokenizer.json"))
    template = "{% for m in messages %}{{ m.content }}|{% endfor %}"
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": "<s>",
        "eos_token": "</s>",
        "chat_template": template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture
def make(tiny_llama: Path) -> Iterator[Callable[..., object]]:
    """Engines over the tiny model (without a tokenizer, unless one is named); all are closed in the
    end."""
    from nbengine import Engine

    engines = []

    def make(**fields: object) -> object:
        defaults = {
            "num_gpu_blocks_override": 64,
            "max_model_len": 200,
            "dtype": "float32",
            "skip_tokenizer_init": "tokenizer" not in fields,
        }
        engine = Engine(model=tiny_llama, **defaults | fields)
        engines.append(engine)
        return engine

    yield make
    for engine in engines:
        engine.close()


@pytest.fixture(scope="module")
def smollm2() -> Iterator[object]:
    """`LLM("smollm2-135m")` with 4-bit weights, once per test file."""
    from nbengine import LLM

    with LLM(
        "smollm2-135m", quantization="int4", max_model_len=1024, num_gpu_blocks_override=256
    ) as llm:
        yield llm


def pytest_terminal_summary(terminalreporter):
    """Add up what the simulation's tests report, from whichever worker they ran on."""
    reports = terminalreporter.getreports("passed") + terminalreporter.getreports("failed")
    lives = [dict(r.user_properties) for r in reports if r.when == "call"]
    lives = [properties for properties in lives if "simulated_seeds" in properties]
    if lives:
        seeds = sum(properties["simulated_seeds"] for properties in lives)
        seconds = sum(properties["cpu_seconds"] for properties in lives)
        terminalreporter.write_line(
            f"simulation: {seeds:,} seeds in {seconds:.1f} s of CPU, "
            f"{seeds / seconds:,.0f} seeds/s on one core"
        )
