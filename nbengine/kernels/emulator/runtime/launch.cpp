// Spreads the blocks of a grid over threads of the operating system, and answers Python.

#include "launch.h"

#include <unistd.h>

#include <algorithm>
#include <condition_variable>
#include <system_error>
#include <thread>

#include "block.h"
#include "signals.h"

namespace nb_emulator {

namespace {

void run_blocks(Grid& grid) {
  const unsigned* size = grid.request.grid;
  const uint64_t blocks = static_cast<uint64_t>(size[0]) * size[1] * size[2];
  catch_overflows();
  Block block(grid);
  const Ticks ticks;
  for (;;) {
    const uint64_t at = grid.next_block++;
    if (at >= blocks || grid.stop.load(std::memory_order_relaxed)) return;
    block.run(at);
  }
}

// Threads that wait for launches to help with. They end with the process. Each keeps the stacks of its
// fibers, so a launch whose blocks need many wakes the same few again.
class Helpers {
 public:
  // Runs the grid on the calling thread and up to `wanted` helpers. A second launch at the same time
  // runs on its caller alone.
  void run(Grid& grid, unsigned wanted) {
    const std::unique_lock launch(launch_, std::try_to_lock);
    if (!launch.owns_lock() || wanted == 0) return run_blocks(grid);
    {
      const std::lock_guard lock(mutex_);
      start(wanted);
      grid_ = &grid;
      wanted_ = wanted;
      ++launches_;
    }
    changed_.notify_all();
    run_blocks(grid);
    std::unique_lock lock(mutex_);
    wanted_ = 0;
    changed_.wait(lock, [&] { return busy_ == 0; });
  }

 private:
  // Fewer helpers will do where the system gives no more.
  void start(unsigned wanted) try {
    for (; started_ < wanted; ++started_) std::thread(&Helpers::help, this, started_).detach();
  } catch (const std::system_error&) {
  }

  void help(unsigned number) {
    uint64_t helped_with = 0;
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return number < wanted_ && helped_with != launches_; });
      helped_with = launches_;
      ++busy_;
      Grid& grid = *grid_;
      lock.unlock();
      run_blocks(grid);
      lock.lock();
      --busy_;
      changed_.notify_all();
    }
  }

  std::mutex launch_, mutex_;
  std::condition_variable changed_;
  Grid* grid_ = nullptr;
  unsigned started_ = 0, wanted_ = 0, busy_ = 0;
  uint64_t launches_ = 0;
};

// A forked process has none of its parent's threads, so it gets helpers of its own.
Helpers& helpers() {
  static std::mutex mutex;
  static Helpers* found = nullptr;
  static pid_t owner = 0;
  const std::lock_guard lock(mutex);
  if (owner != getpid()) {
    owner = getpid();
    found = new Helpers;
  }
  return *found;
}

}  // namespace

}  // namespace nb_emulator

using namespace nb_emulator;

// What Python reads of a launch, in the layout of `_Result` there. It lives as long as the Grid.
struct Result {
  const char *kind, *message, *file;  // kind is null where all went well
  int64_t line;
  const char* address;
  int64_t variable, offset, pc, other_pc;  // pcs from the kernel library's start, 0 for none
  unsigned block[3], thread[3], other_thread[3];
  const char* printed;
  Counts counts;
  const Recorded* recorded;
  uint64_t num_recorded;
};

// Linux lets a process have 65,530 mappings, and a fiber takes two. With so many at once, helpers that
// keep those of other launches stay below that: 8 of 1,024 fibers, 16 of 512, ...
constexpr uint64_t kMostFibers = 8192;

extern "C" Grid* nb_emulator_launch(const LaunchRequest* request, Result* result) {
  const unsigned *size = request->grid, *block = request->block;
  const uint64_t blocks = static_cast<uint64_t>(size[0]) * size[1] * size[2];
  const uint64_t at_once = kMostFibers / (static_cast<uint64_t>(block[0]) * block[1] * block[2]);
  const uint64_t threads = std::min({uint64_t{request->num_os_threads}, blocks, at_once});
  std::atomic<bool> stop{false};
  const Interruption interruption(request->is_interruptible);
  auto* grid = new Grid(*request, interruption.wanted() ? interruption.stop() : stop);
  helpers().run(*grid, static_cast<unsigned>(threads - 1));
  if (grid->stop && !grid->failed) {
    delete grid;
    result->kind = "interrupted";
    return nullptr;
  }

  const char* library = library_of(reinterpret_cast<void*>(request->thread_main));
  const auto in_library = [&](const void* pc) {
    return pc != nullptr ? static_cast<const char*>(pc) - library : 0;
  };
  const auto copy = [](const Index& from, unsigned* to) {
    to[0] = from.x;
    to[1] = from.y;
    to[2] = from.z;
  };
  const Error& error = grid->error;
  result->kind = grid->failed ? error.kind.c_str() : nullptr;
  result->message = error.message.c_str();
  result->file = error.file.c_str();
  result->line = error.line;
  result->address = error.address;
  result->variable = error.variable;
  result->offset = error.offset;
  result->pc = in_library(error.pc);
  result->other_pc = in_library(error.other_pc);
  copy(error.block, result->block);
  copy(error.thread, result->thread);
  copy(error.other_thread, result->other_thread);
  result->printed = grid->printed.c_str();
  result->counts = grid->counts;
  result->recorded = grid->recorded.data();
  result->num_recorded = grid->recorded.size();
  return grid;
}

extern "C" void nb_emulator_free(Grid* grid) { delete grid; }
