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
// One block of kThreads for each (token, set). A thread keeps its 16-byte packs of the row in
// registers between the sum and the product, so each byte is read once: the row in and out, and the
// residual in and out (the weight stays in L2).

#include "nb/reduce.cuh"
#include "nb/types.cuh"

template <typename T, int kSize, int kThreads, bool kResidual>
__global__ void __launch_bounds__(kThreads)
    rms_norm(T* out, const T* x, T* residual, const float* __restrict__ weight, int num_sets,
             nb::int64 x_stride, nb::int64 out_stride, float eps) {
  using Pack = nb::Pack<T>;
  constexpr int kPacks = kSize / Pack::size;
  constexpr int kPacksPerThread = (kPacks + kThreads - 1) / kThreads;
  static_assert(kSize % Pack::size == 0, "rows of whole 16-byte packs");
  __shared__ float partials[kThreads / nb::kWarpSize];

  const nb::int64 token = blockIdx.x / num_sets;
  const int set = blockIdx.x % num_sets;
  const T* row = x + token * x_stride + set * kSize;

  Pack packs[kPacksPerThread];
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacksPerThread; ++i) {
    const int at = (i * kThreads + threadIdx.x) * Pack::size;
    if (at >= kSize) continue;
    packs[i] = nb::load_pack(row + at);
    if constexpr (kResidual) {
      T* kept = residual + token * kSize + at;
      const Pack before = nb::load_pack(kept);
#pragma unroll
      for (int j = 0; j < Pack::size; ++j) {
        packs[i].items[j] = nb::from_float<T>(nb::to_float(before.items[j]) +
                                              nb::to_float(packs[i].items[j]));
      }
      nb::store_pack(kept, packs[i]);
    }
#pragma unroll
    for (int j = 0; j < Pack::size; ++j) {
      const float value = nb::to_float(packs[i].items[j]);
      sum += value * value;
    }
  }
  sum = nb::block_reduce<kThreads>(sum, nb::Sum(), partials);
  const float scale = rsqrtf(sum / kSize + eps);

  T* target = out + token * out_stride + set * kSize;
#pragma unroll
  for (int i = 0; i < kPacksPerThread; ++i) {
    const int at = (i * kThreads + threadIdx.x) * Pack::size;
    if (at >= kSize) continue;
#pragma unroll
    for (int j = 0; j < Pack::size; ++j) {
      packs[i].items[j] = nb::from_float<T>(nb::to_float(packs[i].items[j]) * scale *
                                            weight[set * kSize + at + j]);
    }
    nb::store_pack(target + at, packs[i]);
  }
}
