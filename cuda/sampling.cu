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
// One block of 512 threads a row; a row's result depends on that row alone.
//
// Tokens kept: logit >= largest + temperature * log(min_p); of those the top_k largest and what
// equals the last of them; of those the fewest largest whose probability is top_p of all, and what
// equals the last of them. So one threshold decides, and no sort is needed: see nb/select.cuh.
// The id is the first, in vocabulary order, at which the running mass of those kept passes u times
// the whole, for the uniform u of Philox(seed; sample, position). Masses are exact integers.
//
// Bytes: each pass reads V elements of the row.
//   greedy                1 pass
//   temperature, min_p    2 passes, and 1/32: the segment of the drawn token, from L2
//   top_k <= 256, or a nucleus of some hundreds    2 passes: the second gathers the few largest
//   wider                 5 or 6 passes: radix selection over the row
// 512 rows x 152,064 floats are 311 MB a pass. A single row of it is 0.6 MB for one multiprocessor,
// some 10 us a pass: little beside reading a model's weights, so rows are not split.

#include "nb/philox.cuh"
#include "nb/select.cuh"

template <typename T>
__global__ void __launch_bounds__(nb::kRowThreads)
    greedy(nb::int64* out_ids, float* largest, const T* __restrict__ logits, int vocab_size,
           nb::int64 stride) {
  __shared__ nb::SummaryMemory memory;
  const nb::LogitsRow<T> row(logits + blockIdx.x * stride, vocab_size, nullptr, 0);
  const nb::RowSummary summary = nb::summarise(row, memory, [](float) {});
  if (threadIdx.x == 0) {
    out_ids[blockIdx.x] = row.id_at(summary.place);
    largest[blockIdx.x] = summary.largest;
  }
}

struct SampleMemory {
  nb::SummaryMemory summary;
  nb::SelectMemory select;
  nb::Candidates candidates;
  nb::uint64 mass_of_warp[nb::kRowWarps];
  float floor;
  nb::uint64 of_floor;
};

// The mass of the entries that reach `threshold`: of each warp's, and of all.
template <typename Source>
__device__ __noinline__ nb::uint64 mass_of(Source source, float threshold, nb::Weight weight,
                                           nb::uint64 (&mass_of_warp)[nb::kRowWarps]) {
  nb::uint64 mass = 0;
  source.for_each([&](int, float value) {
    if (value >= threshold) mass += weight(value);
  });
  mass = nb::warp_sum(mass);
  __syncthreads();  // for whoever reads the last ones
  if (threadIdx.x % nb::kWarpSize == 0) mass_of_warp[threadIdx.x / nb::kWarpSize] = mass;
  __syncthreads();
  nb::uint64 total = 0;
  for (int warp = 0; warp < nb::kRowWarps; ++warp) total += mass_of_warp[warp];
  return total;
}

// What of `total` a nucleus must reach: at least one unit, at most all.
__device__ __forceinline__ nb::uint64 nucleus_goal(double top_p, nb::uint64 total) {
  const double goal = ceil(top_p * static_cast<double>(total));
  return min(max(static_cast<nb::uint64>(goal), nb::uint64(1)), total);
}

// Draws from the values of a row that reach `threshold`, whose warps' segments have these masses,
// `total` together. One thread gets the first place at which the running mass passes u * total, for
// u = bits / 2^53; the others get -1.
template <typename T>
__device__ __noinline__ int draw_from_row(nb::LogitsRow<T> row, nb::uint64 bits, nb::uint64 total,
                                          const nb::uint64 (&mass_of_warp)[nb::kRowWarps],
                                          float threshold, nb::Weight weight,
                                          nb::ScanMemory& scan) {
  nb::uint64 target = __umul64hi(bits << 11, total);
  int warp = 0;
  while (target >= mass_of_warp[warp]) target -= mass_of_warp[warp++];
  const int first = max(row.begin, warp * row.segment_size());
  const int last = min((warp + 1) * row.segment_size(), row.end);
  const int per_thread = (last - first + nb::kRowThreads - 1) / nb::kRowThreads;
  const int begin = min(first + static_cast<int>(threadIdx.x) * per_thread, last);
  const int end = min(begin + per_thread, last);
  const auto mass_at = [&](int place) {
    const float value = row.value_at(place);
    return value >= threshold ? weight(value) : 0;
  };
  nb::uint64 mine = 0, of_segment;
  for (int place = begin; place < end; ++place) mine += mass_at(place);
  nb::uint64 before = nb::exclusive_scan(mine, of_segment, scan);
  if (target < before || before + mine <= target) return -1;
  int place = begin;
  for (before += mass_at(place); before <= target; before += mass_at(place)) ++place;
  return place;
}

