// Tokens from logits: the largest (`greedy`), or one drawn from what temperature, min_p, top_k and
// top_p keep (`sample`).
//
// logits    [R, V] of T, rows of `stride` elements; the padding beyond V is not read
// out_ids   [R] (greedy) or [M] (sample), always below V
// largest   [R] float: the row's largest logit, NaN where any is. Where it is not finite nothing can
//           be sampled, and the ids mean nothing.
// Of `sample` alone, row by row (a row's slot is rewritten whole when another request takes it):
// temperature, min_p, top_p [R] double   temperature 0 takes the largest
// top_k     [R] 0 keeps all
// seed, position   [R] of the request, and of the token to be sampled
// allowed_offsets  [R + 1] row r may have only allowed_ids[allowed_offsets[r] : allowed_offsets[r + 1]],
//           rising and without repetition; any token where that is empty
// sample_offsets   [R + 1] row r draws out_ids[sample_offsets[r] : sample_offsets[r + 1]], for the
//           request's samples sample_indices[...]
//
// One block of 1,024 threads a row; a row's result depends on that row alone.
//
// Tokens kept: logit >= largest + temperature * log(min_p); of those the top_k largest and what
// equals the last of them; of those the fewest largest whose probability is top_p of all, and what
// equals the last of them. So one threshold decides, and no sort is needed: see nb/select.cuh.
// The id is the first, in vocabulary order, at which the running mass of those kept passes u times
// the whole, for the uniform u of Philox(seed; sample, position). Masses are exact integers.
//
// Bytes: each pass reads V elements of the row.
//   greedy                                     1 pass
//   temperature                                1 pass and 1/32 (the segment of the drawn token, in L2)
//   top_k <= 512, or a nucleus of some hundreds   2 passes: the second gathers the few largest
//   min_p alone                                2 passes
//   wider                                      5 or 6 passes: radix selection over the row
// 512 rows x 152,064 floats are 311 MB a pass. A single row of it is 0.6 MB for one multiprocessor,
// some 7 us a pass: little beside reading a model's weights, so rows are not split.

#include "nb/philox.cuh"
#include "nb/select.cuh"

template <typename T>
__global__ void __launch_bounds__(nb::kRowThreads)
    greedy(nb::int64* out_ids, float* largest, const T* __restrict__ logits, int vocab_size,
           nb::int64 stride) {
  __shared__ nb::SummaryMemory memory;
  const nb::LogitsRow<T> row(logits + blockIdx.x * stride, vocab_size, nullptr, 0);
  const nb::RowSummary summary = nb::summarise<false>(row, 0.0f, memory, [](float) {});
  if (threadIdx.x == 0) {
    out_ids[blockIdx.x] = row.id_at(summary.place);
    largest[blockIdx.x] = summary.largest;
  }
}

struct SampleMemory {
  nb::SummaryMemory summary;
  nb::SelectMemory select;
  nb::Candidates candidates;
  float floor;
  int drawn;
};

// The mass of the entries that reach `threshold`: of each warp's in `memory.mass`, and of all.
template <typename Source>
__device__ __noinline__ nb::uint64 mass_of(Source source, float threshold, nb::Weight weight,
                              nb::SummaryMemory& memory) {
  nb::uint64 mass = 0;
  source.for_each([&](int, float value) {
    if (value >= threshold) mass += weight(value);
  });
#pragma unroll
  for (int distance = nb::kWarpSize / 2; distance > 0; distance /= 2) {
    mass += __shfl_xor_sync(nb::kAllLanes, mass, distance);
  }
  __syncthreads();
  if (threadIdx.x % nb::kWarpSize == 0) memory.mass[threadIdx.x / nb::kWarpSize] = mass;
  __syncthreads();
  nb::uint64 total = 0;
  for (int warp = 0; warp < nb::kRowWarps; ++warp) total += memory.mass[warp];
  return total;
}

// What of `total` a nucleus must reach: at least one unit, at most all.
__device__ __forceinline__ nb::uint64 nucleus_goal(double top_p, nb::uint64 total) {
  const double goal = ceil(top_p * static_cast<double>(total));
  return min(max(static_cast<nb::uint64>(goal), nb::uint64(1)), total);
}

