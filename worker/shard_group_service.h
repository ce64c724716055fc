// ShardGroupService over a ShardGroupOwner, and what a Worker says of its own ranks. Thread-safe;
// what the constructor takes outlives it.
#ifndef PAGETIDE_WORKER_SHARD_GROUP_SERVICE_H_
#define PAGETIDE_WORKER_SHARD_GROUP_SERVICE_H_

#include "pagetide/v1/shard_group.grpc.pb.h"
#include "worker/shard_group_owner.h"
#include "worker/worker.h"

namespace pagetide {

class ShardGroupServiceImpl final : public v1::ShardGroupService::Service {
 public:
  ShardGroupServiceImpl(Worker* worker, ShardGroupOwner* owner) : worker_(worker), owner_(owner) {}

  grpc::Status LookupShardGroup(grpc::ServerContext* context,
                                const v1::LookupShardGroupRequest* request,
                                v1::LookupShardGroupResponse* response) override;
  grpc::Status OpenShardGroup(grpc::ServerContext* context,
                              const v1::OpenShardGroupRequest* request,
                              v1::OpenShardGroupResponse* response) override;
  grpc::Status CommitShardGroup(grpc::ServerContext* context,
                                const v1::CommitShardGroupRequest* request,
                                v1::CommitShardGroupResponse* response) override;
  grpc::Status RewindShardGroup(grpc::ServerContext* context,
                                const v1::RewindShardGroupRequest* request,
                                v1::RewindShardGroupResponse* response) override;
  grpc::Status GetShardGroup(grpc::ServerContext* context, const v1::GetShardGroupRequest* request,
                             v1::GetShardGroupResponse* response) override;
  grpc::Status CloseShardGroup(grpc::ServerContext* context,
                               const v1::CloseShardGroupRequest* request,
                               v1::CloseShardGroupResponse* response) override;
  grpc::Status AcknowledgeShard(grpc::ServerContext* context,
                                const v1::AcknowledgeShardRequest* request,
                                v1::AcknowledgeShardResponse* response) override;

 private:
  // Calls `method` of the owner for this caller.
  template <typename Request, typename Response>
  grpc::Status Ask(grpc::ServerContext* context,
                   absl::StatusOr<Response> (ShardGroupOwner::*method)(const ShardCaller&,
                                                                       const Request&),
                   const Request& request, Response* response);

  Worker* const worker_;
  ShardGroupOwner* const owner_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SHARD_GROUP_SERVICE_H_
