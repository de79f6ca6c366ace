"""Correct programs are never accused, however they synchronise."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nbengine.kernels.emulator import EmulationError
from tests.kernels.emulation import floats, ints, kernel


def test_a_pipeline_of_two_buffers_and_asynchronous_copies() -> None:
    text = """
    #include "nb/async_copy.cuh"
    __global__ void kernel(float* out, const float* x, int steps) {
      __shared__ __align__(16) float tiles[2][256];
      const int at = 4 * threadIdx.x;
      nb::cp_async_16(&tiles[0][at], x + at);
      nb::cp_async_commit();
      float sum = 0.0f;
      for (int step = 0; step < steps; ++step) {
        if (step + 1 < steps) {
          nb::cp_async_16(&tiles[(step + 1) % 2][at], x + 256 * (step + 1) + at);
        }
        nb::cp_async_commit();
        nb::cp_async_wait<1>();
        __syncthreads();
        for (int i = 0; i < 4; ++i) sum += tiles[step % 2][255 - at - i];
        __syncthreads();
      }
      out[threadIdx.x] = sum;
    }
    """
    x = torch.randn(7, 256, generator=torch.Generator().manual_seed(0))
    out = floats(64)
    kernel(text)[1, 64](out, x, 7)
    expected = x.sum(0).flip(0).view(64, 4).sum(1)
    torch.testing.assert_close(out, expected)


def test_warps_that_synchronise_by_themselves() -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int slots[4][32];
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      int value = threadIdx.x;
      for (int i = 0; i < 5; ++i) {
        slots[warp][lane] = value;
        __syncwarp();
        value += slots[warp][(lane + 1) % 32];
        __syncwarp();
      }
      out[threadIdx.x] = value;
    }
    """
    out = ints(128)
    kernel(text)[1, 128](out)
    value = torch.arange(128).view(4, 32)
    for _ in range(5):
        value = value + value.roll(-1, 1)
    assert torch.equal(out, value.flatten().int())


def test_a_chain_of_lanes_hands_on_what_the_first_wrote() -> None:
    # Lane 0 meets 1, 1 meets 2, 2 meets 3: what 0 wrote before is ordered before what 3 reads after.
    text = """
    __global__ void kernel(int* out) {
      __shared__ int slot;
      const int lane = threadIdx.x;
      if (lane == 0) slot = 5;
      for (int i = 0; i < 3; ++i) {
        if (lane == i || lane == i + 1) __syncwarp(3u << i);
      }
      if (lane == 3) out[0] = slot;
    }
    """
    out = ints(1)
    kernel(text)[1, 32](out)
    assert out.item() == 5


def test_threads_that_return_before_a_barrier() -> None:
    text = """
    __global__ void kernel(float* out, const float* x, int n) {
      __shared__ float row[64];
      if (threadIdx.x >= n) return;
      row[threadIdx.x] = x[threadIdx.x];
      __syncthreads();
      float value = row[n - 1 - threadIdx.x];
      value += __shfl_xor_sync(0xffffffffu, value, 1);
      out[threadIdx.x] = value;
    }
    """
    for n in (64, 40, 2):
        x, out = torch.arange(64.0), floats(n)
        kernel(text)[2, 64](out, x, n)
        flipped = x[:n].flip(0)
        assert torch.equal(out, flipped + flipped.view(-1, 2).flip(1).flatten())


def test_a_block_that_ends_in_a_part_of_a_warp() -> None:
    text = """
    __global__ void kernel(int* out) {
      int sum = 1;
      for (int step = 16; step > 0; step /= 2) {
        const int other = __shfl_sync(__ballot_sync(~0u, 1), sum, threadIdx.x % 32 / 2 * 2);
        sum += other;
      }
      __syncthreads();
      out[threadIdx.x] = sum;
    }
    """
    out = ints(50)
    kernel(text)[1, 50](out)
    assert out.tolist() == [32] * 50


def test_threads_that_write_the_same_value() -> None:
    text = """
    __global__ void kernel(int* out, const int* x) {
      __shared__ bool found;
      if (threadIdx.x == 0) found = false;
      __syncthreads();
      if (x[threadIdx.x] > 3) found = true;
      __syncthreads();
      out[threadIdx.x] = found;
    }
    """
    out = ints(64)
    kernel(text)[1, 64](out, torch.arange(64, dtype=torch.int32))
    assert out.tolist() == [1] * 64


