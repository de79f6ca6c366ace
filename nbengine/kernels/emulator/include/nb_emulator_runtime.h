// What a compiled kernel calls of the emulator's runtime library, which is compiled once for all.
//
// The wrappers of device code (nb_emulator_warp.h, nb_emulator_mma.h, ...) are written with these few
// functions: an index, a barrier, an operation of a warp's lanes together, and an announced access.

#pragma once

#include <cstddef>
#include <cstdint>

namespace nb_emulator {

struct Index {
  unsigned x, y, z;
};

// Fixed for a thread's life, so that the compiler may keep them over a barrier.
Index thread_index() noexcept __attribute__((const));
Index block_index() noexcept __attribute__((const));
Index block_size() noexcept __attribute__((const));
Index grid_size() noexcept __attribute__((const));
unsigned lane() noexcept __attribute__((const));

// Where in the source a thread waits.
struct Place {
  const char* file;
  int line;
};

// Every thread of the block that has not exited; returns how many there were, and how many of them
// gave true.
struct Votes {
  unsigned threads, yes;
};
Votes block_barrier(bool vote, Place place);

// An operation of the lanes in `mask` together: each gives the address of its arguments, the last
// to arrive executes for all of them (`lanes[i]` is null for one that does not take part), and each
// finds its result where its arguments are. Lanes that have exited are not waited for, as on a GPU.
// Two calls belong together when mask and `execute` are the same.
using Execute = void (*)(void* const* lanes);
void warp_together(unsigned mask, void* arguments, Execute execute, const char* name, Place place);

// Ends the launch with an error that blames `lane` of this warp, from inside an `execute`.
[[noreturn]] void blame_lane(int lane, const char* kind, const char* format, ...)
    __attribute__((format(printf, 3, 4)));
// The same for the calling thread.
[[noreturn]] void blame(const char* kind, Place place, const char* format, ...)
    __attribute__((format(printf, 3, 4)));

// Accesses that the compiler does not announce by itself: those of an `execute`, for one lane.
void lane_reads(int lane, const void* address, size_t bytes);
void lane_writes(int lane, void* address, size_t bytes);

// cp.async of the calling thread. The source is read at the issue, the target is written when the
// wait (or the thread's end) says that it must have arrived.
void async_copy(void* target, const void* source, size_t bytes, size_t source_bytes);
void async_commit();
void async_wait(int groups_in_flight);

// What clock64() counts.
long long nanoseconds();

// printf of device code, handed to Python when the launch is over.
int nb_printf(const char* format, ...) __attribute__((format(printf, 1, 2)));

}  // namespace nb_emulator
