// `pagetide replay`: a public serving trace through the policies alone (--simulate) or through real
// processes (--live).
#ifndef PAGETIDE_CLI_REPLAY_COMMAND_H_
#define PAGETIDE_CLI_REPLAY_COMMAND_H_

#include <CLI/CLI.hpp>

#include "cli/command.h"

namespace pagetide {

CommandRunner AddReplayCommand(CLI::App& app);

}  // namespace pagetide

#endif  // PAGETIDE_CLI_REPLAY_COMMAND_H_
