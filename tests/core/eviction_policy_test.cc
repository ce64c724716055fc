#include "core/eviction_policy.h"

#include <algorithm>
#include <map>
#include <random>
#include <set>
#include <tuple>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

PageId P(uint64_t n) {
  return PageId(n);
}
bool Any(PageId) {
  return true;
}

// Inserts the chain first -> first+1 -> … of `n` pages.
void InsertChain(EvictionPolicy& policy, uint64_t first, uint64_t n) {
  for (uint64_t i = 0; i < n; ++i) {
    policy.OnInsert(P(first + i), i == 0 ? std::nullopt : std::optional(P(first + i - 1)));
  }
}

// FEATURES A11: a chain of 4 unreferenced pages of 256 tokens, 2 needed: the last 2 go, 512 tokens
// stay.
TEST(LeafFirstLruTest, EvictsTheLastTwoOfAChainOfFour) {
  LeafFirstLru policy;
  InsertChain(policy, 1, 4);
  const std::vector<PageId> victims = policy.PickVictims(2, Any);
  EXPECT_THAT(victims, ElementsAre(P(4), P(3)));
  for (PageId v : victims) policy.OnErase(v);
  EXPECT_EQ(policy.num_resident() * 256, 512u);
  EXPECT_THAT(policy.PickVictims(9, Any), ElementsAre(P(2), P(1)));
}

TEST(LeafFirstLruTest, PickingChangesNothing) {
  LeafFirstLru policy;
  InsertChain(policy, 1, 3);
  EXPECT_EQ(policy.PickVictims(3, Any), policy.PickVictims(3, Any));
  EXPECT_EQ(policy.num_resident(), 3u);
  EXPECT_THAT(policy.PickVictims(0, Any), IsEmpty());
}

TEST(LeafFirstLruTest, LeastRecentlyUsedChainGoesFirst) {
  LeafFirstLru policy;
  InsertChain(policy, 10, 2);
  InsertChain(policy, 20, 2);
  policy.OnTouch(P(10));
  policy.OnTouch(P(11));
  EXPECT_THAT(policy.PickVictims(3, Any), ElementsAre(P(21), P(20), P(11)));
}

// The parent was used before its other child: it is exposed only when both are gone.
TEST(LeafFirstLruTest, ForkKeepsTheSharedPageUntilBothBranchesAreGone) {
  LeafFirstLru policy;
  InsertChain(policy, 1, 2);
  policy.OnInsert(P(3), P(1));
  EXPECT_THAT(policy.PickVictims(9, Any), ElementsAre(P(2), P(3), P(1)));
}

TEST(LeafFirstLruTest, PinnedPageProtectsItsAncestors) {
  LeafFirstLru policy;
  InsertChain(policy, 1, 4);
  InsertChain(policy, 10, 1);
  policy.SetEvictable(P(3), false);
  EXPECT_THAT(policy.PickVictims(9, Any), ElementsAre(P(4), P(10)));
  policy.SetEvictable(P(3), true);
  EXPECT_THAT(policy.PickVictims(9, Any), ElementsAre(P(4), P(3), P(2), P(1), P(10)));
}

TEST(LeafFirstLruTest, AncestorsOfPinnedPagesGoWhenNothingElseCan) {
  LeafFirstLru policy;
  InsertChain(policy, 1, 4);
  InsertChain(policy, 10, 3);
  policy.OnInsert(P(20), P(11));
  EXPECT_THAT(policy.PickAncestors(9, Any), IsEmpty());
  policy.SetEvictable(P(3), false);
  EXPECT_THAT(policy.PickAncestors(9, Any), ElementsAre(P(2), P(1)));
  EXPECT_THAT(policy.PickAncestors(1, Any), ElementsAre(P(2)));
  EXPECT_THAT(policy.PickAncestors(9, [](PageId p) { return p != P(2); }), IsEmpty());
  policy.SetEvictable(P(12), false);
  EXPECT_THAT(policy.PickAncestors(9, Any), ElementsAre(P(2), P(1)));  // 20 goes before 11
  policy.SetEvictable(P(20), false);
  EXPECT_THAT(policy.PickAncestors(9, Any), ElementsAre(P(2), P(1), P(11), P(10)));
}

TEST(LeafFirstLruTest, RefusedPageProtectsItsAncestors) {
  LeafFirstLru policy;
  InsertChain(policy, 1, 3);
  InsertChain(policy, 10, 2);
  EXPECT_THAT(policy.PickVictims(9, [](PageId p) { return p != P(3); }), ElementsAre(P(11), P(10)));
}

TEST(LeafFirstLruTest, OrphansGoBeforeOlderReachablePages) {
  LeafFirstLru policy;
  InsertChain(policy, 10, 2);  // older than the orphans
  InsertChain(policy, 1, 4);
  policy.OnErase(P(2));  // quarantined: 3 and 4 can no longer be found by prefix
  EXPECT_THAT(policy.PickVictims(9, Any), ElementsAre(P(4), P(3), P(11), P(10), P(1)));
  policy.OnInsert(P(2), P(1));  // recomputed: the chain is whole again
  EXPECT_THAT(policy.PickVictims(2, Any), ElementsAre(P(11), P(10)));
}

