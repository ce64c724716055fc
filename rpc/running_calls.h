// RunningCalls: how many calls a server is working on, for its drain. Thread-safe.
#ifndef PAGETIDE_RPC_RUNNING_CALLS_H_
#define PAGETIDE_RPC_RUNNING_CALLS_H_

#include <cstddef>

#include "absl/time/time.h"
#include "base/clock.h"
#include "base/mutex.h"

namespace pagetide {

class RunningCalls {
 public:
  void Add() {
    MutexLock lock(&mu_);
    ++count_;
  }
  void Remove() {
    // Signalled under the lock: who waits may be gone as soon as it sees zero.
    MutexLock lock(&mu_);
    if (--count_ == 0) ended_.SignalAll();
  }
  // False when calls are still running after `timeout`.
  bool WaitForNone(absl::Duration timeout) {
    const MonotonicTime deadline = Clock::Real()->MonotonicNow() + timeout;
    MutexLock lock(&mu_);
    while (count_ > 0) {
      const absl::Duration left = deadline - Clock::Real()->MonotonicNow();
      if (left <= absl::ZeroDuration()) return false;
      ended_.WaitWithTimeout(&mu_, left);
    }
    return true;
  }

 private:
  Mutex mu_;
  CondVar ended_;
  size_t count_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_RPC_RUNNING_CALLS_H_
