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
#include "rpc/default_ports.h"
#include "services/router_role.h"
#include "services/store_role.h"
#include "services/tenant.h"
#include "services/worker_role.h"

namespace pagetide {
namespace {

constexpr int kMaxWorkers = 64;

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
  // Port 0 is any free one, so that none of them meets another.
  for (int port : {router_port, store_port}) {
    if (worker_port != 0 && port >= worker_port && port < worker_port + num_workers) {
      return absl::InvalidArgumentError(absl::StrCat("port ", port, " is taken by one of the ",
                                                     num_workers, " workers, which listen on ",
                                                     worker_port, " and up"));
    }
  }
  if (worker_port + num_workers - 1 > 65535) {
    return absl::InvalidArgumentError(absl::StrCat("worker_port ", worker_port, " leaves ",
                                                   65536 - worker_port, " ports for ", num_workers,
                                                   " workers"));
  }
  return absl::OkStatus();
}

// Members are destroyed in reverse order: workers and router before the store they stand on.
struct InProcess::Parts {
  std::unique_ptr<StoreRole> store;
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
  StoreRole::Options store_options;
  store_options.engine.dir = absl::StrCat(options.dir, "/store");
  store_options.engine.capacity_bytes = options.store_capacity_bytes;
  store_options.server.addresses = {LoopbackAddress(options.store_port)};
  PT_ASSIGN_OR_RETURN(parts->store, StoreRole::Start(store_options, Clock::Real()));
  PageStore* const store = parts->store->store();

  PT_ASSIGN_OR_RETURN(const std::string secret, LoadDeploymentSecret("", {}));
  RouterRole::Options router;
  router.server.addresses = {LoopbackAddress(options.router_port)};
  router.deployment_secret = secret;
  router.store_address = parts->store->address();
  PT_ASSIGN_OR_RETURN(parts->router, RouterRole::Start(std::move(router), store, Clock::Real()));

  for (int i = 0; i < options.num_workers; ++i) {
    WorkerRole::Options worker;
    worker.worker.id = absl::StrCat("worker-", i + 1);
    worker.worker.pool_bytes = options.pool_bytes;
    worker.worker.model_pool_bytes = options.model_pool_bytes;
    worker.worker.host.write_through = options.write_through;
    worker.worker.deployment_secret = secret;
    worker.server.addresses = {
        LoopbackAddress(options.worker_port == 0 ? 0 : options.worker_port + i)};
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
  parts_->store->Drain(timeout);
}

std::string InProcess::router_address() const {
  return parts_->router->address();
}

std::string InProcess::store_address() const {
  return parts_->store->address();
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

std::string InProcess::store_metrics_address() const {
  return parts_->store->metrics_address();
}

std::vector<std::string> InProcess::worker_metrics_addresses() const {
  std::vector<std::string> addresses;
  for (const std::unique_ptr<WorkerRole>& worker : parts_->workers) {
    addresses.push_back(worker->metrics_address());
  }
  return addresses;
}

}  // namespace pagetide
