// The work of paged_attention_decode, cut on the device.
//
// A *unit* is 16 keys for each warp of a block; a *pair* is one KV head of one sequence. The
// units of all pairs stand in one line, which is cut into equal chunks, one for each block (a
// *worker*). So a worker has the end of one pair, some whole pairs and the beginning of another; or,
// where pairs are few and all must be done soon (`apart`), a part of one pair. Each worker reads all
// lengths and finds its own chunk: no plan comes from the host, and a captured graph serves any
// lengths. A pair in several chunks is put together by the last of its workers to finish, in the
// order of the chunks: the result does not depend on who was last.

#pragma once

#include "nb/reduce.cuh"
#include "nb/types.cuh"

namespace nb::decode {

constexpr int kTileKeys = 16;

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
      return warp_sum(sum);
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
      const int up_to = before + warp_sum_up_to(here, lane);
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

}  // namespace nb::decode
