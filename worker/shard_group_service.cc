#include "worker/shard_group_service.h"

#include <utility>

#include "base/status_macros.h"
#include "rpc/model_codec.h"
#include "rpc/status_mapping.h"
#include "worker/service_support.h"
#include "worker/transfer_wire.h"

namespace pagetide {

template <typename Request, typename Response>
grpc::Status ShardGroupServiceImpl::Ask(
    grpc::ServerContext* context,
    absl::StatusOr<Response> (ShardGroupOwner::*method)(const ShardCaller&, const Request&),
    const Request& request, Response* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const ShardCaller caller{call.tenant, call.deadline,
                           [context] { return context->IsCancelled(); }};
  absl::StatusOr<Response> answer = (owner_->*method)(caller, request);
  if (answer.ok()) *response = *std::move(answer);
  return ToGrpcStatus(answer.status());
}

grpc::Status ShardGroupServiceImpl::LookupShardGroup(grpc::ServerContext* context,
                                                     const v1::LookupShardGroupRequest* request,
                                                     v1::LookupShardGroupResponse* response) {
  return Ask(context, &ShardGroupOwner::Lookup, *request, response);
}

grpc::Status ShardGroupServiceImpl::OpenShardGroup(grpc::ServerContext* context,
                                                   const v1::OpenShardGroupRequest* request,
                                                   v1::OpenShardGroupResponse* response) {
  return Ask(context, &ShardGroupOwner::Open, *request, response);
}

grpc::Status ShardGroupServiceImpl::CommitShardGroup(grpc::ServerContext* context,
                                                     const v1::CommitShardGroupRequest* request,
                                                     v1::CommitShardGroupResponse* response) {
  return Ask(context, &ShardGroupOwner::Commit, *request, response);
}

grpc::Status ShardGroupServiceImpl::RewindShardGroup(grpc::ServerContext* context,
                                                     const v1::RewindShardGroupRequest* request,
                                                     v1::RewindShardGroupResponse* response) {
  return Ask(context, &ShardGroupOwner::Rewind, *request, response);
}

grpc::Status ShardGroupServiceImpl::GetShardGroup(grpc::ServerContext* context,
                                                  const v1::GetShardGroupRequest* request,
                                                  v1::GetShardGroupResponse* response) {
  return Ask(context, &ShardGroupOwner::Get, *request, response);
}

grpc::Status ShardGroupServiceImpl::CloseShardGroup(grpc::ServerContext* context,
                                                    const v1::CloseShardGroupRequest* request,
                                                    v1::CloseShardGroupResponse* response) {
  return Ask(context, &ShardGroupOwner::Close, *request, response);
}

grpc::Status ShardGroupServiceImpl::AcknowledgeShard(grpc::ServerContext* context,
                                                     const v1::AcknowledgeShardRequest* request,
                                                     v1::AcknowledgeShardResponse* response) {
  const CallContext call = MakeCallContext(*context, *worker_);
  const auto acknowledge = [&]() -> absl::Status {
    PT_ASSIGN_OR_RETURN(const SequenceTarget target,
                        FindSequence(*worker_, request->sequence_id()));
    PT_ASSIGN_OR_RETURN(
        const ContentDigest content,
        target.host->DigestContents(call.tenant, {.id = target.id, .epoch = request->epoch()},
                                    request->length()));
    const Model& model = target.host->model();
    *response->mutable_state() = StateToProto(*worker_, *target.host, content.info);
    *response->mutable_shard() = ToProto(model.spec().geometry.shard);
    response->set_page_tokens(model.geometry().page_tokens());
    response->set_model_identity(model.identity().ToBytes());
    if (content.digest) SetChecksum(*content.digest, response->mutable_content_digest());
    return absl::OkStatus();
  };
  return ToGrpcStatus(acknowledge());
}

}  // namespace pagetide
