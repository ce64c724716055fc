#include "services/router_service.h"

#include <algorithm>
#include <chrono>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "rpc/model_codec.h"
#include "rpc/status_mapping.h"
#include "services/router_codec.h"

namespace pagetide {
namespace {

constexpr uint32_t kDefaultPageSize = 100;
constexpr uint32_t kMaxPageSize = 1000;
constexpr size_t kMaxRequestIdBytes = 128;
constexpr int kMaxEntries = 1024;  // of a list of worker ids or shard groups

absl::Status CheckEntries(absl::string_view field, int count) {
  if (count <= kMaxEntries) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", count, " entries, at most ", kMaxEntries));
}

absl::Status CheckRequestId(const std::string& request_id) {
  if (request_id.size() <= kMaxRequestIdBytes) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("request_id has ", request_id.size(), " bytes, at most ", kMaxRequestIdBytes));
}

}  // namespace

RouterServiceImpl::RouterServiceImpl(Options options, Router* router, ModelCatalog* models,
                                     const TenantSalts* salts, Executor* io, const Clock* clock)
    : options_(options), router_(router), models_(models), salts_(salts), io_(io), clock_(clock) {}

MonotonicTime RouterServiceImpl::DeadlineOf(const grpc::CallbackServerContext& context) const {
  const absl::Duration left =
      absl::FromChrono(context.deadline() - std::chrono::system_clock::now());
  return clock_->MonotonicNow() + std::min(left, options_.store_timeout);
}

grpc::ServerUnaryReactor* RouterServiceImpl::OnIo(
    grpc::CallbackServerContext* context, std::function<absl::Status(MonotonicTime deadline)> act) {
  grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
  const absl::Status scheduled =
      io_->Schedule([reactor, act = std::move(act), deadline = DeadlineOf(*context)] {
        reactor->Finish(ToGrpcStatus(act(deadline)));
      });
  if (!scheduled.ok()) {
    reactor->Finish(ToGrpcStatus(WithRetryDelay(scheduled, absl::Milliseconds(100))));
  }
  return reactor;
}

grpc::ServerUnaryReactor* RouterServiceImpl::WithModels(
    grpc::CallbackServerContext* context, std::vector<absl::string_view> names,
    std::function<absl::Status(const Models&)> act) {
  Models models;
  models.reserve(names.size());
  for (const absl::string_view name : names) {
    models.push_back(models_->FindCached(name));
    if (models.back() == nullptr) break;
  }
  if (models.back() != nullptr) {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    reactor->Finish(ToGrpcStatus(act(models)));
    return reactor;
  }
  return OnIo(context,
              [this, names = std::move(names),
               act = std::move(act)](MonotonicTime deadline) -> absl::Status {
                Models found;
                found.reserve(names.size());
                for (const absl::string_view name : names) {
                  PT_ASSIGN_OR_RETURN(found.emplace_back(), models_->Find(name, deadline));
                }
                return act(found);
              });
}

grpc::ServerUnaryReactor* RouterServiceImpl::WithPrompt(
    grpc::CallbackServerContext* context, const v1::Prompt& prompt,
    std::function<absl::Status(const RoutedPrompt&)> act) {
  return WithModels(context, {prompt.model()},
                    [&prompt, salt = salts_->SaltOf(TenantOf(*context)),
                     act = std::move(act)](const Models& models) -> absl::Status {
                      PT_ASSIGN_OR_RETURN(const RoutedPrompt routed,
                                          PromptFromProto(prompt, *models.front(), salt));
                      return act(routed);
                    });
}

