// `pagetide store …`: what the page store of a fleet says about itself.
#ifndef PAGETIDE_CLI_STORE_COMMANDS_H_
#define PAGETIDE_CLI_STORE_COMMANDS_H_

#include <CLI/CLI.hpp>

#include "cli/command.h"

namespace pagetide {

// `store stats`: pages, bytes and traffic of the store at --store, or of the one that the router at
// --router uses.
CommandRunner AddStoreCommand(CLI::App& app);

}  // namespace pagetide

#endif  // PAGETIDE_CLI_STORE_COMMANDS_H_
