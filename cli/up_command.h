// `pagetide up`: router, workers and an embedded store in one process on loopback, until SIGTERM or
// SIGINT.
#ifndef PAGETIDE_CLI_UP_COMMAND_H_
#define PAGETIDE_CLI_UP_COMMAND_H_

#include <CLI/CLI.hpp>

#include "cli/command.h"

namespace pagetide {

// Prints "pagetide up ready router=ADDRESS workers=ADDRESS,… store=ADDRESS metrics=ADDRESS
// worker_metrics=ADDRESS,… store_metrics=ADDRESS" (with --json one object of the same keys; metrics
// is the router's) once all roles serve, then runs until it is told to stop, and drains.
CommandRunner AddUpCommand(CLI::App& app);

}  // namespace pagetide

#endif  // PAGETIDE_CLI_UP_COMMAND_H_
