// Tensor-core products of a warp: ldmatrix and mma.sync.m16n8k16 (sm_80 and later).
//
// Fragment layouts (PTX ISA, "Matrix fragments for mma.m16n8k16"), g = lane / 4, t = lane % 4:
//   A 16 x 16, a[0..3]: rows g, g + 8, g, g + 8; columns 2t, 2t + 1 (a[0], a[1]) and 2t + 8, 2t + 9
//   B 16 x 8,  b[0..1]: rows 2t, 2t + 1 (b[0]) and 2t + 8, 2t + 9 (b[1]); column g
//   D 16 x 8,  d[0..3]: row g, columns 2t, 2t + 1 (d[0], d[1]); row g + 8 (d[2], d[3])
// Each 32-bit register of A and B holds two 16-bit elements, the first in the low half.

#pragma once

#include "nb/types.cuh"

#ifdef NB_EMULATOR
#include "nb_emulator_mma.h"
#else

namespace nb {

// Four (or two) 8 x 8 matrices of 16-bit elements. Lane i gives the address of row i % 8 of matrix
// i / 8, 16 bytes aligned (of the x2 forms, lanes 0 to 15 alone); matrix j arrives in registers[j],
// lane 4r + c holding columns 2c, 2c + 1 of row r. The _trans forms transpose each matrix on its way.
__device__ __forceinline__ void ldmatrix_x4(uint32 (&registers)[4], const void* shared_row) {
  const uint32 address = static_cast<uint32>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32 (&registers)[4], const void* shared_row) {
  const uint32 address = static_cast<uint32>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(registers[0]), "=r"(registers[1]), "=r"(registers[2]), "=r"(registers[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2(uint32 (&registers)[2], const void* shared_row) {
  const uint32 address = static_cast<uint32>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32 (&registers)[2], const void* shared_row) {
  const uint32 address = static_cast<uint32>(__cvta_generic_to_shared(shared_row));
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];\n"
               : "=r"(registers[0]), "=r"(registers[1])
               : "r"(address)
               : "memory");
}

// d += a * b, summed in float. T is the type of A's and B's elements.
template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32 (&a)[4],
                                             const uint32 (&b)[2]);

template <>
__device__ __forceinline__ void mma_m16n8k16<__nv_bfloat16>(float (&d)[4], const uint32 (&a)[4],
                                                            const uint32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

template <>
__device__ __forceinline__ void mma_m16n8k16<__half>(float (&d)[4], const uint32 (&a)[4],
                                                     const uint32 (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};\n"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace nb

#endif
