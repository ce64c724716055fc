// Page geometry: everything that decides the bytes of a page, and the only place that does
// arithmetic on rows, layers and pages.
//
// A page holds page_tokens consecutive tokens of all layers of one layer group of one shard, laid
// out
//   [layer][K rows: page_tokens × k_row_bytes][V rows: page_tokens × v_row_bytes]
// token-major, so that a page is one contiguous copy and a token range of one layer one contiguous
// run. Values are immutable after Create and freely copied; thread-safe.
#ifndef PAGETIDE_CORE_GEOMETRY_H_
#define PAGETIDE_CORE_GEOMETRY_H_

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/digest.h"

namespace pagetide {

enum class DataType : uint8_t {
  kF32 = 1,
  kF16 = 2,
  kBF16 = 3,
  kF8E4M3 = 4,
  kF8E5M2 = 5,
  kQ8_0 = 6,
  kQ5_0 = 7,
  kQ5_1 = 8,
  kQ4_0 = 9,
  kQ4_1 = 10,
  kIQ4NL = 11,
};

absl::string_view DataTypeName(DataType type);
// Elements that are encoded together: 1 for plain types, 32 for ggml's block types.
uint32_t DataTypeGroupElements(DataType type);
// Bytes of one such group.
uint32_t DataTypeGroupBytes(DataType type);

struct RopeSpec {
  enum class Style : uint8_t { kNone = 0, kNorm = 1, kNeox = 2 };
  enum class Scaling : uint8_t { kNone = 0, kLinear = 1, kYarn = 2 };
  Style style = Style::kNone;
  uint32_t n_rot = 0;  // rotated elements of a head
  double base = 10000;
  Scaling scaling = Scaling::kNone;
  double scale = 1;            // frequency scale
  std::vector<float> factors;  // n_rot / 2 frequency divisors, or none
  double yarn_ext_factor = 0;
  double yarn_attn_factor = 1;
  double yarn_beta_fast = 32;
  double yarn_beta_slow = 1;
  uint32_t yarn_original_context = 0;
  uint32_t position_components = 1;  // 1 (text) … 4 (multi-axis)
  friend bool operator==(const RopeSpec&, const RopeSpec&) = default;
};

struct LayerGroupSpec {
  enum class Kind : uint8_t { kFull = 1, kWindow = 2, kRecurrent = 3, kOpaque = 4 };
  enum class WindowType : uint8_t {
    kNone = 0,
    kStandard = 1,
    kChunked = 2,
    kSymmetric = 3,
    kRing = 4,  // window_tokens rows: the first keep_tokens stay, the newest are a ring
  };
  enum class ScaleKind : uint8_t { kNone = 0, kPerLayer = 1, kPerTokenAndHead = 2 };
  enum class Basis : uint8_t { kPlain = 0, kHadamard = 1 };
  Kind kind = Kind::kFull;
  WindowType window_type = WindowType::kNone;
  uint32_t window_tokens = 0;
  uint32_t keep_tokens = 0;      // kRing: positions below it are always seen
  std::vector<uint32_t> layers;  // numbers in the model, ascending
  DataType k_type = DataType::kF16;
  DataType v_type = DataType::kF16;
  ScaleKind scale = ScaleKind::kNone;
  std::string scale_digest;  // 32 bytes when scale is kPerLayer
  uint32_t kv_heads = 0;
  uint32_t k_dim = 0;
  uint32_t v_dim = 0;             // 0: latent (MLA) cache, no V
  uint32_t packed_row_bytes = 0;  // > 0: opaque rows, K only
  uint64_t opaque_bytes = 0;      // kRecurrent: bytes of the state; kOpaque: bytes a page
  RopeSpec rope;
  Basis basis = Basis::kPlain;
  // What pages are stored in, in the same basis, if not in k_type and v_type: they are converted
  // when they leave for the store and when they come back, which is lossy. Part of the fingerprint,
  // so that equal keys stay interchangeable: rows, and what the cold types leave of them.
  std::optional<DataType> cold_k_type, cold_v_type;
  friend bool operator==(const LayerGroupSpec&, const LayerGroupSpec&) = default;
};

struct ShardSpec {
  uint32_t kv_head_begin = 0, kv_head_end = 0;  // 0, 0: all heads
  uint32_t layer_begin = 0, layer_end = 0;      // 0, 0: all layers
  uint32_t rank = 0;
  uint32_t num_ranks = 1;
  friend bool operator==(const ShardSpec&, const ShardSpec&) = default;
};

struct GeometrySpec {
  uint32_t page_tokens = 256;
  std::vector<LayerGroupSpec> groups;
  ShardSpec shard;
  friend bool operator==(const GeometrySpec&, const GeometrySpec&) = default;
};

// kPage: bytes of a page of a group without rows.
enum class RowKind : uint8_t { kK = 1, kV = 2, kPage = 3 };

// The arithmetic of one layer group.
class GroupGeometry {
 public:
  const LayerGroupSpec& spec() const { return spec_; }
  uint32_t page_tokens() const { return page_tokens_; }
  uint32_t num_layers() const { return static_cast<uint32_t>(spec_.layers.size()); }
  // False for recurrent and opaque groups, whose pages are one run of bytes, written and read
  // whole.
  bool has_rows() const { return has_rows_; }
  // Rows can be attended to by our kernels: plain K/V of a full or window group.
  bool can_attend() const { return has_rows_ && spec_.packed_row_bytes == 0; }
  uint32_t k_row_bytes() const { return k_row_bytes_; }
  uint32_t v_row_bytes() const { return v_row_bytes_; }
  uint32_t row_bytes(RowKind kind) const {
    return kind == RowKind::kK ? k_row_bytes_ : kind == RowKind::kV ? v_row_bytes_ : 0;
  }
  uint64_t layer_bytes() const { return layer_bytes_; }
  uint64_t page_bytes() const { return page_bytes_; }
  // Byte offset of the row of `slot` in `layer` (index within the group) from the start of the
  // page.
  uint64_t RowOffset(uint32_t layer, RowKind kind, uint32_t slot) const {
    const uint64_t base = layer * layer_bytes_;
    return kind == RowKind::kK
               ? base + uint64_t{slot} * k_row_bytes_
               : base + uint64_t{page_tokens_} * k_row_bytes_ + uint64_t{slot} * v_row_bytes_;
  }
  // A page as the store has it: the same layout, rows in the cold types where the group has them.
  bool has_cold_types() const {
    return spec_.cold_k_type.has_value() || spec_.cold_v_type.has_value();
  }
  uint32_t stored_row_bytes(RowKind kind) const {
    return kind == RowKind::kK ? stored_k_row_bytes_ : stored_v_row_bytes_;
  }
  uint64_t stored_page_bytes() const { return stored_page_bytes_; }
  uint64_t StoredRowOffset(uint32_t layer, RowKind kind, uint32_t slot) const {
    const uint64_t base =
        uint64_t{layer} * page_tokens_ * (uint64_t{stored_k_row_bytes_} + stored_v_row_bytes_);
    return kind == RowKind::kK ? base + uint64_t{slot} * stored_k_row_bytes_
                               : base + uint64_t{page_tokens_} * stored_k_row_bytes_ +
                                     uint64_t{slot} * stored_v_row_bytes_;
  }
  // SHA-256 of the group, the shard's ranges and page_tokens: equal means interchangeable bytes.
  // The rank is left out, so that replicated KV is stored once.
  const Digest& fingerprint() const { return fingerprint_; }

