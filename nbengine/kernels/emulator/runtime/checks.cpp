// The checks: listeners that end the launch when a kernel does what CUDA leaves undefined.

#include <algorithm>
#include <cstring>
#include <unordered_map>

#include "block.h"

namespace nb_emulator {

namespace {

const char* verb(Access::Kind kind) {
  switch (kind) {
    case Access::kRead: return "reads";
    case Access::kWrite: return "writes";
    case Access::kAtomic: return "atomically changes";
    default: return "copies asynchronously to";
  }
}

Error wrong(const Block& block, const char* kind, const char* address, std::string message) {
  Error error{kind, std::move(message)};
  error.address = address;
  error.variable = block.memory.nearest_shared(address, &error.offset);
  return error;
}

[[noreturn]] void fail(Block& block, const Access& access, const Error& error) {
  block.fail(*access.thread, {}, access.pc, error);
}

// Every access lies in a tensor that was passed, in a shared variable, or in a constant. Of a kernel
// that takes a table of pointers, those may point anywhere but to the block's own memory.
class Bounds : public Listener {
 public:
  void access(Block& block, const Access& access) override {
    if (access.space != Access::kNowhere) return;
    if (block.owns_stack_at(access.address)) {
      fail(block, access, {"out of bounds", text("%s a local variable of another thread",
                                                 verb(access.kind))});
    }
    const Error error = wrong(block, "out of bounds", access.address,
                              text("%s %zu bytes at {address}", verb(access.kind), access.bytes));
    constexpr uintptr_t kNearNull = 1 << 20;
    if (block.grid.request.knows_memory || error.variable >= 0 ||
        reinterpret_cast<uintptr_t>(access.address) < kNearNull) {
      fail(block, access, error);
    }
  }
};

// All threads wait at the same barrier of the source.
class OneBarrier : public Listener {
 public:
  void barrier(Block& block) override {
    const Thread* first = nullptr;
    for (const Thread& thread : block.threads) {
      if (thread.state != Thread::kAtBarrier) continue;
      if (first == nullptr) first = &thread;
      if (thread.place.line == first->place.line &&
          (thread.place.file == first->place.file ||
           std::strcmp(thread.place.file, first->place.file) == 0)) {
        continue;
      }
      Error error{"divergence", "not all threads of the block reach this __syncthreads(): {other} "
                                "waits at another one"};
      error.other_pc = thread.pc;
      error.other_thread = thread.index;
      block.fail(*first, first->place, first->pc, std::move(error));
    }
  }
};

// No byte of shared memory is read that nothing wrote, or that an asynchronous copy has yet to write;
// but for padding, which a struct's copy reads and nobody uses. Padding follows a member, ends at a
// multiple of some alignment, is shorter than that, and an alignment comes from a member that is
// written so many bytes at once.
class Initialised : public Listener {
 public:
  void block_start(Block& block) override { state_.assign(block.memory.shared_bytes(), kNothing); }

  void access(Block& block, const Access& access) override {
    if (access.space != Access::kShared) return;
    uint8_t* state = &state_[block.memory.shared_start(access.buffer) + access.offset];
    const bool arrives = access.kind == Access::kCopyArrival;
    const bool reads = access.kind == Access::kRead || access.kind == Access::kAtomic;
    for (size_t i = 0; i < access.bytes; ++i) {
      if (state[i] == kInFlight && !arrives) in_flight(block, access);
      if (state[i] != kNothing || !reads) continue;
      size_t end = i + 1;
      while (end < access.bytes && state[end] == kNothing) ++end;
      if (!is_padding(access, state, i, end)) {
        block.suspect(access, wrong(block, "uninitialised", access.address + i,
                                    text("%s {address}, which nothing in this block has written",
                                         verb(access.kind))));
        break;
      }
      i = end - 1;
    }
    if (access.kind == Access::kRead) return;
    const size_t at_once = aligned(reinterpret_cast<uintptr_t>(access.address) | access.bytes, 16);
    std::memset(state, access.kind == Access::kCopyIssue ? kInFlight : static_cast<int>(at_once),
                access.bytes);
  }

