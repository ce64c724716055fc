#include "rpc/model_codec.h"

#include <limits>
#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

v1::ModelSpec SmallModel() {
  v1::ModelSpec spec;
  spec.set_name("tiny");
  spec.set_weights_digest(std::string(32, 'w'));
  spec.set_tokenizer_digest(std::string(32, 't'));
  v1::LayerGroup& group = *spec.mutable_geometry()->add_groups();
  group.set_kind(v1::LayerGroup::KIND_FULL);
  group.add_layers(0);
  group.add_layers(1);
  group.set_k_type(v1::DATA_TYPE_F16);
  group.set_v_type(v1::DATA_TYPE_Q8_0);
  group.set_kv_heads(2);
  group.set_k_dim(64);
  group.set_v_dim(32);
  group.mutable_rope()->set_style(v1::Rope::STYLE_NEOX);
  group.mutable_rope()->set_n_rot(64);
  return spec;
}

TEST(ModelCodecTest, ZeroFieldsGetTheDefaultsOfTheProto) {
  const auto spec = ModelSpecFromProto(SmallModel());
  ASSERT_TRUE(spec.ok()) << spec.status();
  EXPECT_EQ(spec->geometry.page_tokens, 256u);
  EXPECT_EQ(spec->geometry.shard.num_ranks, 1u);
  EXPECT_EQ(spec->geometry.groups[0].rope.base, 10000);
  EXPECT_EQ(spec->geometry.groups[0].rope.scale, 1);
  EXPECT_EQ(spec->geometry.groups[0].rope.position_components, 1u);
}

TEST(ModelCodecTest, RoundTripKeepsTheDigest) {
  v1::ModelSpec proto = SmallModel();
  proto.add_adapter_digests(std::string(32, 'a'));
  proto.set_numerics_id("cpu-f32-ordered");
  proto.set_vocabulary_size(512);
  v1::LayerGroup& window = *proto.mutable_geometry()->add_groups();
  window.set_kind(v1::LayerGroup::KIND_WINDOW);
  window.set_window_type(v1::LayerGroup::WINDOW_TYPE_CHUNKED);
  window.set_window_tokens(1024);
  window.add_layers(2);
  window.set_k_type(v1::DATA_TYPE_BF16);
  window.set_kv_heads(1);
  proto.mutable_geometry()->mutable_groups(0)->set_cold_k_type(v1::DATA_TYPE_Q8_0);
  window.set_cold_k_type(v1::DATA_TYPE_F8_E4M3);
  window.set_k_dim(576);  // latent: no V, hence no v_type
  proto.set_batch_invariant(true);
  v1::LayerGroup& ring = *proto.mutable_geometry()->add_groups();
  ring = window;
  ring.set_window_type(v1::LayerGroup::WINDOW_TYPE_RING);
  ring.set_keep_tokens(4);
  ring.set_layers(0, 4);
  v1::LayerGroup& state = *proto.mutable_geometry()->add_groups();
  state.set_kind(v1::LayerGroup::KIND_RECURRENT);
  state.add_layers(3);
  state.set_opaque_bytes(4096);

  const auto model = ModelFromProto(proto);
  ASSERT_TRUE(model.ok()) << model.status();
  const auto again = ParseModelSpec(SerializeModelSpec(model->spec()));
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->digest(), model->digest());
  EXPECT_EQ(SerializeModelSpec(again->spec()), SerializeModelSpec(model->spec()));
  EXPECT_EQ(again->spec().geometry, model->spec().geometry);
  EXPECT_TRUE(again->spec().batch_invariant);
  EXPECT_EQ(again->spec().geometry.groups[2].keep_tokens, 4u);
  // Another ring is another model, and so is an engine that promises less.
  ring.set_keep_tokens(5);
  EXPECT_NE(ModelFromProto(proto)->digest(), model->digest());
  ring.set_keep_tokens(4);
  proto.set_batch_invariant(false);
  EXPECT_NE(ModelFromProto(proto)->digest(), model->digest());
  EXPECT_EQ(ModelFromProto(proto)->identity(), model->identity());
  EXPECT_EQ(again->spec().geometry.groups[0].cold_k_type, DataType::kQ8_0);
  EXPECT_EQ(again->spec().geometry.groups[0].cold_v_type, std::nullopt);
}

