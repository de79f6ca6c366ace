"""Inside the model for one token: logits, hidden states and attention weights.

`Engine.probe` computes the tokens of one sequence again, alone and over a scratch KV cache, with a
`LayerWatch` that keeps what the layers saw at the last of them. The engine's own cache is not
touched. The numbers are those of the engine's own operations; their last bits may be those of another
batch, unless the engine is batch-invariant.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from nbengine.core.plan import StepPlan
from nbengine.core.request import Request
from nbengine.core.request import Sequence as RunningSequence
from nbengine.core.sampling_params import SamplingParams
from nbengine.execution.batch import Batch
from nbengine.execution.kv_cache import KVCache
from nbengine.kernels.table import Kernels
from nbengine.models.decoder import Decoder


@dataclass(slots=True)
class LayerWatch:
    """What `Decoder.forward` saw at the last row of a batch."""

    hidden: list[Tensor] = field(default_factory=list)
    """float32 `[hidden]`: the residual stream before the first layer, then after each."""
    queries: list[Tensor] = field(default_factory=list)
    """float32 `[num_heads, head_dim]` of each layer, rotated."""

    def see_hidden(self, x: Tensor) -> None:
        """x `[T, hidden]`."""
        self.hidden.append(x[-1].float().clone())

    def see_queries(self, q: Tensor) -> None:
        """q `[T, num_heads, head_dim]`."""
        self.queries.append(q[-1].float().clone())


class Candidate(NamedTuple):
    """A token that may come next."""

    token_id: int
    text: str
    logit: float
    logprob: float


@dataclass(frozen=True, eq=False, repr=False)
class Probe:
    """One token of one sequence, as the model sees it. All tensors are on the CPU."""

    seq_id: str
    step: int
    token_ids: tuple[int, ...]
    """All that the model had seen: the last of them is the one that was looked at."""
    block_table: tuple[int, ...]
    """At that step; empty for a sequence that held no blocks then."""
    block_size: int
    logits: Tensor
    """float32 `[vocab]`, as the model gives them: before temperature, penalties and masks."""
    hidden_states: Tensor
    """float32 `[num_layers + 1, hidden]`: the residual stream before the first layer, then after each
    (before the final norm)."""
    attention: Tensor
    """float32 `[num_layers, num_heads, num_tokens]`: the weights that add up to 1 over all positions
    up to its own."""
    decode: Callable[[int], str]

    @property
    def position(self) -> int:
        """Of the token that was looked at."""
        return len(self.token_ids) - 1

    def top(self, n: int = 10) -> list[Candidate]:
        """The likeliest next tokens, best first."""
        logprobs = self.logits.log_softmax(dim=-1)
        ids = self.logits.topk(min(n, len(self.logits))).indices.tolist()
        return [
            Candidate(i, self.decode(i), float(self.logits[i]), float(logprobs[i])) for i in ids
        ]

    def attention_by_block(self, layer: int | None = None) -> Tensor:
        """How much attention each block of the table receives: float32 `[num_layers, num_blocks]`,
        the mean over heads; of one layer `[num_heads, num_blocks]`."""
        weights = self.attention.mean(dim=1) if layer is None else self.attention[layer]
        parts = weights.split(self.block_size, dim=-1)
        return torch.stack([part.sum(dim=-1) for part in parts], dim=-1)

    def __repr__(self) -> str:
        from nbengine.jupyter.attention_view import probe_text

        return probe_text(self)

    def _repr_html_(self) -> str:
        from nbengine.jupyter.attention_view import probe_html

        return probe_html(self)


@torch.inference_mode()
def look_inside(
    decoder: Decoder,
    kernels: Kernels | None,
    token_ids: Sequence[int],
    block_size: int,
    chunk: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `token_ids` alone, at most `chunk` at a time, and return what the last of them sees:
    logits, hidden states and attention weights, as in `Probe`."""
    config = decoder.config
    num_blocks = -(-len(token_ids) // block_size)
    kv_cache = KVCache.allocate(config, num_blocks, block_size, decoder.dtype, decoder.device)
    kv_cache.kernels = kernels
    params = SamplingParams(temperature=0, max_tokens=1)
    seq = RunningSequence("probe", Request("probe", (0,), params), 0, list(token_ids))
    seq.block_table = list(range(num_blocks))

    def forward(n: int, watch: LayerWatch | None = None) -> Tensor:
        plan = StepPlan(scheduled=[(seq, n)])
        batch = Batch.from_plan(plan, block_size, logits_rows=[n - 1], device=decoder.device)
        return decoder.forward(batch, kv_cache, watch)[-1:]

    hidden = None
    while left := len(token_ids) - seq.num_computed_tokens:
        hidden = forward(min(left, chunk))
        seq.num_computed_tokens += min(left, chunk)
    assert hidden is not None
    logits = decoder.compute_logits(hidden)[0, : config.vocab_size].float()
    # What is watched may go another way than what is not: so the last token a second time.
    watch = LayerWatch()
    seq.num_computed_tokens -= 1
    forward(1, watch)
    attention = torch.stack(
        [
            _weights(q, k, layer.window, len(token_ids))
            for q, k, layer in zip(watch.queries, kv_cache.k, decoder.layers, strict=True)
        ]
    )
    return logits.cpu(), torch.stack(watch.hidden).cpu(), attention.cpu()


def _weights(q: Tensor, k_cache: Tensor, window: int | None, num_tokens: int) -> Tensor:
    """float32 `[num_heads, num_tokens]` of the last token's queries `[num_heads, head_dim]` over the
    keys of blocks in order, `[num_blocks, num_kv_heads, block_size, head_dim]`."""
    num_heads, head_dim = q.shape
    keys = k_cache.transpose(0, 1).flatten(1, 2)[:, :num_tokens].float()  # [kv_heads, n, head_dim]
    keys = keys.repeat_interleave(num_heads // len(keys), dim=0)
    scores = torch.einsum("hd,hnd->hn", q, keys) * head_dim**-0.5
    if window is not None:
        scores[:, : max(0, num_tokens - window)] = -torch.inf
    return scores.softmax(dim=-1)
