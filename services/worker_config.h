// From a WorkerConfig (file and flags merged) to the options of a WorkerRole and its store.
// Stateless.
#ifndef PAGETIDE_SERVICES_WORKER_CONFIG_H_
#define PAGETIDE_SERVICES_WORKER_CONFIG_H_

#include <map>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "core/page_store.h"
#include "pagetide/config/worker.pb.h"
#include "services/worker_role.h"

namespace pagetide {

// Texts of --help, by field of WorkerConfig: every field has one.
std::map<std::string, std::string> WorkerFlagHelp();
// `flags` over `file`: a field that a flag set wins, a list given by flags replaces the file's.
config::WorkerConfig MergeWorkerConfig(const config::WorkerConfig& file,
                                       const config::WorkerConfig& flags);
// INVALID_ARGUMENT names the field; errors of LoadDeploymentSecret.
absl::StatusOr<WorkerRole::Options> WorkerOptionsFromConfig(const config::WorkerConfig& config);

// The store of a worker with what stands behind it; null when the configuration names none.
struct WorkerStore {
  std::unique_ptr<PageStore> engine;
  std::unique_ptr<PageStore> retrying;  // over a remote engine
  PageStore* get() const { return retrying != nullptr ? retrying.get() : engine.get(); }
};
// Does not wait for a remote store.
absl::StatusOr<WorkerStore> OpenWorkerStore(const config::WorkerConfig& config);

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_WORKER_CONFIG_H_
