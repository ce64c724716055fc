#include "services/in_process.h"

#include <cerrno>
#include <cstring>
#include <filesystem>
#include <system_error>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/clock.h"
#include "base/status_macros.h"
#include "kvstore/instrumented_page_store.h"
#include "kvstore/rocksdb_page_store.h"
#include "rpc/metrics.h"
#include "rpc/server.h"
#include "services/admin_common.h"
#include "services/page_store_service.h"
#include "services/router_role.h"
#include "services/tenant.h"
#include "services/worker_role.h"

namespace pagetide {
namespace {

constexpr int kMaxWorkers = 64;

std::string Loopback(int port) {
  return absl::StrCat("127.0.0.1:", port);
}

}  // namespace

absl::Status InProcess::Options::Validate() const {
  if (dir.empty()) return absl::InvalidArgumentError("dir is empty, must name a folder");
  if (num_workers < 1 || num_workers > kMaxWorkers) {
    return absl::InvalidArgumentError(
        absl::StrCat("num_workers is ", num_workers, ", must be 1 to ", kMaxWorkers));
  }
  for (int port : {router_port, store_port, worker_port}) {
    if (port < 0 || port > 65535) {
      return absl::InvalidArgumentError(absl::StrCat("port ", port, " is not 0 to 65535"));
    }
  }
  return absl::OkStatus();
}

// Members are destroyed in reverse order: workers and router before the store they stand on.
struct InProcess::Parts {
  std::unique_ptr<RocksdbPageStore> engine;
  std::shared_ptr<PrometheusMetrics> store_metrics = std::make_shared<PrometheusMetrics>();
  std::unique_ptr<InstrumentedPageStore> store;
  std::unique_ptr<PageStoreServiceImpl> store_service;
  std::unique_ptr<AdminServiceCommon> store_admin;
  std::unique_ptr<RpcServer> store_server;
  std::unique_ptr<RouterRole> router;
  std::vector<std::unique_ptr<WorkerRole>> workers;
};

absl::StatusOr<std::unique_ptr<InProcess>> InProcess::Start(const Options& options) {
  PT_RETURN_IF_ERROR(options.Validate());
  std::error_code made;
  std::filesystem::create_directories(options.dir, made);
  if (made) {
    return absl::FailedPreconditionError(
        absl::StrCat("make folder ", options.dir, ": ", made.message()));
  }
  auto parts = std::make_unique<Parts>();
  RocksdbPageStoreOptions store_options;
  store_options.dir = absl::StrCat(options.dir, "/store");
  store_options.capacity_bytes = options.store_capacity_bytes;
  PT_ASSIGN_OR_RETURN(parts->engine, RocksdbPageStore::Open(store_options));
  parts->store =
      std::make_unique<InstrumentedPageStore>(parts->engine.get(), parts->store_metrics.get());
  PageStore* const store = parts->store.get();
  parts->store_service =
      std::make_unique<PageStoreServiceImpl>(store, Clock::Real(), PageStoreServiceImpl::Options());
  RpcServer::Options server;
  server.addresses = {Loopback(options.store_port)};
  parts->store_admin = std::make_unique<AdminServiceCommon>(
      "store", std::vector<std::string>{"rocksdb", "segments"}, parts->store_metrics.get());
  PT_ASSIGN_OR_RETURN(
      parts->store_server,
      RpcServer::Create(server, {parts->store_service.get(), parts->store_admin.get()},
                        parts->store_metrics));
  parts->store_server->OnDrain([service = parts->store_service.get()] { service->EndStreams(); });

  PT_ASSIGN_OR_RETURN(const std::string secret, LoadDeploymentSecret(""));
  RouterRole::Options router;
  router.server.addresses = {Loopback(options.router_port)};
  router.deployment_secret = secret;
  router.store_address = parts->store_server->addresses().front();
  PT_ASSIGN_OR_RETURN(parts->router, RouterRole::Start(std::move(router), store, Clock::Real()));

  for (int i = 0; i < options.num_workers; ++i) {
    WorkerRole::Options worker;
    worker.worker.id = absl::StrCat("worker-", i + 1);
    worker.worker.pool_bytes = options.pool_bytes;
    worker.worker.model_pool_bytes = options.model_pool_bytes;
    worker.worker.host.write_through = options.write_through;
    worker.worker.deployment_secret = secret;
    worker.server.addresses = {Loopback(options.worker_port == 0 ? 0 : options.worker_port + i)};
    worker.local_plane.socket_path = absl::StrCat(options.dir, "/worker-", i + 1, ".sock");
    worker.routers = {parts->router->address()};
    PT_ASSIGN_OR_RETURN(std::unique_ptr<WorkerRole> role,
                        WorkerRole::Start(std::move(worker), store, Clock::Real()));
    parts->workers.push_back(std::move(role));
  }
  const absl::Time deadline = absl::Now() + options.attach_timeout;
  for (const std::unique_ptr<WorkerRole>& worker : parts->workers) {
    while (worker->num_attached_routers() == 0) {
      if (absl::Now() > deadline) {
        return absl::DeadlineExceededError(
            absl::StrCat("worker ", worker->worker().id(), " did not reach the router within ",
                         absl::FormatDuration(options.attach_timeout)));
      }
      absl::SleepFor(absl::Milliseconds(5));
    }
  }
  return std::unique_ptr<InProcess>(new InProcess(std::move(parts)));
}

InProcess::InProcess(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

InProcess::~InProcess() {
  Drain(absl::ZeroDuration());
}

void InProcess::Drain(absl::Duration timeout) {
  parts_->router->Drain(timeout);
  for (const std::unique_ptr<WorkerRole>& worker : parts_->workers) worker->Drain(timeout);
  parts_->store_server->Drain(timeout);
}

std::string InProcess::router_address() const {
  return parts_->router->address();
}

std::string InProcess::store_address() const {
  return parts_->store_server->addresses().front();
}

std::vector<std::string> InProcess::worker_addresses() const {
  std::vector<std::string> addresses;
  for (const std::unique_ptr<WorkerRole>& worker : parts_->workers) {
    addresses.push_back(worker->address());
  }
  return addresses;
}

std::string InProcess::metrics_address() const {
  return parts_->router->metrics_address();
}

}  // namespace pagetide
