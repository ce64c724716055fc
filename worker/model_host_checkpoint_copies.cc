// Checkpoints that are copies, in host memory or in the store: how they are made, and how one in
// host memory comes back into frames.
#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/manifest_races.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

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

ModelHostImpl::CopyPlan ModelHostImpl::PlanCopies(const std::string& tenant,
                                                  const SavedCheckpoint& saved,
                                                  const std::vector<PrefixKey>& keys) {
  CopyPlan plan;
  plan.known.resize(saved.copies.size());
  plan.need.fresh.assign(num_groups(), 0);
  std::vector<bool> is_seen(saved.copies.size());
  std::vector<std::pair<CopiedPage, PageId>> stored;  // not resident, but the store has them
  const auto take = [&](uint32_t index, PageId id) {
    mu_.AssertHeld();
    plan.known[index] = id;
    pages_.Ref(pages_.Get(id));
  };
  for (uint32_t g = 0; g < num_groups(); ++g) {
    for (const SavedExtent& extent : saved.state.groups[g]) {
      if (is_seen[extent.page]) continue;
      is_seen[extent.page] = true;
      plan.copied.push_back({extent.page, g, &extent});
      const Page* page = FindSavedPage(g, extent, saved.pages[extent.page], keys);
      if (page != nullptr && page->tenant() != tenant) page = nullptr;
      if (page != nullptr && page->is_readable()) {
        take(extent.page, page->id());
      } else if (page != nullptr && page->state() == PageState::kStored) {
        stored.emplace_back(plan.copied.back(), page->id());
      } else {
        ++plan.need.fresh[g];
      }
    }
  }
  // They come from the copy too, as far as frames can hold all at once; the others stay in the
  // store until somebody reads them, so that a sequence larger than the pool comes back.
  for (const auto& [page, id] : stored) {
    if (plan.need.fresh[page.group] < num_frames_) {
      ++plan.need.fresh[page.group];
    } else {
      take(page.page, id);
    }
  }
  return plan;
}

void ModelHostImpl::AssignFrames(CopyPlan& plan, const Acquired& got) {
  std::vector<size_t> next(got.fresh.size());
  for (CopiedPage& page : plan.copied) {
    if (!plan.known[page.page]) page.frame = got.fresh[page.group][next[page.group]++].frame;
  }
}

absl::Status ModelHostImpl::CheckKnown(absl::string_view action, const CopyPlan& plan) const {
  for (const std::optional<PageId>& id : plan.known) {
    if (id && pages_.Find(*id)->state() == PageState::kQuarantined) {
      return absl::AbortedError(absl::StrCat(action, ": a page was lost meanwhile"));
    }
  }
  return absl::OkStatus();
}

std::vector<PageId> ModelHostImpl::AdoptCopies(const Sequence& sequence,
                                               const SavedCheckpoint& saved, CopyPlan& plan,
                                               const std::vector<PrefixKey>& keys, Acquired& got) {
  std::vector<std::optional<PageId>> parents(num_groups());
  for (const CopiedPage& page : plan.copied) {
    std::optional<PageId>& id = plan.known[page.page];
    if (!id) id = AdoptCopiedPage(sequence, saved, page, parents[page.group], keys, got);
    parents[page.group] = id;
  }
  ReleaseAcquired(got);  // frames whose pages came back by themselves meanwhile
  std::vector<PageId> pages;
  for (const std::optional<PageId>& id : plan.known) pages.push_back(*id);
  return pages;
}

void ModelHostImpl::DropPlan(const CopyPlan& plan, Acquired& got) {
  ReleaseAcquired(got);
  for (const std::optional<PageId>& id : plan.known) {
    if (id) pages_.Unref(pages_.Get(*id));
  }
}

absl::StatusOr<std::vector<PageId>> ModelHostImpl::BringBack(const SequencePtr& sequence,
                                                             const SavedCheckpoint& saved,
                                                             const std::vector<PrefixKey>& keys,
                                                             MonotonicTime deadline) {
  CopyPlan plan = PlanCopies(sequence->tenant, saved, keys);
  const std::vector<uint32_t>& fresh = plan.need.fresh;
  Acquired got;
  const uint64_t planned_at = sequence->revision;
  absl::Status status;
  // Without anything to wait for it does not stand in line.
  if (std::any_of(fresh.begin(), fresh.end(), [](uint32_t n) { return n > 0; })) {
    status = Acquire(sequence->tenant, plan.need, deadline, &got);
  }
  if (!status.ok()) {
    DropPlan(plan, got);
    return status;
  }
  AssignFrames(plan, got);
  mu_.Unlock();
  for (const CopiedPage& page : plan.copied) {
    if (!page.frame) continue;
    const StateSnapshot::Copy& copy = saved.copies[page.page];
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
  if (status.ok()) status = CheckKnown("restore checkpoint", plan);
  if (!status.ok()) {
    DropPlan(plan, got);
    return status;
  }
  return AdoptCopies(*sequence, saved, plan, keys, got);
}

PageId ModelHostImpl::AdoptCopiedPage(const Sequence& sequence, const SavedCheckpoint& saved,
                                      const CopiedPage& copied, std::optional<PageId> parent,
                                      const std::vector<PrefixKey>& keys, Acquired& got) {
  const Page* known = FindSavedPage(copied.group, *copied.extent, saved.pages[copied.page], keys);
  if (known != nullptr && known->tenant() != sequence.tenant) known = nullptr;
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

}  // namespace pagetide
