// Fleet: a store, a router and two workers as real processes on loopback, in a folder of their own
// that goes with them. For one thread; start it before the first gRPC call of the process (fork).
#ifndef PAGETIDE_CLI_FLEET_H_
#define PAGETIDE_CLI_FLEET_H_

#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "cli/program.h"

namespace pagetide {

struct FleetOptions {
  // Folder of the programs; empty: where this program lies.
  std::string program_dir;
  int num_workers = 2;
  // Frames of each worker, in bytes.
  uint64_t pool_bytes = 0;
  // Workers do not compare checksums: for showing that wrong bytes would be noticed.
  bool unsafe_skip_verify = false;
};

class Fleet {
 public:
  // Returns when the router knows all workers. DEADLINE_EXCEEDED after a minute.
  static absl::StatusOr<std::unique_ptr<Fleet>> Start(const FleetOptions& options);
  // Kills what still runs and removes the folder.
  ~Fleet();
  Fleet(const Fleet&) = delete;
  Fleet& operator=(const Fleet&) = delete;

  std::string router_address() const { return router_->Address("grpc"); }
  std::string store_address() const { return store_->Address("grpc"); }
  // Where the store keeps its files.
  std::string store_dir() const { return dir_ + "/store"; }
  size_t num_workers() const { return workers_.size(); }
  static std::string WorkerId(size_t index);
  Program& worker(size_t index) { return *workers_[index]; }

  // SIGTERM to all; the first that does not end with exit code 0 is the error.
  absl::Status Stop();

 private:
  explicit Fleet(std::string dir) : dir_(std::move(dir)) {}

  const std::string dir_;
  std::unique_ptr<Program> store_;
  std::unique_ptr<Program> router_;
  std::vector<std::unique_ptr<Program>> workers_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CLI_FLEET_H_
