// Products of a few rows with a weight matrix in 4 or 8 bits: out = x @ weight^T + bias, 1 <= M <= 16.
//
// x             [M, K], rows of `x_stride` elements, K a multiple of 8
// codes, scales of weight [N, K], see nb/quantized.cuh
// bias          [N] or null
// out           [M, N]; sums in float, rounded once
//
// What counts is the weight: N * K / 2 or N * K bytes of codes, read once, and with 4-bit codes a
// quarter as many of scales. Each code becomes an element of T (what `dequantize` gives, so that a
// product of more rows by the library has the same weights), which takes the ordinary lanes four
// instructions: at 4 bits nearly as long as reading them. The products are the tensor cores'.
//
// A block takes kTiles * 16 rows of the weight, and its warps take turns at steps of 64 bytes of each
// row. A tile's 16 rows are the rows of an mma, and eight rows of x its columns. A lane loads 16 bytes
// of codes at a time, neighbours in a row and with 4 bits one group; the order of k within a product
// is free, so it multiplies what it loads, and x as it lies in memory. Many warps hide the latency of
// loads: to load a step ahead gained nothing, since with 4 bits the lanes' instructions are the limit.
//
// A sum's order depends on N and K alone, so a row's result is the same in every batch. Rows of x or
// weight past the end repeat the last one and are dropped.

#include "nb/few_rows.cuh"
#include "nb/mma.cuh"
#include "nb/quantized.cuh"

// kTilesOfX * 8 >= num_rows.
template <typename T, typename Byte, typename Scale, int kWarps, int kTiles, int kTilesOfX, int kBlocks>
__global__ void __launch_bounds__(kWarps * 32, kBlocks)
    quantized_gemv(T* out, const T* __restrict__ x, const Byte* __restrict__ codes,
                   const Scale* __restrict__ scales, const T* __restrict__ bias, int num_rows,
                   int size_out, int size_in, nb::int64 x_stride) {
  constexpr int kBits = nb::Codes<Byte>::kBits;
  constexpr int kOfLane = 128 / kBits;  // codes in 16 bytes
  constexpr int kStep = 4 * kOfLane;
  constexpr int kRows = 16 * kTiles;
  constexpr int kWords = kBits / 4;  // of eight codes
  // Padded so that the rows of x that a warp writes at once lie in different banks.
  __shared__ float partials[kWarps][kTilesOfX * 8][kRows + 4];

  const int warp = threadIdx.x / nb::kWarpSize, lane = threadIdx.x % nb::kWarpSize;
  const int g = lane / 4, t = lane % 4;  // the row of half a tile, and of x; the place in a step
  const int first_row = blockIdx.x * kRows;

  int rows[2 * kTiles];
  const Byte* row_codes[2 * kTiles];
#pragma unroll
  for (int half = 0; half < 2 * kTiles; ++half) {
    rows[half] = min(first_row + half * 8 + g, size_out - 1);
    row_codes[half] = codes + rows[half] * nb::row_bytes<Byte>(size_in);
  }
  const T* rows_of_x[kTilesOfX];
#pragma unroll
  for (int i = 0; i < kTilesOfX; ++i) rows_of_x[i] = x + min(i * 8 + g, num_rows - 1) * x_stride;

  float sums[kTiles][kTilesOfX][4] = {};
#pragma unroll 1
  for (int start = warp * kStep; start < size_in; start += kWarps * kStep) {
    const int k = start + t * kOfLane;
    nb::Words packs[2 * kTiles] = {};
    nb::Affine affine[2 * kTiles] = {};
    if (k < size_in) {
#pragma unroll
      for (int half = 0; half < 2 * kTiles; ++half) {
        packs[half] = nb::load_words_once(row_codes[half] + k * kBits / 8);
        affine[half] = nb::Codes<Byte>::affine(scales, rows[half], k, size_in);
      }
    }
#pragma unroll
    for (int eight = 0; eight < kOfLane / 8; ++eight) {
      nb::Words values[kTilesOfX] = {};
      if (k + eight * 8 < size_in) {
#pragma unroll
        for (int i = 0; i < kTilesOfX; ++i) {
          values[i] = nb::load_words(rows_of_x[i] + k + eight * 8);
        }
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
        nb::uint32 a[2][4];  // of the first four of the eight, and of the others
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          nb::uint32 words[kWords];
#pragma unroll
          for (int i = 0; i < kWords; ++i) words[i] = packs[2 * tile + half].items[eight * kWords + i];
          float weights[8];
          nb::dequantize<Byte>(weights, words, affine[2 * tile + half]);
#pragma unroll
          for (int pair = 0; pair < 4; ++pair) {
            a[pair / 2][pair % 2 * 2 + half] =
                nb::pair_from_floats<T>(weights[2 * pair], weights[2 * pair + 1]);
          }
        }
#pragma unroll
        for (int four = 0; four < 2; ++four) {
#pragma unroll
          for (int i = 0; i < kTilesOfX; ++i) {
            const nb::uint32 b[2] = {values[i].items[2 * four], values[i].items[2 * four + 1]};
            nb::mma_m16n8k16<T>(sums[tile][i], a[four], b);
          }
        }
      }
    }
  }

#pragma unroll
  for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
    for (int i = 0; i < kTilesOfX; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        partials[warp][i * 8 + 2 * t + j % 2][tile * 16 + j / 2 * 8 + g] = sums[tile][i][j];
      }
    }
  }
  __syncthreads();
  nb::finish_block<kRows, T>(out, bias, nullptr, partials, num_rows, first_row, size_out);
}
