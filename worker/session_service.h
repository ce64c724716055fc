// SessionService over a Worker and its Sessions. Thread-safe; both outlive it.
#ifndef PAGETIDE_WORKER_SESSION_SERVICE_H_
#define PAGETIDE_WORKER_SESSION_SERVICE_H_

#include <memory>
#include <optional>
#include <string>
#include <utility>

#include "absl/time/time.h"
#include "base/executor.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/stream_deadlines.h"
#include "worker/import_stream.h"
#include "worker/request_memos.h"
#include "worker/service_support.h"
#include "worker/sessions.h"
#include "worker/stream_slots.h"
#include "worker/worker.h"

namespace pagetide {

class SessionServiceImpl final
    : public v1::SessionService::WithCallbackMethod_ImportSequence<v1::SessionService::Service> {
 public:
  // Of files that are imported and exported.
  struct FileLimits {
    // Where a file is gathered before it is looked at: on a disk, not in memory.
    std::string folder = "/var/tmp";
    uint64_t max_bytes = uint64_t{64} << 30;
    // An import that sends nothing for so long ends.
    absl::Duration max_idle = absl::Seconds(30);
    // Imports, and as many exports, that run at once; and how many of them of one tenant.
    uint32_t max_running = 8;
    uint32_t max_running_of_tenant = 4;
  };
  SessionServiceImpl(Worker* worker, Sessions* sessions, RequestMemos* memos,
                     StreamDeadlines* deadlines, const FileLimits& limits);

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
  grpc::ServerReadReactor<v1::ImportSequenceRequest>* ImportSequence(
      grpc::CallbackServerContext* context, v1::ImportSequenceResponse* response) override;

 private:
  // The next message; nullopt at the end of the stream. DEADLINE_EXCEEDED (IMPORT_IDLE), CANCELLED.
  absl::StatusOr<std::optional<v1::ImportSequenceRequest>> NextPart(const CallContext& call,
                                                                    ImportStream* stream,
                                                                    absl::string_view request_id,
                                                                    uint64_t received) const;
  absl::StatusOr<v1::ImportSequenceResponse> ImportOnce(const CallContext& call,
                                                        ImportStream* stream);
  absl::StatusOr<v1::ImportSequenceResponse> Import(const CallContext& call,
                                                    const v1::ImportSequenceRequest::Header& header,
                                                    ImportStream* stream);
  absl::StatusOr<v1::SaveSessionResponse> Save(const CallContext& call,
                                               const v1::SaveSessionRequest& request);
  absl::StatusOr<v1::LoadSessionResponse> Load(const CallContext& call,
                                               const v1::LoadSessionRequest& request);

  Worker* const worker_;
  Sessions* const sessions_;
  RequestMemos* const memos_;
  StreamDeadlines* const deadlines_;
  const FileLimits file_limits_;
  StreamSlots import_slots_;
  StreamSlots export_slots_;
  ThreadPoolExecutor import_threads_;  // one for each slot; the last member: its tasks use the rest
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SESSION_SERVICE_H_
