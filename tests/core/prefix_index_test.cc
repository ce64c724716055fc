#include "core/prefix_index.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <string>
#include <tuple>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using TokenList = std::vector<uint32_t>;

PrefixKey Key(absl::string_view name) {
  return {Sha256Of(name)};
}
PageId P(uint64_t n) {
  return PageId(n);
}
PrefixIndex::Tokens Shared(TokenList tokens) {
  return std::make_shared<const TokenList>(std::move(tokens));
}

class PrefixIndexTest : public testing::Test {
 protected:
  bool InsertKeyed(absl::string_view key, uint64_t page, TokenList tokens,
                   bool has_inputs = false) {
    return index_.InsertKeyed(Key(key), root_, P(page), Shared(std::move(tokens)), has_inputs);
  }
  void UpsertTail(uint64_t page, TokenList tokens, bool has_inputs = false) {
    index_.UpsertTail(root_, P(page), std::move(tokens), has_inputs);
  }
  // "page/common" or "none".
  std::string Longest(TokenList tokens, std::set<uint64_t> refused = {}) const {
    const auto match = index_.LongestPartial(
        root_, tokens, [&](PageId page) { return !refused.contains(page.value()); });
    return match ? absl::StrCat(match->page.value(), "/", match->common_tokens) : "none";
  }

  const PrefixKey root_ = Key("root");
  PrefixIndex index_;
};

TEST_F(PrefixIndexTest, FindsByKeyUntilErased) {
  EXPECT_TRUE(InsertKeyed("a", 1, {1, 2, 3, 4}));
  EXPECT_EQ(index_.FindKeyed(Key("a")), P(1));
  EXPECT_EQ(index_.FindKeyed(Key("b")), std::nullopt);
  EXPECT_EQ(index_.FindKeyed(root_), std::nullopt);
  index_.Erase(P(1));
  index_.Erase(P(1));
  EXPECT_EQ(index_.FindKeyed(Key("a")), std::nullopt);
  EXPECT_EQ(index_.size(), 0u);
  EXPECT_EQ(Longest({1, 2, 3}), "none");
}

TEST_F(PrefixIndexTest, ATakenKeyChangesNothing) {
  EXPECT_TRUE(InsertKeyed("a", 1, {1, 2, 3, 4}));
  EXPECT_FALSE(InsertKeyed("a", 2, {5, 6, 7, 8}));
  UpsertTail(3, {9, 9, 9});
  EXPECT_FALSE(InsertKeyed("a", 3, {9, 9, 9, 9}));
  EXPECT_EQ(index_.FindKeyed(Key("a")), P(1));
  EXPECT_EQ(Longest({5, 6}), "none");
  EXPECT_EQ(Longest({9, 9, 9, 9}), "3/3");
  EXPECT_EQ(index_.size(), 2u);
}

TEST_F(PrefixIndexTest, TheLongestRunIsBesideThePrompt) {
  InsertKeyed("a", 1, {1, 2, 3, 4});
  InsertKeyed("b", 2, {1, 2, 5, 6});
  InsertKeyed("c", 3, {7, 7, 7, 7});
  EXPECT_EQ(Longest({1, 2, 3, 9}), "1/3");
  EXPECT_EQ(Longest({1, 2, 5}), "2/3");
  EXPECT_EQ(Longest({7, 7, 7, 7, 7, 7}), "3/4");
  EXPECT_EQ(Longest({}), "none");
}

TEST_F(PrefixIndexTest, OneCommonTokenIsNoMatch) {
  InsertKeyed("a", 1, {1, 2, 3, 4});
  EXPECT_EQ(Longest({1, 9, 9}), "none");
  EXPECT_EQ(Longest({1}), "none");
  EXPECT_EQ(Longest({1, 2}), "1/2");
}

TEST_F(PrefixIndexTest, ChildrenOfAnotherParentDoNotMatch) {
  index_.InsertKeyed(Key("a"), Key("elsewhere"), P(1), Shared({1, 2, 3, 4}), false);
  EXPECT_EQ(Longest({1, 2, 3, 4}), "none");
}

