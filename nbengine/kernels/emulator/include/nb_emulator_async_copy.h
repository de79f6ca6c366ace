// cp.async for the emulator: what nb/async_copy.cuh says. The data arrives at the wait and no sooner,
// so that a kernel which does not wait is seen to read what was there before.

#pragma once

namespace nb {

__device__ __forceinline__ uint32 shared_address(const void* pointer) {
  return static_cast<uint32>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ void cp_async_16(void* shared, const void* global, bool valid = true) {
  nb_emulator::async_copy(shared, global, 16, valid ? 16 : 0);
}

__device__ __forceinline__ void cp_async_commit() { nb_emulator::async_commit(); }

template <int kGroupsInFlight>
__device__ __forceinline__ void cp_async_wait() {
  nb_emulator::async_wait(kGroupsInFlight);
}

}  // namespace nb
