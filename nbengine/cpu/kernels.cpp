// CPU kernels in float32: matrices in 8 and 4 bits and in float32 with few rows of input, the small
// operations between them, attention of single query rows through block tables, and all of a decode
// step as one call. A plain C interface, compiled by nbengine/cpu/__init__.py for the machine it
// runs on and called by models/linear.py, models/ops.py, models/decode.py, execution/attention.py.
//
// The trick of the quantised matrices: a row of input becomes 16-bit integers with one scale for
// each 32 of its own values (15 significant bits against bfloat16's 8), so that products are exact
// integer sums, two to an instruction and lane, and a weight costs one shift and one mask to
// unpack. Sums over 32 values fit 32 bits: 32 * 2^15 * 2^7 = 2^27.
//
// Functions of the unnamed namespace that take a `Worker` are called by all threads of a team, which
// share their loops.
//
// Invariant: a row of output depends on its own row of input alone, to the last bit; the number of
// rows and of threads changes neither the values nor the order in which they are added.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <thread>
#include <vector>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

#if defined(__AVX512F__)
#define VECTOR_BYTES 64
constexpr int kMaxRows = 8;  // rows at a time: 8 by 2 tiles are 16 of 32 registers
#elif defined(__AVX2__)
#define VECTOR_BYTES 32
constexpr int kMaxRows = 4;
#else
#define VECTOR_BYTES 16
constexpr int kMaxRows = 4;
#endif
constexpr int64_t kFewRows = 4;  // up to which threads cost more than they give to cheap operations
constexpr int64_t kGroup = 32;                 // values of input that share a scale
constexpr int64_t kLanes = VECTOR_BYTES / 4;  // rows of weight that are interleaved: a tile
constexpr int kTiles = 2;  // tiles at a time: a strip; weights are padded to whole strips
constexpr int64_t kStrip = kTiles * kLanes;

typedef float floats __attribute__((vector_size(VECTOR_BYTES)));
typedef int32_t ints __attribute__((vector_size(VECTOR_BYTES)));
typedef int16_t shorts __attribute__((vector_size(VECTOR_BYTES)));

template <class V, class T>
inline V load(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof(V));
  return value;
}

// sum + codes[even] * pair[0] + codes[odd] * pair[1], in each 32-bit lane
inline ints dot(ints sum, ints codes, int32_t pair) {
#if defined(__AVX512VNNI__)
  return (ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)codes, _mm512_set1_epi32(pair));
#elif defined(__AVX512BW__)
  return sum + (ints)_mm512_madd_epi16((__m512i)codes, _mm512_set1_epi32(pair));
#elif defined(__AVX2__)
  return sum + (ints)_mm256_madd_epi16((__m256i)codes, _mm256_set1_epi32(pair));
#else
  return sum + ((codes << 16) >> 16) * (int32_t)(int16_t)pair + (codes >> 16) * (pair >> 16);
#endif
}

inline floats from_halves(const uint16_t* half) {
#if defined(__AVX512F__)
  return (floats)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)half));
#elif defined(__AVX2__) && defined(__F16C__)
  return (floats)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)half));
#else
  floats value;
  for (int i = 0; i < kLanes; i++) {  // read as a float, it is 2^112 too small; scales are finite
    const uint32_t bits = (uint32_t)(half[i] & 0x7fff) << 13;
    const float magnitude = load<float>(&bits) * 0x1p112f;
    value[i] = (half[i] & 0x8000) ? -magnitude : magnitude;
  }
  return value;
#endif
}

// a * b + sum, rounded once where the machine can. Left to the compiler, whether it is may differ from
// one number of rows to another, and with it the last bit.
inline floats multiply_add(floats a, floats b, floats sum) {
#if defined(__AVX512F__)
  return (floats)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__AVX2__) && defined(__FMA__)
  return (floats)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
  return a * b + sum;
#endif
}

inline float multiply_add(float a, float b, float sum) {
#if defined(__FMA__)
  return __builtin_fmaf(a, b, sum);
#else
  return a * b + sum;
#endif
}

inline float total(floats value) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)value);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; i++) sum += value[i];
  return sum;
#endif
}

