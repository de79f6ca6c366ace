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
// The bytes to move are K and V once, for all query heads of a group together. What limits the speed
// is how many of them are under way at a time, and that no multiprocessor runs out of work.
//
// Work. A *unit* is 16 keys for each warp of a block; a *pair* is one KV head of one sequence. The
// units of all pairs stand in one line, which is cut into equal chunks, one for each block (a
// *worker*). So a worker has the end of one pair, some whole pairs and the beginning of another; or,
// where pairs are few and all must be done soon (`apart`), a part of one pair. Each worker reads all
// lengths and finds its own chunk: no plan comes from the host, and a captured graph serves any
// lengths. A pair in several chunks is put together by the last of its workers to finish, in the
// order of the chunks: the result does not depend on who was last.
//
// A warp takes every kWarps-th tile of 16 keys. K and V go from global memory straight into the
// registers that the tensor cores read, 16 bytes a lane, because sums over dimensions and over keys
// may run in any order as long as both factors agree on it:
//   scores  S = Q K^T   (mma: 16 queries x 8 keys): lane 4g + t holds of key g the dimensions that
//                       it holds of query g; see Slice
//   output  O^T = V^T P^T  (16 dimensions x 8 queries): the scores' layout is already P^T's; lane
//                       4g + t holds of keys 2t, 2t + 1, 2t + 8, 2t + 9 its eighth of the dimensions
// The next tile's keys are loaded as soon as the scores are done, its values after the output.

#include "nb/fast_math.cuh"
#include "nb/mma.cuh"
#include "nb/reduce.cuh"
#include "nb/types.cuh"

namespace nb::decode {

constexpr int kTileKeys = 16;

// ---- What the tensor cores read ----

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

// ---- Partial results ----

// The attention of a group's queries to some of the keys: the weights of the values are
// exp2(score - maximum), `total` is their sum. `values` lie as the accumulators of mma do: entry
// 32 * i + lane is what `lane` has in its i-th one, of queries q and q + 1 for dimension d, then of
// both for d + 1.
template <typename T, int kHeadDim, int kQueryTiles>
struct Partial {
  static constexpr int kDimTiles = kHeadDim / 16;
  static constexpr int kEntries = kQueryTiles * kDimTiles * kWarpSize;

  Pack<float, 4> values[kEntries];
  float maximum[8 * kQueryTiles];
  float total[8 * kQueryTiles];

  static __device__ __forceinline__ int query(int entry) {
    return entry / (kDimTiles * kWarpSize) * 8 + entry % 4 * 2;
  }
  static __device__ __forceinline__ int dimension(int entry) {
    return Slice<T, kHeadDim, 8>::dimension(entry % kWarpSize / 4,
                                            entry / kWarpSize % kDimTiles);
  }
};

// Each worker has a counter and, behind all counters, two partial results.
constexpr int kCounterBytes = 16;

// A sum of partial results, of kSize entries with the same two queries: first, first + 32, ...
template <typename Part, int kSize>
struct Sum {
  int first;
  float values[kSize][4] = {};
  float maximum[2] = {-infinity(), -infinity()};
  float total[2] = {};

  __device__ __forceinline__ explicit Sum(int first) : first(first) {}

  __device__ __forceinline__ void add(const Part& part) {
    const int query = Part::query(first);
    float old_weight[2], weight[2];
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      const float high = fmaxf(maximum[c], part.maximum[query + c]);
      old_weight[c] = exp2_fast(maximum[c] - high);
      weight[c] = exp2_fast(part.maximum[query + c] - high);
      maximum[c] = high;
      total[c] = total[c] * old_weight[c] + part.total[query + c] * weight[c];
    }
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      const Pack<float, 4> added = part.values[first + i * kWarpSize];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        values[i][j] = values[i][j] * old_weight[j % 2] + added.items[j] * weight[j % 2];
      }
    }
  }

  __device__ __forceinline__ void store(Part& part) const {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      part.values[first + i * kWarpSize] = {
          {values[i][0], values[i][1], values[i][2], values[i][3]}};
    }
    if (Part::dimension(first) != 0) return;
#pragma unroll
    for (int c = 0; c < 2; ++c) {
      part.maximum[Part::query(first) + c] = maximum[c];
      part.total[Part::query(first) + c] = total[c];
    }
  }
};

// One entry of the sum of a block's warps. The first warp always has keys.
template <int kWarps, typename Part>
__device__ __forceinline__ Sum<Part, 1> sum_of(const Part* of_warps, int entry) {
  Sum<Part, 1> sum(entry);
  // The highest maximum first: then no addition waits for a power of the one before.
#pragma unroll 4
  for (int i = 0; i < 2 * kWarps; ++i) {
    float& high = sum.maximum[i % 2];
    high = fmaxf(high, of_warps[i / 2].maximum[Part::query(entry) + i % 2]);
  }
#pragma unroll 4
  for (int warp = 0; warp < kWarps; ++warp) sum.add(of_warps[warp]);
  return sum;
}

// ---- Work ----

__device__ __forceinline__ int ceil_div(int a, int b) { return (a + b - 1) / b; }

// The tokens that a sequence's query sees, and the tiles in which they lie.
struct Span {
  int begin, end, first_tile, num_tiles;

  __device__ __forceinline__ Span(int64 length, int window)
      : begin(window > 0 && length > window ? static_cast<int>(length) - window : 0),
        end(static_cast<int>(length)),
        first_tile(begin / kTileKeys),
        num_tiles(ceil_div(end, kTileKeys) - first_tile) {}

