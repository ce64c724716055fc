#include "cli/replay_command.h"

#include <algorithm>
#include <iostream>
#include <memory>
#include <optional>
#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "cli/fleet.h"
#include "core/model.h"
#include "replay/live_replay.h"
#include "replay/simulator.h"

namespace pagetide {
namespace {

constexpr size_t kLiveWorkers = 2;
constexpr size_t kLivePagesPerWorker = 64;

struct ReplayFlags {
  ReplayOptions options;
  LiveReplayOptions live;  // without `replay`
  std::optional<size_t> workers;
  std::optional<size_t> pages_per_worker;
  std::optional<uint64_t> content_seed;
  std::string format = "mooncake";
  std::string programs;
  bool is_simulate = false;
  bool is_live = false;
  bool is_json = false;
  bool without_optimum = false;
};

absl::Status Simulate(const ReplayFlags& flags, ReplayOptions options, std::ostream& out) {
  options.num_workers = flags.workers.value_or(options.num_workers);
  options.pages_per_worker = flags.pages_per_worker.value_or(options.pages_per_worker);
  options.with_optimum = !flags.without_optimum;
  PT_ASSIGN_OR_RETURN(const ReplayReport report, Simulate(options));
  out << (flags.is_json ? absl::StrCat(report.ToJson(), "\n") : report.ToTable());
  return absl::OkStatus();
}

// On a fleet of our own, which stops with us; the programs' ends are part of the verdict.
absl::StatusOr<LiveReplayReport> RunOnOwnFleet(const ReplayFlags& flags,
                                               LiveReplayOptions options) {
  PT_ASSIGN_OR_RETURN(const ModelSpec spec, options.MakeModelSpec());
  PT_ASSIGN_OR_RETURN(const Model model, Model::Create(spec));
  PT_ASSIGN_OR_RETURN(const uint64_t largest, LargestRequestFrames(options));
  const uint64_t frames =
      flags.pages_per_worker.value_or(std::max<uint64_t>(kLivePagesPerWorker, largest));
  if (frames < largest) {
    return absl::InvalidArgumentError(absl::StrCat("replay: --pages-per-worker ", frames,
                                                   ": the largest request of the slice needs ",
                                                   largest));
  }
  FleetOptions fleet_options;
  fleet_options.program_dir = flags.programs;
  fleet_options.num_workers = static_cast<int>(flags.workers.value_or(kLiveWorkers));
  fleet_options.pool_bytes = frames * model.geometry().bytes_per_page_of_tokens();
  std::cerr << "starting a store, a router and " << fleet_options.num_workers << " workers\n";
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<Fleet> fleet, Fleet::Start(fleet_options));
  options.router_address = fleet->router_address();
  PT_ASSIGN_OR_RETURN(LiveReplayReport report, RunLiveReplay(options));
  PT_RETURN_IF_ERROR(fleet->Stop());
  return report;
}

absl::Status RunLive(const ReplayFlags& flags, const ReplayOptions& replay, std::ostream& out) {
  LiveReplayOptions options = flags.live;
  options.replay = replay;
  const bool is_own_fleet = options.router_address.empty();
  if (!is_own_fleet && (flags.workers || flags.pages_per_worker)) {
    return absl::InvalidArgumentError(
        "replay: --workers and --pages-per-worker are those of the fleet behind --router");
  }
  constexpr size_t kMaxLiveWorkers = 64;
  if (flags.workers.value_or(1) < 1 || flags.workers.value_or(1) > kMaxLiveWorkers) {
    return absl::InvalidArgumentError(absl::StrCat(
        "replay: --workers ", *flags.workers, " is not 1 to ", kMaxLiveWorkers, " with --live"));
  }
  // A fleet that lives on may know the pages of an earlier run: new ones unless told otherwise.
  options.content_seed = flags.content_seed.value_or(
      is_own_fleet ? replay.seed : static_cast<uint64_t>(absl::ToUnixMicros(absl::Now())));
  PT_ASSIGN_OR_RETURN(const LiveReplayReport report,
                      is_own_fleet ? RunOnOwnFleet(flags, options) : RunLiveReplay(options));
  out << (flags.is_json ? absl::StrCat(report.ToJson(), "\n") : report.ToTable());
  return report.Verdict();
}

absl::Status RunReplay(const ReplayFlags& flags, std::ostream& out) {
  if (flags.is_simulate == flags.is_live) {
    return absl::InvalidArgumentError("replay: say how: --simulate or --live");
  }
  ReplayOptions options = flags.options;
  PT_ASSIGN_OR_RETURN(options.format, ParseTraceFormat(flags.format));
  return flags.is_live ? RunLive(flags, options, out) : Simulate(flags, options, out);
}

void AddPolicyFlags(CLI::App& command, ReplayOptions& options) {
  command
      .add_option("--policy", options.placement_policy,
                  absl::StrCat("Placement: ", absl::StrJoin(PlacementPolicyNames(), ", ")))
      ->capture_default_str();
  command
      .add_option("--prefill-weight", options.placement.prefill_weight,
                  "Weight of a request's own prefill time in predicted_ttft")
      ->capture_default_str();
  command
      .add_option("--balance-gain", options.placement.balance_gain,
                  "Weight of a worker's recent load in predicted_ttft; 0: off")
      ->capture_default_str();
  command
      .add_option("--balance-cap", options.placement.balance_cap,
                  "Most that recent load may count, in prefill times of the whole prompt")
      ->capture_default_str();
  command
      .add_option("--utilisation", options.utilisation,
                  "Mean load of the workers without any cache; 0: 1.0 mooncake, 1.5 weka")
      ->capture_default_str();
}

void AddLiveFlags(CLI::App& command, ReplayFlags& flags) {
  LiveReplayOptions& live = flags.live;
  const char* const group = "With --live";
  const auto add = [&command, group](const char* name, auto& value, const char* description) {
    return command.add_option(name, value, description)->group(group);
  };
  add("--router", live.router_address,
      "Router of a running fleet (default: a fleet of its own that stops with it)");
  add("--concurrency", live.concurrency, "Requests at a time")->capture_default_str();
  add("--page-tokens", live.page_tokens, "Tokens that stand for a page of the trace")
      ->capture_default_str();
  add("--layers", live.num_layers, "Layers of the model")->capture_default_str();
  add("--row-bytes", live.row_bytes, "Bytes of a K row, and of a V row")->capture_default_str();
  add("--own-tokens", live.own_tokens, "Tokens of each prompt behind the trace's pages")
      ->capture_default_str();
  add("--decode-tokens", live.decode_tokens, "Tokens decoded after a prompt, at most")
      ->capture_default_str();
  add("--append-pages", live.append_pages, "Pages of one append and of one read, at most")
      ->capture_default_str();
  add("--prefill-rate", live.prefill_tokens_per_second,
      "Tokens a second that an engine would compute; 0: at once")
      ->capture_default_str();
  add("--content-seed", flags.content_seed,
      "Another one, other pages (default: --seed, or the clock with --router)");
  add("--programs", flags.programs,
      "Folder of pagetide-store, -router and -worker (default: beside this program)");
  command
      .add_flag("--plant-wrong-byte", live.plant_wrong_byte,
                "Write one byte that is not what its page key says, and expect it to be noticed")
      ->group(group);
}

}  // namespace

