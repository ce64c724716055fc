// `pagetide sessions …`: saved state of a fleet.
#ifndef PAGETIDE_CLI_SESSION_COMMANDS_H_
#define PAGETIDE_CLI_SESSION_COMMANDS_H_

#include <CLI/CLI.hpp>

#include "cli/command.h"

namespace pagetide {

// `sessions list | show NAME | save NAME --sequence ID | load NAME | delete NAME`, at the worker at
// --worker or at one that the router at --router knows.
CommandRunner AddSessionsCommand(CLI::App& app);

}  // namespace pagetide

#endif  // PAGETIDE_CLI_SESSION_COMMANDS_H_
