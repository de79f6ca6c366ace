// Causal attention of prompts and chunks over the paged KV cache, FlashAttention-2 (Dao 2023) with
// tensor cores.
//
//   out[r, h] = sum over p of softmax(scale * q[r, h] . K[p, h / kGroup])[p] * V[p, h / kGroup]
//
// where with kSoftcap a score x becomes softcap * tanh(x / softcap) before the softmax.
//
// q, out        [T, Hkv * kGroup, kHeadDim], rows of `q_stride` and `out_stride` elements
// k, v caches   [num_blocks, Hkv, kBlockSize, kHeadDim]
// block_tables  [S, ...], rows of `table_stride`
// members       [M] the sequences to compute, or null for all S
// Row i of sequence s stands at query_start_loc[s] + i and has the position
// seq_lens[s] - rows + i; it sees the positions up to its own, or the last `window` of them.
//
// A tile is kRows "rows" of one sequence and one KV head, a row being one query of one query head:
// row r is query r / kGroup and head r % kGroup, so a group shares each key that is fetched, and
// short chunks fill a tile too. One block computes one tile: blockIdx.x is the KV head, blockIdx.y the
// tile among those of all members, the last (longest) of a sequence first, so that the short ones
// fill the end of the launch. A block past the last tile ends at once.
//
// The block walks over the keys that its rows see, kKeys at a time. Two stages of K and V lie in
// shared memory: while the warps compute on one, cp.async fills the other, a few copies between the
// products at a time (all of them at once would hold the products up); one barrier a step. Each warp
// owns kRowsPerWarp rows: scores, the running maximum and sum, and the output stay in registers
// (kRowsPerWarp x kHeadDim floats), Q's fragments are read again from shared memory. Shared rows are
// padded by 16 bytes, which keeps ldmatrix free of bank conflicts with constant offsets. With 32
// rows a warp each byte read from shared memory serves 64 operations: at 16, shared memory and not
// the tensor cores would be the limit.
//
// A row's result depends on nothing but its own keys: a tile's hidden keys count exactly nothing.
//
// Work: 4 * kHeadDim operations for each visible (row, key); bytes: q and out once, K and V once for
// each tile, from the L2 for all but the first.

#include "nb/async_copy.cuh"
#include "nb/fast_math.cuh"
#include "nb/mma.cuh"
#include "nb/reduce.cuh"
#include "nb/types.cuh"

namespace {

using nb::int64;
using nb::uint32;

// A tile's rows [begin, end) among those of its sequence, and the keys that they see.
struct Tile {
  int64 sequence, first_query;  // `first_query`: the sequence's first row in q
  int begin, end;
  int past;                 // the position of the sequence's first query
  int first_key, last_key;  // seen by at least one row
};

// The tile of this number, counted over all members. False past the last. Every lane of every warp
// calls this and gets the same answer: a lane looks at one member.
template <int kRows, int kGroup>
__device__ __forceinline__ bool find_tile(Tile& tile, int number, const int64* query_start_loc,
                                          const int64* seq_lens, const int64* members,
                                          int num_members, int window) {
  const int lane = threadIdx.x % nb::kWarpSize;
  int before = 0;
  for (int first = 0; first < num_members; first += nb::kWarpSize) {
    int sequence = 0, tiles = 0;
    if (first + lane < num_members) {
      sequence = members ? members[first + lane] : first + lane;
      const int rows = (query_start_loc[sequence + 1] - query_start_loc[sequence]) * kGroup;
      tiles = (rows + kRows - 1) / kRows;
    }
    const int through = nb::warp_sum_up_to(tiles, lane);
    const unsigned reached = __ballot_sync(nb::kAllLanes, before + through > number);
    if (reached != 0) {
      const int owner = __ffs(reached) - 1;
      sequence = __shfl_sync(nb::kAllLanes, sequence, owner);
      const int left = __shfl_sync(nb::kAllLanes, before + through, owner) - 1 - number;
      const int64 start = query_start_loc[sequence];
      const int queries = query_start_loc[sequence + 1] - start;
      const int begin = left * kRows, end = min(begin + kRows, queries * kGroup);
      const int past = seq_lens[sequence] - queries;
      const int first_key = window > 0 ? max(0, past + begin / kGroup + 1 - window) : 0;
      tile = {sequence, start, begin, end, past, first_key, past + (end - 1) / kGroup};
      return true;
    }
    before += __shfl_sync(nb::kAllLanes, through, nb::kWarpSize - 1);
  }
  return false;
}

// Fetches K and V of one KV head, kKeys positions at a time. Eight threads copy a row, in turns of
// 128 bytes, so that a thread's address in a step differs by constants and by the block alone.
template <typename T, int kHeadDim, int kBlockSize, int kKeys, int kThreads, int kStride>
struct KeyFetcher {
  static constexpr int kPack = 16 / sizeof(T);
  static constexpr int kRowsAtOnce = kThreads / 8;
  static constexpr int kParts = kKeys / kRowsAtOnce;
  static constexpr int kBlocks = kKeys > kBlockSize ? kKeys / kBlockSize : 1;
  static_assert(kKeys % kRowsAtOnce == 0, "every thread has a row in every step");
  static_assert((kBlockSize & (kBlockSize - 1)) == 0 && kBlocks <= nb::kWarpSize, "block size");

