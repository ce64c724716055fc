#include "core/page_table.h"

#include <algorithm>
#include <random>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

Extent E(uint64_t page, uint32_t first_slot, uint32_t count, uint64_t first_row) {
  return {PageId(page), first_slot, count, first_row};
}

// Pages 1, 2 and 3 of 256, 256 and 88 rows.
PageTable SixHundredRows() {
  PageTable table;
  table.Append(E(1, 0, 256, 0));
  table.Append(E(2, 0, 256, 256));
  table.Append(E(3, 0, 88, 512));
  return table;
}

TEST(PageTableTest, StartsEmpty) {
  PageTable table;
  EXPECT_TRUE(table.empty());
  EXPECT_EQ(table.num_rows(), 0u);
  EXPECT_THAT(table.Truncate(0), IsEmpty());
  EXPECT_THAT(table.Cover(0, 10), IsEmpty());
}

TEST(PageTableTest, GivesUpExtentsInFrontButNeverTheLast) {
  PageTable table = SixHundredRows();
  EXPECT_EQ(table.FirstGap(0, 600), 600u);
  EXPECT_THAT(table.DropFront(255), IsEmpty());
  EXPECT_THAT(table.DropFront(300), ElementsAre(PageId(1)));
  EXPECT_EQ(table.num_rows(), 600u);
  EXPECT_EQ(table.FirstGap(0, 600), 0u);
  EXPECT_EQ(table.FirstGap(256, 600), 600u);
  EXPECT_EQ(table.FirstGap(256, 900), 600u);
  EXPECT_EQ(table.FirstGap(7, 7), 7u);
  EXPECT_THAT(table.Cover(0, 300), ElementsAre(E(2, 0, 44, 256)));
  EXPECT_THAT(table.DropFront(10000), ElementsAre(PageId(2)));
  table.Append(E(4, 0, 5, 700));  // a gap
  EXPECT_EQ(table.FirstGap(512, 705), 600u);
  EXPECT_EQ(table.FirstGap(650, 705), 650u);
  EXPECT_EQ(table.FirstGap(700, 705), 705u);
}

TEST(PageTableTest, DropsWhatLiesWithinARangeAndKeepsWhatIsInFrontOfIt) {
  PageTable table;
  for (uint64_t page = 0; page < 5; ++page) table.Append(E(page + 1, 0, 10, page * 10));
  EXPECT_THAT(table.DropWithin(3, 29), ElementsAre(PageId(2)));  // 1 holds row 3, 3 holds row 29
  EXPECT_THAT(table.DropWithin(20, 30), ElementsAre(PageId(3)));
  EXPECT_EQ(table.FirstGap(0, 50), 10u);
  EXPECT_THAT(table.DropWithin(10, 1000), ElementsAre(PageId(4)));  // never the last
  EXPECT_EQ(table.num_rows(), 50u);
  EXPECT_TRUE(table.HasEnd(10));
  EXPECT_FALSE(table.HasEnd(20));
  EXPECT_FALSE(table.HasEnd(49));
  EXPECT_TRUE(table.HasEnd(50));
  EXPECT_FALSE(PageTable().HasEnd(0));
  EXPECT_THAT(PageTable().DropWithin(0, 5), IsEmpty());
}

TEST(PageTableTest, APageGivesWayToOneWithTheSameRows) {
  PageTable table = SixHundredRows();
  EXPECT_EQ(table.ReplacePage(PageId(2), PageId(7)), 1u);
  EXPECT_EQ(table.ReplacePage(PageId(2), PageId(8)), 0u);
  EXPECT_THAT(table.Cover(250, 260), ElementsAre(E(1, 250, 6, 250), E(7, 0, 4, 256)));
}

TEST(PageTableTest, TheLastExtentGrows) {
  PageTable table = SixHundredRows();
  table.mutable_back().count += 12;
  EXPECT_EQ(table.num_rows(), 612u);
  table.mutable_back().page = PageId(9);
  EXPECT_EQ(table.back(), E(9, 0, 100, 512));
}

TEST(PageTableTest, TruncatesInsideAPageAtItsEdgeAndToNothing) {
  PageTable table = SixHundredRows();
  EXPECT_THAT(table.Truncate(600), IsEmpty());
  EXPECT_THAT(table.Truncate(601), IsEmpty());
  EXPECT_THAT(table.Truncate(513), IsEmpty());
  EXPECT_EQ(table.num_rows(), 513u);
  EXPECT_THAT(table.Truncate(512), ElementsAre(PageId(3)));
  EXPECT_EQ(table.back(), E(2, 0, 256, 256));
  EXPECT_THAT(table.Truncate(0), ElementsAre(PageId(1), PageId(2)));
  EXPECT_TRUE(table.empty());
}

TEST(PageTableTest, CoverCutsTheOuterExtents) {
  const PageTable table = SixHundredRows();
  EXPECT_THAT(table.Cover(250, 520),
              ElementsAre(E(1, 250, 6, 250), E(2, 0, 256, 256), E(3, 0, 8, 512)));
  EXPECT_THAT(table.Cover(300, 301), ElementsAre(E(2, 44, 1, 300)));
  EXPECT_THAT(table.Cover(512, 9999), ElementsAre(E(3, 0, 88, 512)));
  EXPECT_THAT(table.Cover(256, 512), ElementsAre(E(2, 0, 256, 256)));
}

