// The two signals that a launch takes: an interrupt, and the fault of a stack that overflows.

#pragma once

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

// On the calling thread of the operating system, a fiber that runs into its guard ends its launch with
// an error. Other faults go where they went before.
void catch_overflows();

}  // namespace nb_emulator