  const T* k;  // this thread's first row and column, in block 0
  const T* v;
  const int64* table;
  int block_stride;
  int first_key, last_key;
  int row, target;  // of the first step: the row, and its place in a stage

  __device__ __forceinline__ KeyFetcher(const T* k_cache, const T* v_cache,
                                        const int64* block_tables, int64 table_stride,
                                        const Tile& tile)
      : table(block_tables + tile.sequence * table_stride),
        block_stride(gridDim.x * kBlockSize * kHeadDim),
        first_key(tile.first_key),
        last_key(tile.last_key) {
    row = threadIdx.x % kThreads / 8;
    const int column = threadIdx.x % 8 * kPack;
    const int offset = (blockIdx.x * kBlockSize + row % kBlockSize) * kHeadDim + column;
    k = k_cache + offset;
    v = v_cache + offset;
    target = row * kStride + column;
  }

  // Block numbers of the keys from `key`, a multiple of kKeys: lane i's is the i-th. Asked for one
  // step ahead of fetch(), so that nobody waits for the table.
  __device__ __forceinline__ int look_up(int key) const {
    const int lane = threadIdx.x % nb::kWarpSize;
    const int entry = key / kBlockSize + min(lane, kBlocks - 1);
    return table[max(min(entry, last_key / kBlockSize), first_key / kBlockSize)];
  }

  // Begins to copy part `part` of kParts of the rows of kKeys keys into the stages, zeros for the
  // keys that no row of the tile sees: their slots may hold NaN, which a weight of zero would not
  // silence.
  __device__ __forceinline__ void fetch(T* k_stage, T* v_stage, int key, int blocks,
                                        int part) const {
    const int step = part * kRowsAtOnce;
    const int block =
        __shfl_sync(nb::kAllLanes, blocks, (step / kBlockSize + row / kBlockSize) % kBlocks);
    const int slot = step % kBlockSize + (kBlockSize > kKeys ? key % kBlockSize : 0);
    const int64 source = static_cast<int64>(block) * block_stride;
    const bool seen = static_cast<uint32>(key + step + row - first_key) <=
                      static_cast<uint32>(last_key - first_key);
#pragma unroll
    for (int column = 0; column < kHeadDim; column += 8 * kPack) {
      if (column + 8 * kPack > kHeadDim && column + threadIdx.x % 8 * kPack >= kHeadDim) break;
      nb::cp_async_16(k_stage + target + step * kStride + column,
                      k + source + slot * kHeadDim + column, seen);
      nb::cp_async_16(v_stage + target + step * kStride + column,
                      v + source + slot * kHeadDim + column, seen);
    }
  }
  __device__ __forceinline__ void fetch(T* k_stage, T* v_stage, int key, int blocks) const {
#pragma unroll
    for (int part = 0; part < kParts; ++part) fetch(k_stage, v_stage, key, blocks, part);
  }
};

// Begins to copy a tile's rows of q; zeros for those past its end.
template <typename T, int kHeadDim, int kGroup, int kRows, int kThreads, int kStride>
__device__ __forceinline__ void fetch_queries(T* shared, const T* q, int64 q_stride,
                                              const Tile& tile) {
  constexpr int kPack = 16 / sizeof(T);
  constexpr int kPacks = kHeadDim / kPack;
  for (int item = threadIdx.x; item < kRows * kPacks; item += kThreads) {
    const int row = item / kPacks, column = item % kPacks * kPack;
    const bool used = tile.begin + row < tile.end;
    const int at = used ? tile.begin + row : tile.begin;
    const int64 query = tile.first_query + at / kGroup;
    const int head = blockIdx.x * kGroup + at % kGroup;
    nb::cp_async_16(shared + row * kStride + column,
                    q + query * q_stride + head * kHeadDim + column, used);
  }
}

// Two values in one register, as a fragment of mma holds them.
template <typename T>
__device__ __forceinline__ uint32 pair(float low, float high) {
  const nb::Pack<T, 2> both = {nb::from_float<T>(low), nb::from_float<T>(high)};
  return *reinterpret_cast<const uint32*>(&both);
}

}  // namespace

