// What requests add to and take from single logits: masks, biases and penalties, in place.
//
// penalties:       saved[e] = logits[r, i];  logits[r, i] = changed, for entry e = (r, i)
// restore_logits:  logits[r, i] = saved[e]
//
// with, in this order (vLLM's),
//   x = -inf where the entry is banned; x += bias;
//   x = x / repetition if x > 0, else x * repetition, where the token was seen (prompt or output);
//   x -= count * frequency, x -= presence, where the output holds the token `count` > 0 times.
//
// logits    [R, V] of T, rows of `stride` elements; computed in float, rounded to T once
// place     [E] entry e is token place[e] % V of row place[e] / V; no two entries are the same
// bias      [E] double; 0 for none
// marks     [E] bits 0 and 1: banned, seen; the rest: how often the output holds the token
// repetition, frequency, presence   [R] double
// saved     [E] of T: what stood there before
//
// One thread an entry. A step changes a few hundred of a row's 150,000 logits, so it moves E * 28
// bytes and 32 bytes (a sector) twice for each logit, and no copy of the logits is made: 512 rows of
// 152,064 floats would be 311 MB read and written.

#include "nb/fast_math.cuh"
#include "nb/types.cuh"

template <typename T>
__global__ void penalties(T* logits, T* saved, const nb::int64* __restrict__ place,
                          const double* __restrict__ bias, const nb::int64* __restrict__ marks,
                          const double* __restrict__ repetition,
                          const double* __restrict__ frequency,
                          const double* __restrict__ presence,
                          nb::int64 num_rows, nb::int64 vocab_size, nb::int64 stride,
                          nb::int64 num_entries) {
  const nb::int64 entry = static_cast<nb::int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (entry >= num_entries) return;
  const nb::int64 row = place[entry] / vocab_size;
  if (place[entry] < 0 || row >= num_rows) return;
  T* logit = logits + row * stride + place[entry] % vocab_size;
  saved[entry] = *logit;

  constexpr nb::int64 kBanned = 1, kSeen = 2, kOneInOutput = 4;
  float x = marks[entry] & kBanned ? -nb::infinity() : nb::to_float(*logit);
  x += static_cast<float>(bias[entry]);
  if (marks[entry] & kSeen) {
    const float penalty = static_cast<float>(repetition[row]);
    x = x > 0.0f ? x / penalty : x * penalty;
  }
  const nb::int64 times = marks[entry] / kOneInOutput;
  if (times > 0) {
    // Rounded one by one, as in torch: a fused product and difference would differ in the last bit.
    x = __fsub_rn(x, __fmul_rn(static_cast<float>(times), static_cast<float>(frequency[row])));
    x -= static_cast<float>(presence[row]);
  }
  *logit = nb::from_float<T>(x);
}

template <typename T>
__global__ void restore_logits(T* logits, const T* __restrict__ saved,
                               const nb::int64* __restrict__ place, nb::int64 num_rows,
                               nb::int64 vocab_size, nb::int64 stride, nb::int64 num_entries) {
  const nb::int64 entry = static_cast<nb::int64>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (entry >= num_entries) return;
  const nb::int64 row = place[entry] / vocab_size;
  if (place[entry] < 0 || row >= num_rows) return;
  logits[row * stride + place[entry] % vocab_size] = saved[entry];
}
