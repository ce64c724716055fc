// AdminService of a worker. Thread-safe; the worker and the local plane outlive it.
#ifndef PAGETIDE_WORKER_WORKER_ADMIN_SERVICE_H_
#define PAGETIDE_WORKER_WORKER_ADMIN_SERVICE_H_

#include "pagetide/v1/admin.grpc.pb.h"
#include "worker/local_plane.h"
#include "worker/worker.h"

namespace pagetide {

class WorkerAdminService final : public v1::AdminService::Service {
 public:
  // `local_plane` may be null.
  WorkerAdminService(Worker* worker, const LocalPlane* local_plane)
      : worker_(worker), local_plane_(local_plane) {}

  grpc::Status GetBuildInfo(grpc::ServerContext* context, const v1::GetBuildInfoRequest* request,
                            v1::GetBuildInfoResponse* response) override;
  grpc::Status GetCapabilities(grpc::ServerContext* context,
                               const v1::GetCapabilitiesRequest* request,
                               v1::GetCapabilitiesResponse* response) override;
  grpc::Status GetMemoryBreakdown(grpc::ServerContext* context,
                                  const v1::GetMemoryBreakdownRequest* request,
                                  v1::GetMemoryBreakdownResponse* response) override;
  grpc::Status GetStats(grpc::ServerContext* context, const v1::GetStatsRequest* request,
                        v1::GetStatsResponse* response) override;
  grpc::Status DumpFrames(grpc::ServerContext* context, const v1::DumpFramesRequest* request,
                          v1::DumpFramesResponse* response) override;
  grpc::Status EvictPages(grpc::ServerContext* context, const v1::EvictPagesRequest* request,
                          v1::EvictPagesResponse* response) override;
  grpc::Status ClearCache(grpc::ServerContext* context, const v1::ClearCacheRequest* request,
                          v1::ClearCacheResponse* response) override;
  grpc::Status SetLogLevel(grpc::ServerContext* context, const v1::SetLogLevelRequest* request,
                           v1::SetLogLevelResponse* response) override;

 private:
  // The loaded host of a model, or all of them when the digest is empty. NOT_FOUND
  // (MODEL_NOT_FOUND).
  absl::StatusOr<std::vector<ModelHost*>> HostsOf(const std::string& model_digest) const;

  Worker* const worker_;
  const LocalPlane* const local_plane_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_WORKER_ADMIN_SERVICE_H_
