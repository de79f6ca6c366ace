"""swap_blocks: copies of KV blocks between the device and pinned host memory, all layers at once."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from nbengine.kernels.cases import FLOATS, normal, poison, title
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.ops.copy_blocks import packs_per_block
from nbengine.kernels.program import Program
from nbengine.kernels.shapes import check_dense

_THREADS = 256
_MAX_PAIRS = 65535  # of a grid's third dimension


def launch(program: Program, *, source: Tensor, target: Tensor, pairs: Tensor) -> None:
    """Copies source's block pairs[i, 0] over target's block pairs[i, 1].

    source and target are `[layers, 2, num_blocks, num_kv, block_size, head_dim]`, one on the device
    and one in pinned host memory, each with its own num_blocks; pairs is int64 `[P, 2]` on the
    device. What was copied to the host may be read there once the stream has been waited for.

    Raises:
        ValueError: shapes or dtypes do not fit, or a block is no multiple of 16 bytes.
    """
    layers, two, source_blocks, *block = source.shape
    target_blocks = target.shape[2]
    num_pairs = pairs.shape[0]
    check_dense("source", source, *source.shape)
    check_dense("target", target, layers, two, target_blocks, *block)
    check_dense("pairs", pairs, num_pairs, 2, alignment=8)
    if source.dtype != target.dtype:
        raise ValueError(f"source is {source.dtype}, and target {target.dtype}")
    packs = packs_per_block(source)
    kernel = program.kernel("swap_blocks", _THREADS)
    for start in range(0, num_pairs, _MAX_PAIRS):
        part = pairs[start : start + _MAX_PAIRS]
        kernel[(-(-packs // _THREADS), 2 * layers, len(part)), _THREADS](
            source, target, part, source_blocks, target_blocks, packs
        )


def reference(*, source: Tensor, target: Tensor, pairs: Tensor) -> None:
    blocks = source[:, :, pairs[:, 0].to(source.device)]
    target[:, :, pairs[:, 1].to(target.device)] = blocks.to(target.device)


def cases() -> Iterator[Case]:
    for dtype in FLOATS:
        for out in (True, False):
            yield _case(dtype, out, (2, 2, 7, 1, 8, 64), [(1, 5)])
            yield _case(dtype, out, (1, 2, 4, 2, 16, 80), [(3, 8), (0, 0), (1, 4)])


def _case(
    dtype: torch.dtype, out: bool, shape: tuple[int, ...], pairs: list[tuple[int, int]]
) -> Case:
    """From the device to the host, or back."""

    def make(generator: torch.Generator) -> Arguments:
        on_host = 0 if not out else 1
        tensors = [
            normal(generator, dtype, *shape),
            poison(generator, dtype, *shape[:2], max(9, shape[2]), *shape[3:]),
        ]
        if generator.device.type == "cuda":
            tensors[on_host] = tensors[on_host].cpu().pin_memory()
        source, target = tensors
        pairs_tensor = torch.tensor(pairs, device=generator.device)
        return {"source": source, "target": target, "pairs": pairs_tensor}

    return Case(title(dtype, "out" if out else "in", f"{len(pairs)} of {list(shape)}"), make)


def bench_cases() -> Iterator[Case]:
    """Blocks of 16 tokens in 28 layers. (The link to the host is the limit, and not the roofline.)"""
    for out in (True, False):
        yield _case(torch.bfloat16, out, (28, 2, 64, 4, 16, 128), [(i, i) for i in range(64)])


def tolerance(arguments: Arguments) -> Tolerance:
    return Tolerance(0.0, 0.0)


def cost(arguments: Arguments) -> Cost:
    source, pairs = arguments["source"], arguments["pairs"]
    bytes_per_block = source.numel() // source.shape[2] * source.element_size()
    return Cost(2 * pairs.shape[0] * bytes_per_block, 0)


def compact(arguments: Arguments) -> Arguments:
    """The blocks that are read or written."""
    pairs, result = arguments["pairs"], {**arguments}
    columns = []
    for name, column in (("source", pairs[:, 0]), ("target", pairs[:, 1])):
        whole = arguments[name]
        blocks, renamed = column.unique(return_inverse=True)
        used = whole[:, :, blocks.to(whole.device)]
        result[name] = used.pin_memory() if whole.is_pinned() else used
        columns.append(renamed)
    return {**result, "pairs": torch.stack(columns, 1)}


OP = Op(
    name="swap_blocks",
    source="swap_blocks.cu",
    outputs=("target",),
    launch=launch,
    reference=reference,
    cases=cases,
    tolerance=tolerance,
    cost=cost,
    bench_cases=bench_cases,
    compact=compact,
)
