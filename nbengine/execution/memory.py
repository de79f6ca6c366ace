"""The memory budget: what weights, activations and KV blocks take.

`ModelRunner.load` calls `plan_memory` before it reads a weight: that needs only the config, so a
model that does not fit is refused in a moment and with numbers. On a GPU it calls it again with what
the loaded model took when it was run once (`measure_activations`), and the KV blocks get what that
leaves. The engine prints the `MemoryBudget` at start-up.
"""

from __future__ import annotations

import html
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from nbengine.config import EngineConfig
from nbengine.core.plan import StepPlan
from nbengine.core.request import Request, Sequence
from nbengine.core.sampling_params import SamplingParams
from nbengine.errors import InvalidField, NotEnoughMemory
from nbengine.execution.batch import Batch, BatchBuffer
from nbengine.execution.cuda_graphs import DecodeGraphs
from nbengine.execution.kv_cache import KVCache, bytes_per_block
from nbengine.kernels.capture import give_back_memory, wait_for_device
from nbengine.models.config import ModelConfig
from nbengine.models.decoder import Decoder
from nbengine.models.weights import HEAD_QUANTIZATION

GIB = 2**30

MAX_CPU_KV_BYTES = 2 * GIB
"""On a CPU other programs live in the same memory, and few sequences run at a time: more KV than
this is taken only where one sequence of `max_model_len` needs it."""

ENOUGH_GPU_BLOCKS = 2**18
"""On a GPU all that is left becomes KV blocks, up to these or what all sequences can use: each is
an object of the scheduler's too, and a tiny model would have millions."""

_BYTES_PER_WEIGHT = {"int8": 1.0, "int4": 0.5 + 4 / 32}  # int4: a scale and a zero each 32


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """Bytes, and what they hold."""

    device: str
    available: int
    """Free on the device when the budget was made."""
    weights: int
    activations: int
    """The most that a step needs beside weights and KV."""
    is_measured: bool
    """Whether that was seen, or is an estimate."""
    block_size: int
    block_bytes: int
    num_blocks: int
    num_host_blocks: int
    max_model_len: int
    """As asked for, or else the most that the model and the blocks allow."""

    @property
    def kv_cache(self) -> int:
        return self.num_blocks * self.block_bytes

    @property
    def num_kv_tokens(self) -> int:
        return self.num_blocks * self.block_size

    @property
    def reserve(self) -> int:
        """What is left to others."""
        return self.available - self.weights - self.activations - self.kv_cache

    @property
    def rows(self) -> list[tuple[str, str, str]]:
        """(what, how much, note) for the two printed forms."""
        blocks = (
            f"{self.num_blocks:,} blocks of {self.block_size} = {self.num_kv_tokens:,} tokens, "
            f"{self.num_kv_tokens / self.max_model_len:.1f} x max_model_len {self.max_model_len:,}"
        )
        how = "measured" if self.is_measured else "estimated"
        rows = [
            ("weights", _shown(self.weights), ""),
            ("activations", _shown(self.activations), "at most, " + how),
            ("KV cache", _shown(self.kv_cache), blocks),
            ("reserve", _shown(self.reserve), f"of {_shown(self.available)} free"),
        ]
        if self.num_host_blocks:
            note = f"{self.num_host_blocks:,} blocks in host memory"
            rows.append(("swap", _shown(self.num_host_blocks * self.block_bytes), note))
        return rows

    def __str__(self) -> str:
        lines = [f"memory on {self.device}"]
        lines += [f"  {what:<12}{size:>11}  {note}".rstrip() for what, size, note in self.rows]
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        cells = "".join(
            "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>"
            for row in self.rows
        )
        return f"<table><caption>memory on {html.escape(self.device)}</caption>{cells}</table>"


@dataclass(frozen=True, slots=True)
class Measured:
    """Bytes, of a model that was loaded and run once."""

    available: int
    """Free on the device before it was loaded."""
    weights: int
    activations: int
    max_positions: int
    """Not bytes: the positions that its rope table reaches."""


