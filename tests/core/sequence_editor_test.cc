// Every number of FEATURES B that is the algebra's, on the editor alone.
#include "core/sequence_editor.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <limits>
#include <numeric>
#include <random>

#include "base/error_info.h"
#include "tests/core/sequence_world.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::ElementsAreArray;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

constexpr int64_t kInt64Min = std::numeric_limits<int64_t>::min();
constexpr int64_t kInt64Max = std::numeric_limits<int64_t>::max();

std::vector<uint32_t> Iota(uint32_t count) {
  std::vector<uint32_t> tokens(count);
  std::iota(tokens.begin(), tokens.end(), 0);
  return tokens;
}

std::vector<int64_t> PositionsOf(const SequenceRows& rows) {
  std::vector<int64_t> positions;
  for (uint64_t row = 0; row < rows.num_rows(); ++row) positions.push_back(rows.position(row));
  return positions;
}

// Sequence 1 has tokens 0, 1, 2, …
struct World : SequenceWorld {
  explicit World(uint32_t num_tokens, uint32_t page_tokens = 256)
      : World(num_tokens, Setup{.page_tokens = page_tokens}) {}
  World(uint32_t num_tokens, Setup setup) : SequenceWorld(std::move(setup)) {
    Open(1);
    Open(2);
    if (num_tokens > 0) Append(1, Iota(num_tokens), 1, &next_copy);
  }
  // Applies one edit as a transaction.
  template <typename Fn>
  absl::StatusOr<EditOutcome> Do(Fn fn) {
    SequenceEditor editor = Edit();
    absl::StatusOr<EditOutcome> outcome = fn(editor);
    if (outcome.ok()) dropped = Adopt(editor);
    return outcome;
  }
  uint64_t next_copy = 1000000;
  DroppedPages dropped;
};

TEST(SequenceEditorTest, RemovesAndShiftsTheCaseOfFeatures) {
  World world(16);
  auto removed = world.Do([](SequenceEditor& e) { return e.RemoveRange(1, {3, 8}); });
  EXPECT_EQ(removed->removed_rows, 5u);
  EXPECT_EQ(world.Rows(1).canonical_rows(), 3u);
  auto shifted = world.Do([](SequenceEditor& e) {
    return e.ShiftPositions(1, {8, -1}, -5, OnShared::kCopy, false);
  });
  EXPECT_EQ(shifted->moved_rows, 8u);
  const SequenceRows& rows = world.Rows(1);
  EXPECT_EQ(rows.num_rows(), 11u);
  EXPECT_EQ(rows.ExtentOf(0), (PositionExtent{0, 10, 11, true}));
  EXPECT_TRUE(rows.positions.empty());
  EXPECT_THAT(rows.tokens, ElementsAre(0, 1, 2, 8, 9, 10, 11, 12, 13, 14, 15));
  ASSERT_EQ(rows.tables[0].extents().size(), 2u);
  EXPECT_EQ(rows.tables[0].extents()[1].first_slot, 8u);
  EXPECT_EQ(rows.tables[0].extents()[1].shift, -5);
  EXPECT_EQ(rows.canonical_rows(), 3u);
}

TEST(SequenceEditorTest, DividesTheCaseOfFeatures) {
  World world(8);
  ASSERT_TRUE(world.Do([](SequenceEditor& e) {
                     return e.DividePositions(1, {0, -1}, 2, false);
                   })
                  .ok());
  EXPECT_THAT(PositionsOf(world.Rows(1)), ElementsAre(0, 0, 1, 1, 2, 2, 3, 3));
  // Rotation is new - old: row 7 goes back by 4.
  EXPECT_EQ(world.Rows(1).tables[0].back().shift, -4);
  EXPECT_EQ(world.Rows(1).ExtentOf(0), (PositionExtent{0, 3, 8, false}));
}

TEST(SequenceEditorTest, ShiftsAWindowTheCaseOfFeatures) {
  World world(1000);
  auto outcome = world.Do([](SequenceEditor& e) {
    return e.ShiftWindow(1, {.keep = 100, .discard = std::nullopt, .fraction = 0.5});
  });
  EXPECT_EQ(outcome->removed_rows, 450u);
  EXPECT_EQ(outcome->moved_rows, 450u);
  EXPECT_EQ(world.Rows(1).ExtentOf(0), (PositionExtent{0, 549, 550, true}));
  EXPECT_EQ(world.Rows(1).tokens[99], 99u);
  EXPECT_EQ(world.Rows(1).tokens[100], 550u);
  EXPECT_EQ(world.Rows(1).tables[0].back().shift, -450);
}

