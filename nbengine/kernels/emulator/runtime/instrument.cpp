// What the compiler calls by itself in a kernel compiled with checks: -fsanitize=thread announces each
// access to memory before it is made, -fsanitize=alignment,bounds,... what it found wrong. No
// sanitizer's own runtime takes part.

#include <cstring>

#include "block.h"

using namespace nb_emulator;

namespace {

__attribute__((always_inline)) inline void announce(const void* address, size_t bytes,
                                                    Access::Kind kind, const void* pc) {
  Block* block = running_block;
  if (block == nullptr || block->executing_warp >= 0 || bytes == 0) return;
  Thread* thread = block->current;
  if (thread->fiber->holds(address)) return;  // its own local variables
  if (block->stopping()) block->stop(pc);
  block->access(thread, address, bytes, kind, pc);
}

void announce_atomic(const volatile void* changed, size_t bytes, const void* pc) {
  const void* address = const_cast<const void*>(changed);
  announce(address, bytes, Access::kAtomic, pc);
  Block* block = running_block;
  if (block == nullptr || reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
  Error error{"misaligned", text("{address} is accessed atomically, %zu bytes at once: its address "
                                 "must be a multiple of that", bytes)};
  error.address = static_cast<const char*>(address);
  error.variable = block->memory.nearest_shared(error.address, &error.offset);
  block->fail(*block->current, {}, pc, std::move(error));
}

}  // namespace

#define NB_HOOK extern "C" void
#define NB_PC __builtin_return_address(0)

#define NB_ACCESSES(bytes)                                                                         \
  NB_HOOK __tsan_read##bytes(void* a) { announce(a, bytes, Access::kRead, NB_PC); }                \
  NB_HOOK __tsan_write##bytes(void* a) { announce(a, bytes, Access::kWrite, NB_PC); }              \
  NB_HOOK __tsan_volatile_read##bytes(void* a) { announce(a, bytes, Access::kRead, NB_PC); }       \
  NB_HOOK __tsan_volatile_write##bytes(void* a) { announce(a, bytes, Access::kWrite, NB_PC); }     \
  NB_HOOK __tsan_unaligned_read##bytes(void* a) { announce(a, bytes, Access::kRead, NB_PC); }      \
  NB_HOOK __tsan_unaligned_write##bytes(void* a) { announce(a, bytes, Access::kWrite, NB_PC); }    \
  NB_HOOK __tsan_read_write##bytes(void* a) {                                                      \
    announce(a, bytes, Access::kRead, NB_PC);                                                      \
    announce(a, bytes, Access::kWrite, NB_PC);                                                     \
  }
NB_ACCESSES(1)
NB_ACCESSES(2)
NB_ACCESSES(4)
NB_ACCESSES(8)
NB_ACCESSES(16)

NB_HOOK __tsan_read_range(void* a, size_t bytes) { announce(a, bytes, Access::kRead, NB_PC); }
NB_HOOK __tsan_write_range(void* a, size_t bytes) { announce(a, bytes, Access::kWrite, NB_PC); }
NB_HOOK __tsan_init() {}
NB_HOOK __tsan_func_entry(void*) {
  if (running_block != nullptr) running_block->check_in(NB_PC);
}
NB_HOOK __tsan_func_exit() {}
NB_HOOK __tsan_vptr_update(void**, void*) {}
NB_HOOK __tsan_vptr_read(void**) {}

extern "C" void* __tsan_memcpy(void* target, const void* source, size_t bytes) {
  announce(source, bytes, Access::kRead, NB_PC);
  announce(target, bytes, Access::kWrite, NB_PC);
  return std::memcpy(target, source, bytes);
}
extern "C" void* __tsan_memmove(void* target, const void* source, size_t bytes) {
  announce(source, bytes, Access::kRead, NB_PC);
  announce(target, bytes, Access::kWrite, NB_PC);
  return std::memmove(target, source, bytes);
}
extern "C" void* __tsan_memset(void* target, int value, size_t bytes) {
  announce(target, bytes, Access::kWrite, NB_PC);
  return std::memset(target, value, bytes);
}

#ifndef __APPLE__
// g++ leaves calls of memcpy as they are: the linker hands them over (--wrap).
extern "C" void* __wrap_memcpy(void*, const void*, size_t) __attribute__((alias("__tsan_memcpy")));
extern "C" void* __wrap_memmove(void*, const void*, size_t) __attribute__((alias("__tsan_memmove")));
extern "C" void* __wrap_memset(void*, int, size_t) __attribute__((alias("__tsan_memset")));
#endif

