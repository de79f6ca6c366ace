// Products of a few rows with a weight matrix: out = x @ weight^T + bias + residual, 1 <= M <= 16.
//
// x        [M, K], rows of `x_stride` elements
// weight   [N, K], dense
// bias     [N] or null; residual [M, N] or null, out itself if you like
// out      [M, N]; sums in float, rounded once
//
// What counts is the weight: N * K elements, read once. A GPU that reads 3 to 5 TB/s sees 1.5 to
// 2.4e12 elements of 2 bytes a second, for each of which its ordinary lanes have some 12 to 19
// instructions: unpacking and M multiply-adds use those up by M = 8. Tensor cores take 512 elements
// in four instructions, so for 16-bit types all M go there, and the code is one.
//
// gemv: a block takes kTiles * 8 rows of the weight. A tile's 8 rows are the columns of an mma, the
// rows of x are its 16 rows, the last 8 of them zero where M <= 8. The warps take turns at steps of
// 64 k, a 128-byte line of each row. What a lane loads is what it multiplies: only the warps' sums
// pass through shared memory, at the end, and are added in the order of warps.
//
//   As the order of k within a product is free, a lane's share of a row is 8 neighbours: a load of
//   16 bytes. For a warp's load to be four whole lines, the even and odd columns of a tile take
//   different halves of a line at a time (see `multiply`).
//
//   Every block reads all of x: M / (8 * kTiles) bytes for each byte of the weight, a burden if they
//   came from the L2. The weight's loads take no place in the L1, so that x stays there as far as it
//   fits, or until the blocks have read it that go through it side by side.
//
//   In flight are the bytes of one step, kTiles KiB, for each warp of a multiprocessor's kBlocks
//   blocks: 40 KiB or more in every shape that the op launches.
//
// A sum's order depends on N and K alone, so a row's result is the same in every batch. Rows of x or
// weight past the end repeat the last one and are dropped.
//
// gemv_float: the same without tensor cores, which would round float32. A warp takes kRows rows of
// the weight, its lanes take turns at packs of K, and each of its results is added up by one lane.

#include "nb/few_rows.cuh"
#include "nb/mma.cuh"

using nb::Words;

// kTilesOfX * 8 >= num_rows.
template <typename T, int kWarps, int kTiles, int kTilesOfX, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    gemv(T* out, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
         const T* residual, int num_rows, int size_out, int size_in, nb::int64 x_stride) {
  constexpr int kStep = 64, kHalf = kStep / 2;
  constexpr int kRows = 8 * kTiles;
  // Padded so that the rows that a warp writes at once lie in different banks.
  __shared__ float partials[kWarps][kTilesOfX * 8][kRows + 4];

  const int warp = threadIdx.x / nb::kWarpSize, lane = threadIdx.x % nb::kWarpSize;
  const int column = lane / 4;  // of a tile; and the row of x
  const int first_row = blockIdx.x * kRows;

  // Two loads to a tile. In the first, lanes 8r to 8r + 7 read the line of row r, each the 8 elements
  // of its place; in the second that of row r + 4, with the line's halves exchanged.
  const int k_of_load[2] = {lane % 8 * 8, lane % 8 * 8 ^ kHalf};
  const int k_of_x = lane % 4 * 8;  // and kHalf further
  const T* tile_rows = weight + static_cast<nb::int64>(first_row) * size_in;
  int offsets[kTiles][2];
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(tile * 8 + i * 4 + lane / 8, size_out - 1 - first_row);
      offsets[tile][i] = row * size_in + k_of_load[i];
    }
  }
  const T* rows_of_x[kTilesOfX];
#pragma unroll
  for (int i = 0; i < kTilesOfX; ++i) {
    rows_of_x[i] = x + min(i * 8 + column, num_rows - 1) * x_stride + k_of_x;
  }

  float sums[kTiles][2][4] = {};
  // Even columns have a line's first half from the first load, odd ones from the second. So in the
  // product of the first halves column c is row c / 2 of the tile where c is even, 4 + c / 2 where
  // it is odd, and in that of the second halves it is the other.
  const auto multiply = [&](const Words (&w)[kTiles][2], const Words (&values)[kTilesOfX][2]) {
#pragma unroll
    for (int word = 0; word < 4; word += 2) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        nb::uint32 a[4] = {};
#pragma unroll
        for (int i = 0; i < kTilesOfX; ++i) {
          a[i] = values[i][half].items[word];
          a[i + 2] = values[i][half].items[word + 1];
        }
        const bool is_second = column % 2 != half;
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          nb::uint32 b[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            b[j] = is_second ? w[tile][1].items[word + j] : w[tile][0].items[word + j];
          }
          nb::mma_m16n8k16<T>(sums[tile][half], a, b);
        }
      }
    }
  };

  int k = warp * kStep;
