// Infinity, and special functions as one or two instructions, good to about 2^-22.

#pragma once

namespace nb {

constexpr float kLog2E = 1.4426950408889634f;

__device__ __forceinline__ float infinity() {
#ifdef NB_EMULATOR
  return __builtin_huge_valf();
#else
  return __int_as_float(0x7f800000);
#endif
}

// 2^x; 0 for x below -126, -infinity included.
__device__ __forceinline__ float exp2_fast(float x) {
#ifdef NB_EMULATOR
  return exp2f(x);
#else
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}

__device__ __forceinline__ float reciprocal_fast(float x) {
#ifdef NB_EMULATOR
  return 1.0f / x;
#else
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;\n" : "=f"(y) : "f"(x));
  return y;
#endif
}

// By its definition, as tanh.approx errs by 2^-11: too much for a score that goes into exp.
__device__ __forceinline__ float tanh_fast(float x) {
  return 1.0f - 2.0f * reciprocal_fast(exp2_fast(2.0f * kLog2E * x) + 1.0f);
}

}  // namespace nb
