"""`EngineConfig`: how an engine is set up, under vLLM's field names.

Everything that can be checked without the model is checked when the config is made; the engine
fills in what depends on the model (`resolve`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nbengine.core.policies import Policy, make_policy
from nbengine.core.scheduler import SchedulerConfig
from nbengine.errors import InvalidField

BLOCK_SIZES = (8, 16, 32, 64, 128, 256)


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """An engine's settings. Raises `InvalidField` for a value that is out of range or of the wrong
    type, naming both."""

    model: str | Path
    """A directory in Hugging Face layout, a `.gguf` file, a known name (`smollm2-135m`) or a hub
    id."""
    tokenizer: str | Path | None = None
    """Where the tokenizer is, if not with the model."""
    dtype: str = "auto"
    """Of activations and KV cache: `auto`, `float32`, `bfloat16` or `float16`."""
    device: str = "auto"
    """`cpu`, `cuda` or `cuda:1`; `auto` takes a GPU if there is one."""
    max_model_len: int | None = None
    """Most tokens of prompt and output together; None for what the model was made for."""
    block_size: int = 16
    """Tokens in a KV block."""
    gpu_memory_utilization: float = 0.9
    """The part of the device's memory that the engine may fill."""
    num_gpu_blocks_override: int | None = None
    """KV blocks, instead of as many as fit (on a CPU as on a GPU)."""
    swap_space: float = 4.0
    """GiB of host memory for sequences that are swapped out (with `preemption_mode="swap"`)."""
    preemption_mode: str = "recompute"
    """What happens to a preempted sequence's keys and values: `recompute` or `swap`."""
    enable_prefix_caching: bool = True
    """Keep what was computed for full blocks, for later prompts that begin alike."""
    enable_chunked_prefill: bool = True
    """Let a prompt be computed in several steps, beside the tokens of others."""
    max_num_batched_tokens: int = 2048
    """The token budget of a step."""
    max_num_seqs: int = 256
    """Most sequences that run at once."""
    long_prefill_token_threshold: int = 0
    """Most tokens of one prompt in a step; 0 for no bound."""
    scheduling_policy: str | Policy | type = "fcfs"
    """`fcfs`, `priority`, `sjf`, or an object (or class) with a `rank(sequence)`."""
    seed: int = 0
    """Of the seeds that the engine draws for requests without one."""
    quantization: str | None = None
    """None, `int8` (weight-only, per channel) or `int4` (weight-only, groups of 32)."""
    load_format: str = "auto"
    """`auto`, `safetensors` or `gguf`."""
    max_logprobs: int = 20
    """Most logprobs that a request may ask for; -1 for the whole vocabulary."""
    skip_tokenizer_init: bool = False
    """Token ids in, token ids out; no tokenizer is loaded."""
    enforce_eager: bool = False
    """Never run from captured CUDA graphs."""
    batch_invariant: bool = False
    """Compute every token with sums in one order, whatever else a step holds: a request's logits are
    then the same to the last bit in any batch and any chunks, after prefix hits and preemption.
    Slower, prompts above all."""
    kernels: str = "auto"
    """What runs the model: `cuda`, the CUDA C kernels on a GPU; `emulated`, the same kernels on a
    CPU (slow: for tests and for writing kernels); `torch`, no kernels of those. `auto` is `cuda` on
    a GPU, and on a CPU its own compiled kernels."""

    def __post_init__(self) -> None:
        check = _Checker(self)
        check("model", lambda v: isinstance(v, str | Path) and str(v), "must be a name or a path")
        for name in ("tokenizer", "device"):
            check(
                name,
                lambda v: isinstance(v, str | Path) and str(v),
                "must be a name or a path" if name == "tokenizer" else "must be a name",
                optional=name == "tokenizer",
            )
        check("block_size", lambda v: v in BLOCK_SIZES, f"must be one of {BLOCK_SIZES}", kind=int)
        for name in ("max_num_batched_tokens", "max_num_seqs"):
            check(name, lambda v: v >= 1, "must be at least 1", kind=int)
        for name in ("max_model_len", "num_gpu_blocks_override"):
            check(name, lambda v: v >= 1, "must be at least 1", kind=int, optional=True)
        check("long_prefill_token_threshold", lambda v: v >= 0, "must not be negative", kind=int)
        check("max_logprobs", lambda v: v >= -1, "must be -1 or more", kind=int)
        check("seed", lambda v: -(2**63) <= v < 2**63, "must fit 64 bits", kind=int)
        check(
            "gpu_memory_utilization", lambda v: 0 < v <= 1, "must be above 0, at most 1", kind=float
        )
        check("swap_space", lambda v: 0 <= v <= 2**20, "must be 0 or more GiB", kind=float)
        for name in (
            "enable_prefix_caching",
            "enable_chunked_prefill",
            "skip_tokenizer_init",
            "enforce_eager",
            "batch_invariant",
        ):
            check(name, lambda v: isinstance(v, bool), "must be True or False")
        for name, allowed in (
            ("preemption_mode", ("recompute", "swap")),
            ("quantization", (None, "int8", "int4")),
            ("kernels", ("auto", "cuda", "emulated", "torch")),
            ("load_format", ("auto", "safetensors", "gguf")),
            ("dtype", ("auto", "float32", "float", "bfloat16", "float16", "half")),
        ):
            check(name, allowed.__contains__, f"must be one of {allowed}")
        make_policy(self.scheduling_policy)

    def _repr_html_(self) -> str:
        from nbengine.jupyter.views import fields_html

        return fields_html("EngineConfig", self)

    @property
    def most_sequences(self) -> int:
        """That one step can take: each needs a token of its budget."""
        return min(self.max_num_seqs, self.max_num_batched_tokens)

    def blocks_of(self, num_tokens: int) -> int:
        """KV blocks of a sequence of so many tokens."""
        return -(-num_tokens // self.block_size)

    def resolve(self, max_model_len: int, num_blocks: int) -> EngineConfig:
        """This config with the two numbers that the model and the memory decide.

        Raises:
            InvalidField: the token budget can't hold a whole prompt although chunked prefill is
                off.
        """
        if not self.enable_chunked_prefill and self.max_num_batched_tokens < max_model_len:
            raise InvalidField(
                "max_num_batched_tokens",
                self.max_num_batched_tokens,
                f"is less than max_model_len={max_model_len}, which must fit one step because "
                "enable_chunked_prefill is off: raise it, lower max_model_len, or turn chunked "
                "prefill on",
            )
        return dataclasses.replace(
            self, max_model_len=max_model_len, num_gpu_blocks_override=num_blocks
        )

    def for_scheduler(self, num_host_blocks: int) -> SchedulerConfig:
        """The scheduler's share of a resolved config."""
        assert self.num_gpu_blocks_override is not None
        return SchedulerConfig(
            num_blocks=self.num_gpu_blocks_override,
            block_size=self.block_size,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            enable_chunked_prefill=self.enable_chunked_prefill,
            enable_prefix_caching=self.enable_prefix_caching,
            long_prefill_token_threshold=self.long_prefill_token_threshold,
            preemption_mode=self.preemption_mode,
            num_host_blocks=num_host_blocks,
        )


class _Checker:
    """Checks one field after the other: first the type, then the range."""

    def __init__(self, config: EngineConfig) -> None:
        self.config = config

    def __call__(
        self,
        name: str,
        holds: Callable[[Any], object],
        problem: str,
        *,
        kind: type | None = None,
        optional: bool = False,
    ) -> None:
        value = getattr(self.config, name)
        if optional and value is None:
            return
        if kind is not None:
            allowed = (int, float) if kind is float else kind
            if isinstance(value, bool) or not isinstance(value, allowed):
                noun = "a number" if kind is float else "an integer"
                raise InvalidField(name, value, f"must be {noun}, not {type(value).__name__}")
        if not holds(value):
            raise InvalidField(name, value, problem)
