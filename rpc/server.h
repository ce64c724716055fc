// RpcServer: what every PageTide program has on its port. It puts the given services behind our own
// accept loop, with limits, health (grpc.health.v1), reflection, channelz, call metrics, an HTTP
// port for /metrics and /healthz, and a graceful drain.
//
// Thread-safe. The services, the metrics and the callbacks outlive the server.
#ifndef PAGETIDE_RPC_SERVER_H_
#define PAGETIDE_RPC_SERVER_H_

#include <grpcpp/impl/service_type.h>
#include <grpcpp/security/server_credentials.h>
#include <grpcpp/server.h>
#include <grpcpp/server_builder.h>

#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/mutex.h"
#include "rpc/accept_loop.h"
#include "rpc/metrics.h"
#include "rpc/metrics_http.h"
#include "rpc/running_calls.h"

namespace pagetide {

class RpcServer {
 public:
  struct Options {
    // "host:port" or "unix:/path", see ListenAddress. At least one.
    std::vector<std::string> addresses = {"127.0.0.1:0"};
    // Null = plaintext, which is refused on an address that is not loopback unless allow_insecure.
    std::shared_ptr<grpc::ServerCredentials> credentials;
    bool allow_insecure = false;
    AcceptLoop::Options accept;
    // Memory that gRPC may hold for messages in flight; beyond it, reads wait and idle streams go.
    size_t memory_quota_bytes = size_t{1} << 30;
    int max_concurrent_streams = 1024;  // a connection
    // Threads for calls that block; beyond them calls are answered RESOURCE_EXHAUSTED.
    int max_threads = 2048;
    // A peer that has not finished its HTTP/2 (and TLS) handshake by then is cut off.
    absl::Duration handshake_timeout = absl::Seconds(10);
    // A connection without any call for this long gets a GOAWAY; clients reconnect by themselves.
    absl::Duration max_connection_idle = absl::Minutes(30);
    // Dead peers are found by HTTP/2 pings; pings of peers more often than the second are punished.
    absl::Duration keepalive_time = absl::Seconds(30);
    absl::Duration keepalive_timeout = absl::Seconds(10);
    absl::Duration min_ping_interval = absl::Seconds(10);
    // Empty = no HTTP port. Loopback rule as for `addresses`.
    std::string metrics_address = "127.0.0.1:0";
    // Between "not serving" and the end of accepting, so that load balancers have looked away.
    absl::Duration drain_notice = absl::ZeroDuration();
  };

  // Starts serving at once; all services begin as SERVING. INVALID_ARGUMENT for an option that
  // cannot be, FAILED_PRECONDITION for an address that is in use or not allowed.
  static absl::StatusOr<std::unique_ptr<RpcServer>> Create(
      const Options& options, const std::vector<grpc::Service*>& services,
      std::shared_ptr<PrometheusMetrics> metrics);
  // Drains with a deadline of zero unless drained before.
  ~RpcServer();
  RpcServer(const RpcServer&) = delete;
  RpcServer& operator=(const RpcServer&) = delete;

  // Health of one service by its full name ("pagetide.v1.RouterService"); "" is the whole server.
  // Nothing becomes SERVING again once a drain began.
  void SetServing(absl::string_view service, bool is_serving);
  // Runs once when a drain begins, after health turned NOT_SERVING and before accepting ends: here
  // services end their long streams. Set before Drain.
  void OnDrain(std::function<void()> callback);
  // NOT_SERVING → OnDrain → no new connections → GOAWAY → waits for running calls up to `timeout`,
  // then cancels them → closes connections. Idle clients, and those that watch health, are not
  // waited for. Returns when the last call is over; a second call waits for the first.
  void Drain(absl::Duration timeout);

  // As clients dial it, with the real ports, in the order of Options::addresses.
  std::vector<std::string> addresses() const;
  // The TCP port of the first TCP address; 0 if there is none.
  int port() const;
  // 0 without an HTTP port.
  int metrics_port() const;
  // "host:port" of the HTTP port; empty without one.
  std::string metrics_address() const;
  size_t num_connections() const { return accept_loop_->num_connections(); }

 private:
  explicit RpcServer(const Options& options) : options_(options) {}

  const Options options_;
  // Const after Create.
  std::shared_ptr<PrometheusMetrics> metrics_;  // shared with the mains' other parts
  std::unique_ptr<AcceptLoop> accept_loop_;
  RunningCalls running_;  // outlives server_
  std::unique_ptr<grpc::experimental::ExternalConnectionAcceptor> acceptor_;
  std::unique_ptr<grpc::Server> server_;
  std::unique_ptr<MetricsHttpServer> http_;

  Mutex mu_;
  CondVar drained_changed_;
  bool is_draining_ ABSL_GUARDED_BY(mu_) = false;
  bool is_drained_ ABSL_GUARDED_BY(mu_) = false;
  std::function<void()> on_drain_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_RPC_SERVER_H_
