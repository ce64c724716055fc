#include "core/geometry.h"

#include <algorithm>
#include <cstring>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

struct TypeInfo {
  const char* name;
  uint32_t elements;
  uint32_t bytes;
};

// Block sizes are ggml's: an f16 scale (and an f16 minimum for the _1 types, 4 bytes of fifth bits
// for the q5 types) in front of 32 packed values.
constexpr TypeInfo kTypes[] = {
    {"?", 0, 0},       {"f32", 1, 4},     {"f16", 1, 2},    {"bf16", 1, 2},
    {"f8_e4m3", 1, 1}, {"f8_e5m2", 1, 1}, {"q8_0", 32, 34}, {"q5_0", 32, 22},
    {"q5_1", 32, 24},  {"q4_0", 32, 18},  {"q4_1", 32, 20}, {"iq4_nl", 32, 18},
};

bool IsKnown(DataType type) {
  const int i = static_cast<int>(type);
  return i >= 1 && i < static_cast<int>(std::size(kTypes));
}

absl::StatusOr<uint64_t> RowBytes(absl::string_view field, DataType type, uint64_t heads,
                                  uint64_t dim, bool scale_plane) {
  if (dim == 0) return 0;
  const TypeInfo& info = kTypes[static_cast<int>(type)];
  // A head is encoded on its own, so that heads can be sharded without decoding.
  if (dim % info.elements != 0) {
    return absl::InvalidArgumentError(absl::StrCat(field, " = ", dim, " is not a multiple of ",
                                                   info.elements, ", as ", info.name, " needs"));
  }
  const uint64_t plane = scale_plane ? heads * 4 : 0;
  return heads * (dim / info.elements) * info.bytes + plane;
}

absl::Status CheckRope(const RopeSpec& rope, uint32_t k_dim, absl::string_view at) {
  if (rope.style == RopeSpec::Style::kNone) return absl::OkStatus();
  if (rope.n_rot == 0 || rope.n_rot % 2 != 0 || rope.n_rot > k_dim) {
    return absl::InvalidArgumentError(absl::StrCat(
        at, ".rope.n_rot = ", rope.n_rot, " is not an even number from 2 to k_dim = ", k_dim));
  }
  if (!(rope.base > 0)) {
    return absl::InvalidArgumentError(absl::StrCat(at, ".rope.base = ", rope.base, " is not > 0"));
  }
  if (!rope.factors.empty() && rope.factors.size() != rope.n_rot / 2) {
    return absl::InvalidArgumentError(
        absl::StrCat(at, ".rope.factors has ", rope.factors.size(),
                     " entries, expected n_rot / 2 = ", rope.n_rot / 2));
  }
  if (rope.position_components < 1 || rope.position_components > 4) {
    return absl::InvalidArgumentError(absl::StrCat(
        at, ".rope.position_components = ", rope.position_components, " is not 1 to 4"));
  }
  return absl::OkStatus();
}

// A cold type that is the type itself is none: so both ways to say it are one geometry.
absl::Status CheckColdTypes(LayerGroupSpec& g, bool has_typed_rows, absl::string_view at) {
  if (g.cold_k_type == g.k_type) g.cold_k_type.reset();
  if (g.cold_v_type == g.v_type) g.cold_v_type.reset();
  if (!g.cold_k_type.has_value() && !g.cold_v_type.has_value()) return absl::OkStatus();
  if (!has_typed_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat(at, ": cold_k_type or cold_v_type on a group without typed rows"));
  }
  if (g.scale != LayerGroupSpec::ScaleKind::kNone) {
    return absl::InvalidArgumentError(
        absl::StrCat(at, ": cold types need scale none, it is ", static_cast<int>(g.scale)));
  }
  if (g.v_dim == 0 && g.cold_v_type.has_value()) {
    return absl::InvalidArgumentError(
        absl::StrCat(at, ".cold_v_type = ", DataTypeName(*g.cold_v_type), " with v_dim = 0"));
  }
  for (const auto& type : {g.cold_k_type, g.cold_v_type}) {
    if (type.has_value() && !IsKnown(*type)) {
      return absl::InvalidArgumentError(
          absl::StrCat(at, ": cold type ", static_cast<int>(*type), " is not known"));
    }
  }
  return absl::OkStatus();
}

void AppendDouble(Sha256& hash, double value) {
  uint64_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  hash.AppendU64(bits);
}

