// Fibers: stacks of their own that hand the processor to each other without the operating system.
//
// A switch saves the registers that the calling convention lets a function expect to keep, and nothing
// else: CUDA C has no word for the rounding modes of a thread, so they are the same on every fiber. A
// fiber stays on the operating system's thread that first ran it, so that thread-local addresses keep
// their meaning.

#pragma once

#include <cstddef>
#include <memory>

namespace nb_emulator {

class Fiber {
 public:
  // Null where the system has no more memory or mappings to give.
  static std::unique_ptr<Fiber> make(void (*entry)());
  ~Fiber();
  Fiber(const Fiber&) = delete;

  // Forget what ran here: the next switch calls the entry anew.
  void reset();

  bool holds(const void* address) const {
    return static_cast<size_t>(static_cast<const char*>(address) - stack_) < kStackBytes;
  }

  // Whether the runtime may still run in a frame here. It must never overflow a stack itself: what
  // it had locked would stay locked.
  bool has_room_below(const void* frame) const {
    return static_cast<const char*>(frame) - stack_ >= static_cast<std::ptrdiff_t>(kReserveBytes);
  }

  // Whether an address is one that an overflowing stack comes to first.
  bool guard_holds(const void* address) const {
    const char* at = static_cast<const char*>(address);
    return stack_ - static_cast<std::ptrdiff_t>(kGuardBytes) <= at && at < stack_;
  }
  char* top() const { return top_; }

  // Of address space; pages come when touched. CUDA's threads may have 512 KiB of local memory, which
  // an optimising compiler packs more densely.
  static constexpr size_t kStackBytes = 1 << 20;
  static constexpr size_t kReserveBytes = 64 << 10;
  // With it stacks are an odd number of pages apart: the processor finds translations by the last bits
  // of a page's number, and would have places for few of them at once.
  static constexpr size_t kGuardBytes = 68 << 10;

  void* saved = nullptr;

 private:
  Fiber(void (*entry)(), char* stack);

  void (*entry_)();
  char *stack_, *top_;
};

// Leaves the running stack, kept in `*saved`, for the one in `next`.
extern "C" void nb_emulator_switch(void** saved, void* next);

}  // namespace nb_emulator
