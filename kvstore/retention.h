// Retention of pages and manifests: what a store keeps of it, and by which clocks its times pass.
// Pure functions and values, unless said otherwise; thread-safe.
#ifndef PAGETIDE_KVSTORE_RETENTION_H_
#define PAGETIDE_KVSTORE_RETENTION_H_

#include <algorithm>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "core/page_store.h"

namespace pagetide {

// INVALID_ARGUMENT names the field and the numbers.
absl::Status ValidateRetention(const Retention& retention, absl::Time wall_now);

// Stored form: docs/store_format.md.
std::string EncodeRetention(const Retention& retention);
absl::StatusOr<Retention> ParseRetention(absl::string_view bytes);

// An end that only two clocks together can bring: it has passed when the wall clock is beyond it
// *and* as much monotonic time went by as was left when the store took notice of it. So a wall
// clock that jumps ahead ends nothing early, nor does one that was wrong while the store noticed
// and is set right later; one that jumps back delays the end. Time in which the store was not
// running counts by the wall clock alone, for no other knows it.
class TwoClockEnd {
 public:
  // `at_least`: never before that much time from now, whatever the wall clock says (after an
  // opening: it may not have been set yet).
  TwoClockEnd(absl::Time wall, absl::Duration left, const Clock& clock, absl::Duration at_least)
      : wall_(wall), monotonic_(clock.MonotonicNow() + std::max(left, at_least)) {}
  // What is left is told by this machine's wall clock.
  static TwoClockEnd At(absl::Time wall, const Clock& clock,
                        absl::Duration at_least = absl::ZeroDuration()) {
    return TwoClockEnd(wall, wall - clock.WallNow(), clock, at_least);
  }
  // Of a manifest that is put now. Its writer's clock told saved_at and expires_at; the longer of
  // the time between them and the time that this machine's clock has left is waited for.
  static TwoClockEnd OfNewManifest(const ManifestRecord& manifest, const Clock& clock);

  bool HasPassed(const Clock& clock) const {
    return clock.MonotonicNow() >= monotonic_ && clock.WallNow() >= wall_;
  }

 private:
  absl::Time wall_;
  MonotonicTime monotonic_;
};

// The ends of manifests, by name. Thread-safe.
class ExpiryList {
 public:
  // nullopt: it has none (any more).
  void Set(absl::string_view name, std::optional<TwoClockEnd> end);
  std::vector<std::string> Passed(const Clock& clock) const;
  bool HasPassed(absl::string_view name, const Clock& clock) const;

 private:
  mutable Mutex mu_;
  absl::flat_hash_map<std::string, TwoClockEnd> ends_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_RETENTION_H_
