#include "cli/up_command.h"

#include <cstdlib>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/byte_size.h"
#include "base/status_macros.h"
#include "rpc/default_ports.h"
#include "rpc/process_tuning.h"
#include "rpc/signal.h"
#include "services/in_process.h"

namespace pagetide {
namespace {

struct UpFlags {
  std::string dir;
  int workers = 1;
  std::string pool_bytes = "1GiB";
  std::string store_capacity = "0";
  int router_port = kDefaultRouterPort;
  int store_port = kDefaultStorePort;
  int worker_port = kDefaultWorkerPort;
  int drain_seconds = 30;
  bool json = false;
};

// Where a person's data lies by default: XDG_DATA_HOME/pagetide.
std::string DefaultDir() {
  if (const char* data = std::getenv("XDG_DATA_HOME"); data != nullptr && *data != '\0') {
    return absl::StrCat(data, "/pagetide");
  }
  const char* home = std::getenv("HOME");
  return home == nullptr ? "pagetide-data" : absl::StrCat(home, "/.local/share/pagetide");
}

absl::Status Up(const UpFlags& flags, std::ostream& out) {
  TerminationSignal termination;  // before any thread starts
  TuneProcess();
  InProcess::Options options;
  options.dir = flags.dir.empty() ? DefaultDir() : flags.dir;
  options.num_workers = flags.workers;
  PT_ASSIGN_OR_RETURN(options.pool_bytes, ParseByteSize(flags.pool_bytes));
  PT_ASSIGN_OR_RETURN(options.store_capacity_bytes, ParseByteSize(flags.store_capacity));
  options.router_port = flags.router_port;
  options.store_port = flags.store_port;
  options.worker_port = flags.worker_port;
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<InProcess> deployment, InProcess::Start(options));
  if (flags.json) {
    out << nlohmann::json{{"router", deployment->router_address()},
                          {"workers", deployment->worker_addresses()},
                          {"store", deployment->store_address()},
                          {"metrics", deployment->metrics_address()},
                          {"worker_metrics", deployment->worker_metrics_addresses()},
                          {"store_metrics", deployment->store_metrics_address()},
                          {"dir", options.dir}}
        << std::endl;
  } else {
    out << "pagetide up ready router=" << deployment->router_address()
        << " workers=" << absl::StrJoin(deployment->worker_addresses(), ",")
        << " store=" << deployment->store_address() << " metrics=" << deployment->metrics_address()
        << " worker_metrics=" << absl::StrJoin(deployment->worker_metrics_addresses(), ",")
        << " store_metrics=" << deployment->store_metrics_address() << std::endl;
  }
  termination.Wait();
  termination.RestoreDefault();
  deployment->Drain(absl::Seconds(flags.drain_seconds));
  return absl::OkStatus();
}

}  // namespace

CommandRunner AddUpCommand(CLI::App& app) {
  // Shared by the flags' targets and the runner, which both outlive this call.
  const auto flags = std::make_shared<UpFlags>();
  CLI::App* const up =
      app.add_subcommand("up", "Run router, workers and store in one process on loopback");
  up->add_option("--dir", flags->dir, "Folder of the store (default: the user's data folder)");
  up->add_option("--workers", flags->workers, "Number of workers")->capture_default_str();
  up->add_option("--pool-bytes", flags->pool_bytes, "Bytes of frames of each worker")
      ->capture_default_str();
  up->add_option("--store-capacity", flags->store_capacity,
                 "Physical bytes that the store may take (0: bounded by the disk)")
      ->capture_default_str();
  up->add_option("--router-port", flags->router_port, "gRPC port of the router (0: any)")
      ->capture_default_str();
  up->add_option("--store-port", flags->store_port, "gRPC port of the store (0: any)")
      ->capture_default_str();
  up->add_option("--worker-port", flags->worker_port, "gRPC port of the first worker (0: any)")
      ->capture_default_str();
  up->add_option("--drain-seconds", flags->drain_seconds, "How long a stop waits for calls")
      ->capture_default_str();
  up->add_flag("--json", flags->json, "Print the addresses as JSON");
  return [flags](std::ostream& out) { return Up(*flags, out); };
}

}  // namespace pagetide
