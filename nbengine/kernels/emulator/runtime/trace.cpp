// A recording of one block's events, in the order in which they happened here.

#include "block.h"

namespace nb_emulator {

namespace {

class Trace : public Listener {
 public:
  explicit Trace(Grid& grid)
      : grid_(grid), library_(library_of(reinterpret_cast<void*>(grid.request.thread_main))) {}

  void block_start(Block& block) override {
    const unsigned* wanted = grid_.request.traced_block;
    on_ = block.index.x == wanted[0] && block.index.y == wanted[1] && block.index.z == wanted[2];
    epoch_ = 0;
  }

  void access(Block&, const Access& access) override {
    if (!on_) return;
    record({static_cast<uint32_t>(access.thread->number), access.kind, access.space, access.buffer,
            access.offset, static_cast<uint32_t>(access.bytes), epoch_, from_start(access.pc)});
  }

  void barrier(Block& block) override {
    if (!on_) return;
    for (const Thread& thread : block.threads) {
      if (thread.state == Thread::kAtBarrier) record(meeting(thread, kBarrier));
    }
    ++epoch_;
  }

  void warp_operation(Block& block, int warp, unsigned lanes, bool) override {
    if (!on_) return;
    for (; lanes != 0; lanes &= lanes - 1) {
      record(meeting(block.lane_of(warp, __builtin_ctz(lanes)), kWarpOperation));
    }
  }

 private:
  enum : uint32_t { kBarrier = 8, kWarpOperation = 9 };

  Recorded meeting(const Thread& thread, uint32_t event) {
    return {static_cast<uint32_t>(thread.number), event, Access::kNowhere, -1, 0, 0, epoch_,
            from_start(thread.pc)};
  }
  uint64_t from_start(const void* pc) const {
    return pc == nullptr ? 0 : static_cast<uint64_t>(static_cast<const char*>(pc) - library_);
  }
  // One block of the grid is on, so nobody else writes there.
  void record(const Recorded& event) { grid_.recorded.push_back(event); }

  Grid& grid_;
  const char* library_;
  bool on_ = false;
  uint32_t epoch_ = 0;
};

}  // namespace

void add_trace(ListenerList& list, Grid& grid) { list.push_back(std::make_unique<Trace>(grid)); }

}  // namespace nb_emulator
