// A launch: its grid, the memory it may touch, its first error, and what it printed.

#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "../include/nb_emulator_runtime.h"

namespace nb_emulator {

// A tensor's memory that the kernel may touch.
struct Buffer {
  const char* begin;
  uint64_t bytes;
};

// A variable of shared memory, so far from the anchor in the kernel library's thread-local data. The
// compiler's guards, which tell whether a variable was initialised, lie there too, and come last.
struct SharedVariable {
  int64_t from_anchor;
  uint64_t bytes;
  uint64_t is_guard;
};

enum Listeners : uint32_t { kChecks = 1, kCounters = 2, kTrace = 4 };

// What Python asks for, in the layout of `_Launch` there.
struct LaunchRequest {
  void (*thread_main)(const void* arguments);
  const void* arguments;
  char* (*shared_anchor)();
  unsigned grid[3];
  unsigned block[3];
  const Buffer* buffers;
  uint64_t num_buffers;
  const SharedVariable* variables;
  uint64_t num_variables;
  uint32_t num_os_threads;
  uint32_t listeners;      // of the enum
  unsigned traced_block[3];
  uint32_t knows_memory;      // whether all that the kernel may touch is in `buffers`
  uint32_t is_interruptible;  // by SIGINT, which Python hears on its main thread
  double block_seconds;       // of a processor, that a block may take
};

// What ended a launch. `message` may hold {address} and {other}, which Python puts into words.
struct Error {
  std::string kind{}, message{}, file{};
  int line = 0;
  const void* pc = nullptr;  // says more than file and line, where its own are known
  Index block{}, thread{};
  const char* address = nullptr;
  int variable = -1;  // of shared memory, where the address is in or near one, and how far from its start
  int64_t offset = 0;
  const void* other_pc = nullptr;
  Index other_thread{};
};

// Sums over the launch; see `Counters` in Python for what each means.
struct Counts {
  uint64_t global_reads, global_writes, sectors_read, sectors_written;
  uint64_t shared_accesses, bank_conflicts, divergent, barriers, warp_operations;
};

// One entry of a recording, in the layout of `TRACE` in Python.
struct Recorded {
  uint32_t thread;
  uint32_t event;      // an Access::Kind; 8 for a barrier, 9 for a warp operation
  int32_t space;       // an Access::Space
  int32_t buffer;
  uint64_t offset;
  uint32_t bytes;
  uint32_t epoch;      // barriers before it
  uint64_t pc;         // from the kernel library's start
};

struct Grid {
  Grid(const LaunchRequest& request, std::atomic<bool>& stop) : request(request), stop(stop) {}

  // The first error is kept.
  void fail(Error given) {
    const std::lock_guard lock(mutex);
    if (!failed) error = std::move(given);
    failed = stop = true;
  }

  const LaunchRequest& request;
  std::atomic<bool>& stop;  // asks all blocks to leave
  std::atomic<uint64_t> next_block{0};
  std::mutex mutex;  // of what follows
  bool failed = false;
  Error error;
  std::string printed;
  Counts counts{};
  std::vector<Recorded> recorded;
};

// Where the library that holds this code or data starts; null for other memory.
const char* library_of(const void* address);

}  // namespace nb_emulator
