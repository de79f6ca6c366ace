// Element types, and rows moved 16 bytes at a time.
//
// Kernels are templates over T: float, __half or __nv_bfloat16. They load and store in T and compute
// in float. Indices that count elements of a whole tensor are `int64`: rows * width passes 2^31.

#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

namespace nb {

using int64 = long long;
using uint32 = unsigned int;
using uint64 = unsigned long long;

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__half x) { return __half2float(x); }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

template <typename T>
__device__ __forceinline__ T from_float(float x);
template <>
__device__ __forceinline__ float from_float<float>(float x) {
  return x;
}
template <>
__device__ __forceinline__ __half from_float<__half>(float x) {
  return __float2half_rn(x);
}
template <>
__device__ __forceinline__ __nv_bfloat16 from_float<__nv_bfloat16>(float x) {
  return __float2bfloat16_rn(x);
}

// What one thread moves with one instruction: 16 bytes, or N elements. (More than 16 bytes take
// several, and start at multiples of 16 like the others.)
template <typename T, int N = 16 / sizeof(T)>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Pack {
  static constexpr int size = N;
  T items[N];
};

// Elements in the widest pack of which rows of `size` elements are a whole number.
template <typename T>
__device__ constexpr int pack_size(int size) {
  int elements = 16 / sizeof(T);
  while (size % elements != 0) elements /= 2;
  return elements;
}

// `source` and `target` must be aligned as the pack is.
template <typename T, int N = 16 / sizeof(T)>
__device__ __forceinline__ Pack<T, N> load_pack(const T* source) {
  return *reinterpret_cast<const Pack<T, N>*>(source);
}
template <typename T, int N>
__device__ __forceinline__ void store_pack(T* target, const Pack<T, N>& pack) {
  *reinterpret_cast<Pack<T, N>*>(target) = pack;
}

// Two elements as they lie in memory, the first in the low half.
template <typename T>
__device__ __forceinline__ uint32 pair_from_floats(float first, float second);
template <>
__device__ __forceinline__ uint32 pair_from_floats<__half>(float first, float second) {
  const __half2 pair = __floats2half2_rn(first, second);
  return *reinterpret_cast<const uint32*>(&pair);
}
template <>
__device__ __forceinline__ uint32 pair_from_floats<__nv_bfloat16>(float first, float second) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(first, second);
  return *reinterpret_cast<const uint32*>(&pair);
}

// One 16-byte store to global memory. A compiler that sees through a pack may store its elements one
// by one instead.
__device__ __forceinline__ void store_words(uint32* target, const Pack<uint32, 4>& words) {
#ifdef NB_EMULATOR
  store_pack(target, words);
#else
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};\n" ::"l"(target), "r"(words.items[0]),
               "r"(words.items[1]), "r"(words.items[2]), "r"(words.items[3])
               : "memory");
#endif
}

// Packs from and to global memory, as the floats that kernels compute with.
template <typename T, int N>
__device__ __forceinline__ void load_floats(float (&values)[N], const T* source) {
  const Pack<T, N> pack = load_pack<T, N>(source);
#pragma unroll
  for (int j = 0; j < N; ++j) values[j] = to_float(pack.items[j]);
}
template <typename T, int N>
__device__ __forceinline__ void store_floats(T* target, const float (&values)[N]) {
  if constexpr (sizeof(T) == 2 && N % 2 == 0) {
    Pack<uint32, N / 2> pairs;
#pragma unroll
    for (int j = 0; j < N / 2; ++j) {
      pairs.items[j] = pair_from_floats<T>(values[2 * j], values[2 * j + 1]);
    }
    if constexpr (N == 8) {
      store_words(reinterpret_cast<uint32*>(target), pairs);
    } else {
      store_pack(reinterpret_cast<uint32*>(target), pairs);
    }
  } else {
    Pack<T, N> pack;
#pragma unroll
    for (int j = 0; j < N; ++j) pack.items[j] = from_float<T>(values[j]);
    store_pack(target, pack);
  }
}

// Like load_pack, for 16 bytes that no other thread reads and none writes during the launch: they
// take no place in the L1 from what is shared.
template <typename T>
__device__ __forceinline__ Pack<T> load_pack_once(const T* source) {
#ifdef NB_EMULATOR
  return load_pack(source);
#else
  uint4 words;
  asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
               : "l"(source));
  return *reinterpret_cast<const Pack<T>*>(&words);
#endif
}

// The 16 bytes that lie kOffset bytes after `source`. No other thread reads them and none writes them
// during the launch: they take no place in the L1, but bring their whole 128-byte line into the L2.
// The offset is part of the instruction, and the compiler may move the load.
template <int kOffset, typename T>
__device__ __forceinline__ Pack<T> load_pack_at(const T* source) {
#ifdef NB_EMULATOR
  return load_pack(source + kOffset / static_cast<int>(sizeof(T)));
#else
  uint4 words;
  asm("ld.global.nc.L1::no_allocate.L2::128B.v4.u32 {%0, %1, %2, %3}, [%4 + %5];\n"
      : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
      : "l"(source), "n"(kOffset));
  return *reinterpret_cast<const Pack<T>*>(&words);
#endif
}

}  // namespace nb
