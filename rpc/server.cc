#include "rpc/server.h"

#include <grpcpp/ext/channelz_service_plugin.h>
#include <grpcpp/ext/proto_server_reflection_plugin.h>
#include <grpcpp/health_check_service_interface.h>
#include <grpcpp/impl/server_builder_option.h>
#include <grpcpp/impl/server_builder_plugin.h>
#include <grpcpp/impl/server_initializer.h>
#include <grpcpp/resource_quota.h>
#include <grpcpp/security/server_credentials.h>
#include <pthread.h>

#include <chrono>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "grpc/health/v1/health.pb.h"
#include "rpc/call_metrics.h"
#include "rpc/channel.h"

namespace pagetide {
namespace {

constexpr absl::Duration kGoAwayHeadStart = absl::Milliseconds(20);

// Both plugins work on every server that is built later in this process; calling again is harmless.
void InstallPlugins() {
  grpc::reflection::InitProtoReflectionServerBuilderPlugin();
  grpc::channelz::experimental::InitChannelzService();
  grpc::EnableDefaultHealthCheckService(true);
  // gRPC's health service is made without protobuf; reflection shows it only where its descriptor
  // is linked in, and the linker keeps the generated file only if something names it.
  grpc::health::v1::HealthCheckRequest::descriptor();
}

// Learns the full names of all services of the server that is built, those of the plugins included.
class ServiceLister final : public grpc::ServerBuilderOption {
 public:
  // `names` is set by BuildAndStart and points into the server.
  explicit ServiceLister(const std::vector<std::string>** names) : names_(names) {}
  void UpdateArguments(grpc::ChannelArguments*) override {}
  void UpdatePlugins(std::vector<std::unique_ptr<grpc::ServerBuilderPlugin>>* plugins) override {
    plugins->push_back(std::make_unique<Plugin>(names_));
  }

 private:
  class Plugin final : public grpc::ServerBuilderPlugin {
   public:
    explicit Plugin(const std::vector<std::string>** names) : names_(names) {}
    std::string name() override { return "pagetide_service_lister"; }
    void InitServer(grpc::ServerInitializer*) override {}
    void Finish(grpc::ServerInitializer* initializer) override {
      *names_ = initializer->GetServiceList();
    }
    void ChangeArguments(const std::string&, void*) override {}

   private:
    const std::vector<std::string>** const names_;
  };

  const std::vector<std::string>** const names_;
};

absl::StatusOr<ListenAddress> CheckedAddress(absl::string_view text, bool is_secured) {
  PT_ASSIGN_OR_RETURN(ListenAddress address, ListenAddress::Parse(text));
  if (!address.is_loopback && !is_secured) {
    return absl::FailedPreconditionError(absl::StrCat(
        "listen on ", text, ": not a loopback address, and neither TLS nor --insecure is set"));
  }
  return address;
}

}  // namespace

absl::StatusOr<std::unique_ptr<RpcServer>> RpcServer::Create(
    const Options& options, const std::vector<grpc::Service*>& services,
    std::shared_ptr<PrometheusMetrics> metrics) {
  if (options.addresses.empty()) {
    return absl::InvalidArgumentError("start RPC server: no address to listen on");
  }
  std::vector<ListenAddress> addresses;
  for (const std::string& text : options.addresses) {
    PT_ASSIGN_OR_RETURN(
        ListenAddress address,
        CheckedAddress(text, options.allow_insecure || options.credentials != nullptr));
    addresses.push_back(std::move(address));
  }
  InstallPlugins();
  std::unique_ptr<RpcServer> self(new RpcServer(options));
  self->metrics_ = std::move(metrics);
  PT_ASSIGN_OR_RETURN(self->accept_loop_,
                      AcceptLoop::Create(options.accept, addresses, self->metrics_.get()));

  const auto milliseconds = [](absl::Duration d) {
    return static_cast<int>(absl::ToInt64Milliseconds(d));
  };
  grpc::ServerBuilder builder;
  for (grpc::Service* service : services) builder.RegisterService(service);
  builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
  builder.SetMaxSendMessageSize(kMaxMessageBytes);
  builder.SetResourceQuota(grpc::ResourceQuota("pagetide")
                               .Resize(options.memory_quota_bytes)
                               .SetMaxThreads(options.max_threads));
  builder.AddChannelArgument(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kHttp2MaxFrameBytes);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_WRITE_BUFFER_SIZE, kHttp2WriteBufferBytes);
  builder.AddChannelArgument(GRPC_ARG_MAX_CONCURRENT_STREAMS, options.max_concurrent_streams);
  builder.AddChannelArgument(GRPC_ARG_SERVER_HANDSHAKE_TIMEOUT_MS,
                             milliseconds(options.handshake_timeout));
  builder.AddChannelArgument(GRPC_ARG_MAX_CONNECTION_IDLE_MS,
                             milliseconds(options.max_connection_idle));
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIME_MS, milliseconds(options.keepalive_time));
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_TIMEOUT_MS,
                             milliseconds(options.keepalive_timeout));
  builder.AddChannelArgument(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MIN_RECV_PING_INTERVAL_WITHOUT_DATA_MS,
                             milliseconds(options.min_ping_interval));
  builder.AddChannelArgument(GRPC_ARG_HTTP2_MAX_PING_STRIKES, 3);
  builder.AddChannelArgument(GRPC_ARG_ENABLE_CHANNELZ, 1);
  std::vector<std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface>> interceptors;
  interceptors.push_back(MakeCallMetricsInterceptor(self->metrics_.get(), &self->running_));
  builder.experimental().SetInterceptorCreators(std::move(interceptors));
  self->acceptor_ = builder.experimental().AddExternalConnectionAcceptor(
      grpc::ServerBuilder::experimental_type::ExternalConnectionType::FROM_FD,
      options.credentials != nullptr ? options.credentials : grpc::InsecureServerCredentials());
  const std::vector<std::string>* service_names = nullptr;
  builder.SetOption(std::make_unique<ServiceLister>(&service_names));
  self->server_ = builder.BuildAndStart();
  if (self->server_ == nullptr) {
    return absl::InternalError("start RPC server: gRPC refused the configuration");
  }
  if (!options.metrics_address.empty()) {
    PT_ASSIGN_OR_RETURN(ListenAddress address,
                        CheckedAddress(options.metrics_address, options.allow_insecure));
    PT_ASSIGN_OR_RETURN(self->http_, MetricsHttpServer::Create(address, self->metrics_));
  }
  self->SetServing("", true);
  for (const std::string& name : *service_names) self->SetServing(name, true);
  grpc::experimental::ExternalConnectionAcceptor* const acceptor = self->acceptor_.get();
  self->accept_loop_->Start([acceptor](int listener_fd, int fd) {
    grpc::experimental::ExternalConnectionAcceptor::NewConnectionParameters connection;
    connection.listener_fd = listener_fd;
    connection.fd = fd;
    acceptor->HandleNewConnection(&connection);
  });
  for (const ListenAddress& address : self->accept_loop_->addresses()) {
    LogInfo("rpc", "listening on ", address.ToString());
  }
  return self;
}

