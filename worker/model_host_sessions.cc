// Saved state on its way in: sequences over the pages that a manifest names.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

// Every group holds what the next token can attend to, all rows or those in its window, at both
// lengths. Rows of edited sequences may still have to be turned;
// canonical ones stand where they were computed.
absl::Status CheckWholeRows(const SessionState& state, uint64_t length,
                            std::span<const GroupTraits> traits) {
  for (size_t g = 0; g < state.groups.size(); ++g) {
    for (const SavedExtent& extent : state.groups[g]) {
      if (extent.shift == 0) continue;
      if (extent.first_row < state.canonical_length) {
        return absl::DataLossError(absl::StrCat(
            "load: layer group ", g, " has row ", extent.first_row, " to be moved by ",
            extent.shift, " positions, in front of the canonical length ", state.canonical_length));
      }
      if (traits[g].rotates && traits[g].can_shift) continue;
      return absl::DataLossError(absl::StrCat("load: layer group ", g, " has rows to be moved by ",
                                              extent.shift, " positions, which its rows cannot"));
    }
  }
  for (uint64_t row = 0; row < state.canonical_length && !state.positions.empty(); ++row) {
    if (state.positions[row] == static_cast<int64_t>(row)) continue;
    return absl::DataLossError(absl::StrCat("load: row ", row, " stands at position ",
                                            state.positions[row], ", in front of the canonical ",
                                            "length ", state.canonical_length));
  }
  // Laid out as a sequence of pages that are all the same, to ask what it lacks.
  SequenceRows rows;
  rows.tokens = state.tokens;
  rows.positions = state.positions;
  rows.tables.resize(state.groups.size());
  for (size_t g = 0; g < state.groups.size(); ++g) {
    for (const SavedExtent& extent : state.groups[g]) {
      if (extent.count == 0 || extent.first_row < rows.tables[g].num_rows()) {
        return absl::DataLossError(absl::StrCat("load: layer group ", g, " has ", extent.count,
                                                " rows from row ", extent.first_row,
                                                " on, out of order"));
      }
      rows.tables[g].Append({.page = PageId(1),
                             .first_slot = extent.first_slot,
                             .count = extent.count,
                             .first_row = extent.first_row});
    }
    if (!rows.tables[g].empty() && rows.tables[g].num_rows() != state.length()) {
      return absl::DataLossError(absl::StrCat("load: layer group ", g, " ends at row ",
                                              rows.tables[g].num_rows(), " of ", state.length()));
    }
  }
  if (const auto lacked = rows.LackedAt(traits, state.length())) {
    return absl::DataLossError(absl::StrCat("load: layer group ", lacked->group, " lacks row ",
                                            lacked->row, " of ", state.length()));
  }
  if (const auto lacked = rows.LackedAt(traits, length)) {
    return RowsLacking(absl::StrCat("load the first ", length, " rows"), *lacked);
  }
  return absl::OkStatus();
}

}  // namespace

const Page* ModelHostImpl::FindSavedPage(uint32_t group, const SavedExtent& extent,
                                         const ManifestPageRef& ref,
                                         const std::vector<PrefixKey>& keys) {
  const uint64_t index = extent.first_row / page_tokens();
  // A page goes by its prefix only if our own hash of the tokens says that it is that page.
  if (GoesByPrefix(group, extent, ref, keys)) {
    const Page* known = pages_.FindKeyed(group, keys[index]);
    // Of another honest writer's rows the manifest means its own. Where the store keeps colder
    // types, the rows that a stored body was made of stand for it.
    if (known != nullptr) {
      const bool by_store = Geometry(group).has_cold_types() && known->is_stored();
      const auto checksum = by_store ? known->stored()->checksum : known->checksum();
      if (checksum == ref.checksum) return known;
    }
  }
  return pages_.FindSealed(group, ref.key, ref.checksum);
}

bool ModelHostImpl::GoesByPrefix(uint32_t group, const SavedExtent& extent,
                                 const ManifestPageRef& ref,
                                 const std::vector<PrefixKey>& keys) const {
  const uint64_t index = extent.first_row / page_tokens();
  return extent.first_slot == 0 && extent.first_row == index * page_tokens() &&
         extent.count == page_tokens() && index < keys.size() &&
         MakePageKey(keys[index], Geometry(group).fingerprint()) == ref.key;
}

