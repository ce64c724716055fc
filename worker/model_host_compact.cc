// Compaction of edited sequences: rows move to pages of their own, contents and positions stay.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "core/compaction.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

constexpr int kMaxCompactTries = 8;

}  // namespace

absl::Status ModelHostImpl::CopyRun(uint32_t group, const CompactionRun& run,
                                    std::span<const FrameId> from, FrameId to, bool apply_shifts) {
  const GroupGeometry& geometry = Geometry(group);
  uint32_t slot = 0;
  std::vector<std::byte> turned;
  for (size_t i = 0; i < run.extents.size(); ++i) {
    const Extent& extent = run.extents[i];
    for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        const uint64_t bytes = uint64_t{extent.count} * geometry.row_bytes(kind);
        if (bytes == 0) continue;
        const uint64_t source =
            FrameOffset(group, from[i]) + geometry.RowOffset(layer, kind, extent.first_slot);
        const uint64_t target = FrameOffset(group, to) + geometry.RowOffset(layer, kind, slot);
        if (kind == RowKind::kV || extent.shift == 0 || !apply_shifts) {
          PT_RETURN_IF_ERROR(pool_->Copy(target, source, bytes));
          continue;
        }
        turned.resize(bytes);
        PT_RETURN_IF_ERROR(
            pool_->ReadShifted(geometry, source, extent.count, extent.shift, turned));
        PT_RETURN_IF_ERROR(pool_->Write(target, turned));
      }
    }
    slot += extent.count;
  }
  return absl::OkStatus();
}

absl::StatusOr<CompactResult> ModelHostImpl::CompactOnce(const Tenant& tenant,
                                                         const SequenceHandle& handle,
                                                         uint64_t max_rows, bool apply_shifts,
                                                         MonotonicTime deadline) {
  PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindForChange(tenant, handle));
  PT_RETURN_IF_ERROR(CutIfLost(*sequence));
  CompactResult result;
  std::vector<std::vector<CompactionRun>> runs(num_groups());
  Need need;
  need.fresh.assign(num_groups(), 0);
  uint64_t left = max_rows;
  for (uint32_t g = 0; g < num_groups() && left > 0; ++g) {
    if (traits_[g].is_whole) continue;  // never in pieces
    runs[g] = PlanCompaction(sequence->tables[g],
                             {page_tokens(), sequence->canonical_rows(), left, apply_shifts});
    need.fresh[g] = static_cast<uint32_t>(runs[g].size());
    for (const CompactionRun& run : runs[g]) {
      left -= std::min<uint64_t>(left, run.num_rows);
      result.moved_rows += run.num_rows;
      for (const Extent& extent : run.extents) need.pages.push_back(extent.page);
    }
  }
  if (result.moved_rows == 0) {
    result.info = InfoOf(*sequence);
    return result;
  }
  std::sort(need.pages.begin(), need.pages.end());
  need.pages.erase(std::unique(need.pages.begin(), need.pages.end()), need.pages.end());
  const uint64_t planned_at = sequence->revision;
  Acquired got;
  PT_RETURN_IF_ERROR(Acquire(tenant.name, need, deadline, &got));
  std::vector<std::vector<std::vector<FrameId>>> sources(num_groups());  // [group][run][extent]
  for (uint32_t g = 0; g < num_groups(); ++g) {
    for (const CompactionRun& run : runs[g]) {
      std::vector<FrameId>& frames = sources[g].emplace_back();
      for (const Extent& extent : run.extents) frames.push_back(pages_.Get(extent.page).frame());
    }
  }
  // Sources are pinned and their rows committed; the new frames are ours alone.
  mu_.Unlock();
  absl::Status status;
  std::vector<std::vector<std::optional<Checksum128>>> checksums(num_groups());
  std::vector<std::byte> buffer;
  for (uint32_t g = 0; g < num_groups() && status.ok(); ++g) {
    for (size_t r = 0; r < runs[g].size() && status.ok(); ++r) {
      const FramePool::Grant& grant = got.fresh[g][r];
      status = ZeroIfNeeded(g, grant);
      if (status.ok()) status = CopyRun(g, runs[g][r], sources[g][r], grant.frame, apply_shifts);
      checksums[g].emplace_back();
      if (!status.ok() || runs[g][r].num_rows < page_tokens()) continue;
      const auto bytes = PageBytes(g, FrameOffset(g, grant.frame), buffer);
      status = bytes.status();
      if (status.ok()) checksums[g][r] = ChecksumOf(*bytes);
    }
  }
  mu_.Lock();
  // A page that turned out to be damaged while its rows were copied ends the copy: the next try
  // says what was lost.
  if (status.ok() &&
      (sequence->closed || sequence->pending != nullptr || sequence->revision != planned_at ||
       ValidLength(*sequence) != sequence->length())) {
    status = absl::AbortedError("compact: the sequence changed meanwhile");
  }
  if (!status.ok()) {
    ReleaseAcquired(got);
    return status;
  }
  SequenceRows next = *sequence;
  std::vector<PageId> made;
  for (uint32_t g = 0; g < num_groups(); ++g) {
    std::vector<PageId> pages;
    for (size_t r = 0; r < runs[g].size(); ++r) {
      Page& page = pages_.CreateTail(g, sequence->tenant, got.fresh[g][r].frame,
                                     static_cast<uint32_t>(runs[g][r].first_row / page_tokens()),
                                     pages_.Get(runs[g][r].extents.front().page).parent());
      if (checksums[g][r])
        page.SetFull(page_tokens(), *checksums[g][r]);
      else
        page.SetRows(runs[g][r].num_rows);
      pages.push_back(page.id());
      made.push_back(page.id());
    }
    got.fresh[g].clear();
    next.tables[g] = CompactedTable(sequence->tables[g], runs[g], pages, !apply_shifts);
    result.num_extents += next.tables[g].extents().size();
  }
  counters_.pages_created += made.size();
  counters_.rows_compacted += result.moved_rows;
  std::vector<RowsChange> change;
  change.push_back({sequence.get(), std::move(next)});
  result.freed_pages = AdoptRows(std::move(change), pages_).freed;
  for (PageId id : made) pages_.Unref(pages_.Get(id));  // the creator's
  SyncTails(*sequence, sequence->root, page_tokens(), pages_);
  ++sequence->revision;
  ReleaseAcquired(got);
  result.info = InfoOf(*sequence);
  return result;
}

absl::StatusOr<CompactResult> ModelHostImpl::Compact(const Tenant& tenant,
                                                     const SequenceHandle& handle,
                                                     uint64_t max_rows, bool apply_shifts,
                                                     MonotonicTime deadline) {
  absl::StatusOr<CompactResult> result = absl::AbortedError("compact: not tried");
  {
    MutexLock lock(&mu_);
    for (int i = 0; i < kMaxCompactTries && absl::IsAborted(result.status()); ++i) {
      result = CompactOnce(tenant, handle, max_rows, apply_shifts, deadline);
    }
  }
  Flush();
  return result;
}

}  // namespace pagetide
