"""copy_blocks: copies of KV blocks within the cache (copy-on-write), all layers at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import FLOATS, normal, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import PACK_BYTES, check_dense, check_shape

_SHARED_PACKS = 48 * 1024 // PACK_BYTES
"""What a block may keep of shared memory on any GPU, without asking for more."""


def launch(program: Program, *, cache: Tensor, pairs: Tensor) -> None:
    """Copies block pairs[i, 0] over block pairs[i, 1], for every pair at once.

    cache is `[layers, 2, num_blocks, num_kv, block_size, head_dim]`, pairs int64 `[P, 2]`. All
    sources are read before any destination is written, so a block may be a source and a destination;
    no two pairs have the same destination.

    Raises:
        ValueError: shapes do not fit, a block is no multiple of 16 bytes, or P is above 3,072.
    """
    layers, num_blocks = cache.shape[0], cache.shape[2]
    num_pairs = pairs.shape[0]
    check_dense("cache", cache, *cache.shape)
    check_dense("pairs", pairs, num_pairs, 2, alignment=8)
    packs = packs_per_block(cache)
    if num_pairs > _SHARED_PACKS:
        raise ValueError(f"{num_pairs:,} pairs: one call copies up to {_SHARED_PACKS:,}")
    if num_pairs == 0:
        return
    threads = min(128, _SHARED_PACKS // num_pairs)
    kernel = program.kernel("copy_blocks")
    kernel[(-(-packs // threads), 2 * layers), threads, num_pairs * threads * PACK_BYTES](
        cache, pairs, num_pairs, num_blocks, packs
    )


def packs_per_block(cache: Tensor) -> int:
    """16-byte packs in one layer's K (or V) of a block. Raises `ValueError` for a broken one."""
    layers, _, num_blocks, *block = cache.shape
    check_shape("cache", cache, layers, 2, num_blocks, *block)
    elements = 1
    for size in block:
        elements *= size
    packs, rest = divmod(elements * cache.element_size(), PACK_BYTES)
    if rest:
        raise ValueError(
            f"a block {block} of {cache.dtype} is {elements * cache.element_size()} bytes, "
            f"no multiple of {PACK_BYTES}"
        )
    return packs


def reference(*, cache: Tensor, pairs: Tensor) -> None:
    cache[:, :, pairs[:, 1]] = cache[:, :, pairs[:, 0]]


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        yield _case(dtype, (2, 2, 7, 1, 8, 64), [(1, 5)], "one")
        # 3 is freed by its copy and written by the next; 0 and 2 change places.
        yield _case(dtype, (1, 2, 9, 2, 16, 80), [(3, 4), (6, 3), (0, 2), (2, 0)], "chain")
    many = [(i, 64 + i) for i in range(40)]
    yield _case(torch.bfloat16, (1, 2, 110, 1, 8, 64), many, "many")


def _case(
    dtype: torch.dtype, shape: tuple[int, ...], pairs: list[tuple[int, int]], words: str
) -> Case:
    def make(generator: torch.Generator) -> Arguments:
        return {
            "cache": normal(generator, dtype, *shape),
            "pairs": torch.tensor(pairs, device=generator.device),
        }

    return Case(title(dtype, words), make)


def bench_cases() -> Iterator[Case]:
    """Blocks of 16 tokens in 28 layers."""
    for num_pairs in (1, 64):
        pairs = [(i, num_pairs + i) for i in range(num_pairs)]
        shape = (28, 2, 2 * num_pairs, 4, 16, 128)
        yield _case(torch.bfloat16, shape, pairs, f"{num_pairs}x28x2x4x16x128")


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance(0.0, 0.0)


def cost(arguments: Arguments) -> Cost:
    cache, pairs = arguments["cache"], arguments["pairs"]
    bytes_per_block = cache.numel() // cache.shape[2] * cache.element_size()
    return Cost(2 * pairs.shape[0] * bytes_per_block, 0)


def compact(arguments: Arguments) -> Arguments:
    """The blocks that are read or written."""
    blocks, renamed = arguments["pairs"].unique(return_inverse=True)
    return {**arguments, "cache": arguments["cache"][:, :, blocks], "pairs": renamed}


OP = Op(
    name="copy_blocks",
    source="copy_blocks.cu",
    outputs=("cache",),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
    compact=compact,
)
