// The benchmarks' clock.
#ifndef PAGETIDE_BENCH_SECONDS_NOW_H_
#define PAGETIDE_BENCH_SECONDS_NOW_H_

#include "absl/time/time.h"
#include "base/clock.h"

namespace pagetide {

// Monotonic, in seconds since some moment.
inline double SecondsNow() {
  return absl::ToDoubleSeconds(Clock::Real()->MonotonicNow().since_boot);
}

}  // namespace pagetide

#endif  // PAGETIDE_BENCH_SECONDS_NOW_H_