TEST(SequenceEditorTest, AWindowShiftTakesDiscardOrFractionWithinBounds) {
  World world(10);
  const auto shift = [&](WindowShift window) {
    return world.Do([&](SequenceEditor& e) { return e.ShiftWindow(1, window); });
  };
  EXPECT_THAT(shift({.keep = 2}).status().message(), HasSubstr("exactly one"));
  EXPECT_FALSE(shift({.keep = 2, .discard = 1, .fraction = 0.5}).ok());
  EXPECT_FALSE(shift({.keep = 11, .discard = 0}).ok());
  EXPECT_FALSE(shift({.keep = -1, .discard = 0}).ok());
  EXPECT_FALSE(shift({.keep = 2, .discard = 9}).ok());
  EXPECT_FALSE(shift({.keep = 2, .discard = -1}).ok());
  EXPECT_FALSE(shift({.keep = 2, .discard = {}, .fraction = 1.5}).ok());
  EXPECT_FALSE(shift({.keep = 2, .discard = {}, .fraction = std::nan("")}).ok());
  EXPECT_EQ(world.Rows(1).num_rows(), 10u);
  EXPECT_EQ(*shift({.keep = 2, .discard = 0}), EditOutcome{});
  // All behind `keep` is a truncation: still canonical, nothing shifted.
  EXPECT_EQ(shift({.keep = 2, .discard = {}, .fraction = 1.0})->removed_rows, 8u);
  EXPECT_TRUE(world.Rows(1).is_canonical());
}

TEST(SequenceEditorTest, CopiesTheCaseOfFeatures) {
  World world(600);
  auto copied = world.Do([](SequenceEditor& e) { return e.CopyRange(1, 2, {0, -1}, false); });
  EXPECT_EQ(copied->copied_rows, 600u);
  ASSERT_EQ(world.Rows(2).tables[0].extents().size(), 3u);
  for (const Extent& extent : world.Rows(2).tables[0].extents()) {
    EXPECT_EQ(world.pages().Find(extent.page)->refs(), 2u);
  }
  // All rows in order from an empty sequence on: a fork, and canonical like one.
  EXPECT_TRUE(world.Rows(2).is_canonical());
  EXPECT_EQ(world.Rows(2).keys.size(), 2u);

  const std::vector<uint32_t> more = {7, 8};
  EXPECT_EQ(world.Append(2, more, 5000, &world.next_copy)[0].size(), 88u);
  EXPECT_THAT(world.Append(1, more, 6000, &world.next_copy)[0], IsEmpty());
  EXPECT_EQ(world.At(world.Rows(1).tables[0].back().page, 88).content, 6000u);
  EXPECT_EQ(world.At(world.Rows(2).tables[0].back().page, 88).content, 5000u);
  EXPECT_NE(world.Rows(1).tables[0].back().page, world.Rows(2).tables[0].back().page);
}

TEST(SequenceEditorTest, PartialRangesAreCopiedAtTheirPositions) {
  World world(600);
  ASSERT_TRUE(world.Do([](SequenceEditor& e) {
                     return e.CopyRange(1, 2, {100, 300}, false);
                   })
                  .ok());
  EXPECT_EQ(world.Rows(2).ExtentOf(0), (PositionExtent{100, 299, 200, true}));
  EXPECT_EQ(world.Rows(2).canonical_rows(), 0u);
  // In front, inside and behind of what is there.
  ASSERT_TRUE(world.Do([](SequenceEditor& e) { return e.CopyRange(1, 2, {0, 50}, false); }).ok());
  EXPECT_EQ(world.Rows(2).num_rows(), 250u);
  EXPECT_EQ(world.Rows(2).position(49), 49);
  EXPECT_EQ(world.Rows(2).position(50), 100);
  EXPECT_EQ(world.Rows(2).canonical_rows(), 50u);
  auto refused = world.Do([](SequenceEditor& e) { return e.CopyRange(1, 2, {299, -1}, false); });
  EXPECT_EQ(GetReason(refused.status()), "POSITION_OCCUPIED");
  EXPECT_EQ(GetReasonMetadata(refused.status(), "position"), "299");
  EXPECT_EQ(world.Do([](SequenceEditor& e) {
                   return e.CopyRange(1, 2, {299, -1}, true);
                 })
                ->copied_rows,
            301u);
  auto self = world.Do([](SequenceEditor& e) { return e.CopyRange(1, 1, {0, -1}, true); });
  EXPECT_TRUE(absl::IsInvalidArgument(self.status()));
}

