#include "services/store_role.h"

#include <string>
#include <utility>
#include <vector>

#include "base/log.h"
#include "base/periodic_task.h"
#include "base/status_macros.h"
#include "kvstore/instrumented_page_store.h"
#include "rpc/metrics.h"
#include "services/admin_common.h"

namespace pagetide {

// In the order of construction: each part uses those above it.
struct StoreRole::Parts {
  // Shared with the HTTP port's scrapes.
  std::shared_ptr<PrometheusMetrics> metrics = std::make_shared<PrometheusMetrics>();
  std::unique_ptr<RocksdbPageStore> engine;
  std::unique_ptr<InstrumentedPageStore> store;
  std::unique_ptr<PageStoreServiceImpl> service;
  std::unique_ptr<AdminServiceCommon> admin;
  std::unique_ptr<RpcServer> server;
  bool was_failed = false;  // owned by the task's thread
  std::unique_ptr<PeriodicTask> publisher;

  void PublishState() {
    store->PublishStats();
    metrics
        ->GetGauge("pagetide_store_unreadable_manifests",
                   "Manifests that could not be read when the store was opened.")
        ->Set(static_cast<double>(engine->num_unreadable_manifests()));
    // A store that lost its disk still answers reads; health says that it takes no writes.
    const absl::StatusOr<StoreStats> stats = engine->GetStats(MonotonicTime::InfiniteFuture());
    if (was_failed || !stats.ok() || stats->state != "failed") return;
    was_failed = true;
    server->SetServing("pagetide.v1.PageStoreService", false);
    LogError("store", "the disk has refused a write: no more are taken until a restart");
  }
};

absl::StatusOr<std::unique_ptr<StoreRole>> StoreRole::Start(const Options& options, Clock* clock) {
  auto parts = std::make_unique<Parts>();
  PT_ASSIGN_OR_RETURN(parts->engine, RocksdbPageStore::Open(options.engine));
  for (const std::string& kind : parts->engine->recovery().losses_accepted) {
    parts->metrics
        ->GetCounter("pagetide_store_losses_accepted_total",
                     "Openings that gave up what was durable, as they were told to.",
                     {{"kind", kind}})
        ->Increment();
  }
  parts->store = std::make_unique<InstrumentedPageStore>(parts->engine.get(), parts->metrics.get());
  PageStoreServiceImpl::Options service = options.service;
  service.metrics = parts->metrics.get();
  parts->service = std::make_unique<PageStoreServiceImpl>(parts->store.get(), clock, service);
  parts->admin = std::make_unique<AdminServiceCommon>(
      "store", std::vector<std::string>{"rocksdb", "segments"}, parts->metrics.get());
  PT_ASSIGN_OR_RETURN(parts->server,
                      RpcServer::Create(options.server, {parts->service.get(), parts->admin.get()},
                                        parts->metrics));
  parts->server->OnDrain([service = parts->service.get()] { service->EndStreams(); });
  parts->publisher = std::make_unique<PeriodicTask>("store-state", options.state_period,
                                                    [raw = parts.get()] { raw->PublishState(); });
  return std::unique_ptr<StoreRole>(new StoreRole(std::move(parts)));
}

StoreRole::StoreRole(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

StoreRole::~StoreRole() {
  Drain(absl::ZeroDuration());
}

void StoreRole::Drain(absl::Duration timeout) {
  parts_->server->Drain(timeout);
}

PageStore* StoreRole::store() {
  return parts_->store.get();
}

std::string StoreRole::address() const {
  return parts_->server->addresses().front();
}

std::string StoreRole::metrics_address() const {
  return parts_->server->metrics_address();
}

}  // namespace pagetide
