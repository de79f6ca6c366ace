// Copies KV blocks between two caches, one on the device and one in pinned host memory, which the
// kernel reads or writes in place over the bus.
//
// source [planes, source_blocks, packs_per_block] of 16-byte packs: a plane is one layer's K or V
// target [planes, target_blocks, packs_per_block]
// pairs  [num_pairs, 2]: a block of source, a block of target
//
// Block (part, plane, pair); a thread moves one pack, so a warp asks the bus for 512 contiguous bytes,
// and the blocks resident on one multiprocessor keep 32 KiB in flight (a bus of 60 GB/s and 2 us needs
// 120 KB in all). Each swapped byte crosses the bus once.

#include "nb/types.cuh"

template <int kThreads>
__global__ void __launch_bounds__(kThreads)
    swap_blocks(const void* __restrict__ source, void* __restrict__ target,
                const nb::int64* __restrict__ pairs, nb::int64 source_blocks,
                nb::int64 target_blocks, nb::int64 packs_per_block) {
  using Pack = nb::Pack<unsigned char>;
  const nb::int64 place = static_cast<nb::int64>(blockIdx.x) * kThreads + threadIdx.x;
  if (place >= packs_per_block) return;
  const nb::int64 plane = blockIdx.y;
  const nb::int64 from = plane * source_blocks + pairs[2 * blockIdx.z];
  const nb::int64 to = plane * target_blocks + pairs[2 * blockIdx.z + 1];
  static_cast<Pack*>(target)[to * packs_per_block + place] =
      static_cast<const Pack*>(source)[from * packs_per_block + place];
}
