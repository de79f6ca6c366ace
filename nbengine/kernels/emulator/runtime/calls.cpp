// The functions of nb_emulator_runtime.h: what compiled kernels call, handed to the running block.

#include <chrono>
#include <cstdarg>
#include <cstdio>

#include "block.h"

namespace nb_emulator {

Index thread_index() noexcept { return running_block->current->index; }
Index block_index() noexcept { return running_block->index; }
Index block_size() noexcept {
  const unsigned* size = running_block->grid.request.block;
  return {size[0], size[1], size[2]};
}
Index grid_size() noexcept {
  const unsigned* size = running_block->grid.request.grid;
  return {size[0], size[1], size[2]};
}
unsigned lane() noexcept { return static_cast<unsigned>(running_block->current->lane()); }

Votes block_barrier(bool vote, Place place) {
  return running_block->barrier(vote, place, __builtin_return_address(0));
}

void warp_together(unsigned mask, void* arguments, Execute execute, const char* name, Place place) {
  running_block->warp_together(mask, arguments, execute, name, place, __builtin_return_address(0));
}

void blame_lane(int lane, const char* kind, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Thread* thread = running_block->lane_of(running_block->blamed_warp->warp(), lane);
  running_block->fail(thread, kind, thread->place, thread->pc, "%s", text);
}

void blame(const char* kind, Place place, const char* format, ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  running_block->fail(running_block->current, kind, place, nullptr, "%s", text);
}

void lane_reads(int lane, const void* address, size_t bytes) {
  Block& block = *running_block;
  Thread* thread = block.lane_of(block.blamed_warp->warp(), lane);
  block.access(thread, address, bytes, Access::kRead, thread->pc);
}

void lane_writes(int lane, void* address, size_t bytes) {
  Block& block = *running_block;
  Thread* thread = block.lane_of(block.blamed_warp->warp(), lane);
  block.access(thread, address, bytes, Access::kWrite, thread->pc);
}

void async_copy(void* target, const void* source, size_t bytes, size_t source_bytes) {
  running_block->async_copy(target, source, bytes, source_bytes, __builtin_return_address(0));
}
void async_commit() { running_block->async_commit(); }
void async_wait(int groups_in_flight) {
  running_block->async_wait(groups_in_flight, __builtin_return_address(0));
}

long long nanoseconds() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

int print(const char* format, ...) {
  char text[4096];
  va_list arguments;
  va_start(arguments, format);
  const int length = std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Grid& grid = running_block->grid;
  const std::lock_guard lock(grid.mutex);
  grid.printed += text;
  return length;
}

}  // namespace nb_emulator
