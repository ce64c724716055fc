#include "kvstore/lease_book.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kvstore/store_errors.h"

namespace pagetide {
namespace {

absl::Status CheckTtl(absl::Duration ttl) {
  if (ttl >= LeaseBook::kMinTtl && ttl <= LeaseBook::kMaxTtl) return absl::OkStatus();
  return absl::InvalidArgumentError(absl::StrCat(
      "ttl is ", absl::FormatDuration(ttl), ", allowed are ",
      absl::FormatDuration(LeaseBook::kMinTtl), " to ", absl::FormatDuration(LeaseBook::kMaxTtl)));
}

}  // namespace

absl::StatusOr<StoreLease> LeaseBook::Propose(absl::string_view name, uint64_t incarnation,
                                              absl::Duration ttl) const {
  PT_RETURN_IF_ERROR(CheckStoreName("lease name", name));
  PT_RETURN_IF_ERROR(CheckTtl(ttl));
  const MonotonicTime now = clock_->MonotonicNow();
  MutexLock lock(&mu_);
  const auto it = grants_.find(std::string(name));
  if (it == grants_.end()) return StoreLease{std::string(name), incarnation, 1};
  const Entry& entry = it->second;
  if (entry.lease.incarnation == incarnation && now < entry.expires) return entry.lease;
  if (now < entry.expires) {
    return absl::AlreadyExistsError(absl::StrCat("acquire lease ", name, ": held by incarnation ",
                                                 entry.lease.incarnation, " for another ",
                                                 absl::FormatDuration(entry.expires - now)));
  }
  return StoreLease{std::string(name), incarnation, entry.lease.epoch + 1};
}

void LeaseBook::Grant(const StoreLease& lease, absl::Duration ttl) {
  const MonotonicTime expires = clock_->MonotonicNow() + ttl;
  MutexLock lock(&mu_);
  grants_[lease.name] = Entry{lease, expires};
}

absl::Status LeaseBook::CheckHeld(const StoreLease& lease) const {
  const auto it = grants_.find(lease.name);
  if (it == grants_.end())
    return StaleEpochError(absl::StrCat("lease ", lease.name), 0, lease.epoch);
  const Entry& entry = it->second;
  if (entry.lease.epoch != lease.epoch || entry.lease.incarnation != lease.incarnation) {
    return StaleEpochError(absl::StrCat("lease ", lease.name), entry.lease.epoch, lease.epoch);
  }
  if (entry.expires <= clock_->MonotonicNow()) {
    return StaleEpochError(absl::StrCat("lease ", lease.name, " (expired)"), entry.lease.epoch,
                           lease.epoch);
  }
  return absl::OkStatus();
}

absl::Status LeaseBook::Renew(const StoreLease& lease, absl::Duration ttl) {
  PT_RETURN_IF_ERROR(CheckTtl(ttl));
  MutexLock lock(&mu_);
  PT_RETURN_IF_ERROR(CheckHeld(lease));
  grants_.at(lease.name).expires = clock_->MonotonicNow() + ttl;
  return absl::OkStatus();
}

absl::Status LeaseBook::Release(const StoreLease& lease) {
  MutexLock lock(&mu_);
  PT_RETURN_IF_ERROR(CheckHeld(lease));
  grants_.at(lease.name).expires = clock_->MonotonicNow();
  return absl::OkStatus();
}

}  // namespace pagetide
