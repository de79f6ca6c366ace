"""`Batch`: a step's plan as flat tensors, the one input of the model.

Prefill chunks and decodes are laid end to end, sequence after sequence in the plan's order. All
integers go to the device in one buffer and one copy; the fields are views of it. On a GPU that
buffer is the same in every step (`BatchBuffer`), so that a captured graph finds its input there.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nbengine.config import EngineConfig
from nbengine.core.plan import StepPlan


class BatchBuffer:
    """Pinned host memory and its counterpart on a GPU, for one batch after the other."""

    def __init__(self, num_elements: int, device: torch.device) -> None:
        self._host = torch.empty(num_elements, dtype=torch.int64, pin_memory=True)
        self._device = torch.empty(num_elements, dtype=torch.int64, device=device)
        self._copied = torch.cuda.Event()

    @classmethod
    def for_settings(
        cls, settings: EngineConfig, max_model_len: int, device: torch.device
    ) -> BatchBuffer:
        """One that holds any batch of an engine."""
        of_tokens = 4 * settings.max_num_batched_tokens
        of_sequences = settings.most_sequences * (settings.blocks_of(max_model_len) + 2)
        return cls(of_tokens + of_sequences + 1, device)

    def host(self, num_elements: int) -> np.ndarray:
        """The first elements of the host's part, zeroed, once the last upload has read them."""
        self._copied.synchronize()
        view = self._host[:num_elements].numpy()
        view[:] = 0
        return view

    def upload(self, num_elements: int) -> Tensor:
        """The same elements on the device, when the current stream gets there."""
        on_device = self._device[:num_elements]
        on_device.copy_(self._host[:num_elements], non_blocking=True)
        self._copied.record(torch.cuda.current_stream(on_device.device))
        return on_device


@dataclass(slots=True, eq=False)
class Batch:
    """T tokens of S sequences. Tensors are int64 and live on the model's device.

    A decode step that is run from a captured graph is padded to the graph's size: its padding rows
    have the slot -1 and a length of 0, and are not counted in `num_tokens` and `num_seqs`.
    """

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

    @property
    def num_decodes(self) -> int:
        """How many of the first sequences have one row each, padding included."""
        if self.max_query_len == 1:
            return len(self.seq_lens)
        return next(i for i, n in enumerate(self.query_lens) if n != 1)

    def rows_apart(self) -> Batch:
        """The same T tokens as T sequences of one row each, in the same order: with all of them
        written to the cache, each sees what it sees here. Not for a padded batch."""
        device = self.positions.device
        owners = [i for i, n in enumerate(self.query_lens) for _ in range(n)]
        pasts = (
            range(past, past + n)
            for past, n in zip(self.context_lens, self.query_lens, strict=True)
        )
        return dataclasses.replace(
            self,
            query_start_loc=torch.arange(self.num_tokens + 1, device=device),
            seq_lens=self.positions + 1,
            block_tables=self.block_tables[torch.tensor(owners, device=device)],
            num_seqs=self.num_tokens,
            max_query_len=1,
            query_lens=[1] * self.num_tokens,
            context_lens=list(chain.from_iterable(pasts)),
            attention_plans={},
        )

    def sequences(self, start: int, stop: int) -> Batch:
        """Some of the sequences of a batch in which each has one row."""
        part = slice(start, stop)
        pasts = self.context_lens[part]
        return dataclasses.replace(
            self,
            token_ids=self.token_ids[part],
            positions=self.positions[part],
            slot_mapping=self.slot_mapping[part],
            query_start_loc=self.query_start_loc[: len(pasts) + 1],
            seq_lens=self.seq_lens[part],
            block_tables=self.block_tables[part],
            num_tokens=len(pasts),
            num_seqs=len(pasts),
            max_seq_len=max(pasts) + 1,
            query_lens=[1] * len(pasts),
            context_lens=pasts,
            attention_plans={},
        )

    @classmethod
    def from_plan(
        cls,
        plan: StepPlan,
        block_size: int,
        *,
        logits_rows: list[int] | None = None,
        device: torch.device | str = "cpu",
        buffer: BatchBuffer | None = None,
        padded_to: tuple[int, int] | None = None,
    ) -> Batch:
        """Lay out `plan.scheduled`, which must not be empty unless it is padded.

        `logits_rows` are flat rows; by default the last row of every sequence whose last known
        token is computed in this step. `buffer` is where to lay them, for a GPU. `padded_to` (rows,
        columns of the block table) is for steps in which every sequence has one row.
        """
        scheduled = plan.scheduled
        num_seqs = len(scheduled)
        starts = [seq.num_computed_tokens for seq, _ in scheduled]
        counts = [n for _, n in scheduled]
        ends = [start + n for start, n in zip(starts, counts, strict=True)]
        num_blocks = [-(-end // block_size) for end in ends]
        max_blocks = max(num_blocks, default=0)
        num_tokens = sum(counts)
        num_rows, num_tables = num_tokens, num_seqs
        if padded_to is not None:
            assert num_tokens == num_seqs <= padded_to[0] and max_blocks <= padded_to[1]
            num_rows = num_tables = padded_to[0]
            max_blocks = padded_to[1]
        if logits_rows is None:
            lasts = np.cumsum(counts) - 1
            logits_rows = [
                int(last)
                for last, end, (seq, _) in zip(lasts, ends, scheduled, strict=True)
                if end == len(seq.tokens)
            ]

        layout = {
            "token_ids": (num_rows,),
            "positions": (num_rows,),
            "slot_mapping": (num_rows,),
            "query_start_loc": (num_tables + 1,),
            "seq_lens": (num_tables,),
            "block_tables": (num_tables, max_blocks),
            "logits_rows": (len(logits_rows),),
        }
        sizes = [math.prod(shape) for shape in layout.values()]
        flat = buffer.host(sum(sizes)) if buffer else np.zeros(sum(sizes), dtype=np.int64)
        cuts = np.cumsum(sizes[:-1])
        host = {
            name: part.reshape(shape)
            for part, (name, shape) in zip(np.split(flat, cuts), layout.items(), strict=True)
        }

        tokens = (seq.tokens[a:b] for (seq, _), a, b in zip(scheduled, starts, ends, strict=True))
        host["token_ids"][:num_tokens] = list(chain.from_iterable(tokens))
        first_rows = np.cumsum([0, *counts])
        host["query_start_loc"][: num_seqs + 1] = first_rows
        host["query_start_loc"][num_seqs + 1 :] = num_tokens  # padding has no rows
        host["seq_lens"][:num_seqs] = ends
        tables = host["block_tables"]
        for table, (seq, _), n in zip(tables, scheduled, num_blocks, strict=False):
            table[:n] = seq.block_table[:n]
        owners = np.repeat(np.arange(num_seqs), np.diff(first_rows))  # [T]: each row's sequence
        shifts = np.array(starts, dtype=np.int64) - first_rows[:-1]  # [S]: from row to position
        positions = np.arange(num_tokens) + shifts[owners]
        host["positions"][:num_tokens] = positions
        blocks, offsets = np.divmod(positions, block_size)
        host["slot_mapping"][:num_tokens] = tables[owners, blocks] * block_size + offsets
        host["slot_mapping"][num_tokens:] = -1
        host["logits_rows"][:] = logits_rows

        if buffer is None:
            on_device = torch.from_numpy(flat).to(device)
        else:
            on_device = buffer.upload(len(flat))
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
            max_query_len=max(counts, default=1),
            max_seq_len=max_blocks * block_size if padded_to else max(ends),
            query_lens=counts,
            context_lens=starts,
        )
