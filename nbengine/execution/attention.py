"""Paged attention in torch: queries of a mixed batch over keys and values in cache blocks.

The decoder calls `write_kv` and `paged_attention` once a layer. What is the same for all layers
(which cache rows to gather, which of them are masked) is worked out by the first layer of a step
and kept on the batch. Decodes in float32 on a CPU go to the compiled kernel (`nbengine.cpu`), which
reads the blocks where they lie; elsewhere those of similar length are gathered together and computed
with a few large operations. A sequence with more than one query row (a prefill chunk) is computed
alone.

Invariant: nothing but a sequence's own first `seq_len` slots reaches its result. Slots beyond them
may hold anything, NaN included, so they are cut off or zeroed; a zero probability alone would not
do (0 * NaN is NaN).
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from nbengine.cpu import kernels
from nbengine.execution.batch import Batch


def write_kv(k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, slot_mapping: Tensor) -> None:
    """Put k and v `[T, kv_heads, head_dim]` into the slots `[T]` of the caches
    `[num_blocks, kv_heads, block_size, head_dim]`, in the caches' dtype."""
    _, kv_heads, block_size, head_dim = k_cache.shape
    native = _native(k_cache, k)
    if native is not None and _native(v_cache, v):
        native.write_kv(
            k.data_ptr(),
            k.stride(0),
            v.data_ptr(),
            v.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            slot_mapping.data_ptr(),
            k.shape[0],
            kv_heads,
            block_size,
            head_dim,
        )
        return
    blocks, offsets = slot_mapping // block_size, slot_mapping % block_size
    k_cache[blocks, :, offsets] = k.to(k_cache.dtype)
    v_cache[blocks, :, offsets] = v.to(v_cache.dtype)


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    batch: Batch,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """Causal attention of q `[T, num_heads, head_dim]` over each row's own sequence.

    Query head h reads KV head `h // (num_heads // kv_heads)` (grouped-query attention, Ainslie et
    al. 2023). A row sees its own position and those before it, only the last `window` of them if
    given (Mistral: 4096 means itself and 4095 before). `softcap` bounds the scores by
    softcap * tanh(scores / softcap). Returns `[T, num_heads, head_dim]` in q's dtype; the sums are
    in q's dtype, the softmax in float32.
    """
    plan = batch.attention_plans.get(window)
    if plan is None:
        native = _native(k_cache, q)
        plan = _make_plan(batch, k_cache.shape[1], k_cache.shape[2], window, native)
        batch.attention_plans[window] = plan
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    for part in plan:
        part.attend(q, k_cache, v_cache, scale, softcap, out)
    return out


def _native(cache: Tensor, x: Tensor) -> ctypes.CDLL | None:
    """The compiled kernels, where they serve this cache and x `[T, heads, head_dim]`, which may be
    a slice of wider rows."""
    if (
        cache.dtype == x.dtype == torch.float32
        and cache.is_cpu
        and cache.is_contiguous()
        and x.stride(2) == 1
        and x.stride(1) == x.shape[2]
    ):
        return kernels()
    return None


@dataclass(slots=True)
class _NativeDecodes:
    """Sequences with one query row each, for the compiled kernel."""

    native: ctypes.CDLL
    rows: Tensor  # [S]: their rows in the batch
    seq_lens: Tensor  # [S]
    block_tables: Tensor  # [S, max_blocks]
    window: int | None

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scale: float,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        _, kv_heads, block_size, head_dim = k_cache.shape
        self.native.attend_decodes(
            q.data_ptr(),
            q.stride(0),
            k_cache.data_ptr(),
            v_cache.data_ptr(),
            out.data_ptr(),
            len(self.rows),
            self.rows.data_ptr(),
            self.seq_lens.data_ptr(),
            self.block_tables.data_ptr(),
            self.block_tables.shape[1],
            q.shape[1],
            kv_heads,
            block_size,
            head_dim,
            scale,
            self.window or 0,
            softcap or 0.0,
            torch.get_num_threads(),
        )


@dataclass(slots=True)
class _Decodes:
    """S sequences with one query row each, padded to `L = max_blocks * block_size` slots."""

    rows: Tensor  # [S]: their rows in the batch
    cache_rows: Tensor  # [S * kv_heads * max_blocks]: block * kv_heads + head
    unused: Tensor  # rows of [S * kv_heads * L] beyond their sequence's length
    hidden: Tensor  # bool [S, 1, L]: unused, or out of the window

    def gather(self, cache: Tensor, dtype: torch.dtype) -> Tensor:
        """-> [S, kv_heads, L, head_dim], zeros where unused."""
        found = cache.flatten(2).flatten(0, 1).index_select(0, self.cache_rows)
        found = found.view(-1, cache.shape[3]).index_fill_(0, self.unused, 0)
        return found.view(len(self.rows), cache.shape[1], -1, cache.shape[3]).to(dtype)

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scale: float,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        k, v = self.gather(k_cache, q.dtype), self.gather(v_cache, q.dtype)
        num_seqs, kv_heads, length, head_dim = k.shape
        mine = q.index_select(0, self.rows).view(num_seqs * kv_heads, -1, head_dim)
        scores = torch.bmm(mine * scale, k.flatten(0, 1).transpose(1, 2))
        probs = _softmax(scores.view(num_seqs, -1, length), self.hidden, softcap)
        found = torch.bmm(probs.view(num_seqs * kv_heads, -1, length), v.flatten(0, 1))
        out.index_copy_(0, self.rows, found.view(num_seqs, -1, head_dim))


