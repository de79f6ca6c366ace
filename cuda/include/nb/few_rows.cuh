// What products of a few rows with a weight matrix have in common: operands of tensor cores straight
// from memory, and the end, where the sums of a block's warps are put together.

#pragma once

#include "nb/reduce.cuh"
#include "nb/types.cuh"

namespace nb {

using Words = Pack<uint32>;  // 16 bytes: eight 16-bit elements, as four registers of a fragment

template <typename T>
__device__ __forceinline__ Words load_words(const T* source) {
  return load_pack(reinterpret_cast<const uint32*>(source));
}
template <typename T>
__device__ __forceinline__ Words load_words_once(const T* source) {
  return load_pack_once(reinterpret_cast<const uint32*>(source));
}

// out[at] = sum, plus bias[n] and residual[at] unless they are null.
template <typename T>
__device__ __forceinline__ void finish(T* out, const T* bias, const T* residual, int64 at, int n,
                                       float sum) {
  if (bias != nullptr) sum += to_float(bias[n]);
  if (residual != nullptr) sum += to_float(residual[at]);
  out[at] = from_float<T>(sum);
}

// Sums of the warps, [warp][row of x][row of the weight], added in the order of warps: of kRows rows
// of the weight from first_row on. By all threads of a block, after a barrier.
template <int kRows, typename T, int kWarps, int kRowsOfX, int kWidth>
__device__ __forceinline__ void finish_block(T* out, const T* bias, const T* residual,
                                             const float (&partials)[kWarps][kRowsOfX][kWidth],
                                             int num_rows, int first_row, int size_out) {
#pragma unroll 1
  for (int item = threadIdx.x; item < num_rows * kRows; item += kWarps * kWarpSize) {
    const int row = item / kRows, n = item % kRows;
    if (first_row + n >= size_out) continue;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += partials[i][row][n];
    finish(out, bias, residual, static_cast<int64>(row) * size_out + first_row + n, first_row + n,
           sum);
  }
}

}  // namespace nb
