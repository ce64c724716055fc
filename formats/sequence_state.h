// The saved KV state of one sequence, whatever program wrote it: its tokens, and for blocks of
// layers the position of every row and the shape of a row. The rows themselves stay where they are
// (a mapped file, pages in frames) and are copied on demand through a RowReader, so that a state of
// any size is converted in bounded memory. Plain values; thread-safe as such.
#ifndef PAGETIDE_FORMATS_SEQUENCE_STATE_H_
#define PAGETIDE_FORMATS_SEQUENCE_STATE_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "core/geometry.h"

namespace pagetide {

// Tokens, and rows of a block, that a file may declare: more than any model's context, and little
// enough that what is kept of them in memory (4 bytes each) cannot exhaust it.
inline constexpr uint64_t kMaxStateTokens = uint64_t{1} << 24;
// Layers that a file may declare: some ten times the deepest model's.
inline constexpr uint32_t kMaxLayers = 4096;

// One K or V row of one layer: all heads of one token.
struct RowShape {
  // Absent: packed bytes that no type of ours describes.
  std::optional<DataType> type;
  uint64_t bytes = 0;  // 0: the layer has no such rows

  // Elements of a typed row; 0 for packed ones.
  uint64_t width() const {
    return type ? bytes / DataTypeGroupBytes(*type) * DataTypeGroupElements(*type) : 0;
  }
  // "8 × f16", "34 packed bytes", "none".
  std::string ToString() const;
  friend bool operator==(const RowShape&, const RowShape&) = default;
};

struct LayerShape {
  RowShape k;
  RowShape v;
  // In the source's list of layers: the place in its body for llama.cpp, in the cache for MLX.
  uint32_t number = 0;
  const RowShape& of(RowKind kind) const { return kind == RowKind::kK ? k : v; }
  friend bool operator==(const LayerShape&, const LayerShape&) = default;
};

// Layers that hold rows of the same tokens.
struct RowBlock {
  // Of each row, in the order in which the source has the rows: neither sorted nor unique.
  std::vector<uint32_t> positions;
  // In the order of the model's layers.
  std::vector<LayerShape> layers;
  friend bool operator==(const RowBlock&, const RowBlock&) = default;
};

struct SequenceState {
  // Absent: the format does not carry them.
  std::optional<std::vector<uint32_t>> tokens;
  std::vector<RowBlock> blocks;
  friend bool operator==(const SequenceState&, const SequenceState&) = default;
};

// Consecutive rows of one layer, by their index in RowBlock::positions.
struct RowRange {
  size_t block = 0;
  size_t layer = 0;  // index in RowBlock::layers
  RowKind kind = RowKind::kK;
  uint64_t first = 0;
  uint64_t count = 0;
};

class RowReader {
 public:
  virtual ~RowReader() = default;
  // Copies the rows of `range` to `out`, token-major; out.size() = count × bytes of a row.
  // Thread-safe.
  virtual absl::Status ReadRows(const RowRange& range, std::span<std::byte> out) const = 0;
};

// Takes the bytes of a file in order, in parts of at most kMaxSinkBytes. An error ends the writing.
using ByteSink = absl::FunctionRef<absl::Status(absl::string_view)>;
inline constexpr size_t kMaxSinkBytes = size_t{1} << 20;

// INVALID_ARGUMENT unless `range` lies in `state` and `num_bytes` is what its rows need.
absl::Status CheckRange(const SequenceState& state, const RowRange& range, uint64_t num_bytes);

}  // namespace pagetide

#endif  // PAGETIDE_FORMATS_SEQUENCE_STATE_H_
