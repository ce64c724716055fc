// pagetide-router: assigns sequences to workers.
//
// Prints "pagetide-router ready grpc=ADDRESS metrics=ADDRESS" on stdout when it serves. SIGTERM or
// SIGINT drains: health turns NOT_SERVING, workers' streams and running calls end, exit code 0.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/log.h"
#include "kvstore/remote_page_store.h"
#include "rpc/accept_loop.h"
#include "rpc/channel.h"
#include "rpc/process_tuning.h"
#include "rpc/signal.h"
#include "services/router_role.h"
#include "services/tenant.h"

namespace pagetide {
namespace {

struct Flags {
  std::vector<std::string> listen = {"127.0.0.1:7070"};
  std::string metrics_listen = "127.0.0.1:0";
  std::string store;
  std::string deployment_secret_file;
  std::string router_id = "router-0";
  std::string policy = std::string(PlacementPolicyNames().front());
  int heartbeat_milliseconds = 500;
  int drain_seconds = 30;
  bool insecure = false;
  std::string log_level = "info";
};

int Fail(absl::string_view action, const absl::Status& status) {
  std::fprintf(stderr, "pagetide-router: %s\n",
               absl::StrCat(action, ": ", status.ToString()).c_str());
  return 1;
}

// The development secret is known to everyone: keys made with it say nothing to a stranger only as
// long as no stranger can ask.
absl::Status CheckSecretIsPrivate(const Flags& flags) {
  if (!flags.deployment_secret_file.empty()) return absl::OkStatus();
  for (const std::string& text : flags.listen) {
    const auto address = ListenAddress::Parse(text);
    if (address.ok() && !address->is_loopback) {
      return absl::FailedPreconditionError(
          absl::StrCat("--listen ", text, " is not loopback: it needs --deployment-secret-file"));
    }
  }
  return absl::OkStatus();
}

int Serve(const Flags& flags, TerminationSignal* termination) {
  if (const absl::Status s = SetLogLevel(flags.log_level); !s.ok()) return Fail("--log-level", s);
  if (const absl::Status s = CheckSecretIsPrivate(flags); !s.ok()) return Fail("start", s);
  auto secret = LoadDeploymentSecret(flags.deployment_secret_file);
  if (!secret.ok()) return Fail("--deployment-secret-file", secret.status());

  std::unique_ptr<RemotePageStore> store;
  if (flags.store.empty()) {
    LogWarning("router", "no --store: models are forgotten at exit, stored pages are not found");
  } else {
    store = std::make_unique<RemotePageStore>(MakeChannel(flags.store));
  }
  RouterRole::Options options;
  options.router.router_id = flags.router_id;
  options.router.policy = flags.policy;
  options.server.addresses = flags.listen;
  options.server.metrics_address = flags.metrics_listen;
  options.server.allow_insecure = flags.insecure;
  options.heartbeat = absl::Milliseconds(flags.heartbeat_milliseconds);
  options.deployment_secret = *std::move(secret);
  options.store_address = flags.store;
  auto role = RouterRole::Start(std::move(options), store.get(), Clock::Real());
  if (!role.ok()) return Fail("start", role.status());

  const std::string metrics = (*role)->metrics_address();
  std::printf("pagetide-router ready grpc=%s metrics=%s\n", (*role)->address().c_str(),
              metrics.empty() ? "none" : metrics.c_str());
  std::fflush(stdout);
  termination->Wait();
  termination->RestoreDefault();
  LogInfo("router", "draining");
  (*role)->Drain(absl::Seconds(flags.drain_seconds));
  return 0;
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  pagetide::TerminationSignal termination;
  pagetide::TuneProcess();
  pagetide::Flags flags;
  CLI::App app{"Assigns sequences to the worker that can start them soonest."};
  app.add_option("--listen", flags.listen, "Addresses to serve gRPC on: HOST:PORT or unix:PATH")
      ->capture_default_str();
  app.add_option("--metrics-listen", flags.metrics_listen,
                 "HTTP address of /metrics and /healthz; empty: none")
      ->capture_default_str();
  app.add_option("--store", flags.store,
                 "Address of the page store, for models and stored pages; empty: none");
  app.add_option(
      "--deployment-secret-file", flags.deployment_secret_file,
      "File with the secret that tenants' salts are derived from, the same at all routers "
      "and workers. Empty: a fixed development secret, on loopback only");
  app.add_option("--router-id", flags.router_id, "Name of this router")->capture_default_str();
  app.add_option(
         "--policy", flags.policy,
         absl::StrCat("Placement policy: ", absl::StrJoin(pagetide::PlacementPolicyNames(), ", ")))
      ->capture_default_str();
  app.add_option("--heartbeat", flags.heartbeat_milliseconds,
                 "Milliseconds between reports of a worker; one that is silent for six is dead")
      ->check(CLI::Range(20, 10000))
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
