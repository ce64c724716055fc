#include "rpc/retry.h"

#include <gtest/gtest.h>

#include <vector>

namespace pagetide {
namespace {

class RetryTest : public ::testing::Test {
 protected:
  RetryTest() {
    environment_.clock = &clock_;
    environment_.sleep = [this](absl::Duration d) {
      pauses_.push_back(d);
      clock_.Advance(d);
    };
    environment_.seed = 7;
  }

  FakeClock clock_;
  RetryEnvironment environment_;
  RetryPolicy policy_;
  std::vector<absl::Duration> pauses_;
};

TEST_F(RetryTest, RetriesUnavailableWithGrowingPauses) {
  int calls = 0;
  policy_.max_attempts = 8;
  const absl::StatusOr<int> result = CallWithRetry(
      policy_, absl::Minutes(1),
      [&](absl::Duration) -> absl::StatusOr<int> {
        if (++calls < 8) return absl::UnavailableError("down");
        return 42;
      },
      environment_);
  ASSERT_TRUE(result.ok());
  EXPECT_EQ(*result, 42);
  ASSERT_EQ(pauses_.size(), 7u);
  absl::Duration backoff = policy_.initial_backoff;
  for (absl::Duration pause : pauses_) {
    EXPECT_GE(pause, backoff * (1 - policy_.jitter));
    EXPECT_LE(pause, backoff);
    backoff = std::min(backoff * policy_.multiplier, policy_.max_backoff);
  }
}

TEST_F(RetryTest, ReturnsOtherErrorsAtOnce) {
  for (int code = 1; code <= 16; ++code) {
    if (code == static_cast<int>(absl::StatusCode::kUnavailable)) continue;
    int calls = 0;
    const absl::Status status = CallWithRetry(
        policy_, absl::Minutes(1),
        [&](absl::Duration) {
          ++calls;
          return absl::Status(static_cast<absl::StatusCode>(code), "no");
        },
        environment_);
    EXPECT_EQ(static_cast<int>(status.code()), code);
    EXPECT_EQ(calls, 1) << code;
  }
}

TEST_F(RetryTest, GivesUpAfterTheLastAttempt) {
  int calls = 0;
  const absl::Status status = CallWithRetry(
      policy_, absl::Hours(1), [&](absl::Duration) { return ++calls, absl::UnavailableError("x"); },
      environment_);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(calls, policy_.max_attempts);
}

TEST_F(RetryTest, NeverOutlivesItsDeadline) {
  policy_.max_attempts = 1000;
  const MonotonicTime start = clock_.MonotonicNow();
  absl::Duration last_left = absl::Seconds(3);
  const absl::Status status = CallWithRetry(
      policy_, absl::Seconds(3),
      [&](absl::Duration left) {
        EXPECT_GT(left, absl::ZeroDuration());
        EXPECT_LE(left, last_left);
        last_left = left;
        clock_.Advance(absl::Milliseconds(10));
        return absl::UnavailableError("x");
      },
      environment_);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_LE(clock_.MonotonicNow() - start, absl::Seconds(3));
  EXPECT_GT(pauses_.size(), 3u);
}

TEST_F(RetryTest, WaitsAtLeastAsLongAsTheServerAsks) {
  int calls = 0;
  const absl::Status status = CallWithRetry(
      policy_, absl::Minutes(1),
      [&](absl::Duration) {
        return ++calls == 1 ? WithRetryDelay(absl::UnavailableError("busy"), absl::Seconds(9))
                            : absl::OkStatus();
      },
      environment_);
  EXPECT_TRUE(status.ok());
  ASSERT_EQ(pauses_.size(), 1u);
  EXPECT_GE(pauses_[0], absl::Seconds(9));
}

TEST_F(RetryTest, ServersWishBeyondTheDeadlineEndsTheCall) {
  int calls = 0;
  const absl::Status status = CallWithRetry(
      policy_, absl::Seconds(5),
      [&](absl::Duration) {
        return ++calls, WithRetryDelay(absl::UnavailableError("busy"), absl::Seconds(9));
      },
      environment_);
  EXPECT_EQ(status.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(calls, 1);
  EXPECT_TRUE(pauses_.empty());
}

TEST_F(RetryTest, TraitCanForbidRetries) {
  int calls = 0;
  const absl::Status status = CallWithRetry<RetryNothing>(
      policy_, absl::Seconds(5),
      [&](absl::Duration) { return ++calls, absl::UnavailableError("x"); }, environment_);
  EXPECT_FALSE(status.ok());
  EXPECT_EQ(calls, 1);
}

}  // namespace
}  // namespace pagetide
