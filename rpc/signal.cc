#include "rpc/signal.h"

#include <errno.h>
#include <time.h>

#include "base/clock.h"

namespace pagetide {

TerminationSignal::TerminationSignal() {
  sigemptyset(&signals_);
  sigaddset(&signals_, SIGTERM);
  sigaddset(&signals_, SIGINT);
  pthread_sigmask(SIG_BLOCK, &signals_, nullptr);
}

int TerminationSignal::Wait() {
  int signal_number = 0;
  while (sigwait(&signals_, &signal_number) != 0) {
  }
  return signal_number;
}

std::optional<int> TerminationSignal::WaitFor(absl::Duration timeout) {
  const MonotonicTime deadline = Clock::Real()->MonotonicNow() + timeout;
  for (;;) {
    const absl::Duration left = deadline - Clock::Real()->MonotonicNow();
    const timespec ts = absl::ToTimespec(left < absl::ZeroDuration() ? absl::ZeroDuration() : left);
    const int got = sigtimedwait(&signals_, nullptr, &ts);
    if (got > 0) return got;
    if (errno != EINTR) return std::nullopt;
  }
}

void TerminationSignal::RestoreDefault() {
  pthread_sigmask(SIG_UNBLOCK, &signals_, nullptr);
}

}  // namespace pagetide
