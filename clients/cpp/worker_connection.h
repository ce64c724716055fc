// WorkerConnection: channel, stubs and local plane to one worker, shared by the sequences opened
// there.
//
// Call() retries by trait: only UNAVAILABLE, which the request_id of a mutating request makes safe.
// Thread-safe. Held by shared_ptr: the client keeps one an address, each open sequence keeps it
// alive.
#ifndef PAGETIDE_CLIENTS_CPP_WORKER_CONNECTION_H_
#define PAGETIDE_CLIENTS_CPP_WORKER_CONNECTION_H_

#include <grpcpp/channel.h>
#include <grpcpp/client_context.h>

#include <chrono>
#include <cstdint>
#include <map>
#include <memory>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "clients/cpp/local_staging.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "pagetide/v1/prefix.grpc.pb.h"
#include "pagetide/v1/sequence.grpc.pb.h"
#include "pagetide/v1/sequence_edit.grpc.pb.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/retry.h"
#include "rpc/status_mapping.h"

namespace pagetide {

struct CallOptions {
  // Bounds a call with all its attempts and pauses.
  absl::Duration timeout = absl::Seconds(30);
  RetryPolicy retry;
};

// One attempt: `time_left` becomes the call's deadline.
inline void SetDeadline(grpc::ClientContext* context, absl::Duration time_left) {
  context->set_deadline(std::chrono::system_clock::now() + absl::ToChronoNanoseconds(time_left));
}

// Unary call `method` of `stub`, with the retries that Traits allow.
template <typename Traits = RetryUnavailable, typename Stub, typename Request, typename Response>
absl::StatusOr<Response> CallUnary(const CallOptions& options, Stub* stub,
                                   grpc::Status (Stub::*method)(grpc::ClientContext*,
                                                                const Request&, Response*),
                                   const Request& request) {
  return CallWithRetry<Traits>(
      options.retry, options.timeout, [&](absl::Duration time_left) -> absl::StatusOr<Response> {
        grpc::ClientContext context;
        SetDeadline(&context, time_left);
        Response response;
        const grpc::Status status = (stub->*method)(&context, request, &response);
        if (!status.ok()) return FromGrpcStatus(status);
        return response;
      });
}

class WorkerConnection {
 public:
  struct Options {
    std::string address;       // gRPC, as clients dial it
    std::string local_socket;  // empty: no local plane
    uint64_t staging_bytes = 4 << 20;
    absl::Duration step_lease = absl::Seconds(30);
    CallOptions call;
    ChannelOptions channel;
  };
  explicit WorkerConnection(Options options);

  const std::string& address() const { return options_.address; }
  const CallOptions& call_options() const { return options_.call; }
  absl::Duration step_lease() const { return options_.step_lease; }
  v1::SequenceService::StubInterface* sequences() const { return sequences_.get(); }
  v1::SequenceEditService::StubInterface* edits() const { return edits_.get(); }
  v1::PrefixService::StubInterface* prefixes() const { return prefixes_.get(); }
  v1::SessionService::StubInterface* sessions() const { return sessions_.get(); }
  v1::AdminService::StubInterface* admin() const { return admin_.get(); }
  // For raw streams (rpc/raw_stream.h), apart from small calls: made on first use. UNAVAILABLE when
  // nobody listens.
  absl::StatusOr<std::shared_ptr<grpc::Channel>> BulkChannel();
  // A call through it ended with UNAVAILABLE: the next one gets another channel.
  void DropBulkChannel(const std::shared_ptr<grpc::Channel>& channel);

  // The staging buffer, connected on first use; null when the worker is not on this host or has no
  // local plane (asked once; a failure is remembered). Shared: reservations in flight use it after
  // DropStaging.
  std::shared_ptr<LocalStaging> Staging();
  // The worker no longer knows this buffer (it restarted): forget it, and use RPC from now on.
  void DropStaging();

  // The frames of a model of this worker, mapped on first use. FAILED_PRECONDITION when the worker
  // is not on this host, has no local plane or does not export the pool; else as
  // LocalStaging::Connect.
  absl::StatusOr<std::shared_ptr<LocalStaging>> SharedPool(absl::string_view model_digest);

  // Counters of the worker since its start, by metric name.
  absl::StatusOr<std::map<std::string, double>> GetStats() const;
  // max_pages 0: all that can be.
  absl::StatusOr<v1::EvictPagesResponse> EvictPages(uint64_t max_pages) const;

 private:
  const Options options_;
  const std::unique_ptr<v1::SequenceService::StubInterface> sequences_;
  const std::unique_ptr<v1::SequenceEditService::StubInterface> edits_;
  const std::unique_ptr<v1::PrefixService::StubInterface> prefixes_;
  const std::unique_ptr<v1::SessionService::StubInterface> sessions_;
  const std::unique_ptr<v1::AdminService::StubInterface> admin_;

  Mutex mu_;
  bool is_staging_decided_ ABSL_GUARDED_BY(mu_) = false;
  std::shared_ptr<LocalStaging> staging_ ABSL_GUARDED_BY(mu_);
  // By model digest; shared with those who read.
  std::map<std::string, std::shared_ptr<LocalStaging>> pools_ ABSL_GUARDED_BY(mu_);
  // Shared with the calls that it carries.
  std::shared_ptr<grpc::Channel> bulk_ ABSL_GUARDED_BY(mu_);

  // For the constructor only.
  WorkerConnection(Options options, std::shared_ptr<grpc::Channel> channel);
};

}  // namespace pagetide

#endif  // PAGETIDE_CLIENTS_CPP_WORKER_CONNECTION_H_