// Symptom: the target counted its own rows, behind a copied beginning, as canonical.
TEST(SequenceEditorTest, RowsBehindTheBeginningOfAnotherSequenceAreNotCanonical) {
  World world(10);
  const std::vector<uint32_t> own = {50, 51, 52, 53, 54};
  world.Append(2, own, 500, &world.next_copy);
  ASSERT_TRUE(world
                  .Do([](SequenceEditor& e) {
                    return e.ShiftPositions(2, {0, -1}, 20, OnShared::kCopy, false);
                  })
                  .ok());
  ASSERT_TRUE(world.Do([](SequenceEditor& e) { return e.CopyRange(1, 2, {0, 7}, false); }).ok());
  EXPECT_EQ(world.Rows(2).num_rows(), 12u);
  EXPECT_EQ(world.Rows(2).canonical_rows(), 7u);
}

TEST(SequenceEditorTest, AnAbsentRangeIsRemovedWithZero) {
  World world(10);
  EXPECT_EQ(*world.Do([](SequenceEditor& e) { return e.RemoveRange(1, {10, 99}); }), EditOutcome{});
  EXPECT_EQ(*world.Do([](SequenceEditor& e) { return e.RemoveRange(2, {0, -1}); }), EditOutcome{});
  EXPECT_EQ(*world.Do([](SequenceEditor& e) { return e.RemoveRange(1, {5, 5}); }), EditOutcome{});
  EXPECT_TRUE(
      absl::IsInvalidArgument(world.Do([](SequenceEditor& e) {
                                     return e.RemoveRange(1, {6, 5});
                                   })
                                  .status()));
  EXPECT_EQ(world.Rows(1).num_rows(), 10u);
}

TEST(SequenceEditorTest, NegativeBoundsMeanBeginAndEnd) {
  World world(10);
  EXPECT_EQ(world.Do([](SequenceEditor& e) {
                   return e.RemoveRange(1, {-7, 2});
                 })
                ->removed_rows,
            2u);
  EXPECT_EQ(world.Do([](SequenceEditor& e) {
                   return e.RemoveRange(1, {8, -3});
                 })
                ->removed_rows,
            2u);
  EXPECT_THAT(PositionsOf(world.Rows(1)), ElementsAre(2, 3, 4, 5, 6, 7));
}

TEST(SequenceEditorTest, TruncationKeepsCanonicityAndOtherEditsEndIt) {
  World world(20, 8);
  world.Do([](SequenceEditor& e) { return e.RemoveRange(1, {17, -1}); }).IgnoreError();
  EXPECT_TRUE(world.Rows(1).is_canonical());
  EXPECT_EQ(world.Rows(1).keys.size(), 2u);
  world.Do([](SequenceEditor& e) { return e.RemoveRange(1, {9, 10}); }).IgnoreError();
  EXPECT_EQ(world.Rows(1).canonical_rows(), 9u);
  EXPECT_EQ(world.Rows(1).keys.size(), 1u);
  // What is appended later gets no key, however full its page.
  const std::vector<uint32_t> more(16, 5);
  world.Append(1, more, 100, &world.next_copy);
  EXPECT_EQ(world.Rows(1).keys.size(), 1u);
  EXPECT_FALSE(world.pages().Find(world.Rows(1).tables[0].back().page)->is_keyed());
  // Cut back to rows that no edit touched: canonical again.
  world.Do([](SequenceEditor& e) { return e.Rewind(1, 9); }).IgnoreError();
  EXPECT_TRUE(world.Rows(1).is_canonical());
}

TEST(SequenceEditorTest, RewindAndClear) {
  World world(20, 8);
  for (int64_t bad : {int64_t{-1}, int64_t{21}, kInt64Min, kInt64Max}) {
    EXPECT_TRUE(absl::IsInvalidArgument(
        world.Do([&](SequenceEditor& e) { return e.Rewind(1, bad); }).status()));
  }
  EXPECT_EQ(*world.Do([](SequenceEditor& e) { return e.Rewind(1, 20); }), EditOutcome{});
  EXPECT_EQ(world.Do([](SequenceEditor& e) { return e.Rewind(1, 12); })->removed_rows, 8u);
  EXPECT_EQ(world.dropped.freed, 1u);  // the tail; the page of rows 8 to 15 is partly used
  EXPECT_EQ(world.Do([](SequenceEditor& e) { return e.Clear(1); })->removed_rows, 12u);
  EXPECT_EQ(world.dropped.freed, 0u);
  EXPECT_EQ(world.dropped.cached, 2u);  // keyed pages wait for the next prompt
  EXPECT_EQ(world.Rows(1).ExtentOf(0), PositionExtent{});
}

TEST(SequenceEditorTest, ShiftedRowsThatWouldStandInFrontOfZeroGo) {
  World world(10);
  auto outcome = world.Do([](SequenceEditor& e) {
    return e.ShiftPositions(1, {0, -1}, -4, OnShared::kCopy, false);
  });
  EXPECT_EQ(outcome->removed_rows, 4u);
  EXPECT_EQ(outcome->moved_rows, 6u);
  EXPECT_THAT(PositionsOf(world.Rows(1)), ElementsAre(0, 1, 2, 3, 4, 5));
  EXPECT_THAT(world.Rows(1).tokens, ElementsAre(4, 5, 6, 7, 8, 9));
}

