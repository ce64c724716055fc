#include "core/frame_pool.h"

#include <map>
#include <random>
#include <set>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

TEST(FramePoolTest, HandsOutEveryFrameButTheNullFrame) {
  FramePool pool(3);
  std::set<FrameId> frames;
  while (const auto grant = pool.Allocate("a")) {
    EXPECT_FALSE(grant->needs_zero);
    frames.insert(grant->frame);
  }
  EXPECT_THAT(frames, testing::ElementsAre(FrameId(1), FrameId(2), FrameId(3)));
  EXPECT_EQ(pool.num_free(), 0u);
  EXPECT_EQ(pool.num_frames(), 3u);
  EXPECT_FALSE(pool.IsFree(FrameId(2)));
}

TEST(FramePoolTest, AnEmptyPoolHandsOutNothing) {
  FramePool pool(0);
  EXPECT_FALSE(pool.Allocate("a").has_value());
}

TEST(FramePoolTest, RefusesAFrameReleasedTwiceOrUnknown) {
  FramePool pool(2);
  const FrameId frame = pool.Allocate("a")->frame;
  ASSERT_TRUE(pool.Release(frame).ok());
  const absl::Status twice = pool.Release(frame);
  EXPECT_EQ(twice.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(twice.message()), HasSubstr("2 of 2"));
  for (uint32_t unknown : {0u, 3u, ~0u}) {
    const absl::Status status = pool.Release(FrameId(unknown));
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << unknown;
    EXPECT_THAT(std::string(status.message()), HasSubstr("1 to 2"));
  }
  EXPECT_EQ(pool.num_free(), 2u);
}

TEST(FramePoolTest, AFrameThatChangesTenantsNeedsZeroing) {
  FramePool pool(1);
  const FrameId frame = pool.Allocate("a")->frame;
  ASSERT_TRUE(pool.Release(frame).ok());
  EXPECT_FALSE(pool.Allocate("a")->needs_zero);
  ASSERT_TRUE(pool.Release(frame).ok());
  EXPECT_TRUE(pool.Allocate("b")->needs_zero);
  pool.MarkClean(frame);
  ASSERT_TRUE(pool.Release(frame).ok());
  EXPECT_FALSE(pool.Allocate("b")->needs_zero);
}

// Tenant b was granted a's frame, failed before zeroing it and gave it back; b's next grant of it
// must not be taken for clean.
TEST(FramePoolTest, AGrantGivenBackWithoutZeroingStillNeedsIt) {
  FramePool pool(1);
  const FrameId frame = pool.Allocate("a")->frame;
  ASSERT_TRUE(pool.Release(frame).ok());
  EXPECT_TRUE(pool.Allocate("b")->needs_zero);
  ASSERT_TRUE(pool.Release(frame).ok());
  pool.MarkClean(frame);  // of a frame that nobody holds: says nothing
  EXPECT_TRUE(pool.Allocate("b")->needs_zero);
}

TEST(FramePoolTest, TheTenantTableStaysBounded) {
  FramePool pool(2);
  for (int i = 0; i < 1000; ++i) {
    const auto grant = pool.Allocate(absl::StrCat("tenant", i));
    ASSERT_TRUE(grant);
    EXPECT_EQ(grant->needs_zero, i > 0);
    ASSERT_TRUE(pool.Release(grant->frame).ok());
    EXPECT_LE(pool.num_tenants(), 2u);
  }
}

// The model keeps whose bytes each frame may hold: a set of names.
TEST(FramePoolTest, AgreesWithANaiveModel) {
  for (uint32_t seed = 0; seed < 20; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 rng(seed);
    const uint32_t num_frames = 1 + rng() % 9;
    FramePool pool(num_frames);
    std::map<FrameId, std::set<std::string>> bytes_of;
    std::map<FrameId, std::string> held;
    for (int step = 0; step < 2000; ++step) {
      if (rng() % 2 == 0) {
        const std::string tenant(1, static_cast<char>('a' + rng() % 5));
        const auto grant = pool.Allocate(tenant);
        ASSERT_EQ(grant.has_value(), held.size() < num_frames);
        if (!grant) continue;
        ASSERT_TRUE(held.emplace(grant->frame, tenant).second);
        ASSERT_GE(grant->frame.value(), 1u);
        ASSERT_LE(grant->frame.value(), num_frames);
        std::set<std::string>& bytes = bytes_of[grant->frame];
        bytes.insert(tenant);
        ASSERT_EQ(grant->needs_zero, bytes.size() > 1);
        if (rng() % 4 != 0) {
          bytes = {tenant};
          pool.MarkClean(grant->frame);
        }
      } else {
        const FrameId frame(rng() % (num_frames + 2));
        ASSERT_EQ(pool.Release(frame).ok(), held.erase(frame) == 1);
      }
      ASSERT_EQ(pool.num_free(), num_frames - held.size());
      for (uint32_t f = 0; f <= num_frames; ++f) {
        ASSERT_EQ(pool.IsFree(FrameId(f)), !held.contains(FrameId(f)));
      }
    }
  }
}

}  // namespace
}  // namespace pagetide
