#include "rpc/model_codec.h"

#include <cmath>
#include <cstdint>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "google/protobuf/io/coded_stream.h"
#include "google/protobuf/io/zero_copy_stream_impl_lite.h"

namespace pagetide {
namespace {

constexpr int kMaxAdapters = 64;
constexpr size_t kMaxNumericsIdBytes = 128;

template <typename T>
T ValueOr(T value, T default_value) {
  return value == T{} ? default_value : value;
}

absl::Status FieldError(absl::string_view field, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(field, " ", what));
}

// `value` of an enum whose numbers are those of the domain's, from `first` to `last`.
template <typename Enum>
absl::StatusOr<Enum> EnumFromProto(absl::string_view field, int value, int first, int last) {
  if (value < first || value > last) {
    return FieldError(field, absl::StrCat("= ", value, " is not ", first, " to ", last));
  }
  return static_cast<Enum>(value);
}

absl::StatusOr<Digest> DigestField(absl::string_view field, absl::string_view raw) {
  if (raw.size() != 32) {
    return FieldError(field, absl::StrCat("has ", raw.size(), " bytes, expected 32"));
  }
  return Digest::FromBytes(raw);
}

absl::Status CheckFinite(absl::string_view field, double value) {
  if (std::isfinite(value)) return absl::OkStatus();
  return FieldError(field, "is not a finite number");
}

absl::StatusOr<RopeSpec> RopeFromProto(const v1::Rope& proto, absl::string_view at) {
  const auto field = [&](absl::string_view name) { return absl::StrCat(at, ".rope.", name); };
  RopeSpec rope;
  PT_ASSIGN_OR_RETURN(rope.style,
                      EnumFromProto<RopeSpec::Style>(field("style"), proto.style(), 0, 2));
  PT_ASSIGN_OR_RETURN(rope.scaling,
                      EnumFromProto<RopeSpec::Scaling>(field("scaling"), proto.scaling(), 0, 2));
  rope.n_rot = proto.n_rot();
  rope.base = ValueOr(proto.base(), rope.base);
  rope.scale = ValueOr(proto.scale(), rope.scale);
  rope.factors.assign(proto.factors().begin(), proto.factors().end());
  rope.yarn_ext_factor = proto.yarn_ext_factor();
  rope.yarn_attn_factor = ValueOr(proto.yarn_attn_factor(), rope.yarn_attn_factor);
  rope.yarn_beta_fast = ValueOr(proto.yarn_beta_fast(), rope.yarn_beta_fast);
  rope.yarn_beta_slow = ValueOr(proto.yarn_beta_slow(), rope.yarn_beta_slow);
  rope.yarn_original_context = proto.yarn_original_context();
  rope.position_components = ValueOr(proto.position_components(), rope.position_components);
  PT_RETURN_IF_ERROR(CheckFinite(field("base"), rope.base));
  PT_RETURN_IF_ERROR(CheckFinite(field("scale"), rope.scale));
  PT_RETURN_IF_ERROR(CheckFinite(field("yarn_ext_factor"), rope.yarn_ext_factor));
  PT_RETURN_IF_ERROR(CheckFinite(field("yarn_attn_factor"), rope.yarn_attn_factor));
  PT_RETURN_IF_ERROR(CheckFinite(field("yarn_beta_fast"), rope.yarn_beta_fast));
  PT_RETURN_IF_ERROR(CheckFinite(field("yarn_beta_slow"), rope.yarn_beta_slow));
  for (float factor : rope.factors) PT_RETURN_IF_ERROR(CheckFinite(field("factors"), factor));
  return rope;
}

absl::StatusOr<LayerGroupSpec> GroupFromProto(const v1::LayerGroup& proto, int index) {
  const std::string at = absl::StrCat("geometry.groups[", index, "]");
  const auto field = [&](absl::string_view name) { return absl::StrCat(at, ".", name); };
  LayerGroupSpec group;
  PT_ASSIGN_OR_RETURN(group.kind,
                      EnumFromProto<LayerGroupSpec::Kind>(field("kind"), proto.kind(), 1, 4));
  PT_ASSIGN_OR_RETURN(group.window_type, EnumFromProto<LayerGroupSpec::WindowType>(
                                             field("window_type"), proto.window_type(), 0, 4));
  group.window_tokens = proto.window_tokens();
  group.keep_tokens = proto.keep_tokens();
  group.layers.assign(proto.layers().begin(), proto.layers().end());
  group.packed_row_bytes = proto.packed_row_bytes();
  group.opaque_bytes = proto.opaque_bytes();
  group.kv_heads = proto.kv_heads();
  group.k_dim = proto.k_dim();
  group.v_dim = proto.v_dim();
  // A type that no row uses may be left out; it then has the domain's default, so that leaving it
  // out and naming that default are one geometry.
  const bool has_typed_rows =
      (group.kind == LayerGroupSpec::Kind::kFull || group.kind == LayerGroupSpec::Kind::kWindow) &&
      group.packed_row_bytes == 0;
  if (has_typed_rows || proto.k_type() != v1::DATA_TYPE_UNSPECIFIED) {
    PT_ASSIGN_OR_RETURN(group.k_type,
                        EnumFromProto<DataType>(field("k_type"), proto.k_type(), 1, 11));
  }
  if ((has_typed_rows && group.v_dim > 0) || proto.v_type() != v1::DATA_TYPE_UNSPECIFIED) {
    PT_ASSIGN_OR_RETURN(group.v_type,
                        EnumFromProto<DataType>(field("v_type"), proto.v_type(), 1, 11));
  }
  PT_ASSIGN_OR_RETURN(
      group.scale, EnumFromProto<LayerGroupSpec::ScaleKind>(field("scale"), proto.scale(), 0, 2));
  if (!proto.scale_digest().empty()) {
    PT_RETURN_IF_ERROR(DigestField(field("scale_digest"), proto.scale_digest()).status());
    group.scale_digest = proto.scale_digest();
  }
  PT_ASSIGN_OR_RETURN(group.basis,
                      EnumFromProto<LayerGroupSpec::Basis>(field("basis"), proto.basis(), 0, 1));
  if (proto.cold_k_type() != v1::DATA_TYPE_UNSPECIFIED) {
    PT_ASSIGN_OR_RETURN(group.cold_k_type,
                        EnumFromProto<DataType>(field("cold_k_type"), proto.cold_k_type(), 1, 11));
  }
  if (proto.cold_v_type() != v1::DATA_TYPE_UNSPECIFIED) {
    PT_ASSIGN_OR_RETURN(group.cold_v_type,
                        EnumFromProto<DataType>(field("cold_v_type"), proto.cold_v_type(), 1, 11));
  }
  if (proto.has_rope()) {
    PT_ASSIGN_OR_RETURN(group.rope, RopeFromProto(proto.rope(), at));
  }
  return group;
}

v1::Rope RopeToProto(const RopeSpec& rope) {
  v1::Rope proto;
  proto.set_style(static_cast<v1::Rope::Style>(rope.style));
  proto.set_n_rot(rope.n_rot);
  proto.set_base(rope.base);
  proto.set_scaling(static_cast<v1::Rope::Scaling>(rope.scaling));
  proto.set_scale(rope.scale);
  proto.mutable_factors()->Add(rope.factors.begin(), rope.factors.end());
  proto.set_yarn_ext_factor(rope.yarn_ext_factor);
  proto.set_yarn_attn_factor(rope.yarn_attn_factor);
  proto.set_yarn_beta_fast(rope.yarn_beta_fast);
  proto.set_yarn_beta_slow(rope.yarn_beta_slow);
  proto.set_yarn_original_context(rope.yarn_original_context);
  proto.set_position_components(rope.position_components);
  return proto;
}

v1::LayerGroup GroupToProto(const LayerGroupSpec& group) {
  v1::LayerGroup proto;
  proto.set_kind(static_cast<v1::LayerGroup::Kind>(group.kind));
  proto.set_window_type(static_cast<v1::LayerGroup::WindowType>(group.window_type));
  proto.set_window_tokens(group.window_tokens);
  proto.set_keep_tokens(group.keep_tokens);
  proto.mutable_layers()->Add(group.layers.begin(), group.layers.end());
  proto.set_k_type(static_cast<v1::DataType>(group.k_type));
  proto.set_v_type(static_cast<v1::DataType>(group.v_type));
  proto.set_scale(static_cast<v1::LayerGroup::ScaleKind>(group.scale));
  proto.set_scale_digest(group.scale_digest);
  proto.set_kv_heads(group.kv_heads);
  proto.set_k_dim(group.k_dim);
  proto.set_v_dim(group.v_dim);
  proto.set_packed_row_bytes(group.packed_row_bytes);
  proto.set_opaque_bytes(group.opaque_bytes);
  if (group.rope != RopeSpec{}) *proto.mutable_rope() = RopeToProto(group.rope);
  proto.set_basis(static_cast<v1::LayerGroup::Basis>(group.basis));
  if (group.cold_k_type) proto.set_cold_k_type(static_cast<v1::DataType>(*group.cold_k_type));
  if (group.cold_v_type) proto.set_cold_v_type(static_cast<v1::DataType>(*group.cold_v_type));
  return proto;
}

}  // namespace

