#include "block.h"

#include <cstdio>
#include <cstring>

namespace nb_emulator {

thread_local Block* running_block = nullptr;

Block::Block(Grid& grid) : grid(grid) {
  const unsigned* size = grid.request.block;
  threads.resize(static_cast<size_t>(size[0]) * size[1] * size[2]);
  groups_.resize(static_cast<size_t>(warps()));
  for (size_t i = 0; i < threads.size(); ++i) {
    const auto number = static_cast<unsigned>(i);
    threads[i].number = static_cast<int>(i);
    threads[i].index = {number % size[0], number / size[0] % size[1], number / size[0] / size[1]};
  }
}

Block::~Block() = default;

void Block::run(uint64_t linear_block) {
  const unsigned* size = grid.request.grid;
  index.x = static_cast<unsigned>(linear_block % size[0]);
  index.y = static_cast<unsigned>(linear_block / size[0] % size[1]);
  index.z = static_cast<unsigned>(linear_block / size[0] / size[1]);
  for (Thread& thread : threads) {
    thread.state = Thread::kNew;
    thread.groups = 0;
    thread.copies.clear();
  }
  started_ = waiting_ = 0;
  live_ = threads.size();
  votes_ = {};
  for (auto& listener : listeners) listener->block_start(*this);

  running_block = this;
  fiber_ = idle_fiber();
  nb_emulator_switch(&caller_, fiber_->saved);
  running_block = nullptr;
  if (!grid.failed.load(std::memory_order_relaxed)) {
    for (auto& listener : listeners) listener->block_end(*this);
  }
}

Fiber* Block::idle_fiber() {
  if (idle_.empty()) {
    fibers_.push_back(std::make_unique<Fiber>(fiber_main));
    return fibers_.back().get();
  }
  Fiber* fiber = idle_.back();
  idle_.pop_back();
  return fiber;
}

void Block::fiber_main() { running_block->work(); }

// Every fiber runs this: it starts threads of the block as long as nobody who waited can go on.
void Block::work() {
  Fiber* const me = fiber_;
  for (;;) {
    if (!ready_.empty()) {
      current = ready_.front();
      ready_.pop_front();
      idle_.push_back(me);
      fiber_ = current->fiber;
      nb_emulator_switch(&me->saved, fiber_->saved);
    } else if (started_ < threads.size()) {
      Thread& thread = threads[started_++];
      thread.fiber = me;
      thread.state = Thread::kRunning;
      current = &thread;
      grid.request.thread_main(grid.request.arguments);
      exited(thread);
    } else if (live_ == 0) {
      idle_.push_back(me);
      nb_emulator_switch(&me->saved, caller_);
    } else {
      deadlock();
    }
  }
}

// Until someone puts the current thread among the ready ones.
void Block::wait() {
  Fiber* const me = fiber_;
  if (!ready_.empty()) {
    current = ready_.front();
    ready_.pop_front();
    fiber_ = current->fiber;
  } else if (started_ < threads.size()) {
    fiber_ = idle_fiber();
  } else {
    deadlock();
  }
  nb_emulator_switch(&me->saved, fiber_->saved);
}

void Block::exited(Thread& thread) {
  if (!thread.copies.empty()) arrive(thread, 0, nullptr);
  thread.state = Thread::kExited;
  --live_;
  auto& groups = groups_[static_cast<size_t>(thread.warp())];
  if (!groups.empty()) {
    const unsigned live = live_lanes(thread.warp());
    for (size_t i = 0; i < groups.size();) {
      if ((groups[i].mask & live & ~groups[i].arrived) == 0) {
        Group group = groups[i];
        groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(i));
        finish(group, thread.warp());
      } else {
        ++i;
      }
    }
  }
  if (live_ > 0 && waiting_ == live_) release_barrier();
}

unsigned Block::live_lanes(int warp) {
  unsigned live = 0;
  for (int lane = 0; lane < kLanes; ++lane) {
    const Thread* thread = lane_of(warp, lane);
    if (thread != nullptr && thread->state != Thread::kExited) live |= 1u << lane;
  }
  return live;
}

