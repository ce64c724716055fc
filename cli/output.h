// How subcommands print answers: protobuf JSON for programs, columns for people.
#ifndef PAGETIDE_CLI_OUTPUT_H_
#define PAGETIDE_CLI_OUTPUT_H_

#include <google/protobuf/message.h>

#include <ostream>
#include <string>
#include <vector>

#include "absl/status/status.h"

namespace pagetide {

// Field names as in the .proto, fields at their default included; 64-bit integers are strings.
absl::Status PrintJson(const google::protobuf::Message& message, std::ostream& out);

// Columns as wide as their widest cell; the first row is the heading.
void PrintTable(const std::vector<std::vector<std::string>>& rows, std::ostream& out);

}  // namespace pagetide

#endif  // PAGETIDE_CLI_OUTPUT_H_
