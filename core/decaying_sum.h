// DecayingSum: how much of something happened lately. Each amount added fades by e every time
// constant, so with a steady inflow the value is inflow × time constant. A value; not thread-safe.
#ifndef PAGETIDE_CORE_DECAYING_SUM_H_
#define PAGETIDE_CORE_DECAYING_SUM_H_

#include <algorithm>
#include <cmath>

#include "absl/time/time.h"

namespace pagetide {

class DecayingSum {
 public:
  // `time_constant` > 0. Times are since any fixed moment, the same for all calls.
  explicit DecayingSum(absl::Duration time_constant) : time_constant_(time_constant) {}

  void Add(absl::Duration now, double amount) {
    sum_ = At(now) + amount;
    last_ = std::max(last_, now);
  }

  // A `now` before the last Add counts as the moment of that Add.
  double At(absl::Duration now) const {
    if (now <= last_) return sum_;
    return sum_ * std::exp(-absl::FDivDuration(now - last_, time_constant_));
  }

 private:
  const absl::Duration time_constant_;
  absl::Duration last_ = -absl::InfiniteDuration();
  double sum_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_DECAYING_SUM_H_
