// CUDA's math and bit intrinsics that neither <math.h> nor NVIDIA's host headers bring.
//
// The fast forms (__expf, __sinf, ...) are computed as exactly as the plain ones: a kernel's
// tolerance must leave room for the GPU's few more units in the last place.

#pragma once

#define NB_F inline float
#define NB_D inline double

NB_F __expf(float x) { return expf(x); }
NB_F __exp10f(float x) { return powf(10.0f, x); }
NB_F __logf(float x) { return logf(x); }
NB_F __log2f(float x) { return log2f(x); }
NB_F __log10f(float x) { return log10f(x); }
NB_F __powf(float x, float y) { return powf(x, y); }
NB_F __sinf(float x) { return sinf(x); }
NB_F __cosf(float x) { return cosf(x); }
NB_F __tanf(float x) { return tanf(x); }
NB_F __tanhf(float x) { return tanhf(x); }
inline void __sincosf(float x, float* sine, float* cosine) {
  *sine = sinf(x);
  *cosine = cosf(x);
}
NB_F __saturatef(float x) { return x > 0.0f ? (x < 1.0f ? x : 1.0f) : 0.0f; }
NB_F __fdividef(float x, float y) { return x / y; }
NB_F fdividef(float x, float y) { return x / y; }
NB_F rsqrtf(float x) { return 1.0f / sqrtf(x); }
NB_D rsqrt(double x) { return 1.0 / sqrt(x); }
NB_F rsqrt(float x) { return rsqrtf(x); }
NB_F rcbrtf(float x) { return 1.0f / cbrtf(x); }
NB_F sinpif(float x) { return static_cast<float>(sin(M_PI * static_cast<double>(x))); }
NB_F cospif(float x) { return static_cast<float>(cos(M_PI * static_cast<double>(x))); }
NB_F normcdff(float x) { return 0.5f * erfcf(-x * 0.70710678f); }
NB_F __frsqrt_rn(float x) { return static_cast<float>(1.0 / sqrt(static_cast<double>(x))); }

// Rounding to nearest is the mode of the processor.
NB_F __fadd_rn(float x, float y) { return x + y; }
NB_F __fsub_rn(float x, float y) { return x - y; }
NB_F __fmul_rn(float x, float y) { return x * y; }
NB_F __fdiv_rn(float x, float y) { return x / y; }
NB_F __frcp_rn(float x) { return 1.0f / x; }
NB_F __fsqrt_rn(float x) { return sqrtf(x); }
NB_F __fmaf_rn(float x, float y, float z) { return fmaf(x, y, z); }
NB_D __dadd_rn(double x, double y) { return x + y; }
NB_D __dsub_rn(double x, double y) { return x - y; }
NB_D __dmul_rn(double x, double y) { return x * y; }
NB_D __ddiv_rn(double x, double y) { return x / y; }
NB_D __drcp_rn(double x) { return 1.0 / x; }
NB_D __dsqrt_rn(double x) { return sqrt(x); }
NB_D __fma_rn(double x, double y, double z) { return fma(x, y, z); }

namespace nb_emulator {

enum class Towards { kUp, kDown, kZero };

// The nearest double and what it lacks (Dekker 1971, Knuth 4.2.2): together the exact result, or near
// enough to tell on which side of `nearest` that lies.
struct Exact {
  double nearest, rest;
};
inline Exact sum(double x, double y) {
  const double nearest = x + y, of_y = nearest - x;
  return {nearest, (x - (nearest - of_y)) + (y - of_y)};
}
inline Exact product(double x, double y) { return {x * y, fma(x, y, -(x * y))}; }
inline Exact quotient(double x, double y) { return {x / y, fma(-(x / y), y, x) / y}; }
inline Exact root(double x) {
  const double nearest = sqrt(x);
  return {nearest, nearest == 0.0 ? 0.0 : fma(-nearest, nearest, x) / (2.0 * nearest)};
}
inline Exact integer(__int128 x) {
  const auto nearest = static_cast<double>(x);
  return {nearest, static_cast<double>(x - static_cast<__int128>(nearest))};
}

template <typename T>
T rounded(Exact exact, Towards towards) {
  const T result = static_cast<T>(exact.nearest);
  const double above = static_cast<double>(result) - exact.nearest - exact.rest;
  const bool down = towards == Towards::kDown || (towards == Towards::kZero && exact.nearest > 0.0);
  if (down && above > 0.0) return std::nextafter(result, -std::numeric_limits<T>::infinity());
  if (!down && above < 0.0) return std::nextafter(result, std::numeric_limits<T>::infinity());
  return result;
}

}  // namespace nb_emulator

