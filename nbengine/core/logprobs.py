"""The log-probability of one token, as it appears in outputs (vLLM's name and attributes)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(slots=True)
class Logprob:
    """What the model thought of a token: before temperature, penalties and masks."""

    logprob: float
    """Natural logarithm of its probability over the whole vocabulary."""
    rank: int
    """1 for the most likely token of the vocabulary; tokens of equal probability share a rank."""
    decoded_token: str | None = None
    """Its text; None until (or unless) the output is detokenised."""
