// WorkerFence: the fence that this worker's durable writes carry (DESIGN rule 8).
//
// The store checks it with the write itself: the record {"owner", "worker/<id>"} must hold our
// epoch as its version. We advance that record by compare-and-set once for each lease we are
// granted, so that a life of the worker that lost its lease, to another incarnation or to whoever
// took its sequences over, can write nothing any more, however late its write arrives. The record
// says under which grant of the lease "worker/<id>" it was written, and gives way to later grants
// only: whoever stalls between looking at its lease and writing the record takes nothing back.
//
// Thread-safe. Lease and store outlive it.
#ifndef PAGETIDE_WORKER_WORKER_FENCE_H_
#define PAGETIDE_WORKER_WORKER_FENCE_H_

#include <cstdint>
#include <optional>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "core/page_store.h"
#include "worker/store_lease.h"

namespace pagetide {

// Kind of the records whose versions are epochs.
inline constexpr char kOwnerRecordKind[] = "owner";

// The value of a worker's ownership record: who wrote it, under which grant of the worker's lease.
std::string FenceValue(absl::string_view writer, uint64_t lease_epoch);
// The grant that a value names; 0: none.
uint64_t LeaseEpochOf(absl::string_view fence_value);

class WorkerFence {
 public:
  // `lease` is the lease "worker/<worker_id>".
  WorkerFence(absl::string_view worker_id, uint64_t incarnation, StoreLeaseKeeper* lease,
              PageStore* store);

  // Waits for the first lease until the deadline. FAILED_PRECONDITION (STALE_EPOCH) when another
  // incarnation has the lease that was ours; UNAVAILABLE when it ran out or was never granted.
  absl::StatusOr<WriteFence> Get(MonotonicTime deadline);

 private:
  absl::StatusOr<WriteFence> Advance(uint64_t lease_epoch, MonotonicTime deadline);

  const std::string ownership_key_;
  const uint64_t incarnation_;
  StoreLeaseKeeper* const lease_;
  PageStore* const store_;

  Mutex mu_;
  uint64_t lease_epoch_ ABSL_GUARDED_BY(mu_) = 0;  // that fence_ was advanced for
  std::optional<WriteFence> fence_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_WORKER_FENCE_H_
