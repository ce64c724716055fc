// What a sequence consists of, and which of its rows its groups hold: for files that go out and
// come in.
#include <utility>

#include "absl/strings/str_cat.h"
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
