"""What the two attentions over paged blocks have in common."""

from __future__ import annotations

import torch

from nbengine.kernels.op import Arguments, Tolerance

HEAD_DIMS = (64, 80, 96, 128, 256)
MAX_GROUP = 16
"""Query heads that may share a KV head."""


def compact(arguments: Arguments) -> Arguments:
    """The same call with the blocks alone that its sequences have, renamed."""
    tables, block_size = arguments["block_tables"], arguments["k_cache"].shape[2]
    num_blocks = -(-arguments["seq_lens"] // block_size)
    used = torch.arange(tables.shape[1], device=tables.device) < num_blocks[:, None]
    blocks, renamed = tables[used].unique(return_inverse=True)
    new_tables = torch.zeros_like(tables)
    new_tables[used] = renamed
    caches = {name: arguments[name][blocks] for name in ("k_cache", "v_cache")}
    return {**arguments, **caches, "block_tables": new_tables}


def exact_dtype(q: torch.Tensor) -> torch.dtype:
    """What a reference computes in: more than the kernels do."""
    return torch.float64 if q.dtype == torch.float32 else torch.float32


def with_scores(base: Tolerance, arguments: Arguments) -> Tolerance:
    """`base`, and what rounding in float32 does to scores of this size: an error of a score is a
    relative one of its weight."""
    q, k, v = (arguments[name].nan_to_num(0.0).float() for name in ("q", "k_cache", "v_cache"))
    largest = arguments["scale"] * (q.norm(dim=-1).amax() * k.norm(dim=-1).amax()).item()
    error = largest * 2.0**-21
    return Tolerance(base.relative + error, base.absolute + error * v.abs().amax().item())
