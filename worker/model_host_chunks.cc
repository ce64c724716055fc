// Chunks of saved state at other positions than they were computed at.
#include <algorithm>
#include <utility>

#include "absl/container/flat_hash_set.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {

SequenceEditor::Options ModelHostImpl::EditorOptions() const {
  return {page_tokens(), traits_, options_.max_sequence_tokens};
}

absl::Status ModelHostImpl::CheckChunks(const SessionState& state,
                                        std::span<const ReusedChunk> chunks) {
  if (chunks.empty() || !state.positions.empty()) {
    return absl::InvalidArgumentError(
        chunks.empty() ? "load chunks: none is named"
                       : "load chunks: the saved rows were edited to stand at other positions");
  }
  uint64_t from = chunks.front().prompt_begin, to = from;
  for (const ReusedChunk& chunk : chunks) {
    const bool is_inside = chunk.session_begin <= state.length() && chunk.count > 0 &&
                           chunk.count <= state.length() - chunk.session_begin;
    if (!is_inside || chunk.session_begin < from || chunk.prompt_begin != to) {
      return absl::InvalidArgumentError(absl::StrCat(
          "load chunks: ", chunk.count, " tokens from ", chunk.session_begin, " of ",
          state.length(), " on, as the prompt's from ", chunk.prompt_begin,
          " on, do not follow token ", from, " of the session and ", to, " of the prompt"));
    }
    from = chunk.session_end();
    to = chunk.prompt_end();
  }
  return absl::OkStatus();
}

PrefixReuse ModelHostImpl::ChunkReuse(std::span<const ReusedChunk> chunks) const {
  const uint64_t prefix = chunks.front().prompt_begin;
  PrefixReuse reuse;
  reuse.prompt_tokens = reuse.reused_tokens = chunks.back().prompt_end();
  reuse.shared_pages = prefix / page_tokens();
  reuse.partial_rows = prefix % page_tokens();
  reuse.chunk_tokens = reuse.reused_tokens - prefix;
  reuse.limit = ReuseLimit::kDiverged;
  reuse.explanation = absl::StrCat(prefix, " saved tokens reused, and behind them ",
                                   reuse.chunk_tokens, " at other positions");
  return reuse;
}

absl::StatusOr<SequenceRows> ModelHostImpl::LayOutChunks(
    const SessionState& state, std::span<const ReusedChunk> chunks) const {
  PT_ASSIGN_OR_RETURN(const uint64_t length, CheckSaved(state, chunks.back().session_end()));
  SequenceRows rows;
  rows.tokens.assign(state.tokens.begin(), state.tokens.begin() + length);
  if (state.canonical_length < length) rows.canonical_limit = state.canonical_length;
  rows.tables.resize(num_groups());
  for (uint32_t g = 0; g < num_groups(); ++g) {
    for (const SavedExtent& extent : state.groups[g]) {
      if (extent.first_row >= length) break;
      rows.tables[g].Append({.page = PageId(uint64_t{extent.page} + 1),
                             .first_slot = extent.first_slot,
                             .count = static_cast<uint32_t>(
                                 std::min<uint64_t>(extent.count, length - extent.first_row)),
                             .first_row = extent.first_row,
                             .shift = extent.shift});
    }
  }
  PT_ASSIGN_OR_RETURN(SequenceRows kept, TakeChunks(EditorOptions(), rows, chunks));
  kept.DropMasked(traits_);
  return kept;
}

absl::Status ModelHostImpl::KeepChunks(Sequence& sequence, std::span<const ReusedChunk> chunks) {
  absl::StatusOr<SequenceRows> kept = TakeChunks(EditorOptions(), sequence, chunks);
  const absl::Status status = kept.status();
  SequenceRows next;
  next.tables.resize(num_groups());
  if (status.ok()) {
    next = *std::move(kept);
    next.DropMasked(traits_);  // its references are not taken yet
  }
  std::vector<RowsChange> changes;
  changes.push_back({&sequence, std::move(next)});
  AdoptRows(std::move(changes), pages_);
  if (status.ok()) SyncTails(sequence, sequence.root, page_tokens(), pages_);
  return status;
}

absl::StatusOr<OpenResult> ModelHostImpl::OpenSavedChunks(const Tenant& tenant,
                                                          const SessionState& state,
                                                          std::span<const ManifestPageRef> pages,
                                                          std::span<const ReusedChunk> chunks) {
  PT_RETURN_IF_ERROR(CheckChunks(state, chunks));
  // What would be refused is refused before a page of it is touched.
  PT_RETURN_IF_ERROR(LayOutChunks(state, chunks).status());
  return OpenSavedRows(tenant, state, pages, std::nullopt, chunks, std::nullopt);
}

absl::StatusOr<PrefixReuse> ModelHostImpl::LookupSavedChunks(const Tenant& tenant,
                                                             const SessionState& state,
                                                             std::span<const ManifestPageRef> pages,
                                                             std::span<const ReusedChunk> chunks) {
  PT_RETURN_IF_ERROR(CheckChunks(state, chunks));
  PT_ASSIGN_OR_RETURN(const SequenceRows kept, LayOutChunks(state, chunks));
  const std::vector<PrefixKey> keys = PrefixKeysOf(
      RootPrefixKey(tenant.salt, model_->identity(), page_tokens()),
      std::span(state.tokens).first(state.canonical_length), page_tokens(), state.inputs);
  PrefixReuse reuse = ChunkReuse(chunks);
  MutexLock lock(&mu_);
  absl::flat_hash_set<PageId> here;
  for (const SavedExtent& extent : state.groups.front()) {
    const Page* page = FindSavedPage(0, extent, pages[extent.page], keys);
    if (page != nullptr && page->is_readable()) here.insert(PageId(uint64_t{extent.page} + 1));
  }
  for (const Extent& extent : kept.tables.front().extents()) {
    (here.contains(extent.page) ? reuse.device_tokens : reuse.store_tokens) += extent.count;
  }
  return reuse;
}

}  // namespace pagetide
