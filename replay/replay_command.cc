#include "replay/replay_command.h"

#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"
#include "replay/simulator.h"

namespace pagetide {
namespace {

struct ReplayFlags {
  ReplayOptions options;
  std::string format = "mooncake";
  bool is_simulate = false;
  bool is_json = false;
  bool without_optimum = false;
};

absl::Status RunReplay(const ReplayFlags& flags, std::ostream& out) {
  if (!flags.is_simulate) {
    return absl::InvalidArgumentError("replay: say how: --simulate");
  }
  ReplayOptions options = flags.options;
  PT_ASSIGN_OR_RETURN(options.format, ParseTraceFormat(flags.format));
  options.with_optimum = !flags.without_optimum;
  PT_ASSIGN_OR_RETURN(const ReplayReport report, Simulate(options));
  out << (flags.is_json ? absl::StrCat(report.ToJson(), "\n") : report.ToTable());
  return absl::OkStatus();
}

}  // namespace

CommandRunner AddReplayCommand(CLI::App& app) {
  // Shared with the flags' parsers, which live as long as `app`, and with the runner.
  auto flags = std::make_shared<ReplayFlags>();
  CLI::App* const command =
      app.add_subcommand("replay", "Replay a public serving trace through the policies");
  command->add_flag("--simulate", flags->is_simulate,
                    "Run placement and eviction only: no process, no bytes");
  command->add_option("--trace", flags->options.trace_path, "Trace file (JSON lines)")->required();
  command->add_option("--format", flags->format, "mooncake or weka")->capture_default_str();
  command->add_option("--workers", flags->options.num_workers, "Workers")->capture_default_str();
  command
      ->add_option("--pages-per-worker", flags->options.pages_per_worker,
                   "Pages of 512 tokens that a worker's cache holds")
      ->capture_default_str();
  command
      ->add_option("--policy", flags->options.placement_policy,
                   absl::StrCat("Placement: ", absl::StrJoin(PlacementPolicyNames(), ", ")))
      ->capture_default_str();
  command
      ->add_option("--prefill-weight", flags->options.placement.prefill_weight,
                   "Weight of a request's own prefill time in predicted_ttft")
      ->capture_default_str();
  command
      ->add_option("--balance-gain", flags->options.placement.balance_gain,
                   "Weight of a worker's recent load in predicted_ttft; 0: off")
      ->capture_default_str();
  command
      ->add_option("--balance-cap", flags->options.placement.balance_cap,
                   "Most that recent load may count, in prefill times of the whole prompt")
      ->capture_default_str();
  command
      ->add_option("--utilisation", flags->options.utilisation,
                   "Mean load of the workers without any cache; 0: 1.0 mooncake, 1.5 weka")
      ->capture_default_str();
  command->add_option("--seed", flags->options.seed, "Session starts (weka) and ties")
      ->capture_default_str();
  command->add_flag("--no-optimum", flags->without_optimum,
                    "Do not compute the offline optimum of the shared cache");
  command->add_flag("--json", flags->is_json, "Print the report as one JSON object");
  // The parser keeps raw pointers into *flags; the callback ties its life to the command's.
  command->callback([flags] {});
  return [flags](std::ostream& out) { return RunReplay(*flags, out); };
}

}  // namespace pagetide
