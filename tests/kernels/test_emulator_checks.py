"""Planted bugs: each is caught, with the line, the thread and the element."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from nbengine.kernels.emulator import EmulatedProgram, EmulationError, build
from nbengine.kernels.source import Source
from tests.kernels.emulation import accused, floats, ints, kernel, line_of


def test_a_missing_barrier_is_a_race() -> None:
    text = """
    __global__ void kernel(float* out, const float* x) {
      __shared__ float row[64];
      row[threadIdx.x] = x[threadIdx.x];  // there
      out[threadIdx.x] = row[63 - threadIdx.x];  // here
    }
    """
    error = accused(text, 1, 64, floats(64), torch.ones(64), kind="race")
    # Thread 32 is the first to touch what another one did: 31 has read row[32] by then.
    assert (error.thread, error.other_thread) == ((32, 0, 0), (31, 0, 0))
    assert "writes row[32], which thread (31, 0, 0) (line 5: out[threadIdx.x] = row" in str(error)


def test_a_write_after_a_read_with_no_barrier_between_is_a_race() -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int total;
      if (threadIdx.x == 0) total = 7;
      __syncthreads();
      out[threadIdx.x] = total;
      if (threadIdx.x == 40) total = 8;  // here
    }
    """
    error = accused(text, 1, 64, ints(64), kind="race")
    assert error.thread == (40, 0, 0)
    assert "writes" in str(error) and "reads with no barrier between" in str(error)


def test_two_threads_that_write_different_values_to_one_address_are_a_race() -> None:
    text = """
    __global__ void kernel(int* out, int at) {
      __shared__ int winner[4];
      winner[at] = threadIdx.x;  // here
      __syncthreads();
      out[threadIdx.x] = winner[at];
    }
    """
    error = accused(text, 1, 2, ints(2), 2, kind="race")
    assert error.thread == (1, 0, 0)
    assert "writes winner[2], which thread (0, 0, 0)" in str(error)


def test_lanes_that_read_each_other_without_a_syncwarp_are_a_race() -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int slots[2][32];
      const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
      slots[warp][lane] = lane;
      __syncwarp();
      const int sum = slots[warp][lane] + slots[warp][lane ^ 1];  // there
      slots[warp][lane] = sum;  // here
      out[threadIdx.x] = slots[warp][lane ^ 1];
    }
    """
    error = accused(text, 1, 64, ints(64), kind="race")
    assert {error.thread, error.other_thread} == {(0, 0, 0), (1, 0, 0)}


def test_a_barrier_of_half_a_warp_does_not_order_the_other_half() -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int slots[32];
      slots[threadIdx.x] = threadIdx.x;  // there
      __syncwarp(threadIdx.x < 16 ? 0x0000ffffu : 0xffff0000u);
      out[threadIdx.x] = slots[(threadIdx.x + 16) % 32];  // here
    }
    """
    accused(text, 1, 32, ints(32), kind="race")


def test_a_plain_access_beside_an_atomic_one_is_a_race() -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int count;
      if (threadIdx.x == 0) count = 0;
      __syncthreads();
      atomicAdd(&count, 1);  // there
      out[threadIdx.x] = count;  // here
    }
    """
    error = accused(text, 1, 64, ints(64), kind="race")
    assert "atomically changes" in str(error)


def test_atomics_of_other_warps_are_not_ordered_by_a_syncwarp() -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int count;
      if (threadIdx.x == 0) count = 0;
      __syncthreads();
      atomicAdd(&count, 1);  // there
      __syncwarp();
      if (threadIdx.x == 127) out[0] = count;  // here
    }
    """
    error = accused(text, 1, 128, ints(1), kind="race")
    assert "which thread (95, 0, 0)" in str(error)


