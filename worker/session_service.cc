#include "worker/session_service.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "rpc/model_codec.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

absl::StatusOr<Durability> LevelFromProto(int level) {
  switch (level) {
    case v1::DURABILITY_UNSPECIFIED:
    case v1::DURABILITY_LOCAL:
      return Durability::kLocal;
    case v1::DURABILITY_PROCESS:
      return Durability::kProcess;
    default:
      return absl::InvalidArgumentError(absl::StrCat(
          "level is ", level, ", a save must be DURABILITY_PROCESS or DURABILITY_LOCAL"));
  }
}

v1::SaveSessionResponse ToProto(const std::string& name, const SaveAnswer& answer) {
  v1::SaveSessionResponse proto;
  proto.set_name(name);
  proto.set_version(answer.version);
  proto.set_tokens(answer.tokens);
  proto.set_pages(answer.pages);
  proto.set_pages_written(answer.pages_written);
  proto.set_bytes_written(answer.bytes_written);
  proto.set_bytes_total(answer.bytes_total);
  proto.set_durability(static_cast<v1::Durability>(answer.durability));
  proto.set_canonical_length(answer.canonical_length);
  return proto;
}

v1::CheckpointInfo ToProto(const CheckpointInfo& info) {
  v1::CheckpointInfo proto;
  proto.set_checkpoint_id(info.id);
  proto.set_length(info.length);
  proto.set_pages(info.num_pages);
  *proto.mutable_created_at() = TimestampToProto(info.created_at);
  proto.set_scope(static_cast<v1::CheckpointScope>(info.scope));
  proto.set_tier(pagetide::ToProto(info.tier));
  proto.set_copied_bytes(info.copied_bytes);
  if (info.expires_at) *proto.mutable_expires_at() = TimestampToProto(*info.expires_at);
  proto.set_automatic(info.is_automatic);
  proto.set_is_void(info.is_void);
  return proto;
}

absl::StatusOr<CheckpointOptions> OptionsFromProto(const v1::CreateCheckpointRequest& request) {
  CheckpointOptions options;
  switch (request.scope()) {
    case v1::CHECKPOINT_SCOPE_UNSPECIFIED:
    case v1::CHECKPOINT_SCOPE_ALL:
      break;
    case v1::CHECKPOINT_SCOPE_NON_REWINDABLE:
      options.scope = CheckpointScope::kNonRewindable;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("scope is ", request.scope(), ", known are 1 (ALL) and 2 (NON_REWINDABLE)"));
  }
  switch (request.tier()) {
    case v1::TIER_UNSPECIFIED:
    case v1::TIER_DEVICE:
      break;
    case v1::TIER_HOST:
      options.tier = Tier::kHost;
      break;
    case v1::TIER_STORE:
      options.tier = Tier::kStore;
      break;
    default:
      return absl::InvalidArgumentError(
          absl::StrCat("tier is ", request.tier(), ", known are 1 (DEVICE) to 3 (STORE)"));
  }
  if (request.has_ttl()) {
    if (options.tier != Tier::kStore) {
      return absl::InvalidArgumentError(
          absl::StrCat("ttl is of tier STORE only, tier is ", v1::Tier_Name(request.tier())));
    }
    PT_ASSIGN_OR_RETURN(options.ttl, DurationFromProto("ttl", request.ttl()));
  }
  return options;
}

v1::SessionInfo ToProto(const ListedSession& session) {
  v1::SessionInfo proto;
  proto.set_name(session.name);
  proto.set_version(session.version);
  proto.set_tokens(session.summary.tokens);
  proto.set_pages(session.num_pages);
  proto.set_bytes(session.summary.bytes_total);
  proto.set_model_digest(session.summary.model_digest.ToHex());
  proto.set_canonical_length(session.summary.canonical_length);
  *proto.mutable_saved_at() = TimestampToProto(session.saved_at);
  return proto;
}

v1::SessionInfo ToProto(const StoredSession& session) {
  return ToProto(ListedSession{.name = session.name,
                               .version = session.version,
                               .num_pages = session.num_pages,
                               .saved_at = session.saved_at,
                               .summary = SummaryOf(session.state)});
}

