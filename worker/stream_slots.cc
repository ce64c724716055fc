#include "worker/stream_slots.h"

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/error_info.h"

namespace pagetide {

absl::StatusOr<std::unique_ptr<StreamSlots::Slot>> StreamSlots::Take(absl::string_view tenant) {
  const auto refused = [&](uint32_t running, absl::string_view whose, uint32_t limit) {
    return WithRetryDelay(
        WithReason(absl::ResourceExhaustedError(absl::StrCat(running, " ", options_.what, whose,
                                                             " are running, the limit is ", limit)),
                   options_.reason),
        absl::Seconds(1));
  };
  MutexLock lock(&mu_);
  const auto held = by_tenant_.find(tenant);
  if (held != by_tenant_.end() && held->second >= options_.per_tenant) {
    return refused(held->second, " of this tenant", options_.per_tenant);
  }
  if (num_taken_ >= options_.in_all) return refused(num_taken_, "", options_.in_all);
  ++num_taken_;
  ++by_tenant_[std::string(tenant)];
  return std::unique_ptr<Slot>(new Slot(this, tenant));
}

void StreamSlots::GiveBack(const std::string& tenant) {
  MutexLock lock(&mu_);
  --num_taken_;
  const auto held = by_tenant_.find(tenant);
  if (--held->second == 0) by_tenant_.erase(held);
}

uint32_t StreamSlots::num_taken() const {
  MutexLock lock(&mu_);
  return num_taken_;
}

}  // namespace pagetide
