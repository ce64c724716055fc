// ModelCatalog: the registered models, kept in the store as records and cached here.
//   record ("model", digest hex)      the spec, as SerializeModelSpec writes it
//   record ("model_name", name)       digest hex
// A record once written never changes, so that a cached model stays right. Several routers and
// workers share the records. Without a store the models live as long as the process.
//
// Thread-safe. The store outlives the catalog.
#ifndef PAGETIDE_SERVICES_MODEL_CATALOG_H_
#define PAGETIDE_SERVICES_MODEL_CATALOG_H_

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "core/model.h"
#include "core/page_store.h"

namespace pagetide {

class ModelCatalog {
 public:
  struct Options {
    size_t max_models = 10000;
    // An unknown model is not asked for again for so long: a client's mistake is no load on the
    // store.
    absl::Duration unknown_retention = absl::Seconds(1);
    size_t max_unknown = 10000;
  };
  struct Registered {
    std::shared_ptr<const Model> model;  // shared with the calls that use it
    bool was_registered = false;
  };

  // `store` may be null.
  ModelCatalog(Options options, PageStore* store, const Clock* clock);

  // Does I/O. ALREADY_EXISTS when the name belongs to another digest, RESOURCE_EXHAUSTED beyond
  // max_models, UNAVAILABLE when the store does not answer.
  absl::StatusOr<Registered> Register(const Model& model, MonotonicTime deadline);
  // By digest (64 hex digits) or name, from memory only: null if it is not known here yet.
  std::shared_ptr<const Model> FindCached(absl::string_view digest_or_name) const;
  // Does I/O if it is not cached. NOT_FOUND (MODEL_NOT_FOUND), UNAVAILABLE, DATA_LOSS.
  absl::StatusOr<std::shared_ptr<const Model>> Find(absl::string_view digest_or_name,
                                                    MonotonicTime deadline);
  // Does I/O. All registered models by digest.
  absl::StatusOr<std::vector<std::shared_ptr<const Model>>> List(MonotonicTime deadline);

 private:
  // RESOURCE_EXHAUSTED when the model would be one too many.
  absl::Status CheckRoom(absl::string_view digest) const;
  absl::Status CheckRoomLocked(absl::string_view digest) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status Insert(std::shared_ptr<const Model> model, absl::string_view name);

  const Options options_;
  PageStore* const store_;
  const Clock* const clock_;

  mutable Mutex mu_;
  absl::flat_hash_map<std::string, std::shared_ptr<const Model>> by_digest_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<std::string, std::string> digest_of_name_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<std::string, MonotonicTime> unknown_until_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_SERVICES_MODEL_CATALOG_H_
