#include "kvstore/residency_feed.h"

#include <algorithm>

namespace pagetide {

void ResidencyFeed::Append(const StoreEvent& event) {
  {
    MutexLock lock(&mu_);
    ring_.push_back(event);
    if (ring_.size() > max_events_) {
      ring_.pop_front();
      ++first_;
    }
  }
  changed_.SignalAll();
}

uint64_t ResidencyFeed::next_number() const {
  MutexLock lock(&mu_);
  return first_ + ring_.size();
}

ResidencyFeed::Outcome ResidencyFeed::Read(uint64_t* number, absl::Duration timeout,
                                           std::vector<StoreEvent>* events) {
  events->clear();
  MutexLock lock(&mu_);
  if (!closed_ && *number == first_ + ring_.size()) changed_.WaitWithTimeout(&mu_, timeout);
  if (closed_) return Outcome::kClosed;
  if (*number < first_ || *number > first_ + ring_.size()) return Outcome::kGap;
  if (*number == first_ + ring_.size()) return Outcome::kTimeout;
  events->assign(ring_.begin() + static_cast<ptrdiff_t>(*number - first_), ring_.end());
  *number += events->size();
  return Outcome::kEvents;
}

void ResidencyFeed::Close() {
  {
    MutexLock lock(&mu_);
    closed_ = true;
  }
  changed_.SignalAll();
}

absl::Status FollowResidency(ResidencyFeed* feed, const Clock* clock, MonotonicTime deadline,
                             const std::function<std::vector<StoreEvent>(uint64_t*)>& snapshot,
                             const PageStore::WatchCallback& on_events) {
  constexpr size_t kChunk = 4096;
  // Wakes now and then, so that a callback that wants to end is asked even when nothing happens.
  constexpr absl::Duration kPoll = absl::Milliseconds(200);
  std::vector<StoreEvent> events;
  for (;;) {
    uint64_t number = 0;
    const std::vector<StoreEvent> held = snapshot(&number);
    size_t at = 0;
    do {
      const size_t n = std::min(kChunk, held.size() - at);
      if (!on_events(true, at + n == held.size(), std::span(held).subspan(at, n))) {
        return absl::OkStatus();
      }
      at += n;
    } while (at < held.size());
    for (;;) {
      const absl::Duration left = deadline - clock->MonotonicNow();
      if (left <= absl::ZeroDuration()) return absl::DeadlineExceededError("watch store: deadline");
      const ResidencyFeed::Outcome outcome = feed->Read(&number, std::min(left, kPoll), &events);
      if (outcome == ResidencyFeed::Outcome::kGap) break;
      if (outcome == ResidencyFeed::Outcome::kClosed) {
        return absl::UnavailableError("watch store: the store closes");
      }
      for (at = 0; at == 0 || at < events.size(); at += kChunk) {
        const size_t n = std::min(kChunk, events.size() - at);
        if (!on_events(false, false, std::span(events).subspan(at, n))) return absl::OkStatus();
      }
    }
  }
}

}  // namespace pagetide
