#include "replay/live_content.h"

#include <set>
#include <vector>

#include "gtest/gtest.h"

namespace pagetide {
namespace {

Model MakeModel() {
  ModelSpec spec;
  spec.name = "live-content";
  spec.geometry.page_tokens = 4;
  LayerGroupSpec group;
  group.layers = {0, 1};
  group.kv_heads = 1;
  group.k_dim = group.v_dim = 6;  // rows of 12 bytes: not a multiple of the generator's 8
  spec.geometry.groups.push_back(group);
  return Model::Create(spec).value();
}

TraceRequest Request(std::vector<uint64_t> pages) {
  TraceRequest request;
  for (uint64_t page : pages) request.pages.push_back(PageId(page));
  return request;
}

std::vector<std::byte> Rows(const LiveContent& content, const LivePrompt& prompt, uint32_t layer,
                            RowKind kind, uint64_t first_token, size_t num_tokens) {
  std::vector<std::byte> rows(num_tokens * 12);
  content.FillRows(prompt, layer, kind, first_token, rows);
  return rows;
}

TEST(LiveContentTest, PagesOfTheTraceComeFirstThenTokensOfTheRequestsOwn) {
  const Model model = MakeModel();
  const LiveContent content(&model, 1);
  const LivePrompt a = content.MakePrompt(Request({7, 9}), 0, 3, 2);
  const LivePrompt b = content.MakePrompt(Request({7, 9}), 1, 3, 2);
  EXPECT_EQ(a.tokens.size(), 2 * 4 + 3 + 2u);
  EXPECT_EQ(a.prompt_tokens, 2 * 4 + 3u);
  EXPECT_EQ(a.trace_pages, 2u);
  EXPECT_EQ(a.row_seeds.size(), 4u);
  EXPECT_EQ(a.tokens[0], 7u);
  EXPECT_EQ(a.tokens[4], 9u);
  EXPECT_TRUE(std::equal(a.tokens.begin(), a.tokens.begin() + 8, b.tokens.begin()));
  EXPECT_NE(a.tokens[8], b.tokens[8]);
}

TEST(LiveContentTest, EqualPrefixesHaveEqualRowsAndNoOthersDo) {
  const Model model = MakeModel();
  const LiveContent content(&model, 1);
  const LivePrompt a = content.MakePrompt(Request({7, 9}), 0, 1, 0);
  const LivePrompt b = content.MakePrompt(Request({7, 8, 9}), 1, 1, 0);
  EXPECT_EQ(Rows(content, a, 0, RowKind::kK, 0, 4), Rows(content, b, 0, RowKind::kK, 0, 4));
  // The same page behind another one is another page.
  EXPECT_NE(a.row_seeds[1], b.row_seeds[2]);
  const LiveContent other(&model, 2);
  EXPECT_NE(other.MakePrompt(Request({7, 9}), 0, 1, 0).row_seeds[0], a.row_seeds[0]);
}

TEST(LiveContentTest, EveryRowOfASequenceIsDifferent) {
  const Model model = MakeModel();
  const LiveContent content(&model, 1);
  const LivePrompt prompt = content.MakePrompt(Request({1, 2, 3}), 0, 6, 0);
  std::set<std::vector<std::byte>> rows;
  for (uint32_t layer = 0; layer < 2; ++layer) {
    for (RowKind kind : {RowKind::kK, RowKind::kV}) {
      for (uint64_t token = 0; token < prompt.tokens.size(); ++token) {
        rows.insert(Rows(content, prompt, layer, kind, token, 1));
      }
    }
  }
  EXPECT_EQ(rows.size(), 2 * 2 * prompt.tokens.size());
}

TEST(LiveContentTest, CountsEveryWrongByteWhereverTheRunBegins) {
  const Model model = MakeModel();
  const LiveContent content(&model, 1);
  const LivePrompt prompt = content.MakePrompt(Request({1, 2, 3}), 0, 6, 0);
  std::vector<std::byte> rows = Rows(content, prompt, 1, RowKind::kV, 3, 7);
  EXPECT_EQ(content.CountWrongBytes(prompt, 1, RowKind::kV, 3, rows), 0u);
  rows[0] ^= std::byte{1};
  rows[83] ^= std::byte{0x80};
  EXPECT_EQ(content.CountWrongBytes(prompt, 1, RowKind::kV, 3, rows), 2u);
  EXPECT_GT(content.CountWrongBytes(prompt, 1, RowKind::kK, 3, rows), 40u);
}

}  // namespace
}  // namespace pagetide
