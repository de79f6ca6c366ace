// Spreads the blocks of a grid over threads of the operating system, and answers Python.

#include "launch.h"

#include <condition_variable>
#include <cstring>
#include <functional>
#include <memory>
#include <thread>

#include "block.h"

namespace nb_emulator {

void Grid::fail(Error given) {
  const std::lock_guard lock(mutex);
  if (failed.exchange(true)) return;
  error = std::move(given);
}

namespace {

void run_blocks(Grid& grid) {
  const unsigned* size = grid.request.grid;
  const uint64_t blocks = static_cast<uint64_t>(size[0]) * size[1] * size[2];
  Block block(grid);
  for (;;) {
    const uint64_t at = grid.next_block++;
    if (at >= blocks || grid.failed.load(std::memory_order_relaxed)) return;
    block.run(at);
  }
}

}  // namespace

}  // namespace nb_emulator

using namespace nb_emulator;

// What Python reads of a launch, in the layout of `_Result` there. It lives as long as the Grid.
struct Result {
  uint32_t failed;
  int32_t line, buffer;
  int64_t offset;
  const char *kind, *message, *file, *printed;
  const void* pc;
  unsigned block[3], thread[3];
};

extern "C" Grid* nb_emulator_launch(const LaunchRequest* request, Result* result) {
  auto* grid = new Grid(*request);
  std::vector<std::thread> helpers;
  const uint64_t blocks =
      static_cast<uint64_t>(request->grid[0]) * request->grid[1] * request->grid[2];
  for (uint64_t i = 1; i < request->num_os_threads && i < blocks; ++i) {
    helpers.emplace_back(run_blocks, std::ref(*grid));
  }
  run_blocks(*grid);
  for (std::thread& helper : helpers) helper.join();

  const Error& error = grid->error;
  *result = {grid->failed,
             error.line,
             error.buffer,
             error.offset,
             error.kind.c_str(),
             error.message.c_str(),
             error.file.c_str(),
             grid->printed.c_str(),
             error.pc,
             {error.block.x, error.block.y, error.block.z},
             {error.thread.x, error.thread.y, error.thread.z}};
  return grid;
}

extern "C" void nb_emulator_free(Grid* grid) { delete grid; }
