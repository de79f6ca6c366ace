"""`Batch`: a step's plan as flat tensors, the one input of the model.

Prefill chunks and decodes are laid end to end, sequence after sequence in the plan's order. All
integers go to the device in one buffer and one copy; the fields are views of it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbengine.core.plan import StepPlan


@dataclass(slots=True, eq=False)
class Batch:
    """T tokens of S sequences. Tensors are int64 and live on the model's device."""

    token_ids: Tensor  # [T]
    positions: Tensor  # [T]: each token's place in its own sequence
    slot_mapping: Tensor  # [T]: block_id * block_size + offset of its key and value
    query_start_loc: Tensor  # [S + 1]: sequence i has the rows start[i] : start[i + 1]
    seq_lens: Tensor  # [S]: tokens of the sequence in the cache after this step
    block_tables: Tensor  # [S, max_blocks]: padded with block 0, which is not read
    logits_rows: Tensor  # [R]: the rows that need logits

    num_tokens: int
    num_seqs: int
    max_query_len: int
    max_seq_len: int
    query_lens: list[int]
    """The same facts for the CPU's control flow, without reading a tensor back."""
    context_lens: list[int]
    """Tokens that were in the cache before this step."""
    attention_plans: dict[int | None, Any] = field(default_factory=dict)
    """By window: what attention works out in the first layer and reuses in the others."""

    @classmethod
    def from_plan(
        cls,
        plan: StepPlan,
        block_size: int,
        *,
        logits_rows: list[int] | None = None,
        device: torch.device | str = "cpu",
    ) -> Batch:
        """Lay out `plan.scheduled`, which must not be empty.

        `logits_rows` are flat rows; by default the last row of every sequence whose last known
        token is computed in this step.
        """
        scheduled = plan.scheduled
        num_seqs = len(scheduled)
        starts = [seq.num_computed_tokens for seq, _ in scheduled]
        counts = [n for _, n in scheduled]
        ends = [start + n for start, n in zip(starts, counts, strict=True)]
        num_blocks = [-(-end // block_size) for end in ends]
        max_blocks = max(num_blocks)
        num_tokens = sum(counts)
        if logits_rows is None:
            lasts = np.cumsum(counts) - 1
            logits_rows = [
                int(last)
                for last, end, (seq, _) in zip(lasts, ends, scheduled, strict=True)
                if end == len(seq.tokens)
            ]

        layout = {
            "token_ids": (num_tokens,),
            "positions": (num_tokens,),
            "slot_mapping": (num_tokens,),
            "query_start_loc": (num_seqs + 1,),
            "seq_lens": (num_seqs,),
            "block_tables": (num_seqs, max_blocks),
            "logits_rows": (len(logits_rows),),
        }
        sizes = [math.prod(shape) for shape in layout.values()]
        buffer = np.zeros(sum(sizes), dtype=np.int64)
        cuts = np.cumsum(sizes[:-1])
        host = {
            name: part.reshape(shape)
            for part, (name, shape) in zip(np.split(buffer, cuts), layout.items(), strict=True)
        }

        tokens = (seq.tokens[a:b] for (seq, _), a, b in zip(scheduled, starts, ends, strict=True))
        host["token_ids"][:] = list(chain.from_iterable(tokens))
        host["query_start_loc"][1:] = np.cumsum(counts)
        host["seq_lens"][:] = ends
        tables = host["block_tables"]
        for table, (seq, _), n in zip(tables, scheduled, num_blocks, strict=True):
            table[:n] = seq.block_table[:n]
        owners = np.repeat(np.arange(num_seqs), counts)  # [T]: each row's sequence
        shifts = np.array(starts) - host["query_start_loc"][:-1]  # [S]: from row to position
        positions = np.arange(num_tokens) + shifts[owners]
        host["positions"][:] = positions
        blocks, offsets = np.divmod(positions, block_size)
        host["slot_mapping"][:] = tables[owners, blocks] * block_size + offsets
        host["logits_rows"][:] = logits_rows

        on_device = torch.from_numpy(buffer).to(device)
        views = {
            name: part.view(shape)
            for part, (name, shape) in zip(on_device.split(sizes), layout.items(), strict=True)
        }
        return cls(
            token_ids=views["token_ids"],
            positions=views["positions"],
            slot_mapping=views["slot_mapping"],
            query_start_loc=views["query_start_loc"],
            seq_lens=views["seq_lens"],
            block_tables=views["block_tables"],
            logits_rows=views["logits_rows"],
            num_tokens=num_tokens,
            num_seqs=num_seqs,
            max_query_len=max(counts),
            max_seq_len=max(ends),
            query_lens=counts,
            context_lens=starts,
        )
