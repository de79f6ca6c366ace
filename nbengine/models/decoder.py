"""One decoder for the Llama family: Llama, Mistral, Qwen2, Qwen3, SmolLM2.

`ModelConfig` says what varies (biases, norms on q and k, windows, rope); the code below is the
same for all. It runs a flat batch of tokens of many sequences, writes their keys and values into
the paged cache and attends through the block tables, so that a prefill chunk and a decode are the
same thing. Rows meet nowhere but in attention, and there only within one sequence.

T is the number of tokens in the batch, R of rows that need logits. Written for few operations: on
a CPU each costs a microsecond or more whatever its size, and a step has some five hundred.
"""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding

from nbengine.execution.attention import paged_attention, write_kv
from nbengine.execution.batch import Batch
from nbengine.execution.kv_cache import KVCache
from nbengine.models.config import ModelConfig
from nbengine.models.decode import CompiledDecode
from nbengine.models.linear import MAX_KERNEL_ROWS, Linear
from nbengine.models.ops import RmsNorm, rotate, silu_and_mul

if TYPE_CHECKING:
    from nbengine.execution.probe import LayerWatch
    from nbengine.models.kernel_layers import KernelLayers


_ROWS_AT_ONCE = 128
"""Of a prompt in the compiled kernels: what a layer computes of more leaves a core's cache, and took
1.4 times as long in float32."""


@dataclass(slots=True)
class Layer:
    """One transformer block's weights; q, k, v are one matrix, and so are gate and up."""

    input_norm: RmsNorm
    qkv: Linear  # [q_size + 2 * kv_size, hidden]
    o: Linear  # [hidden, q_size]
    post_attention_norm: RmsNorm
    gate_up: Linear  # [2 * intermediate, hidden]
    down: Linear  # [hidden, intermediate]
    qk_norm: RmsNorm | None  # weight [num_heads + num_kv_heads, head_dim]
    window: int | None

    @property
    def nbytes(self) -> int:
        parts = (self.input_norm, self.qkv, self.o, self.post_attention_norm, self.gate_up)
        qk_norm = self.qk_norm.nbytes if self.qk_norm else 0
        return sum(part.nbytes for part in parts) + self.down.nbytes + qk_norm


