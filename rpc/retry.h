// Retries of client calls: by trait (what is safe to repeat), with exponential back-off and jitter,
// within a deadline, and no sooner than the server's RetryInfo asks. Only UNAVAILABLE is retried
// unless a trait says otherwise. Nothing here knows gRPC: a call gives an absl::Status or StatusOr.
#ifndef PAGETIDE_RPC_RETRY_H_
#define PAGETIDE_RPC_RETRY_H_

#include <algorithm>
#include <cstdint>
#include <functional>
#include <optional>
#include <random>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/clock.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/error_info.h"

namespace pagetide {

struct RetryPolicy {
  int max_attempts = 6;  // the first call counts
  absl::Duration initial_backoff = absl::Milliseconds(50);
  absl::Duration max_backoff = absl::Seconds(2);
  double multiplier = 2;
  // A pause is a random part of the back-off, from (1 - jitter) to all of it, so that clients which
  // failed together do not come back together.
  double jitter = 0.5;
};

// The trait of almost every call: those that are idempotent, or made so by a request_id.
struct RetryUnavailable {
  static bool IsRetryable(const absl::Status& status) {
    return status.code() == absl::StatusCode::kUnavailable;
  }
};

// For calls that must not be repeated without the caller's knowledge: a repeat would act on what
// came after the first.
struct RetryNothing {
  static bool IsRetryable(const absl::Status&) { return false; }
};

// The decisions of one logical call, without sleeping: for loops over asynchronous calls. Not
// thread-safe.
template <typename Traits = RetryUnavailable>
class RetryLoop {
 public:
  RetryLoop(const RetryPolicy& policy, const Clock* clock, MonotonicTime deadline, uint64_t seed)
      : policy_(policy),
        clock_(clock),
        deadline_(deadline),
        random_(seed),
        backoff_(policy.initial_backoff) {}

  // After a failed attempt: the pause before the next one, or nullopt to give up and return
  // `status`: it is not retryable, attempts are used up, or the pause would end after the deadline.
  std::optional<absl::Duration> NextPause(const absl::Status& status) {
    ++attempts_;
    if (!Traits::IsRetryable(status) || attempts_ >= policy_.max_attempts) return std::nullopt;
    std::uniform_real_distribution<double> part(1 - policy_.jitter, 1);
    const absl::Duration pause =
        std::max(backoff_ * part(random_), GetRetryDelay(status).value_or(absl::ZeroDuration()));
    backoff_ = std::min(backoff_ * policy_.multiplier, policy_.max_backoff);
    if (clock_->MonotonicNow() + pause >= deadline_) return std::nullopt;
    return pause;
  }
  absl::Duration TimeLeft() const { return deadline_ - clock_->MonotonicNow(); }
  int attempts() const { return attempts_; }

 private:
  const RetryPolicy policy_;
  const Clock* const clock_;
  const MonotonicTime deadline_;
  std::mt19937_64 random_;
  absl::Duration backoff_;
  int attempts_ = 0;
};

// How a blocking retry passes time. Tests give a fake clock and a sleep that advances it.
struct RetryEnvironment {
  const Clock* clock = Clock::Real();
  std::function<void(absl::Duration)> sleep = [](absl::Duration d) { absl::SleepFor(d); };
  uint64_t seed = std::random_device{}();
};

namespace retry_internal {
inline const absl::Status& StatusOf(const absl::Status& status) {
  return status;
}
template <typename T>
const absl::Status& StatusOf(const absl::StatusOr<T>& result) {
  return result.status();
}
}  // namespace retry_internal

// Calls call(time_left) until it succeeds or RetryLoop gives up; returns its last answer. `timeout`
// bounds all attempts and pauses together; every attempt gets what is left of it as its own
// deadline.
template <typename Traits = RetryUnavailable, typename Call>
auto CallWithRetry(const RetryPolicy& policy, absl::Duration timeout, Call call,
                   const RetryEnvironment& environment = {}) {
  RetryLoop<Traits> loop(policy, environment.clock, environment.clock->MonotonicNow() + timeout,
                         environment.seed);
  for (;;) {
    auto result = call(loop.TimeLeft());
    const absl::Status& status = retry_internal::StatusOf(result);
    if (status.ok()) return result;
    const std::optional<absl::Duration> pause = loop.NextPause(status);
    if (!pause.has_value()) return result;
    environment.sleep(*pause);
  }
}

}  // namespace pagetide

#endif  // PAGETIDE_RPC_RETRY_H_
