// FEATURES B1 to B8 through the service: what one edit does to ranges and positions.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/conformance/sequence_algebra.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Row;
using ::pagetide::testing::SequenceAlgebraTest;
using ::pagetide::testing::TestTokens;

TEST_F(SequenceAlgebraTest, B5RemoveThenShiftLeavesElevenRows) {
  std::vector<Row> rows;
  const auto s = Open(16, &rows);
  auto removed = Remove(s, 3, 8);
  ASSERT_OK(removed);
  EXPECT_EQ(removed->removed_rows(), 5);
  EXPECT_EQ(removed->state().canonical_length(), 3);
  EXPECT_EQ(removed->state().end_position(), 16);
  rows.erase(rows.begin() + 3, rows.begin() + 8);
  ExpectRows(s, rows);
  auto shifted = Shift(s, 8, -1, -5);
  ASSERT_OK(shifted);
  EXPECT_EQ(shifted->moved_rows(), 8);
  EXPECT_EQ(shifted->state().length(), 11);
  EXPECT_EQ(shifted->state().end_position(), 11);
  EXPECT_EQ(shifted->state().revision(), s.revision() + 2);
  EXPECT_EQ(ExtentOf(s), "[0, 10] 11 contiguous; [0, 10] 11 contiguous; ");
  for (size_t i = 3; i < rows.size(); ++i) rows[i].position -= 5;
  ExpectRows(s, rows);
}

TEST_F(SequenceAlgebraTest, B6DividesPositions) {
  std::vector<Row> rows;
  const auto s = Open(8, &rows);
  auto divided = Divide(s, 0, -1, 2);
  ASSERT_OK(divided);
  EXPECT_EQ(divided->moved_rows(), 7);
  EXPECT_EQ(ExtentOf(s), "[0, 3] 8; [0, 3] 8; ");
  for (Row& row : rows) row.position /= 2;
  ExpectRows(s, rows);
}

TEST_F(SequenceAlgebraTest, B7ShiftsAWindow) {
  std::vector<Row> rows;
  const auto s = Open(1000, &rows);
  auto shifted = Window(s, 100, [](auto& request) { request.set_fraction(0.5); });
  ASSERT_OK(shifted);
  EXPECT_EQ(shifted->removed_rows(), 450);
  EXPECT_EQ(shifted->moved_rows(), 450);
  EXPECT_EQ(ExtentOf(s), "[0, 549] 550 contiguous; [0, 549] 550 contiguous; ");
  rows.erase(rows.begin() + 100, rows.begin() + 550);
  for (size_t i = 100; i < rows.size(); ++i) rows[i].position -= 450;
  ExpectRows(s, rows);
  // Generation goes on behind it, and the next shift moves rows that were moved before.
  ASSERT_OK(Append(s, TestTokens(2, 60), &rows));
  ASSERT_OK(Window(s, 10, [](auto& request) { request.set_discard(200); }));
  rows.erase(rows.begin() + 10, rows.begin() + 210);
  for (size_t i = 10; i < rows.size(); ++i) rows[i].position -= 200;
  ExpectRows(s, rows);
}

