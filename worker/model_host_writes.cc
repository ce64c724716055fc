// Pending writes: appends and reservations, from their frames to their last row.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

constexpr uint32_t kMaxReservedTokens = 1024;
constexpr absl::Duration kMaxLease = absl::Minutes(5);

absl::Status CheckPositions(const SequenceRows& rows, uint64_t num_tokens) {
  if (rows.end_position() + static_cast<int64_t>(num_tokens) <= kMaxPosition + 1) {
    return absl::OkStatus();
  }
  return absl::InvalidArgumentError(absl::StrCat("tokens: positions ", rows.end_position(), " + ",
                                                 num_tokens, " pass ", kMaxPosition));
}

}  // namespace

std::unique_ptr<ModelHostImpl::Pending> ModelHostImpl::NewPending(const Sequence& sequence,
                                                                  uint32_t num_tokens,
                                                                  bool pin_prefix) {
  auto pending = std::make_unique<Pending>();
  pending->id = NextNumber();
  pending->first_row = sequence.length();
  pending->first_position = sequence.end_position();
  pending->num_tokens = num_tokens;
  pending->pin_prefix = pin_prefix;
  pending->began = clock_->MonotonicNow();
  pending->targets.resize(num_groups());
  pending->created.resize(num_groups());
  pending->arrived.resize(num_groups());
  for (uint32_t g = 0; g < num_groups(); ++g) {
    if (!traits_[g].is_whole) pending->arrived[g].resize(Geometry(g).num_layers(), {0, 0});
  }
  pending->page_bytes_arrived.resize(num_groups());
  return pending;
}

PendingSlot ModelHostImpl::SlotOf(const Sequence& sequence) {
  const Pending& pending = *sequence.pending;
  return {sequence.id,        pending.id,
          pending.first_row,  static_cast<uint64_t>(pending.first_position),
          pending.num_tokens, pending.pages_created};
}

int64_t ModelHostImpl::PositionIn(const Pending& pending, uint32_t index) {
  if (pending.parents.empty()) return pending.first_position + index;
  int64_t depth = 0;
  for (int32_t at = pending.parents[index]; at >= 0; at = pending.parents[at]) ++depth;
  return pending.first_position + depth;
}

uint64_t ModelHostImpl::RowOffsetIn(const Pending& pending, const std::vector<FrameId>& frames,
                                    uint32_t group, uint32_t layer, RowKind kind,
                                    uint32_t index) const {
  const uint32_t slot = pending.first_slot[group] + index;
  return FrameOffset(group, frames[slot / page_tokens()]) +
         Geometry(group).RowOffset(layer, kind, slot % page_tokens());
}

absl::StatusOr<ModelHostImpl::PageRun> ModelHostImpl::FindPageRun(const Pending& pending,
                                                                  const RowRun& run,
                                                                  uint64_t num_bytes) const {
  if (run.group >= num_groups() || !traits_[run.group].is_whole) {
    return absl::InvalidArgumentError(
        absl::StrCat("rows: ROW_KIND_PAGE for group ", run.group, ", which has rows of K and V"));
  }
  const std::vector<uint64_t>& arrived = pending.page_bytes_arrived[run.group];
  if (run.page >= arrived.size()) {
    return absl::InvalidArgumentError(absl::StrCat("rows: page ", run.page, " of group ", run.group,
                                                   " is not among the ", arrived.size(),
                                                   " being written"));
  }
  const uint64_t page_bytes = Geometry(run.group).page_bytes();
  if (num_bytes == 0 || run.page_offset > arrived[run.page] ||
      num_bytes > page_bytes - run.page_offset) {
    return absl::InvalidArgumentError(absl::StrCat(
        "rows: bytes [", run.page_offset, ", + ", num_bytes, ") of page ", run.page, " of group ",
        run.group, ": ", arrived[run.page], " of ", page_bytes, " have arrived"));
  }
  const Page& page = *pages_.Find(pending.targets[run.group][run.page]);
  return PageRun{FrameOffset(run.group, page.frame()) + run.page_offset, run.page};
}