RpcServer::~RpcServer() {
  if (server_ != nullptr) Drain(absl::ZeroDuration());
}

void RpcServer::SetServing(absl::string_view service, bool is_serving) {
  // gRPC itself keeps everything NOT_SERVING after its health service was shut down.
  server_->GetHealthCheckService()->SetServingStatus(std::string(service), is_serving);
  if (service.empty() && http_ != nullptr) {
    MutexLock lock(&mu_);
    http_->SetHealthy(is_serving && !is_draining_);
  }
}

void RpcServer::OnDrain(std::function<void()> callback) {
  MutexLock lock(&mu_);
  on_drain_ = std::move(callback);
}

void RpcServer::Drain(absl::Duration timeout) {
  std::function<void()> on_drain;
  {
    MutexLock lock(&mu_);
    if (is_draining_) {
      while (!is_drained_) drained_changed_.Wait(&mu_);
      return;
    }
    is_draining_ = true;
    on_drain = std::move(on_drain_);
    if (http_ != nullptr) http_->SetHealthy(false);
  }
  server_->GetHealthCheckService()->Shutdown();
  if (on_drain) on_drain();
  if (options_.drain_notice > absl::ZeroDuration()) {
    std::this_thread::sleep_for(absl::ToChronoNanoseconds(options_.drain_notice));
  }
  accept_loop_->Stop();
  const auto deadline = std::chrono::system_clock::now() +
                        std::chrono::duration_cast<std::chrono::system_clock::duration>(
                            absl::ToChronoNanoseconds(timeout));
  // Sends GOAWAY, takes no new calls, and returns when every connection is gone. A client without a
  // call looks at its connection every five seconds only, and would have us wait for that.
  std::thread shutdown([this, deadline] {
    pthread_setname_np(pthread_self(), "rpc-drain");
    server_->Shutdown(deadline);
    server_->Wait();
  });
  // So that clients read the GOAWAY before the end: they then know that a call was not begun.
  std::this_thread::sleep_for(absl::ToChronoNanoseconds(kGoAwayHeadStart));
  running_.WaitForNone(timeout);
  accept_loop_->CloseConnections();
  shutdown.join();
  MutexLock lock(&mu_);
  is_drained_ = true;
  drained_changed_.SignalAll();
}

std::vector<std::string> RpcServer::addresses() const {
  std::vector<std::string> all;
  for (const ListenAddress& address : accept_loop_->addresses()) all.push_back(address.ToString());
  return all;
}

int RpcServer::port() const {
  for (const ListenAddress& address : accept_loop_->addresses()) {
    if (address.unix_path.empty()) return address.port;
  }
  return 0;
}

int RpcServer::metrics_port() const {
  return http_ != nullptr ? http_->port() : 0;
}

std::string RpcServer::metrics_address() const {
  if (metrics_port() == 0) return "";
  const std::string& listen = options_.metrics_address;
  return absl::StrCat(listen.substr(0, listen.rfind(':')), ":", metrics_port());
}

}  // namespace pagetide
