// Operations of a warp: shuffles, votes, matches, reductions, __syncwarp; and the block's barriers.

#pragma once

#define NB_HERE \
  ::nb_emulator::Place { file, line }
#define NB_CALLER const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace nb_emulator {

enum class Shuffle { kIndex, kUp, kDown, kXor };

template <typename T>
struct Shuffled {
  T value;
  int operand, width;
  T result;
};

template <Shuffle kind, typename T>
void execute_shuffle(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane] == nullptr) continue;
    auto& mine = *static_cast<Shuffled<T>*>(lanes[lane]);
    const int first = lane / mine.width * mine.width, last = first + mine.width - 1;
    const int operand = mine.operand & 31;  // five bits of it count
    int source = lane;
    if (kind == Shuffle::kIndex) source = first + (operand & (mine.width - 1));
    if (kind == Shuffle::kUp) source = lane - operand;
    if (kind == Shuffle::kDown) source = lane + operand;
    if (kind == Shuffle::kXor) source = lane ^ operand;
    // Up stays above its segment's first lane; the others stay below its last (PTX ISA, shfl.sync).
    if (kind == Shuffle::kUp ? source < first : source > last) source = lane;
    if (lanes[source] == nullptr) {
      blame_lane(lane, "inactive lane",
                 "a shuffle reads from lane %d, which has exited or is not in the mask", source);
    }
    mine.result = static_cast<Shuffled<T>*>(lanes[source])->value;
  }
}

template <Shuffle kind, typename T>
__forceinline__ T shuffle(unsigned mask, T value, int operand, int width, const char* name, Place place) {
  Shuffled<T> mine{value, operand, width, value};
  if (width < 1 || width > 32 || (width & (width - 1)) != 0) {
    blame("bad argument", place, "%s of width %d: a power of two up to 32 is allowed", name, width);
  }
  warp_together(mask, &mine, execute_shuffle<kind, T>, name, place);
  return mine.result;
}

// What every lane gives and gets in votes, matches and reductions.
template <typename T>
struct Word {
  T value;
  T result;
  int all_same;
};

template <typename T, typename Op>
void execute_reduction(void* const* lanes) {
  T result{};
  bool any = false;
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane] == nullptr) continue;
    const T value = static_cast<Word<T>*>(lanes[lane])->value;
    result = any ? Op()(result, value) : value;
    any = true;
  }
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane] != nullptr) static_cast<Word<T>*>(lanes[lane])->result = result;
  }
}

template <typename T, typename Op>
__forceinline__ T reduction(unsigned mask, T value, const char* name, Place place) {
  Word<T> mine{value, value, 0};
  warp_together(mask, &mine, execute_reduction<T, Op>, name, place);
  return mine.result;
}

template <typename T>
struct Match {
  T value;
  unsigned same;
  bool all;
};

template <typename T>
void execute_match(void* const* lanes) {
  for (int lane = 0; lane < 32; ++lane) {
    if (lanes[lane] == nullptr) continue;
    auto& mine = *static_cast<Match<T>*>(lanes[lane]);
    mine.same = 0;
    mine.all = true;
    for (int other = 0; other < 32; ++other) {
      if (lanes[other] == nullptr) continue;
      const T& theirs = static_cast<Match<T>*>(lanes[other])->value;
      const bool equal = __builtin_memcmp(&theirs, &mine.value, sizeof(T)) == 0;
      mine.same |= static_cast<unsigned>(equal) << other;
      mine.all = mine.all && equal;
    }
  }
}

template <typename T>
__forceinline__ Match<T> match(unsigned mask, T value, const char* name, Place place) {
  Match<T> mine{value, 0, false};
  warp_together(mask, &mine, execute_match<T>, name, place);
  return mine;
}

