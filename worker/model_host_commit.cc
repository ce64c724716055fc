// The end of a pending write: its rows and pages become the sequence's.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

// Shorter appends say more about latency than about prefill speed.
constexpr uint32_t kMinMeasuredTokens = 32;

}  // namespace

std::vector<Extent> ModelHostImpl::ExtentsOfWrite(uint32_t group, const Pending& pending,
                                                  uint32_t num_tokens) const {
  std::vector<Extent> extents;
  const std::vector<PageId>& targets = pending.targets[group];
  const uint64_t end = pending.first_row + num_tokens;
  uint64_t row = pending.first_row;
  uint32_t slot = pending.first_slot[group];
  if (traits_[group].is_whole) {
    // From the first row of its first page, or of the page that the last row lies in.
    row = traits_[group].is_state ? (end - 1) / page_tokens() * page_tokens() : row - slot;
    slot = 0;
  }
  for (size_t t = 0; row < end; ++t) {
    const auto count = static_cast<uint32_t>(std::min<uint64_t>(end - row, page_tokens() - slot));
    extents.push_back({.page = targets[t], .first_slot = slot, .count = count, .first_row = row});
    row += count;
    slot = 0;
  }
  return extents;
}

absl::Status ModelHostImpl::CheckArrived(const Pending& pending, uint32_t num_rows,
                                         uint32_t num_tokens) const {
  const auto missing = [](auto... what) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat("commit: ", what...)),
                      "ROWS_MISSING");
  };
  for (uint32_t g = 0; g < num_groups(); ++g) {
    for (uint32_t layer = 0; layer < pending.arrived[g].size(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        const uint32_t arrived = pending.arrived[g][layer][kind == RowKind::kV];
        if (arrived >= num_rows || Geometry(g).row_bytes(kind) == 0) continue;
        return missing("group ", g, ", layer ", layer, ", ", kind == RowKind::kK ? "K" : "V", ": ",
                       arrived, " of ", num_rows, " rows arrived");
      }
    }
    if (!traits_[g].is_whole) continue;
    const size_t num_pages = ExtentsOfWrite(g, pending, num_tokens).size();
    for (size_t p = 0; p < num_pages; ++p) {
      if (pending.page_bytes_arrived[g][p] == Geometry(g).page_bytes()) continue;
      return missing("group ", g, ", page ", p, ": ", pending.page_bytes_arrived[g][p], " of ",
                     Geometry(g).page_bytes(), " bytes arrived");
    }
  }
  return absl::OkStatus();
}

