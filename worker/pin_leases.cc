#include "worker/pin_leases.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/error_info.h"

namespace pagetide {
namespace {

constexpr char kIdPrefix[] = "pin-";

}  // namespace

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
  return Add(Lease{.ends = clock_->MonotonicNow() + duration,
                   .pins = std::move(pins),
                   .on_end = std::move(on_end)});
}

absl::StatusOr<std::string> PinLeases::AddTable(absl::string_view tenant, Table table,
                                                absl::Duration duration) {
  return Add(Lease{.ends = clock_->MonotonicNow() + duration,
                   .tenant = std::string(tenant),
                   .table = std::move(table)});
}

absl::StatusOr<std::string> PinLeases::Add(Lease lease) {
  const size_t num_extents = lease.table == nullptr ? 0 : lease.table->entries.size();
  absl::Status refused;
  {
    MutexLock lock(&mu_);
    if (leases_.size() >= options_.max_leases) {
      refused = absl::ResourceExhaustedError(absl::StrCat("lease pages: ", options_.max_leases,
                                                          " leases are open, no more are given"));
    } else if (num_extents > options_.max_extents - num_extents_) {
      refused = absl::ResourceExhaustedError(
          absl::StrCat("lease pages: a table of ", num_extents, " extents, ", num_extents_, " of ",
                       options_.max_extents, " are leased already"));
    } else {
      num_extents_ += num_extents;
      const uint64_t number = next_++;
      leases_.emplace(number, std::move(lease));
      return absl::StrCat(kIdPrefix, number);
    }
  }
  std::vector<Lease> ended;
  ended.push_back(std::move(lease));
  End(std::move(ended));
  return refused;
}

absl::StatusOr<PinLeases::Table> PinLeases::FindTable(absl::string_view tenant, SequenceId sequence,
                                                      absl::string_view lease_id) const {
  uint64_t number = 0;
  absl::string_view digits = lease_id;
  if (absl::ConsumePrefix(&digits, kIdPrefix) && absl::SimpleAtoi(digits, &number)) {
    MutexLock lock(&mu_);
    const auto it = leases_.find(number);
    if (it != leases_.end() && it->second.table != nullptr && it->second.tenant == tenant &&
        it->second.table->info.id == sequence) {
      return it->second.table;
    }
  }
  return WithReason(absl::FailedPreconditionError(
                        absl::StrCat("lease_id: no lease of that id on the table of sequence ",
                                     sequence.ToString(), " is open; it ended, or never was")),
                    "LEASE_ENDED");
}

PinLeases::Lease PinLeases::Take(std::map<uint64_t, Lease>::iterator at) {
  Lease lease = std::move(at->second);
  leases_.erase(at);
  if (lease.table != nullptr) num_extents_ -= lease.table->entries.size();
  return lease;
}

void PinLeases::Expire() {
  const MonotonicTime now = clock_->MonotonicNow();
  std::vector<Lease> ended;
  {
    MutexLock lock(&mu_);
    for (auto it = leases_.begin(); it != leases_.end();) {
      const auto at = it++;
      if (at->second.ends <= now) ended.push_back(Take(at));
    }
  }
  End(std::move(ended));
}

void PinLeases::Clear() {
  std::vector<Lease> ended;
  {
    MutexLock lock(&mu_);
    while (!leases_.empty()) ended.push_back(Take(leases_.begin()));
  }
  End(std::move(ended));
}

void PinLeases::End(std::vector<Lease> leases) {
  for (Lease& lease : leases) {
    lease.pins.reset();
    lease.table.reset();
    if (lease.on_end) lease.on_end();
  }
}

size_t PinLeases::size() const {
  MutexLock lock(&mu_);
  return leases_.size();
}

}  // namespace pagetide
