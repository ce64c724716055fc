#include "core/model.h"

#include <string>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

ModelSpec Spec() {
  ModelSpec spec;
  spec.name = "llama-3";
  spec.weights_digest = Sha256Of("weights");
  spec.tokenizer_digest = Sha256Of("tokenizer");
  spec.adapter_digests = {Sha256Of("adapter")};
  spec.vocabulary_size = 32000;
  spec.numerics_id = "exact";
  LayerGroupSpec group;
  group.layers = {0, 1};
  group.kv_heads = 8;
  group.k_dim = 128;
  group.v_dim = 128;
  group.rope = {.style = RopeSpec::Style::kNeox, .n_rot = 64};
  spec.geometry.groups = {group};
  return spec;
}

// Computed apart from this code base with Python (u32, u64, field and sha as in keys_test.cc, the
// fingerprint as in geometry_test.cc):
//   identity = sha(field(b'pagetide.model.v1') + field(sha(b'weights')) + field(sha(b'tokenizer'))
//                  + u64(1) + field(sha(b'adapter')) + field(b'exact'))
//   digest = sha(field(b'pagetide.model_geometry.v1') + field(identity) + u32(32000) + u32(256)
//                + u32(1) + u32(0) + u32(1) + field(fingerprint))
TEST(ModelTest, GoldenDigests) {
  const Model model = Model::Create(Spec()).value();
  EXPECT_EQ(model.identity().ToHex(),
            "fa8c86a5735bd2fc90acbd0e3e80afbeb4f6d082090366056348ac181af0baeb");
  EXPECT_EQ(model.digest().ToHex(),
            "1966f962a7d518d1e226edf77d17a27dc355e80925d1502eb1c9b4d04a73a695");
}

TEST(ModelTest, TheNameIsNoIdentityAndTheGeometryNoPartOfPrefixKeys) {
  const Model model = Model::Create(Spec()).value();
  ModelSpec renamed = Spec();
  renamed.name = "another-name";
  EXPECT_EQ(Model::Create(renamed)->digest(), model.digest());
  ModelSpec shard = Spec();
  shard.geometry.shard.kv_head_end = 4;
  EXPECT_EQ(Model::Create(shard)->identity(), model.identity());
  EXPECT_NE(Model::Create(shard)->digest(), model.digest());
}

TEST(ModelTest, WhoeverWroteTheRowsIsIdentity) {
  const Digest identity = Model::Create(Spec())->identity();
  ModelSpec spec = Spec();
  spec.weights_digest = Sha256Of("other");
  EXPECT_NE(Model::Create(spec)->identity(), identity);
  spec = Spec();
  spec.tokenizer_digest = Sha256Of("other");
  EXPECT_NE(Model::Create(spec)->identity(), identity);
  spec = Spec();
  spec.adapter_digests.clear();
  EXPECT_NE(Model::Create(spec)->identity(), identity);
  spec = Spec();
  spec.numerics_id = "fast";
  EXPECT_NE(Model::Create(spec)->identity(), identity);
}

TEST(ModelTest, RefusesABadNameOrGeometry) {
  ModelSpec spec = Spec();
  spec.name = "Bad Name";
  EXPECT_THAT(std::string(Model::Create(spec).status().message()),
              testing::HasSubstr("model.name"));
  spec = Spec();
  spec.geometry.page_tokens = 0;
  EXPECT_EQ(Model::Create(spec).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST(ValidateNameTest, TableOfNames) {
  for (const std::string& good : {std::string("a"), std::string("7"), std::string("a.b_c-d"),
                                  std::string("llama-3.1"), std::string(128, 'x')}) {
    EXPECT_TRUE(ValidateName("field", good).ok()) << good;
  }
  for (const std::string& bad :
       {std::string(), std::string("-a"), std::string("a-"), std::string(".a"), std::string("A"),
        std::string("a b"), std::string("a/b"), std::string("\xc3\xa4"), std::string("a\0b", 3),
        std::string(129, 'x')}) {
    const absl::Status status = ValidateName("field", bad);
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << bad;
    EXPECT_THAT(std::string(status.message()), testing::StartsWith("field has "));
  }
}

}  // namespace
}  // namespace pagetide
