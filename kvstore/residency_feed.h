// ResidencyFeed: numbered page events of a store, kept for watchers to follow. Bounded: a watcher
// that falls further behind than the ring is long has a gap and needs a snapshot. Thread-safe. The
// owner appends under its own lock, so that a snapshot taken under that lock together with
// next_number() is exact.
#ifndef PAGETIDE_KVSTORE_RESIDENCY_FEED_H_
#define PAGETIDE_KVSTORE_RESIDENCY_FEED_H_

#include <cstdint>
#include <deque>
#include <vector>

#include "base/mutex.h"
#include "core/page_store.h"

namespace pagetide {

class ResidencyFeed {
 public:
  enum class Outcome { kEvents, kGap, kTimeout, kClosed };

  explicit ResidencyFeed(size_t max_events = 1 << 16) : max_events_(max_events) {}

  void Append(const StoreEvent& event);
  // The number that the next event will have.
  uint64_t next_number() const;
  // Waits for events from *number on, moves *number past those it returns.
  Outcome Read(uint64_t* number, absl::Duration timeout, std::vector<StoreEvent>* events);
  // Wakes all readers with kClosed, for good.
  void Close();

 private:
  const size_t max_events_;
  mutable Mutex mu_;
  CondVar changed_;
  std::deque<StoreEvent> ring_ ABSL_GUARDED_BY(mu_);
  uint64_t first_ ABSL_GUARDED_BY(mu_) = 1;  // number of ring_.front()
  bool closed_ ABSL_GUARDED_BY(mu_) = false;
};

// The loop behind PageStore::Watch: snapshot, tail, and a snapshot again after a gap. `snapshot`
// returns all pages held and sets the number from which the tail follows; it must be exact in the
// sense above.
absl::Status FollowResidency(ResidencyFeed* feed, const Clock* clock, MonotonicTime deadline,
                             const std::function<std::vector<StoreEvent>(uint64_t*)>& snapshot,
                             const PageStore::WatchCallback& on_events);

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_RESIDENCY_FEED_H_