Votes Block::barrier(bool vote, Place place, const void* pc) {
  Thread& me = *current;
  me.vote = vote;
  me.place = place;
  me.pc = pc;
  me.waits_for = "__syncthreads";
  votes_.threads += 1;
  votes_.yes += vote;
  me.state = Thread::kAtBarrier;
  if (++waiting_ == live_) {
    release_barrier();
    // The last to arrive goes on at once: it was put at the end of the ready ones.
    ready_.pop_back();
    me.state = Thread::kRunning;
  } else {
    wait();
  }
  return result_;
}

void Block::release_barrier() {
  result_ = votes_;
  votes_ = {};
  waiting_ = 0;
  Thread* last = nullptr;
  for (Thread& thread : threads) {
    if (thread.state != Thread::kAtBarrier) continue;
    thread.state = Thread::kRunning;
    if (&thread == current) {
      last = &thread;
    } else {
      ready_.push_back(&thread);
    }
  }
  if (last != nullptr) ready_.push_back(last);
  for (auto& listener : listeners) listener->barrier(*this);
}

void Block::warp_together(unsigned mask, void* arguments, Execute execute, const char* name,
                          Place place, const void* pc) {
  Thread& me = *current;
  const int warp = me.warp();
  me.place = place;
  me.pc = pc;
  me.waits_for = name;
  me.mask = mask;
  if ((mask >> me.lane() & 1u) == 0) {
    fail(&me, "wrong mask", place, pc, "%s with mask 0x%08x is called by lane %d, which is not in it",
         name, mask, me.lane());
  }
  auto& groups = groups_[static_cast<size_t>(warp)];
  size_t at = 0;
  while (at < groups.size() && (groups[at].mask != mask || groups[at].execute != execute)) ++at;
  if (at == groups.size()) {
    groups.emplace_back();
    groups[at].mask = mask;
    groups[at].execute = execute;
    groups[at].name = name;
  }
  groups[at].lanes[me.lane()] = arguments;
  groups[at].arrived |= 1u << me.lane();
  me.state = Thread::kAtWarpOperation;
  if ((mask & live_lanes(warp) & ~groups[at].arrived) == 0) {
    Group group = groups[at];
    groups.erase(groups.begin() + static_cast<std::ptrdiff_t>(at));
    finish(group, warp);
  } else {
    wait();
  }
}

// All lanes of the group are there. The current thread, if it is one of them, goes on at once.
void Block::finish(Group& group, int warp) {
  if (group.execute != nullptr) {
    blamed_warp = lane_of(warp, 0);
    ++muted;
    group.execute(group.lanes);
    --muted;
  }
  for (auto& listener : listeners) {
    listener->warp_operation(*this, warp, group.arrived, group.name);
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    if ((group.arrived >> lane & 1u) == 0) continue;
    Thread* thread = lane_of(warp, lane);
    thread->state = Thread::kRunning;
    if (thread != current) ready_.push_back(thread);
  }
}

void Block::async_copy(void* target, const void* source, size_t bytes, size_t source_bytes,
                       const void* pc) {
  Thread& me = *current;
  if (bytes > sizeof(AsyncCopy::data) || source_bytes > bytes) {
    fail(&me, "bad argument", {}, pc, "cp.async moves up to 16 bytes, not %zu of %zu", source_bytes,
         bytes);
  }
  if (reinterpret_cast<uintptr_t>(target) % bytes != 0 ||
      (source_bytes != 0 && reinterpret_cast<uintptr_t>(source) % bytes != 0)) {
    fail(&me, "misaligned", {}, pc, "cp.async of %zu bytes between addresses that are no multiples of it",
         bytes);
  }
  if (source_bytes != 0) access(&me, source, source_bytes, Access::kRead, pc);
  access(&me, target, bytes, Access::kCopyIssue, pc);
  AsyncCopy copy{static_cast<char*>(target), bytes, {}, me.groups, pc};
  std::memcpy(copy.data, source, source_bytes);
  me.copies.push_back(copy);
}

