// What the tensor cores of paged_attention_decode read: elements straight from memory, a lane's share
// of a row at a time.

#pragma once

#include "nb/mma.cuh"
#include "nb/types.cuh"

namespace nb::decode {

// Two neighbouring elements as they lie in memory, and as operands: the tensor cores take 16-bit
// elements, so that a float is the sum of three bfloat16, which hold all of its 24 bits.
template <typename T>
struct Operand {
  using Pair = uint32;
  using Element = T;
  static constexpr int kTerms = 1;
  uint32 terms[1];

  static __device__ __forceinline__ Operand of(Pair pair) { return {{pair}}; }
  static __device__ __forceinline__ Operand of(float first, float second) {
    return {{pair_from_floats<T>(first, second)}};
  }
  // The first (second) elements of two pairs.
  static __device__ __forceinline__ Operand firsts(Pair a, Pair b) {
    return {{__byte_perm(a, b, 0x5410)}};
  }
  static __device__ __forceinline__ Operand seconds(Pair a, Pair b) {
    return {{__byte_perm(a, b, 0x7632)}};
  }
};

template <>
struct Operand<float> {
  using Pair = Pack<float, 2>;
  using Element = __nv_bfloat16;
  static constexpr int kTerms = 3;
  uint32 terms[3];

  static __device__ __forceinline__ Operand of(float first, float second) {
    Operand operand;
#pragma unroll
    for (int i = 0; i < kTerms; ++i) {
      operand.terms[i] = Operand<Element>::of(first, second).terms[0];
      first -= to_float(from_float<Element>(first));
      second -= to_float(from_float<Element>(second));
    }
    return operand;
  }
  static __device__ __forceinline__ Operand of(Pair pair) {
    return of(pair.items[0], pair.items[1]);
  }
  static __device__ __forceinline__ Operand firsts(Pair a, Pair b) {
    return of(a.items[0], b.items[0]);
  }
  static __device__ __forceinline__ Operand seconds(Pair a, Pair b) {
    return of(a.items[1], b.items[1]);
  }
};

// d += a * b; of the products of terms, those above a float's last bit.
template <typename T>
__device__ __forceinline__ void multiply(float (&d)[4], const Operand<T> (&a)[4],
                                         const Operand<T> (&b)[2]) {
  constexpr int kTerms = Operand<T>::kTerms;
#pragma unroll
  for (int i = 0; i < kTerms; ++i) {
#pragma unroll
    for (int j = 0; i + j < kTerms; ++j) {
      const uint32 a_terms[4] = {a[0].terms[i], a[1].terms[i], a[2].terms[i], a[3].terms[i]};
      const uint32 b_terms[2] = {b[0].terms[j], b[1].terms[j]};
      mma_m16n8k16<typename Operand<T>::Element>(d, a_terms, b_terms);
    }
  }
}

// One lane's share of a row that kLanes lanes hold together: 16 bytes of each kLanes * 16, and of the
// rest of the row an equal part.
template <typename T, int kHeadDim, int kLanes>
struct Slice {
  using Pair = typename Operand<T>::Pair;
  static constexpr int kPairs = kHeadDim / kLanes / 2;
  static constexpr int kInPack = 16 / sizeof(Pair);
  static constexpr int kRest = kPairs % kInPack;
  static constexpr int kWhole = kPairs - kRest;
  static_assert(kPairs * 2 * kLanes == kHeadDim, "rows of whole pairs for each lane");

  Pair pairs[kPairs];

  // The first dimension of pair i of a lane; the second is the next.
  static __device__ __forceinline__ int dimension(int lane, int i) {
    return i < kWhole ? 2 * (i / kInPack * kInPack * kLanes + lane * kInPack + i % kInPack)
                      : 2 * (kWhole * kLanes + lane * kRest + i - kWhole);
  }

  // Where a lane's first pack of a row lies in it.
  static __device__ __forceinline__ int start(int lane) { return lane * kInPack * 2; }

  // From the row kRow rows after that of `at`, which is the row's address plus start(lane).
  template <int kRow = 0>
  __device__ __forceinline__ void load(const T* at, int lane) {
    load_packs<kRow * kHeadDim * static_cast<int>(sizeof(T)), 0>(reinterpret_cast<const Pair*>(at));
    if constexpr (kRest != 0) {
      const T* rest = at - start(lane) + kRow * kHeadDim + dimension(lane, kWhole);
      const auto pack = load_pack<Pair, kRest>(reinterpret_cast<const Pair*>(rest));
#pragma unroll
      for (int j = 0; j < kRest; ++j) pairs[kWhole + j] = pack.items[j];
    }
  }

  __device__ __forceinline__ void clear() {
#pragma unroll
    for (int i = 0; i < kPairs; ++i) pairs[i] = Pair{};
  }

 private:
  template <int kOffset, int kFirst>
  __device__ __forceinline__ void load_packs(const Pair* at) {
    if constexpr (kFirst < kWhole) {
      const auto pack = load_pack_at<kOffset>(at);
#pragma unroll
      for (int j = 0; j < kInPack; ++j) pairs[kFirst + j] = pack.items[j];
      load_packs<kOffset + 16 * kLanes, kFirst + kInPack>(at);
    }
  }
};

}  // namespace nb::decode
