// ldmatrix and mma.sync for the emulator: what nb/mma.cuh says, lane by lane.

#pragma once

namespace nb_emulator {

constexpr unsigned kWholeWarp = 0xffffffffu;

// ldmatrix and mma.sync are for warps whose 32 lanes are all there.
__forceinline__ void require_whole_warp(void* const* lanes, const char* name) {
  int there = 0, missing = -1;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane] == nullptr) missing = lane;
  }
  if (missing < 0) return;
  while (lanes[there] == nullptr) ++there;
  blame_lane(there, "inactive lane", "%s needs all 32 lanes of the warp, and lane %d has exited or "
             "does not exist", name, missing);
}

struct Matrices {
  unsigned* registers;
  const void* row;
};

template <int count, bool transposed>
void execute_ldmatrix(void* const* lanes) {
  require_whole_warp(lanes, "ldmatrix");
  for (int matrix = 0; matrix < count; ++matrix) {
    unsigned short items[8][8];
    for (int row = 0; row < 8; ++row) {
      const int lane = 8 * matrix + row;
      const void* source = static_cast<Matrices*>(lanes[lane])->row;
      lane_reads(lane, source, 16);
      if (reinterpret_cast<size_t>(source) % 16 != 0) {
        blame_lane(lane, "misaligned", "ldmatrix reads rows whose address is a multiple of 16");
      }
      __builtin_memcpy(items[row], source, 16);
    }
    for (int lane = 0; lane < 32; ++lane) {
      const int row = lane / 4, column = lane % 4 * 2;
      const unsigned low = transposed ? items[column][row] : items[row][column];
      const unsigned high = transposed ? items[column + 1][row] : items[row][column + 1];
      static_cast<Matrices*>(lanes[lane])->registers[matrix] = low | high << 16;
    }
  }
}

template <int count, bool transposed>
__forceinline__ void ldmatrix(unsigned* registers, const void* row, Place place) {
  Matrices mine{registers, row};
  warp_together(kWholeWarp, &mine, execute_ldmatrix<count, transposed>, "ldmatrix", place);
}

struct Product {
  float* d;
  const unsigned *a, *b;
};

__forceinline__ float element(unsigned pair, int which, __half*) {
  return __half2float(bit_cast<__half>(static_cast<unsigned short>(pair >> (16 * which))));
}
__forceinline__ float element(unsigned pair, int which, __nv_bfloat16*) {
  return bit_cast<float>(which == 0 ? pair << 16 : pair & 0xffff0000u);
}

template <typename T>
void execute_mma_m16n8k16(void* const* lanes) {
  require_whole_warp(lanes, "mma.m16n8k16");
  float a[16][16], b[8][16];  // b transposed
  for (int lane = 0; lane < 32; ++lane) {
    const auto& mine = *static_cast<Product*>(lanes[lane]);
    const int g = lane / 4, t = lane % 4;
    for (int which = 0; which < 2; ++which) {
      for (int i = 0; i < 4; ++i) {
        a[g + i % 2 * 8][2 * t + i / 2 * 8 + which] = element(mine.a[i], which, (T*)nullptr);
      }
      for (int i = 0; i < 2; ++i) {
        b[g][2 * t + i * 8 + which] = element(mine.b[i], which, (T*)nullptr);
      }
    }
  }
  for (int lane = 0; lane < 32; ++lane) {
    float* d = static_cast<Product*>(lanes[lane])->d;
    const int g = lane / 4, t = lane % 4;
    for (int i = 0; i < 4; ++i) {
      float sum = 0.0f;
      for (int k = 0; k < 16; ++k) sum += a[g + i / 2 * 8][k] * b[2 * t + i % 2][k];
      d[i] += sum;
    }
  }
}

}  // namespace nb_emulator

namespace nb {

__device__ __forceinline__ void ldmatrix_x4(uint32 (&registers)[4], const void* shared_row,
                                            NB_CALLER) {
  nb_emulator::ldmatrix<4, false>(registers, shared_row, NB_HERE);
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32 (&registers)[4], const void* shared_row,
                                                  NB_CALLER) {
  nb_emulator::ldmatrix<4, true>(registers, shared_row, NB_HERE);
}

__device__ __forceinline__ void ldmatrix_x2(uint32 (&registers)[2], const void* shared_row,
                                            NB_CALLER) {
  nb_emulator::ldmatrix<2, false>(registers, shared_row, NB_HERE);
}

__device__ __forceinline__ void ldmatrix_x2_trans(uint32 (&registers)[2], const void* shared_row,
                                                  NB_CALLER) {
  nb_emulator::ldmatrix<2, true>(registers, shared_row, NB_HERE);
}

template <typename T>
__device__ __forceinline__ void mma_m16n8k16(float (&d)[4], const uint32 (&a)[4],
                                             const uint32 (&b)[2], NB_CALLER) {
  nb_emulator::Product mine{d, a, b};
  nb_emulator::warp_together(nb_emulator::kWholeWarp, &mine, nb_emulator::execute_mma_m16n8k16<T>,
                             "mma.m16n8k16", NB_HERE);
}

}  // namespace nb
