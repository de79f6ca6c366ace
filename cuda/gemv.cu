// Products of a few rows with a weight matrix: out = x @ weight^T + bias + residual, 1 <= M <= 16.
//
// x        [M, K], rows of `x_stride` elements
// weight   [N, K], dense
// bias     [N] or null; residual [M, N] or null, out itself if you like
// out      [M, N]; sums in float, rounded once
//
// What counts is the weight: N * K elements, read once. At M rows an element of 2 bytes takes 2 * M
// FLOPs; a GPU that reads 3 to 5 TB/s sees 1.5 to 2.4e12 elements a second, for each of which its
// ordinary lanes have some 12 to 19 instructions. Unpacking and M multiply-adds fill those by M = 8;
// tensor cores need two instructions for 512 elements whatever M is, so for 16-bit types all M go
// there, and a row's result is the same at every M.
//
// gemv: a block takes 16 rows of the weight (the mma's A operand), x is B with its rows as columns. A
// lane's fragment of A is 8 elements of a weight row; as the order of k within a product is free, these
// are 8 neighbours, one 16-byte load straight into the registers that the mma reads, and x is read in
// the same order. The warps take turns at chunks of kChunk of k, so that a block reads each row as one
// stream; each lane keeps 2 * kUnroll loads of weights in flight. At the end the warps' sums meet in
// shared memory and are added in order. Rows of x or weight past the end repeat the last and are
// dropped.
//
// gemv_float: the same without tensor cores, which would round float32. A warp for each weight row.

#include "nb/mma.cuh"
#include "nb/reduce.cuh"
#include "nb/types.cuh"

template <typename T>
__device__ __forceinline__ void finish(T* out, const T* bias, const T* residual, nb::int64 at, int n,
                                       float sum) {
  if (bias != nullptr) sum += nb::to_float(bias[n]);
  if (residual != nullptr) sum += nb::to_float(residual[at]);
  out[at] = nb::from_float<T>(sum);
}

// kColumnTiles * 8 >= num_rows.
template <typename T, int kWarps, int kColumnTiles>
__global__ void __launch_bounds__(kWarps * 32)
    gemv(T* out, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
         const T* residual, int num_rows, int size_out, int size_in, nb::int64 x_stride) {
  using Words = nb::Pack<nb::uint32>;  // 8 elements, as four registers of a fragment
  constexpr int kTile = 16;            // weight rows
  constexpr int kStep = 32;            // of k, in one load by each of a row's four lanes
  constexpr int kUnroll = 4;
  constexpr int kChunk = kUnroll * kStep;
  constexpr int kStride = kTile + 4;  // so that a fragment's rows lie in different banks
  __shared__ float partials[kWarps][kColumnTiles * 8][kStride];

  const int warp = threadIdx.x / nb::kWarpSize, lane = threadIdx.x % nb::kWarpSize;
  const int group = lane / 4, k_of_lane = lane % 4 * 8;
  const int first = blockIdx.x * kTile;
  const T* upper = weight + static_cast<nb::int64>(min(first + group, size_out - 1)) * size_in;
  const T* lower = weight + static_cast<nb::int64>(min(first + group + 8, size_out - 1)) * size_in;
  const T* columns[kColumnTiles];
#pragma unroll
  for (int tile = 0; tile < kColumnTiles; ++tile) {
    columns[tile] = x + min(tile * 8 + group, num_rows - 1) * x_stride;
  }

  float sums[kColumnTiles][4] = {};
  for (int chunk = warp * kChunk + k_of_lane; chunk < size_in; chunk += kWarps * kChunk) {
    Words a[kUnroll][2] = {}, b[kUnroll][kColumnTiles] = {};
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int k = chunk + i * kStep;
      if (k >= size_in) continue;
      a[i][0] = nb::load_pack_once(reinterpret_cast<const nb::uint32*>(upper + k));
      a[i][1] = nb::load_pack_once(reinterpret_cast<const nb::uint32*>(lower + k));
#pragma unroll
      for (int tile = 0; tile < kColumnTiles; ++tile) {
        b[i][tile] = nb::load_pack(reinterpret_cast<const nb::uint32*>(columns[tile] + k));
      }
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
#pragma unroll
      for (int half = 0; half < 4; half += 2) {
        const nb::uint32 fragment[4] = {a[i][0].items[half], a[i][1].items[half],
                                        a[i][0].items[half + 1], a[i][1].items[half + 1]};
#pragma unroll
        for (int tile = 0; tile < kColumnTiles; ++tile) {
          const nb::uint32 column[2] = {b[i][tile].items[half], b[i][tile].items[half + 1]};
          nb::mma_m16n8k16<T>(sums[tile], fragment, column);
        }
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < kColumnTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      partials[warp][tile * 8 + lane % 4 * 2 + i % 2][group + i / 2 * 8] = sums[tile][i];
    }
  }
  __syncthreads();
  for (int item = threadIdx.x; item < num_rows * kTile; item += kWarps * nb::kWarpSize) {
    const int row = item / kTile, column = item % kTile;
    if (first + column >= size_out) continue;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += partials[i][row][column];
    finish(out, bias, residual, static_cast<nb::int64>(row) * size_out + first + column,
           first + column, sum);
  }
}

// kRows >= num_rows.
template <typename T, int kWarps, int kRows>
__global__ void __launch_bounds__(kWarps * 32)
    gemv_float(T* out, const T* __restrict__ x, const T* __restrict__ weight,
               const T* __restrict__ bias, const T* residual, int num_rows, int size_out,
               int size_in, nb::int64 x_stride) {
  using Pack = nb::Pack<T>;
  const int lane = threadIdx.x % nb::kWarpSize;
  const int n = blockIdx.x * kWarps + threadIdx.x / nb::kWarpSize;
  if (n >= size_out) return;  // a whole warp
  const T* weight_row = weight + static_cast<nb::int64>(n) * size_in;

  float sums[kRows] = {};
#pragma unroll 4
  for (int k = lane * Pack::size; k < size_in; k += nb::kWarpSize * Pack::size) {
    const Pack weights = nb::load_pack_once(weight_row + k);
#pragma unroll
    for (int row = 0; row < kRows; ++row) {
      const Pack values = nb::load_pack(x + min(row, num_rows - 1) * x_stride + k);
#pragma unroll
      for (int j = 0; j < Pack::size; ++j) {
        sums[row] += nb::to_float(weights.items[j]) * nb::to_float(values.items[j]);
      }
    }
  }
#pragma unroll
  for (int row = 0; row < kRows; ++row) {
    const float sum = nb::warp_reduce(sums[row], nb::Sum());
    if (lane == row && row < num_rows) {
      finish(out, bias, residual, static_cast<nb::int64>(row) * size_out + n, n, sum);
    }
  }
}
