"""Attention through block tables, in torch."""

from __future__ import annotations

import torch
from torch import Tensor

from nbengine.execution.batch import Batch


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Put k and v `[T, kv_heads, head_dim]` into the slots `[T]` of the caches."""
    block_size = k_cache.shape[2]
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[blocks, :, offsets] = k
    v_cache[blocks, :, offsets] = v


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """q `[T, num_heads, head_dim]` over each sequence's own blocks."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    out = torch.empty_like(q)
    starts = batch.query_start_loc.tolist()
    for i, seq_len in enumerate(batch.seq_lens.tolist()):
        rows = slice(starts[i], starts[i + 1])
        table = batch.block_tables[i, : -(-seq_len // block_size)]
        k = k_cache[table].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :seq_len]
        v = v_cache[table].transpose(0, 1).reshape(kv_heads, -1, head_dim)[:, :seq_len]
        groups = q.shape[1] // kv_heads
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        scores = torch.einsum("thd,hsd->hts", q[rows].float(), k.float()) * scale
        if softcap is not None:
            scores = torch.tanh(scores / softcap) * softcap
        age = batch.positions[rows, None] - torch.arange(seq_len, device=q.device)
        hidden = (age < 0) if window is None else (age < 0) | (age >= window)
        probs = scores.masked_fill(hidden, float("-inf")).softmax(-1)
        out[rows] = torch.einsum("hts,hsd->thd", probs, v.float()).to(q.dtype)
    return out
