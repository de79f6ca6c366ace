// The stream of events of a running block, and what listens to it.
//
// Checks, counters and recordings are listeners. A block tells them in turn, on the thread of the
// operating system that runs it; each such thread has listeners of its own.

#pragma once

#include <memory>
#include <vector>

#include "launch.h"

namespace nb_emulator {

struct Thread;
class Block;

struct Access {
  enum Kind : uint8_t { kRead, kWrite, kAtomic, kCopyIssue, kCopyArrival };
  enum Space : uint8_t { kNowhere, kGlobal, kShared, kConstant };

  Thread* thread;
  const char* address;
  size_t bytes;
  Kind kind;
  const void* pc;  // the address that the call which announced it returns to

  // Where it goes: `buffer` counts the launch's buffers, or its shared variables, and `offset` is
  // the address's in there.
  Space space = kNowhere;
  int buffer = -1;
  size_t offset = 0;
};

class Listener {
 public:
  virtual ~Listener() = default;
  virtual void block_start(Block&) {}
  virtual void access(Block&, const Access&) {}
  // All threads of the block that have not exited are here, and go on.
  virtual void barrier(Block&) {}
  // So do these lanes of a warp. A __syncwarp alone orders their accesses to memory.
  virtual void warp_operation(Block&, int /*warp*/, unsigned /*lanes*/, bool /*orders_memory*/) {}
  virtual void fence(Block&, const Thread&) {}
  virtual void thread_end(Block&, Thread&) {}
  virtual void block_end(Block&) {}
};

using ListenerList = std::vector<std::unique_ptr<Listener>>;

void add_checks(ListenerList& list);
void add_counters(ListenerList& list, Grid& grid);
void add_trace(ListenerList& list, Grid& grid);

}  // namespace nb_emulator
