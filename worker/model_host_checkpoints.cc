// Checkpoints: what a sequence was, to come back to. On the device a checkpoint is a list of
// references: pages are shared with the sequence, and a tail is sealed, so that the sequence's next
// rows go to a copy of it; it holds no frames, for its pages spill like all others. In host memory
// it is a copy of the pages; in the store a manifest, which expires by itself if nobody deletes it.
#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "worker/manifest_races.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

constexpr size_t kMaxCheckpoints = 32;
// How often a restore begins anew because pages came or went while it waited.
constexpr int kMaxRestoreTries = 8;
// Manifests that wait to be deleted, and how many of them one job deletes.
constexpr size_t kMaxReleased = 4096;
constexpr size_t kReleaseBatch = 64;
// Between attempts to delete manifests in a store that is away.
constexpr absl::Duration kReleaseAgain = absl::Seconds(1);

absl::Status NotFound(SequenceId sequence, uint64_t id) {
  return WithReason(absl::NotFoundError(absl::StrCat("restore checkpoint ", id, " of sequence ",
                                                     sequence.ToString(), ": there is none")),
                    "CHECKPOINT_NOT_FOUND");
}

// Of host memory, apart from the pages.
uint64_t BytesOf(const SessionState& state) {
  uint64_t bytes = state.tokens.size() * sizeof(state.tokens[0]) +
                   state.positions.size() * sizeof(state.positions[0]) +
                   state.inputs.size() * sizeof(state.inputs[0]);
  for (const std::vector<SavedExtent>& group : state.groups) {
    bytes += group.size() * sizeof(group[0]);
  }
  return bytes;
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

void ModelHostImpl::Release(const std::string& manifest, uint64_t version) {
  released_manifests_.push_back({manifest, version});
  TrimReleases();
  StartReleases();
}

void ModelHostImpl::TrimReleases() {
  // The oldest end by themselves, when their time is over.
  while (released_manifests_.size() > kMaxReleased) released_manifests_.pop_front();
}

void ModelHostImpl::StartReleases() {
  if (is_releasing_ || released_manifests_.empty() || clock_->MonotonicNow() < release_again_at_) {
    return;
  }
  const auto end =
      released_manifests_.begin() + std::min(released_manifests_.size(), kReleaseBatch);
  std::deque<ReleasedManifest> batch(released_manifests_.begin(), end);
  released_manifests_.erase(released_manifests_.begin(), end);
  is_releasing_ = true;
  ++jobs_in_flight_;
  const absl::Status scheduled = io_->Schedule([this, batch] { RunReleases(batch); });
  if (scheduled.ok()) return;
  --jobs_in_flight_;
  EndReleases(std::move(batch));
}

void ModelHostImpl::RunReleases(std::deque<ReleasedManifest> batch) {
  // Of all together: a store that hangs holds one thread for one timeout.
  const MonotonicTime deadline = clock_->MonotonicNow() + options_.store_timeout;
  for (; !batch.empty(); batch.pop_front()) {
    // Each has a name that nobody else uses: no fence is needed to delete it.
    const absl::Status deleted =
        store_->DeleteManifest(batch.front().name, batch.front().version, std::nullopt, deadline);
    if (absl::IsUnavailable(deleted) || absl::IsDeadlineExceeded(deleted)) break;
    if (!deleted.ok() && !absl::IsNotFound(deleted)) {
      LogWarning("worker", "delete checkpoint ", batch.front().name, ": ", deleted.message(),
                 "; it ends when its time is over");
    }
  }
  {
    MutexLock lock(&mu_);
    EndReleases(std::move(batch));
    StartReleases();
  }
  FinishJob();
}

void ModelHostImpl::EndReleases(std::deque<ReleasedManifest> left) {
  is_releasing_ = false;
  if (left.empty()) return;
  release_again_at_ = clock_->MonotonicNow() + kReleaseAgain;
  released_manifests_.insert(released_manifests_.begin(), left.begin(), left.end());
  TrimReleases();
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

absl::Status ModelHostImpl::PutCheckpoint(StateSnapshot& snapshot, const CheckpointOptions& options,
                                          SavedCheckpoint* saved, CheckpointInfo* info,
                                          MonotonicTime deadline) {
  ManifestRecord manifest;
  manifest.name = saved->manifest;
  manifest.request_id = saved->manifest;  // unique: so that a put whose answer was lost is repeated
  manifest.saved_at = info->created_at;
  manifest.expires_at = info->expires_at;
  manifest.payload = EncodeSessionState(saved->state);
  manifest.summary = EncodeSessionSummary(SummaryOf(saved->state));
  std::vector<PageKey> missing;
  for (int attempt = 0; attempt <= kMaxPutAgain; ++attempt) {
    PT_ASSIGN_OR_RETURN(StateSnapshot::Put put,
                        snapshot.PutPages(missing, Durability::kProcess, deadline));
    manifest.pages = std::move(put.pages);
    info->copied_bytes = put.bytes_written;
    PT_ASSIGN_OR_RETURN(PutManifestResult result,
                        store_->PutManifest(manifest, 0, options.fence, deadline));
    if (result.committed) {
      saved->manifest_version = result.version;
      saved->pages = std::move(manifest.pages);
      return absl::OkStatus();
    }
    missing = std::move(result.missing);
  }
  return absl::AbortedError(absl::StrCat("create checkpoint ", saved->manifest, ": ",
                                         missing.size(),
                                         " pages left the store again before they could be named"));
}

absl::Status ModelHostImpl::ReserveCopy(SequenceId id, uint64_t bytes) {
  const uint64_t used = std::min(checkpoint_bytes_, options_.checkpoint_host_bytes);
  const uint64_t free = options_.checkpoint_host_bytes - used;
  if (bytes > free) {
    return WithReason(
        absl::ResourceExhaustedError(absl::StrCat(
            "create checkpoint of sequence ", id.ToString(), ": needs ", bytes,
            " bytes of host memory, ", free, " of ", options_.checkpoint_host_bytes, " are free")),
        "CHECKPOINT_MEMORY");
  }
  checkpoint_bytes_ += bytes;
  return absl::OkStatus();
}

absl::StatusOr<CheckpointInfo> ModelHostImpl::CopyCheckpoint(const Tenant& tenant,
                                                             const SequenceHandle& handle,
                                                             const CheckpointOptions& options,
                                                             MonotonicTime deadline) {
  CheckpointInfo info;
  info.scope = options.scope;
  info.tier = options.tier;
  info.created_at = clock_->WallNow();
  if (options.tier == Tier::kStore) info.expires_at = info.created_at + options.ttl;
  auto saved = std::make_shared<SavedCheckpoint>();
  SequencePtr sequence;
  std::unique_ptr<StateSnapshot> snapshot;  // its end takes the lock
  {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(sequence, FindForChange(tenant, handle));
    PT_RETURN_IF_ERROR(CutIfLost(*sequence));
    PT_ASSIGN_OR_RETURN(snapshot, TakeSnapshot(tenant, *sequence, std::nullopt, options.scope));
    saved->state = snapshot->state();
    info.id = NextNumber();
    info.length = saved->state.length();
    uint64_t bytes = 0;
    for (uint32_t g = 0; g < num_groups(); ++g) {
      absl::flat_hash_set<uint32_t> pages;
      for (const SavedExtent& extent : saved->state.groups[g]) pages.insert(extent.page);
      info.num_pages += pages.size();
      bytes += pages.size() * Geometry(g).page_bytes();
    }
    PT_RETURN_IF_ERROR(CheckCheckpointRoom(*sequence));
    if (options.tier == Tier::kHost) {
      const uint64_t host_bytes = bytes + BytesOf(saved->state);
      PT_RETURN_IF_ERROR(ReserveCopy(handle.id, host_bytes));
      saved->host_bytes = host_bytes;
      info.copied_bytes = bytes;
    }
    // From here on it is told what the sequence loses. Nothing gives way before it is there.
    sequence->checkpoints.push_back({.info = info, .is_ready = false});
  }
  absl::Status status;
  if (options.tier == Tier::kHost) {
    absl::StatusOr<std::vector<StateSnapshot::Copy>> copies = snapshot->CopyPages(deadline);
    status = copies.status();
    if (status.ok()) saved->copies = *std::move(copies);
    for (const StateSnapshot::Copy& copy : saved->copies) saved->pages.push_back(copy.ref);
  } else {
    // Unique for ever: the sequence may have been open under its name elsewhere.
    saved->manifest = absl::StrCat("checkpoint/", tenant.name, "/", handle.id.ToString(), "/",
                                   absl::Hex(options_.incarnation, absl::kZeroPad16), "-", info.id);
    status = CheckManifestSize(absl::StrCat("create checkpoint of sequence ", handle.id.ToString()),
                               saved->state);
    if (status.ok()) status = PutCheckpoint(*snapshot, options, saved.get(), &info, deadline);
  }
  MutexLock lock(&mu_);
  const auto made = FindCheckpoint(*sequence, info.id, /*is_ready=*/false);
  const bool is_closed = made == sequence->checkpoints.end();
  if (status.ok() && !is_closed && !made->info.is_void) {
    *made = {.info = info, .saved = std::move(saved)};
    TrimCheckpoints(*sequence);
    ++counters_.checkpoints_created;
    return info;
  }
  if (!is_closed) sequence->checkpoints.erase(made);
  checkpoint_bytes_ -= saved->host_bytes;
  // Also one whose answer was lost: its first version is the only one.
  const bool may_be_there = status.ok() || absl::IsUnavailable(status) ||
                            absl::IsDeadlineExceeded(status) || absl::IsCancelled(status);
  if (options.tier == Tier::kStore && may_be_there) {
    Release(saved->manifest, std::max<uint64_t>(1, saved->manifest_version));
  }
  if (!status.ok()) return status;
  if (is_closed) {
    // One of its id may be open again: that is another sequence.
    return WithReason(
        absl::NotFoundError(absl::StrCat("create checkpoint of sequence ", handle.id.ToString(),
                                         ": it was closed while it was copied")),
        "SEQUENCE_NOT_FOUND");
  }
  return absl::AbortedError(absl::StrCat("create checkpoint of sequence ", handle.id.ToString(),
                                         ": it was cut in front of row ", info.length,
                                         " while it was copied"));
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

Page& ModelHostImpl::MakeCopiedPage(const Sequence& sequence, const SavedCheckpoint& saved,
                                    const CopiedPage& copied, std::optional<PageId> parent,
                                    const std::vector<PrefixKey>& keys) {
  const StateSnapshot::Copy& copy = saved.copies[copied.page];
  const uint64_t index = copied.extent->first_row / page_tokens();
  Page& page = pages_.CreateTail(copied.group, sequence.tenant, *copied.frame,
                                 static_cast<uint32_t>(index), parent);
  ++counters_.pages_created;
  if (!copy.is_full) {
    page.SetRows(copy.rows);
    page.Seal();
    return page;
  }
  page.SetFull(page_tokens(), copy.ref.checksum);
  if (!GoesByPrefix(copied.group, *copied.extent, copy.ref, keys)) return page;
  const uint64_t begin = index * page_tokens();
  const uint64_t end = begin + page_tokens();
  const std::vector<uint32_t>& tokens = saved.state.tokens;
  // If another page has the key, this one stays private.
  pages_.SetKey(
      page, keys[index], index == 0 ? sequence.root : keys[index - 1], copy.ref.key,
      std::make_shared<const std::vector<uint32_t>>(tokens.begin() + begin, tokens.begin() + end),
      std::any_of(saved.state.inputs.begin(), saved.state.inputs.end(),
                  [&](const PositionedInput& input) {
                    return input.position >= begin && input.position < end;
                  }));
  return page;
}

absl::StatusOr<std::vector<PageId>> ModelHostImpl::BringBack(const SequencePtr& sequence,
                                                             const SavedCheckpoint& saved,
                                                             const std::vector<PrefixKey>& keys,
                                                             MonotonicTime deadline) {
  std::vector<CopiedPage> copied;  // in the order of their rows, by group
  std::vector<std::optional<PageId>> known(saved.copies.size());  // with a reference
  std::vector<bool> is_seen(saved.copies.size());
  std::vector<std::pair<CopiedPage, PageId>> stored;  // not resident, but the store has them
  Need need;
  need.fresh.assign(num_groups(), 0);
  const auto take = [&](uint32_t index, PageId id) {
    mu_.AssertHeld();
    known[index] = id;
    pages_.Ref(pages_.Get(id));
  };
  for (uint32_t g = 0; g < num_groups(); ++g) {
    for (const SavedExtent& extent : saved.state.groups[g]) {
      if (is_seen[extent.page]) continue;
      is_seen[extent.page] = true;
      copied.push_back({extent.page, g, &extent});
      const Page* page = FindSavedPage(g, extent, saved.pages[extent.page], keys);
      if (page != nullptr && page->is_readable()) {
        take(extent.page, page->id());
      } else if (page != nullptr && page->state() == PageState::kStored) {
        stored.emplace_back(copied.back(), page->id());
      } else {
        ++need.fresh[g];
      }
    }
  }
  // They come from the copy too, as far as frames can hold all at once; the others stay in the
  // store until somebody reads them, so that a sequence larger than the pool comes back.
  for (const auto& [page, id] : stored) {
    if (need.fresh[page.group] < num_frames_) {
      ++need.fresh[page.group];
    } else {
      take(page.page, id);
    }
  }
  Acquired got;
  const auto undo = [&] {
    mu_.AssertHeld();
    ReleaseAcquired(got);
    for (const std::optional<PageId>& id : known) {
      if (id) pages_.Unref(pages_.Get(*id));
    }
  };
  const uint64_t planned_at = sequence->revision;
  absl::Status status;
  // Without anything to wait for it does not stand in line.
  if (std::any_of(need.fresh.begin(), need.fresh.end(), [](uint32_t n) { return n > 0; })) {
    status = Acquire(sequence->tenant, need, deadline, &got);
  }
  if (!status.ok()) {
    undo();
    return status;
  }
  mu_.Unlock();
  std::vector<size_t> next(num_groups());
  for (CopiedPage& page : copied) {
    if (known[page.page]) continue;
    const StateSnapshot::Copy& copy = saved.copies[page.page];
    page.frame = got.fresh[page.group][next[page.group]++].frame;
    if (ChecksumOf(copy.body) != copy.ref.checksum && !options_.unsafe_skip_verify) {
      status = absl::DataLossError("restore checkpoint: its copy in host memory has changed");
    }
    // A whole frame: nothing of what it held before stays.
    if (status.ok()) status = pool_->Write(FrameOffset(page.group, *page.frame), copy.body);
    if (!status.ok()) break;
  }
  mu_.Lock();
  if (status.ok() &&
      (sequence->closed || sequence->revision != planned_at || sequence->pending != nullptr)) {
    status = absl::AbortedError("restore checkpoint: the sequence changed meanwhile");
  }
  // The copy is good where the page it was is not: with the next try it takes its place.
  const bool is_lost = std::any_of(known.begin(), known.end(), [&](const auto& id) {
    mu_.AssertHeld();
    return id && pages_.Get(*id).state() == PageState::kQuarantined;
  });
  if (status.ok() && is_lost) {
    status = absl::AbortedError("restore checkpoint: a page was lost meanwhile");
  }
  if (!status.ok()) {
    undo();
    return status;
  }
  std::vector<std::optional<PageId>> parents(num_groups());
  for (const CopiedPage& page : copied) {
    std::optional<PageId>& id = known[page.page];
    if (!id) id = AdoptCopiedPage(*sequence, saved, page, parents[page.group], keys, got);
    parents[page.group] = id;
  }
  ReleaseAcquired(got);  // frames whose pages came back by themselves meanwhile
  std::vector<PageId> pages;
  for (const std::optional<PageId>& id : known) pages.push_back(*id);
  return pages;
}

PageId ModelHostImpl::AdoptCopiedPage(const Sequence& sequence, const SavedCheckpoint& saved,
                                      const CopiedPage& copied, std::optional<PageId> parent,
                                      const std::vector<PrefixKey>& keys, Acquired& got) {
  const Page* known = FindSavedPage(copied.group, *copied.extent, saved.pages[copied.page], keys);
  if (known != nullptr && known->is_readable()) {
    pages_.Ref(pages_.Get(known->id()));
    return known->id();
  }
  std::erase_if(got.fresh[copied.group],
                [&](const FramePool::Grant& grant) { return grant.frame == *copied.frame; });
  // What the store has of it is the same bytes, where it keeps them as they are in frames.
  if (known != nullptr && known->state() == PageState::kStored &&
      !Geometry(copied.group).has_cold_types()) {
    Page& page = pages_.Get(known->id());
    pages_.Ref(page);
    pages_.BeginRestore(page, *copied.frame);
    pages_.FinishRestore(page);
    return page.id();
  }
  return MakeCopiedPage(sequence, saved, copied, parent, keys).id();
}

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
  VoidCheckpoints(*sequence, CommonRows(*sequence, rows));
  std::vector<RowsChange> change;
  change.push_back({sequence.get(), std::move(rows)});
  AdoptRows(std::move(change), pages_);
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
