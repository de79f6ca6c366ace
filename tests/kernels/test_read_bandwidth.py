"""cuda/read_bandwidth.cu reads every word once, whatever the grid."""

from __future__ import annotations

import functools

import pytest
import torch

from nbengine import kernels
from nbengine.kernels.source import Source
from tests.gpu import needs_gpu


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=needs_gpu)])
@pytest.mark.parametrize("num_blocks", [3, 5, 8])
def test_the_sinks_hold_the_xor_of_all_words(device, num_blocks):
    made = kernels.program(Source.of_op("read_bandwidth.cu"), device=device)
    threads, loads, num_tiles = 64, 2, 5
    words = torch.randint(-(2**31), 2**31, (num_tiles * threads * loads * 4,), dtype=torch.int32)
    sinks = torch.full((num_blocks * threads // 32,), -1, dtype=torch.int32, device=device)
    kernel = made.kernel("read_bandwidth", threads, loads)
    kernel[num_blocks, threads](words.to(device), sinks, len(words))
    assert functools.reduce(int.__xor__, sinks.tolist()) == functools.reduce(
        int.__xor__, words.tolist()
    )
