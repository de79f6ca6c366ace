// Philox4x32-10 (Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC'11,
// section 3.3 and table 2): random words as a pure function of a key and a counter, so that a token's
// randomness is the same alone and in any batch, and there is no state to keep.

#pragma once

#include "nb/types.cuh"

namespace nb {

// A uniform number in [0, 1) as its 53 random bits, for a request's 64-bit seed (the key), the index
// of one of its samples and the position of the token (the counter).
__device__ __forceinline__ uint64 uniform_bits(uint64 seed, uint64 sample, uint64 position) {
  uint32 key0 = static_cast<uint32>(seed), key1 = static_cast<uint32>(seed >> 32);
  uint32 even0 = static_cast<uint32>(position), odd0 = static_cast<uint32>(position >> 32);
  uint32 even1 = static_cast<uint32>(sample), odd1 = static_cast<uint32>(sample >> 32);
#pragma unroll
  for (int round = 0; round < 10; ++round) {
    const uint64 product0 = 0xD2511F53ull * even0;
    const uint64 product1 = 0xCD9E8D57ull * even1;
    even0 = static_cast<uint32>(product1 >> 32) ^ odd0 ^ key0;
    even1 = static_cast<uint32>(product0 >> 32) ^ odd1 ^ key1;
    odd0 = static_cast<uint32>(product1);
    odd1 = static_cast<uint32>(product0);
    key0 += 0x9E3779B9u;
    key1 += 0xBB67AE85u;
  }
  // The words are (even0, odd0, even1, odd1); the first two make the number.
  return (static_cast<uint64>(even0 >> 5) << 26) | (odd0 >> 6);
}

}  // namespace nb
