// Attention of one query row a sequence over its paged KV cache: a decode step (split-KV as in
// flash decoding: Dao et al. 2023; the softmax kept online: Milakov and Gimelshein 2018).
//
//   out[row, h, :] = sum_j softmax_j(scale * q[row, h, :] . k[j, :]) v[j, :],   row = rows[s] (or s)
//
// over the tokens j < seq_lens[s] of sequence s, the last `window` of them where window > 0; a score
// x becomes softcap * tanh(x / softcap) where softcap > 0.
//
// q, out       [T, kv_heads * group, kHeadDim], rows q_stride and out_stride elements apart
// k, v cache   [num_blocks, kv_heads, block_size, kHeadDim], block_size = 2^log2_block_size >= 8
// block_tables [S, table_stride], seq_lens [S]; a sequence of length 0 is left alone
// workspace    counters (zero before and after each launch), then the workers' partial results
//
// The bytes to move are K and V once, for all query heads of a group together: 2 * kv_heads * kHeadDim
// elements for each token that a sequence sees, and little beside them. What limits the speed
// is how many of them are under way at a time, and that no multiprocessor runs out of work.
//
// Work. All keys of all sequences and KV heads stand in one line, which is cut into equal chunks, one
// for each block, a *worker* (nb/decode/work.cuh). Where a chunk ends inside a sequence, partial
// results are put together (nb/decode/partial.cuh) by the last of the workers to finish, in the order
// of the chunks.
//
// A warp takes every kWarps-th tile of 16 keys. K and V go from global memory straight into the
// registers that the tensor cores read, 16 bytes a lane, because sums over dimensions and over keys
// may run in any order as long as both factors agree on it:
//   scores  S = Q K^T   (mma: 16 queries x 8 keys): lane 4g + t holds of key g the dimensions that
//                       it holds of query g; see Slice
//   output  O^T = V^T P^T  (16 dimensions x 8 queries): the scores' layout is already P^T's; lane
//                       4g + t holds of keys 2t, 2t + 1, 2t + 8, 2t + 9 its eighth of the dimensions
// The next tile's keys are loaded as soon as the scores are done, its values after the output.

#include "nb/decode/operands.cuh"
#include "nb/decode/partial.cuh"
#include "nb/decode/work.cuh"
#include "nb/fast_math.cuh"
#include "nb/reduce.cuh"

namespace nb::decode {

// What one warp has under way.
template <typename T, int kHeadDim>
struct Tile {
  using Keys = Slice<T, kHeadDim, 4>;
  using Values = Slice<T, kHeadDim, 8>;

  Keys keys[2];      // key g, and g + 8
  Values values[4];  // keys 2t, 2t + 1, 2t + 8, 2t + 9

  // All 16 keys (values), used or not.
  __device__ __forceinline__ void load_keys(const T* cache, const Rows& rows, int g, int t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      keys[half].load(cache + (rows.of(half) + g) * kHeadDim + Keys::start(t), t);
    }
  }
  __device__ __forceinline__ void load_values(const T* cache, const Rows& rows, int g, int t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const T* row = cache + (rows.of(half) + 2 * t) * kHeadDim + Values::start(g);
      values[2 * half].template load<0>(row, g);
      values[2 * half + 1].template load<1>(row, g);
    }
  }
};

template <typename T, int kHeadDim, int kQueryTiles>
struct Attention {
  static constexpr int kDimTiles = kHeadDim / 16;
  using Keys = Slice<T, kHeadDim, 4>;
  using Pair = typename Operand<T>::Pair;

  Keys queries[kQueryTiles];  // query g, and g + 8
  float output[kQueryTiles][kDimTiles][4];
  float maximum[kQueryTiles];  // of query g, and g + 8: what its weights are relative to
  float total[kQueryTiles];    // of this lane's keys alone

