// A model as PageTide sees it: identity (who wrote the rows) and geometry (how they lie in a page).
#ifndef PAGETIDE_CORE_MODEL_H_
#define PAGETIDE_CORE_MODEL_H_

#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/digest.h"
#include "core/geometry.h"

namespace pagetide {

struct ModelSpec {
  std::string name;
  Digest weights_digest;
  Digest tokenizer_digest;
  std::vector<Digest> adapter_digests;
  GeometrySpec geometry;
  uint32_t vocabulary_size = 0;  // 0: any 32-bit token id
  std::string numerics_id;       // part of the identity when not empty
  // Equal tokens give equal bits, whatever the batch: pages that fill may give way to equal ones.
  bool batch_invariant = false;
};

// Names of models, sessions and workers: ^[a-z0-9]([a-z0-9._-]{0,126}[a-z0-9])?$.
// INVALID_ARGUMENT names `field`.
absl::Status ValidateName(absl::string_view field, absl::string_view name);

// Immutable after Create; thread-safe.
class Model {
 public:
  static absl::StatusOr<Model> Create(ModelSpec spec);

  const ModelSpec& spec() const { return spec_; }
  const PageGeometry& geometry() const { return geometry_; }
  // SHA-256 of identity, geometry and batch invariance, without the name: two names of one thing
  // share pages.
  const Digest& digest() const { return digest_; }
  // SHA-256 of weights, tokenizer, adapters and numerics: the root of prefix keys. The geometry
  // enters the page key instead, so that shards of one model agree on prefix keys.
  const Digest& identity() const { return identity_; }

 private:
  Model(ModelSpec spec, PageGeometry geometry);
  ModelSpec spec_;
  PageGeometry geometry_;
  Digest identity_;
  Digest digest_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_MODEL_H_
