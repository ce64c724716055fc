#include "worker/prefix_service.h"

#include <utility>
#include <vector>

#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/status_mapping.h"

namespace pagetide {

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
                               .options = {.allow_full_reuse = request->allow_full_reuse()}};
    PT_ASSIGN_OR_RETURN(const PromptPlan plan,
                        planner_->Plan(call.tenant, host, prompt, sessions, call.deadline));
    v1::PromptPlan& proto = *response->mutable_plan();
    *proto.mutable_reuse() = ReuseToProto(plan.reuse);
    proto.set_session(plan.session);
    proto.set_session_version(plan.session_version);
    proto.set_compute_tokens(plan.reuse.prompt_tokens - plan.reuse.reused_tokens);
    for (const PlanCandidate& candidate : plan.candidates) {
      v1::PlanPromptResponse::Candidate& c = *response->add_candidates();
      c.set_session(candidate.session);
      c.set_version(candidate.version);
      c.set_usable_tokens(candidate.usable_tokens);
      c.set_why_not_more(candidate.why_not_more);
    }
    return absl::OkStatus();
  };
  return ToGrpcStatus(handle());
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
  PinLeases::Pins pins;
  if (open.info.length > 0) {
    for (uint32_t group = 0; group < host->model().geometry().num_groups(); ++group) {
      if (!host->model().geometry().group(group).has_rows()) continue;
      auto pinned = host->PinRows(call.tenant, open.info.id, group, 0, 0, call.deadline);
      if (!pinned.ok()) {
        close();
        return pinned.status();
      }
      pins.push_back(*std::move(pinned));
    }
  }
  return worker_->leases().Add(std::move(pins), duration, close);
}

}  // namespace pagetide
