// From a RouterConfig (file and flags merged) to the options of a RouterRole. Stateless.
#ifndef PAGETIDE_SERVICES_ROUTER_CONFIG_H_
#define PAGETIDE_SERVICES_ROUTER_CONFIG_H_

#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "pagetide/config/router.pb.h"
#include "services/router_role.h"

namespace pagetide {

// Texts of --help, by field of RouterConfig: every field has one.
std::map<std::string, std::string> RouterFlagHelp();
// `flags` over `file`: a field that a flag set wins, a list given by flags replaces the file's.
config::RouterConfig MergeRouterConfig(const config::RouterConfig& file,
                                       const config::RouterConfig& flags);
// INVALID_ARGUMENT names the field and the numbers; errors of LoadDeploymentSecret.
absl::StatusOr<RouterRole::Options> RouterOptionsFromConfig(const config::RouterConfig& config);

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_ROUTER_CONFIG_H_
