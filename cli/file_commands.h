// pagetide export and pagetide import: sequences to files and back, in PageTide's format and in
// those of other programs (docs/formats/).
#ifndef PAGETIDE_CLI_FILE_COMMANDS_H_
#define PAGETIDE_CLI_FILE_COMMANDS_H_

#include "cli/command.h"

namespace CLI {
class App;
}  // namespace CLI

namespace pagetide {

CommandRunner AddExportCommand(CLI::App& app);
CommandRunner AddImportCommand(CLI::App& app);

}  // namespace pagetide

#endif  // PAGETIDE_CLI_FILE_COMMANDS_H_
