#include "base/clock.h"

#include "gtest/gtest.h"

namespace pagetide {
namespace {

TEST(ClockTest, TheFakeClockMovesOnlyWhenTold) {
  FakeClock clock(absl::FromUnixSeconds(1000));
  const MonotonicTime start = clock.MonotonicNow();
  EXPECT_EQ(clock.MonotonicNow(), start);
  clock.Advance(absl::Seconds(3));
  EXPECT_EQ(clock.MonotonicNow() - start, absl::Seconds(3));
  EXPECT_EQ(clock.WallNow(), absl::FromUnixSeconds(1003));
}

TEST(ClockTest, TheRealClockNeverGoesBack) {
  MonotonicTime last = Clock::Real()->MonotonicNow();
  for (int i = 0; i < 1000; ++i) {
    const MonotonicTime now = Clock::Real()->MonotonicNow();
    ASSERT_LE(last, now);
    last = now;
  }
}

TEST(ClockTest, TheInfiniteFutureIsBehindEverything) {
  const MonotonicTime now = Clock::Real()->MonotonicNow();
  EXPECT_LT(now + absl::Hours(24 * 365 * 1000), MonotonicTime::InfiniteFuture());
  EXPECT_EQ(MonotonicTime::InfiniteFuture() - now, absl::InfiniteDuration());
}

}  // namespace
}  // namespace pagetide
