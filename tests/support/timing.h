// Waiting and timing in tests, on machines of any speed and load.
#ifndef PAGETIDE_TESTS_SUPPORT_TIMING_H_
#define PAGETIDE_TESTS_SUPPORT_TIMING_H_

#include <cstdlib>

#include "absl/time/clock.h"
#include "absl/time/time.h"

namespace pagetide::testing {

// True as soon as `condition` holds; false when it did not for so long that it never will. Only a
// failing test ever waits that long.
template <typename Condition>
bool Eventually(Condition condition, absl::Duration give_up = absl::Seconds(90)) {
  const absl::Time deadline = absl::Now() + give_up;
  while (!condition()) {
    if (absl::Now() > deadline) return false;
    absl::SleepFor(absl::Milliseconds(5));
  }
  return true;
}

// The bound of a time that is promised on a machine that does nothing else. It is held there, with
// PAGETIDE_PROMISED_TIMES=1 in the environment; elsewhere a machine may be 30 times as slow.
inline absl::Duration Promised(absl::Duration time) {
  const char* const is_quiet = std::getenv("PAGETIDE_PROMISED_TIMES");
  return is_quiet != nullptr && is_quiet[0] == '1' ? time : 30 * time;
}

}  // namespace pagetide::testing

#endif  // PAGETIDE_TESTS_SUPPORT_TIMING_H_
