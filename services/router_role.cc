#include "services/router_role.h"

#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/executor.h"
#include "base/log.h"
#include "base/periodic_task.h"
#include "base/status_macros.h"
#include "services/admin_common.h"
#include "services/router_service.h"
#include "services/store_watcher.h"
#include "services/tenant.h"
#include "services/worker_registry_service.h"

namespace pagetide {
// In the order of construction: each part uses those above it.
struct RouterRole::Parts {
  std::shared_ptr<PrometheusMetrics> metrics = std::make_shared<PrometheusMetrics>();
  std::unique_ptr<Router> router;
  std::unique_ptr<ModelCatalog> models;
  std::unique_ptr<TenantSalts> salts;
  std::unique_ptr<ThreadPoolExecutor> io;
  std::unique_ptr<RouterServiceImpl> router_service;
  std::unique_ptr<WorkerRegistryServiceImpl> registry_service;
  std::unique_ptr<AdminServiceCommon> admin_service;
  std::unique_ptr<StoreWatcher> store_watcher;
  std::unique_ptr<PeriodicTask> ticker;  // a few times a heartbeat
  std::unique_ptr<RpcServer> server;
};

absl::Status RouterRole::Options::Validate() const {
  PT_RETURN_IF_ERROR(ValidateName("router_id", router.router_id));
  if (heartbeat < absl::Milliseconds(20) || heartbeat > absl::Seconds(10)) {
    return absl::InvalidArgumentError(
        absl::StrCat("heartbeat = ", absl::FormatDuration(heartbeat), " is not 20ms to 10s"));
  }
  if (io_threads < 1 || io_threads > 256) {
    return absl::InvalidArgumentError(
        absl::StrCat("io_threads = ", io_threads, " is not 1 to 256"));
  }
  return absl::OkStatus();
}

absl::StatusOr<std::unique_ptr<RouterRole>> RouterRole::Start(Options options, PageStore* store,
                                                              Clock* clock) {
  PT_RETURN_IF_ERROR(options.Validate());
  auto parts = std::make_unique<Parts>();
  options.router.registry.liveness_ttl = 6 * options.heartbeat;
  PT_ASSIGN_OR_RETURN(parts->router, Router::Create(options.router, clock, parts->metrics.get()));
  parts->models = std::make_unique<ModelCatalog>(options.models, store, clock);
  parts->salts = std::make_unique<TenantSalts>(options.deployment_secret);
  parts->io = std::make_unique<ThreadPoolExecutor>(ThreadPoolExecutor::Options{
      .name = "router-io", .num_threads = options.io_threads, .max_queue = options.io_queue});
  parts->router_service = std::make_unique<RouterServiceImpl>(
      RouterServiceImpl::Options(), parts->router.get(), parts->models.get(), parts->salts.get(),
      parts->io.get(), clock);
  parts->registry_service = std::make_unique<WorkerRegistryServiceImpl>(
      WorkerRegistryServiceImpl::Options{.heartbeat = options.heartbeat,
                                         .min_snapshot_interval = 2 * options.heartbeat},
      parts->router.get(), clock);
  parts->admin_service = std::make_unique<AdminServiceCommon>(
      "router",
      std::vector<std::string>{absl::StrCat("policy_", options.router.policy),
                               store == nullptr ? "no_store" : "store"},
      parts->metrics.get());
  PT_ASSIGN_OR_RETURN(parts->server,
                      RpcServer::Create(options.server,
                                        {parts->router_service.get(), parts->registry_service.get(),
                                         parts->admin_service.get()},
                                        parts->metrics));
  parts->server->OnDrain([registry = parts->registry_service.get()] {
    registry->CloseAll(absl::UnavailableError("this router is draining"));
  });
  parts->ticker = std::make_unique<PeriodicTask>(
      "router-tick", options.heartbeat / 2,
      [registry = parts->registry_service.get()] { registry->Tick(); });
  if (store != nullptr) {
    parts->store_watcher = std::make_unique<StoreWatcher>(
        StoreWatcher::Options{.address = options.store_address}, store, parts->router.get(), clock);
  }
  LogInfo("router", "router ", options.router.router_id, " serves at ",
          parts->server->addresses().front());
  return std::unique_ptr<RouterRole>(new RouterRole(std::move(parts)));
}

RouterRole::RouterRole(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

RouterRole::~RouterRole() {
  Drain(absl::ZeroDuration());
  parts_->store_watcher.reset();
  parts_->ticker.reset();
  // Calls that wait in the executor hold reactors of the server: they finish before it goes.
  parts_->io->Stop();
  parts_->server.reset();
}

void RouterRole::Drain(absl::Duration timeout) {
  parts_->server->Drain(timeout);
}

std::string RouterRole::address() const {
  return parts_->server->addresses().front();
}

std::string RouterRole::metrics_address() const {
  return parts_->server->metrics_address();
}

Router& RouterRole::router() {
  return *parts_->router;
}

}  // namespace pagetide
