// pagetide-store: the page store that all nodes share, over gRPC.
//
// Prints "pagetide-store ready grpc=ADDRESS metrics=ADDRESS" on stdout when it serves. SIGTERM or
// SIGINT drains: health turns NOT_SERVING, running calls end, exit code 0.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <string>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "kvstore/instrumented_page_store.h"
#include "kvstore/rocksdb_page_store.h"
#include "rpc/metrics.h"
#include "rpc/process_tuning.h"
#include "rpc/server.h"
#include "rpc/signal.h"
#include "services/admin_common.h"
#include "services/config_flags.h"
#include "services/page_store_service.h"
#include "services/store_config.h"
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
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<RocksdbPageStore> store,
                      RocksdbPageStore::Open(options.engine));

  // Shared with the HTTP port's scrapes.
  const auto metrics = std::make_shared<PrometheusMetrics>();
  InstrumentedPageStore instrumented(store.get(), metrics.get());
  PageStoreServiceImpl service(&instrumented, Clock::Real(), options.service);
  AdminServiceCommon admin("store", {"rocksdb", "segments"}, metrics.get());
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<RpcServer> server,
                      RpcServer::Create(options.server, {&service, &admin}, metrics));
  server->OnDrain([&service] { service.EndStreams(); });

  const std::string& listen = options.server.metrics_address;
  std::printf(
      "pagetide-store ready grpc=%s metrics=%s\n", server->addresses()[0].c_str(),
      server->metrics_port() == 0
          ? "none"
          : absl::StrCat(listen.substr(0, listen.rfind(':')), ":", server->metrics_port()).c_str());
  std::fflush(stdout);

  bool was_failed = false;
  while (!termination->WaitFor(absl::Seconds(1)).has_value()) {
    instrumented.PublishStats();
    // A store that lost its disk still answers reads; health says that it takes no writes.
    const auto stats = store->GetStats(MonotonicTime::InfiniteFuture());
    if (stats.ok() && stats->state == "failed" && !was_failed) {
      was_failed = true;
      server->SetServing("pagetide.v1.PageStoreService", false);
    }
  }
  termination->RestoreDefault();
  LogInfo("store", "draining");
  server->Drain(options.drain_timeout);
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
  pagetide::AddConfigFlags(
      &app, &flags,
      {{"listen", "gRPC address, host:port or unix:/path (repeatable; default 127.0.0.1:7090)"},
       {"metrics_listen", "HTTP address of /metrics and /healthz (default 127.0.0.1:0)"},
       {"insecure", "Serve without TLS on addresses that are not loopback"},
       {"data_dir", "Folder of the store; made if absent"},
       {"capacity",
        "Bytes on disk, such as 200GiB; beyond it what no manifest holds is evicted, by recency "
        "and cost (default 0: bounded by the disk)"},
       {"segment_size",
        "Length of a segment file (default 0: a sixteenth of the capacity, 1MiB to 64MiB)"},
       {"min_free", "Refuse puts while the disk has less than this (default 128MiB)"},
       {"scrub_rate",
        "Bytes a second that the background verifies, each page at most once a day; 0: none "
        "(default 4MiB)"},
       {"efficacy_alarm",
        "Raise the efficacy alarm when this much was put since a page was last read; 0: never "
        "(default 16GiB)"},
       {"compression",
        "How page bodies are stored: none, lz4 or zstd; lossless, a page stays raw where it does "
        "not "
        "pay (default none)"},
       {"threads", "Threads that wait for the disk (default 32)"},
       {"drain_seconds", "How long a stop waits for running calls (default 30)"},
       {"log_level", "debug, info (default), warning or error"}});
  CLI11_PARSE(app, argc, argv);
  const absl::Status status = pagetide::Run(config_path, flags, &termination);
  if (status.ok()) return 0;
  std::fprintf(stderr, "pagetide-store: %s\n", std::string(status.message()).c_str());
  return 1;
}
