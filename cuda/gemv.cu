// Products of a few rows with a weight matrix: out = x @ weight^T + bias + residual, 1 <= M <= 16.
//
// x        [M, K], rows of `x_stride` elements
// weight   [N, K], dense
// bias     [N] or null; residual [M, N] or null, out itself if you like
// out      [M, N]; sums in float, rounded once
//
// What counts is the weight: N * K elements, read once. A GPU that reads 3 to 5 TB/s sees 1.5 to
// 2.4e12 elements of 2 bytes a second, for each of which its ordinary lanes have some 12 to 19
// instructions: unpacking and M multiply-adds use those up by M = 8. Tensor cores take 512 elements in
// two or four instructions, so for 16-bit types all M go there, and the code is one.
//
// gemv: a block takes kRowTiles * 16 rows of the weight, which are A of the mma; the rows of x are the
// columns of B. A lane's share of a fragment is 8 elements of a row. As the order of k within a product
// is free, they are 8 neighbours: one 16-byte copy, and x is taken in the same order. The warps take
// turns at steps of 32 k, so that a block reads each row as one stream. Each lane copies what it will
// itself multiply into a ring of kStages steps in shared memory: no thread waits for another, and the
// bytes in flight are fixed by the ring (a warp: kStages * kRowTiles KiB of weights) and not by what
// the compiler makes of the loop. At the end the warps' sums are added in the order of warps.
//
// A block reads all of x, which comes from the L2: M / (16 * kRowTiles) bytes for each byte of weight.
// Hence more row tiles where M is larger. The order of k depends on neither M nor the tiles, so a
// row's result is the same in every batch. Rows of x or weight past the end repeat the last one and
// are dropped.
//
// gemv_float: the same without tensor cores, which would round float32. A warp for each weight row.

#include "nb/async_copy.cuh"
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

// kColumnTiles * 8 >= num_rows. Dynamic shared memory: kWarps * kStages * (2 * kRowTiles +
// kColumnTiles) * 512 bytes.
template <typename T, int kWarps, int kRowTiles, int kColumnTiles, int kStages>
__global__ void __launch_bounds__(kWarps * 32)
    gemv(T* out, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
         const T* residual, int num_rows, int size_out, int size_in, nb::int64 x_stride) {
  using Words = nb::Pack<nb::uint32>;  // 8 elements, as four registers of a fragment
  constexpr int kStep = 32;            // of k: 8 for each of a row's four lanes
  constexpr int kTileRows = 16 * kRowTiles;
  constexpr int kOperands = 2 * kRowTiles + kColumnTiles;
  extern __shared__ uint4 shared_memory[];

  const int warp = threadIdx.x / nb::kWarpSize, lane = threadIdx.x % nb::kWarpSize;
  const int group = lane / 4, k_of_lane = lane % 4 * 8;
  const int first_row = blockIdx.x * kTileRows;

  const T* rows[kOperands];  // of the weight, in eights: upper and lower half of each tile; then of x
#pragma unroll
  for (int i = 0; i < kOperands; ++i) {
    const int row = i * 8 + group;
    if (i < 2 * kRowTiles) {
      rows[i] = weight + static_cast<nb::int64>(min(first_row + row, size_out - 1)) * size_in;
    } else {
      rows[i] = x + min(row - kTileRows, num_rows - 1) * x_stride;
    }
  }
  using Slot = Words[kOperands][nb::kWarpSize];
  Slot* ring = reinterpret_cast<Slot*>(shared_memory) + warp * kStages;
  const int num_steps = (size_in + kStep - 1) / kStep;

  const auto fetch = [&](int step, Slot& slot) {
    const int k = step * kStep + k_of_lane;
    if (step < num_steps) {
#pragma unroll
      for (int i = 0; i < kOperands; ++i) {
        nb::cp_async_16(&slot[i][lane], rows[i] + k, k < size_in);
      }
    }
    nb::cp_async_commit();  // also where there was nothing: the wait below counts groups
  };

  float sums[kRowTiles][kColumnTiles][4] = {};
#pragma unroll
  for (int stage = 0; stage < kStages - 1; ++stage) fetch(warp + stage * kWarps, ring[stage]);
  int stage = 0;
  for (int step = warp; step < num_steps; step += kWarps) {
    fetch(step + (kStages - 1) * kWarps, ring[stage == 0 ? kStages - 1 : stage - 1]);
    nb::cp_async_wait<kStages - 1>();
    Words words[kOperands];
#pragma unroll
    for (int i = 0; i < kOperands; ++i) words[i] = ring[stage][i][lane];
#pragma unroll
    for (int half = 0; half < 4; half += 2) {
#pragma unroll
      for (int tile = 0; tile < kRowTiles; ++tile) {
        const Words &upper = words[2 * tile], &lower = words[2 * tile + 1];
        const nb::uint32 a[4] = {upper.items[half], lower.items[half], upper.items[half + 1],
                                 lower.items[half + 1]};
#pragma unroll
        for (int column = 0; column < kColumnTiles; ++column) {
          const Words& values = words[2 * kRowTiles + column];
          const nb::uint32 b[2] = {values.items[half], values.items[half + 1]};
          nb::mma_m16n8k16<T>(sums[tile][column], a, b);
        }
      }
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;
  }

  // The ring's memory now takes the sums: [kWarps][x's rows][weight's rows], padded so that the rows
  // that a warp writes at once lie in different banks.
  using Sums = float[kColumnTiles * 8][kTileRows + 4];
  Sums* partials = reinterpret_cast<Sums*>(shared_memory);
  nb::cp_async_wait<0>();
  __syncthreads();
#pragma unroll
  for (int tile = 0; tile < kRowTiles; ++tile) {
#pragma unroll
    for (int column = 0; column < kColumnTiles; ++column) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        partials[warp][column * 8 + lane % 4 * 2 + i % 2][tile * 16 + group + i / 2 * 8] =
            sums[tile][column][i];
      }
    }
  }
  __syncthreads();
#pragma unroll 1
  for (int item = threadIdx.x; item < num_rows * kTileRows; item += kWarps * nb::kWarpSize) {
    const int row = item / kTileRows, n = item % kTileRows;
    if (first_row + n >= size_out) continue;
    float sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kWarps; ++i) sum += partials[i][row][n];
    finish(out, bias, residual, static_cast<nb::int64>(row) * size_out + first_row + n,
           first_row + n, sum);
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
