#include "core/rank_models.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

absl::string_view KindName(LayerGroupSpec::Kind kind) {
  switch (kind) {
    case LayerGroupSpec::Kind::kFull:
      return "full";
    case LayerGroupSpec::Kind::kWindow:
      return "window";
    case LayerGroupSpec::Kind::kRecurrent:
      return "recurrent";
    case LayerGroupSpec::Kind::kOpaque:
      return "opaque";
  }
  return "unknown";
}

template <typename... Parts>
absl::Status RankError(size_t rank, const Parts&... parts) {
  return absl::InvalidArgumentError(absl::StrCat("rank_models[", rank, "] ", parts...));
}

// `model` as the shard of `rank` of the model that `first` is rank 0's shard of.
absl::Status CheckRankModel(const Model& model, const Model& first, size_t rank, size_t num_ranks) {
  const ShardSpec& shard = model.geometry().spec().shard;
  if (shard.num_ranks != num_ranks) {
    return RankError(rank, "is a shard of num_ranks = ", shard.num_ranks, ", ", num_ranks,
                     " models were given");
  }
  if (shard.rank != rank) {
    return RankError(rank, "is the shard of rank ", shard.rank, ": models stand in order of rank");
  }
  if (model.identity() != first.identity()) {
    return RankError(rank, "has identity ", model.identity().ToShortHex(), "…, rank 0 has ",
                     first.identity().ToShortHex(), "…: weights, tokenizer, adapters or numerics");
  }
  const PageGeometry& geometry = model.geometry();
  const PageGeometry& expected = first.geometry();
  if (geometry.page_tokens() != expected.page_tokens()) {
    return RankError(rank, "has page_tokens = ", geometry.page_tokens(), ", rank 0 has ",
                     expected.page_tokens());
  }
  if (geometry.num_groups() != expected.num_groups()) {
    return RankError(rank, "has ", geometry.num_groups(), " layer groups, rank 0 has ",
                     expected.num_groups());
  }
  for (uint32_t i = 0; i < geometry.num_groups(); ++i) {
    const LayerGroupSpec::Kind kind = geometry.group(i).spec().kind;
    const LayerGroupSpec::Kind expected_kind = expected.group(i).spec().kind;
    if (kind != expected_kind) {
      return RankError(rank, "has a ", KindName(kind), " group at groups[", i, "], rank 0 a ",
                       KindName(expected_kind), " one");
    }
  }
  return absl::OkStatus();
}

}  // namespace

absl::Status CheckRankModels(std::span<const Model* const> models) {
  if (models.size() < kMinShardRanks || models.size() > kMaxShardRanks) {
    return absl::InvalidArgumentError(absl::StrCat("rank_models has ", models.size(), " entries, ",
                                                   kMinShardRanks, " to ", kMaxShardRanks,
                                                   " expected"));
  }
  for (size_t rank = 0; rank < models.size(); ++rank) {
    PT_RETURN_IF_ERROR(CheckRankModel(*models[rank], *models[0], rank, models.size()));
  }
  return absl::OkStatus();
}

}  // namespace pagetide