@pytest.mark.parametrize(
    "operation",
    ["__ballot_sync(~0u, 1)", "__shfl_xor_sync(~0u, 1, 1)", "__reduce_add_sync(~0u, 1)"],
)
def test_shuffles_and_votes_order_no_memory(operation: str) -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int row[32];
      row[threadIdx.x] = threadIdx.x;  // there
      out[threadIdx.x] = OPERATION;
      out[threadIdx.x] = row[threadIdx.x ^ 1];  // here
    }
    """.replace("OPERATION", operation)
    accused(text, 1, 32, ints(32), kind="race")


@pytest.mark.parametrize(
    ("before", "after"),
    [("", "__threadfence_block();"), ("if (warp == 9) __threadfence_block();", "")],
)
def test_atomics_without_a_fence_before_them_order_nothing(before: str, after: str) -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int parts[2], done;
      const int warp = threadIdx.x / 32;
      if (threadIdx.x == 0) done = 0;
      __syncthreads();
      if (threadIdx.x % 32 == 0) {
        parts[warp] = warp;  // there
        BEFORE
        const bool last = atomicAdd(&done, 1) == 1;
        AFTER
        if (last) out[0] = parts[1 - warp];  // here
      }
    }
    """.replace("BEFORE", before).replace("AFTER", after)
    accused(text, 1, 64, ints(1), kind="race")


def test_what_follows_a_fence_is_not_ordered_by_it() -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int part, done;
      if (threadIdx.x == 0) done = 0;
      __syncthreads();
      if (threadIdx.x == 0) {
        __threadfence_block();
        part = 7;  // there
        atomicAdd(&done, 1);
      }
      if (threadIdx.x == 32 && atomicAdd(&done, 0) == 1) out[0] = part;  // here
    }
    """
    accused(text, 1, 64, ints(1), kind="race")


def test_the_first_of_neighbours_is_named_by_its_own_name() -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int before[4], row[4], behind[4];
      before[threadIdx.x] = behind[threadIdx.x] = 0;
      __syncthreads();
      out[threadIdx.x] = before[0] + row[0] + behind[0];  // here
    }
    """
    error = accused(text, 1, 4, ints(4), kind="uninitialised")
    assert "row[0]" in str(error)


def test_a_barrier_in_one_branch_is_divergence() -> None:
    text = """
    __global__ void kernel(int* out) {
      if (threadIdx.x < 16) {
        __syncthreads();  // here
      }
      out[threadIdx.x] = threadIdx.x;
      __syncthreads();
    }
    """
    error = accused(text, 1, 64, ints(64), kind="divergence")
    assert error.thread == (0, 0, 0)
    assert "thread (16, 0, 0) (line 7: __syncthreads();) waits at another one" in str(error)


def test_a_barrier_against_a_shuffle_is_divergence() -> None:
    text = """
    __global__ void kernel(int* out) {
      int value = threadIdx.x;
      if (threadIdx.x < 16) {
        value = __shfl_xor_sync(0xffffffffu, value, 1);  // here
      } else {
        __syncthreads();
      }
      out[threadIdx.x] = value;
    }
    """
    error = accused(text, 1, 32, ints(32), kind="divergence")
    assert "__syncthreads, line 7" in str(error)


def test_a_read_past_the_end_is_out_of_bounds() -> None:
    text = """
    __global__ void kernel(float* out, const float* x) {
      out[threadIdx.x] = x[threadIdx.x + 1];  // here
    }
    """
    error = accused(text, 1, 64, floats(64), torch.ones(64), kind="out of bounds")
    assert error.thread == (63, 0, 0)
    assert "reads 4 bytes at x[64], where x has 64 elements" in str(error)


def test_a_write_before_the_start_is_out_of_bounds() -> None:
    text = """
    __global__ void kernel(float* out) {
      out[(int)(blockIdx.x * 64 + threadIdx.x) - 1] = 0.0f;  // here
    }
    """
    error = accused(text, 1, 64, floats(64), kind="out of bounds")
    assert error.thread == (0, 0, 0)
    assert "writes 4 bytes at out[-1]" in str(error)


def test_the_error_names_the_block() -> None:
    text = """
    __global__ void kernel(float* out, int n) {
      const int i = blockIdx.x * blockDim.x + threadIdx.x;
      if (i <= n) out[i] = i;  // here
    }
    """
    error = accused(text, 4, 32, floats(100), 100, kind="out of bounds")
    assert (error.block, error.thread) == ((3, 0, 0), (4, 0, 0))


