// Functions of half and bfloat16 that NVIDIA's headers give to its own compiler alone: computed in
// double, and rounded once.

#pragma once

namespace nb_emulator {

__forceinline__ double widened(__half x) { return __half2float(x); }
__forceinline__ double widened(__nv_bfloat16 x) { return __bfloat162float(x); }

// NaN becomes 0.
__forceinline__ double saturated(double x) { return x > 0.0 ? (x < 1.0 ? x : 1.0) : 0.0; }
__forceinline__ double rectified(double x) { return x < 0.0 ? 0.0 : x; }

}  // namespace nb_emulator

#define NB_FMA_OF(T, T2, narrowed, suffix, clamped)                            \
  inline T __hfma##suffix(T a, T b, T c) {                                     \
    using nb_emulator::widened;                                                \
    return narrowed(clamped(fma(widened(a), widened(b), widened(c))));         \
  }                                                                            \
  inline T2 __hfma2##suffix(T2 a, T2 b, T2 c) {                                \
    return T2(__hfma##suffix(a.x, b.x, c.x), __hfma##suffix(a.y, b.y, c.y));   \
  }
#define NB_UNARY_OF(T, T2, narrowed, name, expression)     \
  inline T h##name(T given) {                              \
    const double x = nb_emulator::widened(given);          \
    return narrowed(expression);                           \
  }                                                        \
  inline T2 h2##name(T2 given) { return T2(h##name(given.x), h##name(given.y)); }
#define NB_TO_INTEGER_OF(T, from, to, Integer)                                    \
  inline Integer __##from##2##to##_rn(T x) {                                      \
    return nb_emulator_saturated<Integer>(rint(nb_emulator::widened(x)));         \
  }                                                                               \
  inline Integer __##from##2##to##_rd(T x) {                                      \
    return nb_emulator_saturated<Integer>(floor(nb_emulator::widened(x)));        \
  }                                                                               \
  inline Integer __##from##2##to##_ru(T x) {                                      \
    return nb_emulator_saturated<Integer>(ceil(nb_emulator::widened(x)));         \
  }

#define NB_FMA(suffix, clamped)                                        \
  NB_FMA_OF(__half, __half2, __double2half, suffix, clamped)           \
  NB_FMA_OF(__nv_bfloat16, __nv_bfloat162, __double2bfloat16, suffix, clamped)
#define NB_UNARY(name, expression)                                     \
  NB_UNARY_OF(__half, __half2, __double2half, name, expression)        \
  NB_UNARY_OF(__nv_bfloat16, __nv_bfloat162, __double2bfloat16, name, expression)
#define NB_TO_INTEGER(to, Integer)              \
  NB_TO_INTEGER_OF(__half, half, to, Integer)   \
  NB_TO_INTEGER_OF(__nv_bfloat16, bfloat16, to, Integer)

NB_FMA(, )
NB_FMA(_sat, nb_emulator::saturated)
NB_FMA(_relu, nb_emulator::rectified)
NB_UNARY(ceil, ceil(x))
NB_UNARY(floor, floor(x))
NB_UNARY(trunc, trunc(x))
NB_UNARY(rint, rint(x))
NB_UNARY(exp, exp(x))
NB_UNARY(exp2, exp2(x))
NB_UNARY(exp10, pow(10.0, x))
NB_UNARY(log, log(x))
NB_UNARY(log2, log2(x))
NB_UNARY(log10, log10(x))
NB_UNARY(sin, sin(x))
NB_UNARY(cos, cos(x))
NB_UNARY(tanh, tanh(x))
NB_UNARY(tanh_approx, tanh(x))
NB_UNARY(sqrt, sqrt(x))
NB_UNARY(rsqrt, 1.0 / sqrt(x))
NB_UNARY(rcp, 1.0 / x)
NB_TO_INTEGER(short, short)
NB_TO_INTEGER(ushort, unsigned short)
NB_TO_INTEGER(int, int)
NB_TO_INTEGER(uint, unsigned)
NB_TO_INTEGER(ll, long long)
NB_TO_INTEGER(ull, unsigned long long)

#undef NB_FMA_OF
#undef NB_UNARY_OF
#undef NB_TO_INTEGER_OF
#undef NB_FMA
#undef NB_UNARY
#undef NB_TO_INTEGER