@dataclass(slots=True)
class _Chunk:
    """The Q query rows of one sequence: a prompt, or a part of it with its past."""

    start: int  # its first row in the batch
    num_rows: int
    seq_len: int
    cache_rows: Tensor  # [kv_heads * blocks]: block * kv_heads + head
    visible: Tensor | None  # bool [Q, seq_len]; None: the whole prompt, and so plainly causal

    def gather(self, cache: Tensor, dtype: torch.dtype) -> Tensor:
        """-> [1, kv_heads, seq_len, head_dim]."""
        found = cache.flatten(2).flatten(0, 1).index_select(0, self.cache_rows)
        return found.view(1, cache.shape[1], -1, cache.shape[3])[:, :, : self.seq_len].to(dtype)

    def attend(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        scale: float,
        softcap: float | None,
        out: Tensor,
    ) -> None:
        k, v = self.gather(k_cache, q.dtype), self.gather(v_cache, q.dtype)
        mine = q[self.start : self.start + self.num_rows].transpose(0, 1).unsqueeze(0)
        if softcap is None:
            found = scaled_dot_product_attention(
                mine,
                k,
                v,
                attn_mask=self.visible,
                is_causal=self.visible is None,
                scale=scale,
                enable_gqa=True,
            )
        else:
            grouped = mine.unflatten(1, (k.shape[1], -1))  # [1, kv_heads, group, Q, head_dim]
            scores = (grouped * scale) @ k.unsqueeze(2).transpose(-1, -2)
            visible = self.visible
            if visible is None:
                visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            found = (_softmax(scores, ~visible, softcap) @ v.unsqueeze(2)).flatten(1, 2)
        out[self.start : self.start + self.num_rows] = found[0].transpose(0, 1)


def _softmax(scores: Tensor, hidden: Tensor, softcap: float | None) -> Tensor:
    """Over the last dimension, in float32; returns the dtype of `scores`."""
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    masked = scores.masked_fill(hidden, float("-inf"))
    return masked.softmax(-1, dtype=torch.float32).to(scores.dtype)


def _make_plan(
    batch: Batch, kv_heads: int, block_size: int, window: int | None, native: ctypes.CDLL | None
) -> list[_NativeDecodes | _Decodes | _Chunk]:
    device = batch.block_tables.device
    heads = torch.arange(kv_heads, device=device)
    seq_lens = [past + new for past, new in zip(batch.context_lens, batch.query_lens, strict=True)]
    plan: list[_NativeDecodes | _Decodes | _Chunk] = []

    decodes = [i for i, n in enumerate(batch.query_lens) if n == 1]
    if decodes and native is not None:
        members = torch.tensor(decodes)
        plan.append(
            _NativeDecodes(
                native=native,
                rows=batch.query_start_loc[members],
                seq_lens=batch.seq_lens[members],
                block_tables=batch.block_tables[members],
                window=window,
            )
        )
        decodes = []
    for group in _of_similar_length(decodes, seq_lens):
        members = torch.tensor(group, device=device)
        lengths = batch.seq_lens[members]  # [S]
        num_blocks = -(-max(seq_lens[i] for i in group) // block_size)
        blocks = batch.block_tables[members, :num_blocks]  # [S, num_blocks]
        position = torch.arange(num_blocks * block_size, device=device)
        unused = position >= lengths[:, None]  # [S, L]
        hidden = unused if window is None else unused | (position < (lengths - window)[:, None])
        each_head = unused[:, None, :].expand(-1, kv_heads, -1)
        plan.append(
            _Decodes(
                rows=batch.query_start_loc[members],
                cache_rows=(blocks[:, None, :] * kv_heads + heads[:, None]).flatten(),
                unused=each_head.flatten().nonzero().flatten(),
                hidden=hidden[:, None, :],
            )
        )

    start = 0
    for i, num_rows in enumerate(batch.query_lens):
        if num_rows > 1:
            seq_len = seq_lens[i]
            blocks = batch.block_tables[i, : -(-seq_len // block_size)]
            visible = None
            if batch.context_lens[i] > 0 or (window is not None and window < seq_len):
                query = torch.arange(batch.context_lens[i], seq_len, device=device)[:, None]
                position = torch.arange(seq_len, device=device)
                visible = position <= query
                if window is not None:
                    visible &= position > query - window
            cache_rows = (blocks * kv_heads + heads[:, None]).flatten()
            plan.append(_Chunk(start, num_rows, seq_len, cache_rows, visible))
        start += num_rows
    return plan


def _of_similar_length(members: list[int], lengths: list[int]) -> Iterator[list[int]]:
    """Groups whose longest is at most twice the shortest, so that padding at most doubles the
    work."""
    group: list[int] = []
    for i in sorted(members, key=lengths.__getitem__):
        if group and lengths[i] > 2 * lengths[group[0]]:
            yield group
            group = []
        group.append(i)
    if group:
        yield group
