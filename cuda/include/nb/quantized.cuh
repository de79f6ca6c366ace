// Weights in 4 or 8 bits. A row of K is padded to whole groups of 32.
//
// 4 bits: codes [N, K / 2] bytes, of k = 2b in the low half of byte b and of 2b + 1 in the high one;
//         scales [N, K / 32] pairs of halves, a scale and a minimum: weight = scale * code + minimum
// 8 bits: codes [N, K] signed bytes; scales [N] floats: weight = scale * code
//
// A weight is computed in float and rounded once. A code becomes a float without a conversion, of
// which a multiprocessor has few, by taking the place of some bits of a power of two:
// - 4 bits as the first of 16's fraction are 16 + code. The minimum is moved by 16 scales to suit:
//   exactly, unless it is less than 1/512 of the scale, and then by 2^-20 of the scale at most.
// - 8 bits as the last of 2^23's are 2^23 + 128 + code, from which 2^23 + 128 is taken off.

#pragma once

#include "nb/types.cuh"

namespace nb {

constexpr int kQuantizedGroup = 32;

// What turns the numbers that `Codes::number` gives for a group into weights.
struct Affine {
  float scale, offset;

  __device__ __forceinline__ float operator()(float number) const {
    return fmaf(scale, number, offset);
  }
};

// (bits & mask) | others, which the compiler would take two instructions for.
__device__ __forceinline__ uint32 masked_or(uint32 bits, uint32 mask, uint32 others) {
#ifdef NB_EMULATOR
  return (bits & mask) | others;
#else
  uint32 result;
  asm("lop3.b32 %0, %1, %2, %3, 0xEA;\n" : "=r"(result) : "r"(bits), "r"(mask), "r"(others));
  return result;
#endif
}

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
    const float scale = to_float(pair.items[0]);
    return {scale, fmaf(-16.0f, scale, to_float(pair.items[1]))};
  }
  // 16 + code i.
  static __device__ __forceinline__ float number(uint32 word, int i) {
    const int left = 19 - 4 * i;
    return __uint_as_float(
        masked_or(left > 0 ? word << left : word >> -left, 0x00780000u, 0x41800000u));
  }
};

template <>
struct Codes<signed char> {
  static constexpr int kBits = 8, kInWord = 4;

  static __device__ __forceinline__ Affine affine(const float* scales, int64 row, int, int) {
    return {scales[row], 0.0f};
  }
  // Code i.
  static __device__ __forceinline__ float number(uint32 word, int i) {
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
    weights[i] = affine(Codes<Byte>::number(words[i / kInWord], i % kInWord));
  }
}

}  // namespace nb
