// EvictionRank: the order in which the store gives up pages that nothing holds; the smallest goes
// first, tails before their prefixes.
//
// After GreedyDual (Young 1994): a page's rank is the time of its last access plus a credit for
// what it would cost to lose it. Time is counted in accesses of any page; the unit of the credit is
// as many accesses as there are pages, so that a page of twice the cost that nobody asks for stays
// about twice as long. The cost of a page grows with its depth, because recomputing it attends to
// everything before it. Pure function; thread-safe.
#ifndef PAGETIDE_KVSTORE_EVICTION_RANK_H_
#define PAGETIDE_KVSTORE_EVICTION_RANK_H_

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "core/page_store.h"

namespace pagetide {

// Attention over this many pages before it costs a page as much again as all that does not depend
// on its position (32 k tokens at 256 a page, of the order of models with 4 k to 8 k channels).
inline constexpr uint32_t kRankDepthPages = 128;
// Beyond this the credit grows no more: a page that nobody reads must not stay for ever.
inline constexpr uint32_t kRankMaxDepthPages = 4 * kRankDepthPages;
// Priority 50 counts once; this many more count double, as many less half. Priority 0: no credit.
inline constexpr double kRankPriorityStep = 25;

inline uint64_t EvictionRank(uint64_t access_number, uint64_t num_pages, uint32_t depth,
                             uint32_t priority) {
  if (priority == 0) return access_number;
  const double cost =
      1.0 + static_cast<double>(std::min(depth, kRankMaxDepthPages)) / kRankDepthPages;
  const double weight = std::exp2(
      (static_cast<double>(priority) - static_cast<double>(kDefaultPriority)) / kRankPriorityStep);
  return access_number + static_cast<uint64_t>(static_cast<double>(num_pages) * cost * weight);
}

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_EVICTION_RANK_H_