TEST_F(SequenceAlgebraTest, B3CopiesShareTwoPagesAndATail) {
  std::vector<Row> rows;
  const auto s = Open(600, &rows);
  const auto t = Open();
  auto copied = Copy(s, t, 0, -1);
  ASSERT_OK(copied);
  EXPECT_EQ(copied->copied_rows(), 600);
  EXPECT_EQ(copied->to().num_pages(), 6);  // of two layer groups
  EXPECT_EQ(copied->to().canonical_length(), 600);
  std::vector<Row> own = rows, other = rows;
  ASSERT_OK(Append(t, TestTokens(7, 5), &other));
  ASSERT_OK(Append(s, TestTokens(8, 300), &own));
  ExpectRows(s, own);
  ExpectRows(t, other);
  ASSERT_OK(client_->Close(s));
  ExpectRows(t, other);
  EXPECT_EQ(Copy(t, t, 0, -1).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(SequenceAlgebraTest, B3PartialRangesOfSeveralSourcesMakeOneSequence) {
  std::vector<Row> a, b;
  const auto s = Open(600, &a, 1);
  const auto t = Open(500, &b, 2);
  const auto u = Open();
  ASSERT_OK(Copy(s, u, 100, 300));
  ASSERT_OK(Copy(t, u, 300, 450));
  ASSERT_OK(Copy(t, u, 0, 50));
  EXPECT_EQ(ExtentOf(u), "[0, 449] 400; [0, 449] 400; ");
  std::vector<Row> rows(b.begin(), b.begin() + 50);
  rows.insert(rows.end(), a.begin() + 100, a.begin() + 300);
  rows.insert(rows.end(), b.begin() + 300, b.begin() + 450);
  ExpectRows(u, rows);
  ASSERT_OK(Append(u, TestTokens(3, 20), &rows));
  ExpectRows(u, rows);
  ExpectRows(s, a);
  ExpectRows(t, b);
}

TEST_F(SequenceAlgebraTest, B2AnAbsentRangeIsZero) {
  const auto s = Open(20);
  const std::string before = DigestOf(s);
  auto removed = Remove(s, 20, 99);
  ASSERT_OK(removed);
  EXPECT_EQ(removed->removed_rows(), 0);
  EXPECT_EQ(removed->freed_pages(), 0);
  EXPECT_EQ(DigestOf(s), before);
  const auto empty = Open();
  EXPECT_EQ(ExtentOf(empty), "[-1, -1] 0; [-1, -1] 0; ");
}

TEST_F(SequenceAlgebraTest, B2FramesAreFreedWhenNoOwnerIsLeft) {
  const auto s = Open(600);
  const auto t = Open();
  ASSERT_OK(Copy(s, t, 0, -1));
  auto removed = Remove(s, 512, -1);
  ASSERT_OK(removed);
  EXPECT_EQ(removed->freed_pages(), 0);  // the tail still has an owner
  auto cleared = Clear(t, false);
  ASSERT_OK(cleared);
  EXPECT_EQ(cleared->removed_rows(), 600);
  EXPECT_EQ(cleared->freed_pages(), 2);  // the tail, in both groups
  cleared = Clear(s, false);
  ASSERT_OK(cleared);
  EXPECT_EQ(cleared->freed_pages(), 0);
  EXPECT_EQ(cleared->cached_pages(), 4);  // keyed: found by the next prompt
  auto again = client_->Open(TestTokens(1, 513));
  ASSERT_OK(again);
  EXPECT_EQ(again->reuse().reused_tokens(), 512);
}

TEST_F(SequenceAlgebraTest, B1ZeroDataLeavesNothingToBeFound) {
  const auto s = Open(600);
  auto cleared = Clear(s, true);
  ASSERT_OK(cleared);
  EXPECT_EQ(cleared->removed_rows(), 600);
  EXPECT_EQ(cleared->freed_pages(), 6);
  EXPECT_EQ(cleared->cached_pages(), 0);
  EXPECT_EQ(cleared->state().length(), 0);
  std::vector<Row> rows;
  ASSERT_OK(Append(s, TestTokens(4, 20), &rows));
  ExpectRows(s, rows);
}

TEST_F(SequenceAlgebraTest, B4KeepOnlyClearsTheTenantsOthers) {
  std::vector<Row> rows;
  const auto a = Open(30, nullptr, 1);
  const auto b = Open(40, &rows, 2);
  const auto c = Open(0);
  auto kept = KeepOnly({b});
  ASSERT_OK(kept);
  EXPECT_EQ(kept->cleared_sequences(), 1);
  EXPECT_EQ(kept->removed_rows(), 30);
  ExpectRows(b, rows);
  ExpectRows(a, {});
  EXPECT_EQ(client_->Get(c.sequence_id())->revision(), c.revision());
}

TEST_F(SequenceAlgebraTest, B5SharedRowsStayMoveOrRefuse) {
  for (const v1::OnShared on_shared :
       {v1::ON_SHARED_COPY_ON_WRITE, v1::ON_SHARED_MOVE_ALL, v1::ON_SHARED_REJECT}) {
    std::vector<Row> rows;
    const auto s = Open(300, &rows);
    const auto t = Open();
    ASSERT_OK(Copy(s, t, 0, 280));
    std::vector<Row> other(rows.begin(), rows.begin() + 280);
    const std::string before = DigestOf(s) + DigestOf(t);
    auto shifted = Shift(s, 200, -1, 1000, on_shared);
    if (on_shared == v1::ON_SHARED_REJECT) {
      EXPECT_EQ(GetReason(shifted.status()), "ROWS_SHARED");
      EXPECT_EQ(DigestOf(s) + DigestOf(t), before);
    } else {
      ASSERT_OK(shifted);
      const bool moves = on_shared == v1::ON_SHARED_MOVE_ALL;
      EXPECT_EQ(shifted->changed_sequences(), moves ? 1 : 0);
      for (size_t i = 200; i < rows.size(); ++i) rows[i].position += 1000;
      for (size_t i = 200; moves && i < other.size(); ++i) other[i].position += 1000;
      ExpectRows(s, rows);
      ExpectRows(t, other);
    }
    ASSERT_OK(client_->Close(s));
    ASSERT_OK(client_->Close(t));
  }
}

}  // namespace
}  // namespace pagetide
