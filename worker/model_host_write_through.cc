// Write-through that is late: pages that became full while the store took none, or whose put
// failed. A crash of this worker loses them until they are there.
#include <algorithm>
#include <vector>

#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

// Pages on their way to the store up to which late ones join them: enough to keep it busy, few
// enough that spills which a call waits for do not stand behind a long queue.
constexpr size_t kMaxSpillingWithOwed = 32;

}  // namespace

bool ModelHostImpl::IsOwed(const Page& page) const {
  return options_.write_through && page.is_keyed() && !page.is_stored() && !page.is_scrub();
}

bool ModelHostImpl::MayDrop(const Page& page) const {
  return page.is_clean() && !(IsOwed(page) && CanSpill());
}

void ModelHostImpl::WriteThroughOwed() {
  if (!options_.write_through || !CanSpill()) return;
  // One page tells whether the store takes any again: a full one would be sent many, for nothing.
  const size_t limit = did_put_fail_ ? 1 : kMaxSpillingWithOwed;
  size_t num_spilling = 0;
  for (uint32_t in_group : num_spilling_) num_spilling += in_group;
  std::vector<PageId> owed;
  for (PageId id : pages_.unstored()) {
    if (num_spilling + owed.size() >= limit) break;
    if (IsOwed(pages_.Get(id))) owed.push_back(id);
  }
  StartSpills(owed, options_.write_through_level);
}

}  // namespace pagetide