TEST(SequenceEditorTest, AnOccupiedPositionIsRefusedUnlessAllowed) {
  World world(16);
  const auto shift = [&](bool allow) {
    return world.Do([&](SequenceEditor& e) {
      return e.ShiftPositions(1, {8, -1}, -5, OnShared::kCopy, allow);
    });
  };
  EXPECT_EQ(GetReason(shift(false).status()), "POSITION_OCCUPIED");
  EXPECT_EQ(world.Rows(1).num_rows(), 16u);
  ASSERT_TRUE(shift(true).ok());
  EXPECT_THAT(PositionsOf(world.Rows(1)),
              ElementsAre(0, 1, 2, 3, 3, 4, 4, 5, 5, 6, 6, 7, 7, 8, 9, 10));
  EXPECT_THAT(world.Rows(1).tokens,
              ElementsAre(0, 1, 2, 3, 8, 4, 9, 5, 10, 6, 11, 7, 12, 13, 14, 15));
}

TEST(SequenceEditorTest, RowsMayPassOthersAndAreOrderedByPosition) {
  World world(6);
  ASSERT_TRUE(world
                  .Do([](SequenceEditor& e) {
                    return e.ShiftPositions(1, {0, 2}, 10, OnShared::kCopy, false);
                  })
                  .ok());
  EXPECT_THAT(PositionsOf(world.Rows(1)), ElementsAre(2, 3, 4, 5, 10, 11));
  EXPECT_THAT(world.Rows(1).tokens, ElementsAre(2, 3, 4, 5, 0, 1));
  // The next token goes behind the last position, into the same page.
  const std::vector<uint32_t> more = {9};
  world.Append(1, more, 50, &world.next_copy);
  EXPECT_EQ(world.Rows(1).position(6), 12);
}

TEST(SequenceEditorTest, PositionsAtTheEdgeOf32Bits) {
  World world(4);
  const auto shift = [&](int64_t delta) {
    return world
        .Do([&](SequenceEditor& e) {
          return e.ShiftPositions(1, {0, -1}, delta, OnShared::kCopy, false);
        })
        .status();
  };
  for (int64_t bad : {kInt64Max, kInt64Min, int64_t{1} << 31, kMaxPosition, kMaxPosition - 2}) {
    EXPECT_TRUE(absl::IsInvalidArgument(shift(bad))) << bad;
  }
  ASSERT_TRUE(shift(kMaxPosition - 3).ok());
  EXPECT_EQ(world.Rows(1).ExtentOf(0), (PositionExtent{kMaxPosition - 3, kMaxPosition, 4, true}));
  EXPECT_EQ(world.Rows(1).end_position(), kMaxPosition + 1);
  EXPECT_TRUE(absl::IsInvalidArgument(shift(1)));
  ASSERT_TRUE(shift(-(kMaxPosition - 3)).ok());
  EXPECT_EQ(world.Rows(1).tables[0].extents()[0].shift, 0);
  EXPECT_EQ(world.Rows(1).canonical_rows(), 0u);  // once ended, canonicity does not come back
  ASSERT_TRUE(shift(-kMaxPosition).ok());
  EXPECT_EQ(world.Rows(1).num_rows(), 0u);
}

TEST(SequenceEditorTest, ADivisorBelowOneIsRefused) {
  World world(4);
  for (int64_t bad : {int64_t{0}, int64_t{-1}, kInt64Min}) {
    EXPECT_TRUE(absl::IsInvalidArgument(
        world.Do([&](SequenceEditor& e) {
               return e.DividePositions(1, {0, -1}, bad, true);
             })
            .status()));
  }
  EXPECT_EQ(*world.Do([](SequenceEditor& e) {
    return e.DividePositions(1, {0, -1}, 1, false);
  }),
            EditOutcome{});
  EXPECT_TRUE(world.Rows(1).is_canonical());
  ASSERT_TRUE(
      world.Do([](SequenceEditor& e) {
             return e.DividePositions(1, {0, -1}, kInt64Max, false);
           })
          .ok());
  EXPECT_THAT(PositionsOf(world.Rows(1)), ElementsAre(0, 0, 0, 0));
}

