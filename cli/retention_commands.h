// `pagetide pins …` and `pagetide retain`: what the store keeps of sequences, and for how long.
#ifndef PAGETIDE_CLI_RETENTION_COMMANDS_H_
#define PAGETIDE_CLI_RETENTION_COMMANDS_H_

#include <CLI/CLI.hpp>

#include "cli/command.h"

namespace pagetide {

// `pins list | add NAME --sequence ID | remove NAME`.
CommandRunner AddPinsCommand(CLI::App& app);
// `retain --sequence ID [--priority N] [--ttl 2h]`.
CommandRunner AddRetainCommand(CLI::App& app);

}  // namespace pagetide

#endif  // PAGETIDE_CLI_RETENTION_COMMANDS_H_
