#include "formats/geometry_map.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

using Kind = LayerGroupSpec::Kind;

template <typename... Args>
absl::Status Mismatch(const Args&... args) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat("match state to model: ", args...)),
                    "MODEL_MISMATCH");
}
constexpr uint32_t kNoRow = ~uint32_t{0};

template <typename... Args>
absl::Status CannotExpress(const Args&... args) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat(args...)), "CANNOT_EXPRESS");
}

// Layers with rows, in the order of the model's layer numbers; of one kind or of both.
std::vector<ModelLayer> LayersInOrder(const PageGeometry& geometry, std::optional<Kind> kind) {
  std::vector<std::pair<uint32_t, ModelLayer>> numbered;
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    const LayerGroupSpec& spec = geometry.group(g).spec();
    if (!geometry.group(g).has_rows() || (kind && spec.kind != *kind)) continue;
    for (uint32_t l = 0; l < spec.layers.size(); ++l) {
      numbered.push_back({spec.layers[l], {g, l}});
    }
  }
  std::sort(numbered.begin(), numbered.end(),
            [](const auto& a, const auto& b) { return a.first < b.first; });
  std::vector<ModelLayer> layers;
  for (const auto& [number, layer] : numbered) layers.push_back(layer);
  return layers;
}

bool HasKind(const PageGeometry& geometry, Kind kind) {
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    if (geometry.group(g).spec().kind == kind) return true;
  }
  return false;
}

std::vector<std::vector<ModelLayer>> BlocksByKind(const PageGeometry& geometry) {
  if (!HasKind(geometry, Kind::kFull) || !HasKind(geometry, Kind::kWindow)) {
    return {LayersInOrder(geometry, std::nullopt)};
  }
  return {LayersInOrder(geometry, Kind::kFull), LayersInOrder(geometry, Kind::kWindow)};
}

RowShape ShapeOf(const GroupGeometry& group, RowKind kind) {
  RowShape shape;
  shape.bytes = group.row_bytes(kind);
  if (group.spec().packed_row_bytes == 0 && shape.bytes != 0) {
    shape.type = kind == RowKind::kK ? group.spec().k_type : group.spec().v_type;
  }
  return shape;
}

// As the format's mask has it: whether a token behind the last one may attend to row p.
bool IsMasked(const LayerGroupSpec& spec, uint64_t p, uint64_t last) {
  switch (spec.window_type) {
    case LayerGroupSpec::WindowType::kStandard:
      return last - p >= spec.window_tokens;
    case LayerGroupSpec::WindowType::kChunked:
      return p < last / spec.window_tokens * spec.window_tokens;
    case LayerGroupSpec::WindowType::kSymmetric:
      return last - p > spec.window_tokens / 2;
    case LayerGroupSpec::WindowType::kRing:
      return p >= spec.keep_tokens && last - p >= spec.window_tokens - spec.keep_tokens;
    case LayerGroupSpec::WindowType::kNone:
      return false;
  }
  return false;
}

}  // namespace

absl::Status CheckForeignGeometry(const PageGeometry& geometry) {
  const ShardSpec& shard = geometry.spec().shard;
  if (shard.num_ranks > 1) {
    return CannotExpress("the model is shard ", shard.rank, " of ", shard.num_ranks,
                         ": foreign formats hold whole models");
  }
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    const LayerGroupSpec& spec = geometry.group(g).spec();
    if (!geometry.group(g).has_rows()) {
      return CannotExpress("layer group ", g, " is recurrent or opaque: it has no rows");
    }
    if (spec.scale != LayerGroupSpec::ScaleKind::kNone) {
      return CannotExpress("layer group ", g, " has scales beside its rows");
    }
    if (spec.basis != LayerGroupSpec::Basis::kPlain) {
      return CannotExpress("rows of layer group ", g,
                           " are in a Hadamard-rotated basis, which foreign formats do not record");
    }
  }
  return absl::OkStatus();
}