TEST(SequenceEditorTest, SharedRowsStayMoveOrRefuse) {
  for (const OnShared on_shared : {OnShared::kCopy, OnShared::kMoveAll, OnShared::kReject}) {
    World world(20, 8);
    ASSERT_TRUE(world.Do([](SequenceEditor& e) { return e.CopyRange(1, 2, {0, 12}, false); }).ok());
    auto outcome = world.Do([&](SequenceEditor& e) {
      return e.ShiftPositions(1, {10, -1}, 100, on_shared, false);
    });
    if (on_shared == OnShared::kReject) {
      EXPECT_EQ(GetReason(outcome.status()), "ROWS_SHARED");
      EXPECT_TRUE(world.Rows(1).is_canonical());
      continue;
    }
    ASSERT_TRUE(outcome.ok());
    const bool moves = on_shared == OnShared::kMoveAll;
    EXPECT_EQ(outcome->others_changed, moves ? 1u : 0u);
    EXPECT_EQ(outcome->moved_rows, moves ? 12u : 10u);
    EXPECT_EQ(world.Rows(2).position(11), moves ? 111 : 11);
    EXPECT_EQ(world.Rows(2).position(9), 9);
    EXPECT_EQ(world.Rows(2).canonical_rows(), moves ? 10u : 12u);
  }
}

TEST(SequenceEditorTest, MoveAllIsRefusedAsAWholeIfAnotherSequenceCannotMove) {
  World world(20, 8);
  world.Do([](SequenceEditor& e) { return e.CopyRange(1, 2, {0, 12}, false); }).IgnoreError();
  const std::vector<uint32_t> more = {50, 51};
  world.Append(2, more, 500, &world.next_copy);  // at 12 and 13, not shared
  auto refused = world.Do([](SequenceEditor& e) {
    return e.ShiftPositions(1, {10, -1}, 2, OnShared::kMoveAll, false);
  });
  // Rows 10 and 11 of sequence 2 were copied when it was appended to: they are its own now.
  EXPECT_TRUE(refused.ok());
  world.Do([](SequenceEditor& e) { return e.RemoveRange(2, {12, -1}); }).IgnoreError();
  refused = world.Do([](SequenceEditor& e) {
    return e.ShiftPositions(1, {6, 8}, 3, OnShared::kMoveAll, false);
  });
  EXPECT_EQ(GetReason(refused.status()), "POSITION_OCCUPIED");
  EXPECT_EQ(world.Rows(2).position(7), 7);
}

TEST(SequenceEditorTest, KeepOnlyClearsTheOthers) {
  World world(20, 8);
  world.Do([](SequenceEditor& e) { return e.CopyRange(1, 2, {0, -1}, false); }).IgnoreError();
  world.Open(3);
  const std::vector<uint64_t> kept = {2};
  auto outcome = world.Do([&](SequenceEditor& e) { return e.KeepOnly(kept); });
  EXPECT_EQ(outcome->removed_rows, 20u);
  EXPECT_EQ(outcome->others_changed, 1u);
  EXPECT_EQ(world.Rows(1).num_rows(), 0u);
  EXPECT_EQ(world.Rows(2).num_rows(), 20u);
  EXPECT_EQ(world.dropped.freed, 0u);
  EXPECT_FALSE(world.Do([](SequenceEditor& e) { return e.KeepOnly({}); }).ok());
}

TEST(SequenceEditorTest, ReorderIsAPermutationUnlessRepeatsAreAllowed) {
  World world(12, 8);
  const std::vector<uint32_t> other = {70, 71};
  world.Append(2, other, 900, &world.next_copy);
  const std::vector<uint64_t> both = {1, 2};
  const auto reorder = [&](std::vector<uint32_t> order, bool allow) {
    return world.Do([&](SequenceEditor& e) { return e.Reorder(both, order, allow); });
  };
  EXPECT_FALSE(reorder({0}, true).ok());
  EXPECT_FALSE(reorder({0, 2}, true).ok());
  EXPECT_FALSE(reorder({0, 0}, false).ok());
  EXPECT_EQ(*reorder({0, 1}, false), EditOutcome{});
  ASSERT_TRUE(reorder({1, 0}, false).ok());
  EXPECT_EQ(world.Rows(1).tokens, other);
  EXPECT_EQ(world.Rows(2).num_rows(), 12u);
  EXPECT_TRUE(world.Rows(2).is_canonical());
  ASSERT_TRUE(reorder({1, 1}, true).ok());
  EXPECT_EQ(world.Rows(1).num_rows(), 12u);
  const std::vector<uint64_t> twice = {1, 1};
  const std::vector<uint32_t> order = {0, 1};
  EXPECT_FALSE(world.Do([&](SequenceEditor& e) { return e.Reorder(twice, order, true); }).ok());
}

