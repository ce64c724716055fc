#include "core/region_allocator.h"

#include <algorithm>
#include <map>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

TEST(RegionAllocatorTest, TakesTheLowestRangeThatFits) {
  RegionAllocator arena(1024);
  EXPECT_EQ(arena.Allocate(100), 0u);  // takes 128
  EXPECT_EQ(arena.Allocate(64), 128u);
  EXPECT_EQ(arena.Allocate(1), 192u);
  ASSERT_TRUE(arena.Free(0).ok());
  EXPECT_EQ(arena.Allocate(200), 256u);
  EXPECT_EQ(arena.Allocate(64), 0u);
  EXPECT_EQ(arena.num_regions(), 4u);
}

TEST(RegionAllocatorTest, RefusesWhatDoesNotFit) {
  RegionAllocator arena(256);
  EXPECT_EQ(arena.Allocate(257), std::nullopt);
  EXPECT_EQ(arena.Allocate(~uint64_t{0}), std::nullopt);
  EXPECT_EQ(arena.Allocate(256), 0u);
  EXPECT_EQ(arena.Allocate(0), std::nullopt);
  EXPECT_EQ(arena.free_bytes(), 0u);
}

TEST(RegionAllocatorTest, ARegionOfNoBytesStillHasAnOffsetOfItsOwn) {
  RegionAllocator arena(128);
  EXPECT_EQ(arena.Allocate(0), 0u);
  EXPECT_EQ(arena.Allocate(0), 64u);
  EXPECT_EQ(arena.Allocate(0), std::nullopt);
}

TEST(RegionAllocatorTest, UsesWholeCacheLinesOnly) {
  RegionAllocator arena(127);
  EXPECT_EQ(arena.arena_bytes(), 64u);
  EXPECT_EQ(arena.Allocate(65), std::nullopt);
  EXPECT_EQ(RegionAllocator(63).Allocate(1), std::nullopt);
  EXPECT_EQ(RegionAllocator(0).Allocate(0), std::nullopt);
}

TEST(RegionAllocatorTest, MergesFreedNeighboursInAnyOrder) {
  std::vector<uint64_t> order = {0, 64, 128};
  do {
    RegionAllocator arena(192);
    for (int i = 0; i < 3; ++i) ASSERT_TRUE(arena.Allocate(64));
    for (uint64_t offset : order) ASSERT_TRUE(arena.Free(offset).ok());
    EXPECT_EQ(arena.num_free_ranges(), 1u);
    EXPECT_EQ(arena.Allocate(192), 0u);
  } while (std::next_permutation(order.begin(), order.end()));
}

TEST(RegionAllocatorTest, RefusesToFreeWhatIsNoRegion) {
  RegionAllocator arena(256);
  ASSERT_EQ(arena.Allocate(128), 0u);
  for (uint64_t offset : {64, 128, 1, 1 << 20}) {
    const absl::Status status = arena.Free(offset);
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(status.message()), testing::HasSubstr(absl::StrCat(offset)));
  }
  ASSERT_TRUE(arena.Free(0).ok());
  EXPECT_EQ(arena.Free(0).code(), absl::StatusCode::kFailedPrecondition);
}

// The model marks cache lines.
TEST(RegionAllocatorTest, AgreesWithANaiveModel) {
  for (uint32_t seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 rng(seed);
    const size_t num_lines = 1 + rng() % 60;
    RegionAllocator arena(num_lines * 64 + rng() % 64);
    std::vector<bool> is_used(num_lines, false);
    std::map<uint64_t, uint64_t> regions;  // offset → lines
    for (int step = 0; step < 1500; ++step) {
      if (rng() % 2 == 0) {
        const uint64_t num_bytes = rng() % (rng() % 4 == 0 ? num_lines * 80 : 400);
        const size_t lines = std::max<size_t>(1, (num_bytes + 63) / 64);
        std::optional<uint64_t> expected;
        for (size_t at = 0, run = 0; at < num_lines; ++at) {
          run = is_used[at] ? 0 : run + 1;
          if (run == lines) {
            expected = (at + 1 - lines) * 64;
            break;
          }
        }
        ASSERT_EQ(arena.Allocate(num_bytes), expected);
        if (!expected) continue;
        regions[*expected] = lines;
        for (size_t i = 0; i < lines; ++i) is_used[*expected / 64 + i] = true;
      } else {
        const uint64_t offset = rng() % (num_lines + 1) * 64;
        const auto region = regions.find(offset);
        ASSERT_EQ(arena.Free(offset).ok(), region != regions.end());
        if (region == regions.end()) continue;
        for (size_t i = 0; i < region->second; ++i) is_used[offset / 64 + i] = false;
        regions.erase(region);
      }
      size_t num_free = 0, num_ranges = 0;
      for (size_t at = 0; at < num_lines; ++at) {
        num_free += !is_used[at];
        num_ranges += !is_used[at] && (at == 0 || is_used[at - 1]);
      }
      ASSERT_EQ(arena.free_bytes(), num_free * 64);
      ASSERT_EQ(arena.num_free_ranges(), num_ranges);
      ASSERT_EQ(arena.num_regions(), regions.size());
    }
  }
}

}  // namespace
}  // namespace pagetide
