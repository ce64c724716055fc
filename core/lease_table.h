// LeaseTable: who holds which name until when. The state machine behind worker liveness; it stores
// nothing and has no thread: expiry is what the clock says at the moment of a call.
//
//            Acquire            Renew, Acquire by the holder
//   free ──────────────▶ held ◀────┐
//    ▲  epoch + 1         │ └───────┘ same epoch
//    └────────────────────┘ Release, or ttl over since the last grant (TakeExpired reports it)
//
// The epoch of a name grows by one with each grant to another incarnation or after an expiry, so
// that what an earlier holder still sends can be told from what the present one sends. Times are on
// the monotonic clock of this process, from the receipt of the call.
//
// Not thread-safe: the owner calls it under its lock.
#ifndef PAGETIDE_CORE_LEASE_TABLE_H_
#define PAGETIDE_CORE_LEASE_TABLE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"

namespace pagetide {

struct Lease {
  std::string name;
  uint64_t incarnation = 0;
  uint64_t epoch = 0;
  MonotonicTime expires;  // held while now < expires
};

class LeaseTable {
 public:
  // At most max_names names are known, held or remembered for their epoch. `clock` outlives the
  // table.
  LeaseTable(Clock* clock, size_t max_names) : clock_(clock), max_names_(max_names) {}

  // Grants when the name is free, expired, or held by this incarnation. ALREADY_EXISTS while
  // another incarnation holds it; INVALID_ARGUMENT for an empty name, incarnation 0 or ttl <= 0;
  // RESOURCE_EXHAUSTED beyond max_names.
  absl::StatusOr<Lease> Acquire(absl::string_view name, uint64_t incarnation, absl::Duration ttl);
  // As Acquire, but takes the name from another holder.
  absl::StatusOr<Lease> TakeOver(absl::string_view name, uint64_t incarnation, absl::Duration ttl);
  // FAILED_PRECONDITION (STALE_EPOCH) unless this incarnation and epoch hold the name now.
  absl::Status Renew(absl::string_view name, uint64_t incarnation, uint64_t epoch,
                     absl::Duration ttl);
  // OK if it is not held any more; FAILED_PRECONDITION (STALE_EPOCH) if another holds it.
  absl::Status Release(absl::string_view name, uint64_t incarnation, uint64_t epoch);

  // The lease, if the name is held now.
  std::optional<Lease> Find(absl::string_view name) const;
  // Leases that expired since the last call, each once.
  std::vector<Lease> TakeExpired();
  // Forgets a name that is not held, and its epoch.
  void Forget(absl::string_view name);
  size_t num_names() const { return names_.size(); }

 private:
  struct Entry {
    uint64_t incarnation = 0;  // of the last holder
    uint64_t epoch = 0;
    MonotonicTime expires;
    bool is_granted = false;  // neither released nor reported as expired
  };
  bool IsHeld(const Entry& entry) const {
    return entry.is_granted && clock_->MonotonicNow() < entry.expires;
  }
  absl::StatusOr<Lease> Grant(absl::string_view name, uint64_t incarnation, absl::Duration ttl,
                              bool take_over);

  Clock* const clock_;
  const size_t max_names_;
  absl::flat_hash_map<std::string, Entry> names_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_LEASE_TABLE_H_
