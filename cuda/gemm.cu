// Products of many rows with a weight matrix, to the last bit those of gemv: out = x @ weight^T + bias
// + residual, in 16-bit types. For whoever needs a row's result to be the same at any number of rows.
//
// x        [M, K], rows of `x_stride` elements, K a multiple of 8
// weight   [N, K], dense
// bias     [N] or null; residual [M, N] or null, out itself if you like
// out      [M, N]; sums in float, rounded once
//
// gemv's order. The k of a sum are cut into steps of 64, and the steps dealt out to `num_parts` parts
// in turn (gemv's warps). In a part the first halves of its steps are one sum and the second halves
// another, the two are added, and the parts then, one after the other. Within a product the k that
// meet in one place of a fragment are those that gemv has there. So the steps are walked part by part
// here, with a sum for each half, and what the parts have given so far in `totals`: three sets of
// accumulators, which is what bounds a warp's tile to 32 x 32.
//
// A block computes 128 rows of x by 64 of the weight. Steps of both pass through kStages stages of
// shared memory by cp.async. There a row is 8 packs of 16 bytes, whose halves are exchanged in every
// odd row: a fragment's load then finds every bank once. Blocks of the same rows of the weight run
// side by side, so that these are read from memory once, and x from the L2. Rows past the end repeat
// the last one and are dropped.
//
// Work: 2 * M * N * K operations. Each byte of shared memory that is read serves 16, each from the L2
// 43: so this reaches about half of what the tensor cores could do.

#include "nb/async_copy.cuh"
#include "nb/few_rows.cuh"
#include "nb/mma.cuh"

namespace {

constexpr int kWarps = 8, kThreads = kWarps * nb::kWarpSize;
constexpr int kStep = 64, kPacks = kStep / 8;
constexpr int kRows = 128, kColumns = 64;  // of a block: rows of x, and of the weight
constexpr int kStages = 4;
constexpr int kStagePacks = (kRows + kColumns) * kPacks;
constexpr int kRowTiles = 2, kColumnTiles = 4;  // of a warp, 16 and 8 wide

// The steps in the order of their parts.
struct Walk {
  int step, part, num_steps, num_parts;

  __device__ __forceinline__ Walk(int num_steps, int num_parts)
      : step(0), part(0), num_steps(num_steps), num_parts(num_parts) {}

  __device__ __forceinline__ bool ends_part() const { return step + num_parts >= num_steps; }
  __device__ __forceinline__ void advance() { step = ends_part() ? ++part : step + num_parts; }
};

// Where pack `pack` of row `row` of a stage lies.
__device__ __forceinline__ int place(int row, int pack) {
  return row * kPacks + (pack ^ (row % 2 * (kPacks / 2)));
}

}  // namespace

template <typename T>
__global__ void __launch_bounds__(kThreads, 1)
    gemm(T* out, const T* __restrict__ x, const T* __restrict__ weight, const T* __restrict__ bias,
         const T* residual, int num_rows, int size_out, int size_in, nb::int64 x_stride,
         int num_parts) {
  extern __shared__ uint4 shared_memory[];
  nb::Words* stages = reinterpret_cast<nb::Words*>(shared_memory);

  const int warp = threadIdx.x / nb::kWarpSize, lane = threadIdx.x % nb::kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const int first_row = blockIdx.x * kRows, first_column = blockIdx.y * kColumns;
  const int num_steps = (size_in + kStep - 1) / kStep;

  // Eight threads copy a row of a step, and a thread every 32nd row.
  constexpr int kRowsAtOnce = kThreads / kPacks;
  const int copied_row = threadIdx.x / kPacks, copied_pack = threadIdx.x % kPacks;
  const T* sources[(kRows + kColumns) / kRowsAtOnce];
#pragma unroll
  for (int i = 0; i < (kRows + kColumns) / kRowsAtOnce; ++i) {
    const int row = copied_row + i * kRowsAtOnce;
    sources[i] = copied_pack * 8 +
                 (row < kRows ? x + min(first_row + row, num_rows - 1) * x_stride
                              : weight + static_cast<nb::int64>(min(first_column + row - kRows,
                                                                    size_out - 1)) * size_in);
  }
  Walk fetched(num_steps, num_parts);
  int num_fetched = 0;
  const auto fetch = [&] {
    if (num_fetched < num_steps) {
      const int k = fetched.step * kStep;
      const bool inside = k + copied_pack * 8 < size_in;
      nb::Words* stage = stages + num_fetched % kStages * kStagePacks;
#pragma unroll
      for (int i = 0; i < (kRows + kColumns) / kRowsAtOnce; ++i) {
        nb::cp_async_16(stage + place(copied_row + i * kRowsAtOnce, copied_pack), sources[i] + k,
                        inside);
      }
      fetched.advance();
    }
    ++num_fetched;
    nb::cp_async_commit();  // an empty group past the last step, so that the count of groups goes on
  };
#pragma unroll
  for (int i = 0; i < kStages - 1; ++i) fetch();

  const int row_of_warp = warp / 2 * 32, column_of_warp = warp % 2 * 32;
  float sums[2][kRowTiles][kColumnTiles][4] = {};
  float totals[kRowTiles][kColumnTiles][4] = {};
  Walk at(num_steps, num_parts);
  for (int i = 0; i < num_steps; ++i) {
    nb::cp_async_wait<kStages - 2>();
    __syncthreads();  // this step has arrived for all, and all are done with the one before
    fetch();
    const nb::Words* stage = stages + i % kStages * kStagePacks;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int pack = half * (kPacks / 2) + t;
      nb::Words rows[kRowTiles][2], columns[kColumnTiles];
#pragma unroll
      for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
        for (int eight = 0; eight < 2; ++eight) {
          rows[m][eight] = stage[place(row_of_warp + m * 16 + eight * 8 + g, pack)];
        }
      }
#pragma unroll
      for (int n = 0; n < kColumnTiles; ++n) {
        columns[n] = stage[place(kRows + column_of_warp + n * 8 + g, pack)];
      }
#pragma unroll
      for (int word = 0; word < 4; word += 2) {
#pragma unroll
        for (int m = 0; m < kRowTiles; ++m) {
          const nb::uint32 a[4] = {rows[m][0].items[word], rows[m][1].items[word],
                                   rows[m][0].items[word + 1], rows[m][1].items[word + 1]};
#pragma unroll
          for (int n = 0; n < kColumnTiles; ++n) {
            const nb::uint32 b[2] = {columns[n].items[word], columns[n].items[word + 1]};
            nb::mma_m16n8k16<T>(sums[half][m][n], a, b);
          }
        }
      }
    }
    if (at.ends_part()) {
#pragma unroll
      for (int j = 0; j < kRowTiles * kColumnTiles * 4; ++j) {
        float& first = sums[0][j / 16][j / 4 % 4][j % 4];
        float& second = sums[1][j / 16][j / 4 % 4][j % 4];
        totals[j / 16][j / 4 % 4][j % 4] += first + second;
        first = second = 0.0f;
      }
    }
    at.advance();
  }
  nb::cp_async_wait<0>();

#pragma unroll
  for (int m = 0; m < kRowTiles; ++m) {
#pragma unroll
    for (int n = 0; n < kColumnTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int row = first_row + row_of_warp + m * 16 + j / 2 * 8 + g;
        const int column = first_column + column_of_warp + n * 8 + 2 * t + j % 2;
        if (row >= num_rows || column >= size_out) continue;
        nb::finish(out, bias, residual, static_cast<nb::int64>(row) * size_out + column, column,
                   totals[m][n][j]);
      }
    }
  }
}