// Response has repeated `tokens` and `inputs`.
template <typename Response>
void AddTokens(const SessionState& state, uint64_t length, Response* response) {
  response->mutable_tokens()->Add(state.tokens.begin(), state.tokens.begin() + length);
  for (const PositionedInput& input : state.inputs) {
    if (input.position >= length) break;
    v1::InputDigest* const proto = response->add_inputs();
    proto->set_position(input.position);
    proto->set_digest(input.digest.ToBytes());
  }
}

}  // namespace

absl::StatusOr<v1::SaveSessionResponse> SessionServiceImpl::Save(
    const CallContext& call, const v1::SaveSessionRequest& request) {
  SaveRequest save;
  save.name = request.name();
  save.metadata.insert(request.metadata().begin(), request.metadata().end());
  if (request.has_expected_version()) save.expected_version = request.expected_version();
  if (request.has_keep_tokens()) save.keep_tokens = request.keep_tokens();
  save.compact = request.compact();
  save.request_id = request.request_id();
  save.request_digest = DigestOfMessage(request);
  PT_ASSIGN_OR_RETURN(save.level, LevelFromProto(request.level()));
  // Before the sequence is looked for: a retry may come to another worker than the first call.
  PT_ASSIGN_OR_RETURN(const std::optional<SaveAnswer> first,
                      sessions_->FindAnswer(call.tenant, save, call.deadline));
  if (first) return ToProto(request.name(), *first);
  PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request.sequence()));
  save.sequence = target.handle;
  PT_ASSIGN_OR_RETURN(const SaveAnswer answer,
                      sessions_->Save(call.tenant, target.host, save, call.deadline));
  return ToProto(request.name(), answer);
}

grpc::Status SessionServiceImpl::SaveSession(grpc::ServerContext* context,
                                             const v1::SaveSessionRequest* request,
                                             v1::SaveSessionResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  auto answer = memos_->OncePerTenant<v1::SaveSessionResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline,
      [&] { return Save(call, *request); });
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

absl::StatusOr<v1::LoadSessionResponse> SessionServiceImpl::Load(
    const CallContext& call, const v1::LoadSessionRequest& request) {
  std::optional<uint64_t> version, length;
  if (request.has_version()) version = request.version();
  if (request.has_length()) length = request.length();
  PT_ASSIGN_OR_RETURN(const LoadedSession loaded,
                      sessions_->Load(call.tenant, request.name(), version, request.model_digest(),
                                      length, call.deadline));
  worker_->NoteSequence(*loaded.host, loaded.open.info);
  v1::LoadSessionResponse answer;
  *answer.mutable_state() = StateToProto(*worker_, *loaded.host, loaded.open.info);
  *answer.mutable_session() = ToProto(loaded.session);
  AddTokens(loaded.session.state, loaded.open.info.length, &answer);
  answer.set_restoring_pages(loaded.open.restoring_pages);
  answer.set_device_tokens(loaded.open.reuse.device_tokens);
  answer.set_store_tokens(loaded.open.reuse.store_tokens);
  return answer;
}

grpc::Status SessionServiceImpl::LoadSession(grpc::ServerContext* context,
                                             const v1::LoadSessionRequest* request,
                                             v1::LoadSessionResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  auto answer = memos_->OncePerTenant<v1::LoadSessionResponse>(
      call.tenant.name, request->request_id(), DigestOfMessage(*request), call.deadline,
      [&] { return Load(call, *request); });
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status SessionServiceImpl::PeekSession(grpc::ServerContext* context,
                                             const v1::PeekSessionRequest* request,
                                             v1::PeekSessionResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto peek = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const StoredSession session,
                        sessions_->Peek(call.tenant, request->name(), call.deadline));
    *response->mutable_session() = ToProto(session);
    response->mutable_metadata()->insert(session.state.metadata.begin(),
                                         session.state.metadata.end());
    response->set_model_name(session.state.model_name);
    if (request->with_tokens()) AddTokens(session.state, session.state.length(), response);
    response->set_loads_here(sessions_->LoadsHere(call.tenant, request->name()));
    return absl::OkStatus();
  };
  return ToGrpcStatus(peek());
}

