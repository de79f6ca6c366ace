// A launch: its grid, the memory it may touch, its first error, and what it printed.

#pragma once

#include <atomic>
#include <cstdint>
#include <mutex>
#include <string>
#include <vector>

#include "events.h"

namespace nb_emulator {

struct Error {
  std::string kind, message, file;
  int line = 0;
  const void* pc = nullptr;
  Index block{}, thread{};
  int buffer = -1;  // of the launch, or -2 - n for the kernel's shared variable n
  int64_t offset = 0;
};

// A tensor's memory that the kernel may touch.
struct Buffer {
  const char* begin;
  size_t bytes;
};

// A variable of shared memory: at `offset` into the kernel library's thread-local data.
struct SharedVariable {
  size_t offset;
  size_t bytes;
};

// What Python gives, in the layout of `_Launch` there.
struct LaunchRequest {
  void (*thread_main)(const void* arguments);
  const void* arguments;
  char* (*shared_anchor)();  // an address in the kernel library's thread-local data
  char* (*dynamic_shared)();
  unsigned grid[3];
  unsigned block[3];
  uint64_t shared_bytes;
  const Buffer* buffers;
  uint64_t num_buffers;
  const SharedVariable* variables;
  uint64_t num_variables;
  uint32_t num_os_threads;
  uint32_t listeners;  // bits of kChecks, kCounters, kTrace
};

enum : uint32_t { kChecks = 1, kCounters = 2, kTrace = 4 };

struct Grid {
  explicit Grid(const LaunchRequest& request) : request(request) {}

  void fail(Error error);

  const LaunchRequest& request;
  std::atomic<uint64_t> next_block{0};
  std::atomic<bool> failed{false};
  std::mutex mutex;
  Error error;
  std::string printed;
};

}  // namespace nb_emulator
