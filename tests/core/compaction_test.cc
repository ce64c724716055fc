#include "core/compaction.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <random>

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

Extent E(uint64_t page, uint32_t first_slot, uint32_t count, uint64_t first_row,
         int32_t shift = 0) {
  return {PageId(page), first_slot, count, first_row, shift};
}

TEST(CompactionTest, SmallExtentsMoveTogetherAndDenseOnesStay) {
  PageTable table;
  table.Append(E(1, 0, 16, 0));  // canonical
  table.Append(E(2, 0, 3, 16));
  table.Append(E(2, 8, 4, 19));
  table.Append(E(3, 0, 2, 23));
  table.Append(E(4, 0, 14, 25));  // dense
  table.Append(E(5, 0, 2, 39));   // alone
  const auto runs = PlanCompaction(table, {16, 17, 1000, false});
  ASSERT_EQ(runs.size(), 1u);
  EXPECT_EQ(runs[0].first_row, 16u);
  EXPECT_EQ(runs[0].num_rows, 9u);
  const PageTable after = CompactedTable(table, runs, {PageId(9)}, true);
  EXPECT_THAT(after.extents(),
              ElementsAre(E(1, 0, 16, 0), E(9, 0, 9, 16), E(4, 0, 14, 25), E(5, 0, 2, 39)));
  EXPECT_THAT(PlanCompaction(after, {16, 17, 1000, false}), IsEmpty());
}

TEST(CompactionTest, ShiftsAreAppliedOrKeepRowsApart) {
  PageTable table;
  table.Append(E(1, 0, 2, 0, -1));
  table.Append(E(1, 2, 2, 2, -2));
  table.Append(E(1, 4, 2, 4, -3));
  EXPECT_THAT(PlanCompaction(table, {16, 0, 1000, false}), IsEmpty());
  const auto runs = PlanCompaction(table, {16, 0, 1000, true});
  ASSERT_EQ(runs.size(), 1u);
  EXPECT_THAT(CompactedTable(table, runs, {PageId(9)}, false).extents(),
              ElementsAre(E(9, 0, 6, 0)));
  // A dense page that is still to be turned moves as well.
  PageTable dense;
  dense.Append(E(1, 0, 16, 0, -450));
  ASSERT_EQ(PlanCompaction(dense, {16, 0, 1000, true}).size(), 1u);
  EXPECT_THAT(PlanCompaction(dense, {16, 0, 1000, false}), IsEmpty());
}

TEST(CompactionTest, WorkIsBoundedAndEndsWhenRepeated) {
  for (uint32_t seed = 0; seed < 50; ++seed) {
    std::mt19937 rng(seed);
    PageTable table;
    uint64_t row = 0;
    while (row < 2000) {
      const uint32_t count = 1 + rng() % 16;
      table.Append(
          E(1 + rng() % 50, rng() % (17 - count), count, row, static_cast<int32_t>(rng() % 3)));
      row += count;
    }
    const bool applies = seed % 2 == 0;
    uint64_t next_page = 1000;
    int calls = 0;
    for (;; ++calls) {
      const auto runs = PlanCompaction(table, {16, 0, 64, applies});
      if (runs.empty()) break;
      uint64_t moved = 0;
      std::vector<PageId> pages;
      for (const CompactionRun& run : runs) {
        ASSERT_LE(run.num_rows, 16u);
        moved += run.num_rows;
        pages.push_back(PageId(next_page++));
      }
      ASSERT_LE(moved, 64u);
      const size_t before = table.extents().size();
      PageTable after = CompactedTable(table, runs, pages, !applies);
      ASSERT_EQ(after.num_rows(), table.num_rows());
      ASSERT_LE(after.extents().size(), before);
      table = std::move(after);
      ASSERT_LT(calls, 1000) << "seed " << seed;
    }
    if (!applies) continue;
    for (const Extent& extent : table.extents()) ASSERT_EQ(extent.shift, 0);
    // No two neighbours that are not dense would fit one page.
    for (size_t i = 1; i < table.extents().size(); ++i) {
      const uint32_t a = table.extents()[i - 1].count, b = table.extents()[i].count;
      if (a < 12 && b < 12) {
        ASSERT_GT(a + b, 16u) << "seed " << seed;
      }
    }
  }
}

}  // namespace
}  // namespace pagetide