TEST(ModelCodecTest, DescribesPageBytesOfEachGroup) {
  const auto model = ModelFromProto(SmallModel());
  ASSERT_TRUE(model.ok()) << model.status();
  const v1::Model described = DescribeModel(*model);
  EXPECT_EQ(described.model_digest(), model->digest().ToHex());
  ASSERT_EQ(described.group_page_bytes_size(), 1);
  // 2 layers × 256 tokens × (2 heads × 64 × 2 bytes of K + 2 heads × one q8_0 group of 34 bytes of
  // V)
  EXPECT_EQ(described.group_page_bytes(0), 2u * 256 * (2 * 64 * 2 + 2 * 34));
}

TEST(ModelCodecTest, BadFieldsAreNamedWithTheirNumbers) {
  struct Case {
    void (*spoil)(v1::ModelSpec&);
    const char* message;
  };
  const Case cases[] = {
      {[](v1::ModelSpec& m) { m.set_weights_digest("short"); },
       "weights_digest has 5 bytes, expected 32"},
      {[](v1::ModelSpec& m) { m.clear_tokenizer_digest(); },
       "tokenizer_digest has 0 bytes, expected 32"},
      {[](v1::ModelSpec& m) { m.add_adapter_digests("x"); },
       "adapter_digests[0] has 1 bytes, expected 32"},
      {[](v1::ModelSpec& m) {
         for (int i = 0; i < 65; ++i) m.add_adapter_digests(std::string(32, 'a'));
       },
       "adapter_digests has 65 entries, at most 64"},
      {[](v1::ModelSpec& m) { m.set_numerics_id(std::string(129, 'n')); },
       "numerics_id has 129 bytes, at most 128"},
      {[](v1::ModelSpec& m) { m.set_name("Bad Name"); }, "model.name has 8 characters"},
      {[](v1::ModelSpec& m) { m.mutable_geometry()->mutable_groups(0)->clear_kind(); },
       "geometry.groups[0].kind = 0 is not 1 to 4"},
      {[](v1::ModelSpec& m) { m.mutable_geometry()->mutable_groups(0)->clear_k_type(); },
       "geometry.groups[0].k_type = 0 is not 1 to 11"},
      {[](v1::ModelSpec& m) {
         m.mutable_geometry()->mutable_groups(0)->set_v_type(static_cast<v1::DataType>(99));
       },
       "geometry.groups[0].v_type = 99 is not 1 to 11"},
      {[](v1::ModelSpec& m) {
         m.mutable_geometry()->mutable_groups(0)->mutable_rope()->set_base(
             std::numeric_limits<double>::infinity());
       },
       "geometry.groups[0].rope.base is not a finite number"},
      {[](v1::ModelSpec& m) {
         m.mutable_geometry()->mutable_groups(0)->set_cold_v_type(static_cast<v1::DataType>(12));
       },
       "geometry.groups[0].cold_v_type = 12 is not 1 to 11"},
      {[](v1::ModelSpec& m) { m.mutable_geometry()->clear_groups(); },
       "groups has 0 entries, expected 1 to 64"},
      {[](v1::ModelSpec& m) { m.mutable_geometry()->set_page_tokens(65537); },
       "page_tokens = 65537 is not 1 to 65536"},
  };
  for (const Case& c : cases) {
    v1::ModelSpec spec = SmallModel();
    c.spoil(spec);
    const auto model = ModelFromProto(spec);
    EXPECT_EQ(model.status().code(), absl::StatusCode::kInvalidArgument) << c.message;
    EXPECT_THAT(std::string(model.status().message()), HasSubstr(c.message));
  }
}

TEST(ModelCodecTest, DamagedRecordIsDataLoss) {
  const auto model = ModelFromProto(SmallModel());
  ASSERT_TRUE(model.ok());
  const std::string bytes = SerializeModelSpec(model->spec());
  EXPECT_EQ(ParseModelSpec(bytes.substr(0, bytes.size() - 1)).status().code(),
            absl::StatusCode::kDataLoss);
  EXPECT_EQ(ParseModelSpec("").status().code(), absl::StatusCode::kDataLoss);
}

TEST(ModelCodecTest, TiersRoundTrip) {
  for (Tier tier : {Tier::kDevice, Tier::kHost, Tier::kStore}) {
    const auto back = TierFromProto(ToProto(tier));
    ASSERT_TRUE(back.ok());
    EXPECT_EQ(*back, tier);
  }
  EXPECT_FALSE(TierFromProto(v1::TIER_UNSPECIFIED).ok());
  EXPECT_FALSE(TierFromProto(static_cast<v1::Tier>(9)).ok());
}

}  // namespace
}  // namespace pagetide