template <typename T>
__global__ void __launch_bounds__(nb::kRowThreads, 2)
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

  const int first_sample = static_cast<int>(sample_offsets[r]);

  // The largest.
  const nb::RowSummary summary = nb::summarise(row, memory.summary, [](float) {});
  if (threadIdx.x == 0) largest[r] = summary.largest;
  const bool finite = fabsf(summary.largest) <= nb::kLargestFloat;
  if (!(temperature[r] > 0.0) || !finite) {
    const int last_sample = static_cast<int>(sample_offsets[r + 1]);
    for (int at = first_sample + threadIdx.x; at < last_sample; at += nb::kRowThreads) {
      out_ids[at] = row.id_at(summary.place);
    }
    return;
  }

  // One draw for each sample, from what reaches a threshold.
  const float scale = nb::kLog2E / static_cast<float>(temperature[r]);
  const nb::Weight weight{summary.largest, fminf(scale, nb::kLargestFloat)};
  const auto bits_of = [&](int at) {
    return nb::uniform_bits(seed[r], sample_indices[at], position[r]);
  };
  const auto draw_from_all = [&](float threshold) {
    const nb::uint64 total = mass_of(row, threshold, weight, memory.mass_of_warp);
    for (int at = first_sample; at < static_cast<int>(sample_offsets[r + 1]); ++at) {
      const int place = draw_from_row(row, bits_of(at), total, memory.mass_of_warp, threshold,
                                      weight, memory.select.scan);
      if (place >= 0) out_ids[at] = row.id_at(place);
    }
  };
  const auto draw_from_few = [&](const nb::ByPlace& few, float threshold) {
    const bool has_one = threadIdx.x < few.size();
    const float value = has_one ? few.value_at(threadIdx.x) : 0.0f;
    const nb::uint64 mass = has_one && value >= threshold ? weight(value) : 0;
    nb::uint64 total;
    const nb::uint64 before = nb::exclusive_scan(mass, total, memory.select.scan);
    for (int at = first_sample; at < static_cast<int>(sample_offsets[r + 1]); ++at) {
      const nb::uint64 target = __umul64hi(bits_of(at) << 11, total);
      if (before <= target && target < before + mass) {
        out_ids[at] = row.id_at(few.place_at(threadIdx.x));
      }
    }
  };

  // The threshold of min_p; that of nothing keeps all but masked tokens.
  if (threadIdx.x == 0) {
    const double least = summary.largest + temperature[r] * log(min_p[r]);
    memory.floor = fmaxf(fminf(static_cast<float>(least), summary.largest), -nb::kLargestFloat);
  }
  __syncthreads();
  const float floor = memory.floor;
  const bool by_top_k = 0 < top_k[r] && top_k[r] < row.size();
  const bool by_top_p = top_p[r] < 1.0;
  if (!by_top_k && !by_top_p) {
    draw_from_all(floor);
    return;
  }

  // The few largest, if top_k allows; and for a nucleus the mass of all that min_p keeps.
  const bool whole = row.size() <= nb::kCapacity;
  const int wanted = by_top_k ? static_cast<int>(top_k[r]) : nb::kMostByThreads;
  const bool is_tried = whole || wanted <= nb::kMostByThreads;
  float bound = floor;
  if (is_tried) {
    if (!whole) {
      const nb::uint32 reached = nb::reached_by(wanted, summary.of_thread);
      bound = nb::value_of(max(reached, nb::key_of(floor)));
    }
    nb::uint64 mine = 0;
    memory.candidates.clear();
    row.template for_each_pack<16>([&](int place, const auto& values) {
      const bool has_any = values.largest() >= bound;
#pragma unroll
      for (int j = 0; j < values.size; ++j) {
        const float value = values.items[j];
        if (!by_top_k && value >= floor) mine += weight(value);
        if (has_any && value >= bound) memory.candidates.add(place + j, __float_as_uint(value));
      }
    });
    nb::uint64 of_floor;
    nb::exclusive_scan(mine, of_floor, memory.select.scan);
    if (threadIdx.x == 0) memory.of_floor = of_floor;
  }

  // The threshold of all three, from a source that holds all entries from `low` on.
  const auto select = [&](const auto& source, float low) {
    const nb::uint32 high = nb::key_of(summary.largest);
    const auto by_value = [](int, float value) { return nb::key_of(value); };
    nb::uint64 total;
    if (by_top_k) {
      low = nb::value_of(nb::radix_select<false>(source, nb::key_of(low), high, top_k[r], by_value,
                                                 nb::One(), memory.select));
      total = mass_of(source, low, weight, memory.mass_of_warp);
    } else {
      total = memory.of_floor;
    }
    if (by_top_p) {
      low = nb::value_of(nb::radix_select<true>(source, nb::key_of(low), high,
                                                nucleus_goal(top_p[r], total), by_value, weight,
                                                memory.select));
    }
    return low;
  };
  if (is_tried && memory.candidates.complete()) {
    memory.candidates.sort();
    const nb::ByPlace few{memory.candidates};
    if (by_top_k || mass_of(few, bound, weight, memory.mass_of_warp) >=
                        nucleus_goal(top_p[r], memory.of_floor)) {
      draw_from_few(few, select(few, bound));
      return;
    }
  }

  // Else the whole row. Tokens of probability below (1 - p) / V weigh less than 1 - p together, so
  // none is in a nucleus; half of that leaves room for rounding.
  float low = memory.floor;
  if (!by_top_k) {
    const float share = static_cast<float>(1.0 - top_p[r]) / row.size();
    const float whole_weight = static_cast<float>(memory.of_floor) / nb::kMassOfOne;
    low = fmaxf(low, summary.largest + log2f(0.5f * share * whole_weight) / weight.scale);
  }
  draw_from_all(select(row, low));
}