TEST_F(PrefixIndexTest, ATailIsReplacedAsItGrows) {
  UpsertTail(1, {1, 2, 3});
  UpsertTail(1, {1, 2, 3, 4, 5});
  EXPECT_EQ(index_.size(), 1u);
  EXPECT_EQ(Longest({1, 2, 3, 4, 5, 6}), "1/5");
  UpsertTail(1, {8, 8});
  EXPECT_EQ(Longest({1, 2, 3}), "none");
}

TEST_F(PrefixIndexTest, ATailThatBecomesFullLeavesNoTailBehind) {
  UpsertTail(1, {1, 2, 3});
  EXPECT_TRUE(InsertKeyed("a", 1, {1, 2, 3, 4}));
  EXPECT_EQ(index_.size(), 1u);
  EXPECT_EQ(Longest({1, 2, 3}), "1/3");
  index_.Erase(P(1));
  EXPECT_EQ(Longest({1, 2, 3}), "none");
}

TEST_F(PrefixIndexTest, AKeyedPageThatTakesAnotherKeyLosesTheFirst) {
  EXPECT_TRUE(InsertKeyed("a", 1, {1, 2}));
  EXPECT_TRUE(InsertKeyed("b", 1, {3, 4}));
  EXPECT_EQ(index_.FindKeyed(Key("a")), std::nullopt);
  EXPECT_EQ(index_.FindKeyed(Key("b")), P(1));
  EXPECT_EQ(Longest({1, 2}), "none");
}

TEST_F(PrefixIndexTest, PagesWithInputsAreFoundByKeyOnly) {
  EXPECT_TRUE(InsertKeyed("image", 1, {1, 2, 3, 4}, /*has_inputs=*/true));
  UpsertTail(2, {1, 2, 3}, /*has_inputs=*/true);
  EXPECT_EQ(index_.FindKeyed(Key("image")), P(1));
  EXPECT_EQ(index_.size(), 2u);
  EXPECT_EQ(Longest({1, 2, 3, 4}), "none");
  index_.Erase(P(1));
  index_.Erase(P(2));
  EXPECT_EQ(index_.size(), 0u);
}

TEST_F(PrefixIndexTest, EqualRunsPreferKeyedPagesThenOlderOnes) {
  UpsertTail(1, {1, 2, 3});
  InsertKeyed("a", 9, {1, 2, 3, 5});
  EXPECT_EQ(Longest({1, 2, 3, 4}), "9/3");
  InsertKeyed("b", 4, {1, 2, 3, 3});
  EXPECT_EQ(Longest({1, 2, 3, 4}), "4/3");
}

TEST_F(PrefixIndexTest, OfTailsWithEqualTokensTheOlderWinsOnEitherSide) {
  for (uint64_t page : {7, 5, 6}) UpsertTail(page, {1, 2, 3});
  EXPECT_EQ(Longest({1, 2, 3, 4}), "5/3");
  EXPECT_EQ(Longest({1, 2}), "5/2");
  EXPECT_EQ(Longest({1, 2, 3, 4}, {5}), "6/3");
  EXPECT_EQ(Longest({1, 2}, {5, 6}), "7/2");
}

TEST_F(PrefixIndexTest, RefusedNeighboursArePassedButNotForEver) {
  for (uint64_t page = 1; page <= 20; ++page) UpsertTail(page, {1, 2, static_cast<uint32_t>(page)});
  EXPECT_EQ(Longest({1, 2, 1}, {1, 2, 3}), "4/2");
  std::set<uint64_t> all_but_last;
  for (uint64_t page = 1; page < 20; ++page) all_but_last.insert(page);
  int asked = 0;
  EXPECT_FALSE(index_.LongestPartial(root_, TokenList{1, 2, 10}, [&](PageId) {
    ++asked;
    return false;
  }));
  EXPECT_LE(asked, 16);
  EXPECT_EQ(Longest({1, 2, 1}, all_but_last), "none");
}