TEST(SequenceEditorTest, ATransactionIsWholeOrNothing) {
  World world(16);
  SequenceEditor editor = world.Edit();
  ASSERT_TRUE(editor.RemoveRange(1, {3, 8}).ok());
  ASSERT_TRUE(editor.ShiftPositions(1, {8, -1}, -5, OnShared::kCopy, false).ok());
  EXPECT_EQ(editor.Rows(1).num_rows(), 11u);
  EXPECT_FALSE(editor.Rewind(1, 12).ok());
  EXPECT_EQ(world.Rows(1).num_rows(), 16u);  // the editor goes, and with it all of it
}

TEST(SequenceEditorTest, AGroupThatCannotBeCutOrShiftedRefusesForAll) {
  SequenceWorld::Setup setup{.page_tokens = 8, .groups = std::vector<GroupTraits>(2)};
  setup.groups[1].can_shift = false;
  World packed(16, setup);
  EXPECT_EQ(GetReason(packed
                          .Do([](SequenceEditor& e) {
                            return e.ShiftPositions(1, {8, -1}, 5, OnShared::kCopy, false);
                          })
                          .status()),
            "CANNOT_SHIFT");
  EXPECT_EQ(
      GetReason(
          packed.Do([](SequenceEditor& e) { return e.ShiftWindow(1, {.keep = 1, .discard = 2}); })
              .status()),
      "CANNOT_SHIFT");
  EXPECT_EQ(
      GetReason(packed.Do([](SequenceEditor& e) {
                        return e.DividePositions(1, {0, -1}, 2, false);
                      })
                    .status()),
      "CANNOT_SHIFT");
  EXPECT_TRUE(packed.Do([](SequenceEditor& e) { return e.RemoveRange(1, {3, 4}); }).ok());

  setup.groups[1].is_whole = setup.groups[1].is_state = true;
  World recurrent(16, setup);
  auto refused = recurrent.Do([](SequenceEditor& e) { return e.RemoveRange(1, {3, 4}); });
  EXPECT_EQ(GetReason(refused.status()), "CANNOT_CUT");
  EXPECT_EQ(GetReasonMetadata(refused.status(), "group"), "1");
  EXPECT_EQ(GetReason(recurrent.Do([](SequenceEditor& e) { return e.Rewind(1, 3); }).status()),
            "CANNOT_CUT");
  EXPECT_TRUE(recurrent.Do([](SequenceEditor& e) {
                         return e.CopyRange(1, 2, {0, -1}, false);
                       })
                  .ok());
  EXPECT_TRUE(recurrent.Do([](SequenceEditor& e) { return e.Clear(1); }).ok());
}

TEST(SequenceEditorTest, WithoutRotationAMoveLeavesNoPendingShift) {
  SequenceWorld::Setup setup{.page_tokens = 8, .groups = std::vector<GroupTraits>(2)};
  setup.groups[1].rotates = false;
  World world(16, setup);
  ASSERT_TRUE(
      world.Do([](SequenceEditor& e) { return e.ShiftWindow(1, {.keep = 0, .discard = 4}); }).ok());
  EXPECT_EQ(world.Rows(1).tables[0].back().shift, -4);
  EXPECT_EQ(world.Rows(1).tables[1].back().shift, 0);
}

TEST(SequenceEditorTest, ShiftsAddUp) {
  World one(40, 8), two(40, 8);
  for (int64_t delta : {7, -3, 12}) {
    ASSERT_TRUE(one.Do([&](SequenceEditor& e) {
                     return e.ShiftPositions(1, {0, -1}, delta, OnShared::kCopy, false);
                   })
                    .ok());
  }
  ASSERT_TRUE(two.Do([](SequenceEditor& e) {
                   return e.ShiftPositions(1, {0, -1}, 16, OnShared::kCopy, false);
                 })
                  .ok());
  EXPECT_THAT(one.Rows(1).tables[0].extents(),
              ElementsAreArray(two.Rows(1).tables[0].extents().begin(),
                               two.Rows(1).tables[0].extents().end()));
  EXPECT_EQ(one.Rows(1).positions, two.Rows(1).positions);
}

TEST(SequenceEditorTest, WhatPartsOfAGroupMayBeCutAndShiftedFollowsFromItsGeometry) {
  LayerGroupSpec group;
  group.rope.style = RopeSpec::Style::kNeox;
  EXPECT_EQ(TraitsOf(group), (GroupTraits{.can_shift = true, .rotates = true}));
  group.basis = LayerGroupSpec::Basis::kHadamard;
  EXPECT_EQ(TraitsOf(group), (GroupTraits{.can_shift = false, .rotates = true}));
  group.rope.style = RopeSpec::Style::kNone;
  EXPECT_EQ(TraitsOf(group), (GroupTraits{.can_shift = true, .rotates = false}));
  group.packed_row_bytes = 656;
  EXPECT_EQ(TraitsOf(group), (GroupTraits{.can_shift = false, .rotates = false}));
  group.kind = LayerGroupSpec::Kind::kRecurrent;
  EXPECT_EQ(
      TraitsOf(group),
      (GroupTraits{.can_shift = false, .rotates = false, .is_whole = true, .is_state = true}));
  group.kind = LayerGroupSpec::Kind::kOpaque;
  EXPECT_EQ(TraitsOf(group), (GroupTraits{.can_shift = false, .rotates = false, .is_whole = true}));
}

