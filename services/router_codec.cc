#include "services/router_codec.h"

#include <span>
#include <utility>

#include "absl/hash/hash.h"
#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/status_macros.h"
#include "core/rank_models.h"
#include "rpc/duration_proto.h"
#include "rpc/model_codec.h"

namespace pagetide {
namespace {

absl::Status FieldError(absl::string_view field, absl::string_view what) {
  return absl::InvalidArgumentError(absl::StrCat(field, " ", what));
}

absl::StatusOr<std::vector<PositionedInput>> InputsFromProto(const v1::Prompt& proto) {
  std::vector<PositionedInput> inputs;
  inputs.reserve(proto.inputs_size());
  for (int i = 0; i < proto.inputs_size(); ++i) {
    const v1::InputDigest& input = proto.inputs(i);
    const std::string field = absl::StrCat("prompt.inputs[", i, "]");
    if (input.digest().size() != 32) {
      return FieldError(field + ".digest",
                        absl::StrCat("has ", input.digest().size(), " bytes, expected 32"));
    }
    if (input.position() >= static_cast<uint64_t>(proto.tokens_size())) {
      return FieldError(
          field + ".position",
          absl::StrCat("= ", input.position(), " in a prompt of ", proto.tokens_size(), " tokens"));
    }
    if (!inputs.empty() && input.position() < inputs.back().position) {
      return FieldError(field + ".position",
                        absl::StrCat("= ", input.position(), " after ", inputs.back().position,
                                     ": positions must ascend"));
    }
    PT_ASSIGN_OR_RETURN(const Digest digest, Digest::FromBytes(input.digest()));
    inputs.push_back({input.position(), digest});
  }
  return inputs;
}

size_t HashOfPrompt(const v1::Prompt& prompt) {
  size_t hash = absl::HashOf(prompt.model(), absl::MakeConstSpan(prompt.tokens()),
                             prompt.num_tokens(), prompt.inputs_size(), prompt.prefix_keys_size());
  for (const auto& input : prompt.inputs()) {
    hash = absl::HashOf(hash, input.position(), input.digest());
  }
  for (const auto& key : prompt.prefix_keys()) hash = absl::HashOf(hash, key);
  return hash;
}

// Without worker_id and address.
v1::Candidate CandidateToProto(const PlacementCandidate& numbers, bool is_eligible,
                               const std::string& ineligible_because) {
  v1::Candidate proto;
  proto.set_eligible(is_eligible);
  proto.set_ineligible_because(ineligible_because);
  *proto.mutable_queue_wait() = DurationToProto(numbers.queue_wait);
  proto.set_device_tokens(numbers.reused_tokens[TierIndex(Tier::kDevice)]);
  proto.set_host_tokens(numbers.reused_tokens[TierIndex(Tier::kHost)]);
  proto.set_store_tokens(numbers.reused_tokens[TierIndex(Tier::kStore)]);
  proto.set_compute_tokens(numbers.computed_tokens);
  *proto.mutable_restore_time() = DurationToProto(numbers.load_time);
  *proto.mutable_prefill_time() = DurationToProto(numbers.prefill_time);
  *proto.mutable_predicted_ttft() = DurationToProto(numbers.predicted_ttft);
  proto.set_score(numbers.score);
  return proto;
}

}  // namespace

absl::StatusOr<RoutedPrompt> PromptFromProto(const v1::Prompt& proto, const Model& model,
                                             const TenantSalt& salt) {
  const PageGeometry& geometry = model.geometry();
  RoutedPrompt prompt{.model_digest = model.digest().ToHex(),
                      .page_tokens = geometry.page_tokens(),
                      .num_groups = geometry.num_groups(),
                      .page_bytes = geometry.bytes_per_page_of_tokens(),
                      .rank = geometry.spec().shard.rank,
                      .num_ranks = geometry.spec().shard.num_ranks};
  if (proto.tokens_size() > 0) {
    if (proto.prefix_keys_size() > 0 || proto.num_tokens() > 0) {
      return FieldError("prompt", "has tokens as well as prefix_keys or num_tokens");
    }
    const uint32_t vocabulary = model.spec().vocabulary_size;
    for (int i = 0; vocabulary > 0 && i < proto.tokens_size(); ++i) {
      if (proto.tokens(i) >= vocabulary) {
        return FieldError(absl::StrCat("prompt.tokens[", i, "]"),
                          absl::StrCat("is not below vocabulary_size = ", vocabulary));
      }
    }
    PT_ASSIGN_OR_RETURN(const std::vector<PositionedInput> inputs, InputsFromProto(proto));
    const std::span<const uint32_t> tokens(proto.tokens().data(),
                                           static_cast<size_t>(proto.tokens_size()));
    prompt.num_tokens = tokens.size();
    const PrefixKey root = RootPrefixKey(salt, model.identity(), geometry.page_tokens());
    for (const PrefixKey& key : PrefixKeysOf(root, tokens, geometry.page_tokens(), inputs)) {
      prompt.hints.push_back(PrefixHint::Of(key));
    }
    return prompt;
  }
  if (proto.inputs_size() > 0) {
    return FieldError("prompt.inputs", "without tokens: prefix_keys cover them already");
  }
  if (proto.num_tokens() == 0) {
    return FieldError("prompt", "has neither tokens nor num_tokens");
  }
  prompt.num_tokens = proto.num_tokens();
  const uint64_t num_full_pages = proto.num_tokens() / geometry.page_tokens();
  if (static_cast<uint64_t>(proto.prefix_keys_size()) > num_full_pages) {
    return FieldError("prompt.prefix_keys",
                      absl::StrCat("has ", proto.prefix_keys_size(), " entries, num_tokens = ",
                                   proto.num_tokens(), " has ", num_full_pages, " full pages of ",
                                   geometry.page_tokens(), " tokens"));
  }
  for (int i = 0; i < proto.prefix_keys_size(); ++i) {
    const std::string& key = proto.prefix_keys(i);
    if (key.size() != 16 && key.size() != 32) {
      return FieldError(absl::StrCat("prompt.prefix_keys[", i, "]"),
                        absl::StrCat("has ", key.size(), " bytes, expected 16 or 32"));
    }
    prompt.hints.push_back(PrefixHint::FromBytes(key));
  }
  return prompt;
}

absl::Status CheckRankNames(const v1::AssignGroupRequest& request) {
  const auto count = static_cast<size_t>(request.rank_models_size());
  if (count < kMinShardRanks || count > kMaxShardRanks) {
    return FieldError("rank_models", absl::StrCat("has ", count, " entries, ", kMinShardRanks,
                                                  " to ", kMaxShardRanks, " expected"));
  }
  for (int i = 0; i < request.rank_models_size(); ++i) {
    if (request.rank_models(i).empty()) {
      return FieldError(absl::StrCat("rank_models[", i, "]"), "is empty");
    }
  }
  return absl::OkStatus();
}

absl::StatusOr<RoutedGroupPrompt> GroupPromptFromProto(
    const v1::AssignGroupRequest& request, const std::vector<std::shared_ptr<const Model>>& models,
    const TenantSalt& salt) {
  std::vector<const Model*> ranks;
  for (int i = 0; i < request.rank_models_size(); ++i) {
    ranks.push_back(models[static_cast<size_t>(i)].get());
  }
  PT_RETURN_IF_ERROR(CheckRankModels(ranks));
  const Model& first = *ranks.front();
  if (models.size() > ranks.size() && models.back()->digest() != first.digest()) {
    return FieldError("prompt.model",
                      absl::StrCat("is ", models.back()->digest().ToShortHex(),
                                   "…, rank_models[0] is ", first.digest().ToShortHex(), "…"));
  }
  RoutedGroupPrompt routed;
  PT_ASSIGN_OR_RETURN(routed.prompt, PromptFromProto(request.prompt(), first, salt));
  for (const Model* model : ranks) {
    routed.ranks.push_back({.model_digest = model->digest().ToHex(),
                            .page_bytes = model->geometry().bytes_per_page_of_tokens()});
  }
  return routed;
}

uint64_t HashOfRequest(const v1::AssignSequenceRequest& request) {
  size_t hash = absl::HashOf(HashOfPrompt(request.prompt()), request.sticky_worker_id(),
                             request.exclude_worker_ids_size());
  for (const auto& id : request.exclude_worker_ids()) hash = absl::HashOf(hash, id);
  return hash;
}

uint64_t HashOfRequest(const v1::AssignGroupRequest& request) {
  size_t hash = absl::HashOf(HashOfPrompt(request.prompt()), request.sticky_shard_group(),
                             request.rank_models_size(), request.exclude_shard_groups_size());
  for (const auto& model : request.rank_models()) hash = absl::HashOf(hash, model);
  for (const auto& group : request.exclude_shard_groups()) hash = absl::HashOf(hash, group);
  return hash;
}

v1::Candidate ToProto(const RankedWorker& worker) {
  v1::Candidate proto =
      CandidateToProto(worker.numbers, worker.is_eligible, worker.ineligible_because);
  proto.set_worker_id(worker.worker->worker_id);
  proto.set_address(worker.worker->address);
  return proto;
}

v1::AssignGroupResponse ToProto(const GroupAssignment& assignment) {
  v1::AssignGroupResponse proto;
  proto.set_assignment_id(assignment.assignment_id);
  proto.set_shard_group(assignment.shard_group);
  for (size_t i = 0; i < assignment.workers.size(); ++i) {
    const WorkerHello& worker = *assignment.workers[i];
    v1::AssignGroupResponse::Rank& rank = *proto.add_ranks();
    rank.set_rank(static_cast<uint32_t>(i));
    rank.set_worker_id(worker.worker_id);
    rank.set_address(worker.address);
    rank.set_local_socket(worker.local_socket);
    rank.set_model_digest(assignment.model_digests[i]);
  }
  for (const RankedGroup& group : assignment.candidates) {
    v1::GroupCandidate& candidate = *proto.add_candidates();
    candidate.set_shard_group(group.shard_group);
    *candidate.mutable_candidate() =
        CandidateToProto(group.numbers, group.is_eligible, group.ineligible_because);
    candidate.set_slowest_rank(group.slowest_rank);
    candidate.set_limiting_rank(group.limiting_rank);
  }
  return proto;
}

v1::WorkerInfo ToProto(const WorkerSummary& worker) {
  v1::WorkerInfo proto;
  proto.set_worker_id(worker.hello->worker_id);
  proto.set_incarnation(absl::StrCat(absl::Hex(worker.hello->incarnation, absl::kZeroPad16)));
  proto.set_address(worker.hello->address);
  proto.set_local_socket(worker.hello->local_socket);
  const absl::string_view state = WorkerStateName(worker.state);
  proto.set_state(state.data(), state.size());
  proto.set_free_frames(worker.load.free_frames);
  proto.set_evictable_frames(worker.load.evictable_frames);
  proto.set_total_frames(worker.load.total_frames);
  proto.set_open_sequences(worker.load.open_sequences);
  proto.set_queued_prefill_tokens(worker.load.queued_prefill_tokens);
  proto.set_prefill_tokens_per_second(worker.load.prefill_tokens_per_second);
  proto.set_store_bytes_per_second(worker.load.store_bytes_per_second);
  proto.set_resident_pages(worker.resident_pages);
  for (const std::string& digest : worker.load.model_digests) proto.add_model_digests(digest);
  *proto.mutable_since_heartbeat() = DurationToProto(worker.since_heard);
  proto.set_role(worker.hello->role == SourceRole::kStore ? "store" : "worker");
  proto.set_shard_group(worker.hello->shard_group);
  proto.set_shard_rank(worker.hello->shard_rank);
  return proto;
}

v1::RoutedSequence ToProto(const WorkerRegistry::SequencePlace& place) {
  v1::RoutedSequence proto;
  proto.set_sequence_id(place.id.ToString());
  proto.set_worker_id(place.owner->worker_id);
  proto.set_address(place.owner->address);
  proto.set_model_digest(place.sequence.model_digest);
  proto.set_length(place.sequence.length);
  return proto;
}

absl::StatusOr<WorkerHello> HelloFromProto(const v1::AttachHello& proto) {
  WorkerHello hello{.worker_id = proto.worker_id(),
                    .incarnation = proto.incarnation(),
                    .address = proto.address(),
                    .local_socket = proto.local_socket(),
                    .host = proto.host(),
                    .shard_group = proto.shard_group(),
                    .shard_rank = proto.shard_rank()};
  if (proto.role() == "worker") {
    hello.role = SourceRole::kWorker;
  } else if (proto.role() == "store") {
    hello.role = SourceRole::kStore;
  } else {
    return FieldError("hello.role", absl::StrCat("of ", proto.role().size(),
                                                 " characters is neither worker nor store"));
  }
  return hello;
}

WorkerLoad LoadFromProto(const v1::LoadReport& proto) {
  return {.free_frames = proto.free_frames(),
          .evictable_frames = proto.evictable_frames(),
          .total_frames = proto.total_frames(),
          .open_sequences = proto.open_sequences(),
          .running_calls = proto.running_calls(),
          .queued_prefill_tokens = proto.queued_prefill_tokens(),
          .prefill_tokens_per_second = proto.prefill_tokens_per_second(),
          .store_bytes_per_second = proto.store_bytes_per_second(),
          .host_bytes_per_second = proto.host_bytes_per_second(),
          .is_draining = proto.draining(),
          .loads_models_on_demand = proto.loads_models_on_demand(),
          .model_digests = {proto.model_digests().begin(), proto.model_digests().end()}};
}

absl::StatusOr<std::vector<SequenceChange>> SequencesFromProto(const v1::SequenceReport& proto) {
  std::vector<SequenceChange> changes;
  changes.reserve(proto.changes_size());
  for (const auto& change : proto.changes()) {
    PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceId::Parse(change.sequence_id()));
    if (change.model_digest().size() > 64) {
      return FieldError(
          "sequences.changes.model_digest",
          absl::StrCat("has ", change.model_digest().size(), " characters, at most 64"));
    }
    changes.push_back({.id = id,
                       .model_digest = change.model_digest(),
                       .length = change.length(),
                       .is_closed = change.closed()});
  }
  return changes;
}