Page& ModelHostImpl::AdoptSavedPage(uint32_t group, const Sequence& sequence,
                                    const PageTable& table, const SessionState& state,
                                    const SavedExtent& extent, const ManifestPageRef& ref,
                                    const std::vector<PrefixKey>& keys) {
  const uint64_t index = extent.first_row / page_tokens();
  const uint64_t base = index * page_tokens();
  const std::optional<PageId> parent =
      table.empty() ? std::nullopt : std::optional(table.back().page);
  const auto has_input = [&](uint64_t begin, uint64_t end) {
    return std::any_of(state.inputs.begin(), state.inputs.end(), [&](const PositionedInput& i) {
      return i.position >= begin && i.position < end;
    });
  };
  if (const Page* known = FindSavedPage(group, extent, ref, keys)) return pages_.Get(known->id());
  if (GoesByPrefix(group, extent, ref, keys) && pages_.FindKeyed(group, keys[index]) == nullptr) {
    return pages_.AdoptStored(
        group, sequence.tenant, page_tokens(), static_cast<uint32_t>(index), parent, keys[index],
        index == 0 ? sequence.root : keys[index - 1], ref.key, ref.checksum,
        std::make_shared<const std::vector<uint32_t>>(state.tokens.begin() + base,
                                                      state.tokens.begin() + base + page_tokens()),
        has_input(base, base + page_tokens()));
  }
  Page& page = pages_.AdoptSealed(group, sequence.tenant, extent.first_slot + extent.count,
                                  static_cast<uint32_t>(index), parent,
                                  {ref.key, ref.checksum, /*is_shared=*/true});
  const uint64_t end = base + extent.count;
  if (extent.first_slot == 0 && extent.first_row == base && extent.count < page_tokens() &&
      end <= state.canonical_length) {
    pages_.SetTailTokens(
        page, index == 0 ? sequence.root : keys[index - 1],
        std::vector<uint32_t>(state.tokens.begin() + base, state.tokens.begin() + end),
        has_input(base, end));
  }
  return page;
}

SequenceRows ModelHostImpl::SavedRows(
    const SessionState& state, uint64_t length, const std::vector<PrefixKey>& keys,
    absl::FunctionRef<Page&(uint32_t group, const PageTable& table, const SavedExtent& extent)>
        page_of) {
  SequenceRows rows;
  rows.tables.resize(num_groups());
  for (uint32_t g = 0; g < num_groups(); ++g) {
    for (const SavedExtent& extent : state.groups[g]) {
      if (extent.first_row >= length) break;
      Page& page = page_of(g, rows.tables[g], extent);
      if (rows.tables[g].Append({.page = page.id(),
                                 .first_slot = extent.first_slot,
                                 .count = static_cast<uint32_t>(
                                     std::min<uint64_t>(extent.count, length - extent.first_row)),
                                 .first_row = extent.first_row,
                                 .shift = extent.shift})) {
        pages_.Ref(page);
      }
      pages_.Touch(page);
    }
  }
  rows.tokens.assign(state.tokens.begin(), state.tokens.begin() + length);
  rows.keys.assign(keys.begin(),
                   keys.begin() + std::min<uint64_t>(keys.size(), length / page_tokens()));
  if (state.canonical_length < length) {
    rows.canonical_limit = state.canonical_length;
    if (!state.positions.empty()) {
      rows.positions.assign(state.positions.begin(), state.positions.begin() + length);
    }
  }
  for (const PositionedInput& input : state.inputs) {
    if (input.position < rows.canonical_rows()) rows.inputs.push_back(input);
  }
  return rows;
}

absl::StatusOr<uint64_t> ModelHostImpl::CheckSaved(const SessionState& state,
                                                   std::optional<uint64_t> wanted) const {
  PT_RETURN_IF_ERROR(CheckSameModel(state, *model_));
  const uint64_t length = wanted.value_or(state.length());
  if (length > state.length()) {
    return absl::InvalidArgumentError(
        absl::StrCat("load: length = ", length, " is above the saved ", state.length()));
  }
  if (state.groups.size() != num_groups()) {
    return absl::DataLossError(absl::StrCat("load: the saved state has ", state.groups.size(),
                                            " layer groups, the model ", num_groups()));
  }
  PT_RETURN_IF_ERROR(CheckWholeRows(state, length, traits_));
  PT_RETURN_IF_ERROR(ValidateTokens(state.tokens, state.inputs, 0));
  return length;
}

