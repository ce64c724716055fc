// Checkpoints: what a sequence was, to come back to. A checkpoint is a list of references: pages
// are shared with the sequence, and a tail is sealed, so that the sequence's next rows go to a copy
// of it. Checkpoints hold no frames: their pages spill like all others.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

constexpr size_t kMaxCheckpoints = 32;

}  // namespace

void ModelHostImpl::DropCheckpoint(const Checkpoint& checkpoint) {
  for (const PageTable& table : checkpoint.rows.tables) {
    for (const Extent& extent : table.extents()) pages_.Unref(pages_.Get(extent.page));
  }
}

CheckpointInfo ModelHostImpl::InfoOf(const Checkpoint& checkpoint) {
  CheckpointInfo info;
  info.id = checkpoint.id;
  info.length = checkpoint.rows.num_rows();
  info.is_automatic = checkpoint.is_automatic;
  info.created_at = checkpoint.created_at;
  for (const PageTable& table : checkpoint.rows.tables) info.num_pages += table.extents().size();
  return info;
}

absl::StatusOr<CheckpointInfo> ModelHostImpl::TakeCheckpoint(Sequence& sequence,
                                                             bool is_automatic) {
  std::vector<Checkpoint>& all = sequence.checkpoints;
  if (all.size() >= kMaxCheckpoints) {
    const auto oldest =
        std::find_if(all.begin(), all.end(), [](const Checkpoint& c) { return c.is_automatic; });
    if (oldest == all.end()) {
      return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                            "create checkpoint of sequence ", sequence.id.ToString(), ": it has ",
                            all.size(), ", the limit is ", kMaxCheckpoints, "; delete one")),
                        "TOO_MANY_CHECKPOINTS");
    }
    DropCheckpoint(*oldest);
    all.erase(oldest);
  }
  Checkpoint checkpoint;
  checkpoint.id = NextNumber();
  checkpoint.is_automatic = is_automatic;
  checkpoint.created_at = clock_->WallNow();
  checkpoint.rows = sequence;
  for (const PageTable& table : checkpoint.rows.tables) {
    for (const Extent& extent : table.extents()) {
      Page& page = pages_.Get(extent.page);
      pages_.Ref(page);
      if (!page.is_full() && !page.is_being_written()) page.Seal();
    }
  }
  all.push_back(std::move(checkpoint));
  return InfoOf(all.back());
}

absl::StatusOr<CheckpointInfo> ModelHostImpl::CreateCheckpoint(const Tenant& tenant,
                                                               const SequenceHandle& handle) {
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindForChange(tenant, handle));
  PT_RETURN_IF_ERROR(CutIfLost(*sequence));
  return TakeCheckpoint(*sequence, /*is_automatic=*/false);
}

absl::StatusOr<SequenceInfo> ModelHostImpl::RestoreCheckpoint(const Tenant& tenant,
                                                              const SequenceHandle& handle,
                                                              uint64_t checkpoint_id) {
  absl::StatusOr<SequenceInfo> info;
  {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindForChange(tenant, handle));
    const auto found = std::find_if(sequence->checkpoints.begin(), sequence->checkpoints.end(),
                                    [&](const Checkpoint& c) { return c.id == checkpoint_id; });
    if (found == sequence->checkpoints.end()) {
      return WithReason(
          absl::NotFoundError(absl::StrCat("restore checkpoint ", checkpoint_id, " of sequence ",
                                           handle.id.ToString(), ": there is none")),
          "CHECKPOINT_NOT_FOUND");
    }
    std::vector<RowsChange> change;
    change.push_back({sequence.get(), found->rows});
    AdoptRows(std::move(change), pages_);
    for (const PageTable& table : sequence->tables) {
      for (const Extent& extent : table.extents()) pages_.Touch(pages_.Get(extent.page));
    }
    SyncTails(*sequence, sequence->root, page_tokens(), pages_);
    ++sequence->revision;
    // A page of the checkpoint may have been lost since.
    CutIfLost(*sequence).IgnoreError();
    info = InfoOf(*sequence);
    changed_.SignalAll();
  }
  Flush();
  return info;
}

absl::StatusOr<std::vector<CheckpointInfo>> ModelHostImpl::ListCheckpoints(const Tenant& tenant,
                                                                           SequenceId id) {
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, id));
  std::vector<CheckpointInfo> out;
  for (const Checkpoint& checkpoint : sequence->checkpoints) out.push_back(InfoOf(checkpoint));
  return out;
}

absl::Status ModelHostImpl::DeleteCheckpoint(const Tenant& tenant, const SequenceHandle& handle,
                                             uint64_t checkpoint_id) {
  {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, handle.id));
    PT_RETURN_IF_ERROR(CheckHandle(*sequence, handle));
    const auto found = std::find_if(sequence->checkpoints.begin(), sequence->checkpoints.end(),
                                    [&](const Checkpoint& c) { return c.id == checkpoint_id; });
    if (found == sequence->checkpoints.end()) return absl::OkStatus();
    DropCheckpoint(*found);
    sequence->checkpoints.erase(found);
    changed_.SignalAll();
  }
  Flush();
  return absl::OkStatus();
}

}  // namespace pagetide
