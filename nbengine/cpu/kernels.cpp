// CPU kernels of the decode step: matrices in 8 and 4 bits, float32 matrices with few rows of
// input, and attention of single query rows through block tables. A plain C interface, compiled by
// build.py for the machine it runs on and called by models/linear.py and execution/attention.py.
//
// The trick of the quantised matrices: a row of input becomes 16-bit integers with one scale for
// each 32 of its own values (15 significant bits against bfloat16's 8), so that products are exact
// integer sums, two to an instruction and lane, and a weight costs one shift and one mask to
// unpack. Sums over 32 values fit 32 bits: 32 * 2^15 * 2^7 = 2^27.
//
// Invariant: a row of output depends on its own row of input alone, to the last bit; the number of
// rows and of threads changes neither the values nor the order in which they are added.

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
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
constexpr int kTiles = 2;                     // tiles at a time; weights are padded to whole strips

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

struct Input {  // [rows][groups]
  std::vector<int16_t> codes;
  std::vector<float> scale;
  std::vector<float> sum;  // of the group's values, as its codes stand for them
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

struct Weight {
  const void* codes;
  const uint16_t* scales;   // Int4: float16 [tile][group][scale, minimum][row]
  const float* row_scales;  // Int8: [whole strips]
  int64_t out_features, in_features;
};

template <class Format, int Rows>
void strip(const Input& x, int64_t row, const Weight& w, int64_t tile, float* out) {
  const int64_t groups = (w.in_features + kGroup - 1) / kGroup;
  floats result[Rows][kTiles] = {};
  multiply<Format, Rows>(x, row, groups,
                         (const ints*)w.codes + tile * groups * Format::vectors,
                         w.scales + tile * groups * Format::scales, result);
  for (int m = 0; m < Rows; m++)
    for (int t = 0; t < kTiles; t++) {
      const int64_t first = (tile + t) * kLanes;
      floats y = result[m][t];
      if (w.row_scales) y *= load<floats>(w.row_scales + first);
      const int64_t count = std::min(kLanes, w.out_features - first);
      if (count > 0) std::memcpy(out + (row + m) * w.out_features + first, &y, count * sizeof(float));
    }
}

template <class Format, int Rows = kMaxRows>
void all_rows(const Input& x, int64_t begin, int64_t end, const Weight& w, int64_t tile, float* out) {
  for (; begin + Rows <= end; begin += Rows) strip<Format, Rows>(x, begin, w, tile, out);
  if constexpr (Rows > 1) all_rows<Format, Rows - 1>(x, begin, end, w, tile, out);
}

template <class Format>
void linear(const float* x, int64_t rows, const Weight& w, float* out, int threads) {
  static thread_local Input kept;
  Input& input = kept;  // the caller's, in every thread below
  const int64_t groups = rows * ((w.in_features + kGroup - 1) / kGroup);
  input.codes.resize(groups * kGroup);
  input.scale.resize(groups);
  input.sum.resize(groups);
  if (rows <= 16) quantize(x, 0, groups, w.in_features, input);
  const int64_t tiles = (w.out_features + kLanes - 1) / kLanes;
#pragma omp parallel num_threads(threads)
  {
    if (rows > 16) {
#pragma omp for schedule(static)
      for (int64_t i = 0; i < groups; i++) quantize(x, i, i + 1, w.in_features, input);
    }
#pragma omp for schedule(static)
    for (int64_t tile = 0; tile < tiles; tile += kTiles)
      all_rows<Format>(input, 0, rows, w, tile, out);
  }
}

// float32: `Rows` rows of x by `Outputs` rows of weight [out, in], sums in 16 lanes.
template <int Rows, int Outputs>
void dense_block(const float* x, int64_t size, const float* weight, float* out, int64_t stride) {
  floats sum[Rows][Outputs] = {};
  int64_t k = 0;
  for (; k + kLanes <= size; k += kLanes) {
    floats w[Outputs];
#pragma GCC unroll 4
    for (int n = 0; n < Outputs; n++) w[n] = load<floats>(weight + n * size + k);
#pragma GCC unroll 8
    for (int m = 0; m < Rows; m++) {
      const floats value = load<floats>(x + m * size + k);
#pragma GCC unroll 4
      for (int n = 0; n < Outputs; n++) sum[m][n] += value * w[n];
    }
  }
  for (int m = 0; m < Rows; m++)
    for (int n = 0; n < Outputs; n++) {
      float y = total(sum[m][n]);
      for (int64_t rest = k; rest < size; rest++) y += x[m * size + rest] * weight[n * size + rest];
      out[m * stride + n] = y;
    }
}

template <int Outputs>
void dense_rows(const float* x, int64_t rows, int64_t size, const float* weight, float* out,
                int64_t stride) {
  int64_t m = 0;
  for (; m + kMaxRows <= rows; m += kMaxRows)
    dense_block<kMaxRows, Outputs>(x + m * size, size, weight, out + m * stride, stride);
  for (; m < rows; m++)
    dense_block<1, Outputs>(x + m * size, size, weight, out + m * stride, stride);
}

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

}  // namespace

