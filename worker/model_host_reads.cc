// Reading and copying sequences: attention, row reads, forks.
#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

constexpr uint32_t kMaxQueries = 65536;
constexpr int kMaxForkTries = 16;

}  // namespace

ModelHostImpl::Need ModelHostImpl::NeedOf(std::span<const Extent> extents) const {
  Need need;
  need.fresh.assign(num_groups(), 0);
  for (const Extent& extent : extents) need.pages.push_back(extent.page);
  // An edited sequence may have several extents in a page.
  std::sort(need.pages.begin(), need.pages.end());
  need.pages.erase(std::unique(need.pages.begin(), need.pages.end()), need.pages.end());
  return need;
}

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
        pins_(host, std::move(pinned)) {}

  uint64_t begin() const override { return begin_; }
  uint64_t end() const override { return end_; }

  std::vector<Run> Runs(uint32_t layer, RowKind kind) const override {
    const GroupGeometry& geometry = host_->Geometry(group_);
    std::vector<Run> runs;
    for (size_t i = 0; i < extents_.size(); ++i) {
      const Extent& extent = extents_[i];
      if (kind == RowKind::kPage) {
        if (geometry.has_rows()) continue;
        runs.push_back({extent.first_row, extent.count, host_->FrameOffset(group_, frames_[i]),
                        geometry.page_bytes(), 0});
        continue;
      }
      runs.push_back({extent.first_row, extent.count,
                      host_->FrameOffset(group_, frames_[i]) +
                          geometry.RowOffset(layer, kind, extent.first_slot),
                      uint64_t{extent.count} * geometry.row_bytes(kind),
                      kind == RowKind::kK ? extent.shift : 0});
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
  const PagePins pins_;
};

absl::StatusOr<std::shared_ptr<const ModelHost::PinnedRows>> ModelHostImpl::PinRows(
    const Tenant& tenant, SequenceId id, uint32_t group, uint64_t begin, uint64_t end,
    MonotonicTime deadline) {
  const auto plan_of = [&](const Sequence& sequence) -> absl::StatusOr<ReadPlan> {
    mu_.AssertHeld();
    const PageTable& table = sequence.tables[group];
    const GroupTraits& traits = traits_[group];
    ReadPlan plan;
    plan.first = begin;
    plan.last = end == 0 ? sequence.length() : end;
    bool pins_held = begin == kHeldRows;
    if (traits.is_state && !table.empty() && plan.last <= sequence.length()) {
      pins_held = true;  // the state is what there is to read
      plan.last = sequence.length();
    }
    if (pins_held) plan.first = table.empty() ? plan.last : table.extents().front().first_row;
    if (plan.first > plan.last || plan.last > sequence.length()) {
      return absl::InvalidArgumentError(absl::StrCat("rows [", plan.first, ", ", plan.last,
                                                     ") are not within the ", sequence.length(),
                                                     " committed"));
    }
    if (const uint64_t gap = table.FirstGap(plan.first, plan.last); gap < plan.last && !pins_held) {
      return RowsLacking(absl::StrCat("read rows [", plan.first, ", ", plan.last, ")"),
                         {group, gap});
    }
    if (!traits.is_whole) {
      plan.extents = table.Cover(plan.first, plan.last);
      return plan;
    }
    // Whole pages only: those that hold a row of the range.
    for (const Extent& extent : table.extents()) {
      if (extent.end_row() > plan.first && extent.first_row < plan.last) {
        plan.extents.push_back(extent);
      }
    }
    return plan;
  };
  const auto pin = [&]() -> absl::StatusOr<std::shared_ptr<const PinnedRows>> {
    MutexLock lock(&mu_);
    if (group >= num_groups()) {
      return absl::InvalidArgumentError(
          absl::StrCat("group = ", group, " is not below ", num_groups()));
    }
    PT_ASSIGN_OR_RETURN(PinnedPlan pinned, PinPlan(tenant, id, "read rows", plan_of, deadline));
    std::vector<FrameId> frames;
    for (const Extent& extent : pinned.plan.extents) {
      frames.push_back(pages_.Get(extent.page).frame());
    }
    return std::make_shared<const PinnedRowsImpl>(this, group, pinned.plan.first, pinned.plan.last,
                                                  std::move(pinned.plan.extents), std::move(frames),
                                                  std::move(pinned.pages));
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
  if (query.first_position > static_cast<uint64_t>(kMaxPosition)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "attend: first_position = ", query.first_position, " is above ", kMaxPosition));
  }
  const uint64_t last = query.first_position + query.num_queries;
  std::vector<PageId> pinned;
  std::vector<DeviceExtent> extents;
  // Of a draft tree: for each query the rows from its root to itself, and its position.
  std::vector<std::pair<std::vector<DeviceExtent>, uint64_t>> branches;
  const auto prepare = [&]() -> absl::Status {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, query.sequence));
    PT_RETURN_IF_ERROR(CheckHandle(*sequence, {query.sequence, query.epoch, std::nullopt}));
    const auto add = [&](const PositionedRun& run) {
      mu_.AssertHeld();
      const Extent& extent = run.extent;
      extents.push_back({FrameOffset(query.group, pages_.Get(extent.page).frame()),
                         extent.first_slot, extent.count, static_cast<uint64_t>(run.first_position),
                         extent.shift});
    };
    // Keys behind the last query, and those that no query's window reaches, are not even read.
    const auto rows_seen = [&]() { return sequence->RowAt(static_cast<int64_t>(last)); };
    const auto first_seen = [&]() {
      return sequence->MaskedRows(traits_[query.group], static_cast<int64_t>(query.first_position));
    };
    // And those that a ring keeps for good.
    const auto kept_seen = [&](uint64_t end) {
      return std::min({sequence->KeptRows(traits_[query.group]), first_seen(), end});
    };
    const auto check_held = [&](uint64_t end) -> absl::Status {
      const PageTable& table = sequence->tables[query.group];
      uint64_t gap = table.FirstGap(0, kept_seen(end));
      if (gap == kept_seen(end)) gap = std::max(first_seen(), table.FirstGap(first_seen(), end));
      if (gap >= end) return absl::OkStatus();
      return RowsLacking(absl::StrCat("attend from position ", query.first_position),
                         {query.group, gap});
    };
    const auto runs_seen = [&](uint64_t end) {
      std::vector<PositionedRun> runs = sequence->Runs(query.group, 0, kept_seen(end));
      const std::vector<PositionedRun> newest =
          sequence->Runs(query.group, std::min(first_seen(), end), end);
      runs.insert(runs.end(), newest.begin(), newest.end());
      return runs;
    };
    if (query.pending_id == 0) {
      if (last > static_cast<uint64_t>(sequence->end_position()) && !query.allow_behind_end) {
        return absl::InvalidArgumentError(absl::StrCat(
            "attend: queries [", query.first_position, ", ", last,
            ") are not within the committed positions, which end at ", sequence->end_position()));
      }
      const uint64_t end = rows_seen();
      PT_RETURN_IF_ERROR(check_held(end));
      std::vector<Extent> seen;
      for (const PositionedRun& run : runs_seen(end)) seen.push_back(run.extent);
      Need need = NeedOf(seen);
      Acquired got;
      const absl::Status status = Acquire(tenant.name, need, deadline, &got);
      if (!status.ok()) {
        if (GetReason(status) == "PREFIX_LOST" && !sequence->pending && !sequence->closed) {
          PT_RETURN_IF_ERROR(CutIfLost(*sequence));
        }
        return status;
      }
      // An edit or a commit may have come while this call waited for frames, and rows have gone or
      // come.
      if (sequence->closed || rows_seen() != end || !check_held(end).ok()) {
        ReleaseAcquired(got);
        return absl::AbortedError("attend: the sequence was edited meanwhile");
      }
      for (const PositionedRun& run : runs_seen(end)) {
        // (NeedOf sorts.)
        if (!std::binary_search(got.pinned.begin(), got.pinned.end(), run.extent.page)) {
          ReleaseAcquired(got);
          return absl::AbortedError("attend: the sequence was edited meanwhile");
        }
        add(run);
      }
      pinned = std::move(got.pinned);
      return absl::OkStatus();
    }
    // Under a pending write: the prefix is pinned by it; wait for this layer's own rows.
    Pending* pending = nullptr;
    uint64_t first_pending = 0;
    for (;;) {
      PT_ASSIGN_OR_RETURN(pending, FindPending(*sequence, query.pending_id));
      if (!pending->pin_prefix) {
        return WithReason(
            absl::FailedPreconditionError("attend: the write was not opened with pin_prefix"),
            "PREFIX_NOT_PINNED");
      }
      first_pending = static_cast<uint64_t>(pending->first_position);
      if (last > first_pending + pending->num_tokens) {
        return absl::InvalidArgumentError(
            absl::StrCat("attend: queries [", query.first_position, ", ", last,
                         ") reach behind this write, which ends at position ",
                         first_pending + pending->num_tokens));
      }
      const std::array<uint32_t, 2>& arrived = pending->arrived[query.group][query.layer];
      const uint32_t complete =
          geometry.v_row_bytes() == 0 ? arrived[0] : std::min(arrived[0], arrived[1]);
      if (last <= first_pending + complete) break;
      const absl::Duration left = deadline - clock_->MonotonicNow();
      if (left <= absl::ZeroDuration()) {
        return absl::DeadlineExceededError(absl::StrCat("attend: layer ", query.layer, " has ",
                                                        complete, " of ", pending->num_tokens,
                                                        " rows of this write"));
      }
      changed_.WaitWithTimeout(&mu_, std::min(left, absl::Milliseconds(100)));
    }
    const bool is_tree = !pending->parents.empty();
    if (is_tree && query.first_position < first_pending) {
      return absl::InvalidArgumentError(
          absl::StrCat("attend: first_position = ", query.first_position, " is in front of the ",
                       "draft tree, which begins at ", first_pending));
    }
    const uint64_t end_seen = is_tree ? sequence->num_rows() : rows_seen();
    // Of a draft tree the first query's position is that of the write: the least of all.
    PT_RETURN_IF_ERROR(check_held(end_seen));
    for (const PositionedRun& run : runs_seen(end_seen)) {
      pinned.push_back(run.extent.page);
      add(run);
    }
    const uint32_t tail_rows = pending->first_slot[query.group];
    if (is_tree) {
      const std::vector<PageId>& targets = pending->targets[query.group];
      for (PageId id : targets) pinned.push_back(id);
      for (uint32_t i = 0; i < query.num_queries; ++i) {
        const auto own = static_cast<int32_t>(query.first_position - first_pending + i);
        std::vector<DeviceExtent> branch;
        for (int32_t at = own; at >= 0; at = pending->parents[at]) {
          const uint32_t slot = tail_rows + static_cast<uint32_t>(at);
          branch.push_back(
              {FrameOffset(query.group, pages_.Get(targets[slot / page_tokens()]).frame()),
               slot % page_tokens(), 1,
               static_cast<uint64_t>(PositionIn(*pending, static_cast<uint32_t>(at)))});
        }
        std::reverse(branch.begin(), branch.end());
        branches.emplace_back(std::move(branch), PositionIn(*pending, static_cast<uint32_t>(own)));
      }
      for (PageId id : pinned) pages_.Pin(pages_.Get(id));
      return absl::OkStatus();
    }
    uint64_t position = first_pending;
    for (size_t t = 0; position < last; ++t) {
      const uint32_t slot = t == 0 ? tail_rows : 0;
      const uint32_t count =
          static_cast<uint32_t>(std::min<uint64_t>(last - position, page_tokens() - slot));
      const PageId page = pending->targets[query.group][t];
      pinned.push_back(page);
      add({{.page = page, .first_slot = slot, .count = count}, static_cast<int64_t>(position)});
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
    if (branches.empty()) status = pool_->Attend(call);
    for (size_t i = 0; i < branches.size() && status.ok(); ++i) {
      std::vector<DeviceExtent> seen = extents;
      seen.insert(seen.end(), branches[i].first.begin(), branches[i].first.end());
      const uint64_t head_rows = query.query_heads;
      call.extents = seen;
      call.num_queries = 1;
      call.first_position = branches[i].second;
      call.queries = query.queries.subspan(i * head_rows * spec.k_dim, head_rows * spec.k_dim);
      call.outputs =
          std::span(output.outputs).subspan(i * head_rows * spec.v_dim, head_rows * spec.v_dim);
      call.log_sum_exp = std::span(output.log_sum_exp).subspan(i * head_rows, head_rows);
      status = pool_->Attend(call);
    }
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
                                               MonotonicTime deadline, bool is_unlisted) {
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
      if (const auto lacked = from->LackedAt(traits_, length)) {
        return RowsLacking(absl::StrCat("fork at ", length), *lacked);
      }
      // A tail still being appended to is copied; everything full is shared.
      const auto plan_of = [&]() {
        mu_.AssertHeld();
        auto to = std::make_shared<Sequence>();
        to->tenant = from->tenant;
        to->root = from->root;
        const RowPiece piece{from.get(), 0, length};
        static_cast<SequenceRows&>(*to) = Assemble(traits_, page_tokens(), {&piece, 1});
        return to;
      };
      const auto tails_of = [&](const Sequence& to) {
        mu_.AssertHeld();
        std::vector<TailPlan> tails(num_groups());
        for (uint32_t g = 0; g < num_groups(); ++g) {
          const PageTable& table = to.tables[g];
          // Whole pages are never written again: they are shared, full or not.
          if (!traits_[g].is_whole && !table.empty() && !pages_.Get(table.back().page).is_full()) {
            // Rows that stand several times in their page may be more than a page takes: such a
            // tail is shared, and nothing goes behind it in place.
            TailPlan copy = PlanTailCopy(table, page_tokens());
            if (copy.rows < page_tokens()) tails[g] = std::move(copy);
          }
        }
        return tails;
      };
      SequencePtr to = plan_of();
      std::vector<TailPlan> tails = tails_of(*to);
      Need need;
      need.fresh.assign(num_groups(), 0);
      for (uint32_t g = 0; g < num_groups(); ++g) {
        if (tails[g].kind != TailPlan::Kind::kCopy) continue;
        need.pages.push_back(tails[g].page);
        need.fresh[g] = 1;
      }
      Acquired got;
      if (!need.pages.empty()) {
        const uint64_t planned_at = from->revision;
        const absl::Status status = Acquire(tenant.name, need, deadline, &got);
        if (absl::IsAborted(status)) continue;
        PT_RETURN_IF_ERROR(status);
        // It may have changed while we waited: then the plan is void.
        if (from->closed || from->revision != planned_at) {
          ReleaseAcquired(got);
          continue;
        }
        to =
            plan_of();  // an open write may have moved the tail, which is no change of the sequence
        tails = tails_of(*to);
        bool is_same = true;
        size_t next = 0;
        for (uint32_t g = 0; g < num_groups(); ++g) {
          const bool is_copied = tails[g].kind == TailPlan::Kind::kCopy;
          is_same = is_same && is_copied == (need.fresh[g] > 0) &&
                    (!is_copied || tails[g].page == need.pages[next++]);
        }
        if (!is_same) {
          ReleaseAcquired(got);
          continue;
        }
      }
      to->was_appended = from->was_appended;
      to->is_unlisted = is_unlisted;
      ForkResult result;
      for (uint32_t g = 0; g < num_groups(); ++g) {
        result.copied_rows = std::max(result.copied_rows, tails[g].num_copied_rows());
        absl::flat_hash_set<PageId> shared;
        for (const Extent& extent : to->tables[g].extents()) {
          pages_.Ref(pages_.Get(extent.page));
          shared.insert(extent.page);
        }
        result.shared_pages += shared.size() - need.fresh[g];
      }
      if (!need.pages.empty()) {
        std::vector<FrameId> tail_frames(num_groups());
        for (uint32_t g = 0; g < num_groups(); ++g) {
          if (need.fresh[g] > 0) tail_frames[g] = pages_.Get(tails[g].page).frame();
        }
        mu_.Unlock();
        absl::Status status;
        for (uint32_t g = 0; g < num_groups() && status.ok(); ++g) {
          if (need.fresh[g] == 0) continue;
          status = ZeroIfNeeded(g, got.fresh[g].front());
          if (status.ok()) {
            status = CopyRuns(g, tail_frames[g], got.fresh[g].front().frame, tails[g].copies);
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
          Page& copy =
              pages_.CreateTail(g, tenant.name, got.fresh[g].front().frame,
                                static_cast<uint32_t>((length - tails[g].rows) / page_tokens()),
                                pages_.Get(tails[g].page).parent());
          got.fresh[g].clear();
          copy.SetRows(tails[g].rows);
          ReplaceTail(tails[g], copy, to->tables[g], pages_);
          ++counters_.pages_created;
        }
        counters_.rows_copied += result.copied_rows;
        ReleaseAcquired(got);
      }
      AddSequence(to);
      result.info = InfoOf(*to);
      return result;
    }
    return absl::AbortedError("fork: the source kept changing; retry");
  };
  absl::StatusOr<ForkResult> result = fork();
  Flush();
  return result;
}

}  // namespace pagetide
