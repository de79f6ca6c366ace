// Weights out of 4 or 8 bits: what a library's matrix product takes.
//
// out           [N, K], dense, K a multiple of 8
// codes, scales see nb/quantized.cuh
//
// One thread for eight neighbours, over all rows in one line. Moves the N * K elements of out, their
// codes (half a byte or one for each) and scales (an eighth of a byte for each, of 4 bits).

#include "nb/quantized.cuh"

template <typename T, typename Byte, typename Scale, int kThreads>
__global__ void __launch_bounds__(kThreads)
    dequantize(T* __restrict__ out, const Byte* __restrict__ codes,
               const Scale* __restrict__ scales, int size_out, int size_in) {
  constexpr int kBits = nb::Codes<Byte>::kBits;
  const nb::int64 item = static_cast<nb::int64>(blockIdx.x) * kThreads + threadIdx.x;
  const int packs = size_in / 8;
  const nb::int64 row = item / packs;
  if (row >= size_out) return;
  const int k = static_cast<int>(item % packs) * 8;

  const Byte* source = codes + row * nb::row_bytes<Byte>(size_in) + k * kBits / 8;
  const auto pack = nb::load_pack<nb::uint32, kBits / 4>(reinterpret_cast<const nb::uint32*>(source));
  float weights[8];
  nb::dequantize<Byte>(weights, pack.items, nb::Codes<Byte>::affine(scales, row, k, size_in));

  T* target = out + row * size_in + k;
  constexpr int kPack = nb::pack_size<T>(8);
#pragma unroll
  for (int i = 0; i < 8; i += kPack) {
    float part[kPack];
#pragma unroll
    for (int j = 0; j < kPack; ++j) part[j] = weights[i + j];
    nb::store_floats(target + i, part);
  }
}