// e^x to 2 units in the last place, for x clamped to the exponents of normal floats. A loop of it
// becomes vector instructions, which a loop of expf does not.
inline float exponential(float x) {
  x = std::min(std::max(x, -87.3f), 88.3f);
  const float shift = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float n = x * 1.44269504f + shift - shift;
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;
  float p = 1.9875691e-4f;
  p = p * r + 1.3981999e-3f;
  p = p * r + 8.3334519e-3f;
  p = p * r + 4.1665796e-2f;
  p = p * r + 1.6666665e-1f;
  p = p * r + 5.0000001e-1f;
  const int32_t exponent = ((int32_t)n + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, sizeof(power));
  return (p * r * r + r + 1.0f) * power;
}

// A format says how one vector of a tile unpacks into pairs of 16-bit codes for each of
// its rows, and which scales there are. Codes lie as [tile][group][vector][row].

struct Int4 {  // weight = scale * code + minimum, code 0..15; scale and minimum for each group
  static constexpr int vectors = 4, pairs = 4;
  static constexpr int64_t scales = 2 * kLanes;
  static ints unpack(ints packed, int pair) { return (packed >> (4 * pair)) & 0x000f000f; }
};

struct Int8 {  // weight = scale * code; one scale for each row of weight, applied at the end
  static constexpr int vectors = 8, pairs = 2;
  static constexpr int64_t scales = 0;
  static ints unpack(ints packed, int pair) {
    shorts both = (shorts)packed;
    return pair == 0 ? (ints)((both << 8) >> 8) : (ints)(both >> 8);
  }
};

// The loops of a parallel region. One is over when all its pieces are done, whoever did them: a
// thread that another program keeps off its core is waited for only while it holds a piece, where a
// barrier would wait for it at every loop.
struct Team {
  struct alignas(64) Loop {
    std::atomic<int64_t> next{0}, done{0};
  };
  std::vector<Loop> loops;
  const int threads;

  Team(int64_t num_loops, int threads) : loops(num_loops), threads(threads) {}
};

// One thread of a team. All threads share the same loops in the same order.
class Worker {
 public:
  explicit Worker(Team& team) : team_(team), loop_(team.loops.data()) {}

  template <class Body>
  void share(int64_t count, const Body& body) {
    Team::Loop& loop = *loop_++;
    const int64_t piece = std::max<int64_t>(1, count / (kPieces * team_.threads));
    int64_t begin;
    while ((begin = loop.next.fetch_add(piece, std::memory_order_relaxed)) < count) {
      const int64_t end = std::min(count, begin + piece);
      for (int64_t i = begin; i < end; i++) body(i);
      loop.done.fetch_add(end - begin, std::memory_order_release);
    }
    for (int spins = 0; loop.done.load(std::memory_order_acquire) < count; spins++) {
      if (spins > kSpins) {
        std::this_thread::yield();
      } else {
#if defined(__x86_64__)
        _mm_pause();
#endif
      }
    }
  }

 private:
  static constexpr int64_t kPieces = 4;  // for each thread, so that a slow one takes fewer
  static constexpr int kSpins = 2000;
  Team& team_;
  Team::Loop* loop_;
};

struct Input {  // [rows][groups]
  std::vector<int16_t> codes;
  std::vector<float> scale;
  std::vector<float> sum;  // of the group's values, as its codes stand for them

  void make_room(int64_t rows, int64_t size) {
    const size_t groups = rows * ((size + kGroup - 1) / kGroup);
    if (scale.size() >= groups) return;
    codes.resize(groups * kGroup);
    scale.resize(groups);
    sum.resize(groups);
  }
};

void quantize(const float* x, int64_t begin, int64_t end, int64_t size, Input& to) {
  const int64_t groups = (size + kGroup - 1) / kGroup;
  for (int64_t i = begin; i < end; i++) {
    const int64_t column = i % groups * kGroup;
    float values[kGroup] = {};
    std::memcpy(values, x + i / groups * size + column,
                sizeof(float) * std::min(kGroup, size - column));
    float top = 0, poison = 0;  // NaN where a value is NaN or infinite: it spoils the row's output
#pragma omp simd reduction(max : top)
    for (int64_t j = 0; j < kGroup; j++) top = std::max(top, std::fabs(values[j]));
#pragma omp simd reduction(+ : poison)
    for (int64_t j = 0; j < kGroup; j++) poison += values[j] * 0.0f;
    const float inverse = top > 0 && poison == 0 ? 32767.0f / top : 0.0f;
    int16_t* codes = &to.codes[i * kGroup];
    int32_t sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < kGroup; j++) {
      const int32_t code = (int32_t)nearbyintf(values[j] * inverse);
      codes[j] = (int16_t)code;
      sum += code;
    }
    to.scale[i] = top / 32767.0f + poison;
    to.sum[i] = to.scale[i] * (float)sum;
  }
}

