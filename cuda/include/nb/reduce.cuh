// Sums and maxima over the lanes of a warp and the threads of a block; every thread gets the result.
//
// The order of additions depends on the number of threads alone, so a row's result is the same in
// every batch. The shared array is the caller's: one float for each warp.

#pragma once

namespace nb {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

struct Sum {
  __device__ __forceinline__ float operator()(float a, float b) const { return a + b; }
};
struct Max {
  __device__ __forceinline__ float operator()(float a, float b) const { return fmaxf(a, b); }
};

template <typename Op, int kLanes = kWarpSize>
__device__ __forceinline__ float warp_reduce(float value, Op op) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = op(value, __shfl_xor_sync(kAllLanes, value, distance));
  }
  return value;
}

// The sum over a warp, of integers.
template <typename T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

// The sum over a warp's lanes up to this one, of integers.
template <typename T>
__device__ __forceinline__ T warp_sum_up_to(T value, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const T other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// All kThreads threads of a one-dimensional block must call this. `partials` may be used again after
// the next __syncthreads().
template <int kThreads, typename Op>
__device__ __forceinline__ float block_reduce(float value, Op op, float* partials) {
  static_assert(kThreads % kWarpSize == 0, "whole warps");
  constexpr int kWarps = kThreads / kWarpSize;
  value = warp_reduce(value, op);
  if constexpr (kWarps == 1) return value;
  if (threadIdx.x % kWarpSize == 0) partials[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float result = partials[0];
#pragma unroll
  for (int warp = 1; warp < kWarps; ++warp) result = op(result, partials[warp]);
  return result;
}

}  // namespace nb
