// One row of logits read by one block of kRowThreads threads; its largest value, and where that is.
//
// A row's entries have places. Without a list of allowed ids the place of token `id` is
// `begin + id`, where `begin` (0 to 7) is how far the row's first element lies past a 16-byte
// boundary: so packs of 16 bytes start at places that are multiples of the pack's size, whatever the
// row's stride. With a list, place i is the token `ids[i]`, and the others do not exist. Either way
// places rise with ids.
//
// Each warp reads one contiguous segment of the places, a lane every 32nd pack of it.
//
// Masses are sums of weights exp((value - largest) / temperature) in units of 2^-39. Integers add up
// to the same in any order: a row's sums do not depend on which thread read what, and so not on where
// the row lies, and a tail of 100,000 small weights is not lost. A weight below 2^-40 (28 temperatures
// under the largest) counts as none.

#pragma once

#include "nb/fast_math.cuh"
#include "nb/reduce.cuh"
#include "nb/types.cuh"

namespace nb {

constexpr int kRowThreads = 512;
constexpr int kRowWarps = kRowThreads / kWarpSize;
constexpr float kLargestFloat = 3.402823466e+38f;
constexpr float kMassOfOne = 549755813888.0f;  // 2^39: the sum of 2^19 tokens stays below 2^58

__device__ __forceinline__ float not_a_number() { return __int_as_float(0x7fffffff); }

template <int N>
struct Values {
  static constexpr int size = N;
  float items[N];

  __device__ __forceinline__ float largest() const {
    float result = items[0];
#pragma unroll
    for (int j = 1; j < N; ++j) result = fmaxf(result, items[j]);
    return result;
  }
};

template <typename T>
struct LogitsRow {
  using Packed = Pack<T>;

  const T* base;  // of place 0
  const int64* ids;
  int begin, end;  // the row's places
  int vocab_size;

  // `ids` is null, or `num_ids` token ids, rising; those outside the vocabulary have logit -inf.
  __device__ LogitsRow(const T* logits, int vocab_size, const int64* ids, int num_ids)
      : base(logits), ids(ids), begin(0), end(num_ids), vocab_size(vocab_size) {
    if (ids == nullptr) {
      begin = static_cast<int>(reinterpret_cast<uint64>(logits) / sizeof(T) % Packed::size);
      end = begin + vocab_size;
      base = logits - begin;
    }
  }

  __device__ __forceinline__ int size() const { return end - begin; }

  __device__ __forceinline__ bool contains(int place) const {
    return begin <= place && place < end;
  }

  __device__ __forceinline__ bool has(int64 id) const { return 0 <= id && id < vocab_size; }

  // Of a place of the row; an id below the vocabulary size in any case.
  __device__ __forceinline__ int64 id_at(int place) const {
    if (ids == nullptr) return place - begin;
    return has(ids[place]) ? ids[place] : 0;
  }

  __device__ __forceinline__ float value_at(int place) const {
    if (ids == nullptr) return to_float(base[place]);
    return has(ids[place]) ? to_float(base[ids[place]]) : -infinity();
  }

  // Places of one warp's segment: whole packs for every lane.
  __device__ __forceinline__ int segment_size() const {
    constexpr int kStep = kWarpSize * Packed::size;
    return (end + kRowWarps * kStep - 1) / (kRowWarps * kStep) * kStep;
  }

