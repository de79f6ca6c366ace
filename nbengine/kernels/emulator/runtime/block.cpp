#include "block.h"

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "signals.h"

namespace nb_emulator {

thread_local Block* running_block = nullptr;

namespace {
// Between launches. A fiber costs some system calls, and a block may need a thousand.
thread_local std::vector<std::unique_ptr<Fiber>> spare_fibers;

Error no_stack() {
  return {"out of memory", "got no stack from the system: too many threads at once, or limits on "
                           "memory or its mappings"};
}
}  // namespace

Block::Block(Grid& grid)
    : grid(grid), memory(grid.request), stop_(grid.stop), fibers_(std::move(spare_fibers)) {
  const LaunchRequest& request = grid.request;
  const unsigned *size = request.block, num_threads = size[0] * size[1] * size[2];
  threads.resize(num_threads);
  for (unsigned i = 0; i < num_threads; ++i) {
    threads[i].number = static_cast<int>(i);
    threads[i].index = {i % size[0], i / size[0] % size[1], i / size[0] / size[1]};
  }
  live_lanes_.resize((num_threads + kLanes - 1) / kLanes);
  groups_.resize(live_lanes_.size());
  for (auto& fiber : fibers_) idle_.push_back(fiber.get());
  if (request.listeners & kChecks) add_checks(listeners_);
  if (request.listeners & kCounters) add_counters(listeners_, grid);
  if (request.listeners & kTrace) add_trace(listeners_, grid);
}

Block::~Block() { spare_fibers = std::move(fibers_); }

void Block::run(uint64_t linear_block) {
  const unsigned* size = grid.request.grid;
  index.x = static_cast<unsigned>(linear_block % size[0]);
  index.y = static_cast<unsigned>(linear_block / size[0] % size[1]);
  index.z = static_cast<unsigned>(linear_block / size[0] / size[1]);
  started_ = waiting_ = 0;
  ticks_left_ = static_cast<int64_t>(grid.request.block_seconds * kTicksPerSecond);
  live_ = threads.size();
  votes_ = {};
  std::fill(live_lanes_.begin(), live_lanes_.end(), 0xffffffffu);
  if (live_ % kLanes != 0) live_lanes_.back() = (1u << live_ % kLanes) - 1;
  for (auto& listener : listeners_) listener->block_start(*this);

  fiber_ = idle_fiber();
  if (fiber_ == nullptr) return grid.fail(no_stack());
  running_block = this;
  nb_emulator_switch(&caller_, fiber_->saved);
  running_block = nullptr;
}

Fiber* Block::idle_fiber() {
  if (idle_.empty()) {
    auto made = Fiber::make(fiber_main);
    if (made == nullptr) return nullptr;
    fibers_.push_back(std::move(made));
    return fibers_.back().get();
  }
  Fiber* fiber = idle_.back();
  idle_.pop_back();
  return fiber;
}

bool Block::owns_stack_at(const void* address) const {
  for (const auto& fiber : fibers_) {
    if (fiber->holds(address)) return true;
  }
  return false;
}

// A fiber may outlive a Block: each time that it goes on, it looks for the one that runs.
void Block::fiber_main() {
  for (;;) running_block->work();
}

// What a fiber does that is not in the middle of a thread.
void Block::work() {
  Fiber* const me = fiber_;
  if (launch_is_over()) leave();
  if (next_ready_ < ready_.size()) {
    idle_.push_back(me);
    resume_next_ready();
    nb_emulator_switch(&me->saved, fiber_->saved);
  } else if (started_ < threads.size()) {
    Thread& thread = threads[started_++];
    thread.fiber = me;
    thread.state = Thread::kRunning;
    thread.committed_groups = 0;
    thread.copies.clear();
    current = &thread;
    grid.request.thread_main(grid.request.arguments);
    exited(thread);
  } else if (live_ > 0) {
    deadlock();
  } else {
    settle();
    for (auto& listener : listeners_) listener->block_end(*this);
    idle_.push_back(me);
    nb_emulator_switch(&me->saved, caller_);
  }
}

void Block::resume_next_ready() {
  current = ready_[next_ready_++];
  fiber_ = current->fiber;
  if (next_ready_ == ready_.size()) {
    ready_.clear();
    next_ready_ = 0;
  }
}

// Until someone puts the current thread among the ready ones.
void Block::wait() {
  Fiber* const me = fiber_;
  if (next_ready_ < ready_.size()) {
    resume_next_ready();
  } else if (started_ < threads.size()) {
    fiber_ = idle_fiber();
    if (fiber_ == nullptr) fail(*current, current->place, current->pc, no_stack());
  } else {
    deadlock();
  }
  nb_emulator_switch(&me->saved, fiber_->saved);
}

void Block::exited(Thread& thread) {
  arrive(thread, thread.committed_groups + 1);
  for (auto& listener : listeners_) listener->thread_end(*this, thread);
  thread.state = Thread::kExited;
  --live_;
  const int warp = thread.warp();
  live_lanes_[static_cast<size_t>(warp)] &= ~(1u << thread.lane());
  // Whoever waited for this thread alone goes on.
  auto& groups = groups_[static_cast<size_t>(warp)];
  for (size_t i = groups.size(); i-- > 0;) {
    if ((groups[i].mask & live_lanes(warp) & ~groups[i].arrived) != 0) continue;
    finish(groups[i], warp);
    groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(i));
  }
  if (live_ > 0 && waiting_ == live_) release_barrier();
}