 private:
  // Of a byte: one of these, or as what part of how many bytes (1 to 16) it was written last.
  enum State : uint8_t { kNothing = 0, kInFlight = 255 };

  // The largest power of two that divides a number, up to `most`.
  static size_t aligned(uintptr_t number, size_t most) {
    const uintptr_t lowest = number & (~number + 1);
    return lowest < most ? lowest : most;
  }

  static bool is_padding(const Access& access, const uint8_t* state, size_t begin, size_t end) {
    if (begin == 0) return false;
    const size_t widest = *std::max_element(state, state + access.bytes);
    return end - begin < aligned(reinterpret_cast<uintptr_t>(access.address) + end, widest);
  }

  [[noreturn]] void in_flight(Block& block, const Access& access) {
    Error error = wrong(block, "unfinished copy", access.address,
                        text("%s {address}, where the asynchronous copy of {other} has not been "
                             "waited for", verb(access.kind)));
    for (const Thread& thread : block.threads) {
      for (const AsyncCopy& copy : thread.copies) {
        if (access.address >= copy.target + copy.bytes) continue;
        if (copy.target >= access.address + access.bytes) continue;
        error.other_thread = thread.index;
        error.other_pc = copy.pc;
      }
    }
    fail(block, access, error);
  }

  std::vector<uint8_t> state_;
};

// No two threads touch a byte of shared memory, one of them writing it, without a barrier between.
//
// What orders two accesses of different threads: a __syncthreads between them, and any chain that leads
// from one to the other of __syncwarps and of atomic operations on one address, the first of them
// after a __threadfence. (Shuffles and votes order nothing: CUDA's guide, "Warp Shuffle Functions".)
// Those chains are kept as vector clocks (Fidge 1988, Mattern 1989), over a warp's lanes, and over the
// block's threads where there are fences; the last accesses to each granule of memory as in FastTrack
// (Flanagan and Freund 2009). Of readers, and of atomic writers, two are kept: the latest, and of
// another warp or else the latest before it; whoever writes races with one of them if it races with
// any, unless lanes met in parts of their warp. Threads that write the value that is there already do
// no harm.
class Races : public Listener {
 public:
  void block_start(Block& block) override {
    settle(block);
    ++epoch_;
    forget_fences(block);
    warps_.assign(static_cast<size_t>(block.num_warps()), Warp());
    const size_t variables = block.memory.shared().size();
    if (granules_.size() == variables) return;
    granules_.assign(variables, 16);
    cells_.resize(variables);
    for (size_t i = 0; i < variables; ++i) {
      cells_[i].assign((block.memory.shared()[i].bytes + 15) / 16, Cell());
    }
  }

  void access(Block& block, const Access& access) override {
    settle(block);
    if (access.kind == Access::kAtomic && fences_) {
      const auto number = static_cast<size_t>(access.thread->number);
      Clock& met = at_atomics_[access.address];
      join(beyond_warps_[number], met);
      join(met, before_fences_[number]);
    }
    if (access.space != Access::kShared) return;
    const auto variable = static_cast<size_t>(access.buffer);
    size_t& granule = granules_[variable];
    const size_t fits = access.offset | access.bytes;
    if ((fits & (granule - 1)) != 0) refine(variable, fits & (~fits + 1));
    auto& cells = cells_[variable];
    for (size_t at = access.offset / granule; at < (access.offset + access.bytes) / granule; ++at) {
      touch(block, access, cells[at], block.memory.shared()[variable].begin + at * granule);
    }
  }

  void barrier(Block& block) override {
    settle(block);
    ++epoch_;
    forget_fences(block);
  }

  void fence(Block& block, const Thread& thread) override {
    settle(block);
    fences_ = true;
    const auto first = static_cast<size_t>(thread.number - thread.lane());
    Warp& warp = warps_[static_cast<size_t>(thread.warp())];
    Clock& before = before_fences_[static_cast<size_t>(thread.number)];
    before.resize(block.threads.size());
    join(before, beyond_warps_[static_cast<size_t>(thread.number)]);
    warp.seen[thread.lane()][thread.lane()] = warp.clock[thread.lane()]++;
    for (size_t i = 0; i < kLanes && first + i < before.size(); ++i) {
      before[first + i] = std::max(before[first + i], warp.seen[thread.lane()][i]);
    }
  }

