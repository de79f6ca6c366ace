"""copy_blocks and swap_blocks: against the KV cache's own copies, and their refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from nbengine.execution.kv_cache import KVCache
from nbengine.kernels.op import Op
from nbengine.kernels.ops import copy_blocks, swap_blocks
from nbengine.kernels.program import Program


def cache_on(device: torch.device, num_blocks: int = 60, num_host_blocks: int = 5) -> KVCache:
    data = torch.randn(2, 2, num_blocks, 2, 8, 16, device=device)
    host = torch.randn(2, 2, num_host_blocks, 2, 8, 16, pin_memory=device.type == "cuda")
    return KVCache(data, host)


@pytest.mark.parametrize(
    "pairs",
    [
        [(1, 4)],
        [(3, 4), (6, 3), (6, 9)],  # 3 is written after it was read; 6 is copied twice
        [(0, 1), (1, 2), (2, 0)],
        [(i, (i + 1) % 60) for i in range(60)],  # more than fit into a block of 128 threads
    ],
    ids=["one", "freed and reused", "cycle", "every block"],
)
def test_copies_are_those_of_the_kv_cache(
    program_for: Callable[[Op], Program], pairs: list[tuple[int, int]]
) -> None:
    program = program_for(copy_blocks.OP)
    cache = cache_on(program.device)
    found = cache.data.clone()
    copy_blocks.launch(program, cache=found, pairs=torch.tensor(pairs, device=program.device))
    cache.copy_blocks(pairs)
    assert torch.equal(found, cache.data)


def test_no_pairs_copy_nothing(program_for: Callable[[Op], Program]) -> None:
    program = program_for(copy_blocks.OP)
    cache = cache_on(program.device)
    before = cache.data.clone()
    none = torch.empty(0, 2, dtype=torch.int64, device=program.device)
    copy_blocks.launch(program, cache=cache.data, pairs=none)
    assert torch.equal(cache.data, before)


def test_swaps_are_those_of_the_kv_cache(program_for: Callable[[Op], Program]) -> None:
    program = program_for(swap_blocks.OP)
    cache = cache_on(program.device)
    data, host = cache.data.clone(), cache.host.clone()
    if program.device.type == "cuda":
        host = host.pin_memory()
    out, back = [(7, 0), (59, 4), (0, 2)], [(4, 7), (1, 30)]

    swap_blocks.launch(
        program, source=data, target=host, pairs=torch.tensor(out, device=program.device)
    )
    swap_blocks.launch(
        program, source=host, target=data, pairs=torch.tensor(back, device=program.device)
    )
    cache.swap_out(out)
    cache.swap_in(back)
    assert torch.equal(data, cache.data)
    assert torch.equal(host, cache.host)


def test_more_swaps_than_a_grid_holds_are_several_launches(
    program_for: Callable[[Op], Program], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(swap_blocks, "_MAX_PAIRS", 2)
    program = program_for(swap_blocks.OP)
    cache = cache_on(program.device)
    host = cache.host.clone()
    if program.device.type == "cuda":
        host = host.pin_memory()
    pairs = torch.tensor([(7, 0), (59, 4), (0, 2), (8, 1), (9, 3)], device=program.device)
    swap_blocks.launch(program, source=cache.data, target=host, pairs=pairs)
    cache.swap_out([(int(a), int(b)) for a, b in pairs])
    assert torch.equal(host, cache.host)


def test_what_does_not_fit_is_refused() -> None:
    cache = torch.zeros(2, 2, 6, 2, 8, 16)
    pair = torch.zeros(1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"pairs has the shape \[1, 3\], and needs \[1, 2\]"):
        copy_blocks.launch(None, cache=cache, pairs=torch.zeros(1, 3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"3,073 pairs: one call copies up to 3,072"):
        copy_blocks.launch(None, cache=cache, pairs=pair.repeat(3073, 1))
    with pytest.raises(ValueError, match=r"a block \[1, 1, 6\] of torch.float32 is 24 bytes"):
        copy_blocks.launch(None, cache=torch.zeros(2, 2, 6, 1, 1, 6), pairs=pair)
    with pytest.raises(ValueError, match=r"cache .* must be contiguous"):
        copy_blocks.launch(None, cache=cache[:, :, ::2], pairs=pair)
    with pytest.raises(ValueError, match=r"target has the shape .* needs \[2, 2, 6, 2, 8, 16\]"):
        swap_blocks.launch(None, source=cache, target=cache[:1], pairs=pair)
    with pytest.raises(ValueError, match=r"source is torch.float32, and target torch.float16"):
        swap_blocks.launch(None, source=cache, target=cache.half(), pairs=pair)
