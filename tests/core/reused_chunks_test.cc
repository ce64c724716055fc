// Which runs of saved tokens a prompt can reuse elsewhere, and what their rows become.
#include "core/reused_chunks.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <vector>

#include "absl/strings/numbers.h"
#include "base/error_info.h"

namespace pagetide {

// For the messages of failed expectations.
static std::ostream& operator<<(std::ostream& out, const ReusedChunk& chunk) {
  return out << "{" << chunk.session_begin << ", " << chunk.prompt_begin << ", " << chunk.count
             << "}";
}

namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

using Ids = std::vector<uint32_t>;

std::vector<ReusedChunk> Find(const Ids& session, const Ids& prompt, uint64_t begin,
                              uint64_t min_tokens) {
  return FindChunks({session, {}}, {prompt, {}}, begin, min_tokens);
}

TEST(ReusedChunksTest, NoneWhereNothingComesNext) {
  EXPECT_THAT(Find({1, 2, 3, 4}, {1, 2, 9, 3, 4}, 2, 1), IsEmpty());  // 9 is nowhere
  EXPECT_THAT(Find({1, 2}, {1, 2, 3}, 2, 1), IsEmpty());              // the session ends
  EXPECT_THAT(Find({1, 2, 3}, {1, 2}, 2, 1), IsEmpty());              // the prompt ends
  EXPECT_THAT(Find({}, {}, 0, 1), IsEmpty());
  EXPECT_THAT(Find({1, 8, 2, 3}, {1, 2, 3}, 1, 3), IsEmpty());  // less than 3 are left
}

TEST(ReusedChunksTest, ChunksStandBehindOneAnotherInThePrompt) {
  //                0  1  2  3  4  5  6  7  8  9 10
  const Ids saved = {1, 2, 7, 7, 3, 4, 5, 8, 9, 9, 6};
  EXPECT_THAT(Find(saved, {1, 2, 3, 4, 5, 9, 9, 6, 0}, 2, 3),
              ElementsAre(ReusedChunk{4, 2, 3}, ReusedChunk{8, 5, 3}));
  // The walk does not come back: 7, 7 stands in front of the first chunk.
  EXPECT_THAT(Find(saved, {1, 2, 3, 4, 5, 7, 7}, 2, 2), ElementsAre(ReusedChunk{4, 2, 3}));
  // Shorter than asked for.
  EXPECT_THAT(Find(saved, {1, 2, 3, 4, 0}, 2, 3), IsEmpty());
  EXPECT_THAT(Find(saved, {1, 2, 3, 4, 0}, 2, 2), ElementsAre(ReusedChunk{4, 2, 2}));
}

TEST(ReusedChunksTest, OfRepeatsTheFirstIsTakenAndGoesAsFarAsItIsEqual) {
  EXPECT_THAT(Find({9, 1, 1, 2, 1, 1, 2, 3}, {1, 1, 2, 3}, 0, 3),
              ElementsAre(ReusedChunk{1, 0, 3}));
  EXPECT_THAT(Find({9, 1, 1, 2, 1, 1, 2, 3}, {1, 1, 2, 3}, 0, 4),
              ElementsAre(ReusedChunk{4, 0, 4}));
  // An overlap that a search without borders would skip.
  EXPECT_THAT(Find({9, 1, 1, 1, 2}, {1, 1, 2}, 0, 3), ElementsAre(ReusedChunk{2, 0, 3}));
  // Cut by the end of the prompt, and by that of the session.
  EXPECT_THAT(Find({9, 5, 5, 5, 5, 5}, {5, 5, 5}, 0, 1), ElementsAre(ReusedChunk{1, 0, 3}));
  EXPECT_THAT(Find({9, 5, 5}, {5, 5, 5}, 0, 1), ElementsAre(ReusedChunk{1, 0, 2}));
}

TEST(ReusedChunksTest, AnImageIsPartOfItsToken) {
  const Ids saved = {1, 2, 3, 7, 7, 4}, wanted = {1, 3, 7, 7, 4};
  const std::vector<PositionedInput> in_session = {{3, Sha256Of("a")}};
  const auto find = [&](const std::vector<PositionedInput>& in_prompt) {
    return FindChunks({saved, in_session}, {wanted, in_prompt}, 1, 1);
  };
  EXPECT_THAT(find({{2, Sha256Of("a")}}), ElementsAre(ReusedChunk{2, 1, 4}));
  EXPECT_THAT(find({{2, Sha256Of("b")}}), ElementsAre(ReusedChunk{2, 1, 1}));
  EXPECT_THAT(find({{3, Sha256Of("a")}}).front(), (ReusedChunk{2, 1, 1}));
  EXPECT_THAT(find({{2, Sha256Of("a")}, {2, Sha256Of("b")}}), ElementsAre(ReusedChunk{2, 1, 1}));
}

// llama.cpp's server, word for word.
std::vector<ReusedChunk> Walk(const Ids& session, const Ids& prompt, uint64_t begin,
                              uint64_t min_tokens) {
  std::vector<ReusedChunk> chunks;
  uint64_t from = begin, to = begin;
  while (from < session.size() && to < prompt.size()) {
    uint64_t match = 0;
    while (from + match < session.size() && to + match < prompt.size() &&
           session[from + match] == prompt[to + match]) {
      ++match;
    }
    if (match >= min_tokens) {
      chunks.push_back({from, to, match});
      from += match;
      to += match;
    } else {
      ++from;
    }
  }
  return chunks;
}

TEST(ReusedChunksTest, FindsWhatTheWalkFinds) {
  uint64_t seed = 20261122;
  if (const char* text = std::getenv("PAGETIDE_TEST_SEED")) {
    ASSERT_TRUE(absl::SimpleAtoi(text, &seed)) << text;
  }
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 random(seed);
  uint64_t num_chunks = 0;
  for (int i = 0; i < 5000; ++i) {
    const uint32_t vocabulary = 1 + random() % 4;
    const auto some = [&](uint64_t count) {
      Ids tokens(count);
      for (uint32_t& token : tokens) token = random() % vocabulary;
      return tokens;
    };
    const Ids session = some(random() % 60), prompt = some(random() % 40);
    const uint64_t begin =
        std::mismatch(session.begin(), session.end(), prompt.begin(), prompt.end()).first -
        session.begin();
    const uint64_t min_tokens = 1 + random() % 6;
    const std::vector<ReusedChunk> found = Find(session, prompt, begin, min_tokens);
    ASSERT_EQ(found, Walk(session, prompt, begin, min_tokens)) << "round " << i;
    num_chunks += found.size();
  }
  EXPECT_GT(num_chunks, 1000u);
}

// The walk would compare 2 * 10^10 pairs of these.
TEST(ReusedChunksTest, RepeatsCostNoMoreThanOtherTokens) {
  Ids session(400'000, 5), prompt(100'000, 5);
  prompt.back() = 6;
  EXPECT_THAT(Find(session, prompt, 0, prompt.size()), IsEmpty());
  session.back() = 6;
  EXPECT_THAT(Find(session, prompt, 0, prompt.size()),
              ElementsAre(ReusedChunk{300'000, 0, 100'000}));
}

TEST(ReusedChunksTest, AreBoundedInNumber) {
  Ids session, prompt;
  for (uint32_t i = 0; i < 2 * kMaxReusedChunks; ++i) {
    session.insert(session.end(), {i, 1'000'000});
    prompt.push_back(i);
  }
  const std::vector<ReusedChunk> chunks = Find(session, prompt, 1, 1);
  EXPECT_EQ(chunks.size(), kMaxReusedChunks);
  EXPECT_EQ(chunks.back(), (ReusedChunk{2 * kMaxReusedChunks, kMaxReusedChunks, 1}));
}

// 40 rows in pages of 16, of a group that turns.
SequenceRows SomeRows() {
  SequenceRows rows;
  rows.tables.resize(1);
  for (uint32_t row = 0; row < 40; ++row) rows.tokens.push_back(100 + row);
  for (uint32_t page = 0; page < 3; ++page) {
    rows.tables[0].Append({.page = PageId(page + 1),
                           .first_slot = 0,
                           .count = page < 2 ? 16u : 8u,
                           .first_row = uint64_t{page} * 16});
  }
  return rows;
}

TEST(ReusedChunksTest, RowsStandWhereThePromptHasThem) {
  const std::vector<ReusedChunk> chunks = {{10, 5, 4}, {20, 9, 15}};
  auto taken = TakeChunks({.page_tokens = 16, .groups = {{}}}, SomeRows(), chunks);
  ASSERT_TRUE(taken.ok()) << taken.status();
  EXPECT_EQ(taken->canonical_rows(), 5u);
  EXPECT_TRUE(taken->positions.empty());
  EXPECT_THAT(taken->tokens,
              ElementsAre(100, 101, 102, 103, 104, 110, 111, 112, 113, 120, 121, 122, 123, 124, 125,
                          126, 127, 128, 129, 130, 131, 132, 133, 134));
  const std::vector<Extent> expected = {{PageId(1), 0, 5, 0, 0},
                                        {PageId(1), 10, 4, 5, -5},
                                        {PageId(2), 4, 12, 9, -11},
                                        {PageId(3), 0, 3, 21, -11}};
  EXPECT_TRUE(std::equal(expected.begin(), expected.end(), taken->tables[0].extents().begin(),
                         taken->tables[0].extents().end()));
}

// As one removal and one shift a chunk, of groups that forget rows, too.
TEST(ReusedChunksTest, TakingIsWhatEditsOneByOneMakeOfTheRows) {
  class One final : public SequenceEditor::Sequences {
   public:
    explicit One(const SequenceRows* rows) : rows_(rows) {}
    const SequenceRows* Find(uint64_t) const override { return rows_; }
    void ForEach(absl::FunctionRef<void(uint64_t, const SequenceRows&)> fn) const override {
      fn(1, *rows_);
    }

   private:
    const SequenceRows* const rows_;
  };
  std::mt19937_64 random(20261122);
  uint64_t num_taken = 0, num_refused = 0;
  for (int i = 0; i < 2000; ++i) {
    GroupTraits traits;
    if (random() % 3 == 0) {
      traits.window = LayerGroupSpec::WindowType::kStandard;
      traits.window_tokens = static_cast<uint32_t>(8 + random() % 24);
    }
    const SequenceEditor::Options options{.page_tokens = 16, .groups = {traits}};
    SequenceRows rows = SomeRows();
    if (traits.forgets() && random() % 2 == 0) rows.DropMasked(options.groups);
    std::vector<ReusedChunk> chunks;
    uint64_t from = random() % 10, to = from;
    while (from < 40 && chunks.size() < 4) {
      from += random() % 8;
      const uint64_t count =
          std::min<uint64_t>(1 + random() % 9, 40 - std::min<uint64_t>(from, 40));
      if (count == 0) break;
      chunks.push_back({from, to, count});
      from += count;
      to += count;
    }
    if (chunks.empty()) continue;
    const One sequences(&rows);
    SequenceEditor editor(options, &sequences);
    const auto by_edits = [&]() -> absl::Status {
      const auto ended =
          editor.RemoveRange(1, {static_cast<int64_t>(chunks.back().session_end()), -1});
      if (!ended.ok()) return ended.status();
      for (const ReusedChunk& chunk : chunks) {
        const int64_t at = static_cast<int64_t>(chunk.session_begin);
        const int64_t wanted = static_cast<int64_t>(chunk.prompt_begin);
        const auto removed = editor.RemoveRange(1, {wanted, at});
        if (!removed.ok()) return removed.status();
        const auto shifted =
            editor.ShiftPositions(1, {at, at + static_cast<int64_t>(chunk.count)}, wanted - at,
                                  OnShared::kCopy, /*allow_overlap=*/false);
        if (!shifted.ok()) return shifted.status();
      }
      return absl::OkStatus();
    };
    const absl::Status edited = by_edits();
    const auto taken = TakeChunks(options, rows, chunks);
    // The edits may ask for rows on their way that the end does not need; never the other way
    // round.
    if (!taken.ok()) {
      EXPECT_EQ(GetReason(taken.status()), error_reason::kRowsReclaimed);
      EXPECT_FALSE(edited.ok()) << i;
      ++num_refused;
      continue;
    }
    if (!edited.ok()) continue;
    ++num_taken;
    const SequenceRows& expected = editor.Rows(1);
    EXPECT_EQ(taken->tokens, expected.tokens);
    EXPECT_EQ(taken->positions, expected.positions);
    EXPECT_EQ(taken->canonical_rows(), expected.canonical_rows());
    const auto a = taken->tables[0].extents(), b = expected.tables[0].extents();
    EXPECT_TRUE(std::equal(a.begin(), a.end(), b.begin(), b.end())) << i;
  }
  EXPECT_GT(num_taken, 1000u);
  EXPECT_GT(num_refused, 50u);
}

TEST(ReusedChunksTest, WhatCannotMoveOrBeCutIsRefused) {
  const std::vector<ReusedChunk> chunk = {{10, 5, 30}};
  const auto reason = [&](const GroupTraits& traits) {
    return GetReason(
        TakeChunks({.page_tokens = 16, .groups = {traits}}, SomeRows(), chunk).status());
  };
  EXPECT_EQ(reason({}), "");
  EXPECT_EQ(reason({.can_shift = false}), error_reason::kCannotShift);
  EXPECT_EQ(reason({.is_whole = true}), error_reason::kCannotCut);
  // At its own place nothing moves.
  const std::vector<ReusedChunk> unmoved = {{5, 5, 35}};
  SequenceRows rows = SomeRows();
  rows.canonical_limit = 5;
  auto taken = TakeChunks({.page_tokens = 16, .groups = {{.can_shift = false}}}, rows, unmoved);
  ASSERT_TRUE(taken.ok()) << taken.status();
  EXPECT_EQ(taken->canonical_rows(), 5u);
  EXPECT_EQ(taken->num_rows(), 40u);
}

}  // namespace
}  // namespace pagetide
