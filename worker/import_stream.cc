#include "worker/import_stream.h"

#include <algorithm>
#include <utility>

namespace pagetide {
namespace {

// How often a wait looks at the clock, which need not be the machine's.
constexpr absl::Duration kLookAtClock = absl::Milliseconds(100);

}  // namespace

ImportStream::Outcome ImportStream::Read(v1::ImportSequenceRequest* message,
                                         MonotonicTime give_up) {
  {
    MutexLock lock(&mu_);
    while (!has_arrived_ && !has_ended_ && !is_cancelled_) {
      const absl::Duration left = give_up - clock_->MonotonicNow();
      if (left <= absl::ZeroDuration()) return Outcome::kLate;
      changed_.WaitWithTimeout(&mu_, std::min(left, kLookAtClock));
    }
    // A stream that broke looks like one that ended.
    if (is_cancelled_ || is_broken()) return Outcome::kBroken;
    if (!std::exchange(has_arrived_, false)) return Outcome::kEnd;
  }
  std::swap(*message, arriving_);
  arriving_.Clear();
  StartRead(&arriving_);
  return Outcome::kMessage;
}

void ImportStream::OnReadDone(bool ok) {
  MutexLock lock(&mu_);
  (ok ? has_arrived_ : has_ended_) = true;
  changed_.SignalAll();
}

void ImportStream::OnCancel() {
  MutexLock lock(&mu_);
  is_cancelled_ = true;
  changed_.SignalAll();
}

}  // namespace pagetide