def plan_memory(
    config: ModelConfig,
    settings: EngineConfig,
    *,
    dtype: torch.dtype,
    device: torch.device,
    measured: Measured | None = None,
) -> MemoryBudget:
    """Divide the free memory, by estimates from the config or by what was measured.

    `gpu_memory_utilization` is this engine's fraction of a GPU's whole memory (two engines can have
    0.45 each), or of a CPU's free memory.
    Raises `NotEnoughMemory` if weights, activations and one sequence of `max_model_len` do not fit
    (left None, it becomes what fits), or the blocks asked for do not hold one; and `InvalidField`
    for a `max_model_len` beyond the model's positions.
    """
    positions = config.max_position_embeddings
    max_model_len, block_size = settings.max_model_len, settings.block_size
    num_gpu_blocks_override = settings.num_gpu_blocks_override
    if max_model_len is not None and max_model_len > positions:
        raise InvalidField("max_model_len", max_model_len, f"the model has {positions} positions")
    is_measured = measured is not None
    if measured is None:
        measured = Measured(
            free_memory(device),
            weight_bytes(config, dtype, settings.quantization, max_model_len or positions),
            activation_bytes(config, dtype, settings),
            positions,
        )
    positions = min(positions, measured.max_positions)
    available, weights, activations = measured.available, measured.weights, measured.activations
    usable = _usable(device, available, settings)
    left = usable - weights - activations
    block_bytes = bytes_per_block(config, block_size, dtype)
    sizes = (
        f"weights {_shown(weights)} and activations {_shown(activations)} of {_shown(usable)} "
        f"usable ({_shown(available)} free on {device}, "
        f"gpu_memory_utilization={settings.gpu_memory_utilization:g})"
    )
    fitting = max(0, left) // block_bytes
    per_sequence = settings.blocks_of(max_model_len or positions)

    if num_gpu_blocks_override is not None:
        if num_gpu_blocks_override > fitting:
            raise NotEnoughMemory(
                f"num_gpu_blocks_override={num_gpu_blocks_override} blocks of "
                f"{block_bytes:,} bytes do not fit beside {sizes}: at most {fitting} do"
            )
        if max_model_len is not None and per_sequence > num_gpu_blocks_override:
            raise NotEnoughMemory(
                f"one sequence of max_model_len={max_model_len} needs {per_sequence} blocks of "
                f"{block_size} tokens, and num_gpu_blocks_override={num_gpu_blocks_override}: raise "
                f"it, or lower max_model_len to {num_gpu_blocks_override * block_size} or less"
            )
        num_blocks = num_gpu_blocks_override
    else:
        needed = per_sequence if max_model_len is not None else 1
        if fitting < needed:
            smaller = f"max_model_len={fitting * block_size}, " if fitting else ""
            if dtype == torch.float32:
                smaller += "dtype='bfloat16', "
            raise NotEnoughMemory(
                f"{_shown(needed * block_bytes)} of KV cache for one sequence of "
                f"{needed * block_size} tokens do not fit beside {sizes}: try {smaller}"
                "quantization='int8' or 'int4', a smaller max_num_batched_tokens, or a smaller "
                "model"
            )
        wanted = settings.max_num_seqs * per_sequence  # more than that holds prefixes alone
        if device.type == "cpu":
            num_blocks = min(fitting, wanted, max(needed, MAX_CPU_KV_BYTES // block_bytes))
        else:
            num_blocks = min(fitting, max(wanted, ENOUGH_GPU_BLOCKS))

    host_bytes = settings.swap_space * GIB if settings.preemption_mode == "swap" else 0.0
    if device.type == "cpu":
        host_bytes = min(host_bytes, left - num_blocks * block_bytes)
    return MemoryBudget(
        device=str(device),
        available=available,
        weights=weights,
        activations=activations,
        is_measured=is_measured,
        block_size=block_size,
        block_bytes=block_bytes,
        num_blocks=num_blocks,
        num_host_blocks=min(int(host_bytes // block_bytes), settings.max_num_seqs * per_sequence),
        max_model_len=max_model_len or min(positions, num_blocks * block_size),
    )


def weight_bytes(
    config: ModelConfig, dtype: torch.dtype, quantization: str | None, num_positions: int
) -> int:
    """What a decoder's weights and rope table will hold, to within a percent."""
    embedding = config.vocab_size * config.hidden_size
    matrices = config.num_parameters - embedding * (1 if config.tie_word_embeddings else 2)

    def size(count: int, kind: str | None) -> float:
        return count * (_BYTES_PER_WEIGHT[kind] if kind else dtype.itemsize)

    table = 2 * num_positions * config.head_dim
    total = (embedding + table) * dtype.itemsize + size(matrices, quantization)
    head = HEAD_QUANTIZATION[quantization]
    if head is not None or not config.tie_word_embeddings:
        total += size(embedding, head)
    return int(total)


def activation_bytes(config: ModelConfig, dtype: torch.dtype, settings: EngineConfig) -> int:
    """The largest tensors alive at once in a step: in the widest layer, and at the logits."""
    qkv = config.q_size + 2 * config.kv_size
    mlp = 3 * config.intermediate_size  # gate, up, and their product
    per_token = (4 * config.hidden_size + max(mlp, 2 * qkv + config.q_size)) * dtype.itemsize
    per_token += 2 * config.hidden_size * 4  # norms are computed in float32
    logits_rows = settings.most_sequences
    return settings.max_num_batched_tokens * per_token + 3 * logits_rows * config.vocab_size * 4


def measure_activations(
    decoder: Decoder, settings: EngineConfig, max_model_len: int, uses_graphs: bool
) -> int:
    """Bytes that the largest step takes on the GPU beside weights and KV: prompts of
    `max_num_batched_tokens` tokens together, as many rows of logits as may be sampled, and the
    memory of decode graphs. What libraries set up on first use (workspaces, loaded kernels) counts
    too, and stays."""
    device, block_size = decoder.device, settings.block_size
    num_tokens = settings.max_num_batched_tokens
    plan, num_blocks = StepPlan(), 0
    for start in range(0, num_tokens, max_model_len):
        n = min(max_model_len, num_tokens - start)
        needed = settings.blocks_of(n)
        request = Request("profile", (0,) * n, SamplingParams(max_tokens=1))
        sequence = Sequence("profile", request, 0, [0] * n)
        sequence.block_table = list(range(num_blocks, num_blocks + needed))
        num_blocks += needed
        plan.scheduled.append((sequence, n))
    rows = list(range(settings.most_sequences))
    kv_cache = KVCache.allocate(decoder.config, num_blocks, block_size, decoder.dtype, device)
    batch = Batch.from_plan(plan, block_size, logits_rows=rows, device=device)

    wait_for_device(device)
    give_back_memory()
    torch.cuda.reset_peak_memory_stats(device)
    free_before = torch.cuda.mem_get_info(device)[0]
    reserved_before = torch.cuda.memory_reserved(device)
    hidden = decoder.forward(batch, kv_cache)
    logits = decoder.compute_logits(hidden[batch.logits_rows])
    logits.clone()  # the sampler's working copy
    wait_for_device(device)
    in_torch = torch.cuda.max_memory_reserved(device) - reserved_before
    outside = (free_before - torch.cuda.mem_get_info(device)[0]) - (
        torch.cuda.memory_reserved(device) - reserved_before
    )
    if not uses_graphs:
        return in_torch + max(0, outside)
    del hidden, logits
    give_back_memory()
    free_before = torch.cuda.mem_get_info(device)[0]
    buffer = BatchBuffer.for_settings(settings, max_model_len, device)
    graphs = DecodeGraphs.for_settings(decoder, kv_cache, settings, max_model_len)
    graphs.reserve(buffer)
    wait_for_device(device)
    give_back_memory()  # of the graphs' own nothing is free while they live
    in_graphs = free_before - torch.cuda.mem_get_info(device)[0]
    return in_torch + max(0, outside) + max(0, in_graphs)


def free_memory(device: torch.device) -> int:
    """Bytes that are free on the device."""
    if device.type == "cuda":
        give_back_memory()
        return int(torch.cuda.mem_get_info(device)[0])
    return free_host_memory()


def _usable(device: torch.device, free: int, settings: EngineConfig) -> int:
    """How many of the free bytes may be used. Of a GPU `gpu_memory_utilization` is this engine's
    share of all its memory, whatever others use. Raises `NotEnoughMemory` where that is not free,
    unless it is said how many blocks there are to be, for which less may do."""
    fraction = settings.gpu_memory_utilization
    if device.type != "cuda":
        return int(free * fraction)
    total = int(torch.cuda.mem_get_info(device)[1])
    share = int(total * fraction)
    if share > free and settings.num_gpu_blocks_override is None:
        raise NotEnoughMemory(
            f"gpu_memory_utilization={fraction:g} is {_shown(share)} of the {_shown(total)} of "
            f"{device}, and {_shown(free)} are free: lower it to {free * 100 // total / 100:g} or "
            "less, or free what other programs, engines and tensors hold there"
        )
    return min(share, free)


def free_host_memory(
    meminfo: Path = Path("/proc/meminfo"), group: Path = Path("/sys/fs/cgroup")
) -> int:
    """Free memory of the machine, or of the container (cgroup v2) where that is less."""
    try:
        lines = meminfo.read_text().splitlines()
        fields = dict(line.split(":") for line in lines)
        free = int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, ValueError, KeyError):  # not Linux: half of what the machine has
        free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
    except (OSError, ValueError):  # no limit ("max") or no cgroups
        return free
    return min(free, max(0, limit - used))


def _shown(num_bytes: int) -> str:
    if abs(num_bytes) < GIB:
        return f"{num_bytes / 2**20:,.1f} MiB"
    return f"{num_bytes / GIB:,.2f} GiB"
