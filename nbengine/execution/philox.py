"""Philox4x32-10: random numbers as a pure function of a key and a counter.

The sampler calls `uniforms` with each request's seed as the key and (sample index, position of the
token) as the counter. There is no state to save, restore or share: a token's randomness is the same
alone and in any batch, after preemption, and after a rewind.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3" (SC'11), section
3.3; multipliers and key increments from its table 2.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]

_MASK = np.uint64(0xFFFFFFFF)
_SHIFT = np.uint64(32)
_MULTIPLIERS = np.array([[0xD2511F53], [0xCD9E8D57]], dtype=np.uint64)
_KEY_INCREMENTS = np.array([[0x9E3779B9], [0xBB67AE85]], dtype=np.uint64)
_ROUNDS = 10


def philox4x32(counter: Words, key: Words) -> Words:
    """Four random 32-bit words for each column of `counter` [4, N] under `key` [2, N].

    All arrays are uint64 holding 32-bit words, because a round needs 32 x 32 -> 64 bit products.
    """
    even, odd = counter[0::2], counter[1::2]
    for _ in range(_ROUNDS):
        product = even * _MULTIPLIERS
        even = (product >> _SHIFT)[::-1] ^ odd ^ key
        odd = (product & _MASK)[::-1]
        key = (key + _KEY_INCREMENTS) & _MASK
    return np.stack((even[0], odd[0], even[1], odd[1]))


def uniforms(
    seeds: Sequence[int], sample_indices: Sequence[int], positions: Sequence[int]
) -> npt.NDArray[np.float64]:
    """One float64 in [0, 1) with 53 random bits for each (64-bit seed, sample index, position)."""
    seed = np.array([seed & 0xFFFFFFFFFFFFFFFF for seed in seeds], dtype=np.uint64)
    sample = np.array(sample_indices, dtype=np.uint64)
    position = np.array(positions, dtype=np.uint64)
    counter = np.stack((position & _MASK, position >> _SHIFT, sample & _MASK, sample >> _SHIFT))
    words = philox4x32(counter, np.stack((seed & _MASK, seed >> _SHIFT)))
    high, low = words[0] >> np.uint64(5), words[1] >> np.uint64(6)
    return (high * 2.0**26 + low) / 2.0**53
