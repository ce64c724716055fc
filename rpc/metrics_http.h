// MetricsHttpServer: GET /metrics (Prometheus text) and GET /healthz (200 "ok" or 503) on a port of
// its own, so that scraping and probing need no gRPC. Thread-safe; the destructor joins its
// threads.
#ifndef PAGETIDE_RPC_METRICS_HTTP_H_
#define PAGETIDE_RPC_METRICS_HTTP_H_

#include <atomic>
#include <memory>

#include "absl/status/statusor.h"
#include "rpc/accept_loop.h"
#include "rpc/metrics.h"

namespace pagetide {

class MetricsHttpServer {
 public:
  // UNAVAILABLE when the address cannot be bound.
  static absl::StatusOr<std::unique_ptr<MetricsHttpServer>> Create(
      const ListenAddress& address, std::shared_ptr<const PrometheusMetrics> metrics);
  ~MetricsHttpServer();
  MetricsHttpServer(const MetricsHttpServer&) = delete;
  MetricsHttpServer& operator=(const MetricsHttpServer&) = delete;

  // What /healthz answers from now on; true at first.
  void SetHealthy(bool is_healthy);
  int port() const;

 private:
  class Impl;  // keeps civetweb out of the headers
  explicit MetricsHttpServer(std::unique_ptr<Impl> impl);
  const std::unique_ptr<Impl> impl_;
};

}  // namespace pagetide

#endif  // PAGETIDE_RPC_METRICS_HTTP_H_
