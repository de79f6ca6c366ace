"""What a caller may ask of the sampler, under vLLM's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How output tokens are chosen and when to stop."""

    n: int = 1
    max_tokens: int | None = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class BeamSearchParams:
    """Beam search."""

    beam_width: int
    max_tokens: int