TEST_F(PrefixIndexTest, AsksFewPagesHoweverManyChildrenThereAre) {
  std::mt19937 rng(1);
  for (uint64_t page = 1; page <= 5000; ++page) {
    UpsertTail(page, {1, 2, static_cast<uint32_t>(rng()), static_cast<uint32_t>(rng())});
  }
  int asked = 0;
  ASSERT_TRUE(index_.LongestPartial(root_, TokenList{1, 2, 1u << 31, 5}, [&](PageId) {
    ++asked;
    return true;
  }));
  EXPECT_LE(asked, 2);
}

// The model is a list of entries that is searched whole.
TEST_F(PrefixIndexTest, AgreesWithANaiveModel) {
  struct Entry {
    std::string key;  // empty: tail
    std::string parent;
    TokenList tokens;
    bool has_inputs;
  };
  for (uint32_t seed = 0; seed < 30; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 rng(seed);
    PrefixIndex index;
    std::map<uint64_t, Entry> model;
    const auto random_tokens = [&] {
      TokenList tokens(rng() % 6);
      for (uint32_t& token : tokens) token = rng() % 3;
      return tokens;
    };
    const auto key_owner = [&](const std::string& key) {
      return std::find_if(model.begin(), model.end(),
                          [&](const auto& entry) { return entry.second.key == key; });
    };
    for (int step = 0; step < 1500; ++step) {
      const uint64_t page = 1 + rng() % 24;
      const std::string parent = absl::StrCat("parent", rng() % 3);
      const bool has_inputs = rng() % 8 == 0;
      const uint32_t action = rng() % 4;
      if (action == 0) {
        const std::string key = absl::StrCat("key", rng() % 30);
        const TokenList tokens = random_tokens();
        const bool is_free = key_owner(key) == model.end();
        ASSERT_EQ(index.InsertKeyed(Key(key), Key(parent), P(page), Shared(tokens), has_inputs),
                  is_free);
        if (is_free) model[page] = {key, parent, tokens, has_inputs};
      } else if (action == 1) {
        const TokenList tokens = random_tokens();
        index.UpsertTail(Key(parent), P(page), tokens, has_inputs);
        model[page] = {"", parent, tokens, has_inputs};
      } else if (action == 2) {
        index.Erase(P(page));
        model.erase(page);
      }
      ASSERT_EQ(index.size(), model.size());
      const std::string key = absl::StrCat("key", rng() % 30);
      const auto owner = key_owner(key);
      ASSERT_EQ(index.FindKeyed(Key(key)),
                owner == model.end() ? std::nullopt : std::optional(P(owner->first)));

      // Few enough are refused that the bound on refusals cannot hide the best.
      const TokenList prompt = random_tokens();
      std::set<uint64_t> refused;
      for (uint32_t i = rng() % 8; i > 0; --i) refused.insert(1 + rng() % 24);
      uint32_t longest = 1;
      std::map<uint64_t, uint32_t> common;
      for (const auto& [id, entry] : model) {
        if (entry.parent != parent || entry.has_inputs || refused.contains(id)) continue;
        uint32_t n = 0;
        while (n < prompt.size() && n < entry.tokens.size() && prompt[n] == entry.tokens[n]) ++n;
        common[id] = n;
        longest = std::max(longest, n);
      }
      const auto match = index.LongestPartial(
          Key(parent), prompt, [&](PageId p) { return !refused.contains(p.value()); });
      ASSERT_EQ(match.has_value(), longest >= 2);
      if (!match) continue;
      ASSERT_EQ(match->common_tokens, longest);
      ASSERT_EQ(common.at(match->page.value()), longest);
      const Entry& chosen = model.at(match->page.value());
      for (const auto& [id, n] : common) {
        if (model.at(id).tokens != chosen.tokens) continue;
        ASSERT_GE(std::tuple(model.at(id).key.empty(), id),
                  std::tuple(chosen.key.empty(), match->page.value()));
      }
    }
  }
}

}  // namespace
}  // namespace pagetide
