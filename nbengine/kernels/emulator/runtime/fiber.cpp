#include "fiber.h"

#include <sys/mman.h>

#include <atomic>
#include <cstdint>

#ifndef MAP_NORESERVE
#define MAP_NORESERVE 0
#endif

namespace nb_emulator {

std::unique_ptr<Fiber> Fiber::make(void (*entry)()) {
  constexpr size_t kBytes = kGuardBytes + kStackBytes;
  void* mapped = mmap(nullptr, kBytes, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  if (mprotect(mapped, kGuardBytes, PROT_NONE) != 0) {
    munmap(mapped, kBytes);
    return nullptr;
  }
  return std::unique_ptr<Fiber>(new Fiber(entry, static_cast<char*>(mapped) + kGuardBytes));
}

Fiber::Fiber(void (*entry)(), char* stack) : entry_(entry), stack_(stack) {
  // Stacks that began at the same place of a page would fight for the same lines of the cache.
  static std::atomic<size_t> made{0};
  top_ = stack_ + kStackBytes - made++ % 32 * 128;
  reset();
}

Fiber::~Fiber() { munmap(stack_ - kGuardBytes, kGuardBytes + kStackBytes); }

#if defined(__APPLE__)
#define NB_SYMBOL "_nb_emulator_switch"
#define NB_TYPE
#else
#define NB_SYMBOL "nb_emulator_switch"
#define NB_TYPE ".type " NB_SYMBOL ", %function\n"
#endif

#if defined(__x86_64__)

// From the top: six registers, the address to return to.
void Fiber::reset() {
  auto* top = reinterpret_cast<uint64_t*>(top_) - 3;
  *top = 0;  // where the entry would return to; as after a call, 8 above a multiple of 16
  *--top = reinterpret_cast<uint64_t>(entry_);
  for (int i = 0; i < 6; ++i) *--top = 0;
  saved = top;
}

__asm__(".text\n.globl " NB_SYMBOL "\n" NB_TYPE NB_SYMBOL ":\n" R"(
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");

#elif defined(__aarch64__)

// x19 to x30 and d8 to d15: 20 registers.
void Fiber::reset() {
  auto* top = reinterpret_cast<uint64_t*>(top_) - 20;
  for (int i = 0; i < 20; ++i) top[i] = 0;
  top[11] = reinterpret_cast<uint64_t>(entry_);  // x30, the address to return to
  saved = top;
}

__asm__(".text\n.globl " NB_SYMBOL "\n.p2align 2\n" NB_TYPE NB_SYMBOL ":\n" R"(
  sub sp, sp, #160
  stp x19, x20, [sp, #0]
  stp x21, x22, [sp, #16]
  stp x23, x24, [sp, #32]
  stp x25, x26, [sp, #48]
  stp x27, x28, [sp, #64]
  stp x29, x30, [sp, #80]
  stp d8, d9, [sp, #96]
  stp d10, d11, [sp, #112]
  stp d12, d13, [sp, #128]
  stp d14, d15, [sp, #144]
  mov x9, sp
  str x9, [x0]
  mov sp, x1
  ldp x19, x20, [sp, #0]
  ldp x21, x22, [sp, #16]
  ldp x23, x24, [sp, #32]
  ldp x25, x26, [sp, #48]
  ldp x27, x28, [sp, #64]
  ldp x29, x30, [sp, #80]
  ldp d8, d9, [sp, #96]
  ldp d10, d11, [sp, #112]
  ldp d12, d13, [sp, #128]
  ldp d14, d15, [sp, #144]
  add sp, sp, #160
  ret
)");

#else
#error "the emulator switches fibers on x86-64 and aarch64"
#endif

}  // namespace nb_emulator