#pragma unroll 1
  for (; k + kStep <= size_in; k += kWarps * kStep) {
    Words w[kTiles][2], values[kTilesOfX][2];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) w[tile][i] = nb::load_words_once(tile_rows + k + offsets[tile][i]);
    }
#pragma unroll
    for (int i = 0; i < kTilesOfX; ++i) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        values[i][half] = nb::load_words(rows_of_x[i] + k + half * kHalf);
      }
    }
    multiply(w, values);
  }
  if (k < size_in) {  // less than a line is left, and this warp's
    Words w[kTiles][2] = {}, values[kTilesOfX][2] = {};
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (k + k_of_load[i] < size_in) {
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
          w[tile][i] = nb::load_words_once(tile_rows + k + offsets[tile][i]);
        }
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      if (k + half * kHalf + k_of_x < size_in) {
#pragma unroll
        for (int i = 0; i < kTilesOfX; ++i) {
          values[i][half] = nb::load_words(rows_of_x[i] + k + half * kHalf);
        }
      }
    }
    multiply(w, values);
  }

  // A lane's columns are 2p and 2p + 1: rows p and 4 + p of the first halves, 4 + p and p of the
  // second.
#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kTilesOfX; ++i) {
      float* to = &partials[warp][i * 8 + column][tile * 8 + lane % 4];
      to[0] = sums[tile][0][2 * i] + sums[tile][1][2 * i + 1];
      to[4] = sums[tile][0][2 * i + 1] + sums[tile][1][2 * i];
    }
  }
  __syncthreads();
  nb::finish_block<kRows>(out, bias, residual, partials, num_rows, first_row, size_out);
}

// kRowsOfX >= num_rows, and a lane for each of a warp's results: kRows * kRowsOfX <= 32.
template <typename T, int kWarps, int kRows, int kRowsOfX>
__global__ void __launch_bounds__(kWarps * 32)
    gemv_float(T* out, const T* __restrict__ x, const T* __restrict__ weight,
               const T* __restrict__ bias, const T* residual, int num_rows, int size_out,
               int size_in, nb::int64 x_stride) {
  using Pack = nb::Pack<T>;
  __shared__ float partials[kWarps][kRows * kRowsOfX][nb::kWarpSize + 1];
  const int warp = threadIdx.x / nb::kWarpSize, lane = threadIdx.x % nb::kWarpSize;
  const int first_row = (blockIdx.x * kWarps + warp) * kRows;
  if (first_row >= size_out) return;  // a whole warp

  const T* rows[kRows];
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
    rows[i] = weight + static_cast<nb::int64>(min(first_row + i, size_out - 1)) * size_in;
  }
  float sums[kRows][kRowsOfX] = {};
#pragma unroll 1
  for (int k = lane * Pack::size; k < size_in; k += nb::kWarpSize * Pack::size) {
    Pack weights[kRows];
#pragma unroll
    for (int i = 0; i < kRows; ++i) weights[i] = nb::load_pack_once(rows[i] + k);
#pragma unroll
    for (int row = 0; row < kRowsOfX; ++row) {
      const Pack values = nb::load_pack(x + min(row, num_rows - 1) * x_stride + k);
#pragma unroll
      for (int i = 0; i < kRows; ++i) {
#pragma unroll
        for (int j = 0; j < Pack::size; ++j) {
          sums[i][row] += nb::to_float(weights[i].items[j]) * nb::to_float(values.items[j]);
        }
      }
    }
  }
#pragma unroll
  for (int i = 0; i < kRows; ++i) {
#pragma unroll
    for (int row = 0; row < kRowsOfX; ++row) {
      partials[warp][i * kRowsOfX + row][lane] = sums[i][row];
    }
  }
  __syncwarp();
  const int n = first_row + lane / kRowsOfX, row = lane % kRowsOfX;
  if (lane >= kRows * kRowsOfX || n >= size_out || row >= num_rows) return;
  float sum = 0.0f;
#pragma unroll
  for (int i = 0; i < nb::kWarpSize; ++i) sum += partials[warp][lane][i];
  nb::finish(out, bias, residual, static_cast<nb::int64>(row) * size_out + n, n, sum);
}