LlamaCppHints LlamaCppHintsFor(const PageGeometry& geometry, uint32_t version) {
  LlamaCppHints hints;
  hints.num_bodies = static_cast<uint32_t>(BlocksByKind(geometry).size());
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    const GroupGeometry& group = geometry.group(g);
    if (group.has_rows() && group.v_row_bytes() == 0) hints.has_v = false;
    if (group.spec().rope.position_components > 1) hints.cell_ext_bytes = version == 2 ? 8 : 12;
  }
  return hints;
}

absl::StatusOr<std::vector<std::vector<ModelLayer>>> PlacesOf(const SequenceState& state,
                                                              const PageGeometry& geometry,
                                                              uint64_t num_tokens) {
  PT_ASSIGN_OR_RETURN(const StateMap map,
                      StateMap::Create(&state, BlockRule::kByNumber, geometry, num_tokens));
  const std::vector<ModelLayer> layers = LayersInOrder(geometry, std::nullopt);
  std::vector<std::vector<ModelLayer>> places;
  for (const RowBlock& block : state.blocks) {
    std::vector<ModelLayer>& of_block = places.emplace_back();
    for (const LayerShape& layer : block.layers) of_block.push_back(layers[layer.number]);
  }
  return places;
}

absl::StatusOr<StateMap> StateMap::Create(const SequenceState* state, BlockRule rule,
                                          const PageGeometry& geometry, uint64_t num_tokens) {
  PT_RETURN_IF_ERROR(CheckForeignGeometry(geometry));
  StateMap map;
  map.state_ = state;
  map.sources_.resize(geometry.num_groups());
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    map.sources_[g].resize(geometry.group(g).num_layers());
  }
  const std::vector<std::vector<ModelLayer>> by_kind = BlocksByKind(geometry);
  const std::vector<ModelLayer> by_number = LayersInOrder(geometry, std::nullopt);
  if (rule == BlockRule::kByKind && state->blocks.size() != by_kind.size()) {
    return Mismatch("the state has ", state->blocks.size(), " bodies, the model needs ",
                    by_kind.size());
  }
  size_t num_layers = 0;
  for (size_t b = 0; b < state->blocks.size(); ++b) {
    const RowBlock& block = state->blocks[b];
    num_layers += block.layers.size();
    if (rule == BlockRule::kByKind && block.layers.size() != by_kind[b].size()) {
      return Mismatch("body ", b, " has ", block.layers.size(), " layers, the model has ",
                      by_kind[b].size());
    }
    for (size_t l = 0; l < block.layers.size(); ++l) {
      const LayerShape& shape = block.layers[l];
      if (rule == BlockRule::kByNumber && shape.number >= by_number.size()) {
        return Mismatch("the state has a layer ", shape.number, ", the model has ",
                        by_number.size());
      }
      const ModelLayer at = rule == BlockRule::kByKind ? by_kind[b][l] : by_number[shape.number];
      const GroupGeometry& group = geometry.group(at.group);
      const bool joins = group.spec().packed_row_bytes != 0 && !shape.k.type && !shape.v.type &&
                         shape.k.bytes + shape.v.bytes == group.k_row_bytes();
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        const RowShape expected = ShapeOf(group, kind);
        if (!joins && shape.of(kind) != expected) {
          return Mismatch(kind == RowKind::kK ? "K" : "V", " of layer ",
                          group.spec().layers[at.layer], " is ", shape.of(kind).ToString(),
                          ", the model has ", expected.ToString());
        }
      }
      map.sources_[at.group][at.layer] = {b, l, joins};
    }
  }
  if (num_layers != by_number.size()) {
    return Mismatch("the state has ", num_layers, " layers, the model has ", by_number.size());
  }
  map.rows_at_.resize(state->blocks.size());
  std::vector<std::vector<RowSpan>> held_by_block(state->blocks.size());
  for (size_t b = 0; b < state->blocks.size(); ++b) {
    const std::vector<uint32_t>& positions = state->blocks[b].positions;
    bool in_order = positions.size() == num_tokens;
    std::vector<uint32_t> rows(num_tokens, kNoRow);
    for (uint64_t r = 0; r < positions.size(); ++r) {
      in_order = in_order && positions[r] == r;
      if (positions[r] >= num_tokens || rows[positions[r]] != kNoRow) {
        return Mismatch("row ", r, " of block ", b, " is at position ", positions[r],
                        ", expected positions below the ", num_tokens, " tokens, each once");
      }
      rows[positions[r]] = static_cast<uint32_t>(r);
    }
    for (uint64_t p = 0; p < num_tokens; ++p) {
      if (rows[p] == kNoRow) continue;
      if (!held_by_block[b].empty() && held_by_block[b].back().end == p)
        ++held_by_block[b].back().end;
      else
        held_by_block[b].push_back({p, p + 1});
    }
    if (!in_order) map.rows_at_[b] = std::move(rows);
  }
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    for (const Source& source : map.sources_[g]) {
      const std::vector<RowSpan>& held = held_by_block[source.block];
      PT_RETURN_IF_ERROR(CheckHeldRows(geometry, g, held, num_tokens));
      if (&source == &map.sources_[g].front()) {
        map.held_.push_back(held);
      } else if (held != map.held_.back()) {
        return Mismatch("the layers of layer group ", g, " have rows of different tokens");
      }
    }
  }
  return map;
}

