// Rotary position embedding of a head (Su et al. 2021), in the half-split order of the checkpoints:
// dimension i and i + kHeadDim / 2 are a pair, turned by the position's angle i.
//
// A position's row of the table is [2, kHeadDim]: (cos, cos) and (-sin, sin) over the two halves. The
// halves repeat each other, so a pair takes its cosine from the first and its sine from the second.

#pragma once

#include "nb/types.cuh"

namespace nb {

// Of N neighbouring pairs.
template <int N>
struct Angles {
  float cosines[N], sines[N];
};

// Those of the pairs from `at` on, by a position's row of the table.
template <int kHeadDim, int N, typename Table>
__device__ __forceinline__ Angles<N> load_angles(const Table* __restrict__ row, int at) {
  Angles<N> angles;
  load_floats(angles.cosines, row + at);
  load_floats(angles.sines, row + kHeadDim + kHeadDim / 2 + at);
  return angles;
}

// Turns the pairs (low[j], high[j]).
template <int N>
__device__ __forceinline__ void rotate(float (&low)[N], float (&high)[N], const Angles<N>& angles) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const float turned = low[j] * angles.cosines[j] - high[j] * angles.sines[j];
    high[j] = high[j] * angles.cosines[j] + low[j] * angles.sines[j];
    low[j] = turned;
  }
}

}  // namespace nb
