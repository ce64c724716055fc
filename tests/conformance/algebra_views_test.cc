// FEATURES B1, B4, B8 and B13 through the service: what is there, who holds it, and how it is cut,
// forked and forgotten.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <set>
#include <string>
#include <vector>

#include "tests/conformance/sequence_algebra.h"
#include "tests/support/timing.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Row;
using ::pagetide::testing::SequenceAlgebraTest;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;

class AlgebraViewsTest : public SequenceAlgebraTest {
 protected:
  v1::GetBlockTableResponse BlockTable(const v1::SequenceState& state) {
    TestContext context;
    v1::GetBlockTableRequest request;
    request.set_sequence_id(state.sequence_id());
    v1::GetBlockTableResponse table;
    EXPECT_TRUE(client_->sequences().GetBlockTable(&context, request, &table).ok());
    return table;
  }
  v1::DumpFramesResponse Frames(uint32_t group) {
    TestContext context;
    v1::DumpFramesRequest request;
    request.set_model_digest(model_->digest().ToHex());
    request.set_group(group);
    v1::DumpFramesResponse frames;
    EXPECT_TRUE(client_->admin().DumpFrames(&context, request, &frames).ok());
    return frames;
  }
};

TEST_F(AlgebraViewsTest, B1AClearedCacheIsFoundByNobody) {
  for (const bool zero_data : {false, true}) {
    std::vector<Row> rows;
    const auto s = Open(600, &rows, zero_data ? 3 : 1);
    const auto t = Open(256, nullptr, zero_data ? 4 : 2);
    ASSERT_OK(client_->Close(t));
    v1::ClearCacheRequest request;
    request.set_zero_data(zero_data);
    v1::ClearCacheResponse cleared;
    TestContext context;
    ASSERT_TRUE(client_->admin().ClearCache(&context, request, &cleared).ok());
    // t's, in both groups, and what s of the first round left; an open sequence keeps its own.
    EXPECT_EQ(cleared.dropped_pages(), zero_data ? 6 : 2);
    ExpectRows(s, rows);
    // A page on its way to the store keeps its frame until it is there.
    EXPECT_TRUE(testing::Eventually([&] {
      uint32_t in_use = 0;
      const auto frames = Frames(0);
      for (const auto& frame : frames.frames()) in_use += frame.state() != "free";
      return in_use == 3u;
    }));
    ASSERT_OK(client_->Close(s));
  }
}

TEST_F(AlgebraViewsTest, B4AForkSharesPagesAndIsCutOnItsOwn) {
  std::vector<Row> rows;
  const auto s = Open(600, &rows);
  auto fork = client_->Fork(s, 600);
  ASSERT_OK(fork);
  EXPECT_EQ(fork->shared_pages(), 4);  // two in each group
  EXPECT_EQ(fork->copied_rows(), 88);
  fork = client_->Fork(s, 300);
  ASSERT_OK(fork);
  EXPECT_EQ(fork->shared_pages(), 4);
  EXPECT_EQ(fork->copied_rows(), 0);  // of a full page, until the fork goes on behind them
  std::vector<Row> other(rows.begin(), rows.begin() + 300);
  ASSERT_OK(Append(fork->state(), TestTokens(7, 10), &other));
  ExpectRows(fork->state(), other);
  auto cut = client_->Rewind(fork->state(), 200);
  ASSERT_OK(cut);
  EXPECT_EQ(cut->removed_tokens(), 110);
  EXPECT_EQ(cut->state().length(), 200);
  EXPECT_EQ(cut->state().canonical_length(), 200);
  other.resize(200);
  ASSERT_OK(Append(fork->state(), TestTokens(8, 100), &other));
  ExpectRows(fork->state(), other);
  ExpectRows(s, rows);
}

TEST_F(AlgebraViewsTest, B8TheExtentOfEachGroup) {
  const auto s = Open();
  EXPECT_EQ(ExtentOf(s), "[-1, -1] 0; [-1, -1] 0; ");
  ASSERT_OK(Append(s, TestTokens(1, 20)));
  EXPECT_EQ(ExtentOf(s), "[0, 19] 20 contiguous; [0, 19] 20 contiguous; ");
  ASSERT_OK(Remove(s, 0, 4));
  EXPECT_EQ(ExtentOf(s), "[4, 19] 16 contiguous; [4, 19] 16 contiguous; ");
  ASSERT_OK(Remove(s, 9, 11));
  EXPECT_EQ(ExtentOf(s), "[4, 19] 14; [4, 19] 14; ");
  ASSERT_OK(Shift(s, 11, -1, 100));
  EXPECT_EQ(ExtentOf(s), "[4, 119] 14; [4, 119] 14; ");
  ASSERT_OK(Remove(s, 0, 100));
  EXPECT_EQ(ExtentOf(s), "[111, 119] 9 contiguous; [111, 119] 9 contiguous; ");
  ASSERT_OK(Clear(s, false));
  EXPECT_EQ(ExtentOf(s), "[-1, -1] 0; [-1, -1] 0; ");
}

TEST_F(AlgebraViewsTest, B13PageListsAndFramesAgree) {
  const auto s = Open(600);
  const auto t = Open();
  ASSERT_OK(Copy(s, t, 0, -1));
  ASSERT_OK(Remove(t, 100, 200));
  ASSERT_OK(Shift(t, 200, -1, -100));
  const uint64_t first_page = BlockTable(s).extents(0).page_id();
  const v1::GetBlockTableResponse table_of_t = BlockTable(t);
  for (const auto& extent : table_of_t.extents()) {
    EXPECT_EQ(extent.first_position(), extent.first_row());
    const bool is_turned = extent.group() == 0 && extent.first_row() >= 100;
    EXPECT_EQ(extent.pending_shift(), is_turned ? -100 : 0);
    // Its first page is cut in two extents.
    if (extent.group() > 0) continue;
    EXPECT_EQ(extent.references(), extent.page_id() == first_page ? 3 : 2);
  }
  // Every frame that a page list names holds that page; all others are free or of nobody.
  std::map<uint32_t, std::map<uint32_t, uint64_t>> expected;  // group → frame → page
  for (const auto& state : {s, t}) {
    const v1::GetBlockTableResponse table = BlockTable(state);
    for (const auto& extent : table.extents()) {
      ASSERT_TRUE(extent.has_frame());
      expected[extent.group()][extent.frame()] = extent.page_id();
    }
  }
  for (uint32_t g = 0; g < 2; ++g) {
    const v1::DumpFramesResponse frames = Frames(g);
    ASSERT_EQ(frames.frames_size(), 24);
    uint64_t found = 0;
    for (const auto& frame : frames.frames()) {
      const auto it = expected[g].find(frame.frame());
      if (it == expected[g].end()) {
        EXPECT_EQ(frame.state(), "free") << frame.ShortDebugString();
        continue;
      }
      ++found;
      EXPECT_EQ(frame.page_id(), it->second);
      EXPECT_GE(frame.references(), 2u);
      EXPECT_EQ(frame.rows(), frame.page_key().empty() ? 88 : 256);
    }
    EXPECT_EQ(found, expected[g].size());
    EXPECT_EQ(found, 3u);
  }
}

}  // namespace
}  // namespace pagetide
