// pagetide-store: the page store that all nodes share, over gRPC.
//
// Prints "pagetide-store ready grpc=ADDRESS metrics=ADDRESS" on stdout when it serves. SIGTERM or
// SIGINT drains: health turns NOT_SERVING, running calls end, exit code 0.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/byte_size.h"
#include "base/log.h"
#include "kvstore/instrumented_page_store.h"
#include "kvstore/rocksdb_page_store.h"
#include "rpc/metrics.h"
#include "rpc/process_tuning.h"
#include "rpc/server.h"
#include "rpc/signal.h"
#include "services/page_store_service.h"

namespace pagetide {
namespace {

struct Flags {
  std::vector<std::string> listen = {"127.0.0.1:7301"};
  std::string metrics_listen = "127.0.0.1:0";
  std::string data_dir;
  std::string capacity = "0";
  std::string segment_size = "0";
  std::string min_free = "128MiB";
  std::string scrub_rate = "4MiB";
  std::string efficacy_alarm = "16GiB";
  int threads = 32;
  int drain_seconds = 30;
  bool insecure = false;
  std::string log_level = "info";
};

int Fail(absl::string_view action, const absl::Status& status) {
  std::fprintf(stderr, "pagetide-store: %s\n",
               absl::StrCat(action, ": ", status.ToString()).c_str());
  return 1;
}

int Serve(const Flags& flags, TerminationSignal* termination) {
  if (const absl::Status s = SetLogLevel(flags.log_level); !s.ok()) return Fail("--log-level", s);
  RocksdbPageStoreOptions options;
  options.dir = flags.data_dir;
  for (const auto& [flag, text, out] :
       {std::tuple("--capacity", &flags.capacity, &options.capacity_bytes),
        std::tuple("--segment-size", &flags.segment_size, &options.segment_bytes),
        std::tuple("--min-free", &flags.min_free, &options.min_free_bytes),
        std::tuple("--scrub-rate", &flags.scrub_rate, &options.scrub_bytes_per_second),
        std::tuple("--efficacy-alarm", &flags.efficacy_alarm, &options.efficacy_alarm_bytes)}) {
    const absl::StatusOr<uint64_t> bytes = ParseByteSize(*text);
    if (!bytes.ok()) return Fail(flag, bytes.status());
    *out = *bytes;
  }
  auto store = RocksdbPageStore::Open(options);
  if (!store.ok()) return Fail("open the store", store.status());

  const auto metrics = std::make_shared<PrometheusMetrics>();
  InstrumentedPageStore instrumented(store->get(), metrics.get());
  PageStoreServiceImpl service(&instrumented, Clock::Real(), {.num_threads = flags.threads});
  RpcServer::Options server_options;
  server_options.addresses = flags.listen;
  server_options.metrics_address = flags.metrics_listen;
  server_options.allow_insecure = flags.insecure;
  auto server = RpcServer::Create(server_options, {&service}, metrics);
  if (!server.ok()) return Fail("serve", server.status());
  (*server)->OnDrain([&service] { service.EndStreams(); });

  const std::string metrics_host = flags.metrics_listen.substr(0, flags.metrics_listen.rfind(':'));
  std::printf("pagetide-store ready grpc=%s metrics=%s\n", (*server)->addresses()[0].c_str(),
              (*server)->metrics_port() == 0
                  ? "none"
                  : absl::StrCat(metrics_host, ":", (*server)->metrics_port()).c_str());
  std::fflush(stdout);

  bool was_failed = false;
  while (!termination->WaitFor(absl::Seconds(1)).has_value()) {
    instrumented.PublishStats();
    // A store that lost its disk still answers reads; health says that it takes no writes.
    const auto stats = (*store)->GetStats(MonotonicTime::InfiniteFuture());
    if (stats.ok() && stats->state == "failed" && !was_failed) {
      was_failed = true;
      (*server)->SetServing("pagetide.v1.PageStoreService", false);
    }
  }
  termination->RestoreDefault();
  LogInfo("store", "draining");
  (*server)->Drain(absl::Seconds(flags.drain_seconds));
  return 0;
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  pagetide::TerminationSignal termination;
  pagetide::TuneProcess();
  pagetide::Flags flags;
  CLI::App app{"The page store that all nodes share."};
  app.add_option("--listen", flags.listen, "Addresses to serve gRPC on: HOST:PORT or unix:PATH")
      ->capture_default_str();
  app.add_option("--metrics-listen", flags.metrics_listen,
                 "HTTP address of /metrics and /healthz; empty: none")
      ->capture_default_str();
  app.add_option("--data-dir", flags.data_dir, "Folder of the store; made if absent")->required();
  app.add_option("--capacity", flags.capacity,
                 "Bytes on disk, such as 200GiB; beyond it what no manifest holds is evicted, by "
                 "recency and cost. 0: bounded by the disk")
      ->capture_default_str();
  app.add_option("--segment-size", flags.segment_size,
                 "Length of a segment file; 0: a sixteenth of the capacity, 1MiB to 64MiB")
      ->capture_default_str();
  app.add_option("--min-free", flags.min_free, "Refuse writes while the disk has less than this")
      ->capture_default_str();
  app.add_option(
         "--scrub-rate", flags.scrub_rate,
         "Bytes a second that the background verifies, each page at most once a day; 0: none")
      ->capture_default_str();
  app.add_option("--efficacy-alarm", flags.efficacy_alarm,
                 "Raise the efficacy alarm when this much was put since a page was last read; 0: "
                 "never")
      ->capture_default_str();
  app.add_option("--threads", flags.threads, "Threads that wait for the disk")
      ->check(CLI::Range(1, 1024))
      ->capture_default_str();
  app.add_option("--drain-seconds", flags.drain_seconds,
                 "Longest wait for running calls at the end")
      ->check(CLI::Range(0, 3600))
      ->capture_default_str();
  app.add_flag("--insecure", flags.insecure, "Allow plaintext on addresses that are not loopback");
  app.add_option("--log-level", flags.log_level, "debug, info, warning or error")
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  return pagetide::Serve(flags, &termination);
}