def test_atomics_on_shared_memory() -> None:
    text = """
    __global__ void kernel(int* out, const int* x) {
      __shared__ int bins[8];
      if (threadIdx.x < 8) bins[threadIdx.x] = 0;
      __syncthreads();
      atomicAdd(&bins[x[threadIdx.x] % 8], 1);
      __syncthreads();
      if (threadIdx.x < 8) out[threadIdx.x] = bins[threadIdx.x];
    }
    """
    x, out = torch.arange(96, dtype=torch.int32) ** 2, ints(8)
    kernel(text)[1, 96](out, x)
    assert torch.equal(out.long(), torch.bincount(x % 8, minlength=8))


def test_shared_memory_that_memset_and_memcpy_fill() -> None:
    text = """
    __global__ void kernel(int* out, const int* x) {
      __shared__ int sums[32], row[256];
      if (threadIdx.x == 0) memset(sums, 0, sizeof(sums));
      memcpy(&row[8 * threadIdx.x], &x[8 * threadIdx.x], 32);
      __syncthreads();
      atomicAdd(&sums[threadIdx.x % 4], row[255 - 8 * threadIdx.x]);
      __syncthreads();
      out[threadIdx.x] = sums[threadIdx.x];
    }
    """
    out = ints(32)
    kernel(text)[1, 32](out, torch.ones(256, dtype=torch.int32))
    assert out.tolist() == [8] * 4 + [0] * 28


@pytest.mark.parametrize(
    "members",
    [
        "float key; short at;",
        "char tag; float key; int at;",
        "double key; int at;",
        "short at; char b; float key;",
    ],
)
def test_structs_whose_padding_nobody_writes(members: str) -> None:
    text = """
    struct Best { MEMBERS };
    __device__ Best better(Best a, Best b) { return a.key > b.key ? a : b; }
    __global__ void kernel(int* out, const float* x) {
      __shared__ Best best[64];
      best[threadIdx.x].key = x[threadIdx.x];
      best[threadIdx.x].at = threadIdx.x;
      SET;
      __syncthreads();
      for (int half = 32; half > 0; half /= 2) {
        if (threadIdx.x < half) {
          best[threadIdx.x] = better(best[threadIdx.x], best[threadIdx.x + half]);
        }
        __syncthreads();
      }
      if (threadIdx.x == 0) out[0] = best[0].at;
    }
    """.replace("MEMBERS", members)
    member = "tag" if "tag" in members else "b" if " b;" in members else "at"
    set_ = "" if member == "at" else f"best[threadIdx.x].{member} = 0"
    x, out = torch.randn(64, generator=torch.Generator().manual_seed(0)), ints(1)
    kernel(text.replace("SET", set_))[1, 64](out, x)
    assert out.item() == x.argmax().item()


