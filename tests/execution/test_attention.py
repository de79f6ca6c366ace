"""`paged_attention` against a plain reference, over mixed batches laid out in shuffled blocks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import nbengine.cpu
from nbengine.execution.attention import paged_attention, write_kv
from nbengine.execution.batch import Batch


@pytest.fixture(params=["compiled", "torch"], autouse=True)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if request.param == "torch":
        monkeypatch.setattr("nbengine.execution.attention.kernels", lambda: None)
    elif nbengine.cpu.kernels() is None:
        pytest.skip("needs a C++ compiler")
    yield


@dataclass
class Case:
    """Sequences with a past and new tokens, their keys and values in a poisoned paged cache."""

    batch: Batch
    q: Tensor  # [T, num_heads, head_dim]
    k_cache: Tensor
    v_cache: Tensor
    keys: list[Tensor]  # each sequence's [seq_len, kv_heads, head_dim]
    values: list[Tensor]


def make_case(
    lengths: list[tuple[int, int]],
    *,
    num_heads: int = 4,
    kv_heads: int = 2,
    head_dim: int = 8,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Case:
    """`lengths`: (tokens in the cache before, new tokens) of each sequence."""
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    totals = [past + new for past, new in lengths]
    num_blocks = [-(-total // block_size) for total in totals]
    shuffled = torch.randperm(sum(num_blocks) + 3, generator=random)[: sum(num_blocks)]
    tables = torch.zeros(len(lengths), max(num_blocks), dtype=torch.int64)
    for table, blocks in zip(tables, shuffled.split(num_blocks), strict=True):
        table[: len(blocks)] = blocks
    shape = (sum(num_blocks) + 3, kv_heads, block_size, head_dim)
    k_cache = torch.full(shape, math.nan, dtype=dtype)
    v_cache = torch.full(shape, math.nan, dtype=dtype)

    keys = [normal(total, kv_heads, head_dim) for total in totals]
    values = [normal(total, kv_heads, head_dim) for total in totals]
    slots = []
    for table, total, k, v in zip(tables, totals, keys, values, strict=True):
        position = torch.arange(total)
        slots.append(table[position // block_size] * block_size + position % block_size)
        write_kv(k, v, k_cache, v_cache, slots[-1])
    new = [n for _, n in lengths]
    positions = [torch.arange(past, past + n) for past, n in lengths]
    batch = Batch(
        token_ids=torch.zeros(sum(new), dtype=torch.int64),
        positions=torch.cat(positions),
        slot_mapping=torch.cat([s[p] for s, p in zip(slots, positions, strict=True)]),
        query_start_loc=torch.tensor([0, *torch.tensor(new).cumsum(0).tolist()]),
        seq_lens=torch.tensor(totals),
        block_tables=tables,
        logits_rows=torch.tensor(new).cumsum(0) - 1,
        num_tokens=sum(new),
        num_seqs=len(new),
        max_query_len=max(new),
        max_seq_len=max(totals),
        query_lens=new,
        context_lens=[past for past, _ in lengths],
    )
    q = normal(sum(new), num_heads, head_dim)
    return Case(batch, q, k_cache, v_cache, keys, values)


def reference(case: Case, window: int | None = None, softcap: float | None = None) -> Tensor:
    """One row and one head at a time, in float64."""
    num_heads, head_dim = case.q.shape[1:]
    out = torch.empty_like(case.q, dtype=torch.float64)
    row = 0
    for i, (past, new) in enumerate(
        zip(case.batch.context_lens, case.batch.query_lens, strict=True)
    ):
        kv_heads = case.keys[i].shape[1]
        for position in range(past, past + new):
            first = 0 if window is None else max(0, position + 1 - window)
            for head in range(num_heads):
                kv_head = head // (num_heads // kv_heads)
                k = case.keys[i][first : position + 1, kv_head].double()
                v = case.values[i][first : position + 1, kv_head].double()
                scores = k @ case.q[row, head].double() / math.sqrt(head_dim)
                if softcap is not None:
                    scores = torch.tanh(scores / softcap) * softcap
                out[row, head] = scores.softmax(0) @ v
            row += 1
    return out.float()


def run(case: Case, window: int | None = None, softcap: float | None = None) -> Tensor:
    scale = 1 / math.sqrt(case.q.shape[-1])
    return paged_attention(
        case.q, case.k_cache, case.v_cache, case.batch, scale, window=window, softcap=softcap
    )


# The fixture only chooses the backend: it holds nothing from one example to the next.
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    lengths=st.lists(
        st.tuples(st.integers(0, 70), st.one_of(st.just(1), st.integers(1, 40))),
        min_size=1,
        max_size=6,
    ),
    heads=st.sampled_from([(1, 1), (4, 4), (4, 2), (9, 3), (7, 1)]),
    head_dim=st.sampled_from([1, 3, 8, 16, 64]),
    block_size=st.sampled_from([1, 3, 8, 16, 32]),
    window=st.one_of(st.none(), st.integers(1, 50)),
    softcap=st.sampled_from([None, 0.5, 30.0]),
    seed=st.integers(0, 2**16),
)
def test_a_mixed_batch_equals_the_plain_reference(
    lengths: list[tuple[int, int]],
    heads: tuple[int, int],
    head_dim: int,
    block_size: int,
    window: int | None,
    softcap: float | None,
    seed: int,
) -> None:
    case = make_case(
        lengths,
        num_heads=heads[0],
        kv_heads=heads[1],
        head_dim=head_dim,
        block_size=block_size,
        seed=seed,
    )
    torch.testing.assert_close(
        run(case, window, softcap), reference(case, window, softcap), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_half_precision_cache_serves_float32_queries(dtype: torch.dtype) -> None:
    case = make_case([(20, 1), (0, 9), (33, 1), (5, 12)], dtype=dtype)
    assert run(case).dtype == torch.float32
    for kv in (case.keys, case.values):  # the reference sees what the cache kept
        kv[:] = [x.to(dtype).float() for x in kv]
    torch.testing.assert_close(run(case), reference(case), rtol=1e-5, atol=1e-5)


def test_a_prompt_in_chunks_equals_the_prompt_at_once() -> None:
    whole = make_case([(0, 50)])
    expected = run(whole)
    done = 0
    for size in (1, 16, 7, 1, 25):
        chunk = make_case([(0, 50)])
        batch = chunk.batch
        batch.positions, batch.query_lens = torch.arange(done, done + size), [size]
        batch.context_lens, batch.seq_lens = [done], torch.tensor([done + size])
        batch.query_start_loc = torch.tensor([0, size])
        chunk.q = whole.q[done : done + size]
        torch.testing.assert_close(run(chunk), expected[done : done + size], rtol=1e-5, atol=1e-6)
        done += size


def test_a_row_does_not_depend_on_what_shares_its_batch() -> None:
    lengths = [(30, 1), (3, 1), (100, 1), (0, 20), (16, 1), (31, 1)]
    together = make_case(lengths)
    expected = run(together)
    starts = together.batch.query_start_loc.tolist()
    for i, (past, new) in enumerate(lengths):
        alone = make_case([(past, new)])
        alone.k_cache, alone.v_cache = together.k_cache, together.v_cache
        alone.batch.block_tables = together.batch.block_tables[i : i + 1]
        alone.q = together.q[starts[i] : starts[i + 1]]
        torch.testing.assert_close(
            run(alone), expected[starts[i] : starts[i + 1]], rtol=1e-5, atol=1e-6
        )


def test_layers_of_different_windows_share_a_batch() -> None:
    case = make_case([(40, 1), (0, 30)])
    for window in (None, 5, None, 20):
        torch.testing.assert_close(run(case, window), reference(case, window), rtol=1e-5, atol=1e-5)


def test_write_kv_touches_only_its_slots() -> None:
    k_cache, v_cache = torch.zeros(2, 4, 2, 8, 3)  # 4 blocks of 8 slots
    k, v = torch.randn(2, 2, 2, 3)  # two tokens
    write_kv(k, v, k_cache, v_cache, torch.tensor([31, 9]))
    assert torch.equal(k_cache[3, :, 7], k[0]) and torch.equal(v_cache[1, :, 1], v[1])
    assert k_cache.count_nonzero() == k.numel() and v_cache.count_nonzero() == v.numel()
