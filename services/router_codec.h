// Between the messages of router.proto and worker_registry.proto and the router's domain.
//
// Stateless functions; thread-safe. Decoders check what the wire can get wrong: INVALID_ARGUMENT
// names the field and the numbers, never a token.
#ifndef PAGETIDE_SERVICES_ROUTER_CODEC_H_
#define PAGETIDE_SERVICES_ROUTER_CODEC_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "core/keys.h"
#include "core/model.h"
#include "core/router.h"
#include "google/protobuf/duration.pb.h"
#include "pagetide/v1/router.pb.h"
#include "pagetide/v1/worker_registry.pb.h"

namespace pagetide {

// Hashes the tokens into prefix keys under the tenant's salt, or takes the keys that the caller
// gives.
absl::StatusOr<RoutedPrompt> PromptFromProto(const v1::Prompt& proto, const Model& model,
                                             const TenantSalt& salt);
// The count and that none is empty: INVALID_ARGUMENT.
absl::Status CheckRankNames(const v1::AssignGroupRequest& request);

// A prompt over shards: rank 0's, and what each rank has to load of it.
struct RoutedGroupPrompt {
  RoutedPrompt prompt;
  std::vector<RankModel> ranks;
};
// `models`: of rank_models, and behind them prompt.model's if it is given. INVALID_ARGUMENT unless
// they are all ranks of one model, in order, and prompt.model is rank 0's.
absl::StatusOr<RoutedGroupPrompt> GroupPromptFromProto(
    const v1::AssignGroupRequest& request, const std::vector<std::shared_ptr<const Model>>& models,
    const TenantSalt& salt);

// Of all that decides the answer, for telling a retry from another request with the same id. Stable
// within one process only.
uint64_t HashOfRequest(const v1::AssignSequenceRequest& request);
uint64_t HashOfRequest(const v1::AssignGroupRequest& request);

v1::Candidate ToProto(const RankedWorker& worker);
v1::AssignGroupResponse ToProto(const GroupAssignment& assignment);
v1::WorkerInfo ToProto(const WorkerSummary& worker);
v1::RoutedSequence ToProto(const WorkerRegistry::SequencePlace& place);

absl::StatusOr<WorkerHello> HelloFromProto(const v1::AttachHello& proto);
WorkerLoad LoadFromProto(const v1::LoadReport& proto);
absl::StatusOr<std::vector<SequenceChange>> SequencesFromProto(const v1::SequenceReport& proto);
// `changes` takes the decoded changes, to which the report then points.
absl::StatusOr<ResidencyReport> ResidencyFromProto(const v1::ResidencyReport& proto,
                                                   std::vector<ResidencyDelta>& changes);

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_ROUTER_CODEC_H_