// The first place of [first, last) at which the running mass of the values that reach `threshold`
// passes `target`, which lies below `expected`, their mass. Where `expected` was a float's sum, their
// exact mass takes its place in proportion. `otherwise` where they weigh nothing.
template <typename Source>
__device__ __noinline__ int place_passing(Source source, int first, int last, nb::uint64 target,
                             nb::uint64 expected, float threshold, nb::Weight weight, int otherwise,
                             SampleMemory& memory) {
  const int per_thread = (last - first + nb::kRowThreads - 1) / nb::kRowThreads;
  const int begin = min(first + static_cast<int>(threadIdx.x) * per_thread, last);
  const int end = min(begin + per_thread, last);
  const auto mass_at = [&](int at) {
    const float value = source.value_at(at);
    return value >= threshold ? weight(value) : 0;
  };
  nb::uint64 mine = 0, total;
  for (int at = begin; at < end; ++at) mine += mass_at(at);
  nb::uint64 before = nb::exclusive_scan(mine, total, memory.select.scan);
  if (total != expected && total != 0) {
    const double part = static_cast<double>(target) / static_cast<double>(expected);
    target = min(static_cast<nb::uint64>(part * static_cast<double>(total)), total - 1);
  }
  if (threadIdx.x == 0 && total == 0) memory.drawn = otherwise;
  if (before <= target && target < before + mine) {
    int at = begin;
    for (before += mass_at(at); before <= target; before += mass_at(at)) ++at;
    memory.drawn = at;
  }
  __syncthreads();
  const int drawn = memory.drawn;
  __syncthreads();
  return drawn;
}

// One draw from the whole row, whose warps' segments have the masses `memory.summary.mass`.
template <typename T>
__device__ int draw(const nb::LogitsRow<T>& row, nb::uint64 bits, nb::uint64 total, float threshold,
                    nb::Weight weight, int otherwise, SampleMemory& memory) {
  nb::uint64 target = __umul64hi(bits << 11, total);  // floor(u * total)
  int warp = 0;
  while (target >= memory.summary.mass[warp]) target -= memory.summary.mass[warp++];
  const int first = max(row.begin, warp * row.segment_size());
  const int last = min((warp + 1) * row.segment_size(), row.end);
  return place_passing(row, first, last, target, memory.summary.mass[warp], threshold, weight,
                       otherwise, memory);
}

// One draw from the candidates.
__device__ int draw(const nb::ByPlace& source, nb::uint64 bits, nb::uint64 total, float threshold,
                    nb::Weight weight, int otherwise, SampleMemory& memory) {
  const int at = place_passing(source, 0, source.candidates.count, __umul64hi(bits << 11, total),
                               total, threshold, weight, -1, memory);
  return at < 0 ? otherwise : source.place_at(at);
}

