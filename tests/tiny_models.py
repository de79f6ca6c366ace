"""Small random models of every family, and a way to drive a decoder through paged blocks.

The weights are drawn so large that attention, biases and norms all matter: with transformers' own
small initial values, a decoder without rope would pass.
"""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import torch
import transformers

from nbengine.core.plan import StepPlan
from nbengine.core.request import Request, Sequence
from nbengine.core.sampling_params import SamplingParams
from nbengine.execution.batch import Batch
from nbengine.execution.kv_cache import KVCache
from nbengine.models.decoder import Decoder

torch.set_num_threads(1)  # these are tiny, and tests run in parallel processes

SHAPE = {
    "vocab_size": 101,
    "hidden_size": 48,
    "intermediate_size": 84,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "attn_implementation": "eager",
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
YARN_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
}


def _configs() -> dict[str, transformers.PreTrainedConfig]:
    llama, mistral = transformers.LlamaConfig, transformers.MistralConfig
    qwen2, qwen3 = transformers.Qwen2Config, transformers.Qwen3Config
    odd = SHAPE | {"vocab_size": 97, "hidden_size": 42, "intermediate_size": 37, "head_dim": 10}
    return {
        "llama2": llama(**SHAPE | {"num_key_value_heads": 6}),
        "llama3": llama(**SHAPE, rope_parameters=LLAMA3_ROPE),
        "llama-linear": llama(
            **SHAPE, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 2.5}
        ),
        "llama-yarn": llama(**SHAPE, rope_parameters=YARN_ROPE),
        "llama-biases": llama(**SHAPE, attention_bias=True, mlp_bias=True),
        "llama-tied-odd-sizes": llama(**odd, tie_word_embeddings=True),
        "mistral": mistral(**SHAPE, sliding_window=9),
        "mistral-no-window": mistral(**SHAPE | {"head_dim": 16}, sliding_window=None),
        "qwen2": qwen2(**SHAPE, tie_word_embeddings=True),
        "qwen2-windows": qwen2(
            **SHAPE, use_sliding_window=True, sliding_window=7, max_window_layers=1
        ),
        "qwen3": qwen3(**SHAPE | {"head_dim": 20}),
    }


CONFIGS = _configs()


def _served() -> dict[str, transformers.PreTrainedConfig]:
    qwen2, qwen3 = transformers.Qwen2Config, transformers.Qwen3Config
    shape = SHAPE | {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2}
    shape |= {"head_dim": 64, "num_attention_heads": 4}
    return {
        "served-llama": transformers.LlamaConfig(**shape, rope_parameters=LLAMA3_ROPE),
        "served-mistral": transformers.MistralConfig(**shape | {"head_dim": 80}, sliding_window=9),
        "served-qwen2": qwen2(
            **shape | {"hidden_size": 448, "num_attention_heads": 7, "num_key_value_heads": 1},
            tie_word_embeddings=True,
        ),
        "served-qwen3": qwen3(**shape | {"head_dim": 128, "num_key_value_heads": 4}),
    }


SERVED = _served()
"""Of shapes that the CUDA kernels serve: small too, but with heads of 64 and more."""


def make_reference(name: str) -> transformers.PreTrainedModel:
    """transformers' model of `CONFIGS[name]` or `SERVED[name]`, with its own random weights, in float32."""
    generator = torch.Generator().manual_seed(sum(name.encode()))
    model = transformers.AutoModelForCausalLM.from_config((CONFIGS | SERVED)[name]).eval()
    with torch.no_grad():
        for key, tensor in model.named_parameters():
            noise = torch.randn(tensor.shape, generator=generator)
            if "norm" in key:
                tensor.copy_(1 + 0.3 * noise)
            elif "embed" in key or tensor.ndim == 1:
                tensor.copy_(noise)
            else:
                tensor.copy_(noise * 1.5 / tensor.shape[1] ** 0.5)
    return model


def save_reference(name: str, directory: Path, **options: object) -> transformers.PreTrainedModel:
    model = make_reference(name)
    model.save_pretrained(directory / name, **options)
    return model


def reference_logits(model: transformers.PreTrainedModel, tokens: list[int]) -> torch.Tensor:
    """float32 `[len(tokens), vocab]`."""
    with torch.inference_mode():
        return model(input_ids=torch.tensor([tokens])).logits[0].float()


def assert_same_logits(ours: torch.Tensor, theirs: torch.Tensor, relative: float = 1e-4) -> None:
    """Within `relative` of the largest logit of each row."""
    assert ours.shape == theirs.shape
    worst = ((ours - theirs).abs().amax(-1) / theirs.abs().amax(-1)).max().item()
    assert worst < relative, f"relative difference {worst:.2e}"


def make_sequence(
    tokens: list[int], *, name: str = "seq", params: SamplingParams | None = None
) -> Sequence:
    request = Request(name, tuple(tokens), params or SamplingParams())
    return Sequence(name, request, 0, list(tokens))


class PagedRun:
    """A decoder over a cache whose blocks are handed out in random order."""

    def __init__(
        self, decoder: Decoder, *, num_blocks: int = 64, block_size: int = 8, seed: int = 0
    ) -> None:
        self.decoder, self.block_size = decoder, block_size
        self.cache = KVCache.allocate(
            decoder.config, num_blocks, block_size, decoder.dtype, decoder.device
        )
        self.cache.data.fill_(float("nan"))  # what unused slots hold must not matter
        self.free = list(range(num_blocks))
        random.Random(seed).shuffle(self.free)

    def sequence(self, tokens: list[int]) -> Sequence:
        seq = make_sequence(tokens)
        seq.block_table = [self.free.pop() for _ in range(-(-len(tokens) // self.block_size))]
        return seq

    def step(self, *scheduled: tuple[Sequence, int]) -> list[torch.Tensor]:
        """Compute n more tokens of each sequence: logits `[n, vocab]` of each."""
        plan = StepPlan(scheduled=list(scheduled))
        batch = Batch.from_plan(
            plan,
            self.block_size,
            logits_rows=list(range(plan.num_tokens)),
            device=self.decoder.device,
        )
        hidden = self.decoder.forward(batch, self.cache)
        for seq, n in scheduled:
            seq.num_computed_tokens += n
        logits = self.decoder.compute_logits(hidden[batch.logits_rows])
        return list(logits.split([n for _, n in scheduled]))

    def in_chunks(self, tokens: list[int], *sizes: int) -> torch.Tensor:
        """Logits of one sequence computed in chunks of these sizes; the last is repeated."""
        seq = self.sequence(tokens)
        parts = []
        for size in itertools.chain(sizes, itertools.repeat(sizes[-1])):
            left = seq.num_uncomputed_tokens
            if left == 0:
                return torch.cat(parts)
            parts += self.step((seq, min(size, left)))
        raise AssertionError("not reached")


def random_tokens(n: int, vocab_size: int = 97, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(vocab_size), k=n)
