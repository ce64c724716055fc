// Checkpoints: what a sequence was, to come back to. On the device a checkpoint is a list of
// references: pages are shared with the sequence, and a tail is sealed, so that the sequence's next
// rows go to a copy of it; it holds no frames, for its pages spill like all others. In host memory
// it is a copy of the pages; in the store a manifest, which expires by itself if nobody deletes it.
#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

constexpr size_t kMaxCheckpoints = 32;
// How often a restore begins anew because pages came or went while it waited.
constexpr int kMaxRestoreTries = 8;

absl::Status NotFound(SequenceId sequence, uint64_t id) {
  return WithReason(absl::NotFoundError(absl::StrCat("restore checkpoint ", id, " of sequence ",
                                                     sequence.ToString(), ": there is none")),
                    "CHECKPOINT_NOT_FOUND");
}

}  // namespace

// ---- what goes --------------------------------------------------------------------------------

void ModelHostImpl::DropCheckpoint(const Checkpoint& checkpoint) {
  // One in the making: who makes it sees that it is gone. A void one holds nothing any more.
  if (!checkpoint.is_ready || checkpoint.info.is_void) return;
  for (const PageTable& table : checkpoint.rows.tables) {
    for (const Extent& extent : table.extents()) pages_.Unref(pages_.Get(extent.page));
  }
  if (checkpoint.info.tier == Tier::kHost) checkpoint_bytes_ -= checkpoint.saved->host_bytes;
  if (checkpoint.info.tier == Tier::kStore) {
    Release(checkpoint.saved->manifest, checkpoint.saved->manifest_version);
  }
}

std::vector<ModelHostImpl::Checkpoint>::iterator ModelHostImpl::FindCheckpoint(Sequence& sequence,
                                                                               uint64_t id,
                                                                               bool is_ready) {
  return std::find_if(
      sequence.checkpoints.begin(), sequence.checkpoints.end(),
      [&](const Checkpoint& c) { return c.info.id == id && c.is_ready == is_ready; });
}

void ModelHostImpl::VoidCheckpoints(Sequence& sequence, uint64_t rows) {
  for (Checkpoint& checkpoint : sequence.checkpoints) {
    if (checkpoint.info.scope != CheckpointScope::kNonRewindable ||
        checkpoint.info.length <= rows) {
      continue;
    }
    // What it held goes; the entry stays, to say why there is nothing to go back to.
    DropCheckpoint(checkpoint);
    checkpoint.rows = {};
    checkpoint.saved = nullptr;
    checkpoint.info.is_void = true;
  }
}

uint64_t ModelHostImpl::CommonRows(const SequenceRows& a, const SequenceRows& b) const {
  uint64_t common = std::min(a.num_rows(), b.num_rows());
  common = static_cast<uint64_t>(
      std::mismatch(a.tokens.begin(), a.tokens.begin() + common, b.tokens.begin()).first -
      a.tokens.begin());
  for (uint64_t row = 0; row < common; ++row) {
    if (a.position(row) != b.position(row)) common = row;
    if (a.positions.empty() && b.positions.empty()) break;
  }
  for (uint32_t g = 0; g < num_groups(); ++g) {
    if (IsKept(CheckpointScope::kNonRewindable, g)) continue;
    const std::vector<Extent> in_a = a.tables[g].Cover(0, common);
    const std::vector<Extent> in_b = b.tables[g].Cover(0, common);
    uint64_t same = 0;
    for (size_t i = 0; i < std::min(in_a.size(), in_b.size()); ++i) {
      if (in_a[i].page != in_b[i].page || in_a[i].first_slot != in_b[i].first_slot ||
          in_a[i].first_row != in_b[i].first_row || in_a[i].shift != in_b[i].shift) {
        break;
      }
      same = std::min(in_a[i].end_row(), in_b[i].end_row());
      if (in_a[i].count != in_b[i].count) break;
    }
    common = std::min(common, same);
  }
  return common;
}

// ---- create -----------------------------------------------------------------------------------

absl::Status ModelHostImpl::CheckCheckpointRoom(const Sequence& sequence) const {
  const std::vector<Checkpoint>& all = sequence.checkpoints;
  // Automatic ones give way.
  const auto others = static_cast<size_t>(std::count_if(
      all.begin(), all.end(), [](const Checkpoint& c) { return !c.info.is_automatic; }));
  if (others < kMaxCheckpoints) return absl::OkStatus();
  return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                        "create checkpoint of sequence ", sequence.id.ToString(), ": it has ",
                        others, ", the limit is ", kMaxCheckpoints, "; delete one")),
                    "TOO_MANY_CHECKPOINTS");
}

