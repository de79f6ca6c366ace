// Exact selection among the entries of a row by one block of kRowThreads threads, without sorting
// the row.
//
// A source of entries is a `LogitsRow` or the `Candidates` gathered from one: anything with
// for_each(visit). `radix_select` finds the key at which the counts or masses of the entries with
// larger keys reach a goal: the k-th largest value, or the edge of a nucleus. It reads its source
// two or three times, so for rows the few largest values are gathered first: the k-th largest of the
// threads' maxima is a lower bound of the k-th largest value, and hardly more than k values reach it.
// Results depend on the values alone: bins hold integers, and candidates are sorted.

#pragma once

#include "nb/logits_row.cuh"

namespace nb {

constexpr int kCapacity = kRowThreads;  // candidates: one for each thread
constexpr int kMostByThreads = kRowThreads / 2;  // the largest k for which candidates are tried
constexpr int kBins = 2048;
constexpr int kDigits = 3;  // of a mass, 13 bits each: bins of 32 bits hold the sum of 2^19 of them
constexpr int kDigitBits = 13;

// Rises with the value; the zeros are one. Those of NaN are outside of [key(-inf), key(+inf)].
__device__ __forceinline__ uint32 key_of(float value) {
  const uint32 bits = __float_as_uint(value + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float value_of(uint32 key) {
  return __uint_as_float(key >> 31 ? key & 0x7fffffffu : ~key);
}

// A key that at least k threads' values reach, and hardly more: the k-th largest, less its low bits
// (and so perhaps none of a number, below that of -inf). 1 <= k <= kRowThreads.
__device__ __forceinline__ uint32 reached_by(int k, float value) {
  constexpr int kLowBits = 12;
  const uint32 key = key_of(value);
  uint32 found = 0;
  for (int bit = 31; bit >= kLowBits; --bit) {
    const uint32 tried = found | 1u << bit;
    if (__syncthreads_count(key >= tried) >= k) found = tried;
  }
  return found;
}

struct ScanMemory {
  uint64 of_warp[kRowWarps];
};

// The sum of the threads' values before this thread's, and of all. `memory` may be in use until the
// call.
__device__ __forceinline__ uint64 exclusive_scan(uint64 value, uint64& total, ScanMemory& memory) {
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const uint64 sum = warp_sum_up_to(value, lane);
  __syncthreads();
  if (lane == kWarpSize - 1) memory.of_warp[warp] = sum;
  __syncthreads();
  uint64 before = sum - value;
  total = 0;
  for (int other = 0; other < kRowWarps; ++other) {
    if (other == warp) before += total;
    total += memory.of_warp[other];
  }
  return before;
}

// Up to kCapacity entries, sorted as 64-bit numbers: what decides in the high half.
struct Candidates {
  uint64 entries[kCapacity];
  int count;  // of those that asked for a slot: above kCapacity, some are missing

  // Before the first `add`, and after the last.
  __device__ __forceinline__ void clear() {
    __syncthreads();
    if (threadIdx.x == 0) count = 0;
    __syncthreads();
  }
  __device__ __forceinline__ void add(uint32 high, uint32 low) {
    const int slot = atomicAdd(&count, 1);
    if (slot < kCapacity) entries[slot] = static_cast<uint64>(high) << 32 | low;
  }
  __device__ __forceinline__ bool complete() {
    __syncthreads();
    return count <= kCapacity;
  }

  // Bitonic (Batcher 1968), rising, over the next power of two. The candidates must be complete.
  __device__ __forceinline__ void sort() {
    int size = 1;
    while (size < count) size *= 2;
    const int at = threadIdx.x;
    if (count <= at && at < size) entries[at] = ~0ull;
    __syncthreads();
    for (int span = 2; span <= size; span *= 2) {
      for (int distance = span / 2; distance > 0; distance /= 2) {
        const int other = at ^ distance;
        if (at < other && other < size) {
          const uint64 a = entries[at], b = entries[other];
          if ((a > b) == ((at & span) == 0)) {
            entries[at] = b;
            entries[other] = a;
          }
        }
        __syncthreads();
      }
    }
  }
};

// Candidates with their place in the high half and their value in the low one, as a source.
struct ByPlace {
  const Candidates& candidates;

  __device__ __forceinline__ int size() const { return candidates.count; }
  __device__ __forceinline__ float value_at(int at) const {
    return __uint_as_float(static_cast<uint32>(candidates.entries[at]));
  }
  __device__ __forceinline__ int place_at(int at) const {
    return static_cast<int>(candidates.entries[at] >> 32);
  }
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    const int at = threadIdx.x;
    if (at < size()) visit(place_at(at), value_at(at));
  }
};

struct SelectMemory {
  uint32 bins[kDigits][kBins];
  ScanMemory scan;
  int crossing;
  uint64 above;
};

struct One {
  __device__ __forceinline__ uint64 operator()(float) const { return 1; }
};

// The largest key in [low, high] such that the entries with keys from it to `high` measure `goal` or
// more; `low` where all of them measure less. key(place, value) -> uint32; measure(value) is a
// count (kMasses false) or a mass. All threads call this and get the same.
template <bool kMasses, typename Source, typename Key, typename Measure>
__device__ __noinline__ uint32 radix_select(Source source, uint32 low, uint32 high, uint64 goal, Key key,
                               Measure measure, SelectMemory& memory) {
  constexpr int kUsed = kMasses ? kDigits : 1;
  constexpr int kPerThread = kBins / kRowThreads;
  constexpr uint64 kDigitMask = (1ull << kDigitBits) - 1;
  uint64 above = 0;  // what the entries with keys over `high` measure
  while (low < high) {
    // The fewest low bits to leave out, so that the rest of [0, high - low] are bins; from the top.
    const int shift = max(0, 32 - __clz(high - low) - 11);
    for (int bin = threadIdx.x; bin < kBins; bin += kRowThreads) {
#pragma unroll
      for (int digit = 0; digit < kUsed; ++digit) memory.bins[digit][bin] = 0;
    }
    if (threadIdx.x == 0) memory.crossing = -1;
    __syncthreads();
    source.for_each([&](int place, float value) {
      const uint32 of_entry = key(place, value);
      if (of_entry < low || of_entry > high) return;
      const uint32 bin = (high - of_entry) >> shift;
      if constexpr (kMasses) {
        const uint64 mass = measure(value);
#pragma unroll
        for (int digit = 0; digit < kDigits; ++digit) {
          // The highest digit takes all that is left: 2^13 for a weight of one.
          uint32 part = static_cast<uint32>(mass >> (digit * kDigitBits));
          if (digit < kDigits - 1) part &= static_cast<uint32>(kDigitMask);
          if (part != 0) atomicAdd(&memory.bins[digit][bin], part);
        }
      } else {
        atomicAdd(&memory.bins[0][bin], 1u);
      }
    });
    __syncthreads();
    const auto measured = [&](int bin) {
      uint64 sum = 0;
#pragma unroll
      for (int digit = 0; digit < kUsed; ++digit) {
        sum += static_cast<uint64>(memory.bins[digit][bin]) << (digit * kDigitBits);
      }
      return sum;
    };
    const int first = threadIdx.x * kPerThread;
    uint64 mine = 0, total;
#pragma unroll
    for (int i = 0; i < kPerThread; ++i) mine += measured(first + i);
    uint64 before = above + exclusive_scan(mine, total, memory.scan);
    if (before < goal && goal <= before + mine) {
      int bin = first;
      while (before + measured(bin) < goal) before += measured(bin++);
      memory.crossing = bin;
      memory.above = before;
    }
    __syncthreads();
    const int crossing = memory.crossing;
    if (crossing < 0) return low;
    above = memory.above;
    __syncthreads();
    high -= static_cast<uint32>(crossing) << shift;
    const uint32 width = static_cast<uint32>((1ull << shift) - 1);
    low = high - low > width ? high - width : low;
  }
  return low;
}

}  // namespace nb