def test_a_wild_pack_that_is_half_inside_is_out_of_bounds() -> None:
    text = """
    __global__ void kernel(float* out, const float* x) {
      const float4 pack = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x);  // here
      out[threadIdx.x] = pack.x + pack.y + pack.z + pack.w;
    }
    """
    error = accused(text, 1, 2, floats(2), torch.ones(6), kind="out of bounds")
    assert error.thread == (1, 0, 0)
    assert "where x has 6 elements" in str(error)


def test_a_null_pointer_is_named() -> None:
    text = """
    __global__ void kernel(float* out, const float* bias) {
      out[threadIdx.x] = bias[threadIdx.x];  // here
    }
    """
    error = accused(text, 1, 2, floats(2), None, kind="out of bounds")
    assert "address 0x0 (a null pointer; of the arguments, bias is null here)" in str(error)


def test_a_null_pointer_of_the_kernels_own_is_no_argument() -> None:
    text = """
    __global__ void kernel(float* out) {
      const float* mine = nullptr;
      out[threadIdx.x] = mine[threadIdx.x];  // here
    }
    """
    error = accused(text, 1, 1, floats(1), kind="out of bounds")
    assert "address 0x0 (a null pointer)" in str(error)


def test_memory_that_no_tensor_holds_is_said_to_be_unknown() -> None:
    text = """
    __global__ void kernel(int* out, long long at) {
      *reinterpret_cast<int*>(at) = 1;  // here
    }
    """
    error = accused(text, 1, 1, ints(1), 2**44, kind="out of bounds")
    assert "far from every tensor that was passed (the nearest is out; what a kernel" in str(error)


def test_an_index_past_a_static_shared_array_is_out_of_bounds() -> None:
    text = """
    __global__ void kernel(float* out) {
      __shared__ float first[32];
      __shared__ float second[32];
      first[threadIdx.x] = 1.0f;
      second[threadIdx.x] = 2.0f;
      __syncthreads();
      out[threadIdx.x] = second[threadIdx.x] + first[threadIdx.x + 1];  // here
    }
    """
    error = accused(text, 1, 32, floats(32), kind="out of bounds")
    assert error.thread == (31, 0, 0)
    assert "index 32 of an array" in str(error)


def test_dynamic_shared_memory_ends_where_the_launch_says() -> None:
    text = """
    extern __shared__ float pool[];
    __global__ void kernel(float* out) {
      pool[threadIdx.x] = 1.0f;  // here
      out[threadIdx.x] = pool[threadIdx.x];
    }
    """
    error = accused(text, 1, 64, floats(64), shared_bytes=63 * 4, kind="out of bounds")
    assert error.thread == (63, 0, 0)
    assert "pool[63]" in str(error)


@pytest.mark.parametrize(
    "used", ["row[threadIdx.x]", "*(row + threadIdx.x % 7)", "atomicAdd(row, 1)"]
)
def test_shared_memory_that_no_line_writes_is_uninitialised(used: str) -> None:
    text = """
    __global__ void kernel(int* out) {
      __shared__ int row[64];
      out[threadIdx.x] = USED;  // here
    }
    """.replace("USED", used)
    error = accused(text, 1, 64, ints(64), kind="uninitialised")
    assert "row[0], which nothing in this block has written" in str(error)


def test_shared_memory_that_nothing_wrote_is_uninitialised() -> None:
    text = """
    __global__ void kernel(float* out) {
      __shared__ float row[64];
      if (threadIdx.x != 5) row[threadIdx.x] = 1.0f;
      __syncthreads();
      out[threadIdx.x] = row[threadIdx.x];  // here
    }
    """
    error = accused(text, 1, 64, floats(64), kind="uninitialised")
    assert error.thread == (5, 0, 0)
    assert "row[5]" in str(error)


