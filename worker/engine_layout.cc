#include "worker/engine_layout.h"

#include <algorithm>
#include <limits>
#include <string>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

// A sum of products of what a client sent, which may exceed 64 bits.
using Wide = unsigned __int128;

constexpr uint64_t kMax = std::numeric_limits<uint64_t>::max();

absl::string_view TypeName(std::optional<DataType> type) {
  return type ? DataTypeName(*type) : "none";
}

// Of a token's pieces within a block, dense where the client left a stride out.
EnginePlaneSpec WithStrides(EnginePlaneSpec plane, EngineHeads heads, uint64_t block_tokens,
                            uint64_t num_heads, uint64_t head_bytes) {
  const bool is_nhd = heads == EngineHeads::kNhd;
  if (plane.head_stride == 0) plane.head_stride = head_bytes * (is_nhd ? 1 : block_tokens);
  if (plane.token_stride == 0) plane.token_stride = head_bytes * (is_nhd ? num_heads : 1);
  if (plane.block_stride == 0) plane.block_stride = head_bytes * num_heads * block_tokens;
  return plane;
}

// The bytes of a block must not overlap, and those of the last one must lie in the memory.
absl::Status CheckPlane(const std::string& field, const EnginePlaneSpec& plane, EngineHeads heads,
                        uint32_t block_tokens, uint32_t num_blocks, uint32_t num_heads,
                        uint64_t head_bytes, const EngineLayout::Memories& memories) {
  if (plane.memory >= memories.size()) {
    return absl::InvalidArgumentError(absl::StrCat(field, ".memory is ", plane.memory,
                                                   ", the client handed over ", memories.size()));
  }
  const bool is_nhd = heads == EngineHeads::kNhd;
  const auto inner = [&](absl::string_view name, uint64_t stride) -> absl::Status {
    if (stride >= head_bytes) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(field, ".", name, " is ", stride, ", a head has ", head_bytes, " bytes"));
  };
  const auto outer = [&](absl::string_view name, uint64_t stride, Wide span) -> absl::Status {
    if (Wide{stride} >= span) return absl::OkStatus();
    return absl::InvalidArgumentError(
        absl::StrCat(field, ".", name, " is ", stride, ", what it steps over has ",
                     span > Wide{kMax} ? std::string("more than 2^64")
                                       : absl::StrCat(static_cast<uint64_t>(span)),
                     " bytes"));
  };
  const Wide heads_span = Wide{num_heads - 1} * plane.head_stride + head_bytes;
  const Wide tokens_span = Wide{block_tokens - 1} * plane.token_stride + head_bytes;
  if (num_heads > 1) {
    PT_RETURN_IF_ERROR(is_nhd ? inner("head_stride", plane.head_stride)
                              : outer("head_stride", plane.head_stride, tokens_span));
  }
  if (block_tokens > 1) {
    PT_RETURN_IF_ERROR(is_nhd ? outer("token_stride", plane.token_stride, heads_span)
                              : inner("token_stride", plane.token_stride));
  }
  const Wide block_span = Wide{num_heads - 1} * plane.head_stride +
                          Wide{block_tokens - 1} * plane.token_stride + head_bytes;
  PT_RETURN_IF_ERROR(outer("block_stride", plane.block_stride, block_span));
  const Wide end = Wide{plane.offset} + Wide{num_blocks - 1} * plane.block_stride + block_span;
  const uint64_t size = memories[plane.memory]->size_bytes();
  if (end > Wide{size}) {
    return absl::InvalidArgumentError(absl::StrCat(
        field, ": offset ", plane.offset, " + ", num_blocks - 1, " blocks x block_stride ",
        plane.block_stride, " + a block leaves memory ", plane.memory, " of ", size, " bytes"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<EngineLayout> EngineLayout::Create(const PageGeometry& geometry,
                                                  const EnginePoolSpec& spec, Memories memories) {
  if (spec.block_tokens < 1 || spec.block_tokens > kMaxBlockTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("block_tokens is ", spec.block_tokens, ", must be 1 to ", kMaxBlockTokens));
  }
  if (spec.num_blocks < 2) {
    return absl::InvalidArgumentError(absl::StrCat(
        "num_blocks is ", spec.num_blocks, ", must be at least 2: block 0 is the null block"));
  }
  if (spec.groups.size() != geometry.num_groups()) {
    return absl::InvalidArgumentError(absl::StrCat("groups has ", spec.groups.size(),
                                                   " entries, the model has ",
                                                   geometry.num_groups(), " layer groups"));
  }
  EngineLayout layout;
  layout.block_tokens_ = spec.block_tokens;
  layout.num_blocks_ = spec.num_blocks;
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    const GroupGeometry& model = geometry.group(g);
    const LayerGroupSpec& model_spec = model.spec();
    const EngineGroupSpec& group = spec.groups[g];
    const std::string field = absl::StrCat("groups[", g, "]");
    if (!model.has_rows()) {
      return WithReason(
          absl::FailedPreconditionError(absl::StrCat("register an engine pool: layer group ", g,
                                                     " of the model has no rows")),
          "NO_ROWS", {{"group", absl::StrCat(g)}});
    }
    const bool is_packed = model_spec.packed_row_bytes > 0;
    const bool has_v = model.v_row_bytes() > 0;
    const std::optional<DataType> k_type =
        is_packed ? std::nullopt : std::optional(model_spec.k_type);
    const std::optional<DataType> v_type = has_v ? std::optional(model_spec.v_type) : std::nullopt;
    if (group.k_type != k_type || group.v_type != v_type) {
      return absl::InvalidArgumentError(absl::StrCat(
          field, " has K of ", TypeName(group.k_type), " and V of ", TypeName(group.v_type),
          ", the model's are ", TypeName(k_type), " and ", TypeName(v_type)));
    }
    const uint32_t kv_heads = is_packed ? 1 : model_spec.kv_heads;
    if (group.kv_heads != kv_heads) {
      return absl::InvalidArgumentError(
          absl::StrCat(field, ".kv_heads is ", group.kv_heads, ", the model's are ", kv_heads));
    }
    if (group.heads != EngineHeads::kNhd && group.heads != EngineHeads::kHnd) {
      return absl::InvalidArgumentError(absl::StrCat(field, ".layout is ",
                                                     static_cast<int>(group.heads),
                                                     ", must be LAYOUT_NHD or LAYOUT_HND"));
    }
    if (group.layers.size() != model.num_layers()) {
      return absl::InvalidArgumentError(absl::StrCat(field, ".layers has ", group.layers.size(),
                                                     " entries, the group has ",
                                                     model.num_layers()));
    }
    // Scales of all heads stand behind the row: it moves as one.
    const bool has_scales = model_spec.scale == LayerGroupSpec::ScaleKind::kPerTokenAndHead;
    if (has_scales && kv_heads > 1 && group.heads == EngineHeads::kHnd) {
      return absl::InvalidArgumentError(absl::StrCat(
          field, ".layout is LAYOUT_HND: rows with a scale for each head move as a whole"));
    }
    Group made;
    made.num_heads = static_cast<int32_t>(has_scales ? 1 : kv_heads);
    made.k_head_bytes = model.k_row_bytes() / made.num_heads;
    made.v_head_bytes = model.v_row_bytes() / made.num_heads;
    const auto add = [&](const std::string& plane_field, const EnginePlaneSpec& wanted,
                         int64_t head_bytes, std::vector<Plane>* planes) -> absl::Status {
      const EnginePlaneSpec plane = WithStrides(wanted, group.heads, spec.block_tokens,
                                                made.num_heads, static_cast<uint64_t>(head_bytes));
      PT_RETURN_IF_ERROR(CheckPlane(plane_field, plane, group.heads, spec.block_tokens,
                                    spec.num_blocks, made.num_heads,
                                    static_cast<uint64_t>(head_bytes), memories));
      // Within the memory, and so within int64; strides that are never stepped may be anything.
      const auto stride = [](uint64_t bytes, bool is_used) {
        return is_used ? static_cast<int64_t>(bytes) : 0;
      };
      planes->push_back({memories[plane.memory]->data() + plane.offset,
                         stride(plane.block_stride, true),
                         stride(plane.token_stride, spec.block_tokens > 1),
                         stride(plane.head_stride, made.num_heads > 1)});
      return absl::OkStatus();
    };
    for (size_t l = 0; l < group.layers.size(); ++l) {
      const EngineGroupSpec::Layer& layer = group.layers[l];
      const std::string layer_field = absl::StrCat(field, ".layers[", l, "]");
      PT_RETURN_IF_ERROR(add(absl::StrCat(layer_field, ".k"), layer.k, made.k_head_bytes, &made.k));
      if (layer.v.has_value() != has_v) {
        return absl::InvalidArgumentError(absl::StrCat(layer_field, ".v is ",
                                                       has_v ? "absent" : "set", ", the group has ",
                                                       has_v ? "" : "no ", "V rows"));
      }
      if (has_v) {
        PT_RETURN_IF_ERROR(
            add(absl::StrCat(layer_field, ".v"), *layer.v, made.v_head_bytes, &made.v));
      }
    }
    layout.groups_.push_back(std::move(made));
  }
  layout.memories_ = std::move(memories);
  return layout;
}

absl::Status EngineLayout::CheckMaps(std::span<const EngineSlotMap> maps,
                                     uint64_t num_tokens) const {
  if (maps.size() != 1 && maps.size() != groups_.size()) {
    return absl::InvalidArgumentError(absl::StrCat("slot_maps has ", maps.size(),
                                                   " entries, must have 1 or one for each of the ",
                                                   groups_.size(), " layer groups"));
  }
  for (size_t m = 0; m < maps.size(); ++m) {
    const EngineSlotMap& map = maps[m];
    if (map.first_token > num_tokens) {
      return absl::InvalidArgumentError(absl::StrCat("slot_maps[", m, "].first_token is ",
                                                     map.first_token, ", there are ", num_tokens,
                                                     " tokens"));
    }
    const uint64_t needed = map.first_token == num_tokens ? 0
                                                          : (num_tokens - 1) / block_tokens_ -
                                                                map.first_token / block_tokens_ + 1;
    if (map.blocks.size() != needed) {
      return absl::InvalidArgumentError(absl::StrCat(
          "slot_maps[", m, "].blocks has ", map.blocks.size(), " entries, tokens [",
          map.first_token, ", ", num_tokens, ") in blocks of ", block_tokens_, " need ", needed));
    }
    for (size_t i = 0; i < map.blocks.size(); ++i) {
      if (map.blocks[i] != kNullBlock && map.blocks[i] < num_blocks_) continue;
      return absl::InvalidArgumentError(absl::StrCat("slot_maps[", m, "].blocks[", i, "] is ",
                                                     map.blocks[i], ", must be 1 to ",
                                                     num_blocks_ - 1));
    }
    std::vector<uint32_t> sorted = map.blocks;
    std::sort(sorted.begin(), sorted.end());
    if (const auto twice = std::adjacent_find(sorted.begin(), sorted.end());
        twice != sorted.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat("slot_maps[", m, "].blocks names block ", *twice, " twice"));
    }
  }
  return absl::OkStatus();
}

