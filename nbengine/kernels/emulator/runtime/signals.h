// The three signals that a launch takes: an interrupt, the fault of a stack that overflows, and ticks of
// the time that its blocks use. The last two may take a thread of the kernel away from where it is.

#pragma once

#include <time.h>

#include <atomic>

namespace nb_emulator {

// While it lives, SIGINT stops the launch that wants it, besides what it does anyway. One at a time:
// Python handles signals on its main thread.
class Interruption {
 public:
  explicit Interruption(bool is_wanted);
  ~Interruption();
  Interruption(const Interruption&) = delete;

  bool wanted() const { return is_wanted_; }
  std::atomic<bool>& stop() const;

 private:
  bool is_wanted_;
};

// While it lives, the block that runs on the calling thread of the operating system is told of the time
// that it uses there, so that a kernel can be stopped in a loop that never calls. On Linux; SIGURG,
// which nobody minds: by default it is ignored, and debuggers let it pass.
constexpr int kTicksPerSecond = 200;
class Ticks {
 public:
  Ticks();
  ~Ticks();
  Ticks(const Ticks&) = delete;

#if defined(__linux__)
 private:
  timer_t timer_;
  bool is_on_;
#endif
};

// On the calling thread of the operating system, a fiber that runs into its guard ends its launch with
// an error. Other faults go where they went before.
void catch_overflows();

}  // namespace nb_emulator