// Outputs of `Rows` rows of input and a strip of weight.
template <class Format, int Rows>
void multiply(const Input& x, int64_t row, int64_t groups, const ints* codes, const uint16_t* scales,
              floats (&out)[Rows][kTiles]) {
  for (int64_t g = 0; g < groups; g++) {
    ints sum[Rows][kTiles] = {};
    const int16_t* values[Rows];
    for (int m = 0; m < Rows; m++) values[m] = &x.codes[((row + m) * groups + g) * kGroup];
#pragma GCC unroll 8
    for (int v = 0; v < Format::vectors; v++)
#pragma GCC unroll 4
      for (int p = 0; p < Format::pairs; p++) {
        ints unpacked[kTiles];
        for (int t = 0; t < kTiles; t++)
          unpacked[t] = Format::unpack(codes[(t * groups + g) * Format::vectors + v], p);
#pragma GCC unroll 8
        for (int m = 0; m < Rows; m++) {
          const int32_t pair = load<int32_t>(values[m] + 2 * (v * Format::pairs + p));
#pragma GCC unroll 2
          for (int t = 0; t < kTiles; t++) sum[m][t] = dot(sum[m][t], unpacked[t], pair);
        }
      }
#pragma GCC unroll 2
    for (int t = 0; t < kTiles; t++) {
      const uint16_t* scale = scales + (t * groups + g) * Format::scales;
#pragma GCC unroll 8
      for (int m = 0; m < Rows; m++) {
        const int64_t i = (row + m) * groups + g;
        floats product = __builtin_convertvector(sum[m][t], floats) * x.scale[i];
        if (Format::scales)
          out[m][t] += product * from_halves(scale) + from_halves(scale + kLanes) * x.sum[i];
        else
          out[m][t] += product;
      }
    }
  }
}

// A weight matrix [out, in]; mirrored by nbengine.cpu.Matrix.
struct Matrix {
  int64_t kind;         // bits of a weight: 4, 8 or 32
  const void* codes;    // 32: float32 [out, in]; else as the format says
  const void* scales;   // 4: float16 [tile][group][scale, minimum][row]; 8: float32 [whole strips]
  const float* bias;    // [out], or null
  int64_t out_features, in_features;

  int64_t groups() const { return (in_features + kGroup - 1) / kGroup; }

  // one output, or what is added to one
  void store(float value, int64_t row, int64_t column, float* out, bool add) const {
    float& to = out[row * out_features + column];
    if (bias) value += bias[column];
    to = add ? to + value : value;
  }
};

template <class Format, int Rows>
void strip(const Input& x, int64_t row, const Matrix& w, int64_t tile, float* out, bool add) {
  floats result[Rows][kTiles] = {};
  multiply<Format, Rows>(x, row, w.groups(),
                         (const ints*)w.codes + tile * w.groups() * Format::vectors,
                         (const uint16_t*)w.scales + tile * w.groups() * Format::scales, result);
  for (int m = 0; m < Rows; m++)
    for (int t = 0; t < kTiles; t++) {
      const int64_t first = (tile + t) * kLanes, last = std::min(first + kLanes, w.out_features);
      floats y = result[m][t];
      if (!Format::scales) y *= load<floats>((const float*)w.scales + first);
      if (last - first == kLanes) {
        float* to = out + (row + m) * w.out_features + first;
        if (w.bias) y += load<floats>(w.bias + first);
        if (add) y += load<floats>(to);
        std::memcpy(to, &y, sizeof(y));
      } else {
        for (int64_t i = first; i < last; i++) w.store(y[i - first], row + m, i, out, add);
      }
    }
}

template <class Format, int Rows = kMaxRows>
void all_rows(const Input& x, int64_t begin, int64_t end, const Matrix& w, int64_t tile, float* out,
              bool add) {
  for (; begin + Rows <= end; begin += Rows) strip<Format, Rows>(x, begin, w, tile, out, add);
  if constexpr (Rows > 1) all_rows<Format, Rows - 1>(x, begin, end, w, tile, out, add);
}