Digest Fingerprint(const LayerGroupSpec& g, const ShardSpec& shard, uint32_t page_tokens) {
  Sha256 hash;
  hash.AppendField("pagetide.component.v1").AppendU32(page_tokens);
  hash.AppendU32(static_cast<uint32_t>(g.kind)).AppendU32(static_cast<uint32_t>(g.window_type));
  hash.AppendU32(g.window_tokens);
  if (g.window_type == LayerGroupSpec::WindowType::kRing) hash.AppendU32(g.keep_tokens);
  hash.AppendU64(g.layers.size());
  for (uint32_t layer : g.layers) hash.AppendU32(layer);
  hash.AppendU32(static_cast<uint32_t>(g.k_type)).AppendU32(static_cast<uint32_t>(g.v_type));
  hash.AppendU32(static_cast<uint32_t>(g.scale)).AppendField(g.scale_digest);
  hash.AppendU32(g.kv_heads).AppendU32(g.k_dim).AppendU32(g.v_dim);
  hash.AppendU32(g.packed_row_bytes).AppendU64(g.opaque_bytes);
  const RopeSpec& r = g.rope;
  hash.AppendU32(static_cast<uint32_t>(r.style)).AppendU32(r.n_rot);
  AppendDouble(hash, r.base);
  hash.AppendU32(static_cast<uint32_t>(r.scaling));
  AppendDouble(hash, r.scale);
  hash.AppendU64(r.factors.size());
  for (float f : r.factors) AppendDouble(hash, f);
  AppendDouble(hash, r.yarn_ext_factor);
  AppendDouble(hash, r.yarn_attn_factor);
  AppendDouble(hash, r.yarn_beta_fast);
  AppendDouble(hash, r.yarn_beta_slow);
  hash.AppendU32(r.yarn_original_context).AppendU32(r.position_components);
  hash.AppendU32(static_cast<uint32_t>(g.basis));
  hash.AppendU32(shard.kv_head_begin).AppendU32(shard.kv_head_end);
  hash.AppendU32(shard.layer_begin).AppendU32(shard.layer_end);
  // Behind all else and only where there are some: other groups keep the fingerprint that they had.
  if (g.cold_k_type.has_value() || g.cold_v_type.has_value()) {
    hash.AppendField("cold");
    for (const auto& type : {g.cold_k_type, g.cold_v_type}) {
      hash.AppendU32(type.has_value() ? static_cast<uint32_t>(*type) : 0);
    }
  }
  return hash.Finish();
}

}  // namespace

absl::string_view DataTypeName(DataType type) {
  return IsKnown(type) ? kTypes[static_cast<int>(type)].name : "?";
}

uint32_t DataTypeGroupElements(DataType type) {
  return kTypes[static_cast<int>(type)].elements;
}

uint32_t DataTypeGroupBytes(DataType type) {
  return kTypes[static_cast<int>(type)].bytes;
}