def test_what_another_block_wrote_is_uninitialised_here() -> None:
    text = """
    __global__ void kernel(float* out) {
      __shared__ float row[64];
      if (blockIdx.x == 0) row[threadIdx.x] = 1.0f;
      __syncthreads();
      out[threadIdx.x] = row[threadIdx.x];  // here
    }
    """
    error = accused(text, 8, 64, floats(64), kind="uninitialised")
    assert error.block != (0, 0, 0)


COPY = """
#include "nb/async_copy.cuh"
__global__ void kernel(float* out, const float* x) {
  __shared__ __align__(16) float row[128];
  nb::cp_async_16(row + 4 * threadIdx.x, x + 4 * threadIdx.x);  // issue
  nb::cp_async_commit();
  WAIT
  __syncthreads();
  out[threadIdx.x] = row[threadIdx.x];  // here
}
"""


def test_a_copy_that_was_not_waited_for_has_not_arrived() -> None:
    text = COPY.replace("WAIT", "")
    error = accused(text, 1, 32, floats(32), torch.ones(128), kind="unfinished copy")
    issue = line_of(text, "// issue")
    assert "row[31]" in str(error) and f"thread (7, 0, 0) (line {issue}: nb::cp_async_16" in str(
        error
    )


def test_a_wait_that_leaves_the_group_in_flight_does_not_help() -> None:
    accused(
        COPY.replace("WAIT", "nb::cp_async_wait<1>();"),
        *(1, 32, floats(32), torch.ones(128)),
        kind="unfinished copy",
    )


def test_a_copy_is_seen_by_other_threads_after_a_barrier_alone() -> None:
    text = COPY.replace("WAIT", "nb::cp_async_wait<0>();").replace("__syncthreads();", "")
    accused(text, 1, 32, floats(32), torch.ones(128), kind="race")


def test_a_copy_over_what_others_still_read_is_a_race() -> None:
    text = """
    #include "nb/async_copy.cuh"
    __global__ void kernel(float* out, const float* x) {
      __shared__ __align__(16) float row[128];
      for (int i = 0; i < 2; ++i) {
        nb::cp_async_16(row + 4 * threadIdx.x, x + 4 * threadIdx.x);
        nb::cp_async_commit();
        nb::cp_async_wait<0>();
        __syncthreads();
        out[threadIdx.x] = row[127 - threadIdx.x];  // here
      }
    }
    """
    error = accused(text, 1, 32, floats(32), torch.ones(128), kind="race")
    assert "(line 6: nb::cp_async_16" in str(error)


def test_a_mask_must_name_its_caller() -> None:
    text = """
    __global__ void kernel(int* out) {
      out[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, threadIdx.x, 1);  // here
    }
    """
    error = accused(text, 1, 32, ints(32), kind="wrong mask")
    assert error.thread == (16, 0, 0)


def test_a_mask_names_lanes_that_come() -> None:
    text = """
    __global__ void kernel(int* out) {
      int value = threadIdx.x;
      if (threadIdx.x < 16) value = __shfl_xor_sync(0xffffffffu, value, 1);  // here
      __syncwarp();
      out[threadIdx.x] = value;
    }
    """
    error = accused(text, 1, 32, ints(32), kind="divergence")
    assert "mask 0xffffffff" in str(error) and "__syncwarp, line 5" in str(error)


def test_a_shuffle_from_a_lane_that_has_exited_is_caught() -> None:
    text = """
    __global__ void kernel(int* out) {
      if (threadIdx.x == 31) return;
      out[threadIdx.x] = __shfl_down_sync(0xffffffffu, threadIdx.x, 1);  // here
    }
    """
    error = accused(text, 1, 32, ints(32), kind="inactive lane")
    assert error.thread == (30, 0, 0)
    assert "lane 31" in str(error)


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("call", ["nb::ldmatrix_x4(a, row)", "nb::mma_m16n8k16<__half>(d, a, b)"])
@pytest.mark.parametrize(("block", "n"), [(16, 16), (32, 16)])
def test_fragments_need_every_lane_of_the_warp(call: str, block: int, n: int, checks: bool) -> None:
    text = """
    #include "nb/mma.cuh"
    __global__ void kernel(float* out, int n) {
      __shared__ __align__(16) unsigned row[4];
      if (threadIdx.x >= n) return;
      for (int i = 0; i < 4; ++i) row[i] = 0;
      float d[4] = {};
      nb::uint32 a[4] = {}, b[2] = {};
      __syncwarp();
      CALL;  // here
      out[threadIdx.x] = d[0] + a[0];
    }
    """.replace("CALL", call)
    with pytest.raises(EmulationError, match="all 32 lanes of the warp, and lane 31") as caught:
        kernel(text, checks=checks)[1, block](floats(32), n)
    assert (caught.value.kind, caught.value.line) == ("inactive lane", line_of(text))