// float32: `Rows` rows of x by `Outputs` rows of weight [out, in], sums in 16 lanes.
template <int Rows, int Outputs>
void dense_block(const float* x, int64_t row, const Matrix& w, int64_t column, float* out,
                 bool add) {
  const int64_t size = w.in_features;
  const float* weight = (const float*)w.codes + column * size;
  x += row * size;
  floats sum[Rows][Outputs] = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    floats values[Outputs];
    // The hardware's prefetchers lose rows this short; the block after the next is in time.
    for (int n = 0; n < Outputs; n++)
      __builtin_prefetch(weight + (n + 2 * Outputs) * size + k);
#pragma GCC unroll 4
    for (int n = 0; n < Outputs; n++) values[n] = load<floats>(weight + n * size + k);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; m++) {
      const floats value = load<floats>(x + m * size + k);
#pragma GCC unroll 4
      for (int n = 0; n < Outputs; n++) sum[m][n] = multiply_add(value, values[n], sum[m][n]);
    }
  }
  for (int m = 0; m < Rows; m++)
    for (int n = 0; n < Outputs; n++) {
      float y = total(sum[m][n]);
      for (int64_t rest = k; rest < size; rest++)
        y = multiply_add(x[m * size + rest], weight[n * size + rest], y);
      w.store(y, row + m, column + n, out, add);
    }
}

template <int Outputs>
void dense_rows(const float* x, int64_t rows, const Matrix& w, int64_t column, float* out,
                bool add) {
  int64_t m = 0;
  for (; m + kMaxRows <= rows; m += kMaxRows)
    dense_block<kMaxRows, Outputs>(x, m, w, column, out, add);
  for (; m < rows; m++) dense_block<1, Outputs>(x, m, w, column, out, add);
}

template <class Format>
void multiply_quantized(Worker& worker, const Matrix& w, const float* x, int64_t rows, float* out,
                        bool add, Input& input) {
  worker.share(rows * w.groups(),
               [&](int64_t i) { quantize(x, i, i + 1, w.in_features, input); });
  worker.share((w.out_features + kStrip - 1) / kStrip, [&](int64_t strip) {
    all_rows<Format>(input, 0, rows, w, strip * kTiles, out, add);
  });
}

constexpr int64_t kLoopsOfMultiply = 2;

// out = (add ? out : 0) + x w^T + bias, by a team of threads. `input` has room for rows of x.
void multiply(Worker& worker, const Matrix& w, const float* x, int64_t rows, float* out, bool add,
              Input& input) {
  if (w.kind == 4) return multiply_quantized<Int4>(worker, w, x, rows, out, add, input);
  if (w.kind == 8) return multiply_quantized<Int8>(worker, w, x, rows, out, add, input);
  constexpr int outputs = 3;  // 8 rows by 3 outputs are 24 of 32 vector registers
  worker.share((w.out_features + outputs - 1) / outputs, [&](int64_t n) {
    const int64_t begin = n * outputs, end = begin + outputs;
    if (end <= w.out_features) {
      dense_rows<outputs>(x, rows, w, begin, out, add);
    } else {
      for (int64_t last = begin; last < w.out_features; last++)
        dense_rows<1>(x, rows, w, last, out, add);
    }
  });
}

// x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [rows, sets, size], a row every
// `stride` floats, with one weight for each set; out is contiguous, and may be x.
void norm(Worker& worker, const float* x, int64_t stride, const float* weight, float eps,
          int64_t rows, int64_t sets, int64_t size, float* out, int64_t out_stride) {
  worker.share(rows * sets, [&](int64_t i) {
    const float* from = x + i / sets * stride + i % sets * size;
    const float* scale = weight + i % sets * size;
    float* to = out + i / sets * out_stride + i % sets * size;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < size; j++) sum += from[j] * from[j];
    const float factor = 1.0f / std::sqrt(sum / (float)size + eps);
#pragma omp simd
    for (int64_t j = 0; j < size; j++) to[j] = from[j] * factor * scale[j];
  });
}

