// pagetide-store: the page store that all nodes share, over gRPC.
//
// Prints "pagetide-store ready grpc=ADDRESS metrics=ADDRESS" on stdout when it serves. SIGTERM or
// SIGINT drains: health turns NOT_SERVING, running calls end, exit code 0.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <string>

#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/process_tuning.h"
#include "rpc/signal.h"
#include "services/config_flags.h"
#include "services/store_config.h"
#include "services/store_role.h"
#include "services/text_config.h"

namespace pagetide {
namespace {

absl::Status Run(const std::string& config_path, const config::StoreConfig& flags,
                 TerminationSignal* termination) {
  config::StoreConfig file;
  if (!config_path.empty()) PT_RETURN_IF_ERROR(ReadTextConfig(config_path, &file));
  const config::StoreConfig config = MergeStoreConfig(file, flags);
  PT_RETURN_IF_ERROR(SetLogLevel(config.has_log_level() ? config.log_level() : "info"));
  PT_ASSIGN_OR_RETURN(const StoreOptions options, StoreOptionsFromConfig(config));
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<StoreRole> role,
                      StoreRole::Start(options.role, Clock::Real()));
  const std::string metrics = role->metrics_address();
  std::printf("pagetide-store ready grpc=%s metrics=%s\n", role->address().c_str(),
              metrics.empty() ? "none" : metrics.c_str());
  std::fflush(stdout);
  termination->Wait();
  termination->RestoreDefault();
  LogInfo("store", "draining");
  role->Drain(options.drain_timeout);
  return absl::OkStatus();
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  pagetide::TerminationSignal termination;  // before any thread starts
  pagetide::TuneProcess();
  CLI::App app{"PageTide store: the page store that all nodes share"};
  std::string config_path;
  app.add_option("--config", config_path,
                 "Configuration file (text format of proto/pagetide/config/store.proto)");
  pagetide::config::StoreConfig flags;
  pagetide::AddConfigFlags(&app, &flags, pagetide::StoreFlagHelp());
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = pagetide::Run(config_path, flags, &termination);
  if (status.ok()) return 0;
  std::fprintf(stderr, "pagetide-store: %s\n", std::string(status.message()).c_str());
  return 1;
}
