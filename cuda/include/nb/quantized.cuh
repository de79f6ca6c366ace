// Weights in 4 or 8 bits. A row of K is padded to whole groups of 32.
//
// 4 bits: codes [N, K / 2] bytes, of k = 2b in the low half of byte b and of 2b + 1 in the high one;
//         scales [N, K / 32] pairs of halves, a scale and a minimum: weight = scale * code + minimum
// 8 bits: codes [N, K] signed bytes; scales [N] floats: weight = scale * code
//
// A weight is computed in float and rounded once. A code becomes a float without a conversion, of
// which a multiprocessor has few: as the last bits of 2^23, from which 2^23 is taken off again.

#pragma once

#include "nb/types.cuh"

namespace nb {

constexpr int kQuantizedGroup = 32;

// What turns the codes of a group into weights.
struct Affine {
  float scale, minimum;

  __device__ __forceinline__ float operator()(float code) const {
    return fmaf(scale, code, minimum);
  }
};

// By the type of a byte of codes.
template <typename Byte>
struct Codes;

template <>
struct Codes<unsigned char> {
  static constexpr int kBits = 4, kInWord = 8;

  static __device__ __forceinline__ Affine affine(const __half* scales, int64 row, int k,
                                                  int size_in) {
    const int groups = (size_in + kQuantizedGroup - 1) / kQuantizedGroup;
    const auto pair = load_pack<__half, 2>(scales + (row * groups + k / kQuantizedGroup) * 2);
    return {to_float(pair.items[0]), to_float(pair.items[1])};
  }
  static __device__ __forceinline__ float code(uint32 word, int i) {
    return __uint_as_float(0x4B000000u | (word >> (4 * i) & 15)) - 8388608.0f;
  }
};

template <>
struct Codes<signed char> {
  static constexpr int kBits = 8, kInWord = 4;

  static __device__ __forceinline__ Affine affine(const float* scales, int64 row, int, int) {
    return {scales[row], 0.0f};
  }
  static __device__ __forceinline__ float code(uint32 word, int i) {
    const uint32 from_zero = word ^ 0x80808080u;  // code + 128
    return __uint_as_float(__byte_perm(from_zero, 0x4B000000u, 0x7440 | i)) - 8388736.0f;
  }
};

// Bytes of a row of codes.
template <typename Byte>
__device__ __forceinline__ int64 row_bytes(int size_in) {
  const int groups = (size_in + kQuantizedGroup - 1) / kQuantizedGroup;
  return static_cast<int64>(groups) * (kQuantizedGroup * Codes<Byte>::kBits / 8);
}

// The eight weights whose codes are in these words.
template <typename Byte>
__device__ __forceinline__ void dequantize(float (&weights)[8],
                                           const uint32 (&words)[Codes<Byte>::kBits / 4],
                                           const Affine& affine) {
  constexpr int kInWord = Codes<Byte>::kInWord;
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    weights[i] = affine(Codes<Byte>::code(words[i / kInWord], i % kInWord));
  }
}

}  // namespace nb
