"""A watched block: accesses by thread, phase and element, checked by hand on small kernels."""

from __future__ import annotations

import json
from array import array

import pytest
import torch

from nbengine.errors import InvalidField
from nbengine.kernels import lab
from nbengine.kernels.emulator import EmulationError
from nbengine.kernels.op import Arguments, Case, Cost, Op, Tolerance
from nbengine.kernels.program import Program
from nbengine.kernels.watch import Access, KernelTrace, watch

# Four threads, two a sequence: each reads four values of a key in the slot that its sequence's table
# leads to, and after a barrier writes the sum of its neighbour's.
SOURCE = """\
__global__ void peek(float* out, const float* k_cache, const long long* block_tables, int wide) {
  __shared__ float sums[4];
  const int sequence = threadIdx.x / 2, part = threadIdx.x % 2;
  const long long block = block_tables[sequence * wide + blockIdx.x];
  const float* key = k_cache + (block * 2 + 1) * 8 + part * 4;
  const float most = key[0] + key[1] + key[2];
  sums[threadIdx.x] = most + key[3];
  __syncthreads();
  out[blockIdx.x * 4 + threadIdx.x] = sums[threadIdx.x ^ 1];
}
"""
LOAD, LAST, BARRIER, STORE = 6, 7, 8, 9


def launch(program: Program, *, out, k_cache, block_tables, seq_lens) -> None:  # type: ignore[no-untyped-def]
    kernel = program.kernel("peek")
    kernel[2, 4](out, k_cache, block_tables, block_tables.stride(0))


def arguments() -> Arguments:
    """Two sequences of 4 and 3 tokens in blocks of 2, `[blocks, 1 head, 2 slots, 8]`; their tables are
    rows of wider ones."""
    tables = torch.tensor([[3, 1, -1], [2, 4, -1]])
    return {
        "out": torch.zeros(8),
        "k_cache": torch.ones(5, 1, 2, 8),
        "block_tables": tables[:, :2],
        "seq_lens": torch.tensor([4, 3]),
    }


OP = Op(
    name="peek",
    source="no such file",
    outputs=("out",),
    launch=launch,
    reference=lambda **_: None,
    cases=lambda: [Case("small", lambda _: arguments()), Case("other", lambda _: arguments())],
    tolerance=lambda _: Tolerance(0, 0),
    cost=lambda _: Cost(0, 0),
)


def watched(**more: object) -> KernelTrace:
    return watch(OP, SOURCE, **more)  # type: ignore[arg-type]


def test_phases_end_at_barriers_and_hold_each_threads_accesses_in_order() -> None:
    trace = watched()
    assert (trace.grid, trace.block, trace.num_threads) == ((2, 1, 1), (4, 1, 1), 4)
    names = [tensor.name for tensor in trace.tensors]
    table, key, sums, out = (
        names.index(name) for name in ("block_tables", "k_cache", "sums", "out")
    )
    assert [phase.barrier_line for phase in trace.phases] == [BARRIER, None]
    first, second = (phase.accesses for phase in trace.phases)
    # Thread 3: the second sequence's block is 2; its slot 1 begins at element (2 * 2 + 1) * 8 = 40,
    # and the second half of the key at 44. The loads of one line are one access.
    assert [access for access in first if access.thread == 3] == [
        Access(3, table, 2, 1, "read", 4),
        Access(3, key, 44, 3, "read", LOAD),
        Access(3, key, 47, 1, "read", LAST),
        Access(3, sums, 3, 1, "write", LAST),
    ]
    assert [access for access in second if access.thread == 3] == [
        Access(3, sums, 2, 1, "read", STORE),
        Access(3, out, 3, 1, "write", STORE),
    ]
    assert {access.thread for access in first} == {0, 1, 2, 3}


def test_elements_of_a_slice_are_counted_in_its_own_shape() -> None:
    """Row 1 of the tables begins at element 3 of memory, and at element 2 of `[2, 2]`."""
    trace = watched(of=(1, 0, 0))
    (table,) = [i for i, tensor in enumerate(trace.tensors) if tensor.name == "block_tables"]
    read = {a.thread: a.first for a in trace.phases[0].accesses if a.tensor == table}
    assert read == {0: 1, 1: 1, 2: 3, 3: 3}
    assert trace.tensors[table].index(3) == (1, 1)