  void warp_operation(Block& block, int number, unsigned lanes, bool orders_memory) override {
    settle(block);
    if (!orders_memory) return;
    if (fences_) join_beyond_warp(static_cast<size_t>(number) * kLanes, lanes);
    Warp& warp = warps_[static_cast<size_t>(number)];
    uint32_t joined[kLanes] = {};
    for (unsigned left = lanes; left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      for (int i = 0; i < kLanes; ++i) {
        const uint32_t seen = i == lane ? warp.clock[i] : warp.seen[lane][i];
        joined[i] = joined[i] > seen ? joined[i] : seen;
      }
    }
    for (unsigned left = lanes; left != 0; left &= left - 1) {
      const int lane = __builtin_ctz(left);
      std::memcpy(warp.seen[lane], joined, sizeof joined);
      ++warp.clock[lane];
    }
  }

  void thread_end(Block& block, Thread&) override { settle(block); }

 private:
  struct Stamp {
    uint32_t clock = 0;  // of the thread in its warp; 0 for no access
    uint32_t pc = 0;     // from the kernel library's start
    uint16_t thread = 0;
  };
  struct Cell {
    uint32_t epoch = 0;  // of the stamps; older ones are ordered before everything now
    bool atomic = false;  // the writes; of others there is one
    Stamp writes[2], reads[2];
  };
  using Clock = std::vector<uint32_t>;  // by thread of the block; empty for all 0
  struct Warp {
    Warp() { std::fill(clock, clock + kLanes, 1); }
    uint32_t clock[kLanes];
    uint32_t seen[kLanes][kLanes] = {};
  };

  bool ordered(const Stamp& before, const Thread& now) const {
    if (before.clock == 0 || before.thread == now.number) return true;
    const Warp& warp = warps_[static_cast<size_t>(now.warp())];
    if (before.thread / kLanes == now.warp() &&
        warp.seen[now.lane()][before.thread % kLanes] >= before.clock) {
      return true;
    }
    if (!fences_) return false;
    const Clock& beyond = beyond_warps_[static_cast<size_t>(now.number)];
    return !beyond.empty() && beyond[before.thread] >= before.clock;
  }

  static void join(Clock& clock, const Clock& other) {
    if (clock.size() < other.size()) clock.resize(other.size());
    for (size_t i = 0; i < other.size(); ++i) clock[i] = std::max(clock[i], other[i]);
  }

  void join_beyond_warp(size_t first, unsigned lanes) {
    Clock joined;
    for (unsigned left = lanes; left != 0; left &= left - 1) {
      join(joined, beyond_warps_[first + static_cast<size_t>(__builtin_ctz(left))]);
    }
    for (unsigned left = lanes; left != 0; left &= left - 1) {
      beyond_warps_[first + static_cast<size_t>(__builtin_ctz(left))] = joined;
    }
  }

  // A barrier has ordered all that they did.
  void forget_fences(const Block& block) {
    if (!fences_ && beyond_warps_.size() == block.threads.size()) return;
    fences_ = false;
    beyond_warps_.assign(block.threads.size(), Clock());
    before_fences_.assign(block.threads.size(), Clock());
    at_atomics_.clear();
  }

