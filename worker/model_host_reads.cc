// Reading and copying sequences: attention, row reads, forks, rewinds.
#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

constexpr uint32_t kMaxQueries = 65536;
constexpr int kMaxForkTries = 16;

}  // namespace

class ModelHostImpl::PinnedRowsImpl final : public ModelHost::PinnedRows {
 public:
  PinnedRowsImpl(ModelHostImpl* host, uint32_t group, uint64_t begin, uint64_t end,
                 std::vector<Extent> extents, std::vector<FrameId> frames,
                 std::vector<PageId> pinned)
      : host_(host),
        group_(group),
        begin_(begin),
        end_(end),
        extents_(std::move(extents)),
        frames_(std::move(frames)),
        pinned_(std::move(pinned)) {}

  ~PinnedRowsImpl() override {
    {
      MutexLock lock(&host_->mu_);
      for (PageId id : pinned_) host_->pages_.Unpin(host_->pages_.Get(id));
      host_->changed_.SignalAll();
    }
    host_->Flush();
  }

  uint64_t begin() const override { return begin_; }
  uint64_t end() const override { return end_; }

  std::vector<Run> Runs(uint32_t layer, RowKind kind) const override {
    const GroupGeometry& geometry = host_->Geometry(group_);
    std::vector<Run> runs;
    for (size_t i = 0; i < extents_.size(); ++i) {
      const Extent& extent = extents_[i];
      runs.push_back({extent.first_row, extent.count,
                      host_->FrameOffset(group_, frames_[i]) +
                          geometry.RowOffset(layer, kind, extent.first_slot),
                      uint64_t{extent.count} * geometry.row_bytes(kind)});
    }
    return runs;
  }

 private:
  ModelHostImpl* const host_;
  const uint32_t group_;
  const uint64_t begin_;
  const uint64_t end_;
  const std::vector<Extent> extents_;
  const std::vector<FrameId> frames_;  // frames of extents_: pinned, so they stay
  const std::vector<PageId> pinned_;
};

absl::StatusOr<std::shared_ptr<const ModelHost::PinnedRows>> ModelHostImpl::PinRows(
    const Tenant& tenant, SequenceId id, uint32_t group, uint64_t begin, uint64_t end,
    MonotonicTime deadline) {
  const auto pin = [&]() -> absl::StatusOr<std::shared_ptr<const PinnedRows>> {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, id));
    if (!sequence->pending) PT_RETURN_IF_ERROR(CutIfLost(*sequence));
    if (group >= num_groups()) {
      return absl::InvalidArgumentError(
          absl::StrCat("group = ", group, " is not below ", num_groups()));
    }
    const uint64_t last = end == 0 ? sequence->length() : end;
    if (begin > last || last > sequence->length()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "rows [", begin, ", ", last, ") are not within the ", sequence->length(), " committed"));
    }
    std::vector<Extent> extents = sequence->tables[group].Cover(begin, last);
    Need need;
    need.fresh.assign(num_groups(), 0);
    for (const Extent& extent : extents) need.pages.push_back(extent.page);
    Acquired got;
    const absl::Status status = Acquire(tenant.name, need, deadline, &got);
    if (!status.ok()) {
      if (GetReason(status) == "PREFIX_LOST" && !sequence->pending && !sequence->closed) {
        PT_RETURN_IF_ERROR(CutIfLost(*sequence));
      }
      return status;
    }
    std::vector<FrameId> frames;
    for (const Extent& extent : extents) frames.push_back(pages_.Get(extent.page).frame());
    return std::make_shared<const PinnedRowsImpl>(this, group, begin, last, std::move(extents),
                                                  std::move(frames), std::move(got.pinned));
  };
  auto rows = pin();
  Flush();
  return rows;
}

