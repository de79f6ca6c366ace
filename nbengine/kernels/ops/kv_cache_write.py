"""kv_cache_write: norms on q and k, rotary embedding and the write into the paged cache, in one."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import FLOATS, normal, poison, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.ops.rope import check_table, random_positions, random_table, rotated
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense, check_rows, pack_size

_THREADS = 128


def launch(
    program: Program,
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    slot_mapping: Tensor,
    qk_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Turned q into `q`, turned k and plain v into the caches.

    qkv is `[T, (num_q + 2 * num_kv) * head_dim]`, a row's heads of q, then k, then v; q
    `[T, num_q, head_dim]`; each cache `[num_blocks, num_kv, block_size, head_dim]`. Token t goes to
    slot_mapping[t] = block * block_size + offset, int64 `[T]`; where that is negative, neither k nor
    v is written. positions and table are those of `rope`. With `qk_weight`, float32
    `[num_q + num_kv, head_dim]`, each head of q and k is RMS-normed first.

    Raises:
        ValueError: shapes do not fit, or head_dim is above 256 (float32: 64 packs of 16 bytes).
    """
    num_tokens, num_q, head_dim = q.shape
    num_blocks, num_kv, block_size, _ = k_cache.shape
    check_rows("qkv", qkv, num_tokens, (num_q + 2 * num_kv) * head_dim)
    check_dense("q", q, num_tokens, num_q, head_dim)
    check_dense("k_cache", k_cache, num_blocks, num_kv, block_size, head_dim)
    check_dense("v_cache", v_cache, num_blocks, num_kv, block_size, head_dim)
    check_dense("positions", positions, num_tokens, alignment=8)
    check_dense("slot_mapping", slot_mapping, num_tokens, alignment=8)
    check_table(table, head_dim)
    if qk_weight is not None:
        check_dense("qk_weight", qk_weight, num_q + num_kv, head_dim)
    packs = head_dim // 2 // pack_size(head_dim // 2, q.element_size())
    if packs > 32:
        raise ValueError(
            f"head_dim={head_dim} of {q.dtype} is {packs} pairs of packs, and one warp takes 32"
        )
    lanes = 1 << (packs - 1).bit_length()
    heads_per_block = _THREADS // lanes
    kernel = program.kernel(
        "kv_cache_write",
        q.dtype,
        table.dtype,
        head_dim,
        block_size,
        lanes,
        _THREADS,
        qk_weight is not None,
    )
    kernel[(num_tokens, -(-(num_q + 2 * num_kv) // heads_per_block)), _THREADS](
        q,
        k_cache,
        v_cache,
        qkv,
        positions,
        table,
        slot_mapping,
        qk_weight,
        num_q,
        num_kv,
        qkv.stride(0),
        eps,
    )


def reference(
    *,
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    qkv: Tensor,
    positions: Tensor,
    table: Tensor,
    slot_mapping: Tensor,
    qk_weight: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    num_tokens, num_q, head_dim = q.shape
    _, num_kv, block_size, _ = k_cache.shape
    heads = qkv.reshape(num_tokens, -1, head_dim)
    qk, v = heads[:, : num_q + num_kv].float(), heads[:, num_q + num_kv :]
    if qk_weight is not None:
        qk = qk * torch.rsqrt(qk.square().mean(-1, keepdim=True) + eps) * qk_weight
    qk = rotated(qk, table[positions])
    q.copy_(qk[:, :num_q])
    kept = slot_mapping >= 0
    block, offset = slot_mapping[kept] // block_size, slot_mapping[kept] % block_size
    k_cache[block, :, offset] = qk[kept, num_q:].to(k_cache.dtype)
    v_cache[block, :, offset] = v[kept]


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        yield _case(dtype, dtype, 4, 3, 1, 64, 8, False)
        yield _case(dtype, torch.float32, 3, 4, 2, 80, 16, True)
        yield _case(dtype, dtype, 2, 28, 4, 128, 16, True)
        yield _case(dtype, dtype, 2, 2, 2, 256, 256, False)
    yield _case(torch.float16, torch.float16, 3, 3, 1, 20, 8, True)  # no whole packs of 16 bytes


def _case(
    dtype: torch.dtype,
    table_dtype: torch.dtype,
    tokens: int,
    num_q: int,
    num_kv: int,
    head_dim: int,
    block_size: int,
    with_norm: bool,
    num_blocks: int = 3,
) -> Case:
    """Distinct random slots, and one row of padding."""

    def make(generator: torch.Generator) -> Arguments:
        device = generator.device
        slots = torch.randperm(num_blocks * block_size, generator=generator, device=device)[:tokens]
        slots[1] = -1
        shape = num_q + num_kv, head_dim
        return {
            "q": poison(generator, dtype, tokens, num_q, head_dim),
            "k_cache": poison(generator, dtype, num_blocks, num_kv, block_size, head_dim),
            "v_cache": poison(generator, dtype, num_blocks, num_kv, block_size, head_dim),
            "qkv": normal(generator, dtype, tokens, (num_q + 2 * num_kv) * head_dim),
            "positions": random_positions(generator, tokens),
            "table": random_table(generator, table_dtype, head_dim),
            "slot_mapping": slots,
            "qk_weight": torch.rand(shape, generator=generator, device=device) + 0.5
            if with_norm
            else None,
            "eps": 0.25,  # large enough to be missed
        }

    shape = f"{tokens}x({num_q}+2*{num_kv})x{head_dim}"
    words = (f"blocks of {block_size}", "norm" if with_norm else "")
    return Case(title(dtype, shape, *words), make)


def bench_cases() -> Iterator[Case]:
    for tokens in (2, 128, 8192):
        num_blocks = 2 * tokens
        yield _case(torch.bfloat16, torch.bfloat16, tokens, 28, 4, 128, 16, False, num_blocks)


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance.of_rounding(arguments["q"].dtype)


def cost(arguments: Arguments) -> Cost:
    qkv, table = arguments["qkv"], arguments["table"]
    angles = qkv.shape[0] * table.shape[2] * table.element_size()  # half of a row each
    return Cost(2 * qkv.numel() * qkv.element_size() + angles, 3 * qkv.numel())


def compact(arguments: Arguments) -> Arguments:
    """The blocks that are written."""
    slots, block_size = arguments["slot_mapping"], arguments["k_cache"].shape[2]
    kept = slots >= 0
    blocks, renamed = (slots[kept] // block_size).unique(return_inverse=True)
    new_slots = slots.clone()
    new_slots[kept] = renamed * block_size + slots[kept] % block_size
    caches = {name: arguments[name][blocks] for name in ("k_cache", "v_cache")}
    return {**arguments, **caches, "slot_mapping": new_slots}


OP = Op(
    name="kv_cache_write",
    source="kv_cache_write.cu",
    outputs=("q", "k_cache", "v_cache"),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
    compact=compact,
)