absl::StatusOr<ModelSpec> ModelSpecFromProto(const v1::ModelSpec& proto) {
  ModelSpec spec;
  spec.name = proto.name();
  PT_ASSIGN_OR_RETURN(spec.weights_digest, DigestField("weights_digest", proto.weights_digest()));
  PT_ASSIGN_OR_RETURN(spec.tokenizer_digest,
                      DigestField("tokenizer_digest", proto.tokenizer_digest()));
  if (proto.adapter_digests_size() > kMaxAdapters) {
    return FieldError("adapter_digests", absl::StrCat("has ", proto.adapter_digests_size(),
                                                      " entries, at most ", kMaxAdapters));
  }
  for (int i = 0; i < proto.adapter_digests_size(); ++i) {
    PT_ASSIGN_OR_RETURN(Digest adapter, DigestField(absl::StrCat("adapter_digests[", i, "]"),
                                                    proto.adapter_digests(i)));
    spec.adapter_digests.push_back(adapter);
  }
  if (proto.numerics_id().size() > kMaxNumericsIdBytes) {
    return FieldError("numerics_id", absl::StrCat("has ", proto.numerics_id().size(),
                                                  " bytes, at most ", kMaxNumericsIdBytes));
  }
  spec.numerics_id = proto.numerics_id();
  spec.vocabulary_size = proto.vocabulary_size();
  spec.batch_invariant = proto.batch_invariant();
  const v1::Geometry& geometry = proto.geometry();
  spec.geometry.page_tokens = ValueOr(geometry.page_tokens(), spec.geometry.page_tokens);
  for (int i = 0; i < geometry.groups_size(); ++i) {
    PT_ASSIGN_OR_RETURN(LayerGroupSpec group, GroupFromProto(geometry.groups(i), i));
    spec.geometry.groups.push_back(std::move(group));
  }
  const v1::Shard& shard = geometry.shard();
  spec.geometry.shard = {.kv_head_begin = shard.kv_head_begin(),
                         .kv_head_end = shard.kv_head_end(),
                         .layer_begin = shard.layer_begin(),
                         .layer_end = shard.layer_end(),
                         .rank = shard.rank(),
                         .num_ranks = ValueOr(shard.num_ranks(), 1u)};
  return spec;
}