template <typename T, int kHeadDim, int kGroup, int kBlockSize, int kWarps, int kRowsPerWarp,
          int kKeys, int kBlocksPerSm, bool kWindow, bool kSoftcap>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerSm)
    paged_attention_prefill(T* out, const T* q, const T* k_cache, const T* v_cache,
                            const nb::int64* block_tables, const nb::int64* query_start_loc,
                            const nb::int64* seq_lens, const nb::int64* members, int num_members,
                            nb::int64 q_stride, nb::int64 out_stride, nb::int64 table_stride,
                            float scale, int window, float softcap) {
  constexpr int kThreads = kWarps * nb::kWarpSize;
  constexpr int kRows = kWarps * kRowsPerWarp;
  constexpr int kStride = kHeadDim + 8;
  constexpr int kFragments = kRowsPerWarp / 16;  // of 16 rows
  constexpr int kHalves = 2 * kFragments;        // rows that a thread holds values of
  static_assert(kHeadDim % 16 == 0 && kRowsPerWarp % 16 == 0 && kKeys % 16 == 0, "mma's shape");
  using Fetcher = KeyFetcher<T, kHeadDim, kBlockSize, kKeys, kThreads, kStride>;
  // A running maximum may fall behind the scores by this much, in powers of two, before the sums
  // are rescaled: weights grow to 2^8 at most, which every type holds.
  constexpr float kSlack = 8.0f;

  extern __shared__ uint4 shared_memory[];
  T* q_shared = reinterpret_cast<T*>(shared_memory);
  T* k_shared = q_shared + kRows * kStride;
  T* v_shared = k_shared + 2 * kKeys * kStride;

  Tile tile;
  if (!find_tile<kRows, kGroup>(tile, blockIdx.y, query_start_loc, seq_lens, members, num_members,
                                kWindow ? window : 0)) {
    return;
  }
  const int warp = threadIdx.x / nb::kWarpSize, lane = threadIdx.x % nb::kWarpSize;
  const Fetcher fetcher(k_cache, v_cache, block_tables, table_stride, tile);

  const int first_step = tile.first_key / kKeys, last_step = tile.last_key / kKeys;
  fetch_queries<T, kHeadDim, kGroup, kRows, kThreads, kStride>(q_shared, q, q_stride, tile);
  fetcher.fetch(k_shared, v_shared, first_step * kKeys, fetcher.look_up(first_step * kKeys));
  nb::cp_async_commit();
  int blocks = fetcher.look_up((first_step + 1) * kKeys);

  // Scores enter exp2 times this; a soft-capped score is the tanh alone.
  const float factor = (kSoftcap ? softcap : scale) * nb::kLog2E;
  // This thread's rows: 8 * i + lane / 4 of its warp; its columns: 2 * (lane % 4) and the next, of
  // each 8.
  const int first_row = tile.begin + warp * kRowsPerWarp + lane / 4;
  float maximum[kHalves], sum[kHalves];
  float output[kFragments][kHeadDim / 8][4] = {};
#pragma unroll
  for (int i = 0; i < kHalves; ++i) {
    maximum[i] = -nb::infinity();
    sum[i] = 0.0f;
  }
  // Where this lane's row of ldmatrix begins: in Q, K (keys are B's columns) and V (B's rows).
  const T* q_lane = q_shared + (warp * kRowsPerWarp + lane % 16) * kStride + lane / 16 * 8;
  const int k_lane = (lane / 16 * 8 + lane % 8) * kStride + lane / 8 % 2 * 8;
  const int v_lane = lane % 16 * kStride + lane / 16 * 8;

  for (int step = first_step; step <= last_step; ++step) {
    const int stage = (step - first_step) % 2;
    nb::cp_async_wait<0>();
    __syncthreads();  // this stage has arrived for all, and all are done with the other
    T* k_next = k_shared + (1 - stage) * kKeys * kStride;
    T* v_next = v_shared + (1 - stage) * kKeys * kStride;

    // scores = Q K^T
    float scores[kFragments][kKeys / 8][4] = {};
    const T* k_stage = k_shared + stage * kKeys * kStride + k_lane;
#pragma unroll
    for (int d = 0; d < kHeadDim; d += 16) {
      uint32 a[kFragments][4];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) nb::ldmatrix_x4(a[m], q_lane + m * 16 * kStride + d);
      if (d / 16 < Fetcher::kParts) {  // past the last step: zeros, which nobody reads
        fetcher.fetch(k_next, v_next, (step + 1) * kKeys, blocks, d / 16);
      }
#pragma unroll
      for (int n = 0; n < kKeys; n += 16) {
        uint32 b[4];
        nb::ldmatrix_x4(b, k_stage + n * kStride + d);
        const uint32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          nb::mma_m16n8k16<T>(scores[m][n / 8], a[m], low);
          nb::mma_m16n8k16<T>(scores[m][n / 8 + 1], a[m], high);
        }
      }
    }

    nb::cp_async_commit();
    blocks = fetcher.look_up((step + 2) * kKeys);

    if constexpr (kSoftcap) {
#pragma unroll
      for (int i = 0; i < kFragments * kKeys / 2; ++i) {
        float& score = scores[i / (kKeys / 2)][i / 4 % (kKeys / 8)][i % 4];
        score = nb::tanh_fast(score * (scale / softcap));
      }
    }
    const int key = step * kKeys;
    const bool some_after = key + kKeys - 1 > tile.past + tile.begin / kGroup;
    if (some_after || (kWindow && key <= tile.last_key - window)) {
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
        const int position = tile.past + (first_row + i * 8) / kGroup;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            const int column = key + n * 8 + lane % 4 * 2 + j;
            if (column > position || (kWindow && column <= position - window)) {
              scores[i / 2][n][i % 2 * 2 + j] = -nb::infinity();
            }
          }
        }
      }
    }

    // Online softmax: scores become weights, relative to 2^maximum.
    bool rescaled = false;
    float correction[kHalves];