absl::StatusOr<ResidencyReport> ResidencyFromProto(const v1::ResidencyReport& proto,
                                                   std::vector<ResidencyDelta>& changes) {
  changes.clear();
  changes.reserve(proto.changes_size());
  for (int i = 0; i < proto.changes_size(); ++i) {
    const auto& change = proto.changes(i);
    if (change.prefix_hint().size() != PrefixHint::kBytes) {
      return FieldError(absl::StrCat("residency.changes[", i, "].prefix_hint"),
                        absl::StrCat("has ", change.prefix_hint().size(), " bytes, expected ",
                                     PrefixHint::kBytes));
    }
    auto tier = TierFromProto(change.tier());
    if (!tier.ok()) {
      return FieldError(absl::StrCat("residency.changes[", i, "]:"), tier.status().message());
    }
    changes.push_back({.hint = PrefixHint::FromBytes(change.prefix_hint()),
                       .group = change.group(),
                       .tier = *tier,
                       .is_removed = change.removed(),
                       .page_bytes = change.page_bytes()});
  }
  ResidencyReport report{.number = proto.number(),
                         .is_snapshot = proto.snapshot(),
                         .is_snapshot_end = proto.snapshot_end(),
                         .changes = changes};
  if (proto.bucket_digests_size() > 0) {
    if (proto.bucket_digests_size() != static_cast<int>(kNumResidencyBuckets)) {
      return FieldError("residency.bucket_digests",
                        absl::StrCat("has ", proto.bucket_digests_size(), " entries, expected ",
                                     kNumResidencyBuckets, " or none"));
    }
    ResidencyDigests digests;
    std::copy(proto.bucket_digests().begin(), proto.bucket_digests().end(), digests.begin());
    report.digests = digests;
  }
  return report;
}

}  // namespace pagetide
