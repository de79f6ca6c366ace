// One block: its threads as fibers, its barrier, its warps' operations, its asynchronous copies.
//
// A Block belongs to one thread of the operating system and runs one block of the grid after
// another. A thread of the block runs until it has to wait; then the next ready one runs, or one that
// has not started yet, in the order of their indices. A thread that never waits costs no fiber of its
// own: the fiber that ran it starts the next.

#pragma once

#include <memory>
#include <vector>

#include "events.h"
#include "fiber.h"
#include "memory.h"

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
  enum State : uint8_t { kRunning, kAtBarrier, kAtWarpOperation, kExited };

  Fiber* fiber = nullptr;
  Index index{};
  int number = 0;  // in its block
  State state = kRunning;

  // Of what it waits for, or last waited for.
  const char* name = "";
  Place place{};
  const void* pc = nullptr;
  unsigned mask = 0;

  int committed_groups = 0;
  std::vector<AsyncCopy> copies;  // that have not arrived

  int lane() const { return number % kLanes; }
  int warp() const { return number / kLanes; }
};

class Block {
 public:
  explicit Block(Grid& grid);
  ~Block();

  // Runs one block of the grid, to its end or to the launch's first error.
  void run(uint64_t linear_block);

  // What the kernel's calls come to, for the current thread.
  Votes barrier(bool vote, Place place, const void* pc);
  void warp_together(unsigned mask, void* arguments, Execute execute, const char* name, Place place,
                     const void* pc);
  void async_copy(void* target, const void* source, size_t bytes, size_t source_bytes,
                  const void* pc);
  void async_commit() { ++current->committed_groups; }
  void async_wait(int groups_in_flight);

  void fence();

  // Tells the listeners of an access.
  void access(Thread* thread, const void* address, size_t bytes, Access::Kind kind, const void* pc);

  // Ends the launch with an error that blames `thread`, at `pc` or, where nothing is known of that, at
  // `place`. The block is left as it stands.
  [[noreturn]] void fail(const Thread& thread, Place place, const void* pc, Error error);

  // Ends the launch if it is to stop, or the current thread if its stack is as good as full. To be
  // asked wherever the kernel calls.
  void check_in(const void* pc = nullptr) {
    if (stopping()) stop(pc);
    if (!current->fiber->has_room_below(__builtin_frame_address(0))) overflowed(pc);
  }
  bool stopping() const { return launch_is_over() || ticks_left() <= 0; }
  // Ends the launch that is to stop: with an error if that is because this block's time is up.
  [[noreturn]] void stop(const void* pc);
  // From a signal's handler: the block has used so many ticks more of a processor, and is at `pc`.
  // Whether to take it away from there, because it is stopping and has not come by to ask.
  bool tick(int ticks, const void* pc);
  // Back to the caller of run(). What the fibers did is forgotten with their stacks.
  [[noreturn]] void leave();
  // The current thread has used up its stack.
  [[noreturn]] void overflowed(const void* pc);
  const Fiber& running_fiber() const { return *fiber_; }

  // An error that may yet show itself as a race, which says more: at the next barrier, the block's
  // end, or in place of an error that may follow from it. The first is kept.
  void suspect(const Access& access, Error error);

  Grid& grid;
  Index index{};
  std::vector<Thread> threads;
  Thread* current = nullptr;
  int executing_warp = -1;  // whose operation is executed right now, for all its lanes
  Memory memory;

  int num_warps() const { return static_cast<int>(live_lanes_.size()); }
  Thread& lane_of(int warp, int lane) { return threads[static_cast<size_t>(warp) * kLanes + lane]; }
  unsigned live_lanes(int warp) const { return live_lanes_[static_cast<size_t>(warp)]; }
  bool owns_stack_at(const void* address) const;  // of any thread

 private:
  struct Group {  // lanes that wait for a warp operation
    Group(unsigned mask, Execute execute) : mask(mask), execute(execute) {}
    unsigned mask, arrived = 0;
    Execute execute;
    void* lanes[kLanes];  // set for those that have arrived
  };

  static void fiber_main();
  void work();
  Fiber* idle_fiber();
  void resume_next_ready();
  void wait();
  void exited(Thread& thread);
  void release_barrier();
  void finish(Group& group, int warp);
  void arrive(Thread& thread, int groups_before);
  [[noreturn]] void deadlock();
  void settle();
  bool launch_is_over() const { return stop_.load(std::memory_order_relaxed); }
  int64_t ticks_left() const { return ticks_left_.load(std::memory_order_relaxed); }

  const std::atomic<bool>& stop_;
  std::atomic<int64_t> ticks_left_{0};
  ListenerList listeners_;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Fiber*> idle_;
  Fiber* fiber_ = nullptr;  // the running one
  void* caller_ = nullptr;  // the stack that called run()
  std::vector<Thread*> ready_;  // a queue, from next_ready_ on
  size_t next_ready_ = 0;
  size_t started_ = 0, live_ = 0, waiting_ = 0;
  Votes votes_{}, result_{};
  Access suspected_{};  // of no thread: none
  Error suspicion_;
  std::vector<unsigned> live_lanes_;        // by warp
  std::vector<std::vector<Group>> groups_;  // by warp
};

// The block that runs on this thread of the operating system, or null.
extern thread_local Block* running_block;

// In printf's words.
std::string text(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace nb_emulator