v1::Shard ToProto(const ShardSpec& shard) {
  v1::Shard proto;
  proto.set_kv_head_begin(shard.kv_head_begin);
  proto.set_kv_head_end(shard.kv_head_end);
  proto.set_layer_begin(shard.layer_begin);
  proto.set_layer_end(shard.layer_end);
  proto.set_rank(shard.rank);
  proto.set_num_ranks(shard.num_ranks);
  return proto;
}

v1::ModelSpec ToProto(const ModelSpec& spec) {
  v1::ModelSpec proto;
  proto.set_name(spec.name);
  proto.set_weights_digest(spec.weights_digest.ToBytes());
  proto.set_tokenizer_digest(spec.tokenizer_digest.ToBytes());
  for (const Digest& adapter : spec.adapter_digests) {
    proto.add_adapter_digests(adapter.ToBytes());
  }
  proto.set_vocabulary_size(spec.vocabulary_size);
  proto.set_numerics_id(spec.numerics_id);
  proto.set_batch_invariant(spec.batch_invariant);
  v1::Geometry& geometry = *proto.mutable_geometry();
  geometry.set_page_tokens(spec.geometry.page_tokens);
  for (const LayerGroupSpec& group : spec.geometry.groups) {
    *geometry.add_groups() = GroupToProto(group);
  }
  *geometry.mutable_shard() = ToProto(spec.geometry.shard);
  return proto;
}

v1::Model DescribeModel(const Model& model) {
  v1::Model proto;
  proto.set_model_digest(model.digest().ToHex());
  *proto.mutable_spec() = ToProto(model.spec());
  for (uint32_t i = 0; i < model.geometry().num_groups(); ++i) {
    proto.add_group_page_bytes(model.geometry().group(i).page_bytes());
  }
  return proto;
}

absl::StatusOr<Model> ModelFromProto(const v1::ModelSpec& proto) {
  PT_ASSIGN_OR_RETURN(ModelSpec spec, ModelSpecFromProto(proto));
  return Model::Create(std::move(spec));
}

std::string SerializeModelSpec(const ModelSpec& spec) {
  std::string bytes;
  {
    google::protobuf::io::StringOutputStream stream(&bytes);
    google::protobuf::io::CodedOutputStream coded(&stream);
    coded.SetSerializationDeterministic(true);
    ToProto(spec).SerializeToCodedStream(&coded);
  }  // the destructors flush
  return bytes;
}

absl::StatusOr<Model> ParseModelSpec(absl::string_view bytes) {
  v1::ModelSpec proto;
  if (!proto.ParseFromArray(bytes.data(), static_cast<int>(bytes.size()))) {
    return absl::DataLossError(
        absl::StrCat("model record of ", bytes.size(), " bytes is not a ModelSpec"));
  }
  auto model = ModelFromProto(proto);
  if (!model.ok()) {
    return absl::DataLossError(absl::StrCat("model record: ", model.status().message()));
  }
  return model;
}

v1::Tier ToProto(Tier tier) {
  switch (tier) {
    case Tier::kDevice:
      return v1::TIER_DEVICE;
    case Tier::kHost:
      return v1::TIER_HOST;
    case Tier::kStore:
      return v1::TIER_STORE;
  }
  return v1::TIER_UNSPECIFIED;
}

absl::StatusOr<Tier> TierFromProto(v1::Tier tier) {
  switch (tier) {
    case v1::TIER_DEVICE:
      return Tier::kDevice;
    case v1::TIER_HOST:
      return Tier::kHost;
    case v1::TIER_STORE:
      return Tier::kStore;
    default:
      return FieldError("tier", absl::StrCat("= ", static_cast<int>(tier), " is not 1 to 3"));
  }
}

}  // namespace pagetide
