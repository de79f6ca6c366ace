// Partial results of paged_attention_decode, of a warp or a block, and their sum: softmax over parts
// of the keys, put together (Milakov and Gimelshein 2018).

#pragma once

#include "nb/decode/operands.cuh"
#include "nb/fast_math.cuh"
#include "nb/reduce.cuh"

namespace nb::decode {

// The attention of a group's queries to some of the keys: the weights of the values are
// exp2(score - maximum), `total` is their sum. `values` lie as the accumulators of mma do: entry
// 32 * i + lane is what `lane` has in its i-th one, of queries q and q + 1 for dimension d, then of
// both for d + 1.
template <typename T, int kHeadDim, int kQueryTiles>
struct Partial {
  static constexpr int kDimTiles = kHeadDim / 16;
  static constexpr int kEntries = kQueryTiles * kDimTiles * kWarpSize;

  Pack<float, 4> values[kEntries];
  float maximum[8 * kQueryTiles];
  float total[8 * kQueryTiles];

  static __device__ __forceinline__ int query(int entry) {
    return entry / (kDimTiles * kWarpSize) * 8 + entry % 4 * 2;
  }
  static __device__ __forceinline__ int dimension(int entry) {
    return Slice<T, kHeadDim, 8>::dimension(entry % kWarpSize / 4,
                                            entry / kWarpSize % kDimTiles);
  }
};

// Each worker has a counter and, behind all counters, two partial results.
constexpr int kCounterBytes = 16;

// A sum of partial results, of kSize entries with the same two queries: first, first + 32, ...
template <typename Part, int kSize>
struct Sum {
  int first;
  float values[kSize][4] = {};
  float maximum[2] = {-infinity(), -infinity()};
  float total[2] = {};

  __device__ __forceinline__ explicit Sum(int first) : first(first) {}

  __device__ __forceinline__ void add(const Part& part) {
    const int query = Part::query(first);
    float old_weight[2], weight[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float high = fmaxf(maximum[c], part.maximum[query + c]);
      old_weight[c] = exp2_fast(maximum[c] - high);
      weight[c] = exp2_fast(part.maximum[query + c] - high);
      maximum[c] = high;
      total[c] = total[c] * old_weight[c] + part.total[query + c] * weight[c];
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Pack<float, 4> added = part.values[first + i * kWarpSize];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[i][j] = values[i][j] * old_weight[j % 2] + added.items[j] * weight[j % 2];
      }
    }
  }

  __device__ __forceinline__ void store(Part& part) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      part.values[first + i * kWarpSize] = {
          {values[i][0], values[i][1], values[i][2], values[i][3]}};
    }
    if (Part::dimension(first) != 0) return;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      part.maximum[Part::query(first) + c] = maximum[c];
      part.total[Part::query(first) + c] = total[c];
    }
  }
};

// One entry of the sum of a block's warps. The first warp always has keys.
template <int kWarps, typename Part>
__device__ __forceinline__ Sum<Part, 1> sum_of(const Part* of_warps, int entry) {
  Sum<Part, 1> sum(entry);
  // The highest maximum first: then no addition waits for a power of the one before.
#pragma unroll 4
  for (int i = 0; i < 2 * kWarps; ++i) {
    float& high = sum.maximum[i % 2];
    high = fmaxf(high, of_warps[i / 2].maximum[Part::query(entry) + i % 2]);
  }
#pragma unroll 4
  for (int warp = 0; warp < kWarps; ++warp) sum.add(of_warps[warp]);
  return sum;
}

// For all threads of a block: whether it is the last of `num_workers` to call this. What those before
// wrote is then visible to it: barriers and fences are cumulative (PTX ISA, "Memory Consistency
// Model"), so that one thread speaks for its block. `counter` is zero before the first call, and
// after the last.
__device__ __forceinline__ bool is_last_to_come(int* counter, int num_workers) {
  bool is_last = false;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    is_last = atomicAdd(counter, 1) == num_workers - 1;
    if (is_last) *counter = 0;
    __threadfence();
  }
  return __syncthreads_or(is_last);
}

}  // namespace nb::decode