def test_a_shuffle_from_a_lane_outside_the_mask_is_caught() -> None:
    text = """
    __global__ void kernel(int* out) {
      if (threadIdx.x < 16) {
        out[threadIdx.x] = __shfl_sync(0x0000ffffu, threadIdx.x, 20);  // here
      }
    }
    """
    accused(text, 1, 32, ints(32), kind="inactive lane")


@pytest.mark.skipif(build._is_clang(), reason="clang says nothing of the alignment of a copy")
def test_a_misaligned_pack_is_caught() -> None:
    text = """
    __global__ void kernel(float* out, const float* x) {
      const float4 pack = *reinterpret_cast<const float4*>(x + threadIdx.x);  // here
      out[threadIdx.x] = pack.x + pack.y + pack.z + pack.w;
    }
    """
    error = accused(text, 1, 2, floats(2), torch.ones(8), kind="misaligned")
    assert error.thread == (1, 0, 0)
    assert "x[1]" in str(error)


@pytest.mark.parametrize("checks", [True, False])
@pytest.mark.parametrize("words", [16, 500_000])
def test_a_stack_that_overflows_ends_the_launch_alone(words: int, checks: bool) -> None:
    text = """
    __device__ __noinline__ int deeper(int n) {
      volatile int local[WORDS];
      local[n % WORDS] = n;
      return n < 0 ? 0 : deeper(n + 1) + local[n % WORDS];
    }
    __global__ void kernel(int* out, int n) {
      __syncthreads();
      out[threadIdx.x] = threadIdx.x == 40 ? deeper(n) : threadIdx.x;
    }
    """.replace("WORDS", str(words))
    deep = kernel(text, checks=checks)
    for _ in range(2):
        with pytest.raises(EmulationError, match="more than 960 KiB for its local") as caught:
            deep[5, 64](ints(64), 1)
        assert (caught.value.kind, caught.value.thread) == ("stack overflow", (40, 0, 0))


def test_a_misaligned_atomic_is_caught() -> None:
    text = """
    __global__ void kernel(char* out) {
      atomicAdd(reinterpret_cast<int*>(out + threadIdx.x), 1);  // here
    }
    """
    error = accused(text, 1, 2, torch.zeros(8, dtype=torch.int8), kind="misaligned")
    assert error.thread == (1, 0, 0) and "out[1]" in str(error)


def test_a_part_of_a_pack_that_nothing_wrote_is_uninitialised() -> None:
    text = """
    __global__ void kernel(float4* out) {
      __shared__ __align__(16) float row[8];
      if (threadIdx.x != 3) row[threadIdx.x] = 1.0f;
      __syncthreads();
      out[threadIdx.x] = reinterpret_cast<float4*>(row)[threadIdx.x % 2];  // here
    }
    """
    error = accused(text, 1, 8, floats(8, 4), kind="uninitialised")
    assert "row[3]" in str(error)


def test_a_division_by_zero_is_caught() -> None:
    text = """
    __global__ void kernel(int* out, int n) {
      out[threadIdx.x] = 7 / n;  // here
    }
    """
    accused(text, 1, 1, ints(1), 0, kind="division")


