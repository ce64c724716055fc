// pagetide-worker: keeps the hot pages of sequences in frames and serves them over gRPC.
//
// Prints "pagetide-worker ready grpc=ADDRESS metrics=ADDRESS" on stdout once it serves. SIGTERM or
// SIGINT drains and ends it with exit code 0; a second one ends it at once.
#include <signal.h>
#include <unistd.h>

#include <CLI/CLI.hpp>
#include <atomic>
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
  PT_RETURN_IF_ERROR(SetLogLevel(config.has_log_level() ? config.log_level() : "info"));
  PT_ASSIGN_OR_RETURN(WorkerRole::Options options, WorkerOptionsFromConfig(config));
  // A router that drains this worker ends it the way an operator does, once: from the first signal
  // on another one ends the process at once.
  const auto is_draining = std::make_shared<std::atomic_flag>();  // shared with the link's thread
  options.on_drain_asked = [is_draining] {
    if (!is_draining->test_and_set()) kill(getpid(), SIGTERM);
  };
  PT_ASSIGN_OR_RETURN(const WorkerStore store, OpenWorkerStore(config));
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<WorkerRole> role,
                      WorkerRole::Start(options, store.get(), Clock::Real()));
  std::printf("pagetide-worker ready grpc=%s metrics=%s\n", role->address().c_str(),
              role->metrics_address().c_str());
  std::fflush(stdout);
  const int signal = termination->Wait();
  is_draining->test_and_set();
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
  pagetide::AddConfigFlags(&app, &flags, pagetide::WorkerFlagHelp());
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = pagetide::Run(config_path, flags, &termination);
  if (status.ok()) return 0;
  std::fprintf(stderr, "pagetide-worker: %s\n", std::string(status.message()).c_str());
  return 1;
}