ModelHostImpl::WritePlan ModelHostImpl::PlanWrite(const SequencePtr& sequence) {
  WritePlan plan;
  plan.sequence = sequence;
  plan.need.fresh.assign(num_groups(), 0);
  const Pending& pending = *sequence->pending;
  for (uint32_t g = 0; g < num_groups(); ++g) {
    const PageTable& table = sequence->tables[g];
    if (traits_[g].is_whole) {
      // A page that holds committed rows is not written again: the engine gives it anew.
      TailPlan whole{.kind = TailPlan::Kind::kWhole};
      if (!traits_[g].is_state) {
        whole.rows = static_cast<uint32_t>(sequence->length() % page_tokens());
      }
      plan.tails.push_back(whole);
    } else {
      plan.tails.push_back(PlanTail(table, pages_, page_tokens(), sequence->length(),
                                    sequence->is_next_canonical()));
    }
    const TailPlan& tail = plan.tails.back();
    plan.need.fresh[g] =
        traits_[g].is_state
            ? 1
            : static_cast<uint32_t>(model_->geometry().PagesFor(tail.rows + pending.num_tokens));
    if (tail.kind == TailPlan::Kind::kInPlace) {
      plan.need.writable.push_back(tail.page);
      // Slots that were given up while others held the page may not be found from here on.
      SyncTails(*sequence, sequence->root, page_tokens(), pages_);
      --plan.need.fresh[g];
    } else if (tail.kind == TailPlan::Kind::kCopy) {
      plan.need.pages.push_back(tail.page);
    }
    if (!pending.pin_prefix) continue;
    for (const Extent& extent : table.extents()) {
      if (tail.kind == TailPlan::Kind::kInPlace && extent.page == tail.page) continue;
      plan.need.pages.push_back(extent.page);
    }
  }
  // An edited sequence may have several extents in a page.
  std::sort(plan.need.pages.begin(), plan.need.pages.end());
  plan.need.pages.erase(std::unique(plan.need.pages.begin(), plan.need.pages.end()),
                        plan.need.pages.end());
  return plan;
}

