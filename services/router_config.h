// From a RouterConfig (file and flags merged) to the options of a RouterRole. Stateless.
#ifndef PAGETIDE_SERVICES_ROUTER_CONFIG_H_
#define PAGETIDE_SERVICES_ROUTER_CONFIG_H_

#include "absl/status/statusor.h"
#include "pagetide/config/router.pb.h"
#include "services/router_role.h"

namespace pagetide {

// `flags` over `file`: a field that a flag set wins, a list given by flags replaces the file's.
config::RouterConfig MergeRouterConfig(const config::RouterConfig& file,
                                       const config::RouterConfig& flags);
// INVALID_ARGUMENT names the field and the numbers; FAILED_PRECONDITION for an address that is not
// loopback without a deployment secret: the development secret is known to everyone, so keys made
// with it say nothing to a stranger only as long as no stranger can ask.
absl::StatusOr<RouterRole::Options> RouterOptionsFromConfig(const config::RouterConfig& config);

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_ROUTER_CONFIG_H_
