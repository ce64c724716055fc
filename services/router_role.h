// RouterRole: a whole router in this process: domain, gRPC services, the watch of the store,
// upkeep. pagetide-router runs one; `pagetide up` and tests run it beside other roles.
//
// Start it, then Drain and destroy it; thread-safe otherwise. The store and the clock outlive it.
#ifndef PAGETIDE_SERVICES_ROUTER_ROLE_H_
#define PAGETIDE_SERVICES_ROUTER_ROLE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "core/page_store.h"
#include "core/router.h"
#include "rpc/server.h"
#include "services/model_catalog.h"

namespace pagetide {

class RouterRole {
 public:
  struct Options {
    // registry.liveness_ttl is set to six heartbeats.
    Router::Options router;
    RpcServer::Options server;
    absl::Duration heartbeat = absl::Milliseconds(500);
    // Root of the tenants' salts; the same at all routers and workers.
    std::string deployment_secret;
    std::string store_address;  // shown in lists
    ModelCatalog::Options models;
    // Threads for calls that need the store, and how many such calls may wait.
    int io_threads = 4;
    size_t io_queue = 1024;
    // INVALID_ARGUMENT names the field and the numbers.
    absl::Status Validate() const;
  };

  // Serves when it returns. `store` may be null: models then live as long as the process, and no
  // page is known to be stored. Watch of a store must ask its callback now and then, or the end
  // waits for it.
  static absl::StatusOr<std::unique_ptr<RouterRole>> Start(Options options, PageStore* store,
                                                           Clock* clock);
  // Drains at once if Drain was not called.
  ~RouterRole();
  RouterRole(const RouterRole&) = delete;
  RouterRole& operator=(const RouterRole&) = delete;

  // Health turns NOT_SERVING, workers' streams end, running calls get up to `timeout`. Idempotent.
  void Drain(absl::Duration timeout);

  // As clients dial it, with the real port.
  std::string address() const;
  // "host:port" of /metrics; empty when there is none.
  std::string metrics_address() const;
  Router& router();

 private:
  struct Parts;
  explicit RouterRole(std::unique_ptr<Parts> parts);
  const std::unique_ptr<Parts> parts_;
};

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_ROUTER_ROLE_H_
