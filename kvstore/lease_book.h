// LeaseBook: the grants of a store, in memory, timed by the store's monotonic clock from receipt.
// Its owner makes epochs durable before it answers, and loads them after a restart, when each known
// lease gets a full time to live again (its holder may not know that the store was away).
// Thread-safe; no I/O.
#ifndef PAGETIDE_KVSTORE_LEASE_BOOK_H_
#define PAGETIDE_KVSTORE_LEASE_BOOK_H_

#include <string>

#include "absl/container/flat_hash_map.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "core/page_store.h"

namespace pagetide {

class LeaseBook {
 public:
  static constexpr absl::Duration kMinTtl = absl::Milliseconds(1);
  static constexpr absl::Duration kMaxTtl = absl::Hours(24);

  explicit LeaseBook(const Clock* clock) : clock_(clock) {}

  // What a grant to this incarnation would be; changes nothing. ALREADY_EXISTS while another
  // incarnation holds the name.
  absl::StatusOr<StoreLease> Propose(absl::string_view name, uint64_t incarnation,
                                     absl::Duration ttl) const;
  // Starts the time of a proposed or loaded lease now.
  void Grant(const StoreLease& lease, absl::Duration ttl);
  // FAILED_PRECONDITION (STALE_EPOCH) when the lease expired or is another's.
  absl::Status Renew(const StoreLease& lease, absl::Duration ttl);
  // Ends the lease; the epoch stays known, so that it never repeats.
  absl::Status Release(const StoreLease& lease);

 private:
  struct Entry {
    StoreLease lease;
    MonotonicTime expires;
  };
  absl::Status CheckHeld(const StoreLease& lease) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Clock* const clock_;
  mutable Mutex mu_;
  absl::flat_hash_map<std::string, Entry> grants_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_LEASE_BOOK_H_