absl::Status ModelHostImpl::OpenWrites(const std::string& tenant,
                                       const std::vector<SequencePtr>& sequences,
                                       MonotonicTime deadline) {
  std::vector<WritePlan> plans;
  Need all;
  all.fresh.assign(num_groups(), 0);
  for (const SequencePtr& sequence : sequences) {
    plans.push_back(PlanWrite(sequence));
    const Need& need = plans.back().need;
    all.pages.insert(all.pages.end(), need.pages.begin(), need.pages.end());
    all.writable.insert(all.writable.end(), need.writable.begin(), need.writable.end());
    for (uint32_t g = 0; g < num_groups(); ++g) all.fresh[g] += need.fresh[g];
  }
  // Sequences that share a prefix need its pages once.
  std::sort(all.pages.begin(), all.pages.end());
  all.pages.erase(std::unique(all.pages.begin(), all.pages.end()), all.pages.end());

  // A write whose sequence is closed leaves the line at once, with the frames it has so far.
  const auto is_wanted = [&]() {
    return std::none_of(sequences.begin(), sequences.end(), [](const SequencePtr& sequence) {
      return sequence->closed || sequence->pending->aborted;
    });
  };
  Acquired got;
  absl::Status status = Acquire(tenant, all, deadline, &got, is_wanted);
  if (!is_wanted()) {
    if (status.ok()) ReleaseAcquired(got);
    status =
        WithReason(absl::NotFoundError("the sequence was closed meanwhile"), "SEQUENCE_NOT_FOUND");
  } else if (status.ok()) {
    for (const WritePlan& plan : plans) {
      for (const TailPlan& tail : plan.tails) {
        if (tail.kind == TailPlan::Kind::kInPlace && pages_.Get(tail.page).is_full()) {
          status = absl::AbortedError("the sequence's tail was sealed meanwhile; retry");
        }
      }
    }
    if (!status.ok()) ReleaseAcquired(got);
  }
  if (status.ok()) {
    // Each write holds pins of its own, so that they end one by one.
    for (const WritePlan& plan : plans) {
      std::vector<PageId>& pinned = plan.sequence->pending->pinned;
      pinned = plan.need.pages;
      pinned.insert(pinned.end(), plan.need.writable.begin(), plan.need.writable.end());
      for (PageId id : pinned) pages_.Pin(pages_.Get(id));
      // From here on nobody may seal a tail that was found unsealed.
      std::vector<PageId>& in_place = plan.sequence->pending->in_place;
      in_place = plan.need.writable;
      for (PageId id : in_place) pages_.Get(id).SetBeingWritten(true);
    }
    std::vector<size_t> taken(num_groups(), 0);
    std::vector<std::vector<FramePool::Grant>> fresh = std::exchange(got.fresh, {});
    for (const WritePlan& plan : plans) {
      std::vector<std::vector<FramePool::Grant>> own(num_groups());
      for (uint32_t g = 0; g < num_groups(); ++g) {
        own[g].assign(fresh[g].begin() + taken[g],
                      fresh[g].begin() + taken[g] + plan.need.fresh[g]);
        taken[g] += plan.need.fresh[g];
      }
      if (!status.ok()) {
        for (uint32_t g = 0; g < num_groups(); ++g) {
          for (const FramePool::Grant& grant : own[g]) pages_.ReleaseFrame(g, grant.frame);
        }
        continue;
      }
      status = OpenWrite(plan, std::move(own));
    }
    ReleaseAcquired(got);
  }
  for (const SequencePtr& sequence : sequences) {
    sequence->pending->state = Pending::State::kOpen;
    // Closed or aborted while we worked without the lock: all or none.
    if (status.ok() && (sequence->closed || sequence->pending->aborted)) {
      status = WithReason(absl::NotFoundError("the sequence was closed meanwhile"),
                          "SEQUENCE_NOT_FOUND");
    }
  }
  if (!status.ok()) {
    for (const SequencePtr& sequence : sequences) {
      sequence->pending->aborted = true;
      Settle(*sequence);
      if (!sequence->closed && GetReason(status) == "PREFIX_LOST") {
        const absl::Status cut = CutIfLost(*sequence);
        if (!cut.ok() && sequences.size() == 1) status = cut;
      }
    }
  }
  return status;
}

