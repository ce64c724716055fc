#include "core/tier_planner.h"

#include <algorithm>
#include <limits>
#include <random>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

TierSnapshot Tier(uint32_t num_frames, uint32_t in_use, uint32_t clean, uint32_t dirty) {
  return {.num_frames = num_frames,
          .free_frames = num_frames - in_use,
          .evictable_clean = clean,
          .evictable_dirty = dirty,
          .high_watermark = 0.9,
          .low_watermark = 0.75};
}

TEST(PlanSpillTest, NothingUpToTheHighWatermark) {
  const SpillPlan plan = PlanSpill(Tier(100, 90, 50, 40));
  EXPECT_EQ(plan.evict_clean, 0u);
  EXPECT_EQ(plan.spill_dirty, 0u);
}

TEST(PlanSpillTest, AboveItDownToTheLowWatermarkCleanFirst) {
  SpillPlan plan = PlanSpill(Tier(100, 91, 50, 40));
  EXPECT_EQ(plan.evict_clean, 16u);
  EXPECT_EQ(plan.spill_dirty, 0u);
  plan = PlanSpill(Tier(100, 100, 10, 40));
  EXPECT_EQ(plan.evict_clean, 10u);
  EXPECT_EQ(plan.spill_dirty, 15u);
}

TEST(PlanSpillTest, NeverMoreThanMayGo) {
  const SpillPlan plan = PlanSpill(Tier(100, 100, 3, 4));
  EXPECT_EQ(plan.evict_clean, 3u);
  EXPECT_EQ(plan.spill_dirty, 4u);
}

TEST(PlanSpillTest, APoolWithoutFramesPlansNothing) {
  EXPECT_EQ(PlanSpill(Tier(0, 0, 0, 0)).evict_clean, 0u);
}

TEST(PlanSpillTest, TakesTheLeastThatReachesTheLowWatermark) {
  std::mt19937 rng(7);
  for (int i = 0; i < 20000; ++i) {
    TierSnapshot tier;
    tier.num_frames = rng() % 200;
    tier.free_frames = rng() % (tier.num_frames + 1);
    const uint32_t in_use = tier.num_frames - tier.free_frames;
    tier.evictable_clean = rng() % (in_use + 1);
    tier.evictable_dirty = rng() % (in_use - tier.evictable_clean + 1);
    tier.high_watermark = (rng() % 101) / 100.0;
    tier.low_watermark = tier.high_watermark * ((rng() % 101) / 100.0);
    const SpillPlan plan = PlanSpill(tier);
    const uint32_t taken = plan.evict_clean + plan.spill_dirty;
    ASSERT_LE(plan.evict_clean, tier.evictable_clean);
    ASSERT_LE(plan.spill_dirty, tier.evictable_dirty);
    if (in_use <= tier.high_watermark * tier.num_frames) {
      ASSERT_EQ(taken, 0u);
      continue;
    }
    const double low = tier.low_watermark * tier.num_frames;
    const bool took_all = taken == tier.evictable_clean + tier.evictable_dirty;
    ASSERT_TRUE(in_use - taken <= low || took_all);
    if (taken > 0) {
      ASSERT_GT(in_use - taken + 1, low);
    }
    if (plan.spill_dirty > 0) {
      ASSERT_EQ(plan.evict_clean, tier.evictable_clean);
    }
  }
}

TEST(EstimateRestoreTest, PaysOnlyWhereLoadingBeatsRecomputing) {
  // 64 MiB at 1 GiB/s are 62.5 ms; 1000 tokens at 10,000/s 100 ms.
  RestoreEstimate estimate = EstimateRestore(64 << 20, 1 << 30, 1000, 10000);
  EXPECT_EQ(estimate.load, absl::Microseconds(62500));
  EXPECT_EQ(estimate.recompute, absl::Milliseconds(100));
  EXPECT_TRUE(estimate.worth_it);
  EXPECT_THAT(estimate.explanation, HasSubstr("62.5ms"));
  EXPECT_THAT(estimate.explanation, HasSubstr("1000 tokens"));
  EXPECT_THAT(estimate.explanation, HasSubstr("100ms"));
  EXPECT_FALSE(EstimateRestore(64 << 20, 1 << 30, 1000, 20000).worth_it);
  // As long as each other: recomputing does not depend on the store.
  EXPECT_FALSE(EstimateRestore(1000, 1000, 1000, 1000).worth_it);
}

TEST(EstimateRestoreTest, UnknownRatesAreTriedOnce) {
  EXPECT_TRUE(EstimateRestore(1 << 30, 1e6, 1, 0).worth_it);
  EXPECT_TRUE(EstimateRestore(1 << 30, 0, 1, 1e6).worth_it);
  EXPECT_THAT(EstimateRestore(1 << 30, 0, 1, 0).explanation, HasSubstr("not measured"));
}

TEST(RateMeterTest, StartsAtTheFirstSampleAndFollowsTheRest) {
  RateMeter meter(0.5);
  EXPECT_EQ(meter.per_second(), 0);
  meter.Add(100, absl::Milliseconds(500));
  EXPECT_DOUBLE_EQ(meter.per_second(), 200);
  meter.Add(100, absl::Seconds(1));
  EXPECT_DOUBLE_EQ(meter.per_second(), 150);
}

TEST(RateMeterTest, IgnoresSamplesThatSayNothing) {
  RateMeter meter;
  meter.Add(100, absl::Seconds(1));
  meter.Add(100, absl::ZeroDuration());
  meter.Add(100, -absl::Seconds(1));
  meter.Add(100, absl::InfiniteDuration());
  meter.Add(0, absl::Seconds(1));
  meter.Add(-5, absl::Seconds(1));
  meter.Add(kNaN, absl::Seconds(1));
  meter.Add(kInfinity, absl::Seconds(1));
  EXPECT_DOUBLE_EQ(meter.per_second(), 100);
}

TEST(RateMeterTest, StaysBetweenTheExtremesAndConverges) {
  std::mt19937 rng(3);
  RateMeter meter;
  for (int i = 0; i < 1000; ++i) {
    const double seconds = 0.001 * (1 + rng() % 50);
    meter.Add((1000 + rng() % 1000) * seconds, absl::Seconds(seconds));
    ASSERT_GE(meter.per_second(), 1000 * 0.999);
    ASSERT_LE(meter.per_second(), 2000 * 1.001);
  }
  for (int i = 0; i < 100; ++i) meter.Add(50, absl::Seconds(1));
  EXPECT_NEAR(meter.per_second(), 50, 0.01);
}

}  // namespace
}  // namespace pagetide
