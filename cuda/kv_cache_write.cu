// From the projection to attention: norms on q and k, rotary embedding, and the write into the paged
// cache, in one pass over q, k and v.
//
//   q[t, h, :]                             = rope(norm(qkv[t, h, :]))            h < num_q
//   k_cache[block, h, offset, :]           = rope(norm(qkv[t, num_q + h, :]))    h < num_kv
//   v_cache[block, h, offset, :]           = qkv[t, num_q + num_kv + h, :]       h < num_kv
//
// with slot_mapping[t] = block * kBlockSize + offset; of a row with a negative slot (padding of a
// captured batch) neither k nor v is written. The norm, where kNorm, is RMSNorm over each head.
//
// qkv               [T, num_q + 2 * num_kv, kHeadDim], rows of `qkv_stride` elements
// q                 [T, num_q, kHeadDim], dense
// k_cache, v_cache  [num_blocks, num_kv, kBlockSize, kHeadDim]
// positions         [T]; table [max_positions, 2, kHeadDim] of T or float, see nb/rotate.cuh
// qk_weight         [num_q + num_kv, kHeadDim] float
//
// Block (t, part) takes kThreads / kLanes heads of a token. kLanes lanes, a power of two, take a
// head: each one 16-byte pack of the lower half and its partner in the upper half, so that a pair to
// turn meets in one thread and a head's norm is a reduction among neighbours. Each byte of q, k and v
// moves once in and once out.

#include "nb/reduce.cuh"
#include "nb/rotate.cuh"
#include "nb/types.cuh"

template <typename T, typename Table, int kHeadDim, int kBlockSize, int kLanes, int kThreads,
          bool kNorm>
__global__ void __launch_bounds__(kThreads)
    kv_cache_write(T* q, T* k_cache, T* v_cache, const T* __restrict__ qkv,
                   const nb::int64* __restrict__ positions, const Table* __restrict__ table,
                   const nb::int64* __restrict__ slot_mapping, const float* __restrict__ qk_weight,
                   int num_q, int num_kv, nb::int64 qkv_stride, float eps) {
  constexpr int kHalf = kHeadDim / 2;
  constexpr int kPack = nb::pack_size<T>(kHalf);
  static_assert(kLanes * kPack >= kHalf && kLanes <= nb::kWarpSize, "a head is one pass of its lanes");

  const nb::int64 token = blockIdx.x;
  const int head = blockIdx.y * (kThreads / kLanes) + threadIdx.x / kLanes;
  const int at = threadIdx.x % kLanes * kPack;
  const bool is_active = at < kHalf && head < num_q + 2 * num_kv;  // others join the reduction
  const bool is_value = head >= num_q + num_kv;

  // All loads before the first use: at small batches this kernel is the time they take.
  const nb::int64 position = positions[token], slot = slot_mapping[token];
  float low[kPack] = {}, high[kPack] = {};
  float low_weight[kPack], high_weight[kPack];
  nb::Angles<kPack> angles;
  if (is_active) {
    const T* source = qkv + token * qkv_stride + head * kHeadDim + at;
    nb::load_floats(low, source);
    nb::load_floats(high, source + kHalf);
    if (!is_value) {
      if constexpr (kNorm) {
        nb::load_floats(low_weight, qk_weight + head * kHeadDim + at);
        nb::load_floats(high_weight, qk_weight + head * kHeadDim + kHalf + at);
      }
      angles = nb::load_angles<kHeadDim, kPack>(table + position * (2 * kHeadDim), at);
    }
  }
  if constexpr (kNorm) {
    float sum = 0.0f;
#pragma unroll
    for (int j = 0; j < kPack; ++j) sum += low[j] * low[j] + high[j] * high[j];
    sum = nb::warp_reduce<nb::Sum, kLanes>(sum, nb::Sum());
    const float scale = rsqrtf(sum * (1.0f / kHeadDim) + eps);
    if (!is_value) {
#pragma unroll
      for (int j = 0; j < kPack; ++j) {
        low[j] *= scale * low_weight[j];
        high[j] *= scale * high_weight[j];
      }
    }
  }
  if (!is_active) return;
  if (!is_value) nb::rotate(low, high, angles);

  T* target;
  if (head < num_q) {
    target = q + (token * num_q + head) * kHeadDim;
  } else {
    if (slot < 0) return;
    const nb::int64 block = slot / kBlockSize, offset = slot % kBlockSize;
    T* cache = is_value ? v_cache : k_cache;
    const int kv_head = head - (is_value ? num_q + num_kv : num_q);
    target = cache + ((block * num_kv + kv_head) * kBlockSize + offset) * kHeadDim;
  }
  nb::store_floats(target + at, low);
  nb::store_floats(target + kHalf + at, high);
}
