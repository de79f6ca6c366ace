// Copies KV blocks within the cache: copy-on-write. All sources are read before any destination is
// written, so a block may be one pair's source and another's destination.
//
// cache [planes, num_blocks, packs_per_block] of 16-byte packs: a plane is one layer's K or V
// pairs [num_pairs, 2]: source, destination
//
// Block (part, plane). A copy keeps a pack's place within its block, so pairs can meet only at one
// place: the thread that owns a place does it for every pair, first all its reads (asynchronous, into
// shared memory that no other thread touches), then all its writes. Needs num_pairs * blockDim.x * 16
// bytes of shared memory. Each copied byte moves once in and once out.

#include "nb/async_copy.cuh"
#include "nb/types.cuh"

__global__ void copy_blocks(void* cache, const nb::int64* __restrict__ pairs, int num_pairs,
                            nb::int64 num_blocks, nb::int64 packs_per_block) {
  using Pack = nb::Pack<unsigned char>;
  extern __shared__ uint4 shared_memory[];
  Pack* kept = reinterpret_cast<Pack*>(shared_memory) + threadIdx.x;

  const nb::int64 place = static_cast<nb::int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (place >= packs_per_block) return;
  Pack* plane = static_cast<Pack*>(cache) + blockIdx.y * num_blocks * packs_per_block + place;

  for (int pair = 0; pair < num_pairs; ++pair) {
    nb::cp_async_16(kept + pair * blockDim.x, plane + pairs[2 * pair] * packs_per_block);
  }
  nb::cp_async_commit();
  nb::cp_async_wait<0>();
  for (int pair = 0; pair < num_pairs; ++pair) {
    plane[pairs[2 * pair + 1] * packs_per_block] = kept[pair * blockDim.x];
  }
}