  // Calls visit(place, values) with the Values of consecutive places, until all were seen once. Where a
  // pack reaches over the row's ends, the values outside are -inf. A thread has kInFlight elements in
  // flight, in independent loads; more take registers and code.
  template <int kInFlight, typename Visit>
  __device__ __forceinline__ void for_each_pack(Visit visit) const {
    const int lane = threadIdx.x % kWarpSize;
    const int first = threadIdx.x / kWarpSize * segment_size();
    const int last = min(first + segment_size(), end);
    if (ids != nullptr) {
      for (int place = first + lane; place < last; place += kWarpSize) {
        visit(place, Values<1>{{value_at(place)}});
      }
      return;
    }
    constexpr int kPacks = kInFlight / Packed::size;
    constexpr int kStep = kWarpSize * Packed::size;
    for (int start = first + lane * Packed::size; start < last; start += kPacks * kStep) {
      Packed packs[kPacks];
#pragma unroll
      for (int i = 0; i < kPacks; ++i) packs[i] = pack_at(start + i * kStep, last);
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        if (i > 0 && start + i * kStep >= last) break;  // another warp's
        Values<Packed::size> values;
#pragma unroll
        for (int j = 0; j < Packed::size; ++j) values.items[j] = to_float(packs[i].items[j]);
        visit(start + i * kStep, values);
      }
    }
  }

  // Calls visit(place, value) for every place, and perhaps for places beside the row, with -inf.
  template <typename Visit>
  __device__ __forceinline__ void for_each(Visit visit) const {
    for_each_pack<Packed::size>([&](int place, const auto& values) {
#pragma unroll
      for (int j = 0; j < values.size; ++j) visit(place + j, values.items[j]);
    });
  }

  // `place` is a multiple of the pack's size; places outside [begin, last) read as -inf.
  __device__ __forceinline__ Packed pack_at(int place, int last) const {
    if (begin <= place && place + Packed::size <= last) return load_pack(base + place);
    Packed pack;
#pragma unroll
    for (int j = 0; j < Packed::size; ++j) {
      const bool inside = begin <= place + j && place + j < last;
      pack.items[j] = inside ? base[place + j] : from_float<T>(-infinity());
    }
    return pack;
  }
};

// The weight of a logit, as a mass.
struct Weight {
  float largest;
  float scale;  // log2(e) / temperature

  __device__ __forceinline__ uint64 operator()(float value) const {
    return static_cast<uint64>(exp2_fast((value - largest) * scale) * kMassOfOne + 0.5f);
  }
};

struct RowSummary {
  float largest;    // NaN where any value is
  int place;        // of the largest number, the first of equals
  float of_thread;  // the largest number that this thread has seen
};

struct SummaryMemory {
  float largest[kRowWarps];
  int place[kRowWarps];
};

// One read of the row. All threads must call this and get the same but for `of_thread`. also(value)
// is called for each value.
template <typename T, typename Also>
__device__ RowSummary summarise(const LogitsRow<T>& row, SummaryMemory& memory, Also also) {
  float largest = -infinity();
  int place = row.begin;
  bool nan = false;
  row.template for_each_pack<16>([&](int at, const auto& values) {
    const float of_pack = values.largest();
    if (of_pack > largest) {
      largest = of_pack;
      place = at;
    }
#pragma unroll
    for (int j = 0; j < values.size; ++j) {
      nan |= values.items[j] != values.items[j];
      also(values.items[j]);
    }
  });
  if (largest > -infinity()) {  // the first of the pack that equals it
    while (!row.contains(place) || row.value_at(place) != largest) ++place;
  }

  RowSummary result{largest, place, largest};
  const auto merge = [&](float other, int other_place) {
    if (other > result.largest || (other == result.largest && other_place < result.place)) {
      result.largest = other;
      result.place = other_place;
    }
  };
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, result.largest, distance);
    const int other_place = __shfl_xor_sync(kAllLanes, result.place, distance);
    merge(other, other_place);
  }
  const int warp = threadIdx.x / kWarpSize;
  if (threadIdx.x % kWarpSize == 0) {
    memory.largest[warp] = result.largest;
    memory.place[warp] = result.place;
  }
  nan = __syncthreads_or(nan);
  for (int other = 0; other < kRowWarps; ++other) {
    merge(memory.largest[other], memory.place[other]);
  }
  if (nan) result.largest = not_a_number();
  return result;
}

}  // namespace nb
