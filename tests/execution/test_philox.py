"""Randomness: the published answers, and nothing but key and counter."""

from __future__ import annotations

import numpy as np
import pytest

from nbengine.execution.philox import philox4x32, uniforms

ONES = 0xFFFFFFFF


@pytest.mark.parametrize(
    ("counter", "key", "expected"),
    [
        # kat_vectors of the authors' Random123 library, philox4x32 with 10 rounds.
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([ONES] * 4, [ONES] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
)
def test_philox_gives_the_published_answers(counter, key, expected):
    def columns(words):
        return np.array([words, words], dtype=np.uint64).T

    for column in philox4x32(columns(counter), columns(key)).T:
        assert column.tolist() == expected


def test_a_number_depends_on_its_own_seed_sample_and_position_alone():
    seeds, samples, positions = [3, -1, 2**63, 3], [0, 1, 2, 0], [5, 6, 2**33, 6]
    together = uniforms(seeds, samples, positions)
    alone = [uniforms([s], [i], [p])[0] for s, i, p in zip(seeds, samples, positions, strict=True)]
    assert together.tolist() == alone
    assert len(set(alone)) == 4


def test_each_part_of_seed_and_counter_matters():
    base = (12345, 0, 7)
    changed = [
        (12346, 0, 7),
        (12345 + 2**32, 0, 7),
        (12345 - 2**63, 0, 7),
        (12345, 1, 7),
        (12345, 0, 8),
        (12345, 0, 7 + 2**32),
    ]
    numbers = uniforms(*zip(base, *changed, strict=True))
    assert len(set(numbers.tolist())) == len(changed) + 1


def test_numbers_are_uniform_in_the_half_open_unit_interval():
    numbers = uniforms([9] * 100_000, [0] * 100_000, range(100_000))
    assert numbers.min() >= 0.0 and numbers.max() < 1.0
    counts = np.bincount((numbers * 100).astype(int), minlength=100)
    # 99 degrees of freedom: the 0.001 and 0.999 quantiles are 60 and 149.
    assert 60 < ((counts - 1000) ** 2 / 1000).sum() < 149
