#include "core/compute_claims.h"

#include <gtest/gtest.h>

#include "absl/strings/str_cat.h"

namespace pagetide {
namespace {

PrefixKey KeyOf(int i) {
  return {Sha256Of(absl::StrCat("page ", i))};
}
MonotonicTime At(int seconds) {
  return MonotonicTime{absl::Seconds(seconds)};
}

TEST(ComputeClaimsTest, OneHolderAtATimeUntilItsTimeIsOver) {
  ComputeClaims claims;
  EXPECT_TRUE(claims.Claim(KeyOf(1), 7, At(0), absl::Seconds(10)).is_granted);
  const ComputeClaims::Answer second = claims.Claim(KeyOf(1), 8, At(9), absl::Seconds(10));
  EXPECT_FALSE(second.is_granted);
  EXPECT_EQ(second.ends, At(10));
  EXPECT_TRUE(claims.Claim(KeyOf(1), 8, At(10), absl::Seconds(10)).is_granted);
  EXPECT_FALSE(claims.Claim(KeyOf(1), 7, At(11), absl::Seconds(10)).is_granted);
}

TEST(ComputeClaimsTest, AHolderExtendsItsClaimAndMovesOn) {
  ComputeClaims claims;
  EXPECT_TRUE(claims.Claim(KeyOf(1), 7, At(0), absl::Seconds(10)).is_granted);
  EXPECT_EQ(claims.Claim(KeyOf(1), 7, At(5), absl::Seconds(10)).ends, At(15));
  EXPECT_TRUE(claims.Claim(KeyOf(2), 7, At(6), absl::Seconds(10)).is_granted);
  EXPECT_EQ(claims.size(), 1u);
  EXPECT_TRUE(claims.Claim(KeyOf(1), 8, At(6), absl::Seconds(10)).is_granted);
}

TEST(ComputeClaimsTest, EndsWithThePageAndWithItsHolder) {
  ComputeClaims claims;
  claims.Claim(KeyOf(1), 7, At(0), absl::Seconds(10));
  claims.Release(KeyOf(1));
  EXPECT_TRUE(claims.Claim(KeyOf(1), 8, At(1), absl::Seconds(10)).is_granted);
  EXPECT_FALSE(claims.ReleaseHolder(7));
  EXPECT_TRUE(claims.ReleaseHolder(8));
  EXPECT_EQ(claims.size(), 0u);
}

TEST(ComputeClaimsTest, AFullTableForgetsWhatEndedAndElseGrantsUnheard) {
  ComputeClaims claims(/*max_claims=*/2);
  claims.Claim(KeyOf(1), 1, At(0), absl::Seconds(10));
  claims.Claim(KeyOf(2), 2, At(0), absl::Seconds(20));
  EXPECT_TRUE(claims.Claim(KeyOf(3), 3, At(1), absl::Seconds(10)).is_granted);
  EXPECT_EQ(claims.size(), 2u);
  EXPECT_TRUE(claims.Claim(KeyOf(3), 4, At(1), absl::Seconds(10)).is_granted);
  EXPECT_TRUE(claims.Claim(KeyOf(4), 5, At(10), absl::Seconds(10)).is_granted);
  EXPECT_FALSE(claims.Claim(KeyOf(4), 6, At(11), absl::Seconds(10)).is_granted);
  EXPECT_FALSE(claims.Claim(KeyOf(2), 6, At(11), absl::Seconds(10)).is_granted);
}

}  // namespace
}  // namespace pagetide