Votes Block::barrier(bool vote, Place place, const void* pc) {
  check_in(pc);
  Thread& me = *current;
  me.name = "__syncthreads";
  me.place = place;
  me.pc = pc;
  me.state = Thread::kAtBarrier;
  votes_.threads += 1;
  votes_.yes += vote;
  if (++waiting_ == live_) {
    release_barrier();
  } else {
    wait();
  }
  return result_;
}

// The current thread, if it is one of those that wait, goes on at once.
void Block::release_barrier() {
  settle();
  for (auto& listener : listeners_) listener->barrier(*this);
  result_ = votes_;
  votes_ = {};
  waiting_ = 0;
  for (Thread& thread : threads) {
    if (thread.state != Thread::kAtBarrier) continue;
    thread.state = Thread::kRunning;
    if (&thread != current) ready_.push_back(&thread);
  }
}

void Block::warp_together(unsigned mask, void* arguments, Execute execute, const char* name,
                          Place place, const void* pc) {
  check_in(pc);
  Thread& me = *current;
  const unsigned bit = 1u << me.lane();
  me.name = name;
  me.place = place;
  me.pc = pc;
  me.mask = mask;
  if ((mask & bit) == 0) {
    fail(me, place, pc, {"wrong mask", text("lane %d calls %s with mask 0x%08x, and is not in it",
                                            me.lane(), name, mask)});
  }
  me.state = Thread::kAtWarpOperation;
  auto& groups = groups_[static_cast<size_t>(me.warp())];
  auto group = groups.begin();
  while (group != groups.end() && (group->mask != mask || group->execute != execute)) ++group;
  if (group == groups.end()) {
    groups.emplace_back(mask, execute);
    group = groups.end() - 1;
  }
  group->lanes[me.lane()] = arguments;
  group->arrived |= bit;
  if ((mask & live_lanes(me.warp()) & ~group->arrived) == 0) {
    finish(*group, me.warp());
    groups.erase(group);
  } else {
    wait();
  }
}

// The current thread, if it is one of the group's, goes on at once.
void Block::finish(Group& group, int warp) {
  if (group.execute != nullptr) {
    for (unsigned absent = ~group.arrived; absent != 0; absent &= absent - 1) {
      group.lanes[__builtin_ctz(absent)] = nullptr;
    }
    executing_warp = warp;
    group.execute(group.lanes);
    executing_warp = -1;
  }
  const bool orders_memory = group.execute == nullptr;
  for (auto& listener : listeners_) {
    listener->warp_operation(*this, warp, group.arrived, orders_memory);
  }
  for (unsigned lanes = group.arrived; lanes != 0; lanes &= lanes - 1) {
    Thread& thread = lane_of(warp, __builtin_ctz(lanes));
    thread.state = Thread::kRunning;
    if (&thread != current) ready_.push_back(&thread);
  }
}

void Block::async_copy(void* target, const void* source, size_t bytes, size_t source_bytes,
                       const void* pc) {
  check_in(pc);
  Thread& me = *current;
  const size_t odd = reinterpret_cast<uintptr_t>(target) |
                     (source_bytes != 0 ? reinterpret_cast<uintptr_t>(source) : 0);
  if (bytes > sizeof(AsyncCopy::data) || source_bytes > bytes || odd % bytes != 0) {
    fail(me, {}, pc, {"misaligned", text("cp.async moves 4, 8 or 16 bytes between addresses that are "
                                         "multiples of that; here %zu", bytes)});
  }
  if (source_bytes != 0) access(&me, source, source_bytes, Access::kRead, pc);
  access(&me, target, bytes, Access::kCopyIssue, pc);
  me.copies.push_back({static_cast<char*>(target), bytes, {}, me.committed_groups, pc});
  std::memcpy(me.copies.back().data, source, source_bytes);
}

