#include "rpc/metrics_http.h"

#include <CivetServer.h>
#include <pthread.h>
#include <sys/socket.h>
#include <unistd.h>

#include <chrono>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"

namespace pagetide {
namespace {

bool Answer(mg_connection* connection, int code, absl::string_view reason, absl::string_view type,
            absl::string_view body) {
  const std::string head =
      absl::StrCat("HTTP/1.1 ", code, " ", reason, "\r\nContent-Type: ", type,
                   "\r\nContent-Length: ", body.size(), "\r\nConnection: close\r\n\r\n");
  mg_write(connection, head.data(), head.size());
  mg_write(connection, body.data(), body.size());
  return true;
}

// Begins a connection and drops it.
void Nudge(const ListenAddress& address) {
  sockaddr_storage sa{};
  const socklen_t size = address.ToSockaddr(&sa);
  const int fd = socket(sa.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return;
  connect(fd, reinterpret_cast<const sockaddr*>(&sa), size);
  close(fd);
}

class MetricsHandler final : public CivetHandler {
 public:
  explicit MetricsHandler(std::shared_ptr<const PrometheusMetrics> metrics)
      : metrics_(std::move(metrics)) {}
  bool handleGet(CivetServer*, mg_connection* connection) override {
    return Answer(connection, 200, "OK", "text/plain; version=0.0.4; charset=utf-8",
                  metrics_->ExposeText());
  }

 private:
  const std::shared_ptr<const PrometheusMetrics> metrics_;
};

class HealthHandler final : public CivetHandler {
 public:
  bool handleGet(CivetServer*, mg_connection* connection) override {
    return is_healthy.load()
               ? Answer(connection, 200, "OK", "text/plain", "ok\n")
               : Answer(connection, 503, "Service Unavailable", "text/plain", "not serving\n");
  }
  std::atomic<bool> is_healthy{true};
};

}  // namespace

class MetricsHttpServer::Impl {
 public:
  Impl(const ListenAddress& address, const std::vector<std::string>& options,
       std::shared_ptr<const PrometheusMetrics> metrics)
      : address(address), metrics_handler(std::move(metrics)), server(options) {
    server.addHandler("/metrics", metrics_handler);
    server.addHandler("/healthz", health_handler);
  }
  // civetweb's listening thread looks for the end every two seconds only, or when a peer connects:
  // connecting ourselves until it is gone keeps shutdown prompt.
  ~Impl() {
    ListenAddress bound = address;
    bound.port = static_cast<uint16_t>(server.getListeningPorts().at(0));
    std::atomic<bool> is_closed{false};
    std::thread closer([&] {
      pthread_setname_np(pthread_self(), "metrics-close");
      server.close();
      is_closed.store(true);
    });
    while (!is_closed.load()) {
      Nudge(bound);
      std::this_thread::sleep_for(std::chrono::milliseconds(2));
    }
    closer.join();
  }

  const ListenAddress address;
  MetricsHandler metrics_handler;
  HealthHandler health_handler;
  CivetServer server;  // last: stops before the handlers go
};

absl::StatusOr<std::unique_ptr<MetricsHttpServer>> MetricsHttpServer::Create(
    const ListenAddress& address, std::shared_ptr<const PrometheusMetrics> metrics) {
  if (!address.unix_path.empty()) {
    return absl::InvalidArgumentError(
        absl::StrCat("metrics address ", address.ToString(), " is not host:port"));
  }
  // A scraper every few seconds and a probe: two threads, and little patience with slow senders.
  std::vector<std::string> options = {"listening_ports",    address.ToString(),
                                      "num_threads",        "2",
                                      "request_timeout_ms", "5000",
                                      "enable_keep_alive",  "no"};
  // CivetServer reports failure only by an exception; it ends here.
  try {
    auto impl = std::make_unique<Impl>(address, options, std::move(metrics));
    return std::unique_ptr<MetricsHttpServer>(new MetricsHttpServer(std::move(impl)));
  } catch (const CivetException& e) {
    return absl::UnavailableError(
        absl::StrCat("listen for metrics on ", address.ToString(), ": ", e.what()));
  }
}

MetricsHttpServer::MetricsHttpServer(std::unique_ptr<Impl> impl) : impl_(std::move(impl)) {}
MetricsHttpServer::~MetricsHttpServer() = default;

void MetricsHttpServer::SetHealthy(bool is_healthy) {
  impl_->health_handler.is_healthy.store(is_healthy);
}

int MetricsHttpServer::port() const {
  return impl_->server.getListeningPorts().at(0);
}

}  // namespace pagetide
