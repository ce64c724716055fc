#include "replay/cache_model.h"

#include <algorithm>
#include <map>
#include <random>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

std::vector<PageId> Pages(std::vector<uint64_t> ids) {
  std::vector<PageId> pages;
  for (uint64_t id : ids) pages.push_back(PageId(id));
  return pages;
}

PageCacheModel Lru(size_t capacity, size_t num_pages = 64) {
  return PageCacheModel(capacity, num_pages, std::make_unique<LeafFirstLru>());
}

TEST(PageCacheModelTest, CountsLeadingHitsOnly) {
  PageCacheModel cache = Lru(8);
  cache.Admit(Pages({1, 2, 3}));
  EXPECT_EQ(cache.LeadingHits(Pages({1, 2, 3, 4})), 3u);
  EXPECT_EQ(cache.LeadingHits(Pages({1, 9, 3})), 1u);
  EXPECT_EQ(cache.LeadingHits(Pages({9, 1, 2})), 0u);
  EXPECT_EQ(cache.LeadingHits({}), 0u);
}

TEST(PageCacheModelTest, EvictsTheTailOfTheOldestPrefix) {
  PageCacheModel cache = Lru(5);
  cache.Admit(Pages({1, 2, 3}));
  cache.Admit(Pages({4, 5}));
  cache.Admit(Pages({4, 5, 6}));
  EXPECT_EQ(cache.num_evicted(), 1u);
  EXPECT_EQ(cache.LeadingHits(Pages({1, 2, 3})), 2u);
  EXPECT_EQ(cache.LeadingHits(Pages({4, 5, 6})), 3u);
}

TEST(PageCacheModelTest, PrefixLargerThanTheCacheKeepsItsFront) {
  PageCacheModel cache = Lru(3);
  cache.Admit(Pages({9}));
  cache.Admit(Pages({1, 2, 3, 4, 5}));
  EXPECT_EQ(cache.num_resident(), 3u);
  EXPECT_EQ(cache.LeadingHits(Pages({1, 2, 3, 4, 5})), 3u);
  EXPECT_EQ(cache.LeadingHits(Pages({9})), 0u);
}

// A random forest, and requests that are paths in it; short ones are more frequent.
std::vector<TraceRequest> RandomRequests(uint64_t seed, size_t num_pages, size_t num_requests) {
  std::mt19937_64 rng(seed);
  std::vector<int64_t> parent(num_pages, -1);
  for (size_t p = 1; p < num_pages; ++p) {
    if (rng() % 5 != 0) parent[p] = static_cast<int64_t>(rng() % p);
  }
  std::vector<TraceRequest> requests(num_requests);
  for (TraceRequest& request : requests) {
    for (int64_t p = static_cast<int64_t>(rng() % num_pages); p >= 0;
         p = parent[static_cast<size_t>(p)]) {
      request.pages.push_back(PageId(static_cast<uint64_t>(p)));
    }
    std::reverse(request.pages.begin(), request.pages.end());
  }
  return requests;
}

uint64_t LruHits(const std::vector<TraceRequest>& requests, size_t capacity, size_t num_pages) {
  PageCacheModel cache = Lru(capacity, num_pages);
  uint64_t hits = 0;
  for (const TraceRequest& request : requests) {
    hits += cache.LeadingHits(request.pages);
    cache.Admit(request.pages);
    EXPECT_LE(cache.num_resident(), capacity);
    // Tail-first eviction keeps every resident set closed under "prefix of": the front is in.
    EXPECT_EQ(cache.LeadingHits(request.pages), std::min(request.pages.size(), capacity));
  }
  return hits;
}

// The best any policy can do, by trying all of them: which pages to keep after each request.
uint64_t BestHitsByExhaustion(const std::vector<TraceRequest>& requests, size_t capacity,
                              size_t num_pages) {
  std::map<uint32_t, uint64_t> best = {{0, 0}};  // resident set as bits -> most hits so far
  for (const TraceRequest& request : requests) {
    uint32_t used = 0;
    for (PageId p : request.pages) used |= 1u << p.value();
    std::map<uint32_t, uint64_t> next;
    for (const auto& [resident, hits] : best) {
      uint64_t h = 0;
      while (h < request.pages.size() && (resident >> request.pages[h].value() & 1) != 0) ++h;
      const uint32_t all = resident | used;
      for (uint32_t kept = all;; kept = (kept - 1) & all) {
        if (static_cast<size_t>(__builtin_popcount(kept)) <= capacity) {
          uint64_t& n = next[kept];
          n = std::max(n, hits + h);
        }
        if (kept == 0) break;
      }
    }
    best = std::move(next);
  }
  uint64_t most = 0;
  for (const auto& [resident, hits] : best) most = std::max(most, hits);
  return most;
}

TEST(OptimalHitsTest, IsTheBestOfAllPoliciesOnSmallCases) {
  for (uint64_t seed = 1; seed <= 40; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    const std::vector<TraceRequest> requests = RandomRequests(seed, 7, 9);
    for (size_t capacity = 1; capacity <= 5; ++capacity) {
      EXPECT_EQ(OptimalHits(requests, capacity, 7), BestHitsByExhaustion(requests, capacity, 7))
          << "capacity " << capacity;
    }
  }
}

TEST(OptimalHitsTest, NoLruIsBetter) {
  bool is_ever_worse = false;
  for (uint64_t seed = 1; seed <= 20; ++seed) {
    const std::vector<TraceRequest> requests = RandomRequests(seed, 300, 1000);
    for (size_t capacity : {1, 5, 30, 100, 300}) {
      const uint64_t lru = LruHits(requests, capacity, 300);
      const uint64_t optimal = OptimalHits(requests, capacity, 300);
      EXPECT_GE(optimal, lru) << "seed " << seed << " capacity " << capacity;
      is_ever_worse |= optimal > lru;
      if (capacity == 300) {
        EXPECT_EQ(optimal, lru);  // nothing is evicted
      }
    }
  }
  EXPECT_TRUE(is_ever_worse);
}

}  // namespace
}  // namespace pagetide
