// pagetide: the command line of PageTide. Each subcommand is one AddXCommand (cli/command.h).
//
// Exit code 0: done. 1: the command failed; the reason is on stderr. Other: CLI11's, for bad flags.
#include <CLI/CLI.hpp>
#include <cstdio>
#include <iostream>
#include <string>
#include <utility>
#include <vector>

#include "base/log.h"
#include "cli/command.h"
#include "cli/demo_command.h"
#include "cli/file_commands.h"
#include "cli/parking_commands.h"
#include "cli/replay_command.h"
#include "cli/retention_commands.h"
#include "cli/router_commands.h"
#include "cli/session_commands.h"
#include "cli/store_commands.h"
#include "cli/up_command.h"

namespace pagetide {
namespace {

using AddCommand = CommandRunner (*)(CLI::App&);

struct Command {
  const char* name;
  AddCommand add;
};
constexpr Command kCommands[] = {
    {"up", AddUpCommand},
    {"demo", AddDemoCommand},
    {"replay", AddReplayCommand},
    {"workers", AddWorkersCommand},
    {"sequences", AddSequencesCommand},
    {"models", AddModelsCommand},
    {"explain", AddExplainCommand},
    {"sessions", AddSessionsCommand},
    {"pins", AddPinsCommand},
    {"retain", AddRetainCommand},
    {"park", AddParkCommand},
    {"resume", AddResumeCommand},
    {"store", AddStoreCommand},
    {"export", AddExportCommand},
    {"import", AddImportCommand},
};

int Main(int argc, char** argv) {
  CLI::App app{"PageTide: KV-cache service for LLM inference fleets"};
  app.require_subcommand(1);
  std::string log_level = "warning";
  app.add_option("--log-level", log_level, "debug, info, warning or error")->capture_default_str();
  std::vector<std::pair<const char*, CommandRunner>> runners;
  for (const Command& command : kCommands) runners.emplace_back(command.name, command.add(app));
  CLI11_PARSE(app, argc, argv);

  absl::Status status = SetLogLevel(log_level);
  for (const auto& [name, run] : runners) {
    if (status.ok() && app.got_subcommand(name)) status = run(std::cout);
  }
  if (status.ok()) return 0;
  // Without the payloads, which are for programs.
  std::fprintf(stderr, "pagetide: %s: %s\n", absl::StatusCodeToString(status.code()).c_str(),
               std::string(status.message()).c_str());
  return 1;
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  return pagetide::Main(argc, argv);
}