// Rotary embedding of one row of heads [heads, size] by cos_sin [2, size], where the first half of
// the sines is negative; out is another place.
void rotate_row(const float* x, const float* cos, int64_t heads, int64_t size, float* out) {
  const float* sin = cos + size;
  const int64_t half = size / 2;
  for (int64_t h = 0; h < heads; h++, x += size, out += size) {
#pragma omp simd
    for (int64_t j = 0; j < half; j++) {
      out[j] = x[j] * cos[j] + x[j + half] * sin[j];
      out[j + half] = x[j + half] * cos[j + half] + x[j] * sin[j + half];
    }
  }
}

// silu(gate) * up, where a row of x [rows, 2 * size] is gate and then up.
void gate(Worker& worker, const float* x, int64_t rows, int64_t size, float* out) {
  worker.share(rows, [&](int64_t i) {
    const float *gate = x + 2 * i * size, *up = gate + size;
#pragma omp simd
    for (int64_t j = 0; j < size; j++) {
      const float sigmoid = 1.0f / (1.0f + exponential(-gate[j]));
      out[i * size + j] = gate[j] * sigmoid * up[j];
    }
  });
}

// A KV cache of one layer: k and v [blocks, kv_heads, block_size, head_dim].
struct Cache {
  float *k, *v;
  int64_t kv_heads, block_size, head_dim;

  // one token's k and v [kv_heads, head_dim]
  void write(const float* key, const float* value, int64_t slot) const {
    const int64_t block = slot / block_size, offset = slot % block_size;
    for (int64_t h = 0; h < kv_heads; h++) {
      const int64_t to = ((block * kv_heads + h) * block_size + offset) * head_dim;
      std::memcpy(k + to, key + h * head_dim, head_dim * sizeof(float));
      std::memcpy(v + to, value + h * head_dim, head_dim * sizeof(float));
    }
  }
};

// One query row of the heads that share a KV head.
struct Attention {
  const float* q;  // [group, dim]
  const float *k, *v;  // this head's rows in block 0
  float* out;          // [group, dim]
  const int64_t* table;
  int64_t block_stride, block_size;
  int64_t first, length;  // positions that are seen
  int64_t group;
  float scale, softcap;

  // visit(position, row of the cache) for the positions seen, in order
  template <class Visit>
  void for_each(const float* cache, int64_t dim, Visit visit) const {
    for (int64_t block = first / block_size; block * block_size < length; block++) {
      const float* rows = cache + table[block] * block_stride;
      const int64_t begin = block * block_size, end = std::min(begin + block_size, length);
      for (int64_t p = std::max(begin, first); p < end; p++) visit(p, rows + (p - begin) * dim);
    }
  }

  // kDim: the width of a head, where the compiler shall keep its row in registers; or 0
  template <int64_t kDim>
  void run(int64_t dim) const {
    static thread_local std::vector<float> kept;
    kept.resize(length);
    float* __restrict__ scores = kept.data();
    for (int64_t h = 0; h < group; h++) {
      const float* query = q + h * dim;
      for_each(k, dim, [&](int64_t position, const float* key) {
        scores[position] = scale * product<kDim>(query, key, dim);
      });
      if (softcap > 0)
        for (int64_t p = first; p < length; p++)
          scores[p] = softcap * std::tanh(scores[p] / softcap);
      float top = scores[first], sum_of_all = 0;
#pragma omp simd reduction(max : top)
      for (int64_t p = first; p < length; p++) top = std::max(top, scores[p]);
#pragma omp simd reduction(+ : sum_of_all)
      for (int64_t p = first; p < length; p++) sum_of_all += scores[p] = exponential(scores[p] - top);
      const float inverse = 1.0f / sum_of_all;
      float* __restrict__ to = out + h * dim;
      if constexpr (kDim > 0) {
        floats sum[kDim / kLanes] = {};
        for_each(v, dim, [&](int64_t position, const float* value) {
          for (int64_t i = 0; i < kDim / kLanes; i++)
            sum[i] += load<floats>(value + i * kLanes) * scores[position];
        });
        for (floats& part : sum) part *= inverse;
        std::memcpy(to, sum, sizeof(sum));
      } else {
        std::fill_n(to, dim, 0.0f);
        for_each(v, dim, [&](int64_t position, const float* value) {
          for (int64_t d = 0; d < dim; d++) to[d] += scores[position] * value[d];
        });
        for (int64_t d = 0; d < dim; d++) to[d] *= inverse;
      }
    }
  }

