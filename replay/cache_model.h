// PageCacheModel: one cache of a fixed number of pages under an eviction policy, without bytes; and
// the hit rate that no policy can exceed. Not thread-safe.
#ifndef PAGETIDE_REPLAY_CACHE_MODEL_H_
#define PAGETIDE_REPLAY_CACHE_MODEL_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "absl/types/span.h"
#include "core/eviction_policy.h"
#include "core/ids.h"
#include "replay/trace.h"

namespace pagetide {

class PageCacheModel {
 public:
  // Pages are below `num_pages`.
  PageCacheModel(size_t capacity_pages, size_t num_pages, std::unique_ptr<EvictionPolicy> policy);

  // Length of the leading run of `pages` that is resident: a page behind a missing one is no hit.
  size_t LeadingHits(absl::Span<const PageId> pages) const;

  // All of `pages` (a prefix, root first) was just computed or used: hits are touched, the rest is
  // inserted and others are evicted for it. What does not fit beside the prefix itself is dropped
  // from its end.
  void Admit(absl::Span<const PageId> pages);

  size_t num_resident() const { return policy_->num_resident(); }
  size_t capacity() const { return capacity_; }
  size_t num_evicted() const { return num_evicted_; }

 private:
  const size_t capacity_;
  const std::unique_ptr<EvictionPolicy> policy_;
  std::vector<bool> is_resident_;     // by PageId
  std::vector<uint32_t> last_admit_;  // by PageId: the number of the last Admit that named it
  uint32_t num_admits_ = 0;
  size_t num_evicted_ = 0;
};

// Hits, summed over `requests` in order, of the optimum: evict the page whose next use is farthest,
// the deeper one on ties. The ties keep the resident set closed under "prefix of", so no cache that
// counts leading runs only does better. Source: Belady, IBM Systems Journal 1966.
uint64_t OptimalHits(absl::Span<const TraceRequest> requests, size_t capacity_pages,
                     size_t num_pages);

}  // namespace pagetide

#endif  // PAGETIDE_REPLAY_CACHE_MODEL_H_
