#include "replay/cache_model.h"

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>

namespace pagetide {

PageCacheModel::PageCacheModel(size_t capacity_pages, size_t num_pages,
                               std::unique_ptr<EvictionPolicy> policy)
    : capacity_(capacity_pages),
      policy_(std::move(policy)),
      is_resident_(num_pages, false),
      last_admit_(num_pages, 0) {}

size_t PageCacheModel::LeadingHits(absl::Span<const PageId> pages) const {
  size_t hits = 0;
  while (hits < pages.size() && is_resident_[pages[hits].value()]) ++hits;
  return hits;
}

void PageCacheModel::Admit(absl::Span<const PageId> pages) {
  ++num_admits_;
  size_t num_missing = 0;
  for (PageId page : pages) {
    last_admit_[page.value()] = num_admits_;
    if (!is_resident_[page.value()]) ++num_missing;
  }
  const size_t num_free = capacity_ - policy_->num_resident();
  if (num_missing > num_free) {
    const auto is_other = [this](PageId p) { return last_admit_[p.value()] != num_admits_; };
    for (PageId victim : policy_->PickVictims(num_missing - num_free, is_other)) {
      policy_->OnErase(victim);
      is_resident_[victim.value()] = false;
      ++num_evicted_;
    }
  }
  std::optional<PageId> parent;
  for (PageId page : pages) {
    if (is_resident_[page.value()]) {
      policy_->OnTouch(page);
    } else {
      if (policy_->num_resident() == capacity_) break;
      policy_->OnInsert(page, parent);
      is_resident_[page.value()] = true;
    }
    parent = page;
  }
}

uint64_t OptimalHits(absl::Span<const TraceRequest> requests, size_t capacity_pages,
                     size_t num_pages) {
  constexpr uint32_t kNever = std::numeric_limits<uint32_t>::max();
  // next_uses[r][i]: the next request that uses page i of request r.
  std::vector<std::vector<uint32_t>> next_uses(requests.size());
  std::vector<uint32_t> next_use(num_pages, kNever);
  for (size_t r = requests.size(); r-- > 0;) {
    next_uses[r].reserve(requests[r].pages.size());
    for (PageId page : requests[r].pages) {
      next_uses[r].push_back(next_use[page.value()]);
    }
    for (PageId page : requests[r].pages) next_use[page.value()] = static_cast<uint32_t>(r);
  }

  // Farthest next use first, then the deepest. Entries of pages used again since are stale and
  // skipped.
  using Entry = std::tuple<uint32_t, uint32_t, uint64_t>;  // next use, depth, page
  std::vector<Entry> heap;
  std::vector<bool> is_resident(num_pages, false);
  size_t num_resident = 0;
  const auto is_stale = [&](const Entry& e) {
    const auto& [use, depth, page] = e;
    return !is_resident[page] || next_use[page] != use;
  };
  uint64_t total_hits = 0;
  for (size_t r = 0; r < requests.size(); ++r) {
    const std::vector<PageId>& pages = requests[r].pages;
    size_t hits = 0;
    while (hits < pages.size() && is_resident[pages[hits].value()]) ++hits;
    total_hits += hits;
    for (size_t i = 0; i < pages.size(); ++i) {
      const uint64_t page = pages[i].value();
      next_use[page] = next_uses[r][i];
      if (!is_resident[page]) {
        is_resident[page] = true;
        ++num_resident;
      }
      heap.emplace_back(next_use[page], static_cast<uint32_t>(i), page);
      std::push_heap(heap.begin(), heap.end());
    }
    while (num_resident > capacity_pages) {
      std::pop_heap(heap.begin(), heap.end());
      const Entry victim = heap.back();
      heap.pop_back();
      if (is_stale(victim)) continue;
      is_resident[std::get<2>(victim)] = false;
      --num_resident;
    }
    if (heap.size() > 4 * num_resident + (size_t{1} << 20)) {
      heap.erase(std::remove_if(heap.begin(), heap.end(), is_stale), heap.end());
      std::make_heap(heap.begin(), heap.end());
    }
  }
  return total_hits;
}

}  // namespace pagetide