absl::Status ModelHostImpl::OpenWrite(const WritePlan& plan,
                                      std::vector<std::vector<FramePool::Grant>> fresh) {
  Sequence& sequence = *plan.sequence;
  Pending& pending = *sequence.pending;
  std::vector<FrameId> tail_frames(num_groups());
  for (uint32_t g = 0; g < num_groups(); ++g) {
    if (plan.tails[g].kind == TailPlan::Kind::kCopy) {
      tail_frames[g] = pages_.Get(plan.tails[g].page).frame();
    }
  }
  // The frames are ours alone, and the tail is pinned: no lock needed to fill them.
  mu_.Unlock();
  absl::Status status;
  for (uint32_t g = 0; g < num_groups() && status.ok(); ++g) {
    for (const FramePool::Grant& grant : fresh[g]) {
      if (status.ok()) status = ZeroIfNeeded(g, grant);
    }
    if (status.ok() && plan.tails[g].kind == TailPlan::Kind::kCopy) {
      status = CopyRuns(g, tail_frames[g], fresh[g].front().frame, plan.tails[g].copies);
    }
  }
  mu_.Lock();
  for (uint32_t g = 0; g < num_groups() && status.ok(); ++g) {
    const TailPlan& tail = plan.tails[g];
    // It turned out to be damaged while its rows were copied.
    if (tail.kind == TailPlan::Kind::kCopy &&
        pages_.Get(tail.page).state() == PageState::kQuarantined) {
      status = WithReason(absl::FailedPreconditionError("a page of the sequence was lost"),
                          "PREFIX_LOST");
    }
  }
  if (!status.ok()) {
    for (uint32_t g = 0; g < num_groups(); ++g) {
      for (const FramePool::Grant& grant : fresh[g]) pages_.ReleaseFrame(g, grant.frame);
    }
    return status;
  }
  pending.first_slot.assign(num_groups(), 0);
  for (uint32_t g = 0; g < num_groups(); ++g) {
    const TailPlan& tail = plan.tails[g];
    PageTable& table = sequence.tables[g];
    pending.first_slot[g] = tail.rows;
    uint32_t depth = static_cast<uint32_t>((sequence.length() - tail.rows) / page_tokens());
    std::optional<PageId> parent;
    if (!table.empty()) parent = table.back().page;
    if (tail.kind == TailPlan::Kind::kWhole) {
      // A state follows none; the page that is given anew follows the one in front of it.
      const std::span<const Extent> extents = table.extents();
      if (traits_[g].is_state || (tail.rows > 0 && extents.size() < 2)) {
        parent.reset();
      } else if (tail.rows > 0) {
        parent = extents[extents.size() - 2].page;
      }
    }
    size_t next = 0;
    if (tail.kind == TailPlan::Kind::kCopy) {
      // The copy takes the tail's place: the same rows, in a page that may grow.
      Page& copy = pages_.CreateTail(g, sequence.tenant, fresh[g][next++].frame, depth,
                                     pages_.Get(tail.page).parent());
      copy.SetRows(tail.rows);
      pages_.Pin(copy);
      pending.pinned.push_back(copy.id());
      // From here on others can come to reference its committed rows, as those of any tail.
      copy.SetBeingWritten(true);
      pending.in_place.push_back(copy.id());
      ReplaceTail(tail, copy, table, pages_);
      pending.targets[g].push_back(copy.id());
      counters_.rows_copied += tail.num_copied_rows();
      ++counters_.pages_created;
      ++pending.pages_created;
    } else if (tail.kind == TailPlan::Kind::kInPlace) {
      Page& page = pages_.Get(tail.page);
      pages_.BeginWrite(page);
      // Slots that were given up are written over from now on: nobody may find them any more, not
      // even if the rows in front of them became shared while this call waited.
      page.SetRows(tail.rows);
      pages_.SetTailTokens(page, sequence.root, {}, /*has_inputs=*/false);
      pending.targets[g].push_back(tail.page);
    }
    if (!pending.targets[g].empty()) {
      parent = pending.targets[g].back();
      ++depth;
    }
    for (; next < fresh[g].size(); ++next) {
      Page& page = pages_.CreateTail(g, sequence.tenant, fresh[g][next].frame, depth++, parent);
      pages_.Pin(page);
      pending.pinned.push_back(page.id());
      pending.targets[g].push_back(page.id());
      pending.created[g].push_back(page.id());
      parent = page.id();
      ++counters_.pages_created;
      ++pending.pages_created;
    }
    if (traits_[g].is_whole) pending.page_bytes_arrived[g].assign(pending.targets[g].size(), 0);
  }
  SyncTails(sequence, sequence.root, page_tokens(), pages_);
  return absl::OkStatus();
}