  template <int kWarps>
  __device__ __forceinline__ int units() const {
    return ceil_div(num_tiles, kWarps);
  }
};

__device__ __forceinline__ int lane_sum(int value) {
#pragma unroll
  for (int distance = kWarpSize / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kAllLanes, value, distance);
  }
  return value;
}

__device__ __forceinline__ int sum_of_lanes_up_to(int value, int lane) {
#pragma unroll
  for (int distance = 1; distance < kWarpSize; distance *= 2) {
    const int other = __shfl_up_sync(kAllLanes, value, distance);
    if (lane >= distance) value += other;
  }
  return value;
}

// What a worker has of one pair.
struct Segment {
  int sequence, head;
  int begin, end;             // the keys: of them, these count, ...
  int first_tile, last_tile;  // ... in these tiles
  int first_worker;           // of those that share the pair
  int num_workers;            // 0: there is no segment left
};

// A worker's chunk of the line of units.
template <int kWarps>
struct Chunk {
  int size;      // of every worker's chunk
  bool apart;    // each pair begins a chunk
  int at, end;   // in the line
  int sequence;  // that of unit `at`
  int offset;    // of unit `at` among the units of its sequence, head after head

  // All lanes of a warp find it together.
  __device__ __forceinline__ void find(const int64* seq_lens, int num_seqs, int num_kv_heads,
                                       int window, int lane) {
    const auto line = [&](int s) {
      return s < num_seqs ? length(Span(seq_lens[s], window).units<kWarps>()) * num_kv_heads : 0;
    };
    const auto whole_line = [&] {
      int sum = 0;
      for (int s = lane; s < num_seqs; s += kWarpSize) sum += line(s);
      return lane_sum(sum);
    };
    const int workers = gridDim.x;
    size = 1;
    int total = whole_line();  // none of the units is empty yet
    size = max(1, ceil_div(total, workers));
    while (apart && (total = whole_line()) > size * workers) size += 1 + size / 16;
    at = min(total, static_cast<int>(blockIdx.x) * size);
    end = min(total, at + size);
    if (at == end) return;
    int before = 0;
    for (int base = 0;; base += kWarpSize) {
      const int here = line(base + lane);
      const int up_to = before + sum_of_lanes_up_to(here, lane);
      const unsigned beyond = __ballot_sync(kAllLanes, up_to > at);
      if (beyond != 0) {
        const int found = __ffs(beyond) - 1;
        sequence = base + found;
        offset = at - __shfl_sync(kAllLanes, up_to - here, found);
        return;
      }
      before = __shfl_sync(kAllLanes, up_to, kWarpSize - 1);
    }
  }

  // The next segment from `at` on, which moves behind it.
  __device__ __forceinline__ Segment next(const int64* seq_lens, int num_kv_heads, int window) {
    while (at < end) {
      const Span span(seq_lens[sequence], window);
      const int units = span.units<kWarps>();
      const int pair_length = length(units);
      if (offset == pair_length * num_kv_heads) {
        ++sequence;
        offset = 0;
        continue;
      }
      const int head = offset / pair_length;
      const int unit = offset - head * pair_length;
      const int passed = min((unit < units ? units : pair_length) - unit, end - at);
      const int pair = at - unit;  // its first unit in the line
      at += passed;
      offset += passed;
      if (unit >= units) continue;
      Segment segment;
      segment.sequence = sequence;
      segment.head = head;
      segment.begin = span.begin;
      segment.first_tile = span.first_tile + unit * kWarps;
      segment.last_tile = span.first_tile + min(span.num_tiles, (unit + passed) * kWarps);
      segment.end = min(span.end, segment.last_tile * kTileKeys);
      segment.first_worker = pair / size;
      segment.num_workers = (pair + units - 1) / size - segment.first_worker + 1;
      return segment;
    }
    return Segment{};
  }

  // Of a pair in the line: its units, and empty ones up to a whole chunk, or two for the time that it
  // takes to begin and to end a pair.
  __device__ __forceinline__ int length(int units) const {
    if (apart) return ceil_div(units, size) * size;
    return units == 0 ? 0 : units + 2;
  }
};

// Where the two halves of a tile lie: 8 keys are never in two blocks.
struct Rows {
  int eights[2];  // of rows of the whole cache: an int counts those of 2^34 rows

  // Keys from `end` on lie in block 0: they are loaded with their tile, and left out.
  __device__ __forceinline__ Rows(const int64* table, int tile, int end, int head,
                                  int num_kv_heads, int log2_block_size) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int key = tile * kTileKeys + half * 8;
      const int block = key < end ? static_cast<int>(table[key >> log2_block_size]) : 0;
      const int in_block = (key & ((1 << log2_block_size) - 1)) / 8;
      eights[half] = ((block * num_kv_heads + head) << (log2_block_size - 3)) + in_block;
    }
  }

  // The first row of a half, of all rows of the cache.
  __device__ __forceinline__ int64 of(int half) const { return static_cast<int64>(eights[half]) * 8; }
};

// ---- One warp over its tiles ----

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
      __syncthreads();
      if (threadIdx.x == 0) {
        int* counter = reinterpret_cast<int*>(workspace + kCounterBytes * segment.first_worker);
        __threadfence();
        is_whole = atomicAdd(counter, 1) == segment.num_workers - 1;
        if (is_whole) *counter = 0;
        __threadfence();
      }
      is_whole = __syncthreads_or(is_whole);
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