absl::Status CheckHeldRows(const PageGeometry& geometry, uint32_t group,
                           std::span<const RowSpan> held, uint64_t num_tokens) {
  // Asked of a sequence that has just these rows.
  SequenceRows rows;
  rows.tokens.resize(num_tokens);
  PageTable& table = rows.tables.emplace_back();
  uint64_t num_held = 0;
  for (const RowSpan& span : held) {
    const uint64_t count = span.end - span.begin;
    table.Append({.page = PageId(1),
                  .first_slot = 0,
                  .count = static_cast<uint32_t>(count),
                  .first_row = span.begin});
    num_held += count;
  }
  const auto lacked = rows.LackedIn(0, TraitsOf(geometry.group(group).spec()), num_tokens);
  if (!lacked && table.num_rows() == num_tokens) return absl::OkStatus();
  return Mismatch("layer group ", group, " has ", num_held, " rows for ", num_tokens,
                  " tokens, and needs row ", lacked ? lacked->row : num_tokens - 1,
                  " too: rows that a window dropped are missing, or tokens are");
}

absl::Status StateMap::ReadKind(const RowReader& rows, const Source& source, RowKind kind,
                                uint64_t first, uint64_t count, std::span<std::byte> out) const {
  const std::vector<uint32_t>& rows_at = rows_at_[source.block];
  RowRange range{source.block, source.layer, kind, first, count};
  if (rows_at.empty()) return rows.ReadRows(range, out);
  const uint64_t row_bytes = out.size() / count;
  for (uint64_t done = 0; done < count; done += range.count) {
    const bool is_there = rows_at[first + done] != kNoRow;
    // As many rows as lie one behind the other.
    range.first = rows_at[first + done];
    range.count = 1;
    while (done + range.count < count &&
           rows_at[first + done + range.count] == (is_there ? range.first + range.count : kNoRow)) {
      ++range.count;
    }
    const std::span<std::byte> to = out.subspan(done * row_bytes, range.count * row_bytes);
    if (is_there)
      PT_RETURN_IF_ERROR(rows.ReadRows(range, to));
    else
      std::memset(to.data(), 0, to.size());
  }
  return absl::OkStatus();
}

absl::Status StateMap::ReadRows(const RowReader& rows, uint32_t group, uint32_t layer, RowKind kind,
                                uint64_t first, uint64_t count, std::span<std::byte> out) const {
  if (count == 0) return absl::OkStatus();
  const Source& source = sources_[group][layer];
  if (!source.joins_k_and_v) return ReadKind(rows, source, kind, first, count, out);
  const LayerShape& shape = state_->blocks[source.block].layers[source.layer];
  const uint64_t row_bytes = shape.k.bytes + shape.v.bytes;
  uint64_t at = 0;
  for (const RowKind part : {RowKind::kK, RowKind::kV}) {
    const uint64_t part_bytes = shape.of(part).bytes;
    if (part_bytes == 0) continue;
    std::vector<std::byte> bytes(count * part_bytes);
    PT_RETURN_IF_ERROR(ReadKind(rows, source, part, first, count, bytes));
    for (uint64_t r = 0; r < count; ++r) {
      std::memcpy(out.data() + r * row_bytes + at, bytes.data() + r * part_bytes, part_bytes);
    }
    at += part_bytes;
  }
  return absl::OkStatus();
}

