#include "core/rank_models.h"

#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

ModelSpec Shard(uint32_t rank, uint32_t num_ranks) {
  ModelSpec spec;
  spec.name = "m";
  spec.weights_digest = Sha256Of("weights");
  spec.tokenizer_digest = Sha256Of("tokenizer");
  spec.geometry.page_tokens = 16;
  spec.geometry.shard = {
      .kv_head_begin = 2 * rank, .kv_head_end = 2 * rank + 2, .rank = rank, .num_ranks = num_ranks};
  spec.geometry.groups = {{.layers = {0, 1}, .kv_heads = 2, .k_dim = 8, .v_dim = 8}};
  return spec;
}

std::string Check(const std::vector<ModelSpec>& specs) {
  std::vector<Model> models;
  for (const ModelSpec& spec : specs) {
    auto model = Model::Create(spec);
    EXPECT_TRUE(model.ok()) << model.status();
    models.push_back(*std::move(model));
  }
  std::vector<const Model*> pointers;
  for (const Model& model : models) pointers.push_back(&model);
  const absl::Status status = CheckRankModels(pointers);
  EXPECT_TRUE(status.ok() || status.code() == absl::StatusCode::kInvalidArgument) << status;
  return std::string(status.message());
}

TEST(RankModelsTest, ShardsOfOneModelInOrderAreTaken) {
  EXPECT_EQ(Check({Shard(0, 2), Shard(1, 2)}), "");
  // Names, pages of another size and replicated heads make no other model.
  std::vector<ModelSpec> specs = {Shard(0, 3), Shard(1, 3), Shard(2, 3)};
  specs[1].name = "other";
  specs[1].geometry.groups[0].layers = {0, 1, 2};
  specs[2].geometry.shard.kv_head_begin = 0;
  specs[2].geometry.shard.kv_head_end = 2;
  EXPECT_EQ(Check(specs), "");
  specs.clear();
  for (uint32_t rank = 0; rank < 64; ++rank) specs.push_back(Shard(rank, 64));
  EXPECT_EQ(Check(specs), "");
}

TEST(RankModelsTest, EachDifferenceIsNamed) {
  struct Case {
    void (*spoil)(std::vector<ModelSpec>&);
    std::string message;
  };
  const Case cases[] = {
      {[](auto& specs) { specs.pop_back(); }, "rank_models has 1 entries, 2 to 64 expected"},
      {[](auto& specs) { specs.resize(65, specs[0]); },
       "rank_models has 65 entries, 2 to 64 expected"},
      {[](auto& specs) { std::swap(specs[0], specs[1]); },
       "rank_models[0] is the shard of rank 1: models stand in order of rank"},
      {[](auto& specs) { specs[1] = specs[0]; }, "rank_models[1] is the shard of rank 0"},
      {[](auto& specs) { specs[1] = Shard(1, 3); },
       "rank_models[1] is a shard of num_ranks = 3, 2 models were given"},
      {[](auto& specs) { specs[0].geometry.shard = {}; },
       "rank_models[0] is a shard of num_ranks = 1, 2 models were given"},
      {[](auto& specs) { specs[1].weights_digest = Sha256Of("others"); },
       "rank_models[1] has identity "},
      {[](auto& specs) { specs[1].numerics_id = "n"; }, "weights, tokenizer, adapters or numerics"},
      {[](auto& specs) { specs[1].geometry.page_tokens = 32; },
       "rank_models[1] has page_tokens = 32, rank 0 has 16"},
      {[](auto& specs) { specs[1].geometry.groups.push_back(specs[1].geometry.groups[0]); },
       "rank_models[1] has 2 layer groups, rank 0 has 1"},
      {[](auto& specs) {
         specs[1].geometry.groups[0] = {
             .kind = LayerGroupSpec::Kind::kRecurrent, .layers = {0}, .opaque_bytes = 64};
       },
       "rank_models[1] has a recurrent group at groups[0], rank 0 a full one"},
  };
  for (const Case& c : cases) {
    std::vector<ModelSpec> specs = {Shard(0, 2), Shard(1, 2)};
    c.spoil(specs);
    EXPECT_THAT(Check(specs), ::testing::HasSubstr(c.message));
  }
}

}  // namespace
}  // namespace pagetide