def test_assertions_and_traps_end_the_launch() -> None:
    text = """
    #include <cassert>
    __global__ void kernel(int* out) {
      assert(threadIdx.x != 3);  // here
      out[threadIdx.x] = 1;
    }
    """
    error = accused(text, 1, 8, ints(8), kind="assertion")
    assert error.thread == (3, 0, 0) and "threadIdx.x != 3" in str(error)
    text = text.replace("assert(threadIdx.x != 3)", "if (threadIdx.x == 4) __trap()")
    assert accused(text, 1, 8, ints(8), kind="trap").thread == (4, 0, 0)


def test_a_fault_in_a_header_is_shown_at_the_line_that_led_there() -> None:
    text = """
    #include "nb/types.cuh"
    __global__ void kernel(float* out, const float* x) {
      const auto pack = nb::load_pack(x + 4 * threadIdx.x);  // here
      out[threadIdx.x] = pack.items[0];
    }
    """
    error = accused(text, 1, 2, floats(2), torch.ones(4), kind="out of bounds")
    assert "inside" in str(error) and "types.cuh" in str(error)


def test_a_misaligned_pack_in_a_header_is_shown_at_the_line_that_led_there() -> None:
    text = """
    #include "nb/types.cuh"
    __global__ void kernel(float* out, const float* x) {
      const auto pack = CALL;  // here
      out[threadIdx.x] = reinterpret_cast<const float*>(&pack)[0];
    }
    """
    for call in ("__ldg(reinterpret_cast<const float4*>(x + 1))", "nb::load_pack(x + 1)"):
        accused(text.replace("CALL", call), 1, 1, floats(1), torch.ones(8), kind="misaligned")


def test_a_file_of_any_name_is_shown(tmp_path: Path) -> None:
    path = tmp_path / "a b (c) ü.cu"
    path.write_text("__global__ void kernel(int* out) {\n  out[threadIdx.x + 1] = 1;\n}\n")
    with pytest.raises(EmulationError) as caught:
        EmulatedProgram(Source.read(path), checks=True).kernel("kernel")[1, 1](ints(1))
    assert caught.value.line == 2 and str(caught.value.file).endswith("a b (c) ü.cu")


def test_a_wrong_copy_of_bytes_is_out_of_bounds() -> None:
    text = """
    __global__ void kernel(float* out, const float* x, int n) {
      memcpy(out, x, n * sizeof(float));  // here
    }
    """
    accused(text, 1, 1, floats(8), torch.ones(7), 8, kind="out of bounds")


@pytest.mark.parametrize("bytes_", [8, 24, 32, 64])
def test_a_copy_of_a_size_that_the_compiler_knows_is_looked_at(bytes_: int) -> None:
    text = """
    __global__ void kernel(char* out, const char* x) {
      CALL;  // here
    }
    """
    size = str(bytes_)
    for call in ("memcpy(out, x, SIZE)", "memmove(out, x, SIZE)", "std::memset(out, 0, SIZE)"):
        of_size = text.replace("CALL", call.replace("SIZE", size))
        out = torch.zeros(bytes_ - 1, dtype=torch.int8)
        x = torch.zeros(bytes_, dtype=torch.int8)
        error = accused(of_size, 1, 1, out, x, kind="out of bounds")
        assert f"writes {bytes_} bytes at out[0]" in str(error)


def test_a_race_through_a_copy_is_caught() -> None:
    text = """
    __global__ void kernel(int* out, const int* x) {
      __shared__ int row[256];
      memcpy(&row[8 * threadIdx.x], &x[8 * threadIdx.x], 32);  // there
      out[threadIdx.x] = row[255 - 8 * threadIdx.x];  // here
    }
    """
    accused(text, 1, 32, ints(32), ints(256), kind="race")


def test_after_an_error_the_same_kernel_runs_again() -> None:
    text = """
    __global__ void kernel(int* out, int n) {
      __shared__ int row[64];
      row[threadIdx.x] = threadIdx.x;
      __syncthreads();
      if (threadIdx.x < n) out[threadIdx.x] = row[63 - threadIdx.x];  // here
    }
    """
    accused(text, 3, 64, ints(16), 17, kind="out of bounds")
    out = ints(16)
    kernel(text)[3, 64](out, 16)
    assert out.tolist() == list(range(63, 47, -1))