  __device__ __forceinline__ void start(const T* q, int group, int g, int t) {
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      const int query = 8 * n + g;
#pragma unroll
      for (int i = 0; i < Keys::kPairs; ++i) {
        const T* source = q + query * kHeadDim + Keys::dimension(t, i);
        queries[n].pairs[i] = query < group ? *reinterpret_cast<const Pair*>(source) : Pair{};
      }
      maximum[n] = -infinity();
      total[n] = 0.0f;
#pragma unroll
      for (int i = 0; i < kDimTiles; ++i) {
#pragma unroll
        for (int j = 0; j < 4; ++j) output[n][i][j] = 0.0f;
      }
    }
  }

  // scores[half]: queries g (0, 1) and g + 8 (2, 3), keys 8 * half + 2t and 2t + 1.
  //
  // Of up to 8 queries, the lower 8 rows of an operand hold the next 16 dimensions of the same
  // queries: each product is right in the half of its result that is used, and no register of the
  // operand is empty.
  __device__ __forceinline__ void multiply_keys(float (&scores)[2][4], const Keys (&keys)[2]) {
    float sums[2][2][4] = {};
#pragma unroll
    for (int i = 0; i < kDimTiles; ++i) {
      const Keys& upper = queries[0];
      const Keys& lower = queries[kQueryTiles - 1];
      const int at_upper = 2 * (kQueryTiles == 1 ? i / 2 * 2 : i);
      const int at_lower = kQueryTiles == 1 ? min(at_upper + 2, Keys::kPairs - 2) : at_upper;
      const Operand<T> a[4] = {Operand<T>::of(upper.pairs[at_upper]),
                               Operand<T>::of(lower.pairs[at_lower]),
                               Operand<T>::of(upper.pairs[at_upper + 1]),
                               Operand<T>::of(lower.pairs[at_lower + 1])};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const Operand<T> b[2] = {Operand<T>::of(keys[half].pairs[2 * i]),
                                 Operand<T>::of(keys[half].pairs[2 * i + 1])};
        multiply<T>(sums[half][kQueryTiles == 1 ? i % 2 : 0], a, b);
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        scores[half][j] = sums[half][0][j];
        if (kQueryTiles == 1 && j < 2) scores[half][j] += sums[half][1][j + 2];
      }
    }
  }

  // Of keys outside of [begin, end): no weight, and values that do not matter even if they are NaN.
  template <typename Values>
  __device__ __forceinline__ void leave_out(float (&scores)[2][4], Values (&values)[4],
                                            int first_key, int begin, int end, int t) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int key = first_key + i / 2 * 8 + 2 * t + i % 2;
      if (key >= begin && key < end) continue;
      values[i].clear();
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) scores[i / 2][2 * n + i % 2] = -infinity();
    }
  }

  // Turns scores (in powers of two) into weights. A query's weights are relative to the first maximum
  // that it met, until it meets one that is 2^8 times as high: rescaling the output is rare.
  __device__ __forceinline__ void soften(float (&scores)[2][4], int t) {
    constexpr float kSlack = 8.0f;
    float high[kQueryTiles];
    bool too_high = false;
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      high[n] = fmaxf(fmaxf(scores[0][2 * n], scores[0][2 * n + 1]),
                      fmaxf(scores[1][2 * n], scores[1][2 * n + 1]));
      too_high |= high[n] > maximum[n] + kSlack;
    }
    if (__any_sync(kAllLanes, too_high)) {
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) rescale(high[n], n, t);
    }
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        float& score = scores[j / 2][2 * n + j % 2];
        score = exp2_fast(score - maximum[n]);
        total[n] += score;
      }
    }
  }

  __device__ __forceinline__ void rescale(float high, int n, int t) {
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, 1));
    high = fmaxf(high, __shfl_xor_sync(kAllLanes, high, 2));
    high = fmaxf(high, maximum[n]);
    const float shrink = exp2_fast(maximum[n] - high);
    maximum[n] = high;
    total[n] *= shrink;
    // The output's columns are queries 2t and 2t + 1: their factors are in lanes 8t and 8t + 4.
    const float factors[2] = {__shfl_sync(kAllLanes, shrink, 8 * t),
                              __shfl_sync(kAllLanes, shrink, 8 * t + 4)};