grpc::Status SessionServiceImpl::ListSessions(grpc::ServerContext* context,
                                              const v1::ListSessionsRequest* request,
                                              v1::ListSessionsResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto list = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const uint32_t limit,
                        ListSize(request->page_size(), kDefaultListSize, kMaxListSize));
    PT_RETURN_IF_ERROR(ValidateNamePrefix(request->name_prefix()));
    if (!request->page_token().empty()) {
      PT_RETURN_IF_ERROR(ValidateName("page_token", request->page_token()));
    }
    PT_ASSIGN_OR_RETURN(std::vector<ListedSession> sessions,
                        sessions_->List(call.tenant, request->name_prefix(), request->page_token(),
                                        limit + 1, call.deadline));
    if (sessions.size() > limit) {
      sessions.resize(limit);
      response->set_next_page_token(sessions.back().name);
    }
    for (const ListedSession& session : sessions) *response->add_sessions() = ToProto(session);
    return absl::OkStatus();
  };
  return ToGrpcStatus(list());
}

grpc::Status SessionServiceImpl::DeleteSession(grpc::ServerContext* context,
                                               const v1::DeleteSessionRequest* request,
                                               v1::DeleteSessionResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  std::optional<uint64_t> expected;
  if (request->has_expected_version()) expected = request->expected_version();
  const absl::StatusOr<uint64_t> deleted =
      sessions_->Delete(call.tenant, request->name(), expected, call.deadline);
  if (!deleted.ok()) return ToGrpcStatus(deleted.status());
  response->set_deleted_version(*deleted);
  return grpc::Status::OK;
}

grpc::Status SessionServiceImpl::CreateCheckpoint(grpc::ServerContext* context,
                                                  const v1::CreateCheckpointRequest* request,
                                                  v1::CreateCheckpointResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto create = [&]() -> absl::StatusOr<v1::CreateCheckpointResponse> {
    PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request->sequence()));
    PT_ASSIGN_OR_RETURN(const CheckpointOptions options, OptionsFromProto(*request));
    PT_ASSIGN_OR_RETURN(const CheckpointInfo info,
                        sessions_->CreateCheckpoint(call.tenant, target.host, target.handle,
                                                    options, call.deadline));
    v1::CreateCheckpointResponse answer;
    *answer.mutable_checkpoint() = ToProto(info);
    return answer;
  };
  auto answer = memos_->OncePerSequence<v1::CreateCheckpointResponse>(
      call.tenant.name, request->sequence().sequence_id(), request->request_id(),
      DigestOfMessage(*request), call.deadline, create);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status SessionServiceImpl::RestoreCheckpoint(grpc::ServerContext* context,
                                                   const v1::RestoreCheckpointRequest* request,
                                                   v1::RestoreCheckpointResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto restore = [&]() -> absl::StatusOr<v1::RestoreCheckpointResponse> {
    PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request->sequence()));
    PT_ASSIGN_OR_RETURN(const SequenceInfo info,
                        sessions_->RestoreCheckpoint(call.tenant, target.host, target.handle,
                                                     request->checkpoint_id(), call.deadline));
    worker_->NoteSequence(*target.host, info);
    v1::RestoreCheckpointResponse answer;
    *answer.mutable_state() = StateToProto(*worker_, *target.host, info);
    return answer;
  };
  auto answer = memos_->OncePerSequence<v1::RestoreCheckpointResponse>(
      call.tenant.name, request->sequence().sequence_id(), request->request_id(),
      DigestOfMessage(*request), call.deadline, restore);
  if (!answer.ok()) return ToGrpcStatus(answer.status());
  *response = *std::move(answer);
  return grpc::Status::OK;
}

grpc::Status SessionServiceImpl::ListCheckpoints(grpc::ServerContext* context,
                                                 const v1::ListCheckpointsRequest* request,
                                                 v1::ListCheckpointsResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto list = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const SequenceTarget target,
                        FindSequence(*worker_, request->sequence_id()));
    PT_ASSIGN_OR_RETURN(const std::vector<CheckpointInfo> checkpoints,
                        target.host->ListCheckpoints(call.tenant, target.id));
    for (const CheckpointInfo& info : checkpoints) *response->add_checkpoints() = ToProto(info);
    return absl::OkStatus();
  };
  return ToGrpcStatus(list());
}

grpc::Status SessionServiceImpl::DeleteCheckpoint(grpc::ServerContext* context,
                                                  const v1::DeleteCheckpointRequest* request,
                                                  v1::DeleteCheckpointResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto remove = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const HandleTarget target, FindSequence(*worker_, request->sequence()));
    return target.host->DeleteCheckpoint(call.tenant, target.handle, request->checkpoint_id());
  };
  return ToGrpcStatus(remove());
}

}  // namespace pagetide