absl::StatusOr<PageGeometry> PageGeometry::Create(GeometrySpec spec) {
  if (spec.page_tokens < 1 || spec.page_tokens > kMaxPageTokens) {
    return absl::InvalidArgumentError(
        absl::StrCat("page_tokens = ", spec.page_tokens, " is not 1 to ", kMaxPageTokens));
  }
  if (spec.groups.empty() || spec.groups.size() > 64) {
    return absl::InvalidArgumentError(
        absl::StrCat("groups has ", spec.groups.size(), " entries, expected 1 to 64"));
  }
  const ShardSpec& shard = spec.shard;
  if (shard.kv_head_begin > shard.kv_head_end || shard.layer_begin > shard.layer_end) {
    return absl::InvalidArgumentError("shard: a range begins after its end");
  }
  if (shard.num_ranks < 1 || shard.rank >= shard.num_ranks) {
    return absl::InvalidArgumentError(
        absl::StrCat("shard.rank = ", shard.rank, " is not below num_ranks = ", shard.num_ranks));
  }
  PageGeometry geometry;
  for (size_t i = 0; i < spec.groups.size(); ++i) {
    LayerGroupSpec& g = spec.groups[i];
    const std::string at = absl::StrCat("groups[", i, "]");
    if (g.layers.empty() || g.layers.size() > 4096 ||
        !std::is_sorted(g.layers.begin(), g.layers.end()) ||
        std::adjacent_find(g.layers.begin(), g.layers.end()) != g.layers.end()) {
      return absl::InvalidArgumentError(
          absl::StrCat(at, ".layers: 1 to 4096 ascending layer numbers expected"));
    }
    const bool has_typed_rows =
        (g.kind == LayerGroupSpec::Kind::kFull || g.kind == LayerGroupSpec::Kind::kWindow) &&
        g.packed_row_bytes == 0;
    PT_RETURN_IF_ERROR(CheckColdTypes(g, has_typed_rows, at));
    GroupGeometry out;
    out.spec_ = g;
    out.page_tokens_ = spec.page_tokens;
    using Kind = LayerGroupSpec::Kind;
    if (g.kind == Kind::kWindow) {
      if (g.window_type == LayerGroupSpec::WindowType::kNone || g.window_tokens == 0) {
        return absl::InvalidArgumentError(
            absl::StrCat(at, ": a window group needs window_type and window_tokens > 0"));
      }
      const bool is_ring = g.window_type == LayerGroupSpec::WindowType::kRing;
      if (is_ring ? g.keep_tokens >= g.window_tokens : g.keep_tokens != 0) {
        return absl::InvalidArgumentError(absl::StrCat(
            at, ".keep_tokens = ", g.keep_tokens,
            is_ring ? " is not below window_tokens = " : " on a window that is no ring, of ",
            g.window_tokens));
      }
    } else if (g.window_type != LayerGroupSpec::WindowType::kNone || g.window_tokens != 0 ||
               g.keep_tokens != 0) {
      return absl::InvalidArgumentError(absl::StrCat(at, ": window fields on another kind"));
    }
    if (g.kind == Kind::kRecurrent || g.kind == Kind::kOpaque) {
      if (g.opaque_bytes == 0 || g.opaque_bytes > kMaxPageBytes) {
        return absl::InvalidArgumentError(
            absl::StrCat(at, ".opaque_bytes = ", g.opaque_bytes, " is not 1 to ", kMaxPageBytes));
      }
      out.page_bytes_ = g.opaque_bytes;
    } else {
      out.has_rows_ = true;
      uint64_t k = g.packed_row_bytes;
      uint64_t v = 0;
      if (g.packed_row_bytes == 0) {
        if (!IsKnown(g.k_type) || !IsKnown(g.v_type)) {
          return absl::InvalidArgumentError(absl::StrCat(at, ": unknown k_type or v_type"));
        }
        if (g.kv_heads < 1 || g.kv_heads > 4096 || g.k_dim < 1 || g.k_dim > 65536 ||
            g.v_dim > 65536) {
          return absl::InvalidArgumentError(
              absl::StrCat(at, ": kv_heads = ", g.kv_heads, " (1 to 4096), k_dim = ", g.k_dim,
                           " (1 to 65536), v_dim = ", g.v_dim, " (0 to 65536)"));
        }
        const bool plane = g.scale == LayerGroupSpec::ScaleKind::kPerTokenAndHead;
        PT_ASSIGN_OR_RETURN(
            k, RowBytes(absl::StrCat(at, ".k_dim"), g.k_type, g.kv_heads, g.k_dim, plane));
        PT_ASSIGN_OR_RETURN(
            v, RowBytes(absl::StrCat(at, ".v_dim"), g.v_type, g.kv_heads, g.v_dim, plane));
        PT_RETURN_IF_ERROR(CheckRope(g.rope, g.k_dim, at));
      }
      if (g.scale == LayerGroupSpec::ScaleKind::kPerLayer && g.scale_digest.size() != 32) {
        return absl::InvalidArgumentError(
            absl::StrCat(at, ".scale_digest has ", g.scale_digest.size(), " bytes, expected 32"));
      }
      if (k > kMaxPageBytes || v > kMaxPageBytes) {
        return absl::InvalidArgumentError(absl::StrCat(at, ": rows exceed ", kMaxPageBytes));
      }
      out.k_row_bytes_ = static_cast<uint32_t>(k);
      out.v_row_bytes_ = static_cast<uint32_t>(v);
      out.layer_bytes_ = spec.page_tokens * (k + v);  // < 2^16 · 2^31: no overflow
      if (out.layer_bytes_ > kMaxPageBytes / g.layers.size()) {
        return absl::InvalidArgumentError(absl::StrCat(at, ": a page of ", g.layers.size(),
                                                       " layers × ", out.layer_bytes_,
                                                       " bytes exceeds ", kMaxPageBytes));
      }
      out.page_bytes_ = out.layer_bytes_ * g.layers.size();
      out.stored_k_row_bytes_ = out.k_row_bytes_;
      out.stored_v_row_bytes_ = out.v_row_bytes_;
      if (g.cold_k_type.has_value()) {
        PT_ASSIGN_OR_RETURN(const uint64_t cold, RowBytes(absl::StrCat(at, ".cold_k_type: k_dim"),
                                                          *g.cold_k_type, g.kv_heads, g.k_dim,
                                                          /*scale_plane=*/false));
        out.stored_k_row_bytes_ = static_cast<uint32_t>(cold);
      }
      if (g.cold_v_type.has_value()) {
        PT_ASSIGN_OR_RETURN(const uint64_t cold, RowBytes(absl::StrCat(at, ".cold_v_type: v_dim"),
                                                          *g.cold_v_type, g.kv_heads, g.v_dim,
                                                          /*scale_plane=*/false));
        out.stored_v_row_bytes_ = static_cast<uint32_t>(cold);
      }
    }
    out.stored_page_bytes_ = out.has_rows_
                                 ? spec.page_tokens * g.layers.size() *
                                       (uint64_t{out.stored_k_row_bytes_} + out.stored_v_row_bytes_)
                                 : out.page_bytes_;
    if (out.stored_page_bytes_ > kMaxPageBytes) {
      return absl::InvalidArgumentError(absl::StrCat(
          at, ": a stored page of ", out.stored_page_bytes_, " bytes exceeds ", kMaxPageBytes));
    }
    out.fingerprint_ = Fingerprint(g, shard, spec.page_tokens);
    geometry.total_page_bytes_ += out.page_bytes_;
    geometry.groups_.push_back(std::move(out));
  }
  geometry.spec_ = std::move(spec);
  return geometry;
}

}  // namespace pagetide
