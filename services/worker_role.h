// WorkerRole: a whole worker in this process: device, hosts, gRPC services, local data plane, store
// lease, links to routers. pagetide-worker runs one; `pagetide up` and tests run it beside other
// roles.
//
// Start it, then Drain and destroy it; thread-safe otherwise. The store and the clock outlive it.
#ifndef PAGETIDE_SERVICES_WORKER_ROLE_H_
#define PAGETIDE_SERVICES_WORKER_ROLE_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "core/page_store.h"
#include "rpc/server.h"
#include "worker/cpu_device.h"
#include "worker/cuda_device.h"
#include "worker/engine_pools.h"
#include "worker/frame_link.h"
#include "worker/group_mailbox.h"
#include "worker/local_plane.h"
#include "worker/session_service.h"
#include "worker/worker.h"

namespace pagetide {

class WorkerRole {
 public:
  struct Options {
    Worker::Options worker;
    RpcServer::Options server;
    // Address that routers hand to clients; empty: the first that was bound.
    std::string advertise;
    // Of the pools that frames lie in: what ChooseDevice takes, empty for the CPU device.
    std::string device;
    CpuDevice::Options cpu_device;
    CudaDeviceOptions cuda_device;
    // For tests, in place of these three.
    std::function<std::unique_ptr<Device>()> make_device;
    // Pages of transfers between workers go from GPU to GPU, where both do so: over NCCL, or over
    // what make_link makes (for tests).
    bool link_gpus = false;
    std::function<std::unique_ptr<FastLink>()> make_link;
    FrameLink::Options frame_link;
    // No local data plane when local_plane.socket_path is empty.
    LocalPlane::Options local_plane;
    // The incarnation is the worker's.
    EnginePools::Options engine_pools;
    // Addresses of routers to attach to.
    std::vector<std::string> routers;
    // The engine whose ranks this worker and others serve together, and which of them is this
    // one's: for routers, which place sharded sequences on whole groups. Empty: none.
    std::string shard_group;
    uint32_t shard_rank = 0;
    // A router asks this worker to drain and end; from a thread of the link. May be null.
    std::function<void()> on_drain_asked;
    // Threads that spill and restore, and how many such tasks may wait.
    int io_threads = 4;
    size_t io_queue = 4096;
    absl::Duration store_lease_ttl = absl::Seconds(5);
    SessionServiceImpl::FileLimits file_limits;
  };

  // Serves when it returns. `store` may be null. A worker.incarnation of 0 is replaced by a random
  // one.
  static absl::StatusOr<std::unique_ptr<WorkerRole>> Start(Options options, PageStore* store,
                                                           Clock* clock);
  // Drains at once if Drain was not called.
  ~WorkerRole();
  WorkerRole(const WorkerRole&) = delete;
  WorkerRole& operator=(const WorkerRole&) = delete;

  // Health turns NOT_SERVING, routers are told, running calls get up to `timeout`. Idempotent.
  void Drain(absl::Duration timeout);

  // As clients dial it, with the real port.
  std::string address() const;
  // "host:port" of /metrics; empty when there is none.
  std::string metrics_address() const;
  Worker& worker();
  // Where groups of which this worker is a member get what others send (worker/grpc_collective.h).
  GroupMailbox& group_mailbox();
  // Routers that have welcomed this worker and have not lost it since.
  size_t num_attached_routers() const;

 private:
  struct Parts;
  explicit WorkerRole(std::unique_ptr<Parts> parts);
  const std::unique_ptr<Parts> parts_;
};

// A random number that names one life of a process; never 0.
uint64_t RandomIncarnation();

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_WORKER_ROLE_H_
