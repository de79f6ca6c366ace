// The stream of events of a running block, and what listens to it.
//
// Checks, counters and recordings are listeners. A block calls them in turn, on the thread of the
// operating system that runs it; each such thread has listeners of its own.

#pragma once

#include <cstddef>
#include <cstdint>

#include "../include/nb_emulator_runtime.h"

namespace nb_emulator {

struct Thread;
class Block;

struct Access {
  enum Kind : uint8_t { kRead, kWrite, kAtomic, kCopyIssue, kCopyArrival };
  enum Space : uint8_t { kGlobal, kShared, kOther };

  Thread* thread;
  const char* address;
  size_t bytes;
  Kind kind;
  const void* pc;  // an address of the instruction after it

  // Where it goes, as the block's map of memory says. `buffer` counts the launch's buffers for
  // kGlobal and the kernel's shared variables for kShared; -1 is an address in none.
  Space space = kOther;
  int buffer = -1;
  size_t offset = 0;  // of the address, into the buffer

  bool writes() const { return kind != kRead; }
};

class Listener {
 public:
  virtual ~Listener() = default;
  virtual void block_start(Block&) {}
  virtual void access(Block&, const Access&) {}
  // Those threads have all arrived, and go on.
  virtual void barrier(Block&) {}
  virtual void warp_operation(Block&, int /*warp*/, unsigned /*mask*/, const char* /*name*/) {}
  virtual void block_end(Block&) {}
};

}  // namespace nb_emulator
