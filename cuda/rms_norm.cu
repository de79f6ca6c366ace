// RMSNorm (Zhang and Sennrich 2019), with the residual's addition fused.
//
//   residual[t, :] += x[t, :]                          (only where kResidual)
//   out[t, s, :] = y / sqrt(mean(y^2) + eps) * weight[s, :]    y = residual or x
//
// x        [T, sets, kSize], rows of `x_stride` elements: a slice of wider rows is read in place
// residual [T, kSize], dense; the sum is rounded to T before it is normed, as it is stored
// weight   [sets, kSize] float: one set for a layer's norm, one a head for norms on q and k
// out      [T, sets, kSize], rows of `out_stride` elements; may be x itself
//
// kLanes threads take a row (one token's set); a block takes kRows rows. A layer's row has a block of
// its own; a head's fits into part of a warp, and then a block takes as many heads as fill four warps.
// A lane issues its loads of the row, the residual and the weight at once and keeps them in registers
// across the reduction, so a row costs one trip to memory and each byte moves once: the row in and
// out, the residual in and out (the weight is read by every row and stays in the L2).

#include "nb/reduce.cuh"
#include "nb/types.cuh"

template <typename T, int kSize, int kLanes, int kRows, bool kResidual>
__global__ void __launch_bounds__(kLanes * kRows)
    rms_norm(T* out, const T* x, T* residual, const float* __restrict__ weight, int num_rows,
             int num_sets, nb::int64 x_stride, nb::int64 out_stride, float eps) {
  constexpr int kPack = nb::pack_size<T>(kSize);
  constexpr int kPacksPerLane = (kSize / kPack + kLanes - 1) / kLanes;
  static_assert(kRows == 1 || kLanes <= nb::kWarpSize, "rows that share a block are parts of warps");

  const int lane = threadIdx.x % kLanes;
  const int row = blockIdx.x * kRows + threadIdx.x / kLanes;
  const nb::int64 token = row / num_sets;
  const int set = row % num_sets;
  x += token * x_stride + set * kSize;
  out += token * out_stride + set * kSize;
  weight += set * kSize;

  float values[kPacksPerLane][kPack], before[kPacksPerLane][kPack], weights[kPacksPerLane][kPack];
#pragma unroll
  for (int i = 0; i < kPacksPerLane; ++i) {
    const int at = (i * kLanes + lane) * kPack;
    if (at >= kSize || row >= num_rows) continue;
    nb::load_floats(values[i], x + at);
    if constexpr (kResidual) nb::load_floats(before[i], residual + token * kSize + at);
    nb::load_floats(weights[i], weight + at);
  }
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacksPerLane; ++i) {
    const int at = (i * kLanes + lane) * kPack;
    if (at >= kSize || row >= num_rows) continue;  // and join the reduction below
    if constexpr (kResidual) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        values[i][j] = nb::to_float(nb::from_float<T>(before[i][j] + values[i][j]));
      }
      nb::store_floats(residual + token * kSize + at, values[i]);
    }
#pragma unroll
    for (int j = 0; j < kPack; ++j) sum += values[i][j] * values[i][j];
  }
  if constexpr (kLanes <= nb::kWarpSize) {
    sum = nb::warp_reduce<nb::Sum, kLanes>(sum, nb::Sum());
  } else {
    __shared__ float partials[kLanes / nb::kWarpSize];
    sum = nb::block_reduce<kLanes>(sum, nb::Sum(), partials);
  }
  const float scale = rsqrtf(sum * (1.0f / kSize) + eps);

#pragma unroll
  for (int i = 0; i < kPacksPerLane; ++i) {
    const int at = (i * kLanes + lane) * kPack;
    if (at >= kSize || row >= num_rows) continue;
#pragma unroll
    for (int j = 0; j < kPack; ++j) values[i][j] *= scale * weights[i][j];
    nb::store_floats(out + at, values[i]);
  }
}