def test_the_last_warp_finishes_what_all_began() -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int parts[4];
      __shared__ unsigned done;
      if (threadIdx.x == 0) done = 0;
      __syncthreads();
      const int warp = threadIdx.x / 32;
      const int sum = __reduce_add_sync(~0u, threadIdx.x);
      if (threadIdx.x % 32 == 0) {
        parts[warp] = sum;
        __threadfence_block();
        if (atomicAdd(&done, 1u) == 3) out[0] = parts[0] + parts[1] + parts[2] + parts[3];
      }
    }
    """
    out = ints(1)
    kernel(text)[2, 128](out)
    assert out.item() == 127 * 64


def test_a_copy_of_nothing_at_the_end_of_a_tensor() -> None:
    text = "__global__ void kernel(int* out, int n) { memcpy(out + 4, out, n * sizeof(int)); }"
    kernel(text)[1, 1](ints(4), 0)


def test_the_last_block_finishes_what_all_began() -> None:
    text = """
    __global__ void kernel(float* out, float* partials, int* arrived) {
      __shared__ bool last;
      if (threadIdx.x == 0) {
        partials[blockIdx.x] = blockIdx.x;
        __threadfence();
        last = atomicAdd(arrived, 1) == gridDim.x - 1;
      }
      __syncthreads();
      if (!last || threadIdx.x != 0) return;
      float sum = 0.0f;
      for (int i = 0; i < gridDim.x; ++i) sum += __ldcg(&partials[i]);
      out[0] = sum;
    }
    """
    out = floats(1)
    kernel(text)[100, 32](out, floats(100), torch.zeros(1, dtype=torch.int32))
    assert out.item() == 4950


def test_bytes_and_halves_of_one_word_belong_to_different_threads() -> None:
    text = """
    __global__ void kernel(unsigned* out) {
      __shared__ __align__(16) unsigned char bytes[128];
      bytes[threadIdx.x] = threadIdx.x;
      __syncthreads();
      if (threadIdx.x < 8) {
        const uint4 pack = reinterpret_cast<const uint4*>(bytes)[threadIdx.x];
        out[threadIdx.x] = pack.w >> 24;
      }
    }
    """
    out = ints(8)
    kernel(text)[2, 128](out.view(torch.uint32))
    assert out.tolist() == list(range(15, 128, 16))


def test_aggregated_by_whoever_is_active() -> None:
    text = """
    __global__ void kernel(int* count, const int* x) {
      if (x[threadIdx.x] % 3 == 0) {
        const unsigned active = __activemask();
        const int leader = __ffs(active) - 1;
        if (threadIdx.x % 32 == leader) atomicAdd(count, __popc(active));
        __syncwarp(active);
      }
    }
    """
    count = torch.zeros(1, dtype=torch.int32)
    kernel(text)[1, 64](count, torch.arange(64, dtype=torch.int32))
    assert count.item() == 22


def test_a_table_of_pointers() -> None:
    text = """
    __global__ void kernel(int** rows) { rows[blockIdx.x][threadIdx.x] = blockIdx.x; }
    """
    rows = [ints(32), ints(32)]
    kernel(text)[2, 32](torch.tensor([row.data_ptr() for row in rows]))
    assert [set(row.tolist()) for row in rows] == [{0}, {1}]


def test_slices_of_a_wider_tensor_may_reach_their_neighbours() -> None:
    text = """
    __global__ void kernel(float* out, const float* x, long long stride) {
      out[blockIdx.x * stride + threadIdx.x] = x[blockIdx.x * stride + threadIdx.x - 1];
    }
    """
    wide = torch.arange(40.0).view(4, 10)
    out = floats(4, 10)
    kernel(text)[4, 5](out[:, 2:], wide[:, 2:], 10)
    assert torch.equal(out[:, 2:7], wide[:, 1:6])


INTERPRETER = """
// A program of steps for a block of 64 threads over 3 words of shared memory. Each step has a row of
// 64 slots: what each thread does then (-1 nothing, s: reads slot s, 100 + s: writes it), and how all
// are synchronised after it: 0 not at all, 1 __syncthreads, 2 __syncwarp.
__global__ void kernel(int* out, const int* steps, const int* after, int num_steps) {
  __shared__ int slots[3];
  if (threadIdx.x < 3) slots[threadIdx.x] = 0;
  __syncthreads();
  int sum = 0;
  for (int i = 0; i < num_steps; ++i) {
    const int action = steps[i * 64 + threadIdx.x];
    if (action >= 100) slots[action - 100] = 1 + 1000 * i + threadIdx.x;
    else if (action >= 0) sum += slots[action];
    if (after[i] == 1) __syncthreads();
    if (after[i] == 2) __syncwarp();
  }
  out[threadIdx.x] = sum;
}
"""

actions = st.lists(
    st.tuples(st.sampled_from((0, 1, 31, 32, 63)), st.integers(0, 2), st.booleans()),
    min_size=1,
    max_size=5,
)
programs = st.lists(st.tuples(actions, st.integers(0, 2)), min_size=1, max_size=6)


def races(program: list[tuple[list[tuple[int, int, bool]], int]]) -> bool:
    """By definition: two threads, one slot, one of them writing, and nothing that orders the two."""
    done: list[tuple[int, int, int, bool]] = []  # step, thread, slot, writes
    for step, (acts, _) in enumerate(program):
        for thread, (slot, writes) in {t: (s, w) for t, s, w in acts}.items():
            done.append((step, thread, slot, writes))
    for i, (step, thread, slot, writes) in enumerate(done):
        for later, other, other_slot, other_writes in done[i + 1 :]:
            if slot != other_slot or thread == other or not (writes or other_writes):
                continue
            between = {kind for _, kind in program[step:later]}
            same_warp = thread // 32 == other // 32
            if 1 not in between and not (same_warp and 2 in between):
                return True
    return False


@settings(
    max_examples=400,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(programs)
def test_a_race_is_reported_exactly_where_there_is_one(
    program: list[tuple[list[tuple[int, int, bool]], int]],
) -> None:
    steps = torch.full((len(program), 64), -1, dtype=torch.int32)
    for i, (acts, _) in enumerate(program):
        for thread, slot, writes in acts:
            steps[i, thread] = slot + 100 * writes
    after = torch.tensor([kind for _, kind in program], dtype=torch.int32)
    launch = kernel(INTERPRETER)[1, 64]
    if races(program):
        with pytest.raises(EmulationError) as caught:
            launch(ints(64), steps, after, len(program))
        assert caught.value.kind == "race"
    else:
        launch(ints(64), steps, after, len(program))
