// PinLeases: pages pinned for a time, on behalf of a client that reads frames in place or comes
// back soon for a prefix it looked up. A lease ends by itself; nobody can hold frames for longer.
//
// Thread-safe. Leases are bounded in number and in time.
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
  };
  using Pins = std::vector<std::shared_ptr<const ModelHost::PinnedRows>>;

  PinLeases(Options options, const Clock* clock) : options_(options), clock_(clock) {}
  // Ends all leases.
  ~PinLeases();

  // INVALID_ARGUMENT unless 0 < duration ≤ max_duration; the message names `field`.
  absl::Status CheckDuration(const char* field, absl::Duration duration) const;
  // Keeps `pins` for `duration`, then drops them and calls `on_end` (may be null). Returns the
  // lease's id. RESOURCE_EXHAUSTED when there are too many; then `on_end` is called at once.
  absl::StatusOr<std::string> Add(Pins pins, absl::Duration duration, std::function<void()> on_end);
  // Ends what ran out. Call it from a ticker.
  void Expire();
  void Clear();
  size_t size() const;

 private:
  struct Lease {
    MonotonicTime ends;
    Pins pins;
    std::function<void()> on_end;
  };
  static void End(std::vector<Lease> leases);

  const Options options_;
  const Clock* const clock_;
  mutable Mutex mu_;
  uint64_t next_ ABSL_GUARDED_BY(mu_) = 1;
  std::map<uint64_t, Lease> leases_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_PIN_LEASES_H_
