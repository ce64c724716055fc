#include "formats/sequence_state.h"

#include "absl/strings/str_cat.h"

namespace pagetide {

std::string RowShape::ToString() const {
  if (bytes == 0) return "none";
  if (!type) return absl::StrCat(bytes, " packed bytes");
  return absl::StrCat(width(), " × ", DataTypeName(*type));
}

absl::Status CheckRange(const SequenceState& state, const RowRange& range, uint64_t num_bytes) {
  if (range.block >= state.blocks.size() ||
      range.layer >= state.blocks[range.block].layers.size()) {
    return absl::InvalidArgumentError(absl::StrCat("read rows of block ", range.block, ", layer ",
                                                   range.layer, ": the state has no such layer"));
  }
  const RowBlock& block = state.blocks[range.block];
  const uint64_t rows = block.positions.size();
  const uint64_t row_bytes = block.layers[range.layer].of(range.kind).bytes;
  if (range.first > rows || range.count > rows - range.first || row_bytes == 0 ||
      num_bytes / row_bytes != range.count || num_bytes % row_bytes != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("read ", range.count, " rows from row ", range.first, " into ", num_bytes,
                     " bytes: the layer has ", rows, " rows of ", row_bytes, " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace pagetide
