#include "core/model.h"

#include <utility>

#include "absl/status/status.h"
#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"

namespace pagetide {

absl::Status ValidateName(absl::string_view field, absl::string_view name) {
  const auto is_edge = [](char c) { return absl::ascii_isdigit(c) || absl::ascii_islower(c); };
  bool ok = !name.empty() && name.size() <= 128 && is_edge(name.front()) && is_edge(name.back());
  for (char c : name) ok = ok && (is_edge(c) || c == '.' || c == '_' || c == '-');
  if (ok) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat(field, " has ", name.size(),
                   " characters and is not 1 to 128 of a-z, 0-9, '.', '_', '-' with a letter or "
                   "digit at both ends"));
}

absl::StatusOr<Model> Model::Create(ModelSpec spec) {
  PT_RETURN_IF_ERROR(ValidateName("model.name", spec.name));
  PT_ASSIGN_OR_RETURN(PageGeometry geometry, PageGeometry::Create(spec.geometry));
  return Model(std::move(spec), std::move(geometry));
}

Model::Model(ModelSpec spec, PageGeometry geometry)
    : spec_(std::move(spec)), geometry_(std::move(geometry)) {
  Sha256 identity;
  identity.AppendField("pagetide.model.v1");
  identity.AppendField(spec_.weights_digest.view()).AppendField(spec_.tokenizer_digest.view());
  identity.AppendU64(spec_.adapter_digests.size());
  for (const Digest& adapter : spec_.adapter_digests) identity.AppendField(adapter.view());
  identity.AppendField(spec_.numerics_id);
  identity_ = identity.Finish();

  Sha256 whole;
  whole.AppendField("pagetide.model_geometry.v1").AppendField(identity_.view());
  whole.AppendU32(spec_.vocabulary_size).AppendU32(geometry_.page_tokens());
  whole.AppendU32(geometry_.num_groups());
  whole.AppendU32(spec_.geometry.shard.rank).AppendU32(spec_.geometry.shard.num_ranks);
  for (uint32_t i = 0; i < geometry_.num_groups(); ++i) {
    whole.AppendField(geometry_.group(i).fingerprint().view());
  }
  // Only where it is set: models registered before the field keep their digests.
  if (spec_.batch_invariant) whole.AppendField("batch_invariant");
  digest_ = whole.Finish();
}

}  // namespace pagetide
