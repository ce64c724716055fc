// Page tables as callers see them, and what keeps the frames that they name in place.
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

constexpr int kMaxPinTries = 16;

}  // namespace

ModelHostImpl::PagePins::~PagePins() {
  {
    MutexLock lock(&host_->mu_);
    for (PageId id : pages_) host_->pages_.Unpin(host_->pages_.Get(id));
    host_->changed_.SignalAll();
  }
  host_->Flush();
}

class ModelHostImpl::PinnedPagesImpl final : public ModelHost::PinnedPages {
 public:
  PinnedPagesImpl(ModelHostImpl* host, std::vector<PageId> pinned)
      : pins_(host, std::move(pinned)) {}

 private:
  const PagePins pins_;
};

std::vector<BlockTableEntry> ModelHostImpl::BlockTableOf(const Sequence& sequence) const {
  std::vector<BlockTableEntry> out;
  for (uint32_t g = 0; g < num_groups(); ++g) {
    for (const PositionedRun& run : sequence.Runs(g, 0, sequence.num_rows())) {
      const Extent& extent = run.extent;
      const Page& page = *pages_.Find(extent.page);
      BlockTableEntry entry;
      entry.group = g;
      entry.first_row = extent.first_row;
      entry.first_position = static_cast<uint64_t>(run.first_position);
      entry.shift = extent.shift;
      entry.first_slot = extent.first_slot;
      entry.count = extent.count;
      entry.page = extent.page;
      entry.page_state = std::string(PageStateName(page.state()));
      // One of a damaged page is kept for its readers, and is nobody else's to read.
      if (page.has_frame() && page.state() != PageState::kQuarantined) entry.frame = page.frame();
      entry.key = page.page_key();
      entry.references = page.refs();
      entry.pins = page.pins();
      out.push_back(std::move(entry));
    }
  }
  return out;
}

absl::StatusOr<BlockTable> ModelHostImpl::GetBlockTable(const Tenant& tenant, SequenceId id) {
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, id));
  return BlockTable{InfoOf(*sequence), BlockTableOf(*sequence)};
}

absl::StatusOr<ModelHostImpl::PinnedPlan> ModelHostImpl::PinPlan(
    const Tenant& tenant, SequenceId id, absl::string_view action,
    absl::FunctionRef<absl::StatusOr<ReadPlan>(const Sequence&)> plan_of, MonotonicTime deadline) {
  for (int attempt = 0; attempt < kMaxPinTries; ++attempt) {
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, id));
    if (!sequence->pending) PT_RETURN_IF_ERROR(CutIfLost(*sequence));
    PT_ASSIGN_OR_RETURN(const ReadPlan before, plan_of(*sequence));
    const Need need = NeedOf(before.extents);
    Acquired got;
    // A read whose sequence is closed leaves the line at once.
    const auto is_wanted = [&]() { return !sequence->closed; };
    const absl::Status status = Acquire(tenant.name, need, deadline, &got, is_wanted);
    if (absl::IsCancelled(status)) continue;  // which says that it is closed
    if (!status.ok()) {
      if (GetReason(status) == "PREFIX_LOST" && !sequence->pending && !sequence->closed) {
        PT_RETURN_IF_ERROR(CutIfLost(*sequence));
      }
      return status;
    }
    if (!sequence->closed) {
      absl::StatusOr<ReadPlan> plan = plan_of(*sequence);
      if (plan.ok() && NeedOf(plan->extents).pages == need.pages) {
        return PinnedPlan{std::move(sequence), *std::move(plan), std::move(got.pinned)};
      }
    }
    ReleaseAcquired(
        got);  // and once more, which says what is the matter or takes what is there now
  }
  return absl::AbortedError(absl::StrCat(action, ": the sequence kept being edited; retry"));
}

absl::StatusOr<ModelHost::PinnedTable> ModelHostImpl::PinTable(const Tenant& tenant, SequenceId id,
                                                               MonotonicTime deadline) {
  // One need over all groups: who held one group's frames and waited for another's could wait for
  // a call that waits for him.
  const auto plan_of = [](const Sequence& sequence) -> absl::StatusOr<ReadPlan> {
    ReadPlan plan;
    for (const PageTable& table : sequence.tables) {
      plan.extents.insert(plan.extents.end(), table.extents().begin(), table.extents().end());
    }
    return plan;
  };
  const auto pin = [&]() -> absl::StatusOr<PinnedTable> {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(PinnedPlan pinned,
                        PinPlan(tenant, id, "pin the pages of a sequence", plan_of, deadline));
    return PinnedTable{{InfoOf(*pinned.sequence), BlockTableOf(*pinned.sequence)},
                       std::make_shared<const PinnedPagesImpl>(this, std::move(pinned.pages))};
  };
  auto pinned = pin();
  Flush();
  return pinned;
}

}  // namespace pagetide