#pragma unroll
    for (int i = 0; i < kDimTiles; ++i) {
#pragma unroll
      for (int j = 0; j < 4; ++j) output[n][i][j] *= factors[j % 2];
    }
  }

  template <typename Values>
  __device__ __forceinline__ void multiply_values(const float (&weights)[2][4],
                                                  const Values (&values)[4]) {
    Operand<T> b[kQueryTiles][2];
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        b[n][half] = Operand<T>::of(weights[half][2 * n], weights[half][2 * n + 1]);
      }
    }
#pragma unroll
    for (int i = 0; i < kDimTiles; ++i) {
      const Operand<T> a[4] = {Operand<T>::firsts(values[0].pairs[i], values[1].pairs[i]),
                               Operand<T>::seconds(values[0].pairs[i], values[1].pairs[i]),
                               Operand<T>::firsts(values[2].pairs[i], values[3].pairs[i]),
                               Operand<T>::seconds(values[2].pairs[i], values[3].pairs[i])};
#pragma unroll
      for (int n = 0; n < kQueryTiles; ++n) multiply<T>(output[n][i], a, b[n]);
    }
  }

  __device__ __forceinline__ void store(Partial<T, kHeadDim, kQueryTiles>& partial, int lane, int g,
                                        int t) {
#pragma unroll
    for (int n = 0; n < kQueryTiles; ++n) {
      float sum = total[n];
      sum += __shfl_xor_sync(kAllLanes, sum, 1);
      sum += __shfl_xor_sync(kAllLanes, sum, 2);
      if (t == 0) {
        partial.maximum[8 * n + g] = maximum[n];
        partial.total[8 * n + g] = sum;
      }
#pragma unroll
      for (int i = 0; i < kDimTiles; ++i) {
        const Pack<float, 4> pack{
            {output[n][i][0], output[n][i][1], output[n][i][2], output[n][i][3]}};
        partial.values[(n * kDimTiles + i) * kWarpSize + lane] = pack;
      }
    }
  }
};

}  // namespace nb::decode

