// pagetide-router: assigns sequences to workers.
//
// Prints "pagetide-router ready grpc=ADDRESS metrics=ADDRESS" on stdout when it serves. SIGTERM or
// SIGINT drains: health turns NOT_SERVING, workers' streams and running calls end, exit code 0.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/time/time.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "kvstore/remote_page_store.h"
#include "rpc/channel.h"
#include "rpc/process_tuning.h"
#include "rpc/signal.h"
#include "services/config_flags.h"
#include "services/router_config.h"
#include "services/router_role.h"
#include "services/text_config.h"

namespace pagetide {
namespace {

constexpr uint32_t kDefaultDrainSeconds = 30;

absl::Status Run(const std::string& config_path, const config::RouterConfig& flags,
                 TerminationSignal* termination) {
  config::RouterConfig file;
  if (!config_path.empty()) PT_RETURN_IF_ERROR(ReadTextConfig(config_path, &file));
  const config::RouterConfig config = MergeRouterConfig(file, flags);
  PT_RETURN_IF_ERROR(SetLogLevel(config.has_log_level() ? config.log_level() : "info"));
  PT_ASSIGN_OR_RETURN(RouterRole::Options options, RouterOptionsFromConfig(config));
  std::unique_ptr<RemotePageStore> store;
  if (options.store_address.empty()) {
    LogWarning("router", "no --store: models are forgotten at exit, stored pages are not found");
  } else {
    store = std::make_unique<RemotePageStore>(MakeChannel(options.store_address));
  }
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<RouterRole> role,
                      RouterRole::Start(std::move(options), store.get(), Clock::Real()));
  const std::string metrics = role->metrics_address();
  std::printf("pagetide-router ready grpc=%s metrics=%s\n", role->address().c_str(),
              metrics.empty() ? "none" : metrics.c_str());
  std::fflush(stdout);
  termination->Wait();
  termination->RestoreDefault();
  LogInfo("router", "draining");
  role->Drain(
      absl::Seconds(config.has_drain_seconds() ? config.drain_seconds() : kDefaultDrainSeconds));
  return absl::OkStatus();
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  pagetide::TerminationSignal termination;  // before any thread starts
  pagetide::TuneProcess();
  CLI::App app{"PageTide router: assigns sequences to the worker that can start them soonest"};
  std::string config_path;
  app.add_option("--config", config_path,
                 "Configuration file (text format of proto/pagetide/config/router.proto)");
  pagetide::config::RouterConfig flags;
  pagetide::AddConfigFlags(&app, &flags, pagetide::RouterFlagHelp());
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = pagetide::Run(config_path, flags, &termination);
  if (status.ok()) return 0;
  std::fprintf(stderr, "pagetide-router: %s\n", std::string(status.message()).c_str());
  return 1;
}