void ModelHostImpl::TrimCheckpoints(Sequence& sequence) {
  std::vector<Checkpoint>& all = sequence.checkpoints;
  const auto is_ready = [](const Checkpoint& c) { return c.is_ready; };
  while (static_cast<size_t>(std::count_if(all.begin(), all.end(), is_ready)) > kMaxCheckpoints) {
    // One that nobody can go back to before one that somebody may want.
    auto oldest = std::find_if(all.begin(), all.end(), [](const Checkpoint& c) {
      return c.info.is_automatic && c.info.is_void;
    });
    if (oldest == all.end()) {
      oldest = std::find_if(all.begin(), all.end(),
                            [](const Checkpoint& c) { return c.info.is_automatic; });
    }
    if (oldest == all.end()) return;
    DropCheckpoint(*oldest);
    all.erase(oldest);
  }
}

absl::StatusOr<CheckpointInfo> ModelHostImpl::TakeCheckpoint(Sequence& sequence,
                                                             CheckpointScope scope,
                                                             bool is_automatic) {
  PT_RETURN_IF_ERROR(CheckCheckpointRoom(sequence));
  Checkpoint checkpoint;
  checkpoint.info.id = NextNumber();
  checkpoint.info.length = sequence.length();
  checkpoint.info.is_automatic = is_automatic;
  checkpoint.info.created_at = clock_->WallNow();
  checkpoint.info.scope = scope;
  if (scope == CheckpointScope::kAll) checkpoint.rows = sequence;
  checkpoint.rows.tables.resize(num_groups());
  for (uint32_t g = 0; g < num_groups(); ++g) {
    if (!IsKept(scope, g)) continue;
    checkpoint.rows.tables[g] = sequence.tables[g];
    absl::flat_hash_set<PageId> distinct;
    for (const Extent& extent : sequence.tables[g].extents()) {
      Page& page = pages_.Get(extent.page);
      pages_.Ref(page);
      if (!page.is_full() && !page.is_being_written()) page.Seal();
      distinct.insert(extent.page);
    }
    checkpoint.info.num_pages += distinct.size();
  }
  const CheckpointInfo info = checkpoint.info;
  sequence.checkpoints.push_back(std::move(checkpoint));
  TrimCheckpoints(sequence);
  ++counters_.checkpoints_created;
  return info;
}

void ModelHostImpl::TakeAutomaticCheckpoint(Sequence& sequence, uint64_t before) {
  const uint64_t step = uint64_t{options_.checkpoint_every_pages} * page_tokens();
  if (step == 0 || sequence.length() / step == before / step) return;
  // Of a sequence that lost a page the next call cuts it; until then nothing of it can be sealed.
  if (ValidLength(sequence) != sequence.length()) return;
  for (uint32_t g = 0; g < num_groups(); ++g) {
    if (!IsKept(CheckpointScope::kNonRewindable, g)) continue;
    // Without room for one there is none: the caller's own stay.
    TakeCheckpoint(sequence, CheckpointScope::kNonRewindable, /*is_automatic=*/true).IgnoreError();
    return;
  }
}

absl::StatusOr<CheckpointInfo> ModelHostImpl::CreateCheckpoint(const Tenant& tenant,
                                                               const SequenceHandle& handle,
                                                               const CheckpointOptions& options,
                                                               MonotonicTime deadline) {
  if (options.tier == Tier::kDevice) {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindForChange(tenant, handle));
    PT_RETURN_IF_ERROR(CutIfLost(*sequence));
    return TakeCheckpoint(*sequence, options.scope, /*is_automatic=*/false);
  }
  if (options.tier == Tier::kStore) {
    if (store_ == nullptr) {
      return WithReason(
          absl::FailedPreconditionError("create checkpoint: this worker has no store"), "NO_STORE");
    }
    if (options.ttl <= absl::ZeroDuration() || options.ttl > kMaxCheckpointTtl) {
      return absl::InvalidArgumentError(absl::StrCat("ttl is ", absl::FormatDuration(options.ttl),
                                                     ", must be above 0 and at most ",
                                                     absl::FormatDuration(kMaxCheckpointTtl)));
    }
  }
  absl::StatusOr<CheckpointInfo> info = CopyCheckpoint(tenant, handle, options, deadline);
  Flush();
  return info;
}

// ---- restore ----------------------------------------------------------------------------------