grpc::ServerUnaryReactor* RouterServiceImpl::AssignSequence(
    grpc::CallbackServerContext* context, const v1::AssignSequenceRequest* request,
    v1::AssignSequenceResponse* response) {
  return WithPrompt(
      context, request->prompt(),
      [this, request, response,
       tenant = TenantOf(*context)](const RoutedPrompt& prompt) -> absl::Status {
        PT_RETURN_IF_ERROR(CheckRequestId(request->request_id()));
        PT_RETURN_IF_ERROR(CheckEntries("exclude_worker_ids", request->exclude_worker_ids_size()));
        AssignOptions options{.request = {.tenant = tenant, .request_id = request->request_id()},
                              .sticky_worker_id = request->sticky_worker_id(),
                              .excluded_worker_ids = {request->exclude_worker_ids().begin(),
                                                      request->exclude_worker_ids().end()}};
        if (!request->request_id().empty()) {
          options.request.request_hash = HashOfRequest(*request);
        }
        PT_ASSIGN_OR_RETURN(const Assignment assignment, router_->Assign(prompt, options));
        response->set_assignment_id(assignment.assignment_id);
        response->set_worker_id(assignment.chosen.worker->worker_id);
        response->set_address(assignment.chosen.worker->address);
        response->set_local_socket(assignment.chosen.worker->local_socket);
        response->set_model_digest(assignment.model_digest);
        *response->mutable_chosen() = ToProto(assignment.chosen);
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* RouterServiceImpl::AssignGroup(grpc::CallbackServerContext* context,
                                                         const v1::AssignGroupRequest* request,
                                                         v1::AssignGroupResponse* response) {
  const absl::Status checked = [&]() -> absl::Status {
    PT_RETURN_IF_ERROR(CheckRequestId(request->request_id()));
    PT_RETURN_IF_ERROR(CheckEntries("exclude_shard_groups", request->exclude_shard_groups_size()));
    return CheckRankNames(*request);
  }();
  if (!checked.ok()) {
    grpc::ServerUnaryReactor* const reactor = context->DefaultReactor();
    reactor->Finish(ToGrpcStatus(checked));
    return reactor;
  }
  std::vector<absl::string_view> names(request->rank_models().begin(),
                                       request->rank_models().end());
  if (!request->prompt().model().empty()) names.push_back(request->prompt().model());
  return WithModels(
      context, std::move(names),
      [this, request, response, tenant = TenantOf(*context)](const Models& models) -> absl::Status {
        PT_ASSIGN_OR_RETURN(const RoutedGroupPrompt routed,
                            GroupPromptFromProto(*request, models, salts_->SaltOf(tenant)));
        AssignGroupOptions options{
            .request = {.tenant = tenant, .request_id = request->request_id()},
            .sticky_shard_group = request->sticky_shard_group(),
            .excluded_shard_groups = {request->exclude_shard_groups().begin(),
                                      request->exclude_shard_groups().end()}};
        if (!request->request_id().empty()) {
          options.request.request_hash = HashOfRequest(*request);
        }
        PT_ASSIGN_OR_RETURN(const std::shared_ptr<const GroupAssignment> assignment,
                            router_->AssignGroup(routed.prompt, routed.ranks, options));
        *response = ToProto(*assignment);
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* RouterServiceImpl::ScoreWorkers(grpc::CallbackServerContext* context,
                                                          const v1::ScoreWorkersRequest* request,
                                                          v1::ScoreWorkersResponse* response) {
  return WithPrompt(
      context, request->prompt(),
      [this, request, response](const RoutedPrompt& prompt) -> absl::Status {
        PT_RETURN_IF_ERROR(
            CheckEntries("candidate_worker_ids", request->candidate_worker_ids_size()));
        const std::vector<std::string> only(request->candidate_worker_ids().begin(),
                                            request->candidate_worker_ids().end());
        PT_ASSIGN_OR_RETURN(const PlacementTable table, router_->Rank(prompt, "", only, {}));
        for (const RankedWorker& worker : table.candidates) {
          *response->add_candidates() = ToProto(worker);
        }
        return absl::OkStatus();
      });
}

grpc::ServerUnaryReactor* RouterServiceImpl::ExplainPlacement(
    grpc::CallbackServerContext* context, const v1::ExplainPlacementRequest* request,
    v1::ExplainPlacementResponse* response) {
  return WithPrompt(context, request->prompt(),
                    [this, request, response](const RoutedPrompt& prompt) -> absl::Status {
                      PT_ASSIGN_OR_RETURN(
                          const PlacementTable table,
                          router_->Rank(prompt, request->sticky_worker_id(), {}, {}));
                      for (const RankedWorker& worker : table.candidates) {
                        *response->add_candidates() = ToProto(worker);
                      }
                      response->set_policy(table.policy);
                      response->set_explanation(table.explanation);
                      return absl::OkStatus();
                    });
}

grpc::ServerUnaryReactor* RouterServiceImpl::ListWorkers(grpc::CallbackServerContext* context,
                                                         const v1::ListWorkersRequest*,
                                                         v1::ListWorkersResponse* response) {
  for (const WorkerSummary& worker : router_->ListWorkers()) {
    *response->add_workers() = ToProto(worker);
  }
  auto* reactor = context->DefaultReactor();
  reactor->Finish(grpc::Status::OK);
  return reactor;
}

grpc::ServerUnaryReactor* RouterServiceImpl::GetWorker(grpc::CallbackServerContext* context,
                                                       const v1::GetWorkerRequest* request,
                                                       v1::GetWorkerResponse* response) {
  auto* reactor = context->DefaultReactor();
  if (const auto worker = router_->GetWorker(request->worker_id())) {
    *response->mutable_worker() = ToProto(*worker);
    reactor->Finish(grpc::Status::OK);
  } else {
    reactor->Finish(ToGrpcStatus(absl::NotFoundError(
        absl::StrCat("worker ", request->worker_id().substr(0, 128), " is not known here"))));
  }
  return reactor;
}

grpc::ServerUnaryReactor* RouterServiceImpl::ListSequences(grpc::CallbackServerContext* context,
                                                           const v1::ListSequencesRequest* request,
                                                           v1::ListSequencesResponse* response) {
  const auto list = [&]() -> absl::Status {
    const uint32_t page_size = request->page_size() == 0 ? kDefaultPageSize : request->page_size();
    if (page_size > kMaxPageSize) {
      return absl::InvalidArgumentError(
          absl::StrCat("page_size = ", page_size, ", at most ", kMaxPageSize));
    }
    SequenceId after;
    if (!request->page_token().empty()) {
      const auto token = SequenceId::Parse(request->page_token());
      if (!token.ok()) {
        return absl::InvalidArgumentError("page_token is not one that ListSequences returned");
      }
      after = *token;
    }
    // One more than asked tells whether another page follows.
    const auto places = router_->ListSequences(after, page_size + 1);
    for (size_t i = 0; i < std::min<size_t>(places.size(), page_size); ++i) {
      *response->add_sequences() = ToProto(places[i]);
    }
    if (places.size() > page_size) {
      response->set_next_page_token(places[page_size - 1].id.ToString());
    }
    return absl::OkStatus();
  };
  auto* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(list()));
  return reactor;
}

grpc::ServerUnaryReactor* RouterServiceImpl::GetSequence(
    grpc::CallbackServerContext* context, const v1::RouterGetSequenceRequest* request,
    v1::RouterGetSequenceResponse* response) {
  const auto get = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceId::Parse(request->sequence_id()));
    const auto place = router_->FindSequence(id);
    if (!place.has_value()) {
      return WithReason(absl::NotFoundError(absl::StrCat("sequence ", id.ToString(),
                                                         " is open on no worker known here")),
                        "SEQUENCE_NOT_FOUND");
    }
    *response->mutable_sequence() = ToProto(*place);
    return absl::OkStatus();
  };
  auto* reactor = context->DefaultReactor();
  reactor->Finish(ToGrpcStatus(get()));
  return reactor;
}

grpc::ServerUnaryReactor* RouterServiceImpl::RegisterModel(grpc::CallbackServerContext* context,
                                                           const v1::RegisterModelRequest* request,
                                                           v1::RegisterModelResponse* response) {
  return OnIo(context, [this, request, response](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const Model model, ModelFromProto(request->spec()));
    PT_ASSIGN_OR_RETURN(const ModelCatalog::Registered registered,
                        models_->Register(model, deadline));
    *response->mutable_model() = DescribeModel(*registered.model);
    response->set_already_registered(registered.was_registered);
    return absl::OkStatus();
  });
}

grpc::ServerUnaryReactor* RouterServiceImpl::ListModels(grpc::CallbackServerContext* context,
                                                        const v1::ListModelsRequest*,
                                                        v1::ListModelsResponse* response) {
  return OnIo(context, [this, response](MonotonicTime deadline) -> absl::Status {
    PT_ASSIGN_OR_RETURN(const auto models, models_->List(deadline));
    for (const auto& model : models) *response->add_models() = DescribeModel(*model);
    return absl::OkStatus();
  });
}

}  // namespace pagetide
