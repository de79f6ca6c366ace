"""`DecodeGraphs`: decode steps as captured CUDA graphs, from token ids to logits.

A decode step of a small batch is hundreds of launches of some microseconds each; replayed as one
graph they cost the CPU one call. A graph is captured when a step first needs its size (batch sizes
and block-table widths are rounded up to a few, `graph_size`), reads its input from the runner's
`BatchBuffer`, which never moves, and writes its logits where all graphs write theirs.

Where capturing fails again and again, or an op runs Python that nobody knows to be capturable,
steps are launched one kernel at a time: slower, and the same.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from nbengine.config import EngineConfig
from nbengine.core.plan import StepPlan
from nbengine.execution.batch import Batch, BatchBuffer
from nbengine.execution.kv_cache import KVCache
from nbengine.kernels.capture import capture_stream, captured
from nbengine.models.decoder import Decoder

_MIN_TABLE_WIDTH = 64
"""Columns of the narrowest block table; each next one has four times as many."""
_MAX_FAILURES = 3
"""Captures that may fail before no more are tried with the same kernels: a wait for the device in
somebody else's thread (`torch.cuda.synchronize()` in a cell) ends the one that it meets."""

_log = logging.getLogger("nbengine")


class DecodeGraphs:
    """Graphs of one decoder over one KV cache, by size. All share one pool of memory, because no
    two run at once."""

    def __init__(self, decoder: Decoder, kv_cache: KVCache, max_num_seqs: int, max_blocks: int):
        self.decoder, self.kv_cache = decoder, kv_cache
        self.max_num_seqs, self.max_blocks = max_num_seqs, max_blocks
        self._logits = torch.empty(
            max_num_seqs, decoder.config.vocab_size, dtype=torch.float32, device=decoder.device
        )
        self._stream = capture_stream(decoder.device)
        self._num_failures = 0
        """Of captures with this version of the kernels."""
        self._start_over()

    @classmethod
    def for_settings(
        cls, decoder: Decoder, kv_cache: KVCache, settings: EngineConfig, max_model_len: int
    ) -> DecodeGraphs:
        """For any decode step of an engine."""
        return cls(decoder, kv_cache, settings.most_sequences, settings.blocks_of(max_model_len))

    @property
    def is_usable(self) -> bool:
        """Whether steps may be captured, with the ops as they are now."""
        assert self.decoder.kernel_layers is not None
        kernels = self.decoder.kernel_layers.kernels
        is_new = kernels.version != self._version
        return kernels.is_capturable and (is_new or self._num_failures < _MAX_FAILURES)

    def graph_size(self, num_seqs: int, num_blocks: int) -> tuple[int, int]:
        """Rows and table columns of the graph that serves so many sequences of up to so many
        blocks: 1, 2, 4, 8, 16, 24, ... rows."""
        rows = 1 << (num_seqs - 1).bit_length() if num_seqs <= 8 else -(-num_seqs // 8) * 8
        columns = _MIN_TABLE_WIDTH
        while columns < num_blocks:
            columns *= 4
        return min(rows, self.max_num_seqs), min(columns, self.max_blocks)

    def reserve(self, buffer: BatchBuffer) -> None:
        """Capture the largest size, over rows that are all padding: the others find their memory in
        the pool then. Raises `torch.OutOfMemoryError` where such a step does not fit at all."""
        size = self.graph_size(self.max_num_seqs, self.max_blocks)
        nothing = Batch.from_plan(
            StepPlan(), self.kv_cache.block_size, buffer=buffer, padded_to=size
        )
        with torch.inference_mode():
            self.logits(nothing)

    def logits(self, batch: Batch) -> Tensor:
        """float32 `[num_seqs, vocab]` of a batch that was padded to its `graph_size`. The next call
        overwrites them."""
        if self._version != self._kernels_version:  # an op was swapped: graphs hold the old one
            self._start_over()
            self._num_failures = 0
        rows, columns = batch.block_tables.shape
        graph = self._graphs.get((rows, columns))
        if graph is not None:
            graph.replay()
        else:
            self._run_and_capture(batch, (rows, columns))
        return self._logits[: batch.num_seqs]

    @property
    def _kernels_version(self) -> int:
        assert self.decoder.kernel_layers is not None
        return self.decoder.kernel_layers.kernels.version

    def _start_over(self) -> None:
        self._graphs: dict[tuple[int, int], torch.cuda.CUDAGraph] = {}
        self._pool = torch.cuda.graph_pool_handle()  # torch takes no pool whose graphs are all gone
        self._version = self._kernels_version

    def _compute(self, batch: Batch) -> None:
        hidden = self.decoder.forward(batch, self.kv_cache)
        self.decoder.compute_logits(hidden, out=self._logits[: len(hidden)])

    def _run_and_capture(self, batch: Batch, size: tuple[int, int]) -> None:
        # Run outside first: what is set up or compiled on first use must not be captured. It is this
        # very step, so that nothing need be replayed for it.
        current = torch.cuda.current_stream(self.decoder.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            self._compute(batch)
        current.wait_stream(self._stream)
        try:
            with captured(self._stream, self._pool) as graph:
                self._compute(batch)
        except RuntimeError as error:  # torch's out-of-memory errors, too
            self._start_over()
            self._num_failures += 1
            _log.warning(
                "a CUDA graph of decode steps could not be captured (%d of %d tries): %s",
                self._num_failures,
                _MAX_FAILURES,
                error,
            )
        else:
            self._graphs[size] = graph
