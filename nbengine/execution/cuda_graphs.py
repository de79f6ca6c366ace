"""`DecodeGraphs`: decode steps as captured CUDA graphs, from token ids to logits.

A decode step of a small batch is hundreds of launches of some microseconds each; replayed as one
graph they cost the CPU one call. A graph is captured when a step first needs its size (batch sizes
and block-table widths are rounded up to a few, `graph_size`), reads its input from the runner's
`BatchBuffer`, which never moves, and writes its logits where the next replay writes them too.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from nbengine.execution.batch import Batch
from nbengine.execution.kv_cache import KVCache
from nbengine.models.decoder import Decoder

_MIN_TABLE_WIDTH = 64
"""Columns of the narrowest block table; each next one has four times as many."""


@dataclass(frozen=True, slots=True)
class CapturedGraph:
    """One size's graph, and the logits float32 `[rows, vocab]` that it writes."""

    graph: torch.cuda.CUDAGraph
    logits: Tensor


class DecodeGraphs:
    """Graphs of one decoder over one KV cache, by size. All share one pool of memory, because no
    two run at once."""

    def __init__(self, decoder: Decoder, kv_cache: KVCache, max_num_seqs: int, max_blocks: int):
        self.decoder, self.kv_cache = decoder, kv_cache
        self.max_num_seqs, self.max_blocks = max_num_seqs, max_blocks
        self._graphs: dict[tuple[int, int], CapturedGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self._version = self._kernels_version

    def graph_size(self, num_seqs: int, num_blocks: int) -> tuple[int, int]:
        """Rows and table columns of the graph that serves so many sequences of up to so many
        blocks: 1, 2, 4, 8, 16, 24, ... rows."""
        rows = 1 << (num_seqs - 1).bit_length() if num_seqs <= 8 else -(-num_seqs // 8) * 8
        columns = _MIN_TABLE_WIDTH
        while columns < num_blocks:
            columns *= 4
        return min(rows, self.max_num_seqs), min(columns, self.max_blocks)

    def logits(self, batch: Batch) -> Tensor:
        """float32 `[num_seqs, vocab]` of a batch that was padded to its `graph_size`. The next call
        overwrites them."""
        if self._version != self._kernels_version:  # an op was swapped: graphs hold the old one
            self._graphs.clear()
            self._version = self._kernels_version
        rows, columns = batch.block_tables.shape
        size = rows, columns
        captured = self._graphs.get(size)
        if captured is None:
            captured = self._graphs[size] = self._capture(batch)
        captured.graph.replay()
        return captured.logits[: batch.num_seqs]

    def clear(self) -> None:
        """Drop the graphs and their memory."""
        self._graphs.clear()

    @property
    def _kernels_version(self) -> int:
        assert self.decoder.kernel_layers is not None
        return self.decoder.kernel_layers.kernels.version

    def _compute(self, batch: Batch) -> Tensor:
        return self.decoder.compute_logits(self.decoder.forward(batch, self.kv_cache))

    def _capture(self, batch: Batch) -> CapturedGraph:
        # Run once outside: what is set up or compiled on first use must not be captured. It is this
        # very step, so what it writes to the cache is what the replay will write.
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            self._compute(batch)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        # thread_local: what a notebook's cells do on the GPU meanwhile is no part of the capture.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            logits = self._compute(batch)
        return CapturedGraph(graph, logits)
