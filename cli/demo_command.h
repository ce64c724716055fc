// The `demo` subcommand: a small transformer without KV of its own runs over a real fleet (store,
// router, two workers), and every logit and every K and V byte is compared with the same model over
// plain arrays.
#ifndef PAGETIDE_CLI_DEMO_COMMAND_H_
#define PAGETIDE_CLI_DEMO_COMMAND_H_

#include "cli/command.h"

namespace CLI {
class App;
}

namespace pagetide {

// The runner fails with INTERNAL when a check does not hold; the report is written either way.
CommandRunner AddDemoCommand(CLI::App& app);

}  // namespace pagetide

#endif  // PAGETIDE_CLI_DEMO_COMMAND_H_