std::vector<int64_t> EngineLayout::Slots(const EngineSlotMap& map, uint64_t begin,
                                         uint64_t end) const {
  std::vector<int64_t> slots;
  slots.reserve(end - begin);
  const uint64_t first_block = map.first_token / block_tokens_;
  for (uint64_t token = begin; token < end; ++token) {
    const uint32_t block = map.blocks[token / block_tokens_ - first_block];
    slots.push_back(int64_t{block} * block_tokens_ + static_cast<int64_t>(token % block_tokens_));
  }
  return slots;
}

absl::Status EngineLayout::Move(Direction direction, uint32_t group, uint32_t layer, RowKind kind,
                                std::span<const Rows> runs, DevicePool* pool) const {
  const Group& made = groups_[group];
  const bool is_k = kind == RowKind::kK;
  const int64_t head_bytes = is_k ? made.k_head_bytes : made.v_head_bytes;
  if (head_bytes == 0) return absl::OkStatus();
  const Plane& plane = is_k ? made.k[layer] : made.v[layer];
  RowMove move;
  move.direction = direction == Direction::kFromEngine ? kernels::PageMoveDirection::kGather
                                                       : kernels::PageMoveDirection::kScatter;
  move.plane = {plane.base, plane.block_stride, plane.token_stride, plane.head_stride, 0};
  move.engine_page_tokens = static_cast<int32_t>(block_tokens_);
  move.num_heads = made.num_heads;
  move.head_bytes = head_bytes;
  move.runs = runs;
  return pool->MoveRows(move);
}

}  // namespace pagetide
