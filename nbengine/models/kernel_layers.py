"""`KernelLayers`: the decoder's layers on the op table (`nbengine.kernels`).

What `Decoder.forward` computes operation by operation in torch, in the fused pieces that the kernels
offer: a layer is five launches and four products. It reads nothing back and its only allocations
are torch's own, so that a decode step can be captured in a CUDA graph. It asks for ops by name and
does not know who runs them.

The batch's decodes (one row each) come first, its prefill chunks after them: `ModelRunner` orders
them so, and each part is one launch of its own kernel.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from nbengine.config import EngineConfig
from nbengine.errors import InvalidField
from nbengine.execution.batch import Batch
from nbengine.execution.kv_cache import KVCache
from nbengine.kernels.compiler import ToolchainMissing, nvidia_headers, nvrtc_version
from nbengine.kernels.ops import gemv
from nbengine.kernels.ops.paged_attention import HEAD_DIMS, MAX_GROUP
from nbengine.kernels.ops.paged_attention_decode import workspace_bytes
from nbengine.kernels.shapes import MAX_VOCAB_SIZE
from nbengine.kernels.table import Kernels
from nbengine.models.config import ModelConfig
from nbengine.models.linear import DenseLinear, Linear, QuantizedLinear

if TYPE_CHECKING:
    from nbengine.execution.probe import LayerWatch
    from nbengine.models.decoder import Decoder, Layer

_log = logging.getLogger("nbengine")


def unserved(config: ModelConfig, dtype: torch.dtype, quantization: str | None) -> str | None:
    """Why the kernels don't serve this model; None where they do."""
    pack = 8 if quantization else 16 // dtype.itemsize
    group = config.num_heads // config.num_kv_heads
    if config.head_dim not in HEAD_DIMS:
        return f"head_dim is {config.head_dim}, not one of {HEAD_DIMS}"
    if group > MAX_GROUP:
        return f"{group} query heads share a KV head, more than {MAX_GROUP}"
    if config.hidden_size % pack or config.intermediate_size % pack:
        return (
            f"hidden_size {config.hidden_size} and intermediate_size {config.intermediate_size} "
            f"are not both multiples of {pack}"
        )
    if config.vocab_size > MAX_VOCAB_SIZE:
        return f"the vocabulary has {config.vocab_size:,} tokens, more than {MAX_VOCAB_SIZE:,}"
    return None


def choose_kernels(
    settings: EngineConfig, config: ModelConfig, dtype: torch.dtype, device: torch.device
) -> Kernels | None:
    """The ops that `settings.kernels` asks for; None for torch's operations (and the CPU's own
    kernels). "auto" is CUDA on a GPU, where they serve the model.

    Raises:
        InvalidField: kernels that are asked for by name and don't serve this model or device.
    """
    wanted = settings.kernels
    if wanted == "torch" or (wanted == "auto" and device.type != "cuda"):
        return None
    problem = unserved(config, dtype, settings.quantization)
    if wanted == "cuda" and device.type != "cuda":
        problem = f"need a CUDA device, and the engine runs on {device}"
    elif wanted == "emulated" and device.type != "cpu":
        problem = f"run on a CPU: give device='cpu', not {str(device)!r}"
    if problem is None and device.type == "cuda":
        problem = _missing_toolchain()
    if problem is None:
        return Kernels(device, "emulated" if wanted == "emulated" else "cuda")
    if wanted != "auto":
        raise InvalidField("kernels", wanted, problem)
    _log.warning("the model runs in torch's operations and not by kernels: %s", problem)
    return None


def _missing_toolchain() -> str | None:
    try:
        nvrtc_version()
        nvidia_headers()
    except ToolchainMissing as missing:
        return str(missing)
    return None


