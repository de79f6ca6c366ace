// Atomic functions, and the cache hints of loads and stores, which mean nothing here.
//
// Blocks run on several threads of the operating system, so these are atomic in earnest. Types of
// which the processor has no atomic operation go through a compare-and-swap of as many bytes.

#pragma once

namespace nb_emulator {

template <size_t bytes>
struct Bits;
template <>
struct Bits<2> {
  using type = unsigned short;
};
template <>
struct Bits<4> {
  using type = unsigned;
};
template <>
struct Bits<8> {
  using type = unsigned long long;
};

template <typename To, typename From>
__forceinline__ To bit_cast(const From& from) {
  static_assert(sizeof(To) == sizeof(From), "as many bytes");
  To to;
  __builtin_memcpy(static_cast<void*>(&to), &from, sizeof(To));
  return to;
}

template <typename Word>
__attribute__((noinline, no_sanitize("thread"))) bool exchanged(Word* word, Word* old, Word wanted) {
  return __atomic_compare_exchange_n(word, old, wanted, false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
}

// One access, which the load announces.
template <typename T, typename Change>
__forceinline__ T atomic_change(T* address, Change change) {
  using Word = typename Bits<sizeof(T)>::type;
  auto* word = reinterpret_cast<Word*>(address);
  Word old = __atomic_load_n(word, __ATOMIC_RELAXED);
  while (!exchanged(word, &old, bit_cast<Word>(T(change(bit_cast<T>(old)))))) {
  }
  return bit_cast<T>(old);
}

}  // namespace nb_emulator

#define NB_ATOMIC(name, T, changed)                              \
  __forceinline__ T name(T* address, T value) {                  \
    return nb_emulator::atomic_change(address, [=](T old) -> T { \
      (void)old;                                                 \
      return changed;                                            \
    });                                                          \
  }                                                              \
  __forceinline__ T name##_block(T* address, T value) { return name(address, value); } \
  __forceinline__ T name##_system(T* address, T value) { return name(address, value); }

#define NB_ATOMIC_INTEGERS(name, changed)   \
  NB_ATOMIC(name, int, changed)             \
  NB_ATOMIC(name, unsigned, changed)        \
  NB_ATOMIC(name, long long, changed)       \
  NB_ATOMIC(name, unsigned long, changed)   \
  NB_ATOMIC(name, unsigned long long, changed)

NB_ATOMIC_INTEGERS(atomicAdd, old + value)
NB_ATOMIC(atomicAdd, float, old + value)
NB_ATOMIC(atomicAdd, double, old + value)
NB_ATOMIC(atomicAdd, __half, __hadd(old, value))
NB_ATOMIC(atomicAdd, __half2, __hadd2(old, value))
NB_ATOMIC(atomicAdd, __nv_bfloat16, __hadd(old, value))
NB_ATOMIC(atomicAdd, __nv_bfloat162, __hadd2(old, value))
NB_ATOMIC_INTEGERS(atomicSub, old - value)
NB_ATOMIC_INTEGERS(atomicMin, value < old ? value : old)
NB_ATOMIC_INTEGERS(atomicMax, old < value ? value : old)
NB_ATOMIC_INTEGERS(atomicAnd, old & value)
NB_ATOMIC_INTEGERS(atomicOr, old | value)
NB_ATOMIC_INTEGERS(atomicXor, old ^ value)
NB_ATOMIC_INTEGERS(atomicExch, value)
NB_ATOMIC(atomicExch, float, value)
NB_ATOMIC(atomicInc, unsigned, old >= value ? 0u : old + 1u)
NB_ATOMIC(atomicDec, unsigned, old == 0u || old > value ? value : old - 1u)
#undef NB_ATOMIC_INTEGERS
#undef NB_ATOMIC

#define NB_CAS(T)                                                                      \
  __forceinline__ T atomicCAS(T* address, T compare, T value) {                        \
    return nb_emulator::atomic_change(                                                 \
        address, [=](T old) -> T { return old == compare ? value : old; });            \
  }                                                                                    \
  __forceinline__ T atomicCAS_block(T* address, T compare, T value) {                  \
    return atomicCAS(address, compare, value);                                         \
  }                                                                                    \
  __forceinline__ T atomicCAS_system(T* address, T compare, T value) {                 \
    return atomicCAS(address, compare, value);                                         \
  }
NB_CAS(unsigned short)
NB_CAS(int)
NB_CAS(unsigned)
NB_CAS(unsigned long)
NB_CAS(unsigned long long)
#undef NB_CAS

#define NB_LOAD(name)                         \
  template <typename T>                       \
  __forceinline__ T name(const T* address) {  \
    return *address;                          \
  }
NB_LOAD(__ldg)
NB_LOAD(__ldcg)
NB_LOAD(__ldca)
NB_LOAD(__ldcs)
NB_LOAD(__ldlu)
NB_LOAD(__ldcv)
#undef NB_LOAD
#define NB_STORE(name)                                                            \
  template <typename T>                                                           \
  __forceinline__ void name(T* address, const std::common_type_t<T>& value) {     \
    *address = value;                                                             \
  }
NB_STORE(__stwb)
NB_STORE(__stcg)
NB_STORE(__stcs)
NB_STORE(__stwt)
#undef NB_STORE

inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_system() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }

template <typename T>
size_t __cvta_generic_to_shared(T* address) {
  return reinterpret_cast<size_t>(address);
}
template <typename T>
size_t __cvta_generic_to_global(T* address) {
  return reinterpret_cast<size_t>(address);
}
