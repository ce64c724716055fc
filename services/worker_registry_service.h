// WorkerRegistryService over the router's domain: one reactor a stream, which hands each report to
// the router and sends its directives.
//
// Thread-safe. The router and the clock outlive the service, and the service outlives the server
// that runs it. CloseAll before the server shuts down, or the shutdown waits for the streams.
#ifndef PAGETIDE_SERVICES_WORKER_REGISTRY_SERVICE_H_
#define PAGETIDE_SERVICES_WORKER_REGISTRY_SERVICE_H_

#include <memory>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "core/router.h"
#include "pagetide/v1/worker_registry.grpc.pb.h"

namespace pagetide {

class WorkerRegistryServiceImpl final : public v1::WorkerRegistryService::CallbackService {
 public:
  struct Options {
    // Sent to workers: how often they report. A quarter or less of the registry's liveness_ttl.
    absl::Duration heartbeat = absl::Milliseconds(500);
    // A source whose digests differ for ever must not send snapshots all the time.
    absl::Duration min_snapshot_interval = absl::Seconds(1);
    // A stream that does not begin with a hello by then is ended.
    absl::Duration hello_timeout = absl::Seconds(10);
    // Streams without a hello yet; the next one is refused.
    size_t max_pending_streams = 256;
  };

  WorkerRegistryServiceImpl(Options options, Router* router, const Clock* clock);
  ~WorkerRegistryServiceImpl() override;

  grpc::ServerBidiReactor<v1::AttachRequest, v1::AttachResponse>* Attach(
      grpc::CallbackServerContext* context) override;

  // Call a few times a second: ends the streams of silent workers, and sends directives that
  // waited.
  void Tick();
  // Ends all streams with `status` and refuses new ones.
  void CloseAll(const absl::Status& status);

 private:
  class Stream;

  void OnAttached(std::shared_ptr<Stream> stream, const Router::Attached& attached);
  void OnEnded(const std::shared_ptr<Stream>& stream);

  const Options options_;
  Router* const router_;
  const Clock* const clock_;

  Mutex mu_;
  bool is_closed_ ABSL_GUARDED_BY(mu_) = false;
  // Shared with gRPC's callbacks: a stream lives until its last callback, and Tick may be using it
  // then.
  absl::flat_hash_map<Stream*, std::shared_ptr<Stream>> streams_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<AttachmentId, std::shared_ptr<Stream>> attached_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_WORKER_REGISTRY_SERVICE_H_