TEST(PageTableTest, AnEmptyOrBackwardRangeCoversNothing) {
  const PageTable table = SixHundredRows();
  EXPECT_THAT(table.Cover(10, 10), IsEmpty());
  EXPECT_THAT(table.Cover(10, 5), IsEmpty());
  EXPECT_THAT(table.Cover(600, 700), IsEmpty());
}

TEST(PageTableTest, CoverKeepsThePendingShift) {
  PageTable table;
  Extent shifted = E(1, 16, 100, 0);
  shifted.shift = -7;
  table.Append(shifted);
  shifted.first_slot = 26;
  shifted.first_row = 10;
  shifted.count = 20;
  EXPECT_THAT(table.Cover(10, 30), ElementsAre(shifted));
}

TEST(PageTableTest, ExtentsThatCarryOnAreJoined) {
  PageTable table;
  EXPECT_TRUE(table.Append(E(1, 4, 4, 0)));
  EXPECT_FALSE(table.Append(E(1, 8, 2, 4)));
  EXPECT_THAT(table.extents(), ElementsAre(E(1, 4, 6, 0)));
  EXPECT_TRUE(table.Append(E(1, 11, 2, 6)));  // a slot is left out
  EXPECT_TRUE(table.Append(E(2, 13, 2, 8)));  // another page
  Extent shifted = E(2, 15, 2, 10);
  shifted.shift = 1;
  EXPECT_TRUE(table.Append(shifted));
  EXPECT_EQ(table.NumExtentsOf(PageId(1)), 2u);
  EXPECT_EQ(table.NumExtentsOf(PageId(3)), 0u);
}

TEST(PageTableTest, RowsNoLongerNeededAreGaps) {
  PageTable table;
  table.Append(E(3, 0, 4, 8));
  EXPECT_TRUE(table.Append(E(3, 4, 4, 20)));
  EXPECT_EQ(table.num_rows(), 24u);
  EXPECT_THAT(table.Cover(0, 21), ElementsAre(E(3, 0, 4, 8), E(3, 4, 1, 20)));
  EXPECT_THAT(table.Truncate(10), ElementsAre(PageId(3)));
  EXPECT_THAT(table.extents(), ElementsAre(E(3, 0, 2, 8)));
  EXPECT_THAT(table.Truncate(4), ElementsAre(PageId(3)));
  EXPECT_TRUE(table.empty());
}

TEST(PageTableDeathTest, RowsTwiceAreABrokenInvariant) {
  PageTable table;
  table.Append(E(1, 0, 4, 0));
  EXPECT_DEATH(table.Append(E(2, 0, 4, 3)), "broken invariant");
  EXPECT_DEATH(table.Append(E(2, 0, 0, 4)), "broken invariant");
}

// The model lists each row as (page, slot).
TEST(PageTableTest, AgreesWithANaiveModel) {
  using Row = std::pair<PageId, uint32_t>;
  for (uint32_t seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 rng(seed);
    PageTable table;
    std::vector<Row> rows;
    uint64_t next_page = 1;
    for (int step = 0; step < 400; ++step) {
      const uint32_t action = rng() % 8;
      if (action < 3) {
        const Extent extent = E(next_page++, rng() % 5, 1 + rng() % 7, rows.size());
        table.Append(extent);
        for (uint32_t i = 0; i < extent.count; ++i) {
          rows.emplace_back(extent.page, extent.first_slot + i);
        }
      } else if (action < 5 && !table.empty()) {
        Extent& back = table.mutable_back();
        rows.emplace_back(back.page, back.first_slot + back.count);
        ++back.count;
      } else if (action == 5) {
        const uint64_t kept = rng() % (rows.size() + 3);
        std::vector<PageId> gone;
        for (uint64_t i = kept; i < rows.size(); ++i) {
          const auto is_same = [&](const Row& row) { return row.first == rows[i].first; };
          const bool is_kept = std::any_of(rows.begin(), rows.begin() + kept, is_same);
          if (!is_kept && (gone.empty() || gone.back() != rows[i].first)) {
            gone.push_back(rows[i].first);
          }
        }
        rows.resize(std::min<uint64_t>(kept, rows.size()));
        ASSERT_EQ(table.Truncate(kept), gone);
      }
      ASSERT_EQ(table.num_rows(), rows.size());
      ASSERT_EQ(table.empty(), rows.empty());
      const uint64_t begin = rng() % (rows.size() + 2);
      const uint64_t end = begin + rng() % (rows.size() + 2);
      uint64_t at = begin;
      for (const Extent& extent : table.Cover(begin, end)) {
        ASSERT_GT(extent.count, 0u);
        ASSERT_EQ(extent.first_row, at);
        for (uint32_t i = 0; i < extent.count; ++i, ++at) {
          ASSERT_LT(at, rows.size());
          ASSERT_EQ(rows[at], Row(extent.page, extent.first_slot + i));
        }
      }
      ASSERT_EQ(at, std::max(begin, std::min<uint64_t>(end, rows.size())));
    }
  }
}

}  // namespace
}  // namespace pagetide
