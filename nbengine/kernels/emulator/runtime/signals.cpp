#include "signals.h"

#include <signal.h>
#include <ucontext.h>

#include <memory>

#include "block.h"

namespace nb_emulator {

namespace {

std::atomic<bool> interrupted{false};
struct sigaction before_launch;

void call(const struct sigaction& handler, int number, siginfo_t* info, void* context) {
  if (handler.sa_flags & SA_SIGINFO) {
    handler.sa_sigaction(number, info, context);
  } else {
    handler.sa_handler(number);
  }
}

bool is_function(const struct sigaction& handler) {
  return handler.sa_handler != SIG_DFL && handler.sa_handler != SIG_IGN;
}

void interrupt(int number, siginfo_t* info, void* context) {
  interrupted = true;
  if (is_function(before_launch)) call(before_launch, number, info, context);
}

}  // namespace

Interruption::Interruption(bool is_wanted) : is_wanted_(is_wanted) {
  if (!is_wanted_) return;
  interrupted = false;
  struct sigaction action {};
  action.sa_sigaction = interrupt;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_RESTART;
  sigaction(SIGINT, &action, &before_launch);
  if (is_function(before_launch)) return;
  sigaction(SIGINT, &before_launch, nullptr);  // which ends the process, or is ignored
  is_wanted_ = false;
}

Interruption::~Interruption() {
  if (is_wanted_) sigaction(SIGINT, &before_launch, nullptr);
}

std::atomic<bool>& Interruption::stop() const { return interrupted; }

#if defined(__linux__)

namespace {

struct sigaction before_first_launch;

[[noreturn]] void overflowed() { running_block->overflowed(nullptr); }

// The kernel's thread does not go on where it was: its stack is begun anew, for the error.
void fault(int number, siginfo_t* info, void* context) {
  const Block* block = running_block;
  if (block == nullptr || !block->running_fiber().guard_holds(info->si_addr)) {
    if (is_function(before_first_launch)) return call(before_first_launch, number, info, context);
    sigaction(number, &before_first_launch, nullptr);  // and the fault comes again
    return;
  }
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext;
  const auto top = reinterpret_cast<uintptr_t>(block->running_fiber().top()) / 16 * 16 - 64;
#if defined(__x86_64__)
  registers.gregs[REG_RSP] = static_cast<greg_t>(top - 8);  // as after a call
  registers.gregs[REG_RIP] = reinterpret_cast<greg_t>(overflowed);
#else
  registers.sp = top;
  registers.pc = reinterpret_cast<uintptr_t>(overflowed);
#endif
}

// A handler needs another stack than the one that is full.
class HandlerStack {
 public:
  HandlerStack() {
    stack_t there;
    sigaltstack(nullptr, &there);
    if ((there.ss_flags & SS_DISABLE) == 0) return;  // Python's faulthandler has brought one
    constexpr size_t kBytes = 64 << 10;
    memory_ = std::make_unique<char[]>(kBytes);
    stack_t mine{};
    mine.ss_sp = memory_.get();
    mine.ss_size = kBytes;
    sigaltstack(&mine, nullptr);
  }
  ~HandlerStack() {
    if (memory_ == nullptr) return;
    stack_t none{};
    none.ss_flags = SS_DISABLE;
    sigaltstack(&none, nullptr);
  }

 private:
  std::unique_ptr<char[]> memory_;
};

}  // namespace

void catch_overflows() {
  thread_local const HandlerStack stack;
  static const bool installed = [] {
    struct sigaction action {};
    action.sa_sigaction = fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    return sigaction(SIGSEGV, &action, &before_first_launch) == 0;
  }();
  static_cast<void>(installed);
}

#else

void catch_overflows() {}

#endif

}  // namespace nb_emulator
