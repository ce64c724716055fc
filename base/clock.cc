#include "base/clock.h"

#include <time.h>

#include "absl/time/clock.h"

namespace pagetide {
namespace {

class RealClock final : public Clock {
 public:
  MonotonicTime MonotonicNow() const override {
    timespec ts;
    clock_gettime(CLOCK_MONOTONIC, &ts);
    return {absl::DurationFromTimespec(ts)};
  }
  absl::Time WallNow() const override { return absl::Now(); }
};

}  // namespace

Clock* Clock::Real() {
  static RealClock* const clock = new RealClock;
  return clock;
}

MonotonicTime FakeClock::MonotonicNow() const {
  MutexLock lock(&mu_);
  return {elapsed_};
}

absl::Time FakeClock::WallNow() const {
  MutexLock lock(&mu_);
  return wall_ + elapsed_;
}

void FakeClock::Advance(absl::Duration d) {
  MutexLock lock(&mu_);
  elapsed_ += d;
}

void FakeClock::JumpWall(absl::Duration d) {
  MutexLock lock(&mu_);
  wall_ += d;
}

}  // namespace pagetide