bool IsMasked(const GroupTraits& traits, int64_t key, int64_t query) {
  const int64_t w = traits.window_tokens;
  switch (traits.window) {
    case LayerGroupSpec::WindowType::kNone:
      return false;
    case LayerGroupSpec::WindowType::kStandard:
      return query - key >= w;
    case LayerGroupSpec::WindowType::kChunked:
      return key < query / w * w;
    case LayerGroupSpec::WindowType::kSymmetric:
      return 2 * std::abs(query - key) > w;
    case LayerGroupSpec::WindowType::kRing:
      return key >= traits.keep_tokens && query - key >= w - traits.keep_tokens;
  }
  return false;
}

TEST(SequenceWindowTest, TheFirstVisiblePositionIsWhatTheMasksSay) {
  using WindowType = LayerGroupSpec::WindowType;
  for (const WindowType type :
       {WindowType::kNone, WindowType::kStandard, WindowType::kChunked, WindowType::kSymmetric}) {
    for (uint32_t w = 1; w < 9; ++w) {
      const GroupTraits traits{.window = type, .window_tokens = w};
      for (int64_t next = 0; next < 40; ++next) {
        int64_t first = 0;  // the first key that some query from `next` on sees
        const auto is_seen = [&](int64_t key) {
          for (int64_t query = next; query < next + 3 * w; ++query) {
            if (!IsMasked(traits, key, query)) return true;
          }
          return false;
        };
        while (first < next && !is_seen(first)) ++first;
        EXPECT_EQ(traits.FirstVisible(next), first)
            << static_cast<int>(type) << " " << w << " " << next;
      }
    }
  }
}

TEST(SequenceWindowTest, ARingKeepsItsFirstRowsAndTheNewest) {
  const GroupTraits ring{
      .window = LayerGroupSpec::WindowType::kRing, .window_tokens = 6, .keep_tokens = 2};
  World world(12, {.page_tokens = 1, .groups = {ring}});
  SequenceRows rows = world.Rows(1);
  // The next query, at 12, sees 0, 1 and from 9 on.
  EXPECT_EQ(rows.DropMasked(world.setup().groups).size(), 7u);
  EXPECT_EQ(rows.ExtentOf(0), (PositionExtent{0, 11, 5, false}));
  for (int64_t key = 0; key < 12; ++key) {
    EXPECT_EQ(rows.tables[0].FirstGap(key, key + 1) == static_cast<uint64_t>(key),
              IsMasked(ring, key, 12))
        << key;
  }
  EXPECT_EQ(rows.LackedAt(world.setup().groups, 12), std::nullopt);
  EXPECT_EQ(rows.LackedAt(world.setup().groups, 11)->row, 8u);
  EXPECT_EQ(rows.LackedAt(world.setup().groups, 2), std::nullopt);  // kept
  EXPECT_EQ(rows.LackedAt(world.setup().groups, 3)->row, 2u);
}

TEST(SequenceWindowTest, RowsBehindAWindowAreGivenUpAndMissedByWhatNeedsThem) {
  World world(
      10, {.page_tokens = 2,
           .groups = {GroupTraits{}, GroupTraits{.window = LayerGroupSpec::WindowType::kStandard,
                                                 .window_tokens = 4}}});
  SequenceRows rows = world.Rows(1);
  EXPECT_EQ(rows.LackedAt(world.setup().groups, 10), std::nullopt);
  EXPECT_EQ(rows.DropMasked(world.setup().groups).size(), 3u);  // of 0 to 5; 6 is in the page of 7
  EXPECT_EQ(rows.ExtentOf(0), (PositionExtent{0, 9, 10, true}));
  EXPECT_EQ(rows.ExtentOf(1), (PositionExtent{6, 9, 4, true}));
  EXPECT_EQ(rows.LackedAt(world.setup().groups, 10), std::nullopt);
  EXPECT_EQ(rows.LackedAt(world.setup().groups, 9), std::nullopt);  // sees 6, 7, 8
  ASSERT_TRUE(rows.LackedAt(world.setup().groups, 8));
  EXPECT_EQ(rows.LackedAt(world.setup().groups, 8)->group, 1u);
  EXPECT_EQ(rows.LackedAt(world.setup().groups, 8)->row, 5u);
  EXPECT_EQ(rows.LackedAt(world.setup().groups, 0), std::nullopt);
  struct One : SequenceEditor::Sequences {
    explicit One(const SequenceRows& r) : rows(r) {}
    const SequenceRows* Find(uint64_t) const override { return &rows; }
    void ForEach(absl::FunctionRef<void(uint64_t, const SequenceRows&)> fn) const override {
      fn(1, rows);
    }
    const SequenceRows& rows;
  } one(rows);
  const auto edit = [&] {
    return SequenceEditor({2, world.setup().groups, uint64_t{1} << 20}, &one);
  };
  EXPECT_TRUE(edit().Rewind(1, 9).ok());
  EXPECT_TRUE(edit().Rewind(1, 0).ok());
  EXPECT_EQ(GetReason(edit().Rewind(1, 8).status()), "ROWS_RECLAIMED");
  EXPECT_EQ(GetReason(edit().RemoveRange(1, {7, -1}).status()), "ROWS_RECLAIMED");
  EXPECT_TRUE(edit().RemoveRange(1, {0, 3}).ok());
  // Moved nearer to the end, rows in front of the gap would be seen again.
  EXPECT_EQ(GetReason(edit().RemoveRange(1, {6, 8}).status()), "");
  EXPECT_EQ(GetReason(edit().ShiftWindow(1, {.keep = 4, .discard = 4}).status()), "ROWS_RECLAIMED");
}