  template <int64_t kDim>
  static float product(const float* a, const float* b, int64_t dim) {
    if constexpr (kDim > 0) {
      floats sum = {};
      for (int64_t i = 0; i < kDim; i += kLanes) sum += load<floats>(a + i) * load<floats>(b + i);
      return total(sum);
    }
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t d = 0; d < dim; d++) sum += a[d] * b[d];
    return sum;
  }
};

// Row s of q and out [*, heads, head_dim] for sequence s, or row rows[s] if rows are given; a row of
// q every `stride` floats; tables [sequences, table_stride]. window and softcap: 0 for none.
void attend(Worker& worker, const float* q, int64_t stride, const Cache& cache, float* out,
            int64_t sequences, const int64_t* rows, const int64_t* seq_lens, const int64_t* tables,
            int64_t table_stride, int64_t heads, float scale, int64_t window, float softcap) {
  const int64_t kv_heads = cache.kv_heads, dim = cache.head_dim, group = heads / kv_heads;
  worker.share(sequences * kv_heads, [&](int64_t task) {
    const int64_t s = task / kv_heads, kv_head = task % kv_heads, row = rows ? rows[s] : s;
    const Attention attention{
        q + row * stride + kv_head * group * dim,
        cache.k + kv_head * cache.block_size * dim,
        cache.v + kv_head * cache.block_size * dim,
        out + (row * heads + kv_head * group) * dim,
        tables + s * table_stride,
        kv_heads * cache.block_size * dim,
        cache.block_size,
        window > 0 ? std::max(seq_lens[s] - window, (int64_t)0) : 0,
        seq_lens[s],
        group,
        scale,
        softcap,
    };
    switch (dim) {  // a width known to the compiler keeps a head's row in registers
      case 64: attention.run<64>(dim); break;
      case 128: attention.run<128>(dim); break;
      default: attention.run<0>(dim);
    }
  });
}

// One transformer block, mirrored by nbengine.cpu.Layer.
struct Layer {
  Matrix qkv, o, gate_up, down;
  const float *input_norm, *post_attention_norm;  // [hidden]
  const float* qk_norm;                           // [heads + kv_heads, head_dim], or null
  float *k_cache, *v_cache;
  int64_t window;  // or 0
};

// Mirrored by nbengine.cpu.Shape.
struct Shape {
  int64_t hidden, intermediate, heads, kv_heads, head_dim, block_size;
  float eps, scale;
};

}  // namespace

extern "C" {

int64_t tile_rows() { return kLanes; }

int64_t strip_rows() { return kStrip; }

// out = x w^T + bias, x [rows, in]
void linear(const Matrix* w, const float* x, int64_t rows, float* out, int threads) {
  static thread_local Input kept;
  Input& input = kept;  // the caller's, in every thread below
  if (w->kind != 32) input.make_room(rows, w->in_features);
  Team team(kLoopsOfMultiply, threads);
#pragma omp parallel num_threads(threads)
  {
    Worker worker(team);
    multiply(worker, *w, x, rows, out, false, input);
  }
}

void rms_norm(const float* x, int64_t stride, const float* weight, float eps, int64_t rows,
              int64_t sets, int64_t size, float* out, int threads) {
  Team team(1, threads);
#pragma omp parallel num_threads(threads) if (rows > kFewRows)
  {
    Worker worker(team);
    norm(worker, x, stride, weight, eps, rows, sets, size, out, sets * size);
  }
}

// x [rows, heads, size], a row every `stride` floats; cos_sin [rows, 2, size]; out contiguous
void rotate(const float* x, int64_t stride, const float* cos_sin, int64_t rows, int64_t heads,
            int64_t size, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > kFewRows)
  for (int64_t i = 0; i < rows; i++)
    rotate_row(x + i * stride, cos_sin + 2 * i * size, heads, size, out + i * heads * size);
}

void silu_and_mul(const float* x, int64_t rows, int64_t size, float* out, int threads) {
  Team team(1, threads);
#pragma omp parallel num_threads(threads) if (rows > kFewRows)
  {
    Worker worker(team);
    gate(worker, x, rows, size, out);
  }
}