CommandRunner AddReplayCommand(CLI::App& app) {
  // Shared with the flags' parsers, which live as long as `app`, and with the runner.
  auto flags = std::make_shared<ReplayFlags>();
  CLI::App& command = *app.add_subcommand(
      "replay", "Replay a public serving trace, simulated or on real processes");
  command.add_flag("--simulate", flags->is_simulate,
                   "Run placement and eviction only: no process, no bytes");
  command.add_flag("--live", flags->is_live,
                   "Drive router, workers and store, and verify every byte");
  command.add_option("--trace", flags->options.trace_path, "Trace file (JSON lines)")->required();
  command.add_option("--format", flags->format, "mooncake or weka")->capture_default_str();
  command.add_option("--first", flags->options.first_request, "Requests to leave out first")
      ->capture_default_str();
  command.add_option("--requests", flags->options.max_requests, "Requests to replay; 0: all")
      ->capture_default_str();
  command.add_option(
      "--workers", flags->workers,
      absl::StrCat("Workers (default ", ReplayOptions().num_workers, "; live ", kLiveWorkers, ")"));
  command.add_option(
      "--pages-per-worker", flags->pages_per_worker,
      absl::StrCat("Pages that a worker's cache holds (default ", ReplayOptions().pages_per_worker,
                   "; live ", kLivePagesPerWorker, ", or what the largest request needs)"));
  command.add_option("--seed", flags->options.seed, "Session starts (weka) and ties")
      ->capture_default_str();
  AddPolicyFlags(command, flags->options);
  command.add_flag("--no-optimum", flags->without_optimum,
                   "Do not compute the offline optimum of the shared cache");
  command.add_flag("--json", flags->is_json, "Print the report as one JSON object");
  AddLiveFlags(command, *flags);
  // The parser keeps raw pointers into *flags; the callback ties its life to the command's.
  command.callback([flags] {});
  return [flags](std::ostream& out) { return RunReplay(*flags, out); };
}

}  // namespace pagetide
