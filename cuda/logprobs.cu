// Log-probabilities: of a chosen token with its rank, and of the k most likely ones.
//
// logits    [R, V] of T, rows of `stride` elements; as the model gave them
// rows, token_ids   [Q] the questions: a row of the logits, and the token chosen there
// chosen    [Q] float: logit - log(sum(exp(logits)))
// rank      [Q] 1 + how many tokens are more likely
// top_ids, top_logprobs   [Q, k] most likely first, of equals the smaller id; k at most V and 256
//
// Rows that hold NaN or +inf, or nothing but -inf, have NaN for log-probabilities and ids 0, 1, ...
//
// One block of 512 threads a question. The first pass over the row finds the largest value and the
// rank; the second sums up, and gathers the hardly more than k values that reach the k-th largest of
// the threads' maxima, which are then sorted. So it moves Q * V elements twice; only rows whose
// largest values are equal by hundreds take more, to select the k-th exactly.

#include "nb/select.cuh"

struct LogprobsMemory {
  nb::SummaryMemory summary;
  nb::SelectMemory select;
  nb::Candidates candidates;
};

// How many values of the row `count_it` is true for.
template <typename T, typename Count>
__device__ nb::uint64 count_in(const nb::LogitsRow<T>& row, Count count_it, nb::ScanMemory& memory) {
  nb::uint64 mine = 0, total;
  row.for_each([&](int, float value) { mine += count_it(value); });
  nb::exclusive_scan(mine, total, memory);
  return total;
}

// The candidates become the k largest of the row, whatever number of them is equal.
template <typename T>
__device__ __noinline__ void gather_exactly(nb::LogitsRow<T> row, int k, float largest,
                               LogprobsMemory& memory) {
  const auto by_value = [](int, float value) { return nb::key_of(value); };
  const float kth = nb::value_of(
      nb::radix_select<false>(row, nb::key_of(-nb::infinity()), nb::key_of(largest), k,
                              by_value, nb::One(), memory.select));
  const nb::uint64 above =
      count_in(row, [&](float value) { return value > kth; }, memory.select.scan);
  // Of those equal to it, the first in the vocabulary: a second selection, by place.
  const auto by_place = [&](int place, float value) {
    return value == kth && row.contains(place) ? ~static_cast<nb::uint32>(place) : 0u;
  };
  const int last_place = static_cast<int>(~nb::radix_select<false>(
      row, ~static_cast<nb::uint32>(row.end - 1), ~static_cast<nb::uint32>(row.begin), k - above,
      by_place, nb::One(), memory.select));
  memory.candidates.clear();
  row.for_each([&](int place, float value) {
    if (value > kth || (value == kth && row.contains(place) && place <= last_place)) {
      memory.candidates.add(~nb::key_of(value), place);
    }
  });
  memory.candidates.complete();
}

template <typename T>
__global__ void __launch_bounds__(nb::kRowThreads)
    logprobs(float* chosen, nb::int64* rank, nb::int64* top_ids, float* top_logprobs,
             const T* __restrict__ logits, const nb::int64* __restrict__ rows,
             const nb::int64* __restrict__ token_ids, int vocab_size, nb::int64 stride, int k) {
  __shared__ LogprobsMemory memory;
  const nb::int64 question = blockIdx.x;
  const nb::LogitsRow<T> row(logits + rows[question] * stride, vocab_size, nullptr, 0);
  const nb::int64 token_id = token_ids[question];
  const float of_chosen =
      row.has(token_id) ? row.value_at(row.begin + static_cast<int>(token_id)) : nb::not_a_number();

  nb::uint64 mine = 0, above;
  const nb::RowSummary summary =
      nb::summarise(row, memory.summary, [&](float value) { mine += value > of_chosen; });
  nb::exclusive_scan(mine, above, memory.select.scan);
  if (threadIdx.x == 0) rank[question] = static_cast<nb::int64>(above) + 1;
  top_ids += question * k;
  top_logprobs += question * k;
  if (!(fabsf(summary.largest) <= nb::kLargestFloat)) {
    if (threadIdx.x == 0) chosen[question] = nb::not_a_number();
    for (int i = threadIdx.x; i < k; i += nb::kRowThreads) {
      top_ids[i] = i;
      top_logprobs[i] = nb::not_a_number();
    }
    return;
  }

  float bound = nb::infinity();  // gathers nothing
  if (k > 0) {
    bound = -nb::infinity();
    if (row.size() > nb::kCapacity) {
      const nb::uint32 reached = nb::reached_by(k, summary.of_thread);
      bound = nb::value_of(max(reached, nb::key_of(bound)));
    }
  }
  const nb::Weight weight{summary.largest, nb::kLog2E};
  nb::uint64 mass = 0, total;
  memory.candidates.clear();
  row.template for_each_pack<16>([&](int place, const auto& values) {
    const bool has_any = values.largest() >= bound;
#pragma unroll
    for (int j = 0; j < values.size; ++j) {
      const float value = values.items[j];
      mass += weight(value);
      if (has_any && value >= bound && row.contains(place + j)) {
        memory.candidates.add(~nb::key_of(value), place + j);
      }
    }
  });
  nb::exclusive_scan(mass, total, memory.select.scan);
  const float log_sum = logf(static_cast<float>(total) / nb::kMassOfOne);
  const auto logprob_of = [&](float value) { return value - summary.largest - log_sum; };
  if (threadIdx.x == 0) chosen[question] = logprob_of(of_chosen);
  if (k == 0) return;

  if (!memory.candidates.complete()) {  // many are equal
    gather_exactly(row, k, summary.largest, memory);
  }
  memory.candidates.sort();
  for (int i = threadIdx.x; i < k; i += nb::kRowThreads) {
    const nb::uint64 entry = memory.candidates.entries[i];
    const int place = static_cast<int>(static_cast<nb::uint32>(entry));
    top_ids[i] = row.id_at(place);
    top_logprobs[i] = logprob_of(nb::value_of(~static_cast<nb::uint32>(entry >> 32)));
  }
}