absl::StatusOr<AttendOutput> ModelHostImpl::Attend(const Tenant& tenant, const AttendQuery& query,
                                                   MonotonicTime deadline) {
  if (query.group >= num_groups() || query.layer >= Geometry(query.group).num_layers()) {
    return absl::InvalidArgumentError(absl::StrCat("attend: group ", query.group, ", layer ",
                                                   query.layer, " is not in the model"));
  }
  const GroupGeometry& geometry = Geometry(query.group);
  const LayerGroupSpec& spec = geometry.spec();
  if (!geometry.can_attend()) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat(
                          "attend: rows of group ", query.group, " are opaque to this worker")),
                      "CANNOT_ATTEND");
  }
  if (query.num_queries < 1 || query.num_queries > kMaxQueries || query.query_heads < 1 ||
      query.query_heads > 65536 || query.query_heads % spec.kv_heads != 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "attend: num_queries = ", query.num_queries, " (1 to ", kMaxQueries,
        "), query_heads = ", query.query_heads, " (a multiple of kv_heads = ", spec.kv_heads, ")"));
  }
  const uint64_t expected = uint64_t{query.num_queries} * query.query_heads * spec.k_dim;
  if (query.queries.size() != expected) {
    return absl::InvalidArgumentError(
        absl::StrCat("attend: queries has ", query.queries.size(), " values, expected ", expected));
  }
  const uint64_t last = query.first_position + query.num_queries;
  std::vector<PageId> pinned;
  std::vector<DeviceExtent> extents;
  const auto prepare = [&]() -> absl::Status {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, query.sequence));
    PT_RETURN_IF_ERROR(CheckHandle(*sequence, {query.sequence, query.epoch, std::nullopt}));
    const auto to_device = [&](const Extent& extent) -> DeviceExtent {
      mu_.AssertHeld();
      return {FrameOffset(query.group, pages_.Get(extent.page).frame()), extent.first_slot,
              extent.count, extent.first_row};
    };
    if (query.pending_id == 0) {
      if (last > sequence->length()) {
        return absl::InvalidArgumentError(absl::StrCat("attend: queries [", query.first_position,
                                                       ", ", last, ") are not within the ",
                                                       sequence->length(), " committed rows"));
      }
      const std::vector<Extent> cover = sequence->tables[query.group].Cover(0, last);
      Need need;
      need.fresh.assign(num_groups(), 0);
      for (const Extent& extent : cover) need.pages.push_back(extent.page);
      Acquired got;
      const absl::Status status = Acquire(tenant.name, need, deadline, &got);
      if (!status.ok()) {
        if (GetReason(status) == "PREFIX_LOST" && !sequence->pending && !sequence->closed) {
          PT_RETURN_IF_ERROR(CutIfLost(*sequence));
        }
        return status;
      }
      pinned = std::move(got.pinned);
      for (const Extent& extent : cover) extents.push_back(to_device(extent));
      return absl::OkStatus();
    }
    // Under a pending write: the prefix is pinned by it; wait for this layer's own rows.
    Pending* pending = nullptr;
    for (;;) {
      PT_ASSIGN_OR_RETURN(pending, FindPending(*sequence, query.pending_id));
      if (!pending->pin_prefix) {
        return WithReason(
            absl::FailedPreconditionError("attend: the write was not opened with pin_prefix"),
            "PREFIX_NOT_PINNED");
      }
      if (last > pending->first_position + pending->num_tokens) {
        return absl::InvalidArgumentError(absl::StrCat(
            "attend: queries [", query.first_position, ", ", last, ") reach behind the ",
            pending->first_position + pending->num_tokens, " rows of this write"));
      }
      const std::array<uint32_t, 2>& arrived = pending->arrived[query.group][query.layer];
      const uint32_t complete =
          geometry.v_row_bytes() == 0 ? arrived[0] : std::min(arrived[0], arrived[1]);
      if (last <= pending->first_position + complete) break;
      const absl::Duration left = deadline - clock_->MonotonicNow();
      if (left <= absl::ZeroDuration()) {
        return absl::DeadlineExceededError(absl::StrCat("attend: layer ", query.layer, " has ",
                                                        complete, " of ", pending->num_tokens,
                                                        " rows of this write"));
      }
      changed_.WaitWithTimeout(&mu_, std::min(left, absl::Milliseconds(100)));
    }
    const PageTable& table = sequence->tables[query.group];
    const uint64_t committed_end = std::min(last, sequence->length());
    for (const Extent& extent : table.Cover(0, committed_end)) {
      pinned.push_back(extent.page);
      extents.push_back(to_device(extent));
    }
    const uint32_t tail_rows = pending->first_position % page_tokens();
    uint64_t position = pending->first_position;
    for (size_t t = 0; position < last; ++t) {
      const uint32_t slot = t == 0 ? tail_rows : 0;
      const uint32_t count =
          static_cast<uint32_t>(std::min<uint64_t>(last - position, page_tokens() - slot));
      const PageId page = pending->targets[query.group][t];
      pinned.push_back(page);
      extents.push_back(to_device(
          {.page = page, .first_slot = slot, .count = count, .first_row = position}));
      position += count;
    }
    // Our own pins: the write may be aborted while we compute.
    for (PageId id : pinned) pages_.Pin(pages_.Get(id));
    return absl::OkStatus();
  };
  absl::Status status = prepare();
  AttendOutput output;
  if (status.ok()) {
    const uint64_t heads = uint64_t{query.num_queries} * query.query_heads;
    output.outputs.resize(heads * spec.v_dim);
    output.log_sum_exp.resize(heads);
    AttentionCall call;
    call.group = &geometry;
    call.layer = query.layer;
    call.extents = extents;
    call.num_queries = query.num_queries;
    call.query_heads = query.query_heads;
    call.first_position = query.first_position;
    call.scale = query.scale != 0 ? query.scale : 1.0f / std::sqrt(static_cast<float>(spec.k_dim));
    call.queries = query.queries;
    call.outputs = std::span(output.outputs);
    call.log_sum_exp = std::span(output.log_sum_exp);
    status = pool_->Attend(call);
    MutexLock lock(&mu_);
    for (PageId id : pinned) pages_.Unpin(pages_.Get(id));
    changed_.SignalAll();
  }
  Flush();
  if (!status.ok()) return status;
  return output;
}

