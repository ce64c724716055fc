// Sequences that nobody uses any more.
#include <algorithm>
#include <vector>

#include "worker/model_host_impl.h"

namespace pagetide {

std::vector<IdleSequence> ModelHostImpl::CloseIdle() {
  std::vector<IdleSequence> closed;
  if (options_.sequence_idle <= absl::ZeroDuration()) return closed;
  {
    MutexLock lock(&mu_);
    const MonotonicTime now = clock_->MonotonicNow();
    if (now < look_for_idle_at_) return closed;
    look_for_idle_at_ = now + std::min(options_.sequence_idle / 10, absl::Seconds(1));
    std::vector<SequencePtr> idle;
    for (const auto& [number, sequence] : sequences_) {
      // A pending write ends by its lease or with its stream; until then its sequence is in use.
      if (sequence->pending != nullptr) continue;
      if (sequence.use_count() > 1) {  // a call on it is running: it counts from its end
        sequence->last_call = now;
      } else if (now - sequence->last_call >= options_.sequence_idle) {
        idle.push_back(sequence);
      }
    }
    for (const SequencePtr& sequence : idle) {
      CloseNow(*sequence);
      closed.push_back({sequence->id, sequence->epoch, sequence->tenant});
      ++counters_.sequences_expired;
    }
  }
  if (!closed.empty()) Flush();
  return closed;
}

}  // namespace pagetide
