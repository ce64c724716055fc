// From a StoreConfig (file and flags merged) to the options of a page store's program. Stateless.
#ifndef PAGETIDE_SERVICES_STORE_CONFIG_H_
#define PAGETIDE_SERVICES_STORE_CONFIG_H_

#include <map>
#include <string>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "pagetide/config/store.pb.h"
#include "services/store_role.h"

namespace pagetide {

struct StoreOptions {
  StoreRole::Options role;
  absl::Duration drain_timeout = absl::Seconds(30);
};

// Texts of --help, by field of StoreConfig: every field has one.
std::map<std::string, std::string> StoreFlagHelp();
// `flags` over `file`: a field that a flag set wins, a list given by flags replaces the file's.
config::StoreConfig MergeStoreConfig(const config::StoreConfig& file,
                                     const config::StoreConfig& flags);
// INVALID_ARGUMENT names the field. A store holds no deployment secret: its keys come from others.
absl::StatusOr<StoreOptions> StoreOptionsFromConfig(const config::StoreConfig& config);

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_STORE_CONFIG_H_