absl::StatusOr<SequenceInfo> ModelHostImpl::RestoreLocked(const Tenant& tenant,
                                                          const SequenceHandle& handle,
                                                          uint64_t checkpoint_id,
                                                          MonotonicTime deadline) {
  PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindForChange(tenant, handle));
  const auto found = FindCheckpoint(*sequence, checkpoint_id, /*is_ready=*/true);
  if (found == sequence->checkpoints.end()) return NotFound(handle.id, checkpoint_id);
  const CheckpointInfo info = found->info;
  const auto what = [&] {
    return absl::StrCat("restore checkpoint ", checkpoint_id, " of sequence ",
                        handle.id.ToString());
  };
  if (info.is_void) {
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat(
            what(),
            ": it keeps only groups that cannot be cut back, and of the others the rows in "
            "front of its length ",
            info.length, " were removed or changed since")),
        "CHECKPOINT_VOID");
  }
  if (info.expires_at && clock_->WallNow() >= *info.expires_at) {
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat(
            what(), ": it expired at ",
            absl::FormatTime(absl::RFC3339_sec, *info.expires_at, absl::UTCTimeZone()))),
        "CHECKPOINT_EXPIRED");
  }
  SequenceRows rows = found->rows;
  // References beside those that the checkpoint has, given back at the end.
  std::vector<PageId> extra;
  if (const std::shared_ptr<const SavedCheckpoint> saved = found->saved) {
    const SessionState& state = saved->state;
    const std::vector<PrefixKey> keys =
        PrefixKeysOf(sequence->root, std::span(state.tokens).first(state.canonical_length),
                     page_tokens(), state.inputs);
    std::vector<PageId> pages;
    if (info.tier == Tier::kHost) {
      // Unlocks: `found` is void from here on.
      PT_ASSIGN_OR_RETURN(pages, BringBack(sequence, *saved, keys, deadline));
      extra = pages;  // one each, also where two copies of equal bytes are one page by now
    }
    rows = SavedRows(state, info.length, keys,
                     [&](uint32_t g, const PageTable& table, const SavedExtent& extent) -> Page& {
                       mu_.AssertHeld();
                       if (!pages.empty()) return pages_.Get(pages[extent.page]);
                       return AdoptSavedPage(g, *sequence, table, state, extent,
                                             saved->pages[extent.page], keys);
                     });
    for (const PageTable& table : rows.tables) {
      for (const Extent& extent : table.extents()) extra.push_back(extent.page);
    }
  }
  if (info.scope == CheckpointScope::kNonRewindable) {
    SequenceRows whole = *sequence;
    whole.Truncate(info.length, page_tokens());
    for (uint32_t g = 0; g < num_groups(); ++g) {
      if (IsKept(info.scope, g)) whole.tables[g] = std::move(rows.tables[g]);
    }
    rows = std::move(whole);
  }
  const uint64_t common = CommonRows(*sequence, rows);
  std::vector<RowsChange> change;
  change.push_back({sequence.get(), std::move(rows)});
  AdoptRows(std::move(change), pages_);
  // Only now: what they held may be among the rows.
  VoidCheckpoints(*sequence, common);
  for (PageId id : extra) pages_.Unref(pages_.Get(id));
  for (const PageTable& table : sequence->tables) {
    for (const Extent& extent : table.extents()) pages_.Touch(pages_.Get(extent.page));
  }
  SyncTails(*sequence, sequence->root, page_tokens(), pages_);
  ++sequence->revision;
  ++counters_.checkpoints_restored;
  // A page of the checkpoint may have been lost since.
  CutIfLost(*sequence).IgnoreError();
  changed_.SignalAll();
  return InfoOf(*sequence);
}

absl::StatusOr<SequenceInfo> ModelHostImpl::RestoreCheckpoint(const Tenant& tenant,
                                                              const SequenceHandle& handle,
                                                              uint64_t checkpoint_id,
                                                              MonotonicTime deadline) {
  absl::StatusOr<SequenceInfo> info;
  {
    MutexLock lock(&mu_);
    for (int attempt = 0; attempt < kMaxRestoreTries; ++attempt) {
      info = RestoreLocked(tenant, handle, checkpoint_id, deadline);
      if (!absl::IsAborted(info.status())) break;
    }
  }
  Flush();
  return info;
}

// ---- list and delete --------------------------------------------------------------------------

absl::StatusOr<std::vector<CheckpointInfo>> ModelHostImpl::ListCheckpoints(const Tenant& tenant,
                                                                           SequenceId id) {
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, id));
  std::vector<CheckpointInfo> out;
  for (const Checkpoint& checkpoint : sequence->checkpoints) {
    if (checkpoint.is_ready) out.push_back(checkpoint.info);
  }
  return out;
}

absl::Status ModelHostImpl::DeleteCheckpoint(const Tenant& tenant, const SequenceHandle& handle,
                                             uint64_t checkpoint_id) {
  {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, handle.id));
    PT_RETURN_IF_ERROR(CheckHandle(*sequence, handle));
    const auto found = FindCheckpoint(*sequence, checkpoint_id, /*is_ready=*/true);
    if (found == sequence->checkpoints.end()) return absl::OkStatus();
    DropCheckpoint(*found);
    sequence->checkpoints.erase(found);
    changed_.SignalAll();
  }
  Flush();
  return absl::OkStatus();
}

}  // namespace pagetide