PrefixReuse ModelHostImpl::SavedReuse(const SessionState& state, uint64_t length) const {
  PrefixReuse reuse;
  reuse.prompt_tokens = reuse.reused_tokens = length;
  reuse.shared_pages = length / page_tokens();
  reuse.partial_rows = length % page_tokens();
  reuse.limit = length == state.length() ? ReuseLimit::kWholePrompt : ReuseLimit::kDiverged;
  reuse.explanation = absl::StrCat(length, " of ", state.length(), " saved tokens reused");
  return reuse;
}

absl::StatusOr<PrefixReuse> ModelHostImpl::LookupSaved(const Tenant& tenant,
                                                       const SessionState& state,
                                                       std::span<const ManifestPageRef> pages,
                                                       std::optional<uint64_t> wanted) {
  PT_ASSIGN_OR_RETURN(const uint64_t length, CheckSaved(state, wanted));
  const std::vector<PrefixKey> keys = PrefixKeysOf(
      RootPrefixKey(tenant.salt, model_->identity(), page_tokens()),
      std::span(state.tokens).first(state.canonical_length), page_tokens(), state.inputs);
  PrefixReuse reuse = SavedReuse(state, length);
  MutexLock lock(&mu_);
  for (const SavedExtent& extent : state.groups.front()) {
    if (extent.first_row >= length) break;
    const Page* page = FindSavedPage(0, extent, pages[extent.page], keys);
    const bool is_here = page != nullptr && page->is_readable();
    (is_here ? reuse.device_tokens : reuse.store_tokens) +=
        std::min<uint64_t>(extent.count, length - extent.first_row);
  }
  return reuse;
}

absl::StatusOr<OpenResult> ModelHostImpl::OpenSaved(
    const Tenant& tenant, const SessionState& state, std::span<const ManifestPageRef> pages,
    std::optional<uint64_t> length, const std::optional<SequenceIdentity>& identity) {
  return OpenSavedRows(tenant, state, pages, length, {}, identity);
}

absl::StatusOr<OpenResult> ModelHostImpl::OpenSavedRows(
    const Tenant& tenant, const SessionState& state, std::span<const ManifestPageRef> pages,
    std::optional<uint64_t> wanted, std::span<const ReusedChunk> chunks,
    const std::optional<SequenceIdentity>& identity) {
  if (!chunks.empty()) wanted = chunks.back().session_end();
  PT_ASSIGN_OR_RETURN(const uint64_t length, CheckSaved(state, wanted));
  auto sequence = std::make_shared<Sequence>();
  sequence->tenant = tenant.name;
  sequence->root = RootPrefixKey(tenant.salt, model_->identity(), page_tokens());
  sequence->tables.resize(num_groups());
  const std::vector<PrefixKey> keys =
      PrefixKeysOf(sequence->root, std::span(state.tokens).first(state.canonical_length),
                   page_tokens(), state.inputs);
  OpenResult result;
  {
    MutexLock lock(&mu_);
    if (sequences_.size() >= options_.max_open_sequences) {
      return WithRetryDelay(
          WithReason(absl::ResourceExhaustedError(absl::StrCat("load: ", sequences_.size(),
                                                               " sequences are open, the limit is ",
                                                               options_.max_open_sequences)),
                     "TOO_MANY_SEQUENCES"),
          absl::Seconds(1));
    }
    if (identity && NumberOfLocked(identity->id) != 0) {
      return absl::AlreadyExistsError(
          absl::StrCat("load: sequence ", identity->id.ToString(), " is open here"));
    }
    static_cast<SequenceRows&>(*sequence) = SavedRows(
        state, length, keys,
        [&](uint32_t g, const PageTable& table, const SavedExtent& extent) -> Page& {
          mu_.AssertHeld();
          return AdoptSavedPage(g, *sequence, table, state, extent, pages[extent.page], keys);
        });
    // OpenSavedChunks has asked: nothing is refused here.
    if (!chunks.empty()) PT_RETURN_IF_ERROR(KeepChunks(*sequence, chunks));
    AddSequence(sequence, identity);
    PrefixReuse& reuse = result.reuse;
    reuse = chunks.empty() ? SavedReuse(state, length) : ChunkReuse(chunks);
    counters_.tokens_reused += reuse.reused_tokens;
    counters_.chunk_tokens_reused += reuse.chunk_tokens;
    for (const Extent& extent : sequence->tables.front().extents()) {
      const bool is_here = pages_.Get(extent.page).is_readable();
      (is_here ? reuse.device_tokens : reuse.store_tokens) += extent.count;
    }
    result.restoring_pages = Prefetch(*sequence);
    result.info = InfoOf(*sequence);
    changed_.SignalAll();
  }
  Flush();
  return result;
}

}  // namespace pagetide