  void touch(Block& block, const Access& access, Cell& cell, const char* address) {
    const Thread& me = *access.thread;
    if (cell.epoch != epoch_) {
      cell = Cell();
      cell.epoch = epoch_;
    }
    const bool atomic = access.kind == Access::kAtomic;
    for (const Stamp& write : cell.writes) {
      if (ordered(write, me) || (atomic && cell.atomic)) continue;
      if (access.kind == Access::kWrite && !cell.atomic) {
        suspect(block, access, write, address);
      } else {
        report(block, access, write, address, cell.atomic ? "atomically changes" : "writes");
      }
    }
    if (access.kind != Access::kRead) {
      for (const Stamp& read : cell.reads) {
        if (!ordered(read, me)) report(block, access, read, address, "reads");
      }
    }
    const Stamp mine{warps_[static_cast<size_t>(me.warp())].clock[me.lane()],
                     static_cast<uint32_t>(static_cast<const char*>(access.pc) - library(block)),
                     static_cast<uint16_t>(me.number)};
    if (access.kind == Access::kRead) {
      keep(cell.reads, mine);
    } else if (atomic && cell.atomic) {
      keep(cell.writes, mine);
    } else {
      cell.writes[0] = mine;
      cell.writes[1] = Stamp();
      cell.atomic = atomic;
    }
  }

  static void keep(Stamp (&kept)[2], const Stamp& mine) {
    const Stamp latest = kept[0], other = kept[1];
    kept[0] = mine;
    if (latest.clock == 0 || latest.thread == mine.thread) return;
    const int warp = mine.thread / kLanes;
    const bool other_says_more =
        other.clock != 0 && other.thread / kLanes != warp && latest.thread / kLanes == warp;
    if (!other_says_more) kept[1] = latest;
  }

  // Cells of `granule` bytes, each as the larger one that held it.
  void refine(size_t variable, size_t granule) {
    const size_t parts = granules_[variable] / granule;
    std::vector<Cell> finer;
    finer.reserve(cells_[variable].size() * parts);
    for (const Cell& cell : cells_[variable]) finer.insert(finer.end(), parts, cell);
    cells_[variable] = std::move(finer);
    granules_[variable] = granule;
  }

  const char* library(Block& block) {
    if (library_ == nullptr) {
      library_ = library_of(reinterpret_cast<void*>(block.grid.request.thread_main));
    }
    return library_;
  }

  Error race(Block& block, const Access& access, const Stamp& before, const char* address,
             const char* did) {
    Error error = wrong(block, "race", address,
                        text("%s {address}, which {other} %s with no barrier between the two",
                             verb(access.kind), did));
    error.other_thread = block.threads[before.thread].index;
    error.other_pc = library(block) + before.pc;
    return error;
  }

  [[noreturn]] void report(Block& block, const Access& access, const Stamp& before,
                           const char* address, const char* did) {
    fail(block, access, race(block, access, before, address, did));
  }

  // A second write, told before it is made: the next event shows whether it changes anything.
  void suspect(Block& block, const Access& access, const Stamp& before, const char* address) {
    if (suspected_.thread != nullptr) return;
    suspected_ = access;
    value_.assign(access.address, access.address + access.bytes);
    suspicion_ = race(block, access, before, address, "writes");
  }

  void settle(Block& block) {
    if (suspected_.thread == nullptr) return;
    const Access access = suspected_;
    suspected_.thread = nullptr;
    if (std::memcmp(access.address, value_.data(), access.bytes) != 0) {
      fail(block, access, suspicion_);
    }
  }

  uint32_t epoch_ = 0;
  std::vector<Warp> warps_;
  bool fences_ = false;  // since the last barrier
  std::vector<Clock> beyond_warps_;   // by thread: what it knows of others, besides its warp's clocks
  std::vector<Clock> before_fences_;  // by thread: what it knew at its last fence
  std::unordered_map<const char*, Clock> at_atomics_;  // by address: what its next visitor will know
  std::vector<size_t> granules_;          // bytes of a cell, by variable
  std::vector<std::vector<Cell>> cells_;  // by variable
  const char* library_ = nullptr;

  Access suspected_{};  // of no thread: none
  std::vector<char> value_;  // before it
  Error suspicion_;
};

}  // namespace

void add_checks(ListenerList& list) {
  list.push_back(std::make_unique<Bounds>());
  list.push_back(std::make_unique<OneBarrier>());
  list.push_back(std::make_unique<Initialised>());
  list.push_back(std::make_unique<Races>());
}

}  // namespace nb_emulator