def test_an_element_of_the_cache_is_named_by_block_head_slot_and_dim() -> None:
    trace = watched()
    (key,) = [i for i, tensor in enumerate(trace.tensors) if tensor.is_cache]
    place = trace.cache_place(key, 44)
    assert (place.block, place.head, place.slot, place.dim) == (2, 0, 1, 4)
    assert place.sequences == ((1, 1),), "block 2 is the first of sequence 1"
    access = next(a for a in trace.phases[0].accesses if (a.thread, a.tensor) == (3, key))
    assert trace.where(access) == (
        "k_cache: block 2, head 0, slot 1 (token 1 of sequence 1), dim 4..6"
    )
    store = trace.phases[1].accesses[-1]
    assert trace.where(store) == f"out[{store.thread}]"
    with pytest.raises(ValueError, match="is no KV cache"):
        trace.cache_place(store.tensor, 0)


def test_an_engines_names_of_its_blocks_are_shown_in_place_of_the_numbers_here() -> None:
    trace = watched(block_names=(10, 11, 12, 13, 14))
    assert "sequence 0, 4 tokens: KV blocks 13 11" in str(trace)
    assert "block 12, head 0" in trace.where(
        next(
            a
            for a in trace.phases[0].accesses
            if a.thread == 3 and trace.tensors[a.tensor].is_cache
        )
    )


def test_the_summary_counts_elements_once_and_names_the_lines() -> None:
    rows = [line.split() for line in watched().summary(0).splitlines()[2:]]
    # Two sequences read 8 elements each of one slot, in blocks 3 and 2.
    assert ["k_cache", "16", "0", "4", "0", "6,", "7", "2,", "3"] in rows
    assert ["block_tables", "2", "0", "4", "0", "4"] in rows
    assert ["sums", "0", "4", "4", "0", "7"] in rows


def test_a_page_gets_six_numbers_an_access_and_where_each_phase_ends() -> None:
    trace = watched()
    facts = json.loads(trace.facts())
    numbers = array("i", trace.packed())
    total = sum(len(phase.accesses) for phase in trace.phases)
    assert len(numbers) == 6 * total
    assert [phase["end"] for phase in facts["phases"]] == [len(trace.phases[0].accesses), total]
    last = trace.phases[1].accesses[-1]
    assert numbers[-6:].tolist() == [last.thread, last.tensor, last.first, 1, 1, STORE]
    assert facts["tables"] == [[3, 1], [2, 4]]
    assert facts["lines"][str(BARRIER)] == "__syncthreads();"


def test_the_call_is_left_as_it_was() -> None:
    given = arguments()
    watched(arguments=given)
    assert given["out"].eq(0).all()


@pytest.mark.parametrize(
    ("more", "problem"),
    [
        ({"of": (2, 0, 0)}, r"the grid of peek is \(2, 1, 1\)"),
        ({"launch": 1}, "makes 1 launch"),
        ({"case": "nope"}, "there are small, other"),
        ({"case": "small"}, "accesses, and 3 can be looked at"),
    ],
)
def test_what_can_not_be_watched_is_refused_with_the_numbers(
    more: dict[str, object], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if more == {"case": "small"}:
        monkeypatch.setattr("nbengine.kernels.watch.MAX_ACCESSES", 3)
    with pytest.raises(InvalidField, match=problem):
        watched(**more)


def test_the_checks_are_on() -> None:
    with pytest.raises(EmulationError, match="race"):
        watch(OP, SOURCE.replace("  __syncthreads();\n", ""))


def test_each_warp_of_decode_attention_reads_one_block_through_the_table() -> None:
    """The op's own case: 40 tokens in blocks of 16, one KV head of 64, a tile of 16 keys a warp."""
    trace = lab.watch("paged_attention_decode")
    (key,) = [i for i, tensor in enumerate(trace.tensors) if tensor.name == "k_cache"]
    table = trace.block_tables[0]
    assert (len(table), trace.seq_lens) == (3, (40, 21))
    reads = [a for phase in trace.phases for a in phase.accesses if a.tensor == key]
    for warp, block in enumerate(table):
        mine = {
            element
            for a in reads
            if a.warp == warp
            for element in range(a.first, a.first + a.count)
            if element // 1024 == block
        }
        num_tokens = min(16, 40 - 16 * warp)
        assert mine == {block * 1024 + i for i in range(64 * num_tokens)}
    assert not [a for a in reads if a.first // 1024 in trace.block_tables[1]], "another's blocks"
