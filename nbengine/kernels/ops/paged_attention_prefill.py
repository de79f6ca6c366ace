"""paged_attention_prefill: causal attention of many rows a sequence over the paged KV cache.

Prompts, chunks of prompts, and mixed batches of them with any past. (A batch's decode rows go to
paged_attention_decode: `members` says which of the sequences this call computes.)
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.ops.paged_attention import HEAD_DIMS, compact, exact_dtype, with_scores
from nbengine.kernels.program import Program
from nbengine.kernels.report import Limits
from nbengine.kernels.shapes import check_dense, check_rows, check_shape


def launch(
    program: Program,
    *,
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    members: Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    max_query_len: int,
) -> None:
    """out[r] = sum over visible positions p of softmax(scale * q[r] . K[p]) * V[p], for each head.

    Row i of sequence s is row query_start_loc[s] + i of q and out, its position is
    seq_lens[s] - (number of s's rows) + i, and it sees the positions up to its own: all, or the last
    `window`. With a softcap each score x becomes softcap * tanh(x / softcap) first. The chunk's own
    keys and values are in the cache already.

    Args:
        out, q: `[T, query_heads, head_dim]`; rows may be slices of wider ones.
        k_cache, v_cache: `[num_blocks, kv_heads, block_size, head_dim]`, dense. Slots that no row
            sees are never read.
        block_tables: `[S, max_blocks]` int64; rows may be slices of wider ones.
        query_start_loc: `[S + 1]` int64.
        seq_lens: `[S]` int64, tokens in the cache, those of this call included.
        members: `[M]` int64, the sequences to compute; None is all of them. The others' rows of out
            are left alone.
        max_query_len: at least the number of rows of every member (known on the host, as the grid
            needs it).

    Raises:
        ValueError: a shape or stride that the kernel does not take.
    """
    (num_rows, query_heads, head_dim), num_seqs = q.shape, len(seq_lens)
    num_blocks, kv_heads, block_size, _ = k_cache.shape
    if query_heads % kv_heads or head_dim not in HEAD_DIMS:
        raise ValueError(
            f"{query_heads} query heads over {kv_heads} KV heads of {head_dim}: the query heads must "
            f"be a multiple of the KV heads, and the head's size one of {HEAD_DIMS}"
        )
    if not 8 <= block_size <= 256 or block_size & (block_size - 1):
        raise ValueError(f"block_size is {block_size}, and must be a power of two from 8 to 256")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, and must be at least 1")
    if scale <= 0:
        raise ValueError(f"scale is {scale}, and must be positive")
    check_rows("q", q, num_rows, query_heads, head_dim)
    check_rows("out", out, num_rows, query_heads, head_dim)
    check_dense("k_cache", k_cache, num_blocks, kv_heads, block_size, head_dim)
    check_dense("v_cache", v_cache, num_blocks, kv_heads, block_size, head_dim)
    check_shape("block_tables", block_tables, num_seqs, block_tables.shape[1])
    if block_tables.stride(1) != 1:
        raise ValueError("each row of block_tables must be dense")
    check_dense("query_start_loc", query_start_loc, num_seqs + 1, alignment=8)
    check_dense("seq_lens", seq_lens, num_seqs, alignment=8)
    if members is not None:
        check_dense("members", members, len(members), alignment=8)
    group = query_heads // kv_heads
    num_members = num_seqs if members is None else len(members)
    tile = tiling(q.dtype, head_dim, program.limits, is_narrow=max_query_len == 1)
    # The sum of ceil(rows * group / tile.rows) over the members is at most either of these.
    num_tiles = min(
        num_members * -(-max_query_len * group // tile.rows),
        num_rows * group // tile.rows + num_members,
    )
    kernel = program.kernel(
        "paged_attention_prefill" if tile.mma else "paged_attention_prefill_float",
        *((q.dtype,) if tile.mma else ()),
        head_dim,
        group,
        block_size,
        *tile.template_arguments,
        window is not None,
        softcap is not None,
    )
    kernel[(kv_heads, num_tiles), tile.warps * 32, tile.shared_bytes](
        out,
        q,
        k_cache,
        v_cache,
        block_tables,
        query_start_loc,
        seq_lens,
        members,
        num_members,
        q.stride(0),
        out.stride(0),
        block_tables.stride(0),
        scale,
        window or 0,
        softcap or 0.0,
    )


@dataclass(frozen=True, slots=True)
class Tiling:
    """How a block divides its work. A row is one query of one query head; the rows of a KV head's
    group stand next to each other in a tile, so that they share the keys."""

    mma: bool
    warps: int
    rows_per_warp: int
    keys: int
    """Keys in one step of the loop."""
    blocks_per_sm: int
    """That the registers are to leave room for."""
    shared_bytes: int

    @property
    def rows(self) -> int:
        return self.warps * self.rows_per_warp

    @property
    def template_arguments(self) -> tuple[int, ...]:
        if not self.mma:
            return (self.warps, self.rows_per_warp)
        return (self.warps, self.rows_per_warp, self.keys, self.blocks_per_sm)


@functools.cache
def tiling(dtype: torch.dtype, head_dim: int, limits: Limits, is_narrow: bool = False) -> Tiling:
    """The shape of a tile for this head size: the first that the device's shared memory holds.

    Narrow is for sequences of one query each, whose few rows a warp computes in half the time where
    it has no more than 16. A row's result is the same: it depends on the keys of a step alone.
    """
    if dtype == torch.float32:
        return Tiling(False, 4, 4, 32, 1, (4 * 4 + 32 * 2) * (head_dim + 4) * 4)
    shapes = ((8, 16, 64, 1), (8, 16, 32, 1), (4, 16, 32, 1))
    if head_dim <= 128:
        # 32 rows a warp: their output and scores are 192 registers a thread at head_dim 128.
        shapes = ((4, 32, 64, 2), (4, 32, 32, 2), (4, 32, 32, 1))
    for warps, rows_per_warp, keys, blocks_per_sm in shapes:
        # The rows of Q, two stages of K and of V, each row with one pack of padding.
        needed = (warps * rows_per_warp + 4 * keys) * (head_dim + 8) * 2
        taken = blocks_per_sm * (needed + limits.reserved_bytes)
        if needed <= limits.block_shared_bytes and taken <= limits.shared_bytes:
            break
    if is_narrow:
        rows_per_warp = 16
        needed = (warps * rows_per_warp + 4 * keys) * (head_dim + 8) * 2
    return Tiling(True, warps, rows_per_warp, keys, blocks_per_sm, needed)


def reference(
    *,
    out: Tensor,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    block_tables: Tensor,
    query_start_loc: Tensor,
    seq_lens: Tensor,
    members: Tensor | None = None,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    max_query_len: int,
) -> None:
    _, kv_heads, block_size, _ = k_cache.shape
    exact = exact_dtype(q)
    starts, lengths = query_start_loc.tolist(), seq_lens.tolist()
    for s in range(len(lengths)) if members is None else members.tolist():
        rows, length = slice(starts[s], starts[s + 1]), lengths[s]
        blocks = block_tables[s, : -(-length // block_size)]
        position = torch.arange(length - (rows.stop - rows.start), length, device=q.device)[:, None]
        key = torch.arange(length, device=q.device)
        hidden = key > position
        if window is not None:
            hidden |= key <= position - window
        grouped = q[rows].to(exact).unflatten(1, (kv_heads, -1))  # [n, kv_heads, group, head_dim]
        result = out[rows].unflatten(1, (kv_heads, -1))
        for head in range(kv_heads):
            k = k_cache[blocks, head].flatten(0, 1)[:length].to(exact)
            v = v_cache[blocks, head].flatten(0, 1)[:length].to(exact)
            unseen = hidden.all(0)[:, None]  # behind every window: may hold NaN, as unused slots
            k, v = k.masked_fill(unseen, 0.0), v.masked_fill(unseen, 0.0)
            scores = grouped[:, head].transpose(0, 1) @ k.T * scale  # [group, n, length]
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
            result[:, head].copy_((weights @ v).transpose(0, 1))


def cases() -> Iterator[Case]:
    half, bfloat, single = torch.float16, torch.bfloat16, torch.float32
    mixed = ((5, 0), (1, 17), (33, 3))
    yield make_case("prompt", bfloat, 128, 1, 7, 16, ((23, 0),))
    yield make_case("chunk", bfloat, 128, 2, 7, 16, ((19, 64),))
    yield make_case("mixed", half, 64, 2, 4, 8, mixed)
    yield make_case("members", bfloat, 64, 1, 2, 16, (*mixed, (70, 64)), members=(3, 0, 2))
    yield make_case("one-each", bfloat, 128, 1, 7, 16, ((1, 70), (1, 0), (1, 130)))
    yield make_case("80", bfloat, 80, 2, 1, 64, ((66, 17),))
    yield make_case("96", half, 96, 1, 2, 16, ((40, 50),))
    yield make_case("256", bfloat, 256, 1, 2, 32, ((37, 30), (2, 0)))
    yield make_case("group-16", half, 128, 1, 16, 256, ((9, 130),))
    yield make_case("window", bfloat, 64, 1, 4, 16, ((37, 100), (50, 0)), window=20)
    yield make_case("window-1", half, 64, 1, 1, 8, ((5, 3),), window=1)
    yield make_case("softcap", half, 128, 1, 4, 128, ((20, 3),), softcap=5.0)
    yield make_case(
        "softcap-window", bfloat, 256, 1, 4, 16, ((33, 64),), window=48, softcap=30.0, packed=True
    )
    yield make_case("packed", bfloat, 128, 2, 4, 16, ((20, 3), (7, 0)), packed=True)
    for head_dim in HEAD_DIMS:
        yield make_case(f"float-{head_dim}", single, head_dim, 2, 3, 16, ((1, 3), (14, 40)))
    # Each maximum is soon passed by a higher one; and the last key of a row ends a step.
    yield make_case("rising", half, 64, 1, 4, 16, ((30, 170),), rising=True)
    yield make_case("float-rising", single, 64, 1, 2, 16, ((5, 90),), rising=True)
    for past in (62, 63, 64):
        yield make_case(f"past-{past}", half, 64, 1, 1, 16, ((3, past),))
    yield make_case("float-window", single, 64, 1, 3, 8, ((20, 40),), window=9, packed=True)
    yield make_case("float-members", single, 64, 1, 1, 16, mixed, members=(2,), softcap=5.0)


def bench_cases() -> Iterator[Case]:
    """One sequence, 28 query heads and 4 KV heads of 128, bfloat16, blocks of 16."""
    for name, new, past in (
        ("2k", 2048, 0),
        ("8k", 8192, 0),
        ("32k", 32768, 0),
        ("2k after 30k", 2048, 30720),
    ):
        yield make_case(name, torch.bfloat16, 128, 4, 7, 16, ((new, past),))


def make_case(
    name: str,
    dtype: torch.dtype,
    head_dim: int,
    kv_heads: int,
    group: int,
    block_size: int,
    sequences: tuple[tuple[int, int], ...],
    members: tuple[int, ...] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    packed: bool = False,
    rising: bool = False,
) -> Case:
    """`sequences` are (rows, past) each. Everything in the cache that no row sees is NaN, blocks
    are scattered, and block 0, which pads the tables, belongs to nobody. With `packed` q is a slice
    of rows that hold keys and values too. With `rising`, later keys give larger scores."""

    def make(generator: torch.Generator) -> Arguments:
        device = generator.device

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        lengths = [rows + past for rows, past in sequences]
        counts = [-(-length // block_size) for length in lengths]
        order = 1 + torch.randperm(sum(counts) + 2, generator=generator, device=device)
        tables = torch.zeros(len(sequences), max(counts) + 1, dtype=torch.int64, device=device)
        shape = (sum(counts) + 3, kv_heads, block_size, head_dim)
        k_cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
        v_cache = torch.full(shape, torch.nan, dtype=dtype, device=device)
        for s, (rows, past) in enumerate(sequences):
            blocks = order[sum(counts[:s]) : sum(counts[: s + 1])]
            tables[s, : counts[s]] = blocks
            first = 0 if window is None else max(0, past - window + 1)
            position = torch.arange(first, past + rows, device=device)
            place = (blocks[position // block_size], slice(None), position % block_size)
            keys = normal(len(position), kv_heads, head_dim)
            if rising:
                keys *= 1 + position[:, None, None] / 16
            k_cache[place] = keys
            v_cache[place] = normal(len(position), kv_heads, head_dim)

        query_heads = kv_heads * group
        ends = torch.tensor([rows for rows, _ in sequences], device=device).cumsum(0)
        num_rows = int(ends[-1])
        wide = normal(num_rows, query_heads + (2 * kv_heads if packed else 0), head_dim)
        out = torch.full((num_rows, query_heads, head_dim), torch.nan, dtype=dtype, device=device)
        chosen = range(len(sequences)) if members is None else members
        return {
            "out": out,
            "q": wide[:, :query_heads],
            "k_cache": k_cache,
            "v_cache": v_cache,
            "block_tables": tables[:, : max(counts)],
            "query_start_loc": torch.cat([ends.new_zeros(1), ends]),
            "seq_lens": torch.tensor(lengths, device=device),
            "members": None if members is None else torch.tensor(members, device=device),
            "scale": head_dim**-0.5,
            "window": window,
            "softcap": softcap,
            "max_query_len": max(sequences[s][0] for s in chosen),
        }

    return Case(f"{name}-{str(dtype)[6:]}", make)


def tolerance(arguments: Arguments) -> Tolerance:
    # The weights are rounded to the element type before they meet V.
    base = {
        torch.float32: Tolerance(1e-4, 1e-5),
        torch.float16: Tolerance(2e-3, 2e-3),
        torch.bfloat16: Tolerance(1.6e-2, 1.2e-2),
    }
    return with_scores(base[arguments["out"].dtype], arguments)


def cost(arguments: Arguments) -> Cost:
    """Operations: two products for each pair of a row and a position that it sees, for each head."""
    out, k_cache, window = arguments["out"], arguments["k_cache"], arguments["window"]
    _, query_heads, head_dim = out.shape
    starts, lengths = arguments["query_start_loc"].tolist(), arguments["seq_lens"].tolist()
    members = arguments["members"]
    rows = positions = pairs = 0
    for s in range(len(lengths)) if members is None else members.tolist():
        new = starts[s + 1] - starts[s]
        past = lengths[s] - new
        reach = lengths[s] if window is None else window
        rows += new
        positions += min(lengths[s], new + reach - 1)
        # A row at position p sees min(p + 1, reach) positions; `early` rows see p + 1 of them.
        early = min(max(reach - past, 0), new)
        pairs += early * past + early * (early + 1) // 2 + (new - early) * reach
    elements = 2 * rows * query_heads * head_dim + 2 * positions * k_cache.shape[1] * head_dim
    return Cost(elements * out.element_size(), 4 * query_heads * head_dim * pairs)


OP = Op(
    name="paged_attention_prefill",
    source="paged_attention_prefill.cu",
    outputs=("out",),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
    compact=compact,
)
