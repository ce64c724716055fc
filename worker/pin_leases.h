// PinLeases: pages pinned for a time, on behalf of a client that reads frames in place or comes
// back soon for a prefix it looked up. A lease ends by itself; nobody can hold frames for longer.
//
// A lease of a sequence's table keeps the table too, for callers that read it page by page: the
// frames it names are those that are pinned, whatever happened to the sequence since.
//
// Thread-safe. Leases are bounded in number, in time and in the extents of their tables.
#ifndef PAGETIDE_WORKER_PIN_LEASES_H_
#define PAGETIDE_WORKER_PIN_LEASES_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "worker/model_host.h"

namespace pagetide {

class PinLeases {
 public:
  struct Options {
    absl::Duration max_duration = absl::Seconds(30);
    size_t max_leases = 4096;
    // Of the tables kept, together; about 150 bytes each.
    size_t max_extents = 1 << 20;
  };
  // Shared with the calls that answer from it.
  using Pins = std::shared_ptr<const ModelHost::PinnedPages>;
  // With the host whose frames it names, which outlives all leases.
  struct HostTable : ModelHost::PinnedTable {
    ModelHost* host = nullptr;
  };
  using Table = std::shared_ptr<const HostTable>;

  PinLeases(Options options, const Clock* clock) : options_(options), clock_(clock) {}
  // Ends all leases.
  ~PinLeases();

  // INVALID_ARGUMENT unless 0 < duration ≤ max_duration; the message names `field`.
  absl::Status CheckDuration(const char* field, absl::Duration duration) const;
  // Keeps `pins` (may be null) for `duration`, then drops them and calls `on_end` (may be null).
  // Returns the lease's id. RESOURCE_EXHAUSTED when there are too many; then `on_end` is called at
  // once.
  absl::StatusOr<std::string> Add(Pins pins, absl::Duration duration, std::function<void()> on_end);
  // Keeps `table`, which `tenant` may read again until the lease ends.
  absl::StatusOr<std::string> AddTable(absl::string_view tenant, Table table,
                                       absl::Duration duration);
  // FAILED_PRECONDITION (LEASE_ENDED) when no such lease of a table of this sequence is open. The
  // sequence itself may be closed.
  absl::StatusOr<Table> FindTable(absl::string_view tenant, SequenceId sequence,
                                  absl::string_view lease_id) const;
  // Ends what ran out. Call it from a ticker.
  void Expire();
  void Clear();
  size_t size() const;

 private:
  struct Lease {
    MonotonicTime ends;
    Pins pins;
    std::function<void()> on_end;
    std::string tenant;  // of the table
    Table table;         // may be null
  };
  absl::StatusOr<std::string> Add(Lease lease);
  // Takes a lease out of the map, for End.
  Lease Take(std::map<uint64_t, Lease>::iterator at) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  static void End(std::vector<Lease> leases);

  const Options options_;
  const Clock* const clock_;
  mutable Mutex mu_;
  uint64_t next_ ABSL_GUARDED_BY(mu_) = 1;
  std::map<uint64_t, Lease> leases_ ABSL_GUARDED_BY(mu_);
  size_t num_extents_ ABSL_GUARDED_BY(mu_) = 0;  // of the tables
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_PIN_LEASES_H_
