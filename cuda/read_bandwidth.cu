// How fast device memory can be read: the ceiling that a memory-bound kernel is measured against.
//
//   sinks[warp] = XOR over all words of source that the warp reads
//
// source  [num_words] int, a multiple of 4 * kThreads * kLoads; several times the L2 in size
// sinks   [gridDim.x * kThreads / 32] int: one word a warp, so that no load can be left out
//
// Blocks of kThreads walk over tiles of kLoads 16-byte packs a thread; a tile's loads are independent
// and all in flight at once. Bytes: source once; the sinks are less than a thousandth of it.

#include "nb/reduce.cuh"
#include "nb/types.cuh"

template <int kThreads, int kLoads>
__global__ void __launch_bounds__(kThreads)
    read_bandwidth(const int* __restrict__ source, int* sinks, nb::int64 num_words) {
  using Pack = nb::Pack<int>;
  constexpr int kTile = kThreads * kLoads * Pack::size;
  int mix = 0;
  for (nb::int64 tile = nb::int64(blockIdx.x) * kTile; tile < num_words;
       tile += nb::int64(gridDim.x) * kTile) {
    Pack packs[kLoads];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      packs[i] = nb::load_pack(source + tile + (i * kThreads + threadIdx.x) * Pack::size);
    }
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
#pragma unroll
      for (int j = 0; j < Pack::size; ++j) mix ^= packs[i].items[j];
    }
  }
#pragma unroll
  for (int distance = nb::kWarpSize / 2; distance > 0; distance /= 2) {
    mix ^= __shfl_xor_sync(nb::kAllLanes, mix, distance);
  }
  if (threadIdx.x % nb::kWarpSize == 0) {
    sinks[(blockIdx.x * kThreads + threadIdx.x) / nb::kWarpSize] = mix;
  }
}
