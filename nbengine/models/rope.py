"""Rotary position embeddings: which angle each pair of a head's dimensions turns by.

A head of `head_dim` values is `head_dim / 2` pairs (i, i + head_dim / 2); at position p the pair i
is rotated by p * inverse_frequency[i] (Su et al. 2021, "RoFormer", in the half-split order of the
Hugging Face checkpoints). Models that were stretched to a longer context change the frequencies;
those ways are the four classes below. `ModelConfig` holds one of them, the decoder asks for the
table of cosines and sines once, at load.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nbengine.errors import UnsupportedModel


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Positions are divided by `factor` (position interpolation, Chen et al. 2023)."""

    factor: float


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: low frequencies are divided by `factor`, high ones kept, those between blended."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (Peng et al. 2023, section 3): a linear ramp between interpolated and original
    frequencies, and cosines and sines multiplied by `attention_factor`."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class FrequencyDivisors:
    """One divisor a frequency: how GGUF files store Llama 3.1's scaling (`rope_freqs.weight`)."""

    divisors: tuple[float, ...]


RopeScaling = LinearScaling | Llama3Scaling | YarnScaling | FrequencyDivisors


def parse_rope_scaling(
    data: Mapping[str, object] | None, max_position_embeddings: int
) -> RopeScaling | None:
    """The scaling described by `rope_scaling` (or `rope_parameters`) of a config.json.

    None, and the types "default" and "none", mean no scaling. Raises `UnsupportedModel` for any
    type that is not linear, llama3 or yarn, and for factors that are missing or out of range.
    """
    data = data or {}
    kind = data.get("rope_type", data.get("type", "default"))
    if kind in ("default", "none", None):
        return None

    def number(key: str, default: float | None = None) -> float:
        value = data.get(key)
        if value is None:
            value = default
        if (
            isinstance(value, bool)
            or not isinstance(value, (int, float))
            or not (0 < value < 1e9)  # false for NaN too
        ):
            raise UnsupportedModel(
                f"rope scaling of type {kind!r} needs a positive number {key}, not {value!r}"
            )
        return float(value)

    if kind == "linear":
        return LinearScaling(number("factor"))
    original = max(1, int(number("original_max_position_embeddings", max_position_embeddings)))
    if kind == "llama3":
        scaling = Llama3Scaling(
            number("factor"), number("low_freq_factor"), number("high_freq_factor"), original
        )
        if scaling.high_freq_factor <= scaling.low_freq_factor:
            raise UnsupportedModel(
                f"rope scaling of type 'llama3' needs high_freq_factor="
                f"{scaling.high_freq_factor:g} above low_freq_factor={scaling.low_freq_factor:g}"
            )
        return scaling
    if kind == "yarn":
        factor = number("factor", max_position_embeddings / original)
        if data.get("mscale") and data.get("mscale_all_dim"):
            magnitude = _yarn_magnitude(factor, number("mscale"))
            magnitude /= _yarn_magnitude(factor, number("mscale_all_dim"))
        else:
            magnitude = _yarn_magnitude(factor, 1.0)
        return YarnScaling(
            factor=factor,
            original_max_position_embeddings=original,
            attention_factor=number("attention_factor", magnitude),
            beta_fast=number("beta_fast", 32.0),
            beta_slow=number("beta_slow", 1.0),
            truncate=bool(data.get("truncate", True)),
        )
    raise UnsupportedModel(
        f"rope scaling of type {kind!r} is not supported; supported are: linear, llama3, yarn"
    )


def rope_table(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None,
    num_positions: int,
    *,
    dtype: torch.dtype,
    device: torch.device | str,
) -> Tensor:
    """Cosines and signed sines of every position: `[num_positions, 2, head_dim]`.

    Row 0 is (cos, cos) and row 1 is (-sin, sin) over the two halves of a head, so that
    `x * table[p, 0] + roll(x, head_dim / 2) * table[p, 1]` rotates x to position p. Angles are
    computed in float32, as the models were trained.
    """
    frequencies = _inverse_frequencies(head_dim, theta, scaling)
    magnitude = scaling.attention_factor if isinstance(scaling, YarnScaling) else 1.0
    angles = torch.outer(torch.arange(num_positions, dtype=torch.float32), frequencies)
    cos, sin = angles.cos() * magnitude, angles.sin() * magnitude
    table = torch.empty(num_positions, 2, head_dim, dtype=dtype)
    table[:, 0] = torch.cat((cos, cos), dim=-1)
    table[:, 1] = torch.cat((-sin, sin), dim=-1)
    return table.to(device)


def _inverse_frequencies(head_dim: int, theta: float, scaling: RopeScaling | None) -> Tensor:
    """Radians per position of each pair: float32 `[head_dim / 2]`."""
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).float() / head_dim
    periods = theta**exponents
    frequencies = 1.0 / periods
    match scaling:
        case None:
            return frequencies
        case LinearScaling():
            return frequencies / scaling.factor
        case FrequencyDivisors():
            return frequencies / torch.tensor(scaling.divisors, dtype=torch.float32)
        case Llama3Scaling():
            # Turns a frequency makes over the original context: few turns were barely learned.
            turns = scaling.original_max_position_embeddings * frequencies / (2 * math.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            kept = ((turns - low) / (high - low)).clamp(0, 1)
            return (1 - kept) * frequencies / scaling.factor + kept * frequencies
        case YarnScaling():
            kept = 1 - _yarn_ramp(head_dim, theta, scaling)
            return (1 - kept) / (scaling.factor * periods) + kept * frequencies


def _yarn_magnitude(factor: float, mscale: float) -> float:
    """YaRN's attention temperature (section 3.4), as a factor on cosines and sines."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def _yarn_ramp(head_dim: int, theta: float, scaling: YarnScaling) -> Tensor:
    """0 for pairs that turn often enough to be kept, 1 for those to interpolate: `[head_dim/2]`."""

    def pair_that_turns(times: float) -> float:
        span = scaling.original_max_position_embeddings / (times * 2 * math.pi)
        return head_dim * math.log(span) / (2 * math.log(theta))

    first, last = pair_that_turns(scaling.beta_fast), pair_that_turns(scaling.beta_slow)
    if scaling.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, head_dim - 1)
    if first == last:
        last += 0.001  # a step, without dividing by zero
    pairs = torch.arange(head_dim // 2, dtype=torch.float32)
    return ((pairs - first) / (last - first)).clamp(0, 1)