template <typename T>
__global__ void __launch_bounds__(nb::kRowThreads)
    sample(nb::int64* out_ids, float* largest, const T* __restrict__ logits,
           const double* __restrict__ temperature, const double* __restrict__ min_p,
           const double* __restrict__ top_p, const nb::int64* __restrict__ top_k,
           const nb::int64* __restrict__ seed, const nb::int64* __restrict__ position,
           const nb::int64* __restrict__ allowed_offsets,
           const nb::int64* __restrict__ allowed_ids,
           const nb::int64* __restrict__ sample_offsets,
           const nb::int64* __restrict__ sample_indices, int vocab_size, nb::int64 stride) {
  __shared__ SampleMemory memory;
  const int r = blockIdx.x;
  const int num_allowed = static_cast<int>(allowed_offsets[r + 1] - allowed_offsets[r]);
  const nb::LogitsRow<T> row(logits + r * stride, vocab_size,
                             num_allowed > 0 ? allowed_ids + allowed_offsets[r] : nullptr,
                             num_allowed);

  // The largest.
  const bool random = temperature[r] > 0.0;
  const float scale = nb::kLog2E / (random ? static_cast<float>(temperature[r]) : 1.0f);
  const nb::RowSummary summary =
      nb::summarise<true>(row, scale, memory.summary, [](float) {});
  if (threadIdx.x == 0) largest[r] = summary.largest;
  const bool finite = fabsf(summary.largest) <= nb::kLargestFloat;
  if (!random || !finite) {
    for (nb::int64 at = sample_offsets[r] + threadIdx.x; at < sample_offsets[r + 1];
         at += nb::kRowThreads) {
      out_ids[at] = row.id_at(summary.place);
    }
    return;
  }

  // One draw for each sample, from what reaches a threshold.
  const nb::Weight weight{summary.largest, scale};
  const auto draw_all = [&](const auto& source, nb::uint64 total, float threshold) {
    for (nb::int64 at = sample_offsets[r]; at < sample_offsets[r + 1]; ++at) {
      const nb::uint64 bits = nb::uniform_bits(seed[r], sample_indices[at], position[r]);
      const int place =
          draw(source, bits, total, threshold, weight, summary.place, memory);
      if (threadIdx.x == 0) out_ids[at] = row.id_at(place);
    }
  };

  // The threshold of min_p; that of nothing keeps all but masked tokens.
  const bool by_min_p = min_p[r] > 0.0;
  if (threadIdx.x == 0) {
    const double least = by_min_p ? summary.largest + temperature[r] * log(min_p[r]) : 0.0;
    memory.floor = by_min_p ? fmaxf(static_cast<float>(least), -nb::kLargestFloat)
                            : -nb::kLargestFloat;
  }
  __syncthreads();
  const float floor = memory.floor;
  const bool by_top_k = 0 < top_k[r] && top_k[r] < row.size();
  const bool by_top_p = top_p[r] < 1.0;
  if (!by_top_k && !by_top_p) {
    draw_all(row, by_min_p ? mass_of(row, floor, weight, memory.summary) : summary.total_mass,
             floor);
    return;
  }

  // Selection in `source`, which holds all entries from `low` on.
  const auto select_and_draw = [&](const auto& source, float low, bool total_known) {
    const nb::uint32 high = nb::key_of(summary.largest);
    const auto by_value = [](int, float value) { return nb::key_of(value); };
    if (by_top_k) {
      low = nb::value_of(nb::radix_select<false>(source, nb::key_of(low), high, top_k[r], by_value,
                                                 nb::One(), memory.select));
    }
    if (by_top_p) {
      const nb::uint64 total =
          total_known ? summary.total_mass : mass_of(source, low, weight, memory.summary);
      low = nb::value_of(nb::radix_select<true>(source, nb::key_of(low), high,
                                                nucleus_goal(top_p[r], total), by_value, weight,
                                                memory.select));
    }
    draw_all(source, mass_of(source, low, weight, memory.summary), low);
  };

  // The few largest, if what is to be kept is surely among them.
  const nb::int64 wanted = by_top_k ? top_k[r] : nb::kMostByThreads;
  const bool whole = row.size() <= nb::kCapacity;
  if (whole || wanted <= nb::kMostByThreads) {
    const nb::uint32 reached =
        whole ? 0 : nb::reached_by(static_cast<int>(wanted), summary.of_thread);
    const float bound = fmaxf(floor, nb::value_of(reached));  // of NaN, the floor
    memory.candidates.clear();
    row.template for_each_pack<4>([&](int place, const auto& values) {
      if (!(values.largest() >= bound)) return;
#pragma unroll
      for (int j = 0; j < values.size; ++j) {
        const float value = values.items[j];
        if (value >= bound) memory.candidates.add(place + j, __float_as_uint(value));
      }
    });
    if (memory.candidates.complete()) {
      memory.candidates.sort();
      const nb::ByPlace few{memory.candidates};
      const bool all_of_row = bound <= floor;
      const bool total_known = !by_top_k && !by_min_p && !all_of_row;
      if (by_top_k || all_of_row ||
          (total_known && mass_of(few, bound, weight, memory.summary) >=
                              nucleus_goal(top_p[r], summary.total_mass))) {
        select_and_draw(few, bound, total_known);
        return;
      }
    }
  }

  // Else the whole row. Tokens of probability below (1 - p) / V weigh less than 1 - p together, so
  // none is in a nucleus of all tokens; half of that leaves room for rounding.
  const bool total_known = !by_top_k && !by_min_p;
  float low = floor;
  if (total_known) {
    const float share = static_cast<float>(1.0 - top_p[r]) / row.size();
    const float whole_weight = static_cast<float>(summary.total_mass) / nb::kMassOfOne;
    low = fmaxf(low, summary.largest + log2f(0.5f * share * whole_weight) / scale);
  }
  select_and_draw(row, low, total_known);
}