TEST(LeafFirstLruTest, ChildInsertedBeforeItsParentIsAdopted) {
  LeafFirstLru policy;
  policy.OnInsert(P(3), P(2));
  policy.OnInsert(P(2), P(1));
  policy.OnInsert(P(9), std::nullopt);
  EXPECT_THAT(policy.PickVictims(1, Any), ElementsAre(P(3)));  // orphan
  policy.OnInsert(P(1), std::nullopt);
  EXPECT_THAT(policy.PickVictims(9, Any), ElementsAre(P(3), P(2), P(9), P(1)));
}

TEST(LeafFirstLruTest, CallsAboutAbsentPagesAreIgnored) {
  LeafFirstLru policy;
  policy.OnTouch(P(1));
  policy.OnErase(P(1));
  policy.SetEvictable(P(1), false);
  policy.OnInsert(P(2), P(1));
  policy.OnErase(P(1));  // named as a parent, never resident
  EXPECT_THAT(policy.PickVictims(9, Any), ElementsAre(P(2)));
  policy.OnErase(P(2));
  EXPECT_EQ(policy.num_resident(), 0u);
  EXPECT_THAT(policy.PickVictims(9, Any), IsEmpty());
}

// The definition, by brute force: repeat { among evictable pages without a resident child that is
// not a victim yet, take orphans first, then the least recently used }.
class NaiveModel {
 public:
  void Insert(PageId page, std::optional<PageId> parent) {
    if (!pages_.contains(page)) pages_[page] = {parent, true, 0};
    Touch(page);
  }
  void Touch(PageId page) {
    if (pages_.contains(page)) pages_[page].last_use = ++tick_;
  }
  void SetEvictable(PageId page, bool evictable) {
    if (pages_.contains(page)) pages_[page].is_evictable = evictable;
  }
  void Erase(PageId page) { pages_.erase(page); }
  bool Contains(PageId page) const { return pages_.contains(page); }
  size_t size() const { return pages_.size(); }

  std::vector<PageId> Pick(size_t n, EvictionPolicy::MayEvict may_evict) const {
    std::vector<PageId> victims;
    std::set<PageId> gone;
    while (victims.size() < n) {
      std::optional<std::tuple<bool, uint64_t, PageId>> best;
      for (const auto& [page, info] : pages_) {
        if (gone.contains(page) || !info.is_evictable || !may_evict(page)) continue;
        const bool has_child = std::any_of(pages_.begin(), pages_.end(), [&](const auto& other) {
          return other.second.parent == page && !gone.contains(other.first);
        });
        if (has_child) continue;
        const std::tuple rank(IsReachable(page), info.last_use, page);
        if (!best.has_value() || rank < *best) best = rank;
      }
      if (!best.has_value()) break;
      victims.push_back(std::get<2>(*best));
      gone.insert(victims.back());
    }
    return victims;
  }

 private:
  struct Info {
    std::optional<PageId> parent;
    bool is_evictable;
    uint64_t last_use;
  };
  bool IsReachable(PageId page) const {
    for (std::optional<PageId> p = page; p.has_value();) {
      const auto it = pages_.find(*p);
      if (it == pages_.end()) return false;
      p = it->second.parent;
    }
    return true;
  }
  std::map<PageId, Info> pages_;
  uint64_t tick_ = 0;
};

class LeafFirstLruRandomTest : public ::testing::TestWithParam<int> {};

TEST_P(LeafFirstLruRandomTest, AgreesWithTheNaiveModel) {
  std::mt19937_64 rng(GetParam());
  SCOPED_TRACE(::testing::Message() << "seed " << GetParam());
  constexpr uint64_t kNumPages = 24;
  // A fixed forest, since a page's parent never changes: page p hangs under a smaller one, or is a
  // root.
  std::vector<std::optional<PageId>> parent(kNumPages);
  for (uint64_t p = 1; p < kNumPages; ++p) {
    if (rng() % 6 != 0) parent[p] = P(rng() % p);
  }
  LeafFirstLru policy;
  NaiveModel model;
  for (int step = 0; step < 1500; ++step) {
    const PageId page = P(rng() % kNumPages);
    switch (rng() % 8) {
      case 0:
      case 1:
      case 2:
        policy.OnInsert(page, parent[page.value()]);
        model.Insert(page, parent[page.value()]);
        break;
      case 3:
      case 4:
        policy.OnTouch(page);
        model.Touch(page);
        break;
      case 5: {
        const bool evictable = rng() % 3 != 0;
        policy.SetEvictable(page, evictable);
        model.SetEvictable(page, evictable);
        break;
      }
      case 6:
        if (rng() % 4 != 0) break;  // out of order: leaves orphans
        policy.OnErase(page);
        model.Erase(page);
        break;
      case 7: {
        const uint64_t refused = rng();
        const auto may_evict = [&](PageId p) { return ((refused >> p.value()) & 7) != 0; };
        const size_t n = rng() % 8;
        const std::vector<PageId> victims = policy.PickVictims(n, may_evict);
        ASSERT_EQ(victims, model.Pick(n, may_evict)) << "step " << step;
        if (rng() % 2 == 0) break;
        for (PageId v : victims) {
          policy.OnErase(v);
          model.Erase(v);
        }
        break;
      }
    }
    ASSERT_EQ(policy.num_resident(), model.size()) << "step " << step;
  }
}

INSTANTIATE_TEST_SUITE_P(Seeds, LeafFirstLruRandomTest, ::testing::Range(1, 21));

}  // namespace
}  // namespace pagetide