absl::Status ModelHostImpl::CheckPath(const Pending& pending, std::span<const uint32_t> indices,
                                      size_t num_tokens) {
  if (indices.size() != num_tokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("accept: ", indices.size(), " indices for ", num_tokens, " tokens"));
  }
  for (size_t i = 0; i < indices.size(); ++i) {
    if (indices[i] >= pending.num_tokens || (i > 0 && indices[i] <= indices[i - 1])) {
      return absl::InvalidArgumentError(absl::StrCat("accept: indices[", i, "] = ", indices[i],
                                                     " does not ascend below the ",
                                                     pending.num_tokens, " reserved"));
    }
    if (pending.parents.empty()) continue;
    const int32_t before = i == 0 ? -1 : static_cast<int32_t>(indices[i - 1]);
    if (pending.parents[indices[i]] != before) {
      return absl::InvalidArgumentError(absl::StrCat("accept: indices[", i, "] = ", indices[i],
                                                     " follows ", pending.parents[indices[i]],
                                                     " in the draft tree, not ", before));
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<CommitResult> ModelHostImpl::Commit(const Tenant& tenant,
                                                   const SequenceHandle& handle,
                                                   uint64_t pending_id,
                                                   std::span<const uint32_t> tokens) {
  return CommitRows(tenant, handle, pending_id, {}, tokens);
}

absl::StatusOr<CommitResult> ModelHostImpl::Accept(const Tenant& tenant,
                                                   const SequenceHandle& handle,
                                                   uint64_t pending_id,
                                                   std::span<const uint32_t> indices,
                                                   std::span<const uint32_t> tokens) {
  if (indices.empty()) return absl::InvalidArgumentError("accept: no indices; abort instead");
  return CommitRows(tenant, handle, pending_id, indices, tokens);
}

absl::StatusOr<CommitResult> ModelHostImpl::CommitRows(const Tenant& tenant,
                                                       const SequenceHandle& handle,
                                                       uint64_t pending_id,
                                                       std::span<const uint32_t> indices,
                                                       std::span<const uint32_t> tokens) {
  const auto commit = [&]() -> absl::StatusOr<CommitResult> {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindSequence(tenant, handle.id));
    PT_RETURN_IF_ERROR(CheckHandle(*sequence, handle));
    PT_ASSIGN_OR_RETURN(Pending * pending, FindPending(*sequence, pending_id));
    const bool is_append = pending->is_append();
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
    std::vector<uint32_t> chosen(indices.begin(), indices.end());
    if (chosen.empty() && !pending->parents.empty()) {
      for (uint32_t i = 0; i < n; ++i) chosen.push_back(i);
    }
    if (!chosen.empty()) PT_RETURN_IF_ERROR(CheckPath(*pending, chosen, n));
    const uint32_t num_needed = chosen.empty() ? n : chosen.back() + 1;
    std::vector<int64_t> at_positions;  // of the rows that stay
    uint32_t num_consecutive = 0;       // of them, without a gap from the sequence on
    for (uint32_t i = 0; i < n; ++i) {
      at_positions.push_back(PositionIn(*pending, chosen.empty() ? i : chosen[i]));
      if (num_consecutive == i && at_positions[i] == pending->first_position + i) ++num_consecutive;
    }
    PT_RETURN_IF_ERROR(CheckArrived(*pending, num_needed, n));
    for (uint32_t g = 0; g < num_groups(); ++g) {
      const bool moves = !chosen.empty() && chosen.back() != n - 1;
      if (!traits_[g].is_whole || !moves) continue;
      return WithReason(
          absl::FailedPreconditionError(absl::StrCat(
              "accept: layer group ", g, " is written whole: only the first tokens can be taken, ",
              "not the one at index ", chosen.back(), " as number ", n)),
          error_reason::kCannotCut, {{"group", absl::StrCat(g)}});
    }
    if (pending->num_writers > 0) {
      return WithReason(absl::FailedPreconditionError(absl::StrCat(
                            "commit: ", pending->num_writers, " row parts are still arriving")),
                        "ROWS_MISSING");
    }
    // The rows are complete and nobody may write them now: hash what became full without the lock.
    pending->state = Pending::State::kCommitting;
    const bool is_canonical = sequence->is_next_canonical();
    std::vector<std::vector<FrameId>> frames(num_groups());
    for (uint32_t g = 0; g < num_groups(); ++g) {
      for (PageId id : pending->targets[g]) frames[g].push_back(pages_.Get(id).frame());
    }
    std::vector<uint32_t> num_filled(num_groups());
    std::vector<std::vector<uint64_t>> offsets(num_groups());
    std::vector<std::vector<Extent>> extents(num_groups());  // [group][target]
    for (uint32_t g = 0; g < num_groups(); ++g) {
      extents[g] = ExtentsOfWrite(g, *pending, n);
      num_filled[g] = static_cast<uint32_t>(
          std::count_if(extents[g].begin(), extents[g].end(),
                        [this](const Extent& extent) { return IsFull(extent); }));
      for (uint32_t p = 0; p < num_filled[g]; ++p) {
        offsets[g].push_back(FrameOffset(g, pages_.Get(pending->targets[g][p]).frame()));
      }
    }
    std::vector<uint32_t> all = sequence->tokens;
    all.insert(all.end(), added.begin(), added.end());
    // Rows behind an edit have no keys, and so no use for what goes into them.
    std::vector<PositionedInput> all_inputs = sequence->inputs;
    if (is_canonical) {
      for (const PositionedInput& input : pending->inputs) all_inputs.push_back(input);
    }
    std::vector<PrefixKey> keys = sequence->keys;
    mu_.Unlock();
    std::vector<std::vector<Checksum128>> checksums(num_groups());
    std::vector<std::vector<PageKey>> page_keys(num_groups());
    absl::Status status;
    std::vector<std::byte> buffer;
    const uint64_t first_filled = keys.size();
    const uint64_t num_keys =
        is_canonical ? (sequence->length() + num_consecutive) / page_tokens() : keys.size();
    while (keys.size() < num_keys) {
      const uint64_t at = keys.size() * page_tokens();
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
    // Rows that stay close the gaps of those that go, in order, so that none is written over before
    // it was moved.
    for (uint32_t g = 0; g < num_groups() && status.ok(); ++g) {
      for (uint32_t i = 0; i < chosen.size() && status.ok(); ++i) {
        if (chosen[i] == i) continue;
        for (uint32_t layer = 0; layer < Geometry(g).num_layers() && status.ok(); ++layer) {
          for (RowKind kind : {RowKind::kK, RowKind::kV}) {
            const uint64_t row_bytes = Geometry(g).row_bytes(kind);
            if (row_bytes == 0 || !status.ok()) continue;
            status =
                pool_->Copy(RowOffsetIn(*pending, frames[g], g, layer, kind, i),
                            RowOffsetIn(*pending, frames[g], g, layer, kind, chosen[i]), row_bytes);
          }
        }
      }
    }
    for (uint32_t g = 0; g < num_groups() && status.ok(); ++g) {
      for (uint32_t p = 0; p < num_filled[g] && status.ok(); ++p) {
        const auto bytes = PageBytes(g, offsets[g][p], buffer);
        status = bytes.status();
        if (status.ok()) {
          checksums[g].push_back(pending->checksums.empty()
                                     ? ChecksumOf(*bytes)
                                     : pending->checksums[g][p].Finish(*bytes));
        }
        const uint64_t index = extents[g][p].first_row / page_tokens();
        if (index < first_filled || index >= keys.size()) continue;
        page_keys[g].push_back(MakePageKey(keys[index], Geometry(g).fingerprint()));
      }
    }
    mu_.Lock();
    pending->state = Pending::State::kOpen;
    if (!status.ok() && !chosen.empty()) pending->aborted = true;  // its rows may have moved
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
    // Over a page that was found damaged meanwhile the rows may be wrong: the next call cuts them
    // off, and nobody else is to find them.
    const bool may_key = ValidLength(*sequence) == sequence->length();
    for (uint32_t g = 0; g < num_groups(); ++g) {
      PageTable& table = sequence->tables[g];
      if (traits_[g].is_whole) {
        // The page that was given anew, or the state before.
        const uint64_t stay = traits_[g].is_state ? 0 : extents[g].front().first_row;
        for (PageId id : table.Truncate(stay)) pages_.Unref(pages_.Get(id));
      }
      for (uint64_t t = 0; t < extents[g].size(); ++t) {
        const Extent& extent = extents[g][t];
        Page& page = pages_.Get(extent.page);
        if (std::erase(pending->created[g], page.id()) > 0)
          table.Append(extent);  // the reference that created_ held becomes the table's
        else
          AppendExtent(extent, table, pages_);
        if (t < num_filled[g]) {
          page.SetFull(page_tokens(), checksums[g][t]);
          ++result.pages_filled;
          ++counters_.pages_filled;
          const uint64_t index = extent.first_row / page_tokens();
          if (index < first_filled || index >= num_keys) continue;
          const uint64_t at = index * page_tokens();
          claims_.Release(keys[index]);
          // The page began behind a window, with rows that the key would say are there and are not.
          if (!may_key || !HoldsFromBase(table.back(), at)) continue;
          page.SetDepth(static_cast<uint32_t>(index));
          const bool is_keyed = pages_.SetKey(
              page, keys[index], index == 0 ? sequence->root : keys[index - 1], page_keys[g][t],
              std::make_shared<const std::vector<uint32_t>>(all.begin() + at,
                                                            all.begin() + at + page_tokens()),
              has_inputs(at));
          if (is_keyed) {
            if (options_.write_through) write_through.push_back(page.id());
            continue;
          }
          // Somebody was faster. Of an engine whose bits depend on the batch both pages stay.
          Page* const known = pages_.FindKeyed(g, keys[index]);
          if (!model_->spec().batch_invariant || known == nullptr || !known->is_readable())
            continue;
          const bool has_child = t + 1 < pending->targets[g].size();
          SwitchPage(page.id(), *known,
                     has_child ? std::optional(pending->targets[g][t + 1]) : std::nullopt, table,
                     pages_);
          ++counters_.pages_deduplicated;
        } else {
          page.SetRows(extent.end_slot());
        }
      }
    }
    sequence->AppendTokens(added, at_positions);
    sequence->inputs = std::move(all_inputs);
    sequence->keys = std::move(keys);
    if (!sequence->keeps_masked_rows) {
      for (PageId id : sequence->DropMasked(traits_)) {
        pages_.Unref(pages_.Get(id));
        ++counters_.pages_reclaimed;
      }
    }
    SyncTails(*sequence, sequence->root, page_tokens(), pages_);
    sequence->was_appended = true;
    ++sequence->revision;
    result.appended_tokens = n;
    result.pages_created = pending->pages_created;
    for (const std::vector<PageId>& left : pending->created) result.pages_created -= left.size();
    counters_.tokens_appended += n;
    // Who attends while it appends computes meanwhile; others only send what they have computed.
    if (is_append && pending->pin_prefix && n >= kMinMeasuredTokens) {
      prefill_meter_.Add(n, clock_->MonotonicNow() - pending->began);
    }
    DropPending(*sequence);
    TakeAutomaticCheckpoint(*sequence, sequence->length() - n);
    if (CanSpill()) StartSpills(write_through, options_.write_through_level);
    result.info = InfoOf(*sequence);
    return result;
  };
  absl::StatusOr<CommitResult> result = commit();
  Flush();
  return result;
}

}  // namespace pagetide
