// EnginePoolService over EnginePools, the worker's hosts and the local plane, which hands the
// engines' memories over. Thread-safe; what the constructor takes outlives it.
#ifndef PAGETIDE_WORKER_ENGINE_POOL_SERVICE_H_
#define PAGETIDE_WORKER_ENGINE_POOL_SERVICE_H_

#include "absl/status/statusor.h"
#include "pagetide/v1/engine_pool.grpc.pb.h"
#include "rpc/stream_deadlines.h"
#include "worker/engine_pools.h"
#include "worker/local_plane.h"
#include "worker/request_memos.h"
#include "worker/service_support.h"
#include "worker/stream_slots.h"
#include "worker/worker.h"

namespace pagetide {

class EnginePoolServiceImpl final : public v1::EnginePoolService::Service {
 public:
  // `local_plane` may be null: then nothing can be registered.
  EnginePoolServiceImpl(Worker* worker, EnginePools* pools, const LocalPlane* local_plane,
                        RequestMemos* memos, StreamDeadlines* deadlines);

  grpc::Status RegisterEnginePool(grpc::ServerContext* context,
                                  const v1::RegisterEnginePoolRequest* request,
                                  v1::RegisterEnginePoolResponse* response) override;
  grpc::Status UnregisterEnginePool(grpc::ServerContext* context,
                                    const v1::UnregisterEnginePoolRequest* request,
                                    v1::UnregisterEnginePoolResponse* response) override;
  grpc::Status LoadPages(grpc::ServerContext* context, const v1::LoadPagesRequest* request,
                         v1::LoadPagesResponse* response) override;
  grpc::Status StorePages(grpc::ServerContext* context, const v1::StorePagesRequest* request,
                          v1::StorePagesResponse* response) override;
  grpc::Status GetJob(grpc::ServerContext* context, const v1::GetJobRequest* request,
                      v1::GetJobResponse* response) override;
  grpc::Status WatchJob(grpc::ServerContext* context, const v1::WatchJobRequest* request,
                        grpc::ServerWriter<v1::WatchJobResponse>* writer) override;
  grpc::Status CancelJob(grpc::ServerContext* context, const v1::CancelJobRequest* request,
                         v1::CancelJobResponse* response) override;

 private:
  absl::StatusOr<v1::RegisterEnginePoolResponse> Register(
      const CallContext& call, const v1::RegisterEnginePoolRequest& request);

  Worker* const worker_;
  EnginePools* const pools_;
  const LocalPlane* const local_plane_;
  RequestMemos* const memos_;
  StreamDeadlines* const deadlines_;
  StreamSlots watches_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_ENGINE_POOL_SERVICE_H_
