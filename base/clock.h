// Clock: the time port. Leases and deadlines use MonotonicNow(); only what a person reads uses
// WallNow().
#ifndef PAGETIDE_BASE_CLOCK_H_
#define PAGETIDE_BASE_CLOCK_H_

#include "absl/time/time.h"
#include "base/mutex.h"

namespace pagetide {

// A point on the monotonic clock of this machine. Never compared across machines or restarts.
struct MonotonicTime {
  absl::Duration since_boot;
  friend bool operator==(MonotonicTime a, MonotonicTime b) { return a.since_boot == b.since_boot; }
  friend bool operator<(MonotonicTime a, MonotonicTime b) { return a.since_boot < b.since_boot; }
  friend bool operator<=(MonotonicTime a, MonotonicTime b) { return !(b < a); }
  friend bool operator>(MonotonicTime a, MonotonicTime b) { return b < a; }
  friend bool operator>=(MonotonicTime a, MonotonicTime b) { return !(a < b); }
  friend absl::Duration operator-(MonotonicTime a, MonotonicTime b) {
    return a.since_boot - b.since_boot;
  }
  friend MonotonicTime operator+(MonotonicTime a, absl::Duration d) { return {a.since_boot + d}; }
  friend MonotonicTime operator-(MonotonicTime a, absl::Duration d) { return {a.since_boot - d}; }
  static MonotonicTime InfiniteFuture() { return {absl::InfiniteDuration()}; }
};

// Thread-safe.
class Clock {
 public:
  virtual ~Clock() = default;
  virtual MonotonicTime MonotonicNow() const = 0;
  virtual absl::Time WallNow() const = 0;
  // The clock of the machine; lives for ever.
  static Clock* Real();
};

// Stands still until told to move. Thread-safe.
class FakeClock final : public Clock {
 public:
  explicit FakeClock(absl::Time wall = absl::UnixEpoch() + absl::Hours(24 * 365 * 50))
      : wall_(wall) {}
  MonotonicTime MonotonicNow() const override;
  absl::Time WallNow() const override;
  void Advance(absl::Duration d);
  // Sets the wall clock forward (or back), as an administrator does; the monotonic clock stands.
  void JumpWall(absl::Duration d);

 private:
  mutable Mutex mu_;
  absl::Duration elapsed_ ABSL_GUARDED_BY(mu_) = absl::ZeroDuration();
  absl::Time wall_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_BASE_CLOCK_H_
