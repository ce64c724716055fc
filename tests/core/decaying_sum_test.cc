#include "core/decaying_sum.h"

#include <cmath>

#include "gtest/gtest.h"

namespace pagetide {
namespace {

TEST(DecayingSumTest, IsZeroBeforeTheFirstAdd) {
  EXPECT_EQ(DecayingSum(absl::Hours(1)).At(absl::Hours(5)), 0);
}

TEST(DecayingSumTest, FadesByEEveryTimeConstant) {
  DecayingSum sum(absl::Seconds(10));
  sum.Add(absl::Seconds(3), 2);
  EXPECT_DOUBLE_EQ(sum.At(absl::Seconds(3)), 2);
  EXPECT_DOUBLE_EQ(sum.At(absl::Seconds(13)), 2 / std::exp(1));
  sum.Add(absl::Seconds(13), 1);
  EXPECT_DOUBLE_EQ(sum.At(absl::Seconds(13)), 2 / std::exp(1) + 1);
}

TEST(DecayingSumTest, SteadyInflowSettlesAtInflowTimesTimeConstant) {
  DecayingSum sum(absl::Seconds(100));
  for (int t = 0; t < 2000; ++t) sum.Add(absl::Seconds(t), 0.5);
  EXPECT_NEAR(sum.At(absl::Seconds(2000)), 0.5 * 100, 0.5);
}

// Two reporters' clocks may differ by a little: the sum must not grow by it.
TEST(DecayingSumTest, TimeGoingBackNeitherFadesNorGrows) {
  DecayingSum sum(absl::Seconds(10));
  sum.Add(absl::Seconds(20), 1);
  EXPECT_EQ(sum.At(absl::Seconds(5)), 1);
  sum.Add(absl::Seconds(5), 1);
  EXPECT_EQ(sum.At(absl::Seconds(20)), 2);
}

}  // namespace
}  // namespace pagetide
