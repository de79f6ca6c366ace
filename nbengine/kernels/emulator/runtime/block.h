// One block: its threads as fibers, its barrier, its warps' operations, its asynchronous copies.
//
// A Block belongs to one thread of the operating system and runs one block of the grid after
// another. A thread of the block runs until it has to wait; then the next ready one runs, or one that
// has not started yet, in the order of their indices. A thread that never waits costs no fiber of its
// own: the fiber that ran it starts the next.

#pragma once

#include <cstdarg>
#include <deque>
#include <memory>
#include <string>
#include <vector>

#include "events.h"
#include "fiber.h"
#include "launch.h"

namespace nb_emulator {

constexpr int kLanes = 32;

struct AsyncCopy {
  char* target;
  size_t bytes;
  unsigned char data[16];
  int group;
  const void* pc;
};

struct Thread {
  enum State : uint8_t { kNew, kRunning, kAtBarrier, kAtWarpOperation, kExited };

  Fiber* fiber = nullptr;
  Index index{};
  int number = 0;  // in its block
  State state = kNew;
  bool vote = false;
  Place place{};         // of what it waits for
  const char* waits_for = "";
  const void* pc = nullptr;
  unsigned mask = 0;     // of the warp operation it waits for
  int groups = 0;        // of asynchronous copies that were committed
  std::vector<AsyncCopy> copies;

  int lane() const { return number % kLanes; }
  int warp() const { return number / kLanes; }
};

class Block {
 public:
  explicit Block(Grid& grid);
  ~Block();

  // Runs one block of the grid, to its end or to the launch's first error.
  void run(uint64_t linear_block);

  Votes barrier(bool vote, Place place, const void* pc);
  void warp_together(unsigned mask, void* arguments, Execute execute, const char* name, Place place,
                     const void* pc);
  void async_copy(void* target, const void* source, size_t bytes, size_t source_bytes,
                  const void* pc);
  void async_commit();
  void async_wait(int groups_in_flight, const void* pc);

  // An access by the running thread, or by `thread`, told to the listeners.
  void access(Thread* thread, const void* address, size_t bytes, Access::Kind kind, const void* pc);

  // Ends the launch with an error. Never returns: the block is left as it stands.
  [[noreturn]] void fail(Error error);
  [[noreturn]] void fail(Thread* thread, const char* kind, Place place, const void* pc,
                         const char* format, ...) __attribute__((format(printf, 6, 7)));

  Grid& grid;
  Index index{};
  std::vector<Thread> threads;
  Thread* current = nullptr;
  Thread* blamed_warp = nullptr;  // a lane of the warp whose operation executes
  int muted = 0;                  // accesses that are the emulator's own

  int warps() const { return (static_cast<int>(threads.size()) + kLanes - 1) / kLanes; }
  Thread* lane_of(int warp, int lane) {
    const size_t number = static_cast<size_t>(warp) * kLanes + lane;
    return number < threads.size() ? &threads[number] : nullptr;
  }
  // The lanes of a warp that there are, and have not exited.
  unsigned live_lanes(int warp);

  std::vector<std::unique_ptr<Listener>> listeners;

 private:
  struct Group {  // lanes waiting for a warp operation
    unsigned mask = 0, arrived = 0;
    Execute execute = nullptr;
    const char* name = "";
    void* lanes[kLanes] = {};
  };

  static void fiber_main();
  [[noreturn]] void work();
  Fiber* idle_fiber();
  void wait();
  void exited(Thread& thread);
  void release_barrier();
  void finish(Group& group, int warp);
  void arrive(Thread& thread, size_t keep_groups, const void* pc);
  [[noreturn]] void deadlock();
  [[noreturn]] void leave();

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  Fiber* fiber_ = nullptr;  // the running one
  void* caller_ = nullptr;  // the stack that called run()
  std::deque<Thread*> ready_;
  size_t started_ = 0, live_ = 0, waiting_ = 0;
  Votes votes_{}, result_{};
  std::vector<std::vector<Group>> groups_;  // by warp
};

// The block that runs on this thread of the operating system.
extern thread_local Block* running_block;

}  // namespace nb_emulator