TEST(SequenceWindowTest, TheLongestUsablePrefixIsWhatTheMasksSay) {
  using WindowType = LayerGroupSpec::WindowType;
  std::mt19937 random(11);
  const auto pick = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
  uint64_t num_none = 0, num_part = 0, num_whole = 0;
  for (int round = 0; round < 3000; ++round) {
    SequenceRows sequence;
    sequence.tokens.resize(1 + pick(24));
    const uint64_t rows = sequence.num_rows();
    if (pick(3) == 0) {
      for (uint64_t row = 0, at = pick(3); row < rows; ++row, at += 1 + pick(2)) {
        sequence.positions.push_back(static_cast<int32_t>(at));
      }
    }
    std::vector<GroupTraits> groups(1 + pick(3));
    std::vector<std::vector<RowSpan>> held(groups.size());
    std::vector<std::vector<bool>> has(groups.size(), std::vector<bool>(rows, true));
    for (size_t g = 0; g < groups.size(); ++g) {
      groups[g].window = static_cast<WindowType>(pick(5));
      groups[g].window_tokens = 1 + pick(9);
      if (groups[g].window == WindowType::kRing)
        groups[g].keep_tokens = pick(groups[g].window_tokens);
      const uint32_t gaps = pick(4);
      for (uint32_t gap = 0; gap < gaps; ++gap) {
        const uint64_t from = pick(static_cast<uint32_t>(rows));
        const uint64_t to = std::min<uint64_t>(rows, from + 1 + pick(8));
        for (uint64_t row = from; row < to; ++row) has[g][row] = false;
      }
      for (uint64_t row = 0; row < rows; ++row) {
        if (!has[g][row]) continue;
        const bool goes_on = !held[g].empty() && held[g].back().end == row && pick(8) > 0;
        if (goes_on) {
          ++held[g].back().end;
        } else {
          held[g].push_back({row, row + 1});
        }
      }
    }
    const auto lacks = [&](size_t g, uint64_t length) {
      if (length == 0) return false;
      const int64_t next = sequence.position(length - 1) + 1;
      for (uint64_t row = 0; row < length; ++row) {
        bool is_seen = false;
        for (int64_t query = next; query < next + 30 && !is_seen; ++query) {
          is_seen = !IsMasked(groups[g], sequence.position(row), query);
        }
        if (is_seen && !has[g][row]) return true;
      }
      return false;
    };
    const auto is_usable = [&](uint64_t length) {
      for (size_t g = 0; g < groups.size(); ++g) {
        if (lacks(g, length)) return false;
      }
      return true;
    };
    uint64_t longest = rows;
    while (!is_usable(longest)) --longest;
    const UsablePrefix usable = sequence.LongestUsable(groups, held, rows);
    ASSERT_EQ(usable.rows, longest) << "round " << round;
    ASSERT_EQ(usable.lacked.has_value(), longest < rows);
    if (usable.lacked) {
      ASSERT_EQ(usable.lacked->row, longest);
      ASSERT_FALSE(has[usable.lacked->group][longest]);
    }
    ASSERT_EQ(sequence.LackedAt(groups, held, rows).has_value(), longest < rows);
    ++(longest == 0 ? num_none : longest < rows ? num_part : num_whole);
  }
  EXPECT_GT(num_none, 0u);
  EXPECT_GT(num_part, 0u);
  EXPECT_GT(num_whole, 0u);
}

}  // namespace
}  // namespace pagetide
