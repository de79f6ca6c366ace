// Which memory an address lies in: a tensor, a shared variable, the kernel's own constants.

#pragma once

#include <vector>

#include "events.h"

namespace nb_emulator {

class Memory {
 public:
  // On the thread of the operating system that will ask: shared variables are its own.
  explicit Memory(const LaunchRequest& request);

  // Fills in where the access goes. An access that is not wholly in one piece goes nowhere.
  void locate(Access& access) const;

  // Whether there is machine code of the kernel's own library. May be asked in a signal's handler.
  bool is_code(const void* address) const;

  // The shared variable that an address is in or past, and how far from its start; -1 for an address
  // nowhere near one.
  int nearest_shared(const char* address, int64_t* offset) const;

  // The shared variables' sizes, and the bytes of all variables before each.
  const std::vector<Buffer>& shared() const { return shared_; }
  size_t shared_start(int variable) const { return starts_[static_cast<size_t>(variable)]; }
  size_t shared_bytes() const { return starts_.back(); }

 private:
  const LaunchRequest& request_;
  const char* library_;
  std::vector<Buffer> shared_, guards_;
  std::vector<size_t> starts_{0};
  mutable uintptr_t constant_page_ = ~uintptr_t{0};  // the last that was found to be the library's
};

}  // namespace nb_emulator