#pragma unroll
    for (int i = 0; i < kHalves; ++i) {
      float highest = -nb::infinity();
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
        highest = fmaxf(highest, fmaxf(scores[i / 2][n][i % 2 * 2], scores[i / 2][n][i % 2 * 2 + 1]));
      }
      highest = nb::warp_reduce<nb::Max, 4>(highest, nb::Max()) * factor;
      const bool raised = highest > maximum[i] + kSlack;
      const float before = maximum[i];
      maximum[i] = raised ? highest : before;
      rescaled |= raised;
      // A row that has seen nothing yet: any finite number keeps exp2(-infinity - it) at zero.
      const float base = kWindow && maximum[i] == -nb::infinity() ? 0.0f : maximum[i];
      correction[i] = nb::exp2_fast(before - base);
      sum[i] *= correction[i];
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[i / 2][n][i % 2 * 2 + j];
          score = nb::exp2_fast(score * factor - base);
          sum[i] += score;
        }
      }
    }
    if (__any_sync(nb::kAllLanes, rescaled)) {
#pragma unroll
      for (int i = 0; i < kHalves; ++i) {
#pragma unroll
        for (int n = 0; n < kHeadDim / 8; ++n) {
          output[i / 2][n][i % 2 * 2] *= correction[i];
          output[i / 2][n][i % 2 * 2 + 1] *= correction[i];
        }
      }
    }

    // output += weights V
    const T* v_stage = v_shared + stage * kKeys * kStride + v_lane;
