// Where the next rows of a sequence go, and what is copied for them.
#include "core/sequence_pages.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <numeric>
#include <vector>

#include "tests/core/sequence_world.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::SizeIs;

constexpr uint32_t kPageTokens = 8;
constexpr uint32_t kChunk = 12;  // ends inside a page, and where one does
constexpr uint32_t kChunkedGroup = 1;

std::vector<uint32_t> Iota(uint32_t count) {
  std::vector<uint32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

// Full attention and a chunked window. Sequence 1 has `num_rows` rows; 2 has none.
class TailPlanTest : public ::testing::Test {
 protected:
  void Fill(uint32_t num_rows) {
    world_.Open(1);
    world_.Open(2);
    world_.Append(1, Iota(num_rows), 1, &next_copy_);
  }
  template <typename Fn>
  void Do(Fn fn) {
    SequenceEditor editor = world_.Edit();
    const absl::StatusOr<EditOutcome> outcome = fn(editor);
    ASSERT_TRUE(outcome.ok()) << outcome.status();
    world_.Adopt(editor);
  }
  // Sequence 2 gets the rows of 1, and those in front of `begin` go behind the others, to the end
  // of chunk `end`. The chunked group gave them up: it holds rows in front of the end of the
  // sequence, which no later token sees, and none at its end.
  void CopyAndMoveToTheEndOfAChunk(int64_t begin, int64_t end) {
    Do([](SequenceEditor& editor) { return editor.CopyRange(1, 2, {}, false); });
    Do([&](SequenceEditor& editor) {
      return editor.ShiftPositions(2, {0, begin}, end - begin, OnShared::kCopy, false);
    });
    ASSERT_LT(Table(2).num_rows(), world_.Rows(2).num_rows());
    ASSERT_FALSE(Table(2).empty());
  }
  const PageTable& Table(uint64_t number) { return world_.Rows(number).tables[kChunkedGroup]; }
  TailPlan Plan(uint64_t number) {
    const SequenceRows& rows = world_.Rows(number);
    return PlanTail(rows.tables[kChunkedGroup], world_.pages(), kPageTokens, rows.num_rows(),
                    rows.is_next_canonical());
  }
  // What the chunked group holds of a sequence, by the writes that made it.
  std::vector<uint64_t> Held(uint64_t number) {
    std::vector<uint64_t> contents;
    for (const Extent& extent : Table(number).extents()) {
      for (uint32_t slot = extent.first_slot; slot < extent.end_slot(); ++slot) {
        contents.push_back(world_.At(extent.page, slot).content);
      }
    }
    return contents;
  }

  SequenceWorld world_{
      {.page_tokens = kPageTokens,
       .groups = {GroupTraits{}, GroupTraits{.window = LayerGroupSpec::WindowType::kChunked,
                                             .window_tokens = kChunk}},
       .gives_up_masked = true}};
  uint64_t next_copy_ = 1000;
};

// Rows 8 to 13 lie in a tail that both sequences reference. New rows of 1 follow them, and take a
// copy; those of 2 follow rows that were given up, and once took one too.
TEST_F(TailPlanTest, OfASharedTailOnlyRowsThatTheNewOnesFollowAreCopied) {
  Fill(14);
  CopyAndMoveToTheEndOfAChunk(8, 24);
  const PageId tail = Table(2).back().page;
  EXPECT_THAT(Table(2).extents(), ElementsAre(Extent{tail, 0, 6, 0}));
  ASSERT_EQ(Table(1).back().page, tail);

  const TailPlan followed = Plan(1);
  EXPECT_EQ(followed.kind, TailPlan::Kind::kCopy);
  EXPECT_EQ(followed.num_copied_rows(), 6u);
  const TailPlan plan = Plan(2);
  EXPECT_EQ(plan.kind, TailPlan::Kind::kNewPage);
  EXPECT_EQ(plan.rows, 0u);
  EXPECT_THAT(plan.copies, IsEmpty());

  EXPECT_THAT(world_.Append(2, Iota(3), 100, &next_copy_)[kChunkedGroup], IsEmpty());
  EXPECT_THAT(Held(2), ElementsAre(100, 101, 102));
  EXPECT_EQ(Table(2).back().first_row, 14u);
  EXPECT_EQ(Table(2).back().first_slot, 0u);
  EXPECT_THAT(Held(1), ElementsAre(9, 10, 11, 12, 13, 14));
  EXPECT_EQ(world_.pages().Find(tail)->refs(), 1u);
  world_.pages().CheckInvariants();
}

TEST_F(TailPlanTest, ATailOfOnesOwnIsNotGoneOnInBehindRowsThatWereGivenUp) {
  Fill(14);
  CopyAndMoveToTheEndOfAChunk(8, 24);
  world_.Close(1);
  const PageId tail = Table(2).back().page;
  ASSERT_EQ(world_.pages().Find(tail)->refs(), 1u);
  EXPECT_EQ(Plan(2).kind, TailPlan::Kind::kNewPage);
  EXPECT_THAT(world_.Append(2, Iota(3), 100, &next_copy_)[kChunkedGroup], IsEmpty());
  EXPECT_THAT(Held(2), ElementsAre(100, 101, 102));
  EXPECT_EQ(world_.pages().Find(tail), nullptr);  // given up with the last of its rows
  world_.pages().CheckInvariants();
}

TEST_F(TailPlanTest, OfAFullPageNothingIsCopiedBehindRowsThatWereGivenUp) {
  Fill(16);
  // Row 15 is cut off, so that the others would fit a page with room behind them.
  Do([](SequenceEditor& editor) { return editor.Rewind(1, 15); });
  CopyAndMoveToTheEndOfAChunk(8, 24);
  ASSERT_TRUE(world_.pages().Find(Table(2).back().page)->is_full());
  EXPECT_EQ(Plan(1).kind, TailPlan::Kind::kCopy);
  EXPECT_EQ(Plan(2).kind, TailPlan::Kind::kNewPage);
  EXPECT_THAT(world_.Append(2, Iota(9), 100, &next_copy_)[kChunkedGroup], IsEmpty());
  EXPECT_THAT(Held(2), SizeIs(9));
  world_.pages().CheckInvariants();
}

TEST_F(TailPlanTest, ACanonicalRowBehindRowsThatWereGivenUpGoesToTheSlotOfItsIndex) {
  Fill(30);
  Do([](SequenceEditor& editor) { return editor.Rewind(1, kChunk); });
  ASSERT_TRUE(world_.Rows(1).is_canonical());
  ASSERT_TRUE(Table(1).empty());
  const TailPlan plan = Plan(1);
  EXPECT_EQ(plan.kind, TailPlan::Kind::kNewPage);
  EXPECT_EQ(plan.rows, kChunk % kPageTokens);
  world_.Append(1, Iota(6), 100, &next_copy_);
  EXPECT_THAT(Held(1), ElementsAre(100, 101, 102, 103, 104, 105));
  EXPECT_EQ(Table(1).extents().front().first_slot, kChunk % kPageTokens);
  EXPECT_EQ(Table(1).back().first_slot, 0u);  // its page can have a key
}

}  // namespace
}  // namespace pagetide
