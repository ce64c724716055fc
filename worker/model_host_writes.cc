// Pending writes: appends and reservations, from their frames to their commit.
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
// Shorter appends say more about latency than about prefill speed.
constexpr uint32_t kMinMeasuredTokens = 32;
// How long a call under an append waits for the append to get its frames.
constexpr absl::Duration kMaxAppendWait = absl::Seconds(30);

}  // namespace

bool ModelHostImpl::MustCopyTail(const Sequence& sequence, uint32_t group) const {
  const uint32_t tail_rows = sequence.length() % page_tokens();
  if (tail_rows == 0) return false;
  const Page* page = pages_.Find(sequence.tables[group].back().page);
  // A full page never changes. Slots that were cut off by a rewind may still be read by a call that
  // pinned the page before.
  return page->is_full() || (page->pins() > 0 && page->high_water_rows() > tail_rows);
}

std::unique_ptr<ModelHostImpl::Pending> ModelHostImpl::NewPending(const Sequence& sequence,
                                                                  uint32_t num_tokens,
                                                                  bool pin_prefix) {
  auto pending = std::make_unique<Pending>();
  pending->id = NextNumber();
  pending->first_position = sequence.length();
  pending->num_tokens = num_tokens;
  pending->pin_prefix = pin_prefix;
  pending->began = clock_->MonotonicNow();
  pending->targets.resize(num_groups());
  pending->created.resize(num_groups());
  pending->arrived.resize(num_groups());
  for (uint32_t g = 0; g < num_groups(); ++g) {
    pending->arrived[g].resize(Geometry(g).num_layers(), {0, 0});
  }
  return pending;
}

PendingSlot ModelHostImpl::SlotOf(const Sequence& sequence) {
  const Pending& pending = *sequence.pending;
  return {sequence.id, pending.id, pending.first_position, pending.num_tokens,
          pending.pages_created};
}

