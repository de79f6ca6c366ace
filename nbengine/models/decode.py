"""`CompiledDecode`: all layers of a decode step as one call into the compiled CPU kernels.

At one token a sequence a layer is a few dozen operations of some microseconds each, and on a CPU
calling them one by one costs as much as the arithmetic. `Decoder.forward` hands a step here when
every sequence has one row; it computes what the decoder's own loop does, operation by operation.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from nbengine import cpu
from nbengine.execution.batch import Batch
from nbengine.execution.kv_cache import KVCache
from nbengine.models.linear import Linear
from nbengine.models.ops import RmsNorm

if TYPE_CHECKING:
    from nbengine.models.decoder import Decoder, Layer


class CompiledDecode:
    """A decoder and a KV cache, laid out for the kernels. It holds addresses: it must not outlive
    either, nor see their tensors moved."""

    def __init__(self, native: ctypes.CDLL, decoder: Decoder, kv_cache: KVCache) -> None:
        config = decoder.config
        self._native = native
        self._layers = (cpu.Layer * len(decoder.layers))(
            *map(_layer, decoder.layers, kv_cache.k, kv_cache.v)
        )
        self._shape = cpu.Shape(
            config.hidden_size,
            config.intermediate_size,
            config.num_heads,
            config.num_kv_heads,
            config.head_dim,
            kv_cache.block_size,
            config.rms_norm_eps,
            config.head_dim**-0.5,
        )

    @classmethod
    def of(cls, decoder: Decoder, kv_cache: KVCache) -> CompiledDecode | None:
        """None where the kernels can't be had or don't serve this decoder: they take float32
        activations on a CPU."""
        kind = torch.float32, torch.device("cpu")
        if not (
            kind == (decoder.dtype, decoder.device) == (kv_cache.data.dtype, kv_cache.data.device)
        ):
            return None
        native = cpu.kernels()
        linears = [
            linear
            for layer in decoder.layers
            for linear in (layer.qkv, layer.o, layer.gate_up, layer.down)
        ]
        if native is None or any(linear.matrix is None for linear in linears):
            return None
        return cls(native, decoder, kv_cache)

    def __call__(self, x: Tensor, cos_sin: Tensor, batch: Batch) -> Tensor:
        """The last layer's output from embeddings x `[S, hidden]`, which it replaces; cos_sin
        `[S, 2, head_dim]`; one row for each sequence of the batch."""
        self._native.decode(
            self._layers,
            len(self._layers),
            ctypes.byref(self._shape),
            x.data_ptr(),
            cos_sin.data_ptr(),
            batch.slot_mapping.data_ptr(),
            batch.seq_lens.data_ptr(),
            batch.block_tables.data_ptr(),
            batch.block_tables.shape[1],
            x.shape[0],
            torch.get_num_threads(),
        )
        return x


def _layer(layer: Layer, k_cache: Tensor, v_cache: Tensor) -> cpu.Layer:
    return cpu.Layer(
        _matrix(layer.qkv),
        _matrix(layer.o),
        _matrix(layer.gate_up),
        _matrix(layer.down),
        _weight(layer.input_norm),
        _weight(layer.post_attention_norm),
        None if layer.qk_norm is None else _weight(layer.qk_norm),
        k_cache.data_ptr(),
        v_cache.data_ptr(),
        layer.window or 0,
    )


def _matrix(linear: Linear) -> cpu.Matrix:
    assert linear.matrix is not None
    return linear.matrix


def _weight(norm: RmsNorm) -> int:
    return norm.weight.data_ptr()