#define NB_DIRECTED_OF(T, name, parameters, exact)                                                \
  inline T name##_ru parameters { return nb_emulator::rounded<T>(exact, nb_emulator::Towards::kUp); } \
  inline T name##_rd parameters { return nb_emulator::rounded<T>(exact, nb_emulator::Towards::kDown); } \
  inline T name##_rz parameters { return nb_emulator::rounded<T>(exact, nb_emulator::Towards::kZero); }
#define NB_DIRECTED(T, prefix)                                                \
  NB_DIRECTED_OF(T, __##prefix##add, (T x, T y), nb_emulator::sum(x, y))      \
  NB_DIRECTED_OF(T, __##prefix##sub, (T x, T y), nb_emulator::sum(x, -y))     \
  NB_DIRECTED_OF(T, __##prefix##mul, (T x, T y), nb_emulator::product(x, y))  \
  NB_DIRECTED_OF(T, __##prefix##div, (T x, T y), nb_emulator::quotient(x, y)) \
  NB_DIRECTED_OF(T, __##prefix##rcp, (T x), nb_emulator::quotient(1.0, x))    \
  NB_DIRECTED_OF(T, __##prefix##sqrt, (T x), nb_emulator::root(x))
NB_DIRECTED(float, f)
NB_DIRECTED(double, d)
// The product of two floats is a double.
NB_DIRECTED_OF(float, __fmaf, (float x, float y, float z),
               nb_emulator::sum(static_cast<double>(x) * y, z))
NB_DIRECTED_OF(float, __int2float, (int x), nb_emulator::integer(x))
NB_DIRECTED_OF(float, __uint2float, (unsigned x), nb_emulator::integer(x))
NB_DIRECTED_OF(float, __ll2float, (long long x), nb_emulator::integer(x))
NB_DIRECTED_OF(float, __ull2float, (unsigned long long x), nb_emulator::integer(x))
NB_DIRECTED_OF(float, __double2float, (double x), (nb_emulator::Exact{x, 0.0}))
#undef NB_DIRECTED
#undef NB_DIRECTED_OF

inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline int __clzll(long long x) {
  return x == 0 ? 64 : __builtin_clzll(static_cast<unsigned long long>(x));
}
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __brev(unsigned x) {
  unsigned reversed = 0;
  for (int i = 0; i < 32; ++i) reversed |= (x >> i & 1u) << (31 - i);
  return reversed;
}
inline unsigned long long __brevll(unsigned long long x) {
  return static_cast<unsigned long long>(__brev(static_cast<unsigned>(x))) << 32 |
         __brev(static_cast<unsigned>(x >> 32));
}
inline int __mul24(int x, int y) { return (x << 8 >> 8) * (y << 8 >> 8); }
inline unsigned __umul24(unsigned x, unsigned y) { return (x & 0xffffffu) * (y & 0xffffffu); }
inline int __mulhi(int x, int y) {
  return static_cast<int>(static_cast<long long>(x) * static_cast<long long>(y) >> 32);
}
inline unsigned __umulhi(unsigned x, unsigned y) {
  return static_cast<unsigned>(static_cast<unsigned long long>(x) * y >> 32);
}
inline long long __mul64hi(long long x, long long y) {
  return static_cast<long long>(static_cast<__int128>(x) * y >> 64);
}
inline unsigned long long __umul64hi(unsigned long long x, unsigned long long y) {
  return static_cast<unsigned long long>(static_cast<unsigned __int128>(x) * y >> 64);
}
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  const unsigned long long bytes = static_cast<unsigned long long>(y) << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    const unsigned select = selector >> (4 * i);
    unsigned byte = static_cast<unsigned>(bytes >> (8 * (select & 7u))) & 0xffu;
    if ((select & 8u) != 0) byte = (byte & 0x80u) != 0 ? 0xffu : 0u;  // the sign, replicated
    result |= byte << (8 * i);
  }
  return result;
}
inline unsigned __funnelshift_l(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>(((static_cast<unsigned long long>(high) << 32 | low) << (shift & 31)) >> 32);
}
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned shift) {
  return static_cast<unsigned>((static_cast<unsigned long long>(high) << 32 | low) >> (shift & 31));
}
inline unsigned __funnelshift_lc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? low : __funnelshift_l(low, high, shift);
}
inline unsigned __funnelshift_rc(unsigned low, unsigned high, unsigned shift) {
  return shift >= 32 ? high : __funnelshift_r(low, high, shift);
}
inline int __dp4a(int x, int y, int sum) {
  for (int i = 0; i < 32; i += 8) {
    sum += static_cast<signed char>(x >> i) * static_cast<signed char>(y >> i);
  }
  return sum;
}
inline unsigned __dp4a(unsigned x, unsigned y, unsigned sum) {
  for (int i = 0; i < 32; i += 8) sum += (x >> i & 0xffu) * (y >> i & 0xffu);
  return sum;
}

#define NB_BITS(name, To, From) \
  inline To name(From x) { return nb_emulator::bit_cast<To>(x); }
NB_BITS(__float_as_int, int, float)
NB_BITS(__float_as_uint, unsigned, float)
NB_BITS(__int_as_float, float, int)
NB_BITS(__uint_as_float, float, unsigned)
NB_BITS(__double_as_longlong, long long, double)
NB_BITS(__longlong_as_double, double, long long)
#undef NB_BITS

// A float beyond the integer's range becomes its nearest value, and NaN becomes 0 (PTX ISA, cvt),
// where C++ leaves it undefined.
template <typename Integer>
Integer nb_emulator_saturated(double x) {
  constexpr Integer kLeast = std::numeric_limits<Integer>::min();
  constexpr Integer kGreatest = std::numeric_limits<Integer>::max();
  if (x != x) return 0;
  if (x <= static_cast<double>(kLeast)) return kLeast;
  if (x >= static_cast<double>(kGreatest)) return kGreatest;
  return static_cast<Integer>(x);
}
#define NB_ROUND_OF(from, to, Integer)                                                            \
  inline Integer __##from##2##to##_rn(from x) { return nb_emulator_saturated<Integer>(rint(x)); }  \
  inline Integer __##from##2##to##_rz(from x) { return nb_emulator_saturated<Integer>(trunc(x)); } \
  inline Integer __##from##2##to##_ru(from x) { return nb_emulator_saturated<Integer>(ceil(x)); }  \
  inline Integer __##from##2##to##_rd(from x) { return nb_emulator_saturated<Integer>(floor(x)); }
#define NB_ROUND(to, Integer)     \
  NB_ROUND_OF(float, to, Integer) \
  NB_ROUND_OF(double, to, Integer)
NB_ROUND(int, int)
NB_ROUND(uint, unsigned)
NB_ROUND(ll, long long)
NB_ROUND(ull, unsigned long long)
#undef NB_ROUND
#undef NB_ROUND_OF
NB_F __int2float_rn(int x) { return static_cast<float>(x); }
NB_F __uint2float_rn(unsigned x) { return static_cast<float>(x); }
NB_F __ll2float_rn(long long x) { return static_cast<float>(x); }
NB_F __ull2float_rn(unsigned long long x) { return static_cast<float>(x); }
NB_F __double2float_rn(double x) { return static_cast<float>(x); }
NB_D __int2double_rn(int x) { return x; }
NB_D __uint2double_rn(unsigned x) { return x; }

#define NB_EXTREMA(T)                              \
  inline T min(T a, T b) { return b < a ? b : a; } \
  inline T max(T a, T b) { return a < b ? b : a; }
NB_EXTREMA(int)
NB_EXTREMA(unsigned)
NB_EXTREMA(long)
NB_EXTREMA(unsigned long)
NB_EXTREMA(long long)
NB_EXTREMA(unsigned long long)
#undef NB_EXTREMA
NB_F min(float a, float b) { return fminf(a, b); }
NB_F max(float a, float b) { return fmaxf(a, b); }
NB_D min(double a, double b) { return fmin(a, b); }
NB_D max(double a, double b) { return fmax(a, b); }
// Of two different types, as C++ would convert them.
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B> && !std::is_same_v<A, B>>>
std::common_type_t<A, B> min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return min(static_cast<T>(a), static_cast<T>(b));
}
template <typename A, typename B, typename = std::enable_if_t<std::is_arithmetic_v<A> && std::is_arithmetic_v<B> && !std::is_same_v<A, B>>>
std::common_type_t<A, B> max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return max(static_cast<T>(a), static_cast<T>(b));
}

#undef NB_F
#undef NB_D