@dataclass(slots=True)
class Decoder:
    """The model: made by `nbengine.models.registry.load_model`, run by the `ModelRunner`."""

    config: ModelConfig
    embedding: Tensor  # [vocab, hidden]
    layers: list[Layer]
    norm: RmsNorm
    head: Linear  # [vocab, hidden]
    rope: Tensor  # [max_positions, 2, head_dim], see rope_table
    kernel_layers: KernelLayers | None = field(default=None, init=False, repr=False)
    """Runs the layers, where the engine's kernels do; else they run in torch, below."""
    batch_invariant: bool = field(default=False, init=False)
    """A token's result is the same to the last bit whatever else is computed with it."""
    _compiled: tuple[weakref.ref[KVCache], CompiledDecode | None] | None = field(
        default=None, init=False, repr=False
    )
    """For the cache of the last decode step."""

    @property
    def dtype(self) -> torch.dtype:
        """Of activations and of the KV cache."""
        return self.embedding.dtype

    @property
    def device(self) -> torch.device:
        return self.embedding.device

    @property
    def max_positions(self) -> int:
        return self.rope.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes that the weights hold; an output head that is the embedding counts once."""
        layers = sum(layer.nbytes for layer in self.layers)
        head = 0 if self.head.shares(self.embedding) else self.head.nbytes
        return self.embedding.nbytes + layers + self.norm.nbytes + head + self.rope.nbytes

    @torch.inference_mode()
    def forward(self, batch: Batch, kv_cache: KVCache, watch: LayerWatch | None = None) -> Tensor:
        """The last layer's output `[T, hidden]`, and the batch's keys and values in the cache; what
        the layers saw at the last row, in `watch`.

        The final norm is left to `compute_logits`, which few of the rows need.
        """
        if self.kernel_layers is not None:
            return self.kernel_layers(batch, kv_cache, watch)
        if self.batch_invariant:
            return self._forward_apart(batch, kv_cache, watch)
        return self._forward(batch, kv_cache, watch)

    def _forward_apart(self, batch: Batch, kv_cache: KVCache, watch: LayerWatch | None) -> Tensor:
        """Batch-invariant: in the compiled kernels rows of one call do not meet; with torch, whose
        operations choose their order of additions by all of their shape, each has calls of its own."""
        if batch.max_query_len > 1:
            batch = batch.rows_apart()
        at_once = _ROWS_AT_ONCE if self._compiled_for(kv_cache) is not None else 1
        starts = range(0, batch.num_seqs, at_once)
        parts = (batch.sequences(start, start + at_once) for start in starts)
        return torch.cat([self._forward(part, kv_cache, watch) for part in parts])

    def _forward(self, batch: Batch, kv_cache: KVCache, watch: LayerWatch | None) -> Tensor:
        x = embedding(batch.token_ids, self.embedding)
        cos_sin = self.rope[batch.positions]  # [T, 2, head_dim]
        if watch is not None:
            watch.see_hidden(x)
        elif batch.max_query_len == 1:
            compiled = self._compiled_for(kv_cache)
            if compiled is not None:
                return compiled(x, cos_sin, batch)
        for layer, k_cache, v_cache in zip(self.layers, kv_cache.k, kv_cache.v, strict=True):
            x += self._attention(layer, x, cos_sin, batch, k_cache, v_cache, watch)
            x += layer.down(silu_and_mul(layer.gate_up(layer.post_attention_norm(x))))
            if watch is not None:
                watch.see_hidden(x)
        return x

    @torch.inference_mode()
    def compute_logits(self, hidden_rows: Tensor, out: Tensor | None = None) -> Tensor:
        """float32 `[R, vocab]` of rows `[R, hidden]` that `forward` returned, in `out` if given."""
        if self.kernel_layers is not None:
            logits = self.kernel_layers.compute_logits(hidden_rows)
        elif self.batch_invariant:
            is_compiled = self.head.matrix is not None and self.dtype == torch.float32
            parts = hidden_rows.split(MAX_KERNEL_ROWS if is_compiled else 1)
            # Copied, because a library may go by where a row lies in memory, too.
            logits = torch.cat([self.head(self.norm(part.clone())) for part in parts])
        else:
            logits = self.head(self.norm(hidden_rows))
        return logits.float() if out is None else out.copy_(logits)

    def _compiled_for(self, kv_cache: KVCache) -> CompiledDecode | None:
        if self._compiled is None or self._compiled[0]() is not kv_cache:
            self._compiled = weakref.ref(kv_cache), CompiledDecode.of(self, kv_cache)
        return self._compiled[1]

    def _attention(
        self,
        layer: Layer,
        x: Tensor,
        cos_sin: Tensor,
        batch: Batch,
        k_cache: Tensor,
        v_cache: Tensor,
        watch: LayerWatch | None,
    ) -> Tensor:
        config = self.config
        num_rotated = config.num_heads + config.num_kv_heads
        qkv = layer.qkv(layer.input_norm(x))
        heads = qkv.view(-1, num_rotated + config.num_kv_heads, config.head_dim)
        qk, v = heads[:, :num_rotated], heads[:, num_rotated:]
        if layer.qk_norm is not None:
            qk = layer.qk_norm(qk)
        qk = rotate(qk, cos_sin)
        q, k = qk[:, : config.num_heads], qk[:, config.num_heads :]
        if watch is not None:
            watch.see_queries(q)
        write_kv(k, v, k_cache, v_cache, batch.slot_mapping)
        scale = config.head_dim**-0.5
        out = paged_attention(q, k_cache, v_cache, batch, scale, window=layer.window)
        return layer.o(out.reshape(-1, config.q_size))
