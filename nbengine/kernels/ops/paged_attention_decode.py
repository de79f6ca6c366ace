"""Attention of one query row a sequence over its paged KV cache: the decode step."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from nbengine.kernels.cases import normal, poison, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.ops.paged_attention import (
    HEAD_DIMS,
    MAX_GROUP,
    compact,
    exact_dtype,
    with_scores,
)
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense, check_rows, check_shape

_MAX_BLOCKS_PER_MULTIPROCESSOR = 4
_MAX_SHARED_BYTES = 96 * 1024
"""A little less than the least that a block can have on any GPU from sm_80 on (99 KiB)."""


def block_shape(dtype: torch.dtype, head_dim: int, group: int, few_pairs: bool) -> tuple[int, int]:
    """Warps of a block, and blocks of a multiprocessor.

    A lane holds its part of a tile's keys and values and of the outputs of 8 or 16 queries: the
    registers bound the product of the two. Of small blocks, one loads while another sums up its
    warps. Where pairs of a sequence and a KV head are few, a single block keeps the parts of a pair
    few, of so many warps that 64 KiB are under way.
    """
    if dtype == torch.float32:
        return 4, 1
    if group <= 8:
        blocks = 4 if head_dim <= 80 else 3 if head_dim <= 128 else 2
    else:
        blocks = 3 if head_dim <= 64 else 2
    if few_pairs:
        warps = min(4 * blocks, max(8, 1024 // head_dim))
        return (warps if warps * _partial_bytes(group, head_dim) <= _MAX_SHARED_BYTES else 4), 1
    return 4, blocks


def workspace_bytes(device: torch.device, num_heads: int, num_kv_heads: int, head_dim: int) -> int:
    """Size of the uint8 `workspace` of a launch, whatever its sequences and its dtype: partial
    results of each block (two at most) and a counter. Zero it once; every launch leaves the
    counters zero, so that the launches of one stream may share it."""
    blocks = _max_blocks(device)
    return 16 * blocks + 2 * blocks * _partial_bytes(num_heads // num_kv_heads, head_dim)


def _partial_bytes(group: int, head_dim: int) -> int:
    """Of the kernel's `Partial`: outputs, maximum and total of each query in float."""
    return 4 * (head_dim + 2) * 8 * -(-group // 8)


def _max_blocks(device: torch.device) -> int:
    return _MAX_BLOCKS_PER_MULTIPROCESSOR * _multiprocessors(device)


@cache
def _multiprocessors(device: torch.device) -> int:
    """The emulated device is so small that short sequences already share its blocks."""
    if device.type == "cpu":
        return 4
    return torch.cuda.get_device_properties(device).multi_processor_count


def launch(
    program: Program,
    *,
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    workspace: Tensor,
    scale: float,
    max_seq_len: int,
    rows: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    """out[row] = softmax(scale * q[row] K^T) V, over the `seq_lens[s]` tokens of sequence s.

    q and out are `[T, heads, head_dim]`, and their rows may be slices of wider ones; sequence s has
    row `rows[s]`, or row s. The caches are `[num_blocks, kv_heads, block_size, head_dim]`;
    `block_tables` `[S, max_blocks]` names each sequence's blocks. `seq_lens` `[S]` counts the
    query's own token; of a sequence of length 0 (padding in a captured graph) nothing is read and
    nothing written. A row sees the last `window` tokens, if given; `softcap` bounds the scores to
    softcap * tanh(scores / softcap).

    Lengths stay on the device, and the work is divided there: `max_seq_len` only bounds the grid.

    Raises:
        ValueError: a shape, stride or workspace size that the kernel does not take.
    """
    num_seqs, (num_rows, num_heads, head_dim) = len(seq_lens), q.shape
    num_blocks, num_kv_heads, block_size, _ = k_cache.shape
    group = num_heads // num_kv_heads
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"head_dim is {head_dim}, and must be one of {HEAD_DIMS}")
    if num_heads % num_kv_heads or group > MAX_GROUP:
        raise ValueError(
            f"{num_heads} query heads over {num_kv_heads} KV heads: a KV head serves a whole number "
            f"of query heads, {MAX_GROUP} at most"
        )
    if block_size < 8 or block_size & (block_size - 1):
        raise ValueError(f"block_size is {block_size}, and must be a power of two from 8 on")
    if rows is None and num_rows < num_seqs:
        raise ValueError(f"q has {num_rows} rows for {num_seqs} sequences, and no rows are named")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, and must be at least 1")
    check_rows("q", q, num_rows, num_heads, head_dim)
    check_rows("out", out, num_rows, num_heads, head_dim)
    check_dense("k_cache", k_cache, num_blocks, num_kv_heads, block_size, head_dim)
    check_dense("v_cache", v_cache, num_blocks, num_kv_heads, block_size, head_dim)
    check_shape("block_tables", block_tables, num_seqs, block_tables.shape[1])
    if block_tables.stride(1) != 1:
        raise ValueError("each row of block_tables must be dense")
    check_dense("seq_lens", seq_lens, num_seqs, alignment=8)
    if rows is not None:
        check_dense("rows", rows, num_seqs, alignment=8)
    needed = workspace_bytes(q.device, num_heads, num_kv_heads, head_dim)
    if workspace.numel() < needed:
        raise ValueError(f"the workspace has {workspace.numel():,} bytes, and needs {needed:,}")
    check_dense("workspace", workspace, workspace.numel())

    multiprocessors = _multiprocessors(program.device)
    pairs = num_seqs * num_kv_heads
    few_pairs = pairs <= multiprocessors
    warps, blocks_per_sm = block_shape(q.dtype, head_dim, group, few_pairs)
    units = pairs * -(-max_seq_len // (16 * warps))
    kernel = program.kernel(
        "paged_attention_decode", q.dtype, head_dim, -(-group // 8), warps, blocks_per_sm
    )
    grid = min(blocks_per_sm * multiprocessors, units)
    kernel[grid, 32 * warps, warps * _partial_bytes(group, head_dim)](
        out,
        q,
        k_cache,
        v_cache,
        block_tables,
        seq_lens,
        rows,
        workspace,
        _max_blocks(q.device),
        num_seqs,
        num_kv_heads,
        group,
        block_size.bit_length() - 1,
        block_tables.stride(0),
        q.stride(0),
        out.stride(0),
        scale,
        window or 0,
        softcap or 0.0,
        few_pairs,
    )


def reference(
    *,
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    seq_lens: Tensor,
    workspace: Tensor,
    scale: float,
    max_seq_len: int,
    rows: Tensor | None = None,
    window: int | None = None,
    softcap: float | None = None,
) -> None:
    _, num_kv_heads, block_size, head_dim = k_cache.shape
    exact = exact_dtype(q)
    for s, length in enumerate(seq_lens.tolist()):
        if length == 0:
            continue
        row = s if rows is None else int(rows[s])
        start = max(0, length - window) if window else 0
        positions = torch.arange(start, length, device=q.device)
        blocks, slots = block_tables[s, positions // block_size], positions % block_size
        k = k_cache[blocks, :, slots].to(exact).transpose(0, 1)  # [kv_heads, length, head_dim]
        v = v_cache[blocks, :, slots].to(exact).transpose(0, 1)
        scores = q[row].to(exact).view(num_kv_heads, -1, head_dim) @ k.mT * scale
        if softcap:
            scores = softcap * torch.tanh(scores / softcap)
        out[row] = (scores.softmax(-1) @ v).reshape(-1, head_dim)


def cases() -> Iterator[Case]:
    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    edges = (1, 15, 16, 17, 0, 33)
    ragged = (300, 5, 700, 0, 64)
    yield case(bfloat, (1, 2, 64), 16, edges)
    yield case(bfloat, (2, 2, 64), 8, edges, spread_rows=True)
    yield case(bfloat, (4, 2, 64), 32, ragged, softcap=5.0)
    yield case(bfloat, (7, 2, 128), 16, ragged)
    yield case(bfloat, (7, 1, 128), 16, (1700,))
    yield case(bfloat, (7, 1, 128), 16, (900, 100, 50, 900))
    yield case(bfloat, (8, 1, 80), 16, (129, 31))
    yield case(bfloat, (8, 1, 96), 256, (129, 31))
    yield case(bfloat, (2, 1, 256), 16, (40, 273))
    yield case(bfloat, (16, 1, 64), 64, (600, 9), window=256)
    yield case(half, (7, 2, 128), 16, ragged, window=100)
    yield case(half, (12, 1, 128), 16, (200, 70))
    yield case(half, (4, 1, 64), 16, (1,), window=1)
    yield case(single, (3, 3, 64), 16, edges)
    yield case(single, (3, 1, 64), 8, (400, 77), window=140, softcap=3.0, spread_rows=True)
    yield case(single, (9, 1, 80), 32, (290,))
    yield case(bfloat, (16, 1, 256), 16, (273,))
    for dtype in (half, single):  # a warp meets one maximum higher than the last after the other
        yield case(dtype, (2, 2, 64), 16, (1500, 1100, 90), rising=True)
    yield case(bfloat, (12, 2, 64), 16, (1500, 1100, 90), rising=True)


def case(
    dtype: torch.dtype,
    heads: tuple[int, int, int],
    block_size: int,
    lengths: Sequence[int],
    *,
    window: int | None = None,
    softcap: float | None = None,
    spread_rows: bool = False,
    rising: bool = False,
) -> Case:
    """`heads` is (query heads a KV head, KV heads, head_dim). The blocks lie in random order; every
    slot that no sequence sees holds NaN. With `spread_rows`, queries lie in rows of a wider batch,
    in another order. With `rising`, later keys give larger scores."""
    group, kv_heads, head_dim = heads

    def make(generator: torch.Generator) -> Arguments:
        device = generator.device

        def shuffled(n: int) -> Tensor:
            return torch.randperm(n, generator=generator, device=device)

        seq_lens = torch.tensor(lengths, device=device)
        num_blocks = [-(-length // block_size) for length in lengths]
        order = 1 + shuffled(sum(num_blocks))  # block 0 is no sequence's
        tables = torch.zeros(len(lengths), max(num_blocks) + 1, dtype=torch.int64, device=device)
        caches = [
            poison(generator, dtype, len(order) + 1, kv_heads, block_size, head_dim)
            for _ in range(2)
        ]
        for s, blocks in enumerate(order.split(num_blocks)):
            tables[s, : len(blocks)] = blocks
            first = max(0, lengths[s] - window) if window else 0
            positions = torch.arange(first, lengths[s], device=device)
            keys, values = (
                normal(generator, dtype, len(positions), kv_heads, head_dim) for _ in range(2)
            )
            if rising:
                keys *= 1 + positions[:, None, None] / 16
            place = blocks[positions // block_size], slice(None), positions % block_size
            caches[0][place], caches[1][place] = keys, values
        num_rows = 2 * len(lengths) if spread_rows else len(lengths)
        qkv = normal(generator, dtype, num_rows, (group + 2) * kv_heads, head_dim)
        num_heads = group * kv_heads
        return {
            "out": poison(generator, dtype, num_rows, num_heads, head_dim),
            "q": qkv[:, :num_heads],
            "k_cache": caches[0],
            "v_cache": caches[1],
            "block_tables": tables[:, :-1],
            "seq_lens": seq_lens,
            "rows": shuffled(num_rows)[: len(lengths)] if spread_rows else None,
            "workspace": torch.zeros(
                workspace_bytes(device, num_heads, kv_heads, head_dim),
                dtype=torch.uint8,
                device=device,
            ),
            "scale": 1 / math.sqrt(head_dim),
            "window": window,
            "softcap": softcap,
            "max_seq_len": max(lengths),
        }

    words = (
        f"{group}x{kv_heads}x{head_dim}",
        f"block{block_size}",
        f"{len(lengths)}seqs",
        max(lengths),
        f"window{window}" if window else "",
        "softcap" if softcap else "",
        "rows" if spread_rows else "",
        "rising" if rising else "",
    )
    return Case(title(dtype, *words), make)


def watch_case() -> Case:
    """Two sequences of one KV head: each warp takes the 16 tokens of one block."""
    return case(torch.float32, (2, 1, 64), 16, (40, 21))


def bench_cases() -> Iterator[Case]:
    """The shapes whose speed counts: 28 query and 4 KV heads of 128 in blocks of 16."""
    heads = (7, 4, 128)
    shuffled = torch.randperm(64, generator=torch.Generator().manual_seed(0))
    ragged = torch.linspace(16, 8192, 64).long()[shuffled].tolist()
    for lengths in ([2048] * 128, [2048] * 32, ragged, [32768]):
        yield case(torch.bfloat16, heads, 16, lengths)


def tolerance(arguments: Arguments) -> Tolerance:
    base = {
        torch.float32: Tolerance(2e-5, 1e-5),
        torch.float16: Tolerance(4e-3, 1e-3),
        torch.bfloat16: Tolerance(1.6e-2, 6e-3),
    }
    return with_scores(base[arguments["out"].dtype], arguments)


def cost(arguments: Arguments) -> Cost:
    q, kv, window = arguments["q"], arguments["k_cache"], arguments["window"]
    seq_lens = arguments["seq_lens"]
    seen = int((seq_lens.clamp(max=window) if window else seq_lens).sum())
    _, num_kv_heads, _, head_dim = kv.shape
    queries = len(seq_lens) * q.shape[1] * head_dim
    keys = seen * num_kv_heads * head_dim
    return Cost((2 * keys + 2 * queries) * q.element_size(), 4 * seen * q.shape[1] * head_dim)


OP = Op(
    name="paged_attention_decode",
    source="paged_attention_decode.cu",
    outputs=("out",),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    scratch=("workspace",),
    bench_cases=bench_cases,
    watch_case=watch_case,
    compact=compact,
)