absl::StatusOr<ForkResult> ModelHostImpl::Fork(const Tenant& tenant, const SequenceHandle& source,
                                               std::optional<uint64_t> wanted,
                                               MonotonicTime deadline) {
  const auto fork = [&]() -> absl::StatusOr<ForkResult> {
    MutexLock lock(&mu_);
    for (int attempt = 0; attempt < kMaxForkTries; ++attempt) {
      PT_ASSIGN_OR_RETURN(SequencePtr from, FindSequence(tenant, source.id));
      PT_RETURN_IF_ERROR(CheckHandle(*from, source));
      if (!from->pending) PT_RETURN_IF_ERROR(CutIfLost(*from));
      if (sequences_.size() >= options_.max_open_sequences) {
        return WithReason(absl::ResourceExhaustedError(absl::StrCat(
                              "fork sequence: ", sequences_.size(), " are open already")),
                          "TOO_MANY_SEQUENCES");
      }
      const uint64_t length = wanted.value_or(from->length());
      if (length > from->length()) {
        return absl::InvalidArgumentError(
            absl::StrCat("fork: length ", length, " > ", from->length(), " of the source"));
      }
      const uint32_t tail_rows = length % page_tokens();
      // A tail still being appended to is copied; everything full is shared.
      const auto tail_of = [&](uint32_t g) -> std::optional<PageId> {
        mu_.AssertHeld();
        if (tail_rows == 0) return std::nullopt;
        const PageId id = from->tables[g].Cover(length - tail_rows, length).front().page;
        return pages_.Get(id).is_full() ? std::nullopt : std::optional(id);
      };
      Need need;
      need.fresh.assign(num_groups(), 0);
      for (uint32_t g = 0; g < num_groups(); ++g) {
        if (const std::optional<PageId> tail = tail_of(g)) {
          need.pages.push_back(*tail);
          need.fresh[g] = 1;
        }
      }
      Acquired got;
      if (!need.pages.empty()) {
        const absl::Status status = Acquire(tenant.name, need, deadline, &got);
        if (absl::IsAborted(status)) continue;
        PT_RETURN_IF_ERROR(status);
        // It may have changed while we waited: then the plan is void.
        bool is_same = !from->closed && length <= from->length();
        size_t next = 0;
        for (uint32_t g = 0; is_same && g < num_groups(); ++g) {
          const std::optional<PageId> tail = tail_of(g);
          if (need.fresh[g] == 0)
            is_same = !tail;
          else
            is_same = tail && *tail == need.pages[next++];
        }
        if (!is_same) {
          ReleaseAcquired(got);
          continue;
        }
      }
      auto to = std::make_shared<Sequence>();
      to->tenant = from->tenant;
      to->root = from->root;
      to->tokens.assign(from->tokens.begin(), from->tokens.begin() + length);
      to->keys.assign(from->keys.begin(), from->keys.begin() + length / page_tokens());
      for (const PositionedInput& input : from->inputs) {
        if (input.position < length) to->inputs.push_back(input);
      }
      to->was_appended = from->was_appended;
      to->tables.resize(num_groups());
      ForkResult result;
      std::vector<FrameId> tail_frames(num_groups());
      for (uint32_t g = 0; g < num_groups(); ++g) {
        for (const Extent& extent : from->tables[g].Cover(0, length)) {
          if (need.fresh[g] > 0 && extent.first_row == length - tail_rows) {
            tail_frames[g] = pages_.Get(extent.page).frame();
            continue;
          }
          pages_.Ref(pages_.Get(extent.page));
          to->tables[g].Append(extent);
          ++result.shared_pages;
        }
      }
      if (!need.pages.empty()) {
        mu_.Unlock();
        absl::Status status;
        for (uint32_t g = 0; g < num_groups() && status.ok(); ++g) {
          if (need.fresh[g] == 0) continue;
          status = ZeroIfNeeded(g, got.fresh[g].front());
          if (status.ok()) {
            status = CopyRows(g, tail_frames[g], got.fresh[g].front().frame, tail_rows);
          }
        }
        mu_.Lock();
        if (!status.ok()) {
          ReleaseAcquired(got);
          for (PageTable& table : to->tables) {
            for (PageId id : table.Truncate(0)) pages_.Unref(pages_.Get(id));
          }
          return status;
        }
        for (uint32_t g = 0; g < num_groups(); ++g) {
          if (need.fresh[g] == 0) continue;
          PageTable& table = to->tables[g];
          Page& copy =
              pages_.CreateTail(g, tenant.name, got.fresh[g].front().frame,
                                static_cast<uint32_t>(length / page_tokens()),
                                table.empty() ? std::nullopt : std::optional(table.back().page));
          got.fresh[g].clear();
          copy.SetRows(tail_rows);
          table.Append({.page = copy.id(),
                        .first_slot = 0,
                        .count = tail_rows,
                        .first_row = length - tail_rows});
          ++counters_.pages_created;
        }
        counters_.rows_copied += tail_rows;
        result.copied_rows = tail_rows;
        ReleaseAcquired(got);
      }
      to->id = {options_.incarnation, NextNumber()};
      sequences_[to->id.number] = to;
      result.info = InfoOf(*to);
      return result;
    }
    return absl::AbortedError("fork: the source kept changing; retry");
  };
  absl::StatusOr<ForkResult> result = fork();
  Flush();
  return result;
}

absl::StatusOr<RewindResult> ModelHostImpl::Rewind(const Tenant& tenant,
                                                   const SequenceHandle& handle, int64_t length) {
  RewindResult result;
  {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindForChange(tenant, handle));
    if (length < 0 || static_cast<uint64_t>(length) > sequence->length()) {
      return absl::InvalidArgumentError(
          absl::StrCat("rewind: length = ", length, " is not 0 to ", sequence->length()));
    }
    result.removed_tokens = sequence->length() - length;
    result.freed_pages = Truncate(*sequence, length);
    result.info = InfoOf(*sequence);
  }
  Flush();
  return result;
}

}  // namespace pagetide
