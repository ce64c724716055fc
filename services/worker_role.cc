#include "services/worker_role.h"

#include <sys/random.h>

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/executor.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/metrics.h"
#include "rpc/model_codec.h"
#include "worker/cpu_device.h"
#include "worker/prefix_service.h"
#include "worker/request_memos.h"
#include "worker/sequence_edit_service.h"
#include "worker/sequence_service.h"
#include "worker/store_lease.h"
#include "worker/worker_admin_service.h"

namespace pagetide {

uint64_t RandomIncarnation() {
  uint64_t number = 0;
  while (number == 0) {
    if (getrandom(&number, sizeof(number), 0) != sizeof(number)) number = 0;
  }
  return number;
}

// Members are destroyed in reverse order: first what calls, last what is called.
struct WorkerRole::Parts {
  std::string metrics_host;
  std::string advertise;
  CpuDevice device;
  std::shared_ptr<PrometheusMetrics> metrics = std::make_shared<PrometheusMetrics>();
  std::unique_ptr<ThreadPoolExecutor> io;
  std::unique_ptr<Worker> worker;
  std::unique_ptr<StoreLeaseKeeper> store_lease;
  std::unique_ptr<LocalPlane> local_plane;
  std::unique_ptr<RequestMemos> memos;
  std::unique_ptr<PrefixServiceImpl> prefix_service;
  std::unique_ptr<SequenceServiceImpl> sequence_service;
  std::unique_ptr<SequenceEditServiceImpl> sequence_edit_service;
  std::unique_ptr<WorkerAdminService> admin_service;
  std::unique_ptr<RpcServer> server;
};

absl::StatusOr<std::unique_ptr<WorkerRole>> WorkerRole::Start(Options options, PageStore* store,
                                                              Clock* clock) {
  auto parts = std::make_unique<Parts>();
  if (options.worker.incarnation == 0) options.worker.incarnation = RandomIncarnation();
  if (options.io_threads < 1 || options.io_threads > 256) {
    return absl::InvalidArgumentError(
        absl::StrCat("io_threads is ", options.io_threads, ", must be 1 to 256"));
  }
  parts->io = std::make_unique<ThreadPoolExecutor>(ThreadPoolExecutor::Options{
      .name = "worker-io", .num_threads = options.io_threads, .max_queue = options.io_queue});
  const std::string worker_id = options.worker.id;
  PT_ASSIGN_OR_RETURN(parts->worker,
                      Worker::Create(std::move(options.worker), {.device = &parts->device,
                                                                 .store = store,
                                                                 .io = parts->io.get(),
                                                                 .clock = clock,
                                                                 .metrics = parts->metrics.get(),
                                                                 .parse_model = ParseModelSpec}));
  Worker* const worker = parts->worker.get();
  if (!options.local_plane.socket_path.empty()) {
    PT_ASSIGN_OR_RETURN(parts->local_plane, LocalPlane::Create(options.local_plane, worker));
  }
  LocalPlane* const local_plane = parts->local_plane.get();
  parts->memos = std::make_unique<RequestMemos>(RequestMemos::Options(), clock);
  parts->prefix_service = std::make_unique<PrefixServiceImpl>(worker);
  parts->sequence_service =
      std::make_unique<SequenceServiceImpl>(worker, parts->memos.get(), local_plane);
  parts->sequence_edit_service =
      std::make_unique<SequenceEditServiceImpl>(worker, parts->memos.get());
  parts->admin_service = std::make_unique<WorkerAdminService>(worker, local_plane);
  if (store != nullptr) {
    parts->store_lease = std::make_unique<StoreLeaseKeeper>(
        StoreLeaseKeeper::Options{.name = absl::StrCat("worker/", worker_id),
                                  .incarnation = worker->incarnation(),
                                  .ttl = options.store_lease_ttl},
        store, clock);
    parts->store_lease->Start();
  }
  worker->Start();
  PT_ASSIGN_OR_RETURN(
      parts->server,
      RpcServer::Create(options.server,
                        {parts->prefix_service.get(), parts->sequence_service.get(),
                         parts->sequence_edit_service.get(), parts->admin_service.get()},
                        parts->metrics));
  parts->advertise =
      options.advertise.empty() ? parts->server->addresses().front() : options.advertise;
  const std::string& metrics_listen = options.server.metrics_address;
  parts->metrics_host = metrics_listen.substr(0, metrics_listen.rfind(':'));
  LogInfo("worker", "worker ", worker->id(), " serves at ", parts->advertise, ", incarnation ",
          absl::Hex(worker->incarnation(), absl::kZeroPad16));
  return std::unique_ptr<WorkerRole>(new WorkerRole(std::move(parts)));
}

WorkerRole::WorkerRole(std::unique_ptr<Parts> parts) : parts_(std::move(parts)) {}

WorkerRole::~WorkerRole() {
  Drain(absl::ZeroDuration());
  parts_->server.reset();
  parts_->local_plane.reset();
  parts_->sequence_service.reset();
  parts_->worker->Stop();
}

void WorkerRole::Drain(absl::Duration timeout) {
  parts_->server->Drain(timeout);
}

std::string WorkerRole::address() const {
  return parts_->advertise;
}

std::string WorkerRole::metrics_address() const {
  const int port = parts_->server->metrics_port();
  return port == 0 ? std::string() : absl::StrCat(parts_->metrics_host, ":", port);
}

Worker& WorkerRole::worker() {
  return *parts_->worker;
}

}  // namespace pagetide