void Block::async_wait(int groups_in_flight) {
  arrive(*current, current->committed_groups - groups_in_flight);
}

void Block::arrive(Thread& thread, int groups_before) {
  size_t kept = 0;
  for (const AsyncCopy& copy : thread.copies) {
    if (copy.group < groups_before) {
      access(&thread, copy.target, copy.bytes, Access::kCopyArrival, copy.pc);
      std::memcpy(copy.target, copy.data, copy.bytes);
    } else {
      thread.copies[kept++] = copy;
    }
  }
  thread.copies.resize(kept);
}

void Block::fence() {
  for (auto& listener : listeners_) listener->fence(*this, *current);
}

void Block::access(Thread* thread, const void* address, size_t bytes, Access::Kind kind,
                   const void* pc) {
  if (listeners_.empty()) return;
  Access access{thread, static_cast<const char*>(address), bytes, kind, pc};
  memory.locate(access);
  for (auto& listener : listeners_) listener->access(*this, access);
}

// Nobody is ready and all have started, so those that wait do so for ever. Threads at the barrier
// alone would have passed it: some lane waits for its warp.
void Block::deadlock() {
  const Thread* waits = &threads[0];
  while (waits->state != Thread::kAtWarpOperation) ++waits;
  const Thread* missing = nullptr;
  for (unsigned lanes = waits->mask & live_lanes(waits->warp()); lanes != 0; lanes &= lanes - 1) {
    const Thread& other = lane_of(waits->warp(), __builtin_ctz(lanes));
    const bool here = other.state == waits->state && other.mask == waits->mask &&
                      other.name == waits->name;
    if (!here) missing = &other;
  }
  std::string where = "does not";
  if (missing != nullptr) {
    where = text("%d waits for ever in %s, line %d", missing->lane(), missing->name,
                 missing->place.line);
    if (missing->state == Thread::kAtWarpOperation) where += text(", mask 0x%08x", missing->mask);
  }
  fail(*waits, waits->place, waits->pc,
       {"divergence", text("%s with mask 0x%08x needs all lanes of the mask, but lane %s",
                           waits->name, waits->mask, where.c_str())});
}

void Block::suspect(const Access& access, Error error) {
  if (suspected_.thread != nullptr) return;
  suspected_ = access;
  suspicion_ = std::move(error);
}

void Block::settle() {
  if (suspected_.thread != nullptr) fail(*suspected_.thread, {}, suspected_.pc, suspicion_);
}

void Block::fail(const Thread& thread, Place place, const void* pc, Error error) {
  if (suspected_.thread != nullptr && error.kind != "race") {
    const Access access = suspected_;
    suspected_.thread = nullptr;
    fail(*access.thread, {}, access.pc, suspicion_);
  }
  error.file = place.file != nullptr ? place.file : "";
  error.line = place.line;
  error.pc = pc;
  error.block = index;
  error.thread = thread.index;
  grid.fail(std::move(error));
  leave();
}

void Block::overflowed(const void* pc) {
  fail(*current, {}, pc,
       {"stack overflow", text("needs more than %zu KiB for its local variables and calls",
                               (Fiber::kStackBytes - Fiber::kReserveBytes) >> 10)});
}

void Block::stop(const void* pc) {
  if (ticks_left() > 0) leave();
  fail(*current, {}, pc,
       {"timeout", text("has not ended when its block had used %g s of a processor: does its loop "
                        "end? (A loop that waits for another thread's write needs a barrier in it, "
                        "where threads take turns. Work that is only slow wants more blocks.)",
                        grid.request.block_seconds)});
}

bool Block::tick(int ticks, const void* pc) {
  const bool was_asked = stopping();  // a tick ago, or by another thread
  ticks_left_.store(ticks_left() - ticks, std::memory_order_relaxed);
  return was_asked && memory.is_code(pc);
}

// Of the running fiber, too, only the outermost frame is written over.
void Block::leave() {
  ready_.clear();
  next_ready_ = 0;
  for (auto& groups : groups_) groups.clear();
  executing_warp = -1;
  idle_.clear();
  for (auto& fiber : fibers_) {
    fiber->reset();
    idle_.push_back(fiber.get());
  }
  void* forgotten;
  nb_emulator_switch(&forgotten, caller_);
  __builtin_unreachable();
}

std::string text(const char* format, ...) {
  char written[1024];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(written, sizeof written, format, arguments);
  va_end(arguments);
  return written;
}

}  // namespace nb_emulator