// Atomic operations are the compiler's to call and this file's to make. The memory order is always
// the strongest.
#define NB_ATOMICS(bits, T)                                                                        \
  extern "C" T __tsan_atomic##bits##_load(const volatile T* a, int) {                              \
    announce_atomic(a, sizeof(T), NB_PC);                                                          \
    return __atomic_load_n(a, __ATOMIC_SEQ_CST);                                                   \
  }                                                                                                \
  extern "C" void __tsan_atomic##bits##_store(volatile T* a, T value, int) {                       \
    announce_atomic(a, sizeof(T), NB_PC);                                                          \
    __atomic_store_n(a, value, __ATOMIC_SEQ_CST);                                                  \
  }                                                                                                \
  extern "C" T __tsan_atomic##bits##_exchange(volatile T* a, T value, int) {                       \
    announce_atomic(a, sizeof(T), NB_PC);                                                          \
    return __atomic_exchange_n(a, value, __ATOMIC_SEQ_CST);                                        \
  }                                                                                                \
  NB_FETCH(bits, T, add)                                                                           \
  NB_FETCH(bits, T, sub)                                                                           \
  NB_FETCH(bits, T, and)                                                                           \
  NB_FETCH(bits, T, or)                                                                            \
  NB_FETCH(bits, T, xor)                                                                           \
  NB_CAS(bits, T, strong)                                                                          \
  NB_CAS(bits, T, weak)                                                                            \
  NB_CAS_VAL(bits, T)
#define NB_FETCH(bits, T, op)                                                                      \
  extern "C" T __tsan_atomic##bits##_fetch_##op(volatile T* a, T value, int) {                     \
    announce_atomic(a, sizeof(T), NB_PC);                                                          \
    return __atomic_fetch_##op(a, value, __ATOMIC_SEQ_CST);                                        \
  }
#define NB_CAS(bits, T, strength)                                                                  \
  extern "C" int __tsan_atomic##bits##_compare_exchange_##strength(volatile T* a, T* expected,     \
                                                                   T value, int, int) {            \
    announce_atomic(a, sizeof(T), NB_PC);                                                          \
    return __atomic_compare_exchange_n(a, expected, value, false, __ATOMIC_SEQ_CST,                \
                                       __ATOMIC_SEQ_CST);                                          \
  }
#define NB_CAS_VAL(bits, T)                                                                        \
  extern "C" T __tsan_atomic##bits##_compare_exchange_val(volatile T* a, T expected, T value, int, \
                                                          int) {                                   \
    announce_atomic(a, sizeof(T), NB_PC);                                                          \
    __atomic_compare_exchange_n(a, &expected, value, false, __ATOMIC_SEQ_CST, __ATOMIC_SEQ_CST);   \
    return expected;                                                                               \
  }
NB_ATOMICS(8, uint8_t)
NB_ATOMICS(16, uint16_t)
NB_ATOMICS(32, uint32_t)
NB_ATOMICS(64, uint64_t)
NB_HOOK __tsan_atomic_thread_fence(int) {
  __atomic_thread_fence(__ATOMIC_SEQ_CST);
  if (running_block != nullptr) running_block->fence();
}
NB_HOOK __tsan_atomic_signal_fence(int) {}

// The sanitizers of undefined behaviour name the place themselves. What they pass starts with it.
namespace {

struct Found {
  const char* file;
  uint32_t line, column;
};

struct Type {
  uint16_t kind, info;
  char name[1];
};

struct Mismatch {
  Found at;
  const Type* type;
  unsigned char log_alignment, kind;
};

struct OutOfBounds {
  Found at;
  const Type *array, *index;
};

// The place may be a header's; `pc` leads to the kernel's own line.
[[noreturn]] void found(const Found& at, const void* pc, Error error) {
  const Place place{at.file, static_cast<int>(at.line)};
  running_block->fail(*running_block->current, place, pc, std::move(error));
}

}  // namespace

NB_HOOK __ubsan_handle_type_mismatch_v1(const Mismatch* data, uintptr_t address) {
  if (running_block == nullptr || address == 0) return;  // a null pointer shows at its access
  Error error{"misaligned",
              text("{address} is accessed as %s, whose address must be a multiple of %u",
                   data->type->name, 1u << data->log_alignment)};
  error.address = reinterpret_cast<const char*>(address);
  error.variable = running_block->memory.nearest_shared(error.address, &error.offset);
  found(data->at, NB_PC, std::move(error));
}

NB_HOOK __ubsan_handle_out_of_bounds(const OutOfBounds* data, uintptr_t index) {
  if (running_block == nullptr) return;
  // An index wider than a pointer comes by its address; none is met in kernels.
  found(data->at, NB_PC, {"out of bounds", text("index %lld of an array %s",
                                                static_cast<long long>(static_cast<int64_t>(index)),
                                                data->array->name)});
}

NB_HOOK __ubsan_handle_divrem_overflow(const Found* at, uintptr_t, uintptr_t divisor) {
  if (running_block == nullptr) return;
  found(*at, NB_PC, {"division", divisor == 0 ? "an integer is divided by zero"
                                       : "the quotient does not fit its type"});
}
