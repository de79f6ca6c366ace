// Counters: what a launch asks of the memory, as far as addresses tell.
//
// A warp's accesses are put together again from its lanes': those of one instruction (by the address
// of its code), each lane's n-th of it since the lanes last met (at a barrier or an operation of the
// whole warp), are taken to be made at once.

#include <algorithm>
#include <unordered_map>

#include "block.h"

namespace nb_emulator {

namespace {

class Counters : public Listener {
 public:
  explicit Counters(Grid& grid) : grid_(grid) {}

  ~Counters() override {
    const std::lock_guard lock(grid_.mutex);
    const auto* from = reinterpret_cast<const uint64_t*>(&counts_);
    auto* to = reinterpret_cast<uint64_t*>(&grid_.counts);
    for (size_t i = 0; i < sizeof(Counts) / sizeof(uint64_t); ++i) to[i] += from[i];
  }

  void block_start(Block& block) override {
    warps_.assign(static_cast<size_t>(block.num_warps()), Warp());
  }

  void access(Block&, const Access& access) override {
    if (access.space != Access::kGlobal && access.space != Access::kShared) return;
    if (access.kind == Access::kCopyArrival) return;  // counted when it was issued
    Warp& warp = warps_[static_cast<size_t>(access.thread->warp())];
    const int lane = access.thread->lane();
    const uint64_t code = reinterpret_cast<uint64_t>(access.pc) << 3 | access.kind;
    auto& instruction = warp[code];
    const size_t times = instruction.times[lane]++;
    if (times >= instruction.made.size()) instruction.made.resize(times + 1);
    Together& together = instruction.made[times];
    together.lanes |= 1u << lane;
    together.access = access;
    together.addresses[lane] = reinterpret_cast<uint64_t>(access.address);
  }

  void barrier(Block& block) override {
    ++counts_.barriers;
    for (int warp = 0; warp < block.num_warps(); ++warp) flush(block, warp);
  }
  void warp_operation(Block& block, int warp, unsigned lanes, bool) override {
    ++counts_.warp_operations;
    if (lanes == block.live_lanes(warp)) flush(block, warp);
  }
  void thread_end(Block& block, Thread& thread) override {
    // The last lane of a warp: it alone is live.
    if ((block.live_lanes(thread.warp()) & ~(1u << thread.lane())) == 0) flush(block, thread.warp());
  }

 private:
  struct Together {
    unsigned lanes = 0;
    Access access{};
    uint64_t addresses[kLanes];
  };
  struct Instruction {
    uint32_t times[kLanes] = {};
    std::vector<Together> made;
  };
  using Warp = std::unordered_map<uint64_t, Instruction>;

  void flush(Block& block, int number) {
    Warp& warp = warps_[static_cast<size_t>(number)];
    unsigned all = 0;  // lanes that did anything
    for (auto& [code, instruction] : warp) {
      for (Together& together : instruction.made) all |= together.lanes;
    }
    all |= block.live_lanes(number);
    for (auto& [code, instruction] : warp) {
      for (Together& together : instruction.made) {
        counts_.divergent += together.lanes != all;
        if (together.access.space == Access::kShared) {
          ++counts_.shared_accesses;
          counts_.bank_conflicts += conflicts(together);
        } else if (together.access.kind == Access::kRead) {
          ++counts_.global_reads;
          counts_.sectors_read += sectors(together);
        } else {
          ++counts_.global_writes;
          counts_.sectors_written += sectors(together);
        }
      }
    }
    warp.clear();
  }

  // Of 32 bytes, that the lanes touch.
  static uint64_t sectors(const Together& together) {
    std::vector<uint64_t> touched;
    for (int lane = 0; lane < kLanes; ++lane) {
      if ((together.lanes >> lane & 1u) == 0) continue;
      const uint64_t last = together.addresses[lane] + together.access.bytes - 1;
      for (uint64_t at = together.addresses[lane] / 32; at <= last / 32; ++at) touched.push_back(at);
    }
    std::sort(touched.begin(), touched.end());
    return static_cast<uint64_t>(std::unique(touched.begin(), touched.end()) - touched.begin());
  }

  // Passes beyond the first that 32 banks of 4 bytes need. Lanes that take 8 or 16 bytes each are
  // served by halves or quarters of the warp.
  static uint64_t conflicts(const Together& together) {
    const size_t bytes = together.access.bytes;
    const int at_once = bytes <= 4 ? 32 : bytes <= 8 ? 16 : 8;
    uint64_t more = 0;
    for (int first = 0; first < kLanes; first += at_once) {
      std::vector<uint64_t> banks[32];  // the words that each must give
      size_t worst = 1;
      for (int lane = first; lane < first + at_once; ++lane) {
        if ((together.lanes >> lane & 1u) == 0) continue;
        const uint64_t last = together.addresses[lane] + bytes - 1;
        for (uint64_t word = together.addresses[lane] / 4; word <= last / 4; ++word) {
          auto& words = banks[word % 32];
          if (std::find(words.begin(), words.end(), word) == words.end()) words.push_back(word);
          worst = std::max(worst, words.size());
        }
      }
      more += worst - 1;
    }
    return more;
  }

  Grid& grid_;
  Counts counts_{};
  std::vector<Warp> warps_;
};

}  // namespace

void add_counters(ListenerList& list, Grid& grid) {
  list.push_back(std::make_unique<Counters>(grid));
}

}  // namespace nb_emulator
