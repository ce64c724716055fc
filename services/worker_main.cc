// pagetide-worker: keeps the hot pages of sequences in frames and serves them over gRPC.
//
// Prints "pagetide-worker ready grpc=ADDRESS metrics=ADDRESS" on stdout once it serves. SIGTERM or
// SIGINT drains and ends it with exit code 0; a second one ends it at once.
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/process_tuning.h"
#include "rpc/signal.h"
#include "services/config_flags.h"
#include "services/text_config.h"
#include "services/worker_config.h"
#include "services/worker_role.h"

namespace pagetide {
namespace {

constexpr uint32_t kDefaultDrainSeconds = 30;

absl::Status Run(const std::string& config_path, const config::WorkerConfig& flags,
                 TerminationSignal* termination) {
  config::WorkerConfig file;
  if (!config_path.empty()) PT_RETURN_IF_ERROR(ReadTextConfig(config_path, &file));
  const config::WorkerConfig config = MergeWorkerConfig(file, flags);
  PT_ASSIGN_OR_RETURN(WorkerRole::Options options, WorkerOptionsFromConfig(config));
  // A router that drains this worker ends it the way an operator does.
  options.on_drain_asked = [] { kill(getpid(), SIGTERM); };
  PT_ASSIGN_OR_RETURN(const WorkerStore store, OpenWorkerStore(config));
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<WorkerRole> role,
                      WorkerRole::Start(options, store.get(), Clock::Real()));
  std::printf("pagetide-worker ready grpc=%s metrics=%s\n", role->address().c_str(),
              role->metrics_address().c_str());
  std::fflush(stdout);
  const int signal = termination->Wait();
  termination->RestoreDefault();
  const uint32_t seconds =
      config.has_drain_seconds() ? config.drain_seconds() : kDefaultDrainSeconds;
  LogInfo("worker", "signal ", signal, ": drains for at most ", seconds, " s");
  role->Drain(absl::Seconds(seconds));
  return absl::OkStatus();
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  pagetide::TerminationSignal termination;  // before any thread starts
  pagetide::TuneProcess();
  CLI::App app{"PageTide worker: hot KV pages of sequences, over gRPC"};
  std::string config_path;
  app.add_option("--config", config_path,
                 "Configuration file (text format of proto/pagetide/config/worker.proto)");
  pagetide::config::WorkerConfig flags;
  pagetide::AddConfigFlags(
      &app, &flags,
      {{"worker_id", "Stable name of this worker's place"},
       {"listen", "gRPC address, host:port or unix:/path (repeatable; default 127.0.0.1:0)"},
       {"advertise", "Address that routers hand to clients (default: the first of --listen)"},
       {"local_socket", "Unix socket of the local data plane (default: none)"},
       {"local_staging_bytes", "Staging memory a local client (default 64MiB)"},
       {"store", "Address of the pagetide-store that all workers share"},
       {"store_dir", "Folder of an embedded store instead"},
       {"router", "Address of a router to attach to (repeatable)"},
       {"pool_bytes", "Bytes of frames for all models (default 1GiB)"},
       {"model_pool_bytes", "Bytes of frames for each model (default: the first takes all)"},
       {"write_through", "Put pages into the store as soon as they are full (default true)"},
       {"spill_high_watermark", "Share of frames in use at which spilling starts (default 0.9)"},
       {"spill_low_watermark", "Share of frames in use at which spilling stops (default 0.75)"},
       {"metrics_listen", "HTTP address of /metrics and /healthz (default 127.0.0.1:0)"},
       {"deployment_secret_file", "File with the secret that tenant salts are derived from"},
       {"insecure", "Serve without TLS on addresses that are not loopback"},
       {"io_threads", "Threads that spill and restore (default 4)"},
       {"import_dir", "Folder where files that are imported are gathered (default /var/tmp)"},
       {"import_max_bytes", "Largest file that is imported (default 64GiB)"},
       {"drain_seconds", "How long a stop waits for running calls (default 30)"},
       {"reserve_memory", "Take the pool's memory when a model is loaded (default false)"},
       {"unsafe_skip_verify", "Tests only: do not compare checksums on restore"}});
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = pagetide::Run(config_path, flags, &termination);
  if (status.ok()) return 0;
  std::fprintf(stderr, "pagetide-worker: %s\n", std::string(status.message()).c_str());
  return 1;
}
