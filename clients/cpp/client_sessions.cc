// Sessions: any worker serves them; a load goes where most of the session is.
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "clients/cpp/client.h"
#include "clients/cpp/request_id.h"

namespace pagetide {
namespace {

using Router = v1::RouterService::StubInterface;
using Sessions = v1::SessionService::StubInterface;

}  // namespace

absl::StatusOr<std::shared_ptr<WorkerConnection>> Client::AnyWorker() {
  if (router_ == nullptr) {
    return ConnectWorker(options_.worker_address, options_.worker_local_socket);
  }
  PT_ASSIGN_OR_RETURN(const std::vector<v1::WorkerInfo> members, ListWorkers());
  for (const v1::WorkerInfo& member : members) {
    if (member.role() == "worker" && member.state() == "serving") {
      return ConnectWorker(member.address(), member.local_socket());
    }
  }
  return WithReason(
      absl::UnavailableError(absl::StrCat("sessions: none of ", members.size(), " members serves")),
      error_reason::kNoWorker);
}

absl::StatusOr<LoadedSequence> Client::LoadOn(std::shared_ptr<WorkerConnection> worker,
                                              std::shared_ptr<const Model> model,
                                              absl::string_view name, const LoadOptions& options) {
  v1::LoadSessionRequest request;
  request.set_request_id(NewRequestId());
  request.set_name(std::string(name));
  request.set_model_digest(model->digest().ToHex());
  if (options.version) request.set_version(*options.version);
  if (options.length) request.set_length(*options.length);
  PT_ASSIGN_OR_RETURN(
      v1::LoadSessionResponse response,
      CallUnary(worker->call_options(), worker->sessions(), &Sessions::LoadSession, request));
  LoadedSequence loaded;
  loaded.sequence.reset(
      new Sequence(std::move(worker), std::move(model), std::move(*response.mutable_state())));
  loaded.sequence->restoring_pages_ = response.restoring_pages();
  v1::PrefixReuse& reuse = loaded.sequence->reuse_;
  reuse.set_prompt_tokens(response.tokens_size());
  reuse.set_reused_tokens(response.tokens_size());
  reuse.set_device_tokens(response.device_tokens());
  reuse.set_store_tokens(response.store_tokens());
  loaded.session = std::move(*response.mutable_session());
  loaded.tokens.assign(response.tokens().begin(), response.tokens().end());
  return loaded;
}

absl::StatusOr<LoadedSequence> Client::LoadSession(std::shared_ptr<const Model> model,
                                                   absl::string_view name,
                                                   const LoadOptions& options) {
  if (router_ == nullptr) {
    PT_ASSIGN_OR_RETURN(std::shared_ptr<WorkerConnection> worker, AnyWorker());
    return LoadOn(std::move(worker), std::move(model), name, options);
  }
  PT_ASSIGN_OR_RETURN(const v1::PeekSessionResponse peeked,
                      PeekSession(name, /*with_tokens=*/true));
  v1::AssignSequenceRequest request;
  request.mutable_prompt()->set_model(model->digest().ToHex());
  *request.mutable_prompt()->mutable_tokens() = peeked.tokens();
  request.set_sticky_worker_id(options.sticky_worker_id);
  absl::Status last;
  for (int attempt = 0; attempt < options_.max_assignments; ++attempt) {
    request.set_request_id(NewRequestId());
    const auto assigned = CallUnary(options_.call, router_.get(), &Router::AssignSequence, request);
    if (!assigned.ok()) return last.ok() ? assigned.status() : last;
    auto loaded =
        LoadOn(ConnectWorker(assigned->address(), assigned->local_socket()), model, name, options);
    if (loaded.ok() || !absl::IsUnavailable(loaded.status())) return loaded;
    LogInfo("client", "load on worker ", assigned->worker_id(), ": ", loaded.status().message());
    last = loaded.status();
    request.add_exclude_worker_ids(assigned->worker_id());
    request.clear_sticky_worker_id();
  }
  return last;
}

absl::StatusOr<v1::PeekSessionResponse> Client::PeekSession(absl::string_view name,
                                                            bool with_tokens) {
  PT_ASSIGN_OR_RETURN(const std::shared_ptr<WorkerConnection> worker, AnyWorker());
  v1::PeekSessionRequest request;
  request.set_name(std::string(name));
  request.set_with_tokens(with_tokens);
  return CallUnary(worker->call_options(), worker->sessions(), &Sessions::PeekSession, request);
}

absl::StatusOr<std::vector<v1::SessionInfo>> Client::ListSessions(absl::string_view prefix) {
  PT_ASSIGN_OR_RETURN(const std::shared_ptr<WorkerConnection> worker, AnyWorker());
  v1::ListSessionsRequest request;
  request.set_name_prefix(std::string(prefix));
  request.set_page_size(1000);
  std::vector<v1::SessionInfo> sessions;
  do {
    PT_ASSIGN_OR_RETURN(
        const v1::ListSessionsResponse response,
        CallUnary(worker->call_options(), worker->sessions(), &Sessions::ListSessions, request));
    sessions.insert(sessions.end(), response.sessions().begin(), response.sessions().end());
    request.set_page_token(response.next_page_token());
  } while (!request.page_token().empty());
  return sessions;
}

absl::StatusOr<uint64_t> Client::DeleteSession(absl::string_view name,
                                               std::optional<uint64_t> expected_version) {
  PT_ASSIGN_OR_RETURN(const std::shared_ptr<WorkerConnection> worker, AnyWorker());
  v1::DeleteSessionRequest request;
  request.set_name(std::string(name));
  if (expected_version) request.set_expected_version(*expected_version);
  // Without a version a repeat after a lost answer deletes what was saved under the name meanwhile.
  const CallOptions& options = worker->call_options();
  PT_ASSIGN_OR_RETURN(
      const v1::DeleteSessionResponse response,
      expected_version ? CallUnary(options, worker->sessions(), &Sessions::DeleteSession, request)
                       : CallUnary<RetryNothing>(options, worker->sessions(),
                                                 &Sessions::DeleteSession, request));
  return response.deleted_version();
}

}  // namespace pagetide