// k and v [rows, kv_heads, head_dim], a row every k_stride and v_stride floats
void write_kv(const float* k, int64_t k_stride, const float* v, int64_t v_stride, float* k_cache,
              float* v_cache, const int64_t* slots, int64_t rows, int64_t kv_heads,
              int64_t block_size, int64_t head_dim) {
  const Cache cache{k_cache, v_cache, kv_heads, block_size, head_dim};
  for (int64_t i = 0; i < rows; i++) cache.write(k + i * k_stride, v + i * v_stride, slots[i]);
}

// A slot that is not read may hold anything.
void attend_decodes(const float* q, int64_t stride, float* k, float* v, float* out,
                    int64_t sequences, const int64_t* query_rows, const int64_t* seq_lens,
                    const int64_t* tables, int64_t table_stride, int64_t heads, int64_t kv_heads,
                    int64_t block_size, int64_t head_dim, float scale, int64_t window,
                    float softcap, int threads) {
  const Cache cache{k, v, kv_heads, block_size, head_dim};
  Team team(1, threads);
#pragma omp parallel num_threads(threads)
  {
    Worker worker(team);
    attend(worker, q, stride, cache, out, sequences, query_rows, seq_lens, tables, table_stride,
           heads, scale, window, softcap);
  }
}

// All layers for one token of each of `rows` sequences. x [rows, hidden]: embeddings, replaced by
// the last layer's output. One parallel region: its threads share one loop after the other.
void decode(const Layer* layers, int64_t num_layers, const Shape* shape, float* x,
            const float* cos_sin, const int64_t* slots, const int64_t* seq_lens,
            const int64_t* tables, int64_t table_stride, int64_t rows, int threads) {
  static thread_local Input kept_input;
  static thread_local std::vector<float> kept;
  const int64_t hidden = shape->hidden, intermediate = shape->intermediate;
  const int64_t heads = shape->heads, kv_heads = shape->kv_heads, dim = shape->head_dim;
  const float eps = shape->eps;
  const int64_t rotated_heads = heads + kv_heads, stride = (rotated_heads + kv_heads) * dim;
  const int64_t q_size = heads * dim, rotated_size = rotated_heads * dim;
  Input& input = kept_input;
  input.make_room(rows, std::max({hidden, intermediate, q_size}));
  kept.resize(rows * (hidden + stride + rotated_size + q_size + 3 * intermediate));
  float* normed = kept.data();
  float* qkv = normed + rows * hidden;
  float* rotated = qkv + rows * stride;
  float* attended = rotated + rows * rotated_size;
  float* gate_up = attended + rows * q_size;
  float* gated = gate_up + rows * 2 * intermediate;

  constexpr int64_t loops_of_layer = 4 * kLoopsOfMultiply + 6;
  Team team(num_layers * loops_of_layer, threads);
#pragma omp parallel num_threads(threads)
  {
    Worker worker(team);
    for (const Layer* layer = layers; layer < layers + num_layers; layer++) {
      const Cache cache{layer->k_cache, layer->v_cache, kv_heads, shape->block_size, dim};
      norm(worker, x, hidden, layer->input_norm, eps, rows, 1, hidden, normed, hidden);
      multiply(worker, layer->qkv, normed, rows, qkv, false, input);
      if (layer->qk_norm)
        norm(worker, qkv, stride, layer->qk_norm, eps, rows, rotated_heads, dim, qkv, stride);
      worker.share(rows, [&](int64_t i) {
        const float* from = qkv + i * stride;
        float* to = rotated + i * rotated_size;
        rotate_row(from, cos_sin + 2 * i * dim, rotated_heads, dim, to);
        cache.write(to + q_size, from + rotated_size, slots[i]);
      });
      attend(worker, rotated, rotated_size, cache, attended, rows, nullptr, seq_lens, tables,
             table_stride, heads, shape->scale, layer->window, 0.0f);
      multiply(worker, layer->o, attended, rows, x, true, input);
      norm(worker, x, hidden, layer->post_attention_norm, eps, rows, 1, hidden, normed, hidden);
      multiply(worker, layer->gate_up, normed, rows, gate_up, false, input);
      gate(worker, gate_up, rows, intermediate, gated);
      multiply(worker, layer->down, gated, rows, x, true, input);
    }
  }
}

}  // extern "C"
