// SessionService over a Worker and its Sessions. Thread-safe; both outlive it.
#ifndef PAGETIDE_WORKER_SESSION_SERVICE_H_
#define PAGETIDE_WORKER_SESSION_SERVICE_H_

#include <atomic>
#include <string>
#include <utility>

#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/stream_deadlines.h"
#include "worker/request_memos.h"
#include "worker/service_support.h"
#include "worker/sessions.h"
#include "worker/worker.h"

namespace pagetide {

class SessionServiceImpl final : public v1::SessionService::Service {
 public:
  // Of files that are imported.
  struct ImportLimits {
    // Where a file is gathered before it is looked at: on a disk, not in memory.
    std::string folder = "/var/tmp";
    uint64_t max_bytes = uint64_t{64} << 30;
    uint32_t max_running = 4;
  };
  SessionServiceImpl(Worker* worker, Sessions* sessions, RequestMemos* memos,
                     StreamDeadlines* deadlines, ImportLimits import_limits)
      : worker_(worker),
        sessions_(sessions),
        memos_(memos),
        deadlines_(deadlines),
        import_limits_(std::move(import_limits)) {}

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
  grpc::Status ExportSequence(grpc::ServerContext* context,
                              const v1::ExportSequenceRequest* request,
                              grpc::ServerWriter<v1::ExportSequenceResponse>* writer) override;
  grpc::Status ImportSequence(grpc::ServerContext* context,
                              grpc::ServerReader<v1::ImportSequenceRequest>* reader,
                              v1::ImportSequenceResponse* response) override;

 private:
  absl::StatusOr<v1::ImportSequenceResponse> Import(
      const CallContext& call, const v1::ImportSequenceRequest::Header& header,
      const grpc::ServerContext& context, grpc::ServerReader<v1::ImportSequenceRequest>* reader);
  absl::StatusOr<v1::SaveSessionResponse> Save(const CallContext& call,
                                               const v1::SaveSessionRequest& request);
  absl::StatusOr<v1::LoadSessionResponse> Load(const CallContext& call,
                                               const v1::LoadSessionRequest& request);

  Worker* const worker_;
  Sessions* const sessions_;
  RequestMemos* const memos_;
  StreamDeadlines* const deadlines_;
  const ImportLimits import_limits_;
  std::atomic<uint32_t> imports_running_{0};  // a count only: no other data hangs on it
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SESSION_SERVICE_H_
