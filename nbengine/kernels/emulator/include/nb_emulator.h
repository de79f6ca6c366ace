// The prelude of every emulated kernel: CUDA C's words for the system's C++ compiler.
//
// Included before the kernel's own text, which is compiled as it stands. NVIDIA's headers bring the
// half, bfloat16 and vector types.

#pragma once

#define NB_EMULATOR 1

#include "nb_emulator_keywords.h"

#include <math.h>

#include <cfloat>
#include <climits>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>
#include <limits>
#include <type_traits>

#include "nb_emulator_runtime.h"

#include <vector_types.h>

// NVIDIA's headers take numbers apart with memcpy, between variables of their own. Those copies the
// compiler may do in place; a kernel's are calls, so that they can be looked at.
namespace std {
__forceinline__ void* nb_memcpy(void* target, const void* source, size_t bytes) {
  return __builtin_memcpy(target, source, bytes);
}
}  // namespace std
using std::nb_memcpy;
#define memcpy nb_memcpy

#include <cuda_fp16.h>

#include <cuda_bf16.h>

#undef memcpy

constexpr int warpSize = 32;

#include "nb_emulator_warp.h"

#include "nb_emulator_atomic.h"

#include "nb_emulator_math.h"

#include "nb_emulator_half.h"

namespace nb_emulator {
inline uint3 as_uint3(Index index) { return uint3{index.x, index.y, index.z}; }
inline dim3 as_dim3(Index index) { return dim3(index.x, index.y, index.z); }
}  // namespace nb_emulator

#define threadIdx (::nb_emulator::as_uint3(::nb_emulator::thread_index()))
#define blockIdx (::nb_emulator::as_uint3(::nb_emulator::block_index()))
#define blockDim (::nb_emulator::as_dim3(::nb_emulator::block_size()))
#define gridDim (::nb_emulator::as_dim3(::nb_emulator::grid_size()))

inline long long clock64() { return nb_emulator::nanoseconds(); }
inline void __nanosleep(unsigned) {}
__forceinline__ void __trap(NB_CALLER) { nb_emulator::blame("trap", NB_HERE, "__trap() was called"); }
#define __builtin_assume(condition) ((void)0)
#define __assume(condition) ((void)0)

// By whatever name it is called.
using nb_emulator::nb_printf;
namespace std {
using nb_emulator::nb_printf;
}
#define printf nb_printf

#include "assert.h"

// CUDA's compiler takes alignas among the specifiers of a declaration, in any place.
namespace nb_emulator {
template <size_t bytes>
constexpr size_t alignment() {
  return bytes;
}
template <typename T>
constexpr size_t alignment() {
  return alignof(T);
}
}  // namespace nb_emulator
#define alignas(...) __attribute__((aligned(::nb_emulator::alignment<__VA_ARGS__>())))