class KernelLayers:
    """Runs a decoder's layers. Called like `Decoder.forward`."""

    def __init__(self, decoder: Decoder, kernels: Kernels) -> None:
        self.decoder, self.kernels = decoder, kernels
        config = decoder.config
        num_bytes = workspace_bytes(
            decoder.device, config.num_heads, config.num_kv_heads, config.head_dim
        )
        self._workspace = torch.zeros(num_bytes, dtype=torch.uint8, device=decoder.device)
        self._version = kernels.version

    def __call__(self, batch: Batch, kv_cache: KVCache, watch: LayerWatch | None = None) -> Tensor:
        """The last layer's output `[T, hidden]`, and the batch's keys and values in the cache; what
        the layers saw at the last row, in `watch`."""
        decoder, kernels = self.decoder, self.kernels
        if self._version != kernels.version:  # another implementation may have left anything there
            self._workspace.zero_()
            self._version = kernels.version
        x = embedding(batch.token_ids, decoder.embedding)  # the residual stream
        normed = torch.empty_like(x)
        norm = decoder.layers[0].input_norm
        kernels.rms_norm(out=normed, x=x, weight=norm.weight, eps=norm.eps)
        if watch is not None:
            watch.see_hidden(x)
        for index, layer in enumerate(decoder.layers):
            k_cache, v_cache = kv_cache.k[index], kv_cache.v[index]
            out = self._attention(layer, normed, batch, k_cache, v_cache, watch)
            norm = layer.post_attention_norm
            kernels.rms_norm(out=normed, x=out, residual=x, weight=norm.weight, eps=norm.eps)
            gate_up = self.product(layer.gate_up, normed)
            activated = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
            kernels.gated_mlp(out=activated, gate_up=gate_up, activation="silu")
            out = self.product(layer.down, activated)
            if index + 1 < len(decoder.layers):
                norm = decoder.layers[index + 1].input_norm
                kernels.rms_norm(out=normed, x=out, residual=x, weight=norm.weight, eps=norm.eps)
            else:
                x += out
            if watch is not None:
                watch.see_hidden(x)
        return x

    def compute_logits(self, hidden_rows: Tensor) -> Tensor:
        """`[R, vocab]` of rows `[R, hidden]` of the layers' output."""
        norm = self.decoder.norm
        normed = torch.empty_like(hidden_rows)
        self.kernels.rms_norm(out=normed, x=hidden_rows, weight=norm.weight, eps=norm.eps)
        return self.product(self.decoder.head, normed)

    def product(self, weights: Linear, x: Tensor) -> Tensor:
        """x `[T, in]` times the matrix, plus its bias."""
        few = x.shape[0] <= gemv.MAX_ROWS  # up to which it beats the library's product
        by_library = not few and not self.decoder.batch_invariant
        if isinstance(weights, QuantizedLinear):
            if by_library or x.dtype == torch.float32:  # which tensor cores would round
                dense = self._dense if self.decoder.batch_invariant else linear
                return weights.multiply(x, self.kernels.dequantize, dense)
            out = x.new_empty(x.shape[0], len(weights.codes))
            for some, of_some in _few_at_a_time(x, out):
                self.kernels.quantized_gemv(
                    out=of_some,
                    x=some,
                    codes=weights.codes,
                    scales=weights.scales,
                    bias=weights.bias,
                )
            return out
        assert isinstance(weights, DenseLinear)  # the others are for the CPU's own kernels
        dense = linear if by_library else self._dense
        return dense(x, weights.weight, weights.bias)

    def _dense(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """By the kernels in which a row's result is the same at any number of rows."""
        out = x.new_empty(x.shape[0], weight.shape[0])
        if x.shape[0] > gemv.MAX_ROWS and x.dtype != torch.float32:
            self.kernels.gemm(out=out, x=x, weight=weight, bias=bias)
            return out
        for some, of_some in _few_at_a_time(x, out):
            self.kernels.gemv(out=of_some, x=some, weight=weight, bias=bias)
        return out

    def _attention(
        self,
        layer: Layer,
        normed: Tensor,
        batch: Batch,
        k_cache: Tensor,
        v_cache: Tensor,
        watch: LayerWatch | None,
    ) -> Tensor:
        config, kernels = self.decoder.config, self.kernels
        qkv = self.product(layer.qkv, normed)
        q = qkv.new_empty(qkv.shape[0], config.num_heads, config.head_dim)
        kernels.kv_cache_write(
            q=q,
            k_cache=k_cache,
            v_cache=v_cache,
            qkv=qkv,
            positions=batch.positions,
            table=self.decoder.rope,
            slot_mapping=batch.slot_mapping,
            qk_weight=None if layer.qk_norm is None else layer.qk_norm.weight,
            eps=config.rms_norm_eps,
        )
        if watch is not None:
            watch.see_queries(q)
        out = torch.empty_like(q)
        scale = config.head_dim**-0.5
        # The two kernels add up in different orders, and the decode kernel's depends on the batch. In
        # the other one a row's own keys alone count, in steps that are anchored at position 0.
        decodes = 0 if self.decoder.batch_invariant else batch.num_decodes
        if decodes:
            kernels.paged_attention_decode(
                out=out[:decodes],
                q=q[:decodes],
                k_cache=k_cache,
                v_cache=v_cache,
                block_tables=batch.block_tables[:decodes],
                seq_lens=batch.seq_lens[:decodes],
                workspace=self._workspace,
                scale=scale,
                window=layer.window,
                max_seq_len=batch.max_seq_len,
            )
        if decodes < len(batch.seq_lens):
            kernels.paged_attention_prefill(
                out=out,
                q=q,
                k_cache=k_cache,
                v_cache=v_cache,
                block_tables=batch.block_tables[decodes:],
                query_start_loc=batch.query_start_loc[decodes:],
                seq_lens=batch.seq_lens[decodes:],
                scale=scale,
                window=layer.window,
                max_query_len=batch.max_query_len,
            )
        return self.product(layer.o, out.view(-1, config.q_size))


def _few_at_a_time(x: Tensor, out: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """As many rows of both as the kernels for few rows take."""
    return zip(x.split(gemv.MAX_ROWS), out.split(gemv.MAX_ROWS), strict=True)
