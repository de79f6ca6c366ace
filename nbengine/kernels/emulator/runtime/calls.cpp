// The functions of nb_emulator_runtime.h: what compiled kernels call, handed to the running block.

#include <chrono>
#include <cstdarg>
#include <cstdio>

#include "block.h"

namespace nb_emulator {

namespace {
Index three(const unsigned* size) { return {size[0], size[1], size[2]}; }

std::string formatted(const char* format, va_list arguments) {
  char written[4096];
  std::vsnprintf(written, sizeof written, format, arguments);
  return written;
}
}  // namespace

Index thread_index() noexcept { return running_block->current->index; }
Index block_index() noexcept { return running_block->index; }
Index block_size() noexcept { return three(running_block->grid.request.block); }
Index grid_size() noexcept { return three(running_block->grid.request.grid); }
unsigned lane() noexcept { return static_cast<unsigned>(running_block->current->lane()); }

Votes block_barrier(bool vote, Place place) {
  return running_block->barrier(vote, place, __builtin_return_address(0));
}

void warp_together(unsigned mask, void* arguments, Execute execute, const char* name, Place place) {
  running_block->warp_together(mask, arguments, execute, name, place, __builtin_return_address(0));
}

void blame_lane(int lane, const char* kind, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  Error error{kind, formatted(format, arguments)};
  va_end(arguments);
  const Thread& thread = running_block->lane_of(running_block->executing_warp, lane);
  running_block->fail(thread, thread.place, thread.pc, std::move(error));
}

void blame(const char* kind, Place place, const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  Error error{kind, formatted(format, arguments)};
  va_end(arguments);
  running_block->fail(*running_block->current, place, nullptr, std::move(error));
}

void lane_reads(int lane, const void* address, size_t bytes) {
  Thread& thread = running_block->lane_of(running_block->executing_warp, lane);
  running_block->access(&thread, address, bytes, Access::kRead, thread.pc);
}

void lane_writes(int lane, void* address, size_t bytes) {
  Thread& thread = running_block->lane_of(running_block->executing_warp, lane);
  running_block->access(&thread, address, bytes, Access::kWrite, thread.pc);
}

void async_copy(void* target, const void* source, size_t bytes, size_t source_bytes) {
  running_block->async_copy(target, source, bytes, source_bytes, __builtin_return_address(0));
}
void async_commit() { running_block->async_commit(); }
void async_wait(int groups_in_flight) { running_block->async_wait(groups_in_flight); }

long long nanoseconds() { return std::chrono::steady_clock::now().time_since_epoch().count(); }

int nb_printf(const char* format, ...) {
  running_block->check_in();
  va_list arguments;
  va_start(arguments, format);
  const std::string written = formatted(format, arguments);
  va_end(arguments);
  Grid& grid = running_block->grid;
  const std::lock_guard lock(grid.mutex);
  grid.printed += written;
  return static_cast<int>(written.size());
}

}  // namespace nb_emulator
