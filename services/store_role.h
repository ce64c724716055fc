// StoreRole: a whole page store in this process: engine, metrics, gRPC service, and the thread that
// publishes its state. pagetide-store runs one; `pagetide up` and tests run it beside other roles.
//
// Start it, then Drain and destroy it; thread-safe otherwise. The clock outlives it.
#ifndef PAGETIDE_SERVICES_STORE_ROLE_H_
#define PAGETIDE_SERVICES_STORE_ROLE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "core/page_store.h"
#include "kvstore/rocksdb_page_store.h"
#include "rpc/server.h"
#include "services/page_store_service.h"

namespace pagetide {

class StoreRole {
 public:
  struct Options {
    RocksdbPageStoreOptions engine;
    PageStoreServiceImpl::Options service;
    RpcServer::Options server;
    // Between two looks at the engine: so old are gauges, and so late turns the health of
    // PageStoreService NOT_SERVING when the disk has refused a write.
    absl::Duration state_period = absl::Seconds(1);
  };

  // Serves when it returns.
  static absl::StatusOr<std::unique_ptr<StoreRole>> Start(const Options& options, Clock* clock);
  // Drains at once if Drain was not called.
  ~StoreRole();
  StoreRole(const StoreRole&) = delete;
  StoreRole& operator=(const StoreRole&) = delete;

  // Health turns NOT_SERVING, watchers' streams end, running calls get up to `timeout`. Idempotent.
  void Drain(absl::Duration timeout);

  // For roles in the same process: calls count in the metrics like those that come over gRPC.
  PageStore* store();
  // As clients dial it, with the real port.
  std::string address() const;
  // "host:port" of /metrics; empty when there is none.
  std::string metrics_address() const;

 private:
  struct Parts;
  explicit StoreRole(std::unique_ptr<Parts> parts);
  const std::unique_ptr<Parts> parts_;
};

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_STORE_ROLE_H_