 private:
  friend class PageGeometry;
  LayerGroupSpec spec_;
  uint32_t page_tokens_ = 0;
  bool has_rows_ = false;
  uint32_t k_row_bytes_ = 0;
  uint32_t v_row_bytes_ = 0;
  uint64_t layer_bytes_ = 0;
  uint64_t page_bytes_ = 0;
  uint32_t stored_k_row_bytes_ = 0;
  uint32_t stored_v_row_bytes_ = 0;
  uint64_t stored_page_bytes_ = 0;
  Digest fingerprint_;
};

class PageGeometry {
 public:
  static constexpr uint32_t kMaxPageTokens = 65536;
  static constexpr uint64_t kMaxPageBytes = uint64_t{1} << 30;

  // INVALID_ARGUMENT names the field and the numbers.
  static absl::StatusOr<PageGeometry> Create(GeometrySpec spec);

  const GeometrySpec& spec() const { return spec_; }
  uint32_t page_tokens() const { return spec_.page_tokens; }
  uint32_t num_groups() const { return static_cast<uint32_t>(groups_.size()); }
  const GroupGeometry& group(uint32_t i) const { return groups_[i]; }
  // Sum over groups: what one page of tokens costs in all of them.
  uint64_t bytes_per_page_of_tokens() const { return total_page_bytes_; }
  // Pages that n tokens need in each group.
  uint64_t PagesFor(uint64_t num_tokens) const {
    return (num_tokens + spec_.page_tokens - 1) / spec_.page_tokens;
  }

 private:
  GeometrySpec spec_;
  std::vector<GroupGeometry> groups_;
  uint64_t total_page_bytes_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_GEOMETRY_H_
