// The shape of every subcommand of the pagetide CLI: AddXCommand(app) registers it and its flags
// and returns what runs it after parsing. The runner owns what the flags are parsed into, so it
// must outlive the parse.
#ifndef PAGETIDE_CLI_COMMAND_H_
#define PAGETIDE_CLI_COMMAND_H_

#include <functional>
#include <ostream>

#include "absl/status/status.h"

namespace pagetide {

// Runs the subcommand with the parsed flags and writes its report to `out`.
using CommandRunner = std::function<absl::Status(std::ostream& out)>;

}  // namespace pagetide

#endif  // PAGETIDE_CLI_COMMAND_H_
