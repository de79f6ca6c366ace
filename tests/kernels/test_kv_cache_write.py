"""kv_cache_write: against the decoder's own operations, rows of padding, and its refusals."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from nbengine.execution.attention import write_kv
from nbengine.kernels.op import Op
from nbengine.kernels.ops import kv_cache_write
from nbengine.kernels.program import Program
from nbengine.models.ops import RmsNorm, rotate
from nbengine.models.rope import rope_table

NUM_Q, NUM_KV, HEAD_DIM, BLOCK_SIZE = 6, 2, 64, 8


def arguments_of(device: torch.device, slots: list[int], norm: bool) -> dict[str, Tensor]:
    generator = torch.Generator(device).manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device)

    tokens = len(slots)
    cache = torch.full((4, NUM_KV, BLOCK_SIZE, HEAD_DIM), torch.nan, device=device)
    return {
        "q": torch.full((tokens, NUM_Q, HEAD_DIM), torch.nan, device=device),
        "k_cache": cache,
        "v_cache": cache.clone(),
        "qkv": normal(tokens, (NUM_Q + 2 * NUM_KV) * HEAD_DIM),
        "positions": torch.arange(tokens, device=device) * 11,
        "table": rope_table(HEAD_DIM, 1e4, None, 64, dtype=torch.float32, device=device),
        "slot_mapping": torch.tensor(slots, device=device),
        "qk_weight": normal(NUM_Q + NUM_KV, HEAD_DIM) if norm else None,
    }


@pytest.mark.parametrize("norm", [False, True])
def test_it_leaves_what_the_decoder_leaves(
    program_for: Callable[[Op], Program], norm: bool
) -> None:
    program = program_for(kv_cache_write.OP)
    a = arguments_of(program.device, [9, 31, 0], norm)
    heads = a["qkv"].view(3, -1, HEAD_DIM)
    qk, v = heads[:, : NUM_Q + NUM_KV], heads[:, NUM_Q + NUM_KV :]
    if norm:
        qk = RmsNorm(a["qk_weight"], 1e-6)(qk)
    qk = rotate(qk, a["table"][a["positions"]])
    k_cache, v_cache = a["k_cache"].clone(), a["v_cache"].clone()
    write_kv(qk[:, NUM_Q:], v, k_cache, v_cache, a["slot_mapping"])

    kv_cache_write.launch(program, **a, eps=1e-6)
    torch.testing.assert_close(a["q"], qk[:, :NUM_Q], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(a["k_cache"], k_cache, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(a["v_cache"], v_cache, rtol=0, atol=0, equal_nan=True)


def test_a_negative_slot_writes_q_alone(program_for: Callable[[Op], Program]) -> None:
    program = program_for(kv_cache_write.OP)
    a = arguments_of(program.device, [-1, -1], norm=True)
    kv_cache_write.launch(program, **a, eps=1e-6)
    assert not a["q"].isnan().any()
    assert a["k_cache"].isnan().all() and a["v_cache"].isnan().all()


def test_rows_do_not_meet(program_for: Callable[[Op], Program]) -> None:
    """A row of NaN leaves the others as they are without it."""
    program = program_for(kv_cache_write.OP)
    a = arguments_of(program.device, [3, 12, 25], norm=True)
    b = arguments_of(program.device, [3, 12, 25], norm=True)
    b["qkv"][1] = torch.nan
    kv_cache_write.launch(program, **a, eps=1e-6)
    kv_cache_write.launch(program, **b, eps=1e-6)
    assert torch.equal(a["q"][[0, 2]], b["q"][[0, 2]])
    for name in ("k_cache", "v_cache"):
        assert torch.equal(a[name][[0, 3], :, [3, 1]], b[name][[0, 3], :, [3, 1]])
    assert b["q"][1].isnan().all()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": torch.zeros(2, 512)}, r"qkv has the shape \[2, 512\], and needs \[2, 640\]"),
        ({"v_cache": torch.zeros(4, 2, 8, 32)}, r"v_cache has the shape .* needs \[4, 2, 8, 64\]"),
        ({"k_cache": torch.zeros(8, 2, 8, 64)[::2]}, "k_cache .* must be contiguous"),
        ({"slot_mapping": torch.zeros(1, dtype=torch.int64)}, r"slot_mapping has the shape \[1\]"),
        ({"qk_weight": torch.zeros(6, 64)}, r"qk_weight .* needs \[8, 64\]"),
    ],
)
def test_shapes_that_do_not_fit_are_refused_with_their_numbers(
    change: dict[str, Tensor], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        kv_cache_write.launch(
            None, **arguments_of(torch.device("cpu"), [0, 1], True) | change, eps=1e-6
        )


def test_a_head_wider_than_a_warp_is_refused() -> None:
    a = arguments_of(torch.device("cpu"), [0], False)
    cache = torch.zeros(4, 1, 8, 512)
    a |= {"q": torch.zeros(1, 2, 512), "qkv": torch.zeros(1, 2048), "k_cache": cache}
    a |= {"v_cache": cache, "table": torch.zeros(64, 2, 512)}
    with pytest.raises(ValueError, match=r"head_dim=512 of torch.float32 is 64 pairs of packs"):
        kv_cache_write.launch(None, **a)
