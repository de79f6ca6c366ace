"""A decode step as one compiled call computes what the decoder's own loop computes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import nbengine.cpu
from nbengine.models.decoder import Decoder
from nbengine.models.registry import load_model
from tests.tiny_models import CONFIGS, PagedRun, random_tokens, save_reference

pytestmark = pytest.mark.skipif(nbengine.cpu.kernels() is None, reason="needs a C++ compiler")

PROMPTS = [random_tokens(n, seed=n) for n in (3, 30, 17, 8, 25, 1, 40, 16, 9, 33)]


@pytest.fixture(scope="module", params=sorted(CONFIGS))
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    save_reference(request.param, directory)
    return directory / request.param


@pytest.fixture(params=[None, "int8", "int4"])
def decoder(request: pytest.FixtureRequest, checkpoint: Path) -> Decoder:
    return load_model(checkpoint, quantization=request.param)


def decode_steps(decoder: Decoder, prompts: list[list[int]]) -> torch.Tensor:
    """Logits `[len(prompts), 3, vocab]` of each prompt's last tokens, decoded side by side."""
    run = PagedRun(decoder)
    sequences = [run.sequence([*prompt, 5, 6, 7]) for prompt in prompts]
    run.step(*((seq, len(seq.tokens) - 3) for seq in sequences))
    steps = [run.step(*((seq, 1) for seq in sequences)) for _ in range(3)]
    return torch.stack([torch.cat(logits) for logits in steps], dim=1)


def test_the_compiled_step_equals_the_decoders_own_loop(
    decoder: Decoder, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiled = decode_steps(decoder, PROMPTS)
    monkeypatch.setattr(Decoder, "_compiled_for", lambda self, kv_cache: None)
    loop = decode_steps(decoder, PROMPTS)
    torch.testing.assert_close(compiled, loop, rtol=1e-4, atol=1e-4 * loop.abs().max().item())


def test_a_sequence_decodes_to_the_same_bits_alone_and_in_any_company(decoder: Decoder) -> None:
    # One prefill for both, in the same company: it is the decode that is compared.
    run = PagedRun(decoder, num_blocks=128)
    pairs = [(run.sequence([*p, 5, 6]), run.sequence([*p, 5, 6])) for p in PROMPTS]
    for pair in pairs:
        for seq in pair:
            run.step((seq, len(seq.tokens) - 2))
    for _ in range(2):
        together = run.step(*((first, 1) for first, _ in pairs))
        for logits, (_, second) in zip(together, pairs, strict=True):
            (alone,) = run.step((second, 1))
            assert torch.equal(logits, alone)


def test_a_second_cache_is_not_written_through_the_first(checkpoint: Path) -> None:
    decoder = load_model(checkpoint)
    first, second = PagedRun(decoder), PagedRun(decoder, seed=1)
    a, b = (run.sequence(PROMPTS[1]) for run in (first, second))
    for size in (20, 1, 1):
        (expected,) = first.step((a, size))
        (found,) = second.step((b, size))
        assert torch.equal(found, expected)