extern "C" {

int64_t tile_rows() { return kLanes; }

int64_t strip_rows() { return kLanes * kTiles; }

void linear_int4(const float* x, int64_t rows, const void* codes, const uint16_t* scales,
                 int64_t out_features, int64_t in_features, float* out, int threads) {
  linear<Int4>(x, rows, {codes, scales, nullptr, out_features, in_features}, out, threads);
}

void linear_int8(const float* x, int64_t rows, const void* codes, const float* scales,
                 int64_t out_features, int64_t in_features, float* out, int threads) {
  linear<Int8>(x, rows, {codes, nullptr, scales, out_features, in_features}, out, threads);
}

// x / sqrt(mean(x^2) + eps) * weight over the last dimension of x [rows, sets, size], a row every
// `stride` floats, with one weight for each set; out is contiguous.
void rms_norm(const float* x, int64_t stride, const float* weight, float eps, int64_t rows,
              int64_t sets, int64_t size, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > kFewRows)
  for (int64_t i = 0; i < rows * sets; i++) {
    const float* from = x + i / sets * stride + i % sets * size;
    const float* scale = weight + i % sets * size;
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t j = 0; j < size; j++) sum += from[j] * from[j];
    const float factor = 1.0f / std::sqrt(sum / (float)size + eps);
#pragma omp simd
    for (int64_t j = 0; j < size; j++) out[i * size + j] = from[j] * factor * scale[j];
  }
}

// Rotary embedding of x [rows, heads, size], a row every `stride` floats, by cos_sin
// [rows, 2, size], where the first half of the sines is negative; out is contiguous.
void rotate(const float* x, int64_t stride, const float* cos_sin, int64_t rows, int64_t heads,
            int64_t size, float* out, int threads) {
  const int64_t half = size / 2;
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > kFewRows)
  for (int64_t i = 0; i < rows; i++)
    for (int64_t h = 0; h < heads; h++) {
      const float *from = x + i * stride + h * size, *cos = cos_sin + 2 * i * size, *sin = cos + size;
      float* to = out + (i * heads + h) * size;
#pragma omp simd
      for (int64_t j = 0; j < half; j++) {
        to[j] = from[j] * cos[j] + from[j + half] * sin[j];
        to[j + half] = from[j + half] * cos[j + half] + from[j] * sin[j + half];
      }
    }
}

// silu(gate) * up, where a row of x [rows, 2 * size] is gate and then up.
void silu_and_mul(const float* x, int64_t rows, int64_t size, float* out, int threads) {
#pragma omp parallel for schedule(static) num_threads(threads) if (rows > kFewRows)
  for (int64_t i = 0; i < rows; i++) {
    const float *gate = x + 2 * i * size, *up = gate + size;
#pragma omp simd
    for (int64_t j = 0; j < size; j++) {
      const float sigmoid = 1.0f / (1.0f + exponential(-gate[j]));
      out[i * size + j] = gate[j] * sigmoid * up[j];
    }
  }
}

// x [rows, in] by weight [out, in], float32; meant for few rows, where it reads weight once
void linear_float32(const float* x, int64_t rows, const float* weight, int64_t out_features,
                    int64_t in_features, float* out, int threads) {
  constexpr int outputs = 3;  // 8 rows by 3 outputs are 24 of 32 vector registers
#pragma omp parallel for schedule(static) num_threads(threads)
  for (int64_t n = 0; n < out_features; n += outputs) {
    if (n + outputs <= out_features) {
      dense_rows<outputs>(x, rows, in_features, weight + n * in_features, out + n, out_features);
    } else {
      for (int64_t last = n; last < out_features; last++)
        dense_rows<1>(x, rows, in_features, weight + last * in_features, out + last, out_features);
    }
  }
}

// k and v [rows, kv_heads, head_dim], a row every k_stride and v_stride floats, into slots of the
// caches [blocks, kv_heads, block_size, head_dim].
void write_kv(const float* k, int64_t k_stride, const float* v, int64_t v_stride, float* k_cache,
              float* v_cache, const int64_t* slots, int64_t rows, int64_t kv_heads,
              int64_t block_size, int64_t head_dim) {
  for (int64_t i = 0; i < rows; i++) {
    const int64_t block = slots[i] / block_size, offset = slots[i] % block_size;
    for (int64_t h = 0; h < kv_heads; h++) {
      const int64_t to = ((block * kv_heads + h) * block_size + offset) * head_dim;
      std::memcpy(k_cache + to, k + i * k_stride + h * head_dim, head_dim * sizeof(float));
      std::memcpy(v_cache + to, v + i * v_stride + h * head_dim, head_dim * sizeof(float));
    }
  }
}

// One query row for each sequence. q and out: [*, heads, head_dim], a row of q every `stride`
// floats; the row of sequence s is query_rows[s]. Caches as above; tables: [sequences,
// table_stride]. window and softcap: 0 for none. A slot that is not read may hold anything.
void attend_decodes(const float* q, int64_t stride, const float* k, const float* v, float* out,
                    int64_t sequences, const int64_t* query_rows, const int64_t* seq_lens,
                    const int64_t* tables, int64_t table_stride, int64_t heads, int64_t kv_heads,
                    int64_t block_size, int64_t head_dim, float scale, int64_t window,
                    float softcap, int threads) {
  const int64_t group = heads / kv_heads;
#pragma omp parallel for schedule(dynamic) num_threads(threads)
  for (int64_t task = 0; task < sequences * kv_heads; task++) {
    const int64_t s = task / kv_heads, kv_head = task % kv_heads;
    const Attention attention{
        q + query_rows[s] * stride + kv_head * group * head_dim,
        k + kv_head * block_size * head_dim,
        v + kv_head * block_size * head_dim,
        out + (query_rows[s] * heads + kv_head * group) * head_dim,
        tables + s * table_stride,
        kv_heads * block_size * head_dim,
        block_size,
        window > 0 ? std::max(seq_lens[s] - window, (int64_t)0) : 0,
        seq_lens[s],
        group,
        scale,
        softcap,
    };
    switch (head_dim) {  // a width known to the compiler keeps a head's row in registers
      case 64: attention.run<64>(head_dim); break;
      case 128: attention.run<128>(head_dim); break;
      default: attention.run<0>(head_dim);
    }
  }
}

}  // extern "C"
