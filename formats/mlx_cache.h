// Prompt caches of mlx-lm (save_prompt_cache): a safetensors file whose tensors and metadata are
// the flattened states of the layers' caches. Both generations are read and written: up to 0.31
// (numbers in the metadata) and from 0.32 on (numbers as scalar tensors). The format is specified
// in docs/formats/mlx.md.
//
// Not recorded: the tokens, and the model but for what the user put into the metadata.
#ifndef PAGETIDE_FORMATS_MLX_CACHE_H_
#define PAGETIDE_FORMATS_MLX_CACHE_H_

#include <cstdint>
#include <map>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "formats/safetensors.h"
#include "formats/sequence_state.h"

namespace pagetide {

enum class MlxCacheClass : uint8_t {
  kPlain = 1,      // KVCache
  kRotating = 2,   // RotatingKVCache: `keep` rows stay, the rest is a ring
  kQuantized = 3,  // QuantizedKVCache: MLX's affine quantisation; packed rows for us
  kChunked = 4,    // ChunkedKVCache: rows from start_position on
};
absl::string_view MlxCacheClassName(MlxCacheClass c);

// The cache of one layer. Arrays are [1, heads, rows, dim]: head-major.
struct MlxLayer {
  struct Array {
    std::string dtype;
    uint64_t heads = 0;
    uint64_t rows = 0;
    uint64_t dim = 0;         // elements of dtype
    uint64_t begin = 0;       // in the data part
    uint64_t head_bytes = 0;  // dim × element
  };
  MlxCacheClass cache_class = MlxCacheClass::kPlain;
  // One array, or three for kQuantized: values, scales, biases.
  std::vector<Array> keys;
  std::vector<Array> values;
  uint64_t offset = 0;                          // tokens seen
  uint64_t keep = 0, max_size = 0, index = 0;   // kRotating
  uint64_t group_size = 0, bits = 0;            // kQuantized
  uint64_t chunk_size = 0, start_position = 0;  // kChunked
  uint64_t rows() const { return keys[0].rows; }
};

// A parsed cache over bytes that the caller keeps. Immutable; thread-safe.
class MlxCache : public RowReader {
 public:
  // DATA_LOSS when the file is cut or contradicts itself; INVALID_ARGUMENT for a class or type that
  // cannot be taken (batches, lists of caches, recurrent states); FAILED_PRECONDITION for a trimmed
  // ChunkedKVCache of a generation that does not record how many rows are valid.
  static absl::StatusOr<MlxCache> Parse(absl::string_view file);
  // What layout() gave: everything but the rows. ReadRows is FAILED_PRECONDITION. A layout of more
  // than max_rows rows a layer is INVALID_ARGUMENT.
  static absl::StatusOr<MlxCache> FromLayout(absl::string_view layout, uint64_t max_rows);

  // One block for all layers that hold the same positions. A layer's number is its index in the
  // cache list. Rows of quantised layers are packed: values of all heads, scales, biases.
  const SequenceState& state() const { return state_; }
  const std::vector<MlxLayer>& layers() const { return layers_; }
  const std::map<std::string, std::string>& user_metadata() const { return user_metadata_; }
  // True for mlx-lm up to 0.31.
  bool is_legacy() const { return is_legacy_; }
  uint64_t file_bytes() const { return header_.file_bytes(); }
  // The header and the scalars: what is needed to write the same file around other rows.
  std::string layout() const;

  absl::Status ReadRows(const RowRange& range, std::span<std::byte> out) const override;

 private:
  friend absl::Status WriteMlxCache(const MlxCache&, const RowReader&, ByteSink);
  class Parser;
  // Where a layer's rows are, by block and layer of the state.
  const MlxLayer& LayerOf(size_t block, size_t layer) const {
    return layers_[state_.blocks[block].layers[layer].number];
  }
  SafetensorsHeader header_;
  absl::string_view data_;  // empty after FromLayout
  bool has_data_ = false;
  bool is_legacy_ = false;
  std::map<std::string, std::string> scalars_;  // raw bytes by tensor name
  std::vector<MlxLayer> layers_;
  std::map<std::string, std::string> user_metadata_;
  SequenceState state_;
};

// Writes the file that `layout` describes with the rows of `rows`, indexed as layout.state() is.
// Rows that the cache has room for but does not use are zeros, as mlx-lm makes them.
absl::Status WriteMlxCache(const MlxCache& layout, const RowReader& rows, ByteSink sink);

// A layout for a new file.
struct MlxComposeOptions {
  bool legacy = false;
  std::map<std::string, std::string> user_metadata;
  struct Layer {
    DataType type = DataType::kF16;  // f32, f16 or bf16
    uint64_t heads = 0;
    uint64_t k_dim = 0;
    uint64_t v_dim = 0;
  };
  std::vector<Layer> layers;  // of class KVCache
  uint64_t rows = 0;
};
// FAILED_PRECONDITION for a type that MLX has not.
absl::StatusOr<MlxCache> ComposeMlxLayout(const MlxComposeOptions& options);

}  // namespace pagetide

#endif  // PAGETIDE_FORMATS_MLX_CACHE_H_
