#include "core/lease_table.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"

namespace pagetide {
namespace {

absl::Status Stale(absl::string_view what, absl::string_view name, uint64_t epoch,
                   uint64_t current) {
  return WithReason(
      absl::FailedPreconditionError(absl::StrCat(what, " lease ", name, ": epoch ", epoch,
                                                 " does not hold it, epoch is ", current)),
      error_reason::kStaleEpoch);
}

}  // namespace

absl::StatusOr<Lease> LeaseTable::Acquire(absl::string_view name, uint64_t incarnation,
                                          absl::Duration ttl) {
  return Grant(name, incarnation, ttl, /*take_over=*/false);
}

absl::StatusOr<Lease> LeaseTable::TakeOver(absl::string_view name, uint64_t incarnation,
                                           absl::Duration ttl) {
  return Grant(name, incarnation, ttl, /*take_over=*/true);
}

absl::StatusOr<Lease> LeaseTable::Grant(absl::string_view name, uint64_t incarnation,
                                        absl::Duration ttl, bool take_over) {
  if (name.empty() || incarnation == 0 || ttl <= absl::ZeroDuration()) {
    return absl::InvalidArgumentError(
        absl::StrCat("acquire lease: name of ", name.size(), " characters, incarnation ",
                     incarnation, ", ttl ", absl::FormatDuration(ttl), "; none may be zero"));
  }
  auto it = names_.find(name);
  if (it == names_.end()) {
    if (names_.size() >= max_names_) {
      return absl::ResourceExhaustedError(absl::StrCat("acquire lease ", name, ": ", names_.size(),
                                                       " names are known, at most ", max_names_));
    }
    it = names_.emplace(std::string(name), Entry{}).first;
  }
  Entry& entry = it->second;
  const bool is_held = IsHeld(entry);
  if (is_held && entry.incarnation != incarnation && !take_over) {
    return absl::AlreadyExistsError(absl::StrCat(
        "acquire lease ", name, ": incarnation ", absl::Hex(entry.incarnation, absl::kZeroPad16),
        " holds it for ", absl::FormatDuration(entry.expires - clock_->MonotonicNow())));
  }
  if (!is_held || entry.incarnation != incarnation) ++entry.epoch;
  entry.incarnation = incarnation;
  entry.expires = clock_->MonotonicNow() + ttl;
  entry.is_granted = true;
  return Lease{it->first, incarnation, entry.epoch, entry.expires};
}

absl::Status LeaseTable::Renew(absl::string_view name, uint64_t incarnation, uint64_t epoch,
                               absl::Duration ttl) {
  const auto it = names_.find(name);
  if (it == names_.end()) return Stale("renew", name, epoch, 0);
  Entry& entry = it->second;
  if (!IsHeld(entry) || entry.incarnation != incarnation || entry.epoch != epoch) {
    return Stale("renew", name, epoch, entry.epoch);
  }
  entry.expires = clock_->MonotonicNow() + ttl;
  return absl::OkStatus();
}

absl::Status LeaseTable::Release(absl::string_view name, uint64_t incarnation, uint64_t epoch) {
  const auto it = names_.find(name);
  if (it == names_.end()) return absl::OkStatus();
  Entry& entry = it->second;
  if (entry.incarnation != incarnation || entry.epoch != epoch) {
    if (!IsHeld(entry)) return absl::OkStatus();
    return Stale("release", name, epoch, entry.epoch);
  }
  entry.is_granted = false;
  return absl::OkStatus();
}

std::optional<Lease> LeaseTable::Find(absl::string_view name) const {
  const auto it = names_.find(name);
  if (it == names_.end() || !IsHeld(it->second)) return std::nullopt;
  return Lease{it->first, it->second.incarnation, it->second.epoch, it->second.expires};
}

std::vector<Lease> LeaseTable::TakeExpired() {
  const MonotonicTime now = clock_->MonotonicNow();
  std::vector<Lease> expired;
  for (auto& [name, entry] : names_) {
    if (!entry.is_granted || now < entry.expires) continue;
    entry.is_granted = false;
    expired.push_back({name, entry.incarnation, entry.epoch, entry.expires});
  }
  std::sort(expired.begin(), expired.end(),
            [](const Lease& a, const Lease& b) { return a.name < b.name; });
  return expired;
}

void LeaseTable::Forget(absl::string_view name) {
  const auto it = names_.find(name);
  if (it != names_.end() && !IsHeld(it->second)) names_.erase(it);
}

}  // namespace pagetide