absl::StatusOr<PendingSlot> ModelHostImpl::BeginAppend(
    const Tenant& tenant, const SequenceHandle& handle, absl::string_view append_id,
    uint64_t expected_length, std::span<const uint32_t> tokens,
    std::span<const PositionedInput> inputs, bool pin_prefix, MonotonicTime deadline) {
  if (append_id.empty() || append_id.size() > 128) {
    return absl::InvalidArgumentError(
        absl::StrCat("append_id has ", append_id.size(), " characters, expected 1 to 128"));
  }
  if (tokens.empty()) return absl::InvalidArgumentError("tokens is empty");
  PT_RETURN_IF_ERROR(ValidateTokens(tokens, inputs, expected_length));
  absl::StatusOr<PendingSlot> slot;
  {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindForChange(tenant, handle));
    PT_RETURN_IF_ERROR(CutIfLost(*sequence));
    if (expected_length != sequence->length()) {
      return WithReason(absl::FailedPreconditionError(absl::StrCat(
                            "append to sequence ", handle.id.ToString(), ": expected_length ",
                            expected_length, " != length ", sequence->length())),
                        "LENGTH_MISMATCH", {{"length", absl::StrCat(sequence->length())}});
    }
    PT_RETURN_IF_ERROR(CheckPositions(*sequence, tokens.size()));
    sequence->pending = NewPending(*sequence, static_cast<uint32_t>(tokens.size()), pin_prefix);
    sequence->pending->append_id = std::string(append_id);
    sequence->pending->tokens.assign(tokens.begin(), tokens.end());
    sequence->pending->inputs.assign(inputs.begin(), inputs.end());
    const absl::Status opened = OpenWrites(tenant.name, {sequence}, deadline);
    if (opened.ok()) {
      Pending& pending = *sequence->pending;
      pending.expires = clock_->MonotonicNow() + options_.max_append_idle;
      if (pool_->host_view() != nullptr) {
        for (const std::vector<PageId>& targets : pending.targets) {
          pending.checksums.emplace_back(targets.size());
        }
      }
      slot = SlotOf(*sequence);
    } else {
      slot = opened;
    }
  }
  Flush();
  return slot;
}

absl::StatusOr<std::vector<PendingSlot>> ModelHostImpl::Reserve(const Tenant& tenant,
                                                                std::span<const ReserveItem> items,
                                                                absl::Duration lease,
                                                                bool pin_prefix,
                                                                MonotonicTime deadline) {
  if (items.empty() || items.size() > 4096) {
    return absl::InvalidArgumentError(
        absl::StrCat("items has ", items.size(), " entries, expected 1 to 4096"));
  }
  if (lease <= absl::ZeroDuration() || lease > kMaxLease) {
    return absl::InvalidArgumentError(absl::StrCat("lease = ", absl::FormatDuration(lease),
                                                   " is not above 0 and at most ",
                                                   absl::FormatDuration(kMaxLease)));
  }
  std::vector<PendingSlot> slots;
  absl::Status status;
  {
    MutexLock lock(&mu_);
    std::vector<SequencePtr> sequences;
    for (size_t i = 0; i < items.size() && status.ok(); ++i) {
      const ReserveItem& item = items[i];
      if (item.num_tokens < 1 || item.num_tokens > kMaxReservedTokens) {
        status = absl::InvalidArgumentError(absl::StrCat(
            "items[", i, "].num_tokens = ", item.num_tokens, " is not 1 to ", kMaxReservedTokens));
        break;
      }
      // The same sequence twice is refused here too: its first item has made a write pending.
      absl::StatusOr<SequencePtr> sequence = FindForChange(tenant, item.sequence);
      status = sequence.status();
      if (status.ok()) status = CutIfLost(**sequence);
      if (status.ok() && (*sequence)->length() + item.num_tokens > options_.max_sequence_tokens) {
        status = absl::InvalidArgumentError(absl::StrCat(
            "items[", i, "]: length ", (*sequence)->length(), " + ", item.num_tokens,
            " exceeds the limit of ", options_.max_sequence_tokens, " tokens a sequence"));
      }
      if (status.ok()) status = CheckPositions(**sequence, item.num_tokens);
      if (status.ok() && !item.parents.empty()) {
        if (item.parents.size() != item.num_tokens) {
          status =
              absl::InvalidArgumentError(absl::StrCat("items[", i, "]: ", item.parents.size(),
                                                      " parents for ", item.num_tokens, " tokens"));
        }
        for (size_t t = 0; status.ok() && t < item.parents.size(); ++t) {
          if (item.parents[t] >= -1 && item.parents[t] < static_cast<int32_t>(t)) continue;
          status = absl::InvalidArgumentError(
              absl::StrCat("items[", i, "].parents[", t, "] = ", item.parents[t], " is not -1 to ",
                           static_cast<int64_t>(t) - 1));
        }
      }
      if (!status.ok()) break;
      (*sequence)->pending = NewPending(**sequence, item.num_tokens, pin_prefix);
      (*sequence)->pending->parents = item.parents;
      sequences.push_back(*sequence);
    }
    if (!status.ok()) {
      for (const SequencePtr& sequence : sequences) sequence->pending.reset();
      return status;
    }
    status = OpenWrites(tenant.name, sequences, deadline);
    if (status.ok()) {
      const MonotonicTime expires = clock_->MonotonicNow() + lease;
      for (const SequencePtr& sequence : sequences) {
        sequence->pending->expires = expires;
        slots.push_back(SlotOf(*sequence));
      }
    }
  }
  Flush();
  if (!status.ok()) return status;
  return slots;
}