void Block::async_commit() { ++current->groups; }

void Block::async_wait(int groups_in_flight, const void* pc) {
  arrive(*current, static_cast<size_t>(groups_in_flight), pc);
}

// All copies of the thread but those of its latest `keep_groups` groups. Copies that no commit has
// closed into a group yet are not waited for.
void Block::arrive(Thread& thread, size_t keep_groups, const void* pc) {
  const bool exits = pc == nullptr;
  size_t kept = 0;
  for (AsyncCopy& copy : thread.copies) {
    if (exits || copy.group + static_cast<int>(keep_groups) < thread.groups) {
      access(&thread, copy.target, copy.bytes, Access::kCopyArrival, copy.pc);
      std::memcpy(copy.target, copy.data, copy.bytes);
    } else {
      thread.copies[kept++] = copy;
    }
  }
  thread.copies.resize(kept);
}

void Block::access(Thread* thread, const void* address, size_t bytes, Access::Kind kind,
                   const void* pc) {
  if (listeners.empty()) return;
  Access access{thread, static_cast<const char*>(address), bytes, kind, pc};
  for (auto& listener : listeners) listener->access(*this, access);
}

// Nobody is ready and all have started: whoever waits now waits for ever.
void Block::deadlock() {
  const Thread* here = nullptr;  // a thread that waits for the warp or, if there is none, the block
  const Thread* there = nullptr;
  for (const Thread& thread : threads) {
    if (thread.state == Thread::kAtWarpOperation && here == nullptr) here = &thread;
  }
  if (here != nullptr) {
    const unsigned missing =
        here->mask & live_lanes(here->warp());
    for (int lane = 0; lane < kLanes && there == nullptr; ++lane) {
      const Thread* other = lane_of(here->warp(), lane);
      if ((missing >> lane & 1u) == 0 || other == here) continue;
      if (other->state != here->state || other->waits_for != here->waits_for ||
          other->mask != here->mask) {
        there = other;
      }
    }
    if (there != nullptr && there->state == Thread::kAtWarpOperation) {
      fail(const_cast<Thread*>(here), "divergent warp operation", here->place, here->pc,
           "%s with mask 0x%08x waits for lane %d for ever, which waits at %s with mask 0x%08x, "
           "line %d",
           here->waits_for, here->mask, there->lane(), there->waits_for, there->mask,
           there->place.line);
    }
    fail(const_cast<Thread*>(here), "divergent warp operation", here->place, here->pc,
         "%s with mask 0x%08x waits for lane %d for ever, which waits at %s, line %d",
         here->waits_for, here->mask, there ? there->lane() : -1,
         there ? there->waits_for : "nothing", there ? there->place.line : 0);
  }
  for (const Thread& thread : threads) {
    if (thread.state == Thread::kAtBarrier && here == nullptr) here = &thread;
  }
  fail(const_cast<Thread*>(here), "divergent barrier", here->place, here->pc,
       "__syncthreads waits for ever");
}

void Block::fail(Thread* thread, const char* kind, Place place, const void* pc, const char* format,
                 ...) {
  char text[512];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(text, sizeof text, format, arguments);
  va_end(arguments);
  Error error;
  error.kind = kind;
  error.message = text;
  error.file = place.file ? place.file : "";
  error.line = place.line;
  error.pc = pc;
  error.thread = thread->index;
  fail(std::move(error));
}

void Block::fail(Error error) {
  error.block = index;
  grid.fail(std::move(error));
  leave();
}

// Back to the caller of run(). What the fibers did is forgotten with their stacks.
void Block::leave() {
  ready_.clear();
  idle_.clear();
  for (auto& groups : groups_) groups.clear();
  muted = 0;
  for (auto& fiber : fibers_) {
    fiber->reset();  // this stack's too: only its outermost frame is written over
    idle_.push_back(fiber.get());
  }
  void* forgotten;
  nb_emulator_switch(&forgotten, caller_);
  __builtin_unreachable();
}

}  // namespace nb_emulator