template <typename T, int kHeadDim, int kQueryTiles, int kWarps, int kBlocksPerSM>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerSM)
    paged_attention_decode(T* out, const T* __restrict__ q, const T* __restrict__ k_cache,
                           const T* __restrict__ v_cache, const nb::int64* __restrict__ block_tables,
                           const nb::int64* __restrict__ seq_lens,
                           const nb::int64* __restrict__ rows, unsigned char* workspace,
                           int max_workers, int num_seqs, int num_kv_heads, int group,
                           int log2_block_size, nb::int64 table_stride, nb::int64 q_stride,
                           nb::int64 out_stride, float scale, int window, float softcap,
                           bool apart) {
  using namespace nb::decode;
  using Part = Partial<T, kHeadDim, kQueryTiles>;
  constexpr int kThreads = kWarps * nb::kWarpSize;
  extern __shared__ uint4 shared_memory[];
  __shared__ Chunk<kWarps> chunk;
  __shared__ Segment segments[2];  // the one at hand, and the next
  Part* of_warps = reinterpret_cast<Part*>(shared_memory);
  Part* of_workers = reinterpret_cast<Part*>(workspace + kCounterBytes * max_workers);

  const int lane = threadIdx.x % nb::kWarpSize, warp = threadIdx.x / nb::kWarpSize;
  const int g = lane / 4, t = lane % 4;
  const float to_log2 = softcap > 0.0f ? softcap * nb::kLog2E : scale * nb::kLog2E;

  if (warp == 0) {
    Chunk<kWarps> found;
    found.apart = apart;
    found.find(seq_lens, num_seqs, num_kv_heads, window, lane);
    if (lane == 0) {
      segments[0] = found.next(seq_lens, num_kv_heads, window);
      chunk = found;
    }
  }
  __syncthreads();
  const auto rows_of = [&](const Segment& segment, int tile) {
    return Rows(block_tables + segment.sequence * table_stride, tile, segment.end, segment.head,
                num_kv_heads, log2_block_size);
  };
  const auto row_of = [&](const Segment& segment) -> nb::int64 {
    return rows == nullptr ? segment.sequence : rows[segment.sequence];
  };
  Rows next = rows_of(segments[0], segments[0].first_tile + warp);
  nb::int64 next_row = row_of(segments[0]);

  for (int phase = 0; segments[phase].num_workers != 0; phase ^= 1) {
    const Segment& segment = segments[phase];
    const int begin = segment.begin, end = segment.end, last_tile = segment.last_tile;
    const nb::int64 row = next_row;
    int at = segment.first_tile + warp;
    Attention<T, kHeadDim, kQueryTiles> attention;
    Tile<T, kHeadDim> tile;
    attention.start(q + row * q_stride + segment.head * group * kHeadDim, group, g, t);
    if (at < last_tile) {
      tile.load_keys(k_cache, next, g, t);
      tile.load_values(v_cache, next, g, t);
    }
    next = rows_of(segment, at + kWarps);
    if (threadIdx.x == 0) segments[phase ^ 1] = chunk.next(seq_lens, num_kv_heads, window);

    for (; at < last_tile; at += kWarps) {
      const bool is_last = at + kWarps >= last_tile;
      const int first_key = at * kTileKeys;
      float scores[2][4];
      attention.multiply_keys(scores, tile.keys);
      if (!is_last) tile.load_keys(k_cache, next, g, t);
#pragma unroll
      for (int j = 0; j < 4 * kQueryTiles; ++j) {
        float& score = scores[j % 2][j / 2];
        if (softcap > 0.0f) score = nb::tanh_fast(score * (scale / softcap));
        score *= to_log2;
      }
      if (first_key < begin || first_key + kTileKeys > end) {
        attention.leave_out(scores, tile.values, first_key, begin, end, t);
      }
      attention.soften(scores, t);
      attention.multiply_values(scores, tile.values);
      if (!is_last) tile.load_values(v_cache, next, g, t);
      next = rows_of(segment, at + 2 * kWarps);
    }
    attention.store(of_warps[warp], lane, g, t);
    __syncthreads();
    // What the next segment's loads wait for is looked up while this one is put together.
    const Segment& next_segment = segments[phase ^ 1];
    next = rows_of(next_segment, next_segment.first_tile + warp);
    next_row = row_of(next_segment);

    bool is_whole = segment.num_workers == 1;
    if (!is_whole) {
      Part* parts = of_workers + 2 * segment.first_worker;
      const auto place = [](int part) { return 2 * part + (part == 0); };
      Part& mine = parts[place(blockIdx.x - segment.first_worker)];
      for (int entry = threadIdx.x; entry < Part::kEntries; entry += kThreads) {
        if (Part::query(entry) < group) sum_of<kWarps>(of_warps, entry).store(mine);
      }
      int* counter = reinterpret_cast<int*>(workspace + kCounterBytes * segment.first_worker);
      is_whole = is_last_to_come(counter, segment.num_workers);
      if (is_whole) {
#pragma unroll
        for (int n = 0; n < kQueryTiles; ++n) {
          Sum<Part, Part::kDimTiles> sum(n * Part::kDimTiles * nb::kWarpSize + lane);
          if (8 * n + 2 * t < group) {
#pragma unroll 4
            for (int i = warp; i < segment.num_workers; i += kWarps) sum.add(parts[place(i)]);
          }
          sum.store(of_warps[warp]);
        }
        __syncthreads();
      }
    }
    if (is_whole) {
      T* target = out + row * out_stride + segment.head * group * kHeadDim;
      for (int entry = threadIdx.x; entry < Part::kEntries; entry += kThreads) {
        const int query = Part::query(entry);
        if (query >= group) continue;
        const Sum<Part, 1> sum = sum_of<kWarps>(of_warps, entry);
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          if (query + c == group) continue;
          const float factor = 1.0f / sum.total[c];
          const float values[2] = {sum.values[0][c] * factor, sum.values[0][c + 2] * factor};
          nb::store_floats<T>(target + (query + c) * kHeadDim + Part::dimension(entry), values);
        }
      }
    }
    __syncthreads();  // of_warps and this segment may be written again
  }
}