struct Add {
  template <typename T>
  T operator()(T a, T b) const {
    return a + b;
  }
};
struct Least {
  template <typename T>
  T operator()(T a, T b) const {
    return b < a ? b : a;
  }
};
struct Greatest {
  template <typename T>
  T operator()(T a, T b) const {
    return a < b ? b : a;
  }
};
struct BitAnd {
  template <typename T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct BitOr {
  template <typename T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct BitXor {
  template <typename T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};

}  // namespace nb_emulator

__forceinline__ void __syncthreads(NB_CALLER) { nb_emulator::block_barrier(false, NB_HERE); }
__forceinline__ int __syncthreads_count(int predicate, NB_CALLER) {
  return static_cast<int>(nb_emulator::block_barrier(predicate != 0, NB_HERE).yes);
}
__forceinline__ int __syncthreads_and(int predicate, NB_CALLER) {
  const nb_emulator::Votes votes = nb_emulator::block_barrier(predicate != 0, NB_HERE);
  return votes.yes == votes.threads;
}
__forceinline__ int __syncthreads_or(int predicate, NB_CALLER) {
  return nb_emulator::block_barrier(predicate != 0, NB_HERE).yes != 0;
}

__forceinline__ void __syncwarp(unsigned mask = 0xffffffffu, NB_CALLER) {
  nb_emulator::warp_together(mask, nullptr, nullptr, "__syncwarp", NB_HERE);
}

template <typename T>
__forceinline__ T __shfl_sync(unsigned mask, T value, int source, int width = 32, NB_CALLER) {
  using nb_emulator::Shuffle;
  return nb_emulator::shuffle<Shuffle::kIndex>(mask, value, source, width, "__shfl_sync", NB_HERE);
}
template <typename T>
__forceinline__ T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = 32, NB_CALLER) {
  using nb_emulator::Shuffle;
  return nb_emulator::shuffle<Shuffle::kUp>(mask, value, static_cast<int>(delta), width,
                                            "__shfl_up_sync", NB_HERE);
}
template <typename T>
__forceinline__ T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = 32, NB_CALLER) {
  using nb_emulator::Shuffle;
  return nb_emulator::shuffle<Shuffle::kDown>(mask, value, static_cast<int>(delta), width,
                                              "__shfl_down_sync", NB_HERE);
}
template <typename T>
__forceinline__ T __shfl_xor_sync(unsigned mask, T value, int lanes, int width = 32, NB_CALLER) {
  using nb_emulator::Shuffle;
  return nb_emulator::shuffle<Shuffle::kXor>(mask, value, lanes, width, "__shfl_xor_sync", NB_HERE);
}

__forceinline__ unsigned __ballot_sync(unsigned mask, int predicate, NB_CALLER) {
  const unsigned mine = predicate != 0 ? 1u << nb_emulator::lane() : 0u;
  return nb_emulator::reduction<unsigned, nb_emulator::BitOr>(mask, mine, "__ballot_sync", NB_HERE);
}
__forceinline__ int __any_sync(unsigned mask, int predicate, NB_CALLER) {
  return nb_emulator::reduction<int, nb_emulator::BitOr>(mask, predicate != 0, "__any_sync",
                                                         NB_HERE);
}
__forceinline__ int __all_sync(unsigned mask, int predicate, NB_CALLER) {
  return nb_emulator::reduction<int, nb_emulator::BitAnd>(mask, predicate != 0, "__all_sync",
                                                          NB_HERE);
}
// Which lanes run together is the hardware's choice; here each runs alone.
__forceinline__ unsigned __activemask() { return 1u << nb_emulator::lane(); }

template <typename T>
__forceinline__ unsigned __match_any_sync(unsigned mask, T value, NB_CALLER) {
  return nb_emulator::match(mask, value, "__match_any_sync", NB_HERE).same;
}
template <typename T>
__forceinline__ unsigned __match_all_sync(unsigned mask, T value, int* predicate, NB_CALLER) {
  const auto found = nb_emulator::match(mask, value, "__match_all_sync", NB_HERE);
  *predicate = found.all;
  return found.all ? found.same : 0u;
}

#define NB_REDUCE(name, T, Op)                                             \
  __forceinline__ T name(unsigned mask, T value, NB_CALLER) {                       \
    return nb_emulator::reduction<T, nb_emulator::Op>(mask, value, #name, NB_HERE); \
  }
NB_REDUCE(__reduce_add_sync, int, Add)
NB_REDUCE(__reduce_add_sync, unsigned, Add)
NB_REDUCE(__reduce_min_sync, int, Least)
NB_REDUCE(__reduce_min_sync, unsigned, Least)
NB_REDUCE(__reduce_max_sync, int, Greatest)
NB_REDUCE(__reduce_max_sync, unsigned, Greatest)
NB_REDUCE(__reduce_and_sync, unsigned, BitAnd)
NB_REDUCE(__reduce_or_sync, unsigned, BitOr)
NB_REDUCE(__reduce_xor_sync, unsigned, BitXor)
#undef NB_REDUCE
