// Fibers: stacks of their own that hand the processor to each other without the operating system.
//
// A switch saves the registers that the calling convention lets a function expect to keep, and nothing
// else: CUDA C has no word for the rounding modes of a thread, so they are the same on every fiber. A
// fiber stays on the operating system's thread that first ran it, so that thread-local addresses keep
// their meaning.

#pragma once

#include <cstddef>

namespace nb_emulator {

class Fiber {
 public:
  explicit Fiber(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;

  // Forget what ran here: the next switch calls the entry anew.
  void reset();

  bool holds(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - stack_) < kStackBytes;
  }

  static constexpr size_t kStackBytes = 256 << 10;  // of address space; pages come when touched

  void* saved = nullptr;

 private:
  void (*entry_)();
  char *stack_, *top_;
};

// Leaves the running stack, kept in `*saved`, for the one in `next`.
extern "C" void nb_emulator_switch(void** saved, void* next);

}  // namespace nb_emulator
