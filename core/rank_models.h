// The models of the ranks of one engine: one model, of which each rank has its shard.
//
// Pure functions; thread-safe.
#ifndef PAGETIDE_CORE_RANK_MODELS_H_
#define PAGETIDE_CORE_RANK_MODELS_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "core/model.h"

namespace pagetide {

// Ranks of one engine: a model in one piece needs no group.
inline constexpr size_t kMinShardRanks = 2;
inline constexpr size_t kMaxShardRanks = 64;

// INVALID_ARGUMENT unless `models`, in order of rank and none null, are the same model but for
// their shards: kMinShardRanks to kMaxShardRanks of equal identity and page_tokens, with layer
// groups of the same kinds, each the shard of its place. The text names rank_models[i], the field
// and both values.
absl::Status CheckRankModels(std::span<const Model* const> models);

}  // namespace pagetide

#endif  // PAGETIDE_CORE_RANK_MODELS_H_
