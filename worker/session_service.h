// SessionService over a Worker and its Sessions. Thread-safe; both outlive it.
#ifndef PAGETIDE_WORKER_SESSION_SERVICE_H_
#define PAGETIDE_WORKER_SESSION_SERVICE_H_

#include "pagetide/v1/session.grpc.pb.h"
#include "worker/request_memos.h"
#include "worker/service_support.h"
#include "worker/sessions.h"
#include "worker/worker.h"

namespace pagetide {

class SessionServiceImpl final : public v1::SessionService::Service {
 public:
  SessionServiceImpl(Worker* worker, Sessions* sessions, RequestMemos* memos)
      : worker_(worker), sessions_(sessions), memos_(memos) {}

  grpc::Status SaveSession(grpc::ServerContext* context, const v1::SaveSessionRequest* request,
                           v1::SaveSessionResponse* response) override;
  grpc::Status LoadSession(grpc::ServerContext* context, const v1::LoadSessionRequest* request,
                           v1::LoadSessionResponse* response) override;
  grpc::Status PeekSession(grpc::ServerContext* context, const v1::PeekSessionRequest* request,
                           v1::PeekSessionResponse* response) override;
  grpc::Status ListSessions(grpc::ServerContext* context, const v1::ListSessionsRequest* request,
                            v1::ListSessionsResponse* response) override;
  grpc::Status DeleteSession(grpc::ServerContext* context, const v1::DeleteSessionRequest* request,
                             v1::DeleteSessionResponse* response) override;
  grpc::Status CreateCheckpoint(grpc::ServerContext* context,
                                const v1::CreateCheckpointRequest* request,
                                v1::CreateCheckpointResponse* response) override;
  grpc::Status RestoreCheckpoint(grpc::ServerContext* context,
                                 const v1::RestoreCheckpointRequest* request,
                                 v1::RestoreCheckpointResponse* response) override;
  grpc::Status ListCheckpoints(grpc::ServerContext* context,
                               const v1::ListCheckpointsRequest* request,
                               v1::ListCheckpointsResponse* response) override;
  grpc::Status DeleteCheckpoint(grpc::ServerContext* context,
                                const v1::DeleteCheckpointRequest* request,
                                v1::DeleteCheckpointResponse* response) override;

 private:
  absl::StatusOr<v1::SaveSessionResponse> Save(const CallContext& call,
                                               const v1::SaveSessionRequest& request);
  absl::StatusOr<v1::LoadSessionResponse> Load(const CallContext& call,
                                               const v1::LoadSessionRequest& request);

  Worker* const worker_;
  Sessions* const sessions_;
  RequestMemos* const memos_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SESSION_SERVICE_H_
