// What a sequence consists of, and which of its rows its groups hold: for files that go out and
// come in, and for others to compare.
#include <algorithm>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/checksum.h"
#include "base/error_info.h"
#include "base/little_endian.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {

absl::StatusOr<SequenceContents> ModelHostImpl::ReadContents(const Tenant& tenant, SequenceId id) {
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(const SequencePtr sequence, FindSequence(tenant, id));
  SequenceContents contents{.info = InfoOf(*sequence),
                            .tokens = sequence->tokens,
                            .positions = sequence->positions,
                            .inputs = sequence->inputs};
  for (uint32_t g = 0; g < num_groups(); ++g) contents.held.push_back(sequence->HeldRows(g));
  return contents;
}

// XXH3-128 of, little-endian: the root of the prefix keys (32 bytes), which tells deployment
// secret, tenant and model also where there is no page; u64 canonical rows, u64 k, the prefix key
// of the k full pages of them (32 bytes, none for k = 0), which chains all their tokens and inputs;
// of each row behind those pages u32 token; of each row that is not canonical i32 position; of each
// input behind the pages u64 row, 32 bytes digest. Canonical rows stand at their own index, and the
// rest follows from the length.
absl::StatusOr<ContentDigest> ModelHostImpl::DigestContents(const Tenant& tenant,
                                                            const SequenceHandle& handle,
                                                            uint64_t length) {
  ContentDigest out;
  std::string head;
  std::vector<uint32_t> tokens;
  std::vector<int32_t> positions;
  std::string inputs;
  {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(const SequencePtr sequence, FindSequence(tenant, handle.id));
    PT_RETURN_IF_ERROR(CheckHandle(*sequence, handle));
    out.info = InfoOf(*sequence);
    if (length > sequence->length()) return out;
    if (const uint64_t valid = ValidLength(*sequence); valid < length) {
      return WithReason(absl::FailedPreconditionError(
                            absl::StrCat("sequence ", handle.id.ToString(),
                                         ": a page failed its checksum or left the store: ", valid,
                                         " of ", sequence->length(), " tokens are left")),
                        "PREFIX_LOST", {{"length", absl::StrCat(valid)}});
    }
    const uint64_t canonical = std::min(sequence->canonical_rows(), length);
    const uint64_t num_keys = std::min<uint64_t>(sequence->keys.size(), canonical / page_tokens());
    const uint64_t keyed = num_keys * page_tokens();
    head = sequence->root.digest.ToBytes();
    AppendLittleEndian<uint64_t>(&head, canonical);
    AppendLittleEndian<uint64_t>(&head, num_keys);
    if (num_keys > 0) head += sequence->keys[num_keys - 1].digest.ToBytes();
    tokens.assign(sequence->tokens.begin() + keyed, sequence->tokens.begin() + length);
    positions.reserve(length - canonical);
    for (uint64_t row = canonical; row < length; ++row) {
      positions.push_back(static_cast<int32_t>(sequence->position(row)));
    }
    for (const PositionedInput& input : sequence->inputs) {
      if (input.position < keyed || input.position >= length) continue;
      AppendLittleEndian<uint64_t>(&inputs, input.position);
      inputs += input.digest.ToBytes();
    }
  }
  ChecksumStream stream;
  stream.Update(std::as_bytes(std::span(head)));
  stream.Update(std::as_bytes(std::span(tokens)));
  stream.Update(std::as_bytes(std::span(positions)));
  stream.Update(std::as_bytes(std::span(inputs)));
  out.digest = stream.Get();
  return out;
}

absl::StatusOr<SequenceInfo> ModelHostImpl::KeepRows(const Tenant& tenant,
                                                     const SequenceHandle& handle,
                                                     std::span<const std::vector<RowSpan>> held) {
  const auto keep = [&]() -> absl::StatusOr<SequenceInfo> {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindForChange(tenant, handle));
    if (held.size() != num_groups()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "keep rows: of ", held.size(), " layer groups, the model has ", num_groups()));
    }
    SequenceRows rows = *sequence;
    for (uint32_t g = 0; g < num_groups(); ++g) {
      uint64_t end = 0;
      for (const RowSpan& span : held[g]) {
        if (span.begin < end || span.begin >= span.end || span.end > rows.num_rows()) {
          return absl::InvalidArgumentError(absl::StrCat("keep rows [", span.begin, ", ", span.end,
                                                         ") of ", rows.num_rows(), " behind row ",
                                                         end, " in layer group ", g));
        }
        end = span.end;
      }
      rows.KeepRows(g, held[g]);
    }
    if (const auto lacked = rows.LackedAt(traits_, rows.num_rows())) {
      return absl::InvalidArgumentError(
          absl::StrCat("keep rows: layer group ", lacked->group, " would lack row ", lacked->row));
    }
    std::vector<RowsChange> change;
    change.push_back({sequence.get(), std::move(rows)});
    AdoptRows(std::move(change), pages_);
    SyncTails(*sequence, sequence->root, page_tokens(), pages_);
    sequence->keeps_masked_rows = false;
    ++sequence->revision;
    changed_.SignalAll();
    return InfoOf(*sequence);
  };
  absl::StatusOr<SequenceInfo> info = keep();
  Flush();
  return info;
}

}  // namespace pagetide
