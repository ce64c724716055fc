// InProcess: a whole deployment in this process on loopback: one router, workers, and one embedded
// store that all share and that is also served as pagetide-store would. For `pagetide up`, demos
// and tests.
//
// Start, use, Drain, destroy. Thread-safe otherwise.
#ifndef PAGETIDE_SERVICES_IN_PROCESS_H_
#define PAGETIDE_SERVICES_IN_PROCESS_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/byte_size.h"

namespace pagetide {

class InProcess {
 public:
  struct Options {
    // Folder of the store and of the workers' local sockets; made if absent.
    std::string dir;
    int num_workers = 1;
    uint64_t pool_bytes = kGiB;         // of each worker
    uint64_t model_pool_bytes = 0;      // 0: the first model takes a worker's whole pool
    uint64_t store_capacity_bytes = 0;  // 0: bounded by the disk
    bool write_through = true;
    // Ports on 127.0.0.1; 0: any free one. Worker i listens on worker_port + i.
    int router_port = 0;
    int store_port = 0;
    int worker_port = 0;
    // How long Start waits for the workers to be known to the router.
    absl::Duration attach_timeout = absl::Seconds(10);
    // INVALID_ARGUMENT names the field and the numbers.
    absl::Status Validate() const;
  };

  // Ready for calls when it returns: every worker is attached.
  static absl::StatusOr<std::unique_ptr<InProcess>> Start(const Options& options);
  ~InProcess();
  InProcess(const InProcess&) = delete;
  InProcess& operator=(const InProcess&) = delete;

  // Router, then workers, then the store. Idempotent.
  void Drain(absl::Duration timeout);

  std::string router_address() const;
  std::string store_address() const;
  std::vector<std::string> worker_addresses() const;
  // "host:port" of /metrics: the router's, the store's, and each worker's.
  std::string metrics_address() const;
  std::string store_metrics_address() const;
  std::vector<std::string> worker_metrics_addresses() const;

 private:
  struct Parts;
  explicit InProcess(std::unique_ptr<Parts> parts);
  const std::unique_ptr<Parts> parts_;
};

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_IN_PROCESS_H_
