"""Models that tests share: small random ones in Hugging Face layout, and SmolLM2 itself. And the
line on simulated lives at the end of a run."""

from __future__ import annotations

import os

# Workers of a parallel run share the cores; more threads than cores make torch crawl.
os.environ.setdefault("OMP_NUM_THREADS", "1")

from collections.abc import Iterator
from pathlib import Path

import pytest


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
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,  # so that logits differ clearly, and greedy paths do not loop
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).eval().save_pretrained(folder)
    return folder


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
