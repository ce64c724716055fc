// AdminService of a worker. Thread-safe; the worker and the local plane outlive it.
#ifndef PAGETIDE_WORKER_WORKER_ADMIN_SERVICE_H_
#define PAGETIDE_WORKER_WORKER_ADMIN_SERVICE_H_

#include <functional>
#include <string>
#include <vector>

#include "base/executor.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "services/admin_common.h"
#include "worker/local_plane.h"
#include "worker/service_support.h"
#include "worker/worker.h"

namespace pagetide {

class WorkerAdminService final : public AdminServiceCommon {
 public:
  // `local_plane` may be null.
  WorkerAdminService(Worker* worker, const LocalPlane* local_plane);

  grpc::ServerUnaryReactor* GetMemoryBreakdown(grpc::CallbackServerContext* context,
                                               const v1::GetMemoryBreakdownRequest* request,
                                               v1::GetMemoryBreakdownResponse* response) override;
  grpc::ServerUnaryReactor* DumpFrames(grpc::CallbackServerContext* context,
                                       const v1::DumpFramesRequest* request,
                                       v1::DumpFramesResponse* response) override;
  grpc::ServerUnaryReactor* EvictPages(grpc::CallbackServerContext* context,
                                       const v1::EvictPagesRequest* request,
                                       v1::EvictPagesResponse* response) override;
  grpc::ServerUnaryReactor* ClearCache(grpc::CallbackServerContext* context,
                                       const v1::ClearCacheRequest* request,
                                       v1::ClearCacheResponse* response) override;

 private:
  // The loaded host of a model, or all of them when the digest is empty. NOT_FOUND
  // (MODEL_NOT_FOUND).
  absl::StatusOr<std::vector<ModelHost*>> HostsOf(const std::string& model_digest) const;

  void Breakdown(v1::GetMemoryBreakdownResponse* response) const;
  absl::Status Dump(const v1::DumpFramesRequest& request, v1::DumpFramesResponse* response) const;
  absl::Status Evict(const CallContext& call, const v1::EvictPagesRequest& request,
                     v1::EvictPagesResponse* response) const;
  // Runs `call` on the executor and finishes the RPC with what it returns.
  grpc::ServerUnaryReactor* Run(grpc::CallbackServerContext* context,
                                std::function<absl::Status()> call);

  Worker* const worker_;
  const LocalPlane* const local_plane_;
  // gRPC's callback threads must not wait, and these calls walk pools or wait for the store.
  ThreadPoolExecutor executor_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_WORKER_ADMIN_SERVICE_H_
