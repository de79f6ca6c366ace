#include "signals.h"

#include <signal.h>
#include <ucontext.h>
#include <unistd.h>

#if defined(__linux__)
#include <sys/syscall.h>
#endif

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

struct sigaction faults_before, ticks_before;

// Where the kernel's thread is that a signal came to.
const char* pc_of(const void* context) {
  const auto& registers = static_cast<const ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  return reinterpret_cast<const char*>(registers.gregs[REG_RIP]);
#else
  return reinterpret_cast<const char*>(registers.pc);
#endif
}

// The thread does not go on there: its stack is begun anew, for the error. The function is given what
// would be the place of a call there, which is the address behind it.
void go_on_at(void (*function)(const void* pc), void* context) {
  const auto pc = reinterpret_cast<uintptr_t>(pc_of(context)) + 1;
  const auto top = reinterpret_cast<uintptr_t>(running_block->running_fiber().top()) / 16 * 16 - 64;
  auto& registers = static_cast<ucontext_t*>(context)->uc_mcontext;
#if defined(__x86_64__)
  registers.gregs[REG_RSP] = static_cast<greg_t>(top - 8);  // as after a call
  registers.gregs[REG_RDI] = static_cast<greg_t>(pc);
  registers.gregs[REG_RIP] = reinterpret_cast<greg_t>(function);
#else
  registers.sp = top;
  registers.regs[0] = pc;
  registers.pc = reinterpret_cast<uintptr_t>(function);
#endif
}

void overflowed(const void*) { running_block->overflowed(nullptr); }
void stopped(const void* pc) { running_block->stop(pc); }

void fault(int number, siginfo_t* info, void* context) {
  const Block* block = running_block;
  if (block != nullptr && block->running_fiber().guard_holds(info->si_addr)) {
    go_on_at(overflowed, context);
  } else if (is_function(faults_before)) {
    call(faults_before, number, info, context);
  } else {
    sigaction(number, &faults_before, nullptr);  // and the fault comes again
  }
}

void tick(int number, siginfo_t* info, void* context) {
  if (info->si_code != SI_TIMER || info->si_value.sival_ptr != &ticks_before) {
    if (is_function(ticks_before)) call(ticks_before, number, info, context);
    return;
  }
  Block* block = running_block;
  if (block != nullptr && block->tick(1 + info->si_overrun, pc_of(context))) {
    go_on_at(stopped, context);
  }
}

void listen(int number, void (*handler)(int, siginfo_t*, void*), struct sigaction* before) {
  struct sigaction action {};
  action.sa_sigaction = handler;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER | SA_RESTART;
  sigaction(number, &action, before);
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
  static const bool listens = (listen(SIGSEGV, fault, &faults_before), true);
  static_cast<void>(listens);
}

// Where the system gives no timer, kernels are stopped where they call, as elsewhere than on Linux.
Ticks::Ticks() {
  struct sigaction before;  // anybody may have set a handler since the last launch
  listen(SIGURG, tick, &before);
  if (before.sa_sigaction != tick) ticks_before = before;
  struct sigevent event {};
  event.sigev_notify = SIGEV_THREAD_ID;
  event.sigev_signo = SIGURG;
  event.sigev_value.sival_ptr = &ticks_before;
#ifndef sigev_notify_thread_id  // some headers have the field alone
#define sigev_notify_thread_id _sigev_un._tid
#endif
  event.sigev_notify_thread_id = static_cast<pid_t>(syscall(SYS_gettid));
  is_on_ = timer_create(CLOCK_THREAD_CPUTIME_ID, &event, &timer_) == 0;
  const timespec once{0, 1'000'000'000 / kTicksPerSecond};
  const itimerspec every{once, once};
  if (is_on_) timer_settime(timer_, 0, &every, nullptr);
}

Ticks::~Ticks() {
  if (is_on_) timer_delete(timer_);
}

#else

void catch_overflows() {}
Ticks::Ticks() {}
Ticks::~Ticks() {}

#endif

}  // namespace nb_emulator
