// The subcommands that ask a router: `workers`, `sequences`, `models` and `explain`, each with
// --router ADDR and --json.
#ifndef PAGETIDE_CLI_ROUTER_COMMANDS_H_
#define PAGETIDE_CLI_ROUTER_COMMANDS_H_

#include "cli/command.h"

namespace CLI {
class App;
}

namespace pagetide {

// Workers and stores: state, load, resident pages.
CommandRunner AddWorkersCommand(CLI::App& app);
// Open sequences and their owners, all pages of the answer; `show ID`: the map of one of them.
CommandRunner AddSequencesCommand(CLI::App& app);
// Registered models with their page bytes.
CommandRunner AddModelsCommand(CLI::App& app);
// The table of candidates for a prompt, and the reason for the choice.
CommandRunner AddExplainCommand(CLI::App& app);

}  // namespace pagetide

#endif  // PAGETIDE_CLI_ROUTER_COMMANDS_H_
