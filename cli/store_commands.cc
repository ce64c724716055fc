#include "cli/store_commands.h"

#include <grpcpp/client_context.h>

#include <chrono>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/byte_size.h"
#include "base/status_macros.h"
#include "cli/output.h"
#include "pagetide/v1/page_store.grpc.pb.h"
#include "pagetide/v1/router.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/default_ports.h"
#include "rpc/status_mapping.h"

namespace pagetide {
namespace {

struct StoreFlags {
  std::string store;
  std::string router = LoopbackAddress(kDefaultRouterPort);
  bool is_json = false;
  int timeout_seconds = 10;
};

void SetDeadline(const StoreFlags& flags, grpc::ClientContext* context) {
  context->set_deadline(std::chrono::system_clock::now() +
                        std::chrono::seconds(flags.timeout_seconds));
}

// Address of the store that the router watches.
absl::StatusOr<std::string> FindStore(const StoreFlags& flags) {
  const auto router = v1::RouterService::NewStub(MakeChannel(flags.router));
  grpc::ClientContext context;
  SetDeadline(flags, &context);
  v1::ListWorkersResponse response;
  PT_RETURN_IF_ERROR(
      FromGrpcStatus(router->ListWorkers(&context, v1::ListWorkersRequest(), &response)));
  for (const v1::WorkerInfo& worker : response.workers()) {
    if (worker.role() == "store" && !worker.address().empty()) return worker.address();
  }
  return absl::NotFoundError(absl::StrCat("find the store: router ", flags.router,
                                          " knows none among ", response.workers_size(),
                                          " members"));
}

absl::Status RunStats(const StoreFlags& flags, std::ostream& out) {
  std::string address = flags.store;
  if (address.empty()) {
    PT_ASSIGN_OR_RETURN(address, FindStore(flags));
  }
  const auto store = v1::PageStoreService::NewStub(MakeChannel(address));
  grpc::ClientContext context;
  SetDeadline(flags, &context);
  v1::GetStoreStatsResponse stats;
  PT_RETURN_IF_ERROR(
      FromGrpcStatus(store->GetStoreStats(&context, v1::GetStoreStatsRequest(), &stats)));
  if (flags.is_json) return PrintJson(stats, out);
  const auto amount = [](uint64_t pages, uint64_t bytes) {
    return absl::StrCat(pages, " (", FormatByteSize(bytes), ")");
  };
  std::vector<std::vector<std::string>> rows = {
      {"STORE", address},
      {"state", stats.state()},
      {"engine", stats.engine()},
      {"pages", amount(stats.pages(), stats.logical_bytes())},
      {"stored as", FormatByteSize(stats.stored_bytes())},
      {"on disk", FormatByteSize(stats.physical_bytes())},
      {"capacity", stats.capacity_bytes() == 0 ? "bounded by the disk"
                                               : FormatByteSize(stats.capacity_bytes())},
      {"manifests", absl::StrCat(stats.manifests())},
      {"put since start", amount(stats.pages_put(), stats.bytes_put())},
      {"got since start", amount(stats.pages_got(), stats.bytes_got())},
      {"missed", absl::StrCat(stats.pages_missed())},
      {"evicted", absl::StrCat(stats.pages_evicted())},
      {"quarantined", absl::StrCat(stats.pages_quarantined())},
      {"ever read", absl::StrCat(stats.pages_ever_read())}};
  PrintTable(rows, out);
  return absl::OkStatus();
}

}  // namespace

CommandRunner AddStoreCommand(CLI::App& app) {
  const auto flags = std::make_shared<StoreFlags>();  // shared by the parser and the runner
  CLI::App& store = *app.add_subcommand("store", "The page store");
  store.require_subcommand(1);
  CLI::App& stats = *store.add_subcommand("stats", "Pages, bytes and traffic of a store");
  auto* address = stats.add_option("--store", flags->store,
                                   "Address of the store (default: the one that the router uses)");
  stats.add_option("--router", flags->router, "Address of a router")
      ->excludes(address)
      ->capture_default_str();
  stats.add_flag("--json", flags->is_json, "Print the answer as JSON");
  stats.add_option("--timeout", flags->timeout_seconds, "Seconds to wait for an answer")
      ->check(CLI::Range(1, 3600))
      ->capture_default_str();
  return [flags](std::ostream& out) { return RunStats(*flags, out); };
}

}  // namespace pagetide
