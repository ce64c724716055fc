// Puts that the store refused, and write-through that is late: pages that became full while the
// store took none, or whose put failed. A crash of this worker loses them until they are there.
#include <algorithm>
#include <utility>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

// Pages on their way to the store up to which late ones join them: enough to keep it busy, few
// enough that spills which a call waits for do not stand behind a long queue.
constexpr size_t kMaxSpillingWithOwed = 32;
// A page that is refused again and again waits up to so many times store_backoff.
constexpr int64_t kMaxPauses = 16;
// The same while the store takes no page at all: soon after it is back they are to go.
constexpr int64_t kMaxPausesOfAll = 4;

}  // namespace

bool ModelHostImpl::IsOwed(const Page& page) const {
  return options_.write_through && page.is_keyed() && !page.is_stored() && !page.is_scrub();
}

bool ModelHostImpl::MayDrop(const Page& page) const {
  return page.is_clean() && !(IsOwed(page) && CanSpill());
}

bool ModelHostImpl::MaySpill(PageId id) const {
  if (!CanSpill()) return false;
  const auto refusal = refusals_.find(id);
  return refusal == refusals_.end() || clock_->MonotonicNow() >= refusal->second.again_at;
}

void ModelHostImpl::NotePutTaken(PageId id) {
  ++puts_taken_;
  const bool was_down = std::exchange(did_put_fail_, false);
  // It took none for a while, or refused this one before: it was the store, not the pages.
  if (refusals_.erase(id) > 0 || was_down) refusals_.clear();
}

void ModelHostImpl::NotePutRefused(PageId id, uint64_t taken_before, const absl::Status& status) {
  ++counters_.store_errors;
  last_store_error_ = status;
  const MonotonicTime now = clock_->MonotonicNow();
  const auto [it, is_first] =
      refusals_.try_emplace(id, Refusal{.taken_before = taken_before, .pauses = 1});
  Refusal& refusal = it->second;
  const bool takes_others = puts_taken_ > refusal.taken_before;
  if (!is_first) {
    refusal.pauses = std::min(2 * refusal.pauses, takes_others ? kMaxPauses : kMaxPausesOfAll);
  }
  refusal.again_at = now + refusal.pauses * options_.store_backoff;
  if (takes_others) return;
  did_put_fail_ = true;
  spill_again_at_ = now + options_.store_backoff;
}

void ModelHostImpl::ForgetRefusals() {
  absl::erase_if(refusals_, [this](const auto& refusal) {
    mu_.AssertHeld();
    const Page* page = pages_.Find(refusal.first);
    return page == nullptr || page->is_stored();
  });
}

void ModelHostImpl::WriteThroughOwed() {
  if (!options_.write_through || !CanSpill()) return;
  // One page tells whether the store takes any again: a full one would be sent many, for nothing.
  const size_t limit = did_put_fail_ ? 1 : kMaxSpillingWithOwed;
  size_t num_spilling = 0;
  for (uint32_t in_group : num_spilling_) num_spilling += in_group;
  // In turn: a page that is refused again comes behind all the others.
  const absl::btree_set<PageId>& unstored = pages_.unstored();
  std::vector<PageId> owed;
  auto at = unstored.lower_bound(next_owed_);
  for (size_t i = 0; i < unstored.size() && num_spilling + owed.size() < limit; ++i) {
    if (at == unstored.end()) at = unstored.begin();
    const PageId id = *at++;
    if (IsOwed(pages_.Get(id)) && MaySpill(id)) owed.push_back(id);
  }
  if (owed.empty()) return;
  next_owed_ = PageId(owed.back().value() + 1);
  StartSpills(owed, options_.write_through_level);
}

}  // namespace pagetide