#pragma unroll
    for (int n = 0; n < kKeys; n += 16) {
      uint32 a[kFragments][4];
#pragma unroll
      for (int m = 0; m < kFragments; ++m) {
        const float(&left)[4] = scores[m][n / 8];
        const float(&right)[4] = scores[m][n / 8 + 1];
        a[m][0] = pair<T>(left[0], left[1]);
        a[m][1] = pair<T>(left[2], left[3]);
        a[m][2] = pair<T>(right[0], right[1]);
        a[m][3] = pair<T>(right[2], right[3]);
      }
#pragma unroll
      for (int d = 0; d < kHeadDim; d += 16) {
        uint32 b[4];
        nb::ldmatrix_x4_trans(b, v_stage + n * kStride + d);
        const uint32 low[2] = {b[0], b[1]}, high[2] = {b[2], b[3]};
#pragma unroll
        for (int m = 0; m < kFragments; ++m) {
          nb::mma_m16n8k16<T>(output[m][d / 8], a[m], low);
          nb::mma_m16n8k16<T>(output[m][d / 8 + 1], a[m], high);
        }
      }
    }
  }

  nb::cp_async_wait<0>();

  // Through Q's rows of this warp, which no other warp reads, for stores of 16 bytes.
  T* staged = q_shared + warp * kRowsPerWarp * kStride;
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kHalves; ++i) {
    const float total = nb::warp_reduce<nb::Sum, 4>(sum[i], nb::Sum());
    const float inverse = 1.0f / total;
#pragma unroll
    for (int n = 0; n < kHeadDim / 8; ++n) {
      const float(&part)[4] = output[i / 2][n];
      *reinterpret_cast<uint32*>(staged + (i * 8 + lane / 4) * kStride + n * 8 + lane % 4 * 2) =
          pair<T>(part[i % 2 * 2] * inverse, part[i % 2 * 2 + 1] * inverse);
    }
  }
  __syncwarp();
  constexpr int kPacks = kHeadDim / 8;
  for (int item = lane; item < kRowsPerWarp * kPacks; item += nb::kWarpSize) {
    const int row = tile.begin + warp * kRowsPerWarp + item / kPacks;
    if (row >= tile.end) break;
    const int head = blockIdx.x * kGroup + row % kGroup;
    nb::store_pack(out + (tile.first_query + row / kGroup) * out_stride + head * kHeadDim +
                       item % kPacks * 8,
                   nb::load_pack(staged + item / kPacks * kStride + item % kPacks * 8));
  }
}

// The same in float32, by FMA: for tests and models that are kept in float32, where the tensor
// cores would round. A warp has kRowsPerWarp rows; a lane one key of 32 for the scores, and every
// 32nd column of the output. One stage.
template <int kHeadDim, int kGroup, int kBlockSize, int kWarps, int kRowsPerWarp, bool kWindow,
          bool kSoftcap>