absl::StatusOr<DescribedState> DescribeForLlamaCpp(const PageGeometry& geometry,
                                                   std::vector<uint32_t> tokens,
                                                   std::span<const std::vector<RowSpan>> held) {
  PT_RETURN_IF_ERROR(CheckForeignGeometry(geometry));
  DescribedState described;
  described.places = BlocksByKind(geometry);
  const uint64_t n = tokens.size();
  for (const std::vector<ModelLayer>& layers : described.places) {
    RowBlock& block = described.state.blocks.emplace_back();
    if (n == 0) continue;
    const LayerGroupSpec& first = geometry.group(layers[0].group).spec();
    if (first.window_type == LayerGroupSpec::WindowType::kRing) {
      return CannotExpress("write llama.cpp state: layer group ", layers[0].group,
                           " is a ring, which llama.cpp has not");
    }
    for (const ModelLayer& at : layers) {
      const GroupGeometry& group = geometry.group(at.group);
      if (group.spec().window_type != first.window_type ||
          group.spec().window_tokens != first.window_tokens) {
        return CannotExpress("write llama.cpp state: layer groups ", layers[0].group, " and ",
                             at.group, " have different windows");
      }
      block.layers.push_back({ShapeOf(group, RowKind::kK), ShapeOf(group, RowKind::kV),
                              static_cast<uint32_t>(block.layers.size())});
    }
    for (uint64_t p = 0; p < n; ++p) {
      const bool is_held = std::all_of(layers.begin(), layers.end(), [&](const ModelLayer& at) {
        return Holds(held[at.group], p);
      });
      if (is_held && !IsMasked(first, p, n - 1)) {
        block.positions.push_back(static_cast<uint32_t>(p));
      }
    }
  }
  described.state.tokens = std::move(tokens);
  return described;
}

absl::Status CheckMlxWindows(const MlxCache& cache, const PageGeometry& geometry) {
  const std::vector<ModelLayer> by_number = LayersInOrder(geometry, std::nullopt);
  for (size_t i = 0; i < std::min(cache.layers().size(), by_number.size()); ++i) {
    const MlxLayer& layer = cache.layers()[i];
    const LayerGroupSpec& spec = geometry.group(by_number[i].group).spec();
    const bool is_turned =
        layer.cache_class == MlxCacheClass::kRotating && layer.offset > layer.rows();
    const bool is_trimmed =
        layer.cache_class == MlxCacheClass::kChunked && layer.start_position > 0;
    if (!is_turned && !is_trimmed) continue;
    using Type = LayerGroupSpec::WindowType;
    const uint64_t window = is_turned ? layer.max_size : layer.chunk_size;
    const bool is_same_type = is_turned
                                  ? spec.window_type == Type::kRing ||
                                        (spec.window_type == Type::kStandard && layer.keep == 0)
                                  : spec.window_type == Type::kChunked;
    if (spec.kind != Kind::kWindow || !is_same_type || spec.window_tokens != window ||
        spec.keep_tokens != layer.keep) {
      return Mismatch("layer ", i, " is a ", MlxCacheClassName(layer.cache_class), " of ", window,
                      " rows, of which the first ", layer.keep,
                      " stay, and has dropped some; the model has another window there or none");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<DescribedMlx> DescribeForMlx(const PageGeometry& geometry) {
  PT_RETURN_IF_ERROR(CheckForeignGeometry(geometry));
  DescribedMlx described;
  described.places = {LayersInOrder(geometry, std::nullopt)};
  for (const ModelLayer& at : described.places[0]) {
    const LayerGroupSpec& spec = geometry.group(at.group).spec();
    if (spec.packed_row_bytes != 0 || spec.k_type != spec.v_type || spec.v_dim == 0) {
      return CannotExpress(
          "write MLX prompt cache: layer ", spec.layers[at.layer],
          " is packed, has no V, or K and V of two types; a KVCache has arrays of one type");
    }
    described.layers.push_back({spec.k_type, spec.kv_heads, spec.k_dim, spec.v_dim});
  }
  return described;
}

}  // namespace pagetide
