// `pagetide park` and `pagetide resume`: sequences that outlive their worker.
#ifndef PAGETIDE_CLI_PARKING_COMMANDS_H_
#define PAGETIDE_CLI_PARKING_COMMANDS_H_

#include <CLI/CLI.hpp>

#include "cli/command.h"

namespace pagetide {

// `park ID [--keep-open] [--ttl 24h]`.
CommandRunner AddParkCommand(CLI::App& app);
// `resume ID`.
CommandRunner AddResumeCommand(CLI::App& app);

}  // namespace pagetide

#endif  // PAGETIDE_CLI_PARKING_COMMANDS_H_
