#include "worker/pin_leases.h"

#include <utility>

#include "absl/strings/str_cat.h"

namespace pagetide {

PinLeases::~PinLeases() {
  Clear();
}

absl::Status PinLeases::CheckDuration(const char* field, absl::Duration duration) const {
  if (duration > absl::ZeroDuration() && duration <= options_.max_duration) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(field, " is ", absl::FormatDuration(duration),
                                                 ", must be above 0 and at most ",
                                                 absl::FormatDuration(options_.max_duration)));
}

absl::StatusOr<std::string> PinLeases::Add(Pins pins, absl::Duration duration,
                                           std::function<void()> on_end) {
  const MonotonicTime ends = clock_->MonotonicNow() + duration;
  {
    MutexLock lock(&mu_);
    if (leases_.size() < options_.max_leases) {
      const uint64_t id = next_++;
      leases_.emplace(id, Lease{ends, std::move(pins), std::move(on_end)});
      return absl::StrCat("pin-", id);
    }
  }
  if (on_end) on_end();
  return absl::ResourceExhaustedError(
      absl::StrCat("lease pages: ", options_.max_leases, " leases are open, no more are given"));
}

void PinLeases::Expire() {
  const MonotonicTime now = clock_->MonotonicNow();
  std::vector<Lease> ended;
  {
    MutexLock lock(&mu_);
    for (auto it = leases_.begin(); it != leases_.end();) {
      if (it->second.ends > now) {
        ++it;
        continue;
      }
      ended.push_back(std::move(it->second));
      it = leases_.erase(it);
    }
  }
  End(std::move(ended));
}

void PinLeases::Clear() {
  std::vector<Lease> ended;
  {
    MutexLock lock(&mu_);
    for (auto& [id, lease] : leases_) ended.push_back(std::move(lease));
    leases_.clear();
  }
  End(std::move(ended));
}

void PinLeases::End(std::vector<Lease> leases) {
  for (Lease& lease : leases) {
    lease.pins.clear();
    if (lease.on_end) lease.on_end();
  }
}

size_t PinLeases::size() const {
  MutexLock lock(&mu_);
  return leases_.size();
}

}  // namespace pagetide