ModelHostImpl::WritePlan ModelHostImpl::PlanWrite(const SequencePtr& sequence) {
  WritePlan plan;
  plan.sequence = sequence;
  plan.need.fresh.assign(num_groups(), 0);
  plan.copies_tail.assign(num_groups(), false);
  const Pending& pending = *sequence->pending;
  const uint64_t tail_rows = sequence->length() % page_tokens();
  const uint64_t pages_touched = model_->geometry().PagesFor(tail_rows + pending.num_tokens);
  for (uint32_t g = 0; g < num_groups(); ++g) {
    const PageTable& table = sequence->tables[g];
    plan.need.fresh[g] = static_cast<uint32_t>(pages_touched);
    if (tail_rows > 0) {
      plan.copies_tail[g] = MustCopyTail(*sequence, g);
      if (plan.copies_tail[g]) {
        plan.need.pages.push_back(table.back().page);
      } else {
        plan.need.writable.push_back(table.back().page);
        --plan.need.fresh[g];
      }
    }
    if (!pending.pin_prefix) continue;
    for (const Extent& extent : table.extents()) {
      if (tail_rows > 0 && extent.page == table.back().page) continue;
      plan.need.pages.push_back(extent.page);
    }
  }
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
  }
  if (status.ok()) {
    // Each write holds pins of its own, so that they end one by one.
    for (const WritePlan& plan : plans) {
      std::vector<PageId>& pinned = plan.sequence->pending->pinned;
      pinned = plan.need.pages;
      pinned.insert(pinned.end(), plan.need.writable.begin(), plan.need.writable.end());
      for (PageId id : pinned) pages_.Pin(pages_.Get(id));
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
  const uint32_t tail_rows = sequence.length() % page_tokens();
  std::vector<FrameId> tail_frames(num_groups());
  for (uint32_t g = 0; g < num_groups(); ++g) {
    if (plan.copies_tail[g]) tail_frames[g] = pages_.Get(sequence.tables[g].back().page).frame();
  }
  // The frames are ours alone, and the tail is pinned: no lock needed to fill them.
  mu_.Unlock();
  absl::Status status;
  for (uint32_t g = 0; g < num_groups() && status.ok(); ++g) {
    for (const FramePool::Grant& grant : fresh[g]) {
      if (status.ok()) status = ZeroIfNeeded(g, grant);
    }
    if (status.ok() && plan.copies_tail[g]) {
      status = CopyRows(g, tail_frames[g], fresh[g].front().frame, tail_rows);
    }
  }
  mu_.Lock();
  if (!status.ok()) {
    for (uint32_t g = 0; g < num_groups(); ++g) {
      for (const FramePool::Grant& grant : fresh[g]) pages_.ReleaseFrame(g, grant.frame);
    }
    return status;
  }
  const bool has_inputs_in_tail =
      !sequence.inputs.empty() && sequence.inputs.back().position >= sequence.length() - tail_rows;
  for (uint32_t g = 0; g < num_groups(); ++g) {
    PageTable& table = sequence.tables[g];
    uint32_t depth = static_cast<uint32_t>(sequence.length() / page_tokens());
    std::optional<PageId> parent;
    if (!table.empty()) parent = table.back().page;
    size_t next = 0;
    if (tail_rows > 0) {
      if (plan.copies_tail[g]) {
        // The copy takes the tail's place: the same rows, in a page that may grow.
        Page& shared = pages_.Get(table.back().page);
        Page& copy =
            pages_.CreateTail(g, sequence.tenant, fresh[g][next++].frame, depth, shared.parent());
        copy.SetRows(tail_rows);
        pages_.Pin(copy);
        pending.pinned.push_back(copy.id());
        table.mutable_back().page = copy.id();
        table.mutable_back().first_slot = 0;
        pages_.Unref(shared);
        const PrefixKey& parent_key = depth == 0 ? sequence.root : sequence.keys[depth - 1];
        pages_.SetTailTokens(
            copy, parent_key,
            std::vector<uint32_t>(sequence.tokens.end() - tail_rows, sequence.tokens.end()),
            has_inputs_in_tail);
        counters_.rows_copied += tail_rows;
        ++counters_.pages_created;
        ++pending.pages_created;
      }
      Page& tail = pages_.Get(table.back().page);
      pages_.BeginWrite(tail);
      pending.targets[g].push_back(tail.id());
      parent = tail.id();
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
  }
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
    sequence->pending = NewPending(*sequence, static_cast<uint32_t>(tokens.size()), pin_prefix);
    sequence->pending->append_id = std::string(append_id);
    sequence->pending->tokens.assign(tokens.begin(), tokens.end());
    sequence->pending->inputs.assign(inputs.begin(), inputs.end());
    const absl::Status opened = OpenWrites(tenant.name, {sequence}, deadline);
    if (opened.ok()) {
      Pending& pending = *sequence->pending;
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
      if (!status.ok()) break;
      (*sequence)->pending = NewPending(**sequence, item.num_tokens, pin_prefix);
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
                                                   absl::string_view append_id) {
  MutexLock lock(&mu_);
  const MonotonicTime give_up = clock_->MonotonicNow() + kMaxAppendWait;
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
    if (clock_->MonotonicNow() >= give_up) {
      return absl::DeadlineExceededError(
          absl::StrCat("sequence ", id.ToString(), ": the append still waits for frames"));
    }
    changed_.WaitWithTimeout(&mu_, absl::Milliseconds(100));
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
    if (run.group >= num_groups() || run.layer >= Geometry(run.group).num_layers()) {
      return absl::InvalidArgumentError(absl::StrCat("rows: group ", run.group, ", layer ",
                                                     run.layer, " is not in a model of ",
                                                     num_groups(), " groups"));
    }
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
    const uint32_t tail_rows = pending->first_position % page_tokens();
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
    for (const Piece& piece : pieces) {
      if (piece.checksum != nullptr) piece.checksum->Release();
    }
    if (status.ok()) {
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

absl::StatusOr<CommitResult> ModelHostImpl::Commit(const Tenant& tenant,
                                                   const SequenceHandle& handle,
                                                   uint64_t pending_id,
                                                   std::span<const uint32_t> tokens) {
  const auto commit = [&]() -> absl::StatusOr<CommitResult> {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, handle.id));
    PT_RETURN_IF_ERROR(CheckHandle(*sequence, handle));
    PT_ASSIGN_OR_RETURN(Pending * pending, FindPending(*sequence, pending_id));
    const bool is_append = !pending->append_id.empty();
    if (is_append != tokens.empty() || tokens.size() > pending->num_tokens) {
      return absl::InvalidArgumentError(
          absl::StrCat("commit: ", tokens.size(), " tokens given, ",
                       is_append ? "an append has its own" : "reserved: 1 to ",
                       is_append ? "" : absl::StrCat(pending->num_tokens)));
    }
    const std::vector<uint32_t> added =
        is_append ? pending->tokens : std::vector<uint32_t>(tokens.begin(), tokens.end());
    const uint32_t n = static_cast<uint32_t>(added.size());
    PT_RETURN_IF_ERROR(ValidateTokens(added, {}, sequence->length()));
    for (uint32_t g = 0; g < num_groups(); ++g) {
      for (uint32_t layer = 0; layer < pending->arrived[g].size(); ++layer) {
        for (RowKind kind : {RowKind::kK, RowKind::kV}) {
          const uint32_t arrived = pending->arrived[g][layer][kind == RowKind::kV];
          if (arrived < n && Geometry(g).row_bytes(kind) > 0) {
            return WithReason(
                absl::FailedPreconditionError(absl::StrCat(
                    "commit: group ", g, ", layer ", layer, ", ", kind == RowKind::kK ? "K" : "V",
                    ": ", arrived, " of ", n, " rows arrived")),
                "ROWS_MISSING");
          }
        }
      }
    }
    if (pending->num_writers > 0) {
      return WithReason(absl::FailedPreconditionError(absl::StrCat(
                            "commit: ", pending->num_writers, " row parts are still arriving")),
                        "ROWS_MISSING");
    }
    // The rows are complete and nobody may write them now: hash what became full without the lock.
    pending->state = Pending::State::kCommitting;
    const uint32_t tail_rows = pending->first_position % page_tokens();
    const uint32_t num_filled = (tail_rows + n) / page_tokens();
    const uint64_t new_length = sequence->length() + n;
    std::vector<std::vector<uint64_t>> offsets(num_groups());
    for (uint32_t g = 0; g < num_groups(); ++g) {
      for (uint32_t p = 0; p < num_filled; ++p) {
        offsets[g].push_back(FrameOffset(g, pages_.Get(pending->targets[g][p]).frame()));
      }
    }
    std::vector<uint32_t> all = sequence->tokens;
    all.insert(all.end(), added.begin(), added.end());
    std::vector<PositionedInput> all_inputs = sequence->inputs;
    for (const PositionedInput& input : pending->inputs) all_inputs.push_back(input);
    std::vector<PrefixKey> keys = sequence->keys;
    mu_.Unlock();
    std::vector<std::vector<Checksum128>> checksums(num_groups());
    std::vector<std::vector<PageKey>> page_keys(num_groups());
    absl::Status status;
    std::vector<std::byte> buffer;
    const uint64_t first_filled = keys.size();
    for (uint32_t p = 0; p < num_filled; ++p) {
      const uint64_t at = (first_filled + p) * page_tokens();
      const auto from = std::lower_bound(all_inputs.begin(), all_inputs.end(), at,
                                         [](const PositionedInput& input, uint64_t position) {
                                           return input.position < position;
                                         });
      const auto to = std::lower_bound(from, all_inputs.end(), at + page_tokens(),
                                       [](const PositionedInput& input, uint64_t position) {
                                         return input.position < position;
                                       });
      keys.push_back(NextPrefixKey(keys.empty() ? sequence->root : keys.back(),
                                   std::span(all).subspan(at, page_tokens()), at,
                                   std::span(from, to)));
    }
    for (uint32_t g = 0; g < num_groups() && status.ok(); ++g) {
      for (uint32_t p = 0; p < num_filled && status.ok(); ++p) {
        const auto bytes = PageBytes(g, offsets[g][p], buffer);
        status = bytes.status();
        if (status.ok()) {
          checksums[g].push_back(pending->checksums.empty()
                                     ? ChecksumOf(*bytes)
                                     : pending->checksums[g][p].Finish(*bytes));
        }
        page_keys[g].push_back(MakePageKey(keys[first_filled + p], Geometry(g).fingerprint()));
      }
    }
    mu_.Lock();
    pending->state = Pending::State::kOpen;
    if (!status.ok() || pending->aborted || sequence->closed) {
      Settle(*sequence);
      if (!status.ok()) return status;
      return WithReason(absl::NotFoundError("the sequence was closed meanwhile"),
                        "SEQUENCE_NOT_FOUND");
    }
    // From here on nothing can fail.
    CommitResult result;
    std::vector<PageId> write_through;
    const auto has_inputs = [&](uint64_t at) {
      return std::any_of(all_inputs.begin(), all_inputs.end(), [&](const PositionedInput& input) {
        return input.position >= at && input.position < at + page_tokens();
      });
    };
    for (uint32_t g = 0; g < num_groups(); ++g) {
      PageTable& table = sequence->tables[g];
      const uint64_t num_targets = model_->geometry().PagesFor(tail_rows + n);
      uint64_t row = 0;  // of the write
      for (uint64_t t = 0; t < num_targets; ++t) {
        Page& page = pages_.Get(pending->targets[g][t]);
        const uint32_t slot = t == 0 ? tail_rows : 0;
        const uint32_t count =
            static_cast<uint32_t>(std::min<uint64_t>(n - row, page_tokens() - slot));
        if (slot > 0) {
          table.mutable_back().count += count;
        } else {
          table.Append({.page = page.id(),
                        .first_slot = 0,
                        .count = count,
                        .first_row = pending->first_position + row});
          // The page table's reference is the one that created_ held.
          std::erase(pending->created[g], page.id());
        }
        row += count;
        const uint64_t index = first_filled + t;
        const uint64_t at = index * page_tokens();
        const PrefixKey& parent = index == 0 ? sequence->root : keys[index - 1];
        if (t < num_filled) {
          page.SetFull(page_tokens(), checksums[g][t]);
          ++result.pages_filled;
          ++counters_.pages_filled;
          const bool is_keyed =
              pages_.SetKey(page, keys[index], parent, page_keys[g][t],
                            std::make_shared<const std::vector<uint32_t>>(
                                all.begin() + at, all.begin() + at + page_tokens()),
                            has_inputs(at));
          if (is_keyed && options_.write_through) write_through.push_back(page.id());
        } else {
          page.SetRows(slot + count);
          pages_.SetTailTokens(page, parent, std::vector<uint32_t>(all.begin() + at, all.end()),
                               has_inputs(at));
        }
      }
    }
    sequence->tokens = std::move(all);
    sequence->inputs = std::move(all_inputs);
    sequence->keys = std::move(keys);
    sequence->was_appended = true;
    ++sequence->revision;
    result.appended_tokens = n;
    result.pages_created = pending->pages_created;
    for (const std::vector<PageId>& left : pending->created) result.pages_created -= left.size();
    counters_.tokens_appended += n;
    if (is_append && n >= kMinMeasuredTokens) {
      prefill_meter_.Add(n, clock_->MonotonicNow() - pending->began);
    }
    DropPending(*sequence);
    (void)new_length;
    if (CanSpill()) StartSpills(write_through, options_.write_through_level);
    result.info = InfoOf(*sequence);
    return result;
  };
  absl::StatusOr<CommitResult> result = commit();
  Flush();
  return result;
}

absl::Status ModelHostImpl::Abort(const Tenant& tenant, SequenceId id, uint64_t pending_id) {
  {
    MutexLock lock(&mu_);
    const absl::StatusOr<SequencePtr> sequence = FindSequence(tenant, id);
    if (!sequence.ok()) return absl::OkStatus();
    Pending* const pending = (*sequence)->pending.get();
    if (pending == nullptr || pending->id != pending_id) return absl::OkStatus();
    pending->aborted = true;
    Settle(**sequence);
    changed_.SignalAll();
  }
  Flush();
  return absl::OkStatus();
}

}  // namespace pagetide
