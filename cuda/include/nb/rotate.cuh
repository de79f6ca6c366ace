// Rotary position embedding of a head (Su et al. 2021), in the half-split order of the checkpoints:
// dimension i and i + kHeadDim / 2 are a pair, turned by the position's angle i.
//
// A position's row of the table is [2, kHeadDim]: (cos, cos) and (-sin, sin) over the two halves. The
// halves repeat each other, so a pair takes its cosine from the first and its sine from the second.

#pragma once

#include "nb/types.cuh"

namespace nb {

// Turns N pairs (low[j], high[j]), the first of them pair `at`.
template <int kHeadDim, typename Table, int N>
__device__ __forceinline__ void rotate(float (&low)[N], float (&high)[N],
                                       const Table* __restrict__ table_row, int at) {
  const Pack<Table, N> cosines = load_pack<Table, N>(table_row + at);
  const Pack<Table, N> sines = load_pack<Table, N>(table_row + kHeadDim + kHeadDim / 2 + at);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float cosine = to_float(cosines.items[j]);
    const float sine = to_float(sines.items[j]);
    const float turned = low[j] * cosine - high[j] * sine;
    high[j] = high[j] * cosine + low[j] * sine;
    low[j] = turned;
  }
}

template <typename T, int N>
__device__ __forceinline__ void load_floats(float (&values)[N], const T* source) {
  const Pack<T, N> pack = load_pack<T, N>(source);
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] = to_float(pack.items[j]);
}

template <typename T, int N>
__device__ __forceinline__ void store_floats(T* target, const float (&values)[N]) {
  Pack<T, N> pack;
#pragma unroll
  for (int j = 0; j < N; ++j) pack.items[j] = from_float<T>(values[j]);
  store_pack(target, pack);
}

}  // namespace nb
