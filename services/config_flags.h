// Command-line flags made from a configuration message: field pool_bytes is flag --pool-bytes, so
// that a file and the command line always know the same options. Stateless.
#ifndef PAGETIDE_SERVICES_CONFIG_FLAGS_H_
#define PAGETIDE_SERVICES_CONFIG_FLAGS_H_

#include <google/protobuf/message.h>

#include <CLI/CLI.hpp>
#include <map>
#include <string>

namespace pagetide {

// Adds one flag a field of `config`; parsing sets the fields that were given (repeated fields: the
// flag may be repeated; bool fields: --x or --x=false). `help` is by field name. `config` outlives
// `app`. Fields may be string, bool, uint32, double, or repeated string; others get no flag.
void AddConfigFlags(CLI::App* app, google::protobuf::Message* config,
                    const std::map<std::string, std::string>& help);

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_CONFIG_FLAGS_H_