__global__ void __launch_bounds__(kWarps * 32)
    paged_attention_prefill_float(float* out, const float* q, const float* k_cache,
                                  const float* v_cache, const nb::int64* block_tables,
                                  const nb::int64* query_start_loc, const nb::int64* seq_lens,
                                  const nb::int64* members, int num_members, nb::int64 q_stride,
                                  nb::int64 out_stride, nb::int64 table_stride, float scale,
                                  int window, float softcap) {
  constexpr int kThreads = kWarps * nb::kWarpSize;
  constexpr int kRows = kWarps * kRowsPerWarp;
  constexpr int kKeys = nb::kWarpSize;
  constexpr int kStride = kHeadDim + 4;
  constexpr int kColumns = (kHeadDim + nb::kWarpSize - 1) / nb::kWarpSize;
  using Fetcher = KeyFetcher<float, kHeadDim, kBlockSize, kKeys, kThreads, kStride>;

  extern __shared__ uint4 shared_memory[];
  float* q_shared = reinterpret_cast<float*>(shared_memory);
  float* k_shared = q_shared + kRows * kStride;
  float* v_shared = k_shared + kKeys * kStride;

  Tile tile;
  if (!find_tile<kRows, kGroup>(tile, blockIdx.y, query_start_loc, seq_lens, members, num_members,
                                kWindow ? window : 0)) {
    return;
  }
  const int warp = threadIdx.x / nb::kWarpSize, lane = threadIdx.x % nb::kWarpSize;
  const Fetcher fetcher(k_cache, v_cache, block_tables, table_stride, tile);
  fetch_queries<float, kHeadDim, kGroup, kRows, kThreads, kStride>(q_shared, q, q_stride, tile);

  const float factor = (kSoftcap ? softcap : scale) * nb::kLog2E;
  const int first_row = tile.begin + warp * kRowsPerWarp;
  float maximum[kRowsPerWarp], sum[kRowsPerWarp];
  float output[kRowsPerWarp][kColumns] = {};
#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) {
    maximum[i] = -nb::infinity();
    sum[i] = 0.0f;
  }

  for (int key = tile.first_key / kKeys * kKeys; key <= tile.last_key; key += kKeys) {
    __syncthreads();  // all are done with the keys before
    fetcher.fetch(k_shared, v_shared, key, fetcher.look_up(key));
    nb::cp_async_commit();
    nb::cp_async_wait<0>();
    __syncthreads();

    float weights[kRowsPerWarp] = {};
    for (int d = 0; d < kHeadDim; d += 4) {
      const nb::Pack<float> k = nb::load_pack(k_shared + lane * kStride + d);
#pragma unroll
      for (int i = 0; i < kRowsPerWarp; ++i) {
        const nb::Pack<float> row =
            nb::load_pack(q_shared + (warp * kRowsPerWarp + i) * kStride + d);
#pragma unroll
        for (int j = 0; j < 4; ++j) weights[i] += row.items[j] * k.items[j];
      }
    }
#pragma unroll
    for (int i = 0; i < kRowsPerWarp; ++i) {
      const int position = tile.past + (first_row + i) / kGroup;
      float score = weights[i];
      if constexpr (kSoftcap) score = nb::tanh_fast(score * (scale / softcap));
      if (key + lane > position || (kWindow && key + lane <= position - window)) {
        score = -nb::infinity();
      }
      const float highest =
          fmaxf(maximum[i], nb::warp_reduce(score * factor, nb::Max()));
      const float base = highest == -nb::infinity() ? 0.0f : highest;
      const float correction = nb::exp2_fast(maximum[i] - base);
      weights[i] = nb::exp2_fast(score * factor - base);
      sum[i] = sum[i] * correction + weights[i];
      maximum[i] = highest;
#pragma unroll
      for (int c = 0; c < kColumns; ++c) output[i][c] *= correction;
    }
    for (int row = 0; row < kKeys; ++row) {
#pragma unroll
      for (int i = 0; i < kRowsPerWarp; ++i) {
        const float weight = __shfl_sync(nb::kAllLanes, weights[i], row);
#pragma unroll
        for (int c = 0; c < kColumns; ++c) {
          const int column = c * nb::kWarpSize + lane;
          if (column < kHeadDim) output[i][c] += weight * v_shared[row * kStride + column];
        }
      }
    }
  }

#pragma unroll
  for (int i = 0; i < kRowsPerWarp; ++i) {
    const float total = nb::warp_reduce(sum[i], nb::Sum());
    const int row = first_row + i;
    if (row >= tile.end) break;
    const int head = blockIdx.x * kGroup + row % kGroup;
    float* target = out + (tile.first_query + row / kGroup) * out_stride + head * kHeadDim;
#pragma unroll
    for (int c = 0; c < kColumns; ++c) {
      const int column = c * nb::kWarpSize + lane;
      if (column < kHeadDim) target[column] = output[i][c] / total;
    }
  }
}
