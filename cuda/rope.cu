// Rotary position embedding: out[t, h, :] = x[t, h, :] turned by the angles of positions[t].
//
// x, out     [T, num_heads, kHeadDim], rows of `x_stride` and `out_stride` elements; out may be x
// positions  [T]
// table      [max_positions, 2, kHeadDim] of T or float, see nb/rotate.cuh
//
// Block (t, part): each of its kThreads threads takes one 16-byte pack of the lower half of a head
// and its partner in the upper half. Moves x in and out once; a token's 2 * kHeadDim table entries
// are shared by its heads and come from the L1.

#include "nb/rotate.cuh"
#include "nb/types.cuh"

template <typename T, typename Table, int kHeadDim, int kThreads>
__global__ void __launch_bounds__(kThreads)
    rope(T* out, const T* x, const nb::int64* __restrict__ positions,
         const Table* __restrict__ table, int num_heads, nb::int64 x_stride,
         nb::int64 out_stride) {
  constexpr int kHalf = kHeadDim / 2;
  constexpr int kPack = nb::pack_size<T>(kHalf);
  constexpr int kPacks = kHalf / kPack;

  const nb::int64 token = blockIdx.x;
  const int item = blockIdx.y * kThreads + threadIdx.x;
  const int head = item / kPacks;
  const int at = item % kPacks * kPack;
  if (head >= num_heads) return;
  x += token * x_stride + head * kHeadDim + at;
  out += token * out_stride + head * kHeadDim + at;

  const nb::int64 position = positions[token];
  float low[kPack], high[kPack];
  nb::load_floats(low, x);
  nb::load_floats(high, x + kHalf);
  nb::rotate(low, high, nb::load_angles<kHeadDim, kPack>(table + position * (2 * kHeadDim), at));
  nb::store_floats(out, low);
  nb::store_floats(out + kHalf, high);
}
