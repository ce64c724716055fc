#include "clients/cpp/client.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "clients/cpp/inputs.h"
#include "clients/cpp/request_id.h"
#include "rpc/model_codec.h"

namespace pagetide {
namespace {

using Router = v1::RouterService::StubInterface;

std::unique_ptr<Router> MakeRouterStub(const ClientOptions& options) {
  if (options.router_address.empty()) return nullptr;
  return v1::RouterService::NewStub(MakeChannel(options.router_address, options.channel));
}

absl::Status NoRouter(absl::string_view action) {
  return absl::FailedPreconditionError(
      absl::StrCat(action, ": this client has no router, only a worker"));
}

}  // namespace

absl::Status ClientOptions::Validate() const {
  if (router_address.empty() == worker_address.empty()) {
    return absl::InvalidArgumentError(absl::StrCat("client options: router_address \"",
                                                   router_address, "\" and worker_address \"",
                                                   worker_address, "\": exactly one must be set"));
  }
  if (max_assignments < 1) {
    return absl::InvalidArgumentError(absl::StrCat("client options: max_assignments is ",
                                                   max_assignments, ", must be at least 1"));
  }
  if (step_lease <= absl::ZeroDuration() || step_lease > absl::Minutes(5)) {
    return absl::InvalidArgumentError(absl::StrCat("client options: step_lease is ",
                                                   absl::FormatDuration(step_lease),
                                                   ", must be above 0 and at most 5m"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<Client>> Client::Create(ClientOptions options) {
  PT_RETURN_IF_ERROR(options.Validate());
  return std::unique_ptr<Client>(new Client(std::move(options)));
}

Client::Client(ClientOptions options)
    : options_(std::move(options)), router_(MakeRouterStub(options_)) {}

absl::StatusOr<std::shared_ptr<const Model>> Client::RegisterModel(const ModelSpec& spec) {
  if (router_ == nullptr) return NoRouter("register model");
  PT_ASSIGN_OR_RETURN(Model model, Model::Create(spec));
  v1::RegisterModelRequest request;
  *request.mutable_spec() = ToProto(spec);
  PT_ASSIGN_OR_RETURN(const v1::RegisterModelResponse response,
                      CallUnary(options_.call, router_.get(), &Router::RegisterModel, request));
  if (response.model().model_digest() != model.digest().ToHex()) {
    return absl::InternalError(
        absl::StrCat("register model ", spec.name, ": the router computed digest ",
                     response.model().model_digest(), ", this client ", model.digest().ToHex()));
  }
  return std::make_shared<const Model>(std::move(model));
}

absl::StatusOr<std::shared_ptr<const Model>> Client::FindModel(absl::string_view name_or_digest) {
  if (router_ == nullptr) return NoRouter("find model");
  PT_ASSIGN_OR_RETURN(
      const v1::ListModelsResponse response,
      CallUnary(options_.call, router_.get(), &Router::ListModels, v1::ListModelsRequest()));
  for (const v1::Model& model : response.models()) {
    if (name_or_digest != model.model_digest() && name_or_digest != model.spec().name()) continue;
    PT_ASSIGN_OR_RETURN(Model found, ModelFromProto(model.spec()));
    return std::make_shared<const Model>(std::move(found));
  }
  return absl::NotFoundError(absl::StrCat("find model ", name_or_digest, ": none of the ",
                                          response.models_size(), " registered models"));
}

std::shared_ptr<WorkerConnection> Client::ConnectWorker(absl::string_view address,
                                                        absl::string_view local_socket) {
  MutexLock lock(&mu_);
  std::shared_ptr<WorkerConnection>& worker = workers_[std::string(address)];
  if (worker == nullptr) {
    WorkerConnection::Options options;
    options.address = std::string(address);
    if (options_.use_local_plane) options.local_socket = std::string(local_socket);
    options.staging_bytes = options_.staging_bytes;
    options.step_lease = options_.step_lease;
    options.call = options_.call;
    options.channel = options_.channel;
    worker = std::make_shared<WorkerConnection>(std::move(options));
  }
  return worker;
}

absl::StatusOr<std::unique_ptr<Sequence>> Client::OpenOn(std::shared_ptr<WorkerConnection> worker,
                                                         std::shared_ptr<const Model> model,
                                                         std::span<const uint32_t> prompt,
                                                         const OpenOptions& options,
                                                         absl::string_view assignment_id) {
  v1::OpenSequenceRequest request;
  request.set_request_id(NewRequestId());
  request.set_model_digest(model->digest().ToHex());
  request.mutable_tokens()->Add(prompt.begin(), prompt.end());
  AddInputs(options.inputs, request.mutable_inputs());
  request.set_allow_full_reuse(options.allow_full_reuse);
  request.set_no_reuse(options.no_reuse);
  request.set_assignment_id(std::string(assignment_id));
  if (!options.sessions.empty()) {
    v1::PlanPromptRequest plan;
    plan.set_model_digest(request.model_digest());
    *plan.mutable_tokens() = request.tokens();
    *plan.mutable_inputs() = request.inputs();
    plan.set_allow_full_reuse(options.allow_full_reuse);
    plan.set_min_chunk_tokens(options.min_chunk_tokens);
    for (const std::string& name : options.sessions) plan.add_sessions(name);
    PT_ASSIGN_OR_RETURN(v1::PlanPromptResponse planned,
                        CallUnary(worker->call_options(), worker->prefixes(),
                                  &v1::PrefixService::StubInterface::PlanPrompt, plan));
    *request.mutable_plan() = std::move(*planned.mutable_plan());
  }
  PT_ASSIGN_OR_RETURN(v1::OpenSequenceResponse response,
                      CallUnary(worker->call_options(), worker->sequences(),
                                &v1::SequenceService::StubInterface::OpenSequence, request));
  std::unique_ptr<Sequence> sequence(
      new Sequence(std::move(worker), std::move(model), std::move(*response.mutable_state())));
  sequence->reuse_ = std::move(*response.mutable_reuse());
  sequence->restoring_pages_ = response.restoring_pages();
  return sequence;
}

absl::StatusOr<std::unique_ptr<Sequence>> Client::Open(std::shared_ptr<const Model> model,
                                                       std::span<const uint32_t> prompt,
                                                       const OpenOptions& options) {
  if (router_ == nullptr) {
    return OpenOn(ConnectWorker(options_.worker_address, options_.worker_local_socket),
                  std::move(model), prompt, options, "");
  }
  v1::AssignSequenceRequest request;
  request.mutable_prompt()->set_model(model->digest().ToHex());
  request.mutable_prompt()->mutable_tokens()->Add(prompt.begin(), prompt.end());
  AddInputs(options.inputs, request.mutable_prompt()->mutable_inputs());
  request.set_sticky_worker_id(options.sticky_worker_id);
  for (const std::string& id : options.exclude_worker_ids) request.add_exclude_worker_ids(id);

  absl::Status last;
  for (int attempt = 0; attempt < options_.max_assignments; ++attempt) {
    request.set_request_id(NewRequestId());
    const auto assigned = CallUnary(options_.call, router_.get(), &Router::AssignSequence, request);
    // The worker that failed says more than "no worker is left".
    if (!assigned.ok()) return last.ok() ? assigned.status() : last;
    auto sequence = OpenOn(ConnectWorker(assigned->address(), assigned->local_socket()), model,
                           prompt, options, assigned->assignment_id());
    if (sequence.ok() || !absl::IsUnavailable(sequence.status())) return sequence;
    LogInfo("client", "open on worker ", assigned->worker_id(), ": ", sequence.status().message());
    last = sequence.status();
    request.add_exclude_worker_ids(assigned->worker_id());
    if (request.sticky_worker_id() == assigned->worker_id()) request.clear_sticky_worker_id();
  }
  return last;
}

absl::StatusOr<std::vector<v1::WorkerInfo>> Client::ListWorkers() {
  if (router_ == nullptr) return NoRouter("list workers");
  PT_ASSIGN_OR_RETURN(
      const v1::ListWorkersResponse response,
      CallUnary(options_.call, router_.get(), &Router::ListWorkers, v1::ListWorkersRequest()));
  return std::vector<v1::WorkerInfo>(response.workers().begin(), response.workers().end());
}

}  // namespace pagetide
