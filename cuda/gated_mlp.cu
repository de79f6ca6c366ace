// The gated activation between an MLP's two products (Shazeer 2020): out = act(gate) * up.
//
// gate_up [T, 2 * kSize]: a row's gates, then its ups
// out     [T, kSize]
//
// One thread for each 16-byte pack of out, over all rows in one line: no row width leaves threads
// idle. Moves 3 * kSize elements a row: two in, one out. Both activations are x * sigmoid(z), one
// exponential and one division an element, which stays below what the memory lets through.

#include "nb/types.cuh"

// x / (1 + e^-x).
struct Silu {
  static __device__ __forceinline__ float exponent(float x) { return x; }
};

// GELU by tanh (Hendrycks and Gimpel 2016): x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715
// x^3); and (1 + tanh(u)) / 2 is 1 / (1 + e^-2u).
struct GeluTanh {
  static __device__ __forceinline__ float exponent(float x) {
    return 1.5957691216057308f * (x + 0.044715f * x * x * x);
  }
};

template <typename T, typename Activation, int kSize, int kThreads>
__global__ void __launch_bounds__(kThreads)
    gated_mlp(T* __restrict__ out, const T* __restrict__ gate_up, nb::int64 num_tokens) {
  constexpr int kPack = nb::pack_size<T>(kSize);
  constexpr int kPacks = kSize / kPack;

  const nb::int64 item = static_cast<nb::int64>(blockIdx.x) * kThreads + threadIdx.x;
  const nb::int64 token = item / kPacks;
  if (token >= num_tokens) return;
  const int at = static_cast<int>(item % kPacks) * kPack;

  const T* row = gate_up + token * (2 * kSize) + at;
  float gates[kPack], ups[kPack];
  nb::load_floats(gates, row);
  nb::load_floats(ups, row + kSize);
#pragma unroll
  for (int j = 0; j < kPack; ++j) {
    ups[j] *= __fdividef(gates[j], 1.0f + expf(-Activation::exponent(gates[j])));
  }
  nb::store_floats(out + token * kSize + at, ups);
}