absl::StatusOr<uint64_t> ModelHostImpl::FindAppend(const Tenant& tenant, SequenceId id,
                                                   absl::string_view append_id,
                                                   MonotonicTime deadline) {
  MutexLock lock(&mu_);
  for (;;) {
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, id));
    const Pending* pending = sequence->pending.get();
    if (append_id.empty() || pending == nullptr || pending->append_id != append_id ||
        pending->aborted) {
      return WithReason(absl::NotFoundError(absl::StrCat(
                            "sequence ", id.ToString(), ": no append with this append_id is open")),
                        "APPEND_NOT_FOUND");
    }
    // Still in line for its frames: the append is known, and nothing can be done under it yet.
    if (pending->state != Pending::State::kAcquiring) return pending->id;
    const absl::Duration left = deadline - clock_->MonotonicNow();
    if (left <= absl::ZeroDuration()) {
      return absl::DeadlineExceededError(
          absl::StrCat("sequence ", id.ToString(), ": the append still waits for frames"));
    }
    changed_.WaitWithTimeout(&mu_, std::min(left, absl::Milliseconds(100)));
  }
}

absl::Status ModelHostImpl::WriteRows(const Tenant& tenant, SequenceId id, uint64_t pending_id,
                                      const RowRun& run, uint64_t num_bytes, RowSource source) {
  struct Piece {
    uint64_t frame_offset;  // of the first row, in the pool
    uint64_t source_offset;
    uint64_t num_bytes;
    FillingChecksum* checksum;  // null: none is kept
    bool is_hashed;             // here, block by block
  };
  std::vector<Piece> pieces;
  SequencePtr sequence;
  Pending* pending = nullptr;
  uint64_t row_bytes = 0;
  {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(sequence, FindSequence(tenant, id));
    PT_ASSIGN_OR_RETURN(pending, FindPending(*sequence, pending_id));
    if (run.kind == RowKind::kPage) {
      PT_ASSIGN_OR_RETURN(const PageRun page, FindPageRun(*pending, run, num_bytes));
      Piece piece{page.offset, 0, num_bytes, nullptr, false};
      if (!pending->checksums.empty()) {
        piece.checksum = &pending->checksums[run.group][page.target];
        piece.is_hashed = piece.checksum->Claim(run.page_offset, num_bytes);
      }
      pieces.push_back(piece);
    } else if (run.group < num_groups() && traits_[run.group].is_whole) {
      return absl::InvalidArgumentError(
          absl::StrCat("rows: layer group ", run.group,
                       " has no rows of K and V; its pages are sent whole (ROW_KIND_PAGE)"));
    } else if (run.group >= num_groups() || run.layer >= Geometry(run.group).num_layers()) {
      return absl::InvalidArgumentError(absl::StrCat("rows: group ", run.group, ", layer ",
                                                     run.layer, " is not in a model of ",
                                                     num_groups(), " groups"));
    } else {
      const GroupGeometry& geometry = Geometry(run.group);
      row_bytes = geometry.row_bytes(run.kind);
      const uint64_t end = uint64_t{run.first_token} + run.num_tokens;
      if (run.num_tokens == 0 || end > pending->num_tokens) {
        return absl::InvalidArgumentError(absl::StrCat("rows: tokens [", run.first_token, ", ", end,
                                                       ") are not within the ", pending->num_tokens,
                                                       " being written"));
      }
      if (num_bytes != run.num_tokens * row_bytes) {
        return absl::InvalidArgumentError(
            absl::StrCat("rows: data has ", num_bytes, " bytes, expected ", run.num_tokens,
                         " tokens x ", row_bytes, " = ", run.num_tokens * row_bytes));
      }
      const uint32_t arrived = pending->arrived[run.group][run.layer][run.kind == RowKind::kV];
      if (run.first_token > arrived) {
        return absl::InvalidArgumentError(absl::StrCat("rows: layer ", run.layer, " has ", arrived,
                                                       " rows, the next run begins at ",
                                                       run.first_token));
      }
      const uint32_t tail_rows = pending->first_slot[run.group];
      for (uint64_t token = run.first_token; token < end;) {
        const uint64_t slot_in_run = tail_rows + token;
        const uint32_t slot = slot_in_run % page_tokens();
        const uint64_t count = std::min<uint64_t>(end - token, page_tokens() - slot);
        const uint64_t target = slot_in_run / page_tokens();
        const Page& page = pages_.Get(pending->targets[run.group][target]);
        const uint64_t offset = geometry.RowOffset(run.layer, run.kind, slot);
        Piece piece{FrameOffset(run.group, page.frame()) + offset,
                    (token - run.first_token) * row_bytes, count * row_bytes, nullptr, false};
        if (!pending->checksums.empty()) {
          piece.checksum = &pending->checksums[run.group][target];
          piece.is_hashed = piece.checksum->Claim(offset, piece.num_bytes);
        }
        pieces.push_back(piece);
        token += count;
      }
    }
    ++pending->num_writers;
  }
  // Slots behind the committed length of pinned pages: nobody else looks there.
  absl::Status status;
  std::byte* const view = pool_->host_view();
  std::vector<std::byte> buffer;
  for (const Piece& piece : pieces) {
    if (piece.num_bytes == 0) continue;
    if (view != nullptr) {
      const std::span<std::byte> to(view + piece.frame_offset, piece.num_bytes);
      const size_t block = piece.is_hashed ? ChecksumStream::kBlockBytes : to.size();
      for (size_t at = 0; at < to.size(); at += block) {
        const auto part = to.subspan(at, std::min(block, to.size() - at));
        source(piece.source_offset + at, part);
        if (piece.is_hashed) piece.checksum->Update(part);
      }
    } else {
      buffer.resize(piece.num_bytes);
      source(piece.source_offset, buffer);
      status = pool_->Write(piece.frame_offset, buffer);
      if (!status.ok()) break;
    }
  }
  bool must_flush = false;
  {
    MutexLock lock(&mu_);
    --pending->num_writers;
    if (pending->is_append()) {
      pending->expires = clock_->MonotonicNow() + options_.max_append_idle;
    }
    for (const Piece& piece : pieces) {
      if (piece.checksum != nullptr) piece.checksum->Release();
    }
    if (status.ok() && run.kind == RowKind::kPage) {
      uint64_t& arrived = pending->page_bytes_arrived[run.group][run.page];
      arrived = std::max(arrived, run.page_offset + num_bytes);
    } else if (status.ok()) {
      uint32_t& arrived = pending->arrived[run.group][run.layer][run.kind == RowKind::kV];
      arrived = std::max(arrived, run.first_token + run.num_tokens);
    }
    must_flush = pending->aborted;
    Settle(*sequence);
    changed_.SignalAll();
  }
  if (must_flush) Flush();
  return status;
}

absl::Status ModelHostImpl::Abort(const Tenant& tenant, SequenceId id, uint64_t pending_id) {
  {
    MutexLock lock(&mu_);
    const absl::StatusOr<SequencePtr> sequence = FindSequence(tenant, id);
    if (!sequence.ok()) return absl::OkStatus();
    Pending* const pending = (*sequence)->pending.get();
    if (pending == nullptr || pending->id != pending_id || pending->is_hold()) {
      return absl::OkStatus();
    }
    pending->aborted = true;
    Settle(**sequence);
    changed_.SignalAll();
  }
  Flush();
  return absl::OkStatus();
}

}  // namespace pagetide
