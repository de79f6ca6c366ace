// Asynchronous copies from global to shared memory (cp.async, sm_80 and later).
//
// A thread issues copies, closes them into a group with cp_async_commit(), and may rely on its own
// copies after cp_async_wait<n>() has let all but its latest n groups finish. Other threads see them
// after a barrier that follows the wait.

#pragma once

#include "nb/types.cuh"

#ifdef NB_EMULATOR
#include "nb_emulator_async_copy.h"
#else

namespace nb {

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

// 16 bytes, past the L1 cache; both addresses are multiples of 16. Where `valid` is false nothing is
// read and zeros are written.
__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  const int bytes = valid ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;\n" ::"r"(shared_address(shared)),
               "l"(global), "r"(bytes)
               : "memory");
}

__device__ __forceinline__ void cp_async_commit() {
  asm volatile("cp.async.commit_group;\n" ::: "memory");
}

template <int kGroupsInFlight>
__device__ __forceinline__ void cp_async_wait() {
  asm volatile("cp.async.wait_group %0;\n" ::"n"(kGroupsInFlight) : "memory");
}

}  // namespace nb

#endif
