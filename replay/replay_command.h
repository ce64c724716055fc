// The `replay` subcommand of the pagetide CLI.
#ifndef PAGETIDE_REPLAY_REPLAY_COMMAND_H_
#define PAGETIDE_REPLAY_REPLAY_COMMAND_H_

#include <functional>
#include <memory>
#include <ostream>

#include "absl/status/status.h"

namespace CLI {
class App;
}

namespace pagetide {

// Runs the subcommand with the parsed flags and writes its report to `out`.
using CommandRunner = std::function<absl::Status(std::ostream& out)>;

// Adds `replay` and its flags to `app`. Call the runner after parsing, if
// app.got_subcommand("replay"). The runner owns what the flags are parsed into and must outlive the
// parse.
CommandRunner AddReplayCommand(CLI::App& app);

}  // namespace pagetide

#endif  // PAGETIDE_REPLAY_REPLAY_COMMAND_H_
