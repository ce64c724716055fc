#include "worker/prefix_service.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

constexpr absl::Duration kMaxClaimTime = absl::Seconds(60);

void ChunksToProto(std::span<const ReusedChunk> chunks,
                   google::protobuf::RepeatedPtrField<v1::ReusedChunk>* proto) {
  for (const ReusedChunk& chunk : chunks) {
    v1::ReusedChunk& c = *proto->Add();
    c.set_session_begin(chunk.session_begin);
    c.set_prompt_begin(chunk.prompt_begin);
    c.set_count(chunk.count);
  }
}

}  // namespace

grpc::Status PrefixServiceImpl::LookupPrefix(grpc::ServerContext* context,
                                             const v1::LookupPrefixRequest* request,
                                             v1::LookupPrefixResponse* response) {
  const auto handle = [&]() -> absl::Status {
    const CallContext call = MakeCallContext(*context, *worker_);
    PT_ASSIGN_OR_RETURN(const auto inputs, InputsFromProto(request->inputs()));
    PT_ASSIGN_OR_RETURN(const absl::Duration lease, DurationFromProto("lease", request->lease()));
    PT_ASSIGN_OR_RETURN(ModelHost * host,
                        worker_->HostOfModel(request->model_digest(), call.deadline));
    const PromptOptions options{.allow_full_reuse = request->allow_full_reuse(),
                                .skip_store = request->skip_store()};
    PT_ASSIGN_OR_RETURN(
        const PrefixReuse reuse,
        host->LookupPrefix(call.tenant, TokensOf(request->tokens()), inputs, options));
    *response->mutable_reuse() = ReuseToProto(reuse);
    if (lease > absl::ZeroDuration()) {
      PT_RETURN_IF_ERROR(worker_->leases().CheckDuration("lease", lease));
      PT_ASSIGN_OR_RETURN(*response->mutable_lease_id(),
                          LeasePrefix(call, host, *request, inputs, lease));
    }
    return absl::OkStatus();
  };
  return ToGrpcStatus(handle());
}

grpc::Status PrefixServiceImpl::PlanPrompt(grpc::ServerContext* context,
                                           const v1::PlanPromptRequest* request,
                                           v1::PlanPromptResponse* response) {
  const auto handle = [&]() -> absl::Status {
    const CallContext call = MakeCallContext(*context, *worker_);
    PT_ASSIGN_OR_RETURN(const auto inputs, InputsFromProto(request->inputs()));
    PT_ASSIGN_OR_RETURN(ModelHost * host,
                        worker_->HostOfModel(request->model_digest(), call.deadline));
    const std::vector<std::string> sessions(request->sessions().begin(), request->sessions().end());
    const PromptRequest prompt{.tokens = TokensOf(request->tokens()),
                               .inputs = inputs,
                               .options = {.allow_full_reuse = request->allow_full_reuse()},
                               .min_chunk_tokens = request->min_chunk_tokens()};
    PT_ASSIGN_OR_RETURN(const PromptPlan plan,
                        planner_->Plan(call.tenant, host, prompt, sessions, call.deadline));
    v1::PromptPlan& proto = *response->mutable_plan();
    *proto.mutable_reuse() = ReuseToProto(plan.reuse);
    proto.set_session(plan.session);
    proto.set_session_version(plan.session_version);
    proto.set_compute_tokens(plan.reuse.prompt_tokens - plan.reuse.reused_tokens);
    ChunksToProto(plan.chunks, proto.mutable_chunks());
    proto.set_approximate(!plan.chunks.empty());
    if (proto.approximate()) proto.set_min_chunk_tokens(request->min_chunk_tokens());
    for (const PlanCandidate& candidate : plan.candidates) {
      v1::PlanPromptResponse::Candidate& c = *response->add_candidates();
      c.set_session(candidate.session);
      c.set_version(candidate.version);
      c.set_usable_tokens(candidate.usable_tokens);
      c.set_why_not_more(candidate.why_not_more);
      ChunksToProto(candidate.chunks, c.mutable_chunks());
      c.set_compute_tokens(candidate.compute_tokens);
    }
    return absl::OkStatus();
  };
  return ToGrpcStatus(handle());
}

absl::StatusOr<v1::ExtendMatchResponse> PrefixServiceImpl::Extend(
    const CallContext& call, const v1::ExtendMatchRequest& request) {
  PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request.sequence()));
  PT_ASSIGN_OR_RETURN(const auto inputs, InputsFromProto(request.inputs()));
  ExtendRequest extend{.expected_length = request.expected_length(),
                       .tokens = TokensOf(request.tokens()),
                       .inputs = inputs,
                       .allow_full_reuse = request.allow_full_reuse()};
  PT_ASSIGN_OR_RETURN(extend.claim, DurationFromProto("claim", request.claim()));
  PT_ASSIGN_OR_RETURN(extend.wait, DurationFromProto("wait", request.wait()));
  for (const auto& [field, duration] :
       {std::pair("claim", extend.claim), std::pair("wait", extend.wait)}) {
    if (duration <= kMaxClaimTime) continue;
    return absl::InvalidArgumentError(absl::StrCat(field, " is ", absl::FormatDuration(duration),
                                                   ", must be at most ",
                                                   absl::FormatDuration(kMaxClaimTime)));
  }
  PT_ASSIGN_OR_RETURN(const ExtendResult result,
                      target.host->ExtendMatch(call.tenant, target.handle, extend, call.deadline));
  worker_->NoteSequence(*target.host, result.info);
  v1::ExtendMatchResponse response;
  *response.mutable_state() = StateToProto(*worker_, *target.host, result.info);
  response.set_extended_tokens(result.extended_tokens);
  response.set_restoring_pages(result.restoring_pages);
  response.set_claim(static_cast<v1::ClaimState>(result.claim));
  *response.mutable_claim_left() = DurationToProto(result.claim_left);
  return response;
}

grpc::Status PrefixServiceImpl::ExtendMatch(grpc::ServerContext* context,
                                            const v1::ExtendMatchRequest* request,
                                            v1::ExtendMatchResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  auto answer = memos_->OncePerSequence<v1::ExtendMatchResponse>(
      call.tenant.name, request->sequence().sequence_id(), request->request_id(),
      DigestOfMessage(*request), call.deadline, [&] { return Extend(call, *request); });
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

absl::StatusOr<std::string> PrefixServiceImpl::LeasePrefix(const CallContext& call, ModelHost* host,
                                                           const v1::LookupPrefixRequest& request,
                                                           std::span<const PositionedInput> inputs,
                                                           absl::Duration duration) {
  // Only what is resident is leased: the store's part is for OpenSequence to restore.
  const PromptOptions options{.allow_full_reuse = request.allow_full_reuse(), .skip_store = true};
  PT_ASSIGN_OR_RETURN(const OpenResult open,
                      host->Open(call.tenant, TokensOf(request.tokens()), inputs, options));
  const auto close = [host, tenant = call.tenant, info = open.info] {
    const absl::Status closed = host->Close(tenant, info.id, info.epoch);
    if (!closed.ok()) LogWarning("worker", "close leased prefix: ", closed.message());
  };
  const auto pinned = host->PinTable(call.tenant, open.info.id, call.deadline);
  if (!pinned.ok()) {
    close();
    return pinned.status();
  }
  return worker_->leases().Add(pinned->pages, duration, close);
}

}  // namespace pagetide
