// Model identity and geometry between protobuf and the domain: the only file that converts them.
//
// Stateless functions; thread-safe. Fields that proto3 leaves at zero get the default that
// model.proto states (page_tokens 256, rope.base 10000, rope.scale 1, …), so that a spec and its
// round trip have the same digest.
#ifndef PAGETIDE_RPC_MODEL_CODEC_H_
#define PAGETIDE_RPC_MODEL_CODEC_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "core/model.h"
#include "core/tier.h"
#include "pagetide/v1/model.pb.h"
#include "pagetide/v1/types.pb.h"

namespace pagetide {

// Checks what the wire can get wrong: lengths of digests, enum values, finite numbers. What only
// the geometry can judge (rows, windows, page bytes) is left to Model::Create. INVALID_ARGUMENT
// names the field.
absl::StatusOr<ModelSpec> ModelSpecFromProto(const v1::ModelSpec& proto);
v1::ModelSpec ToProto(const ModelSpec& spec);
v1::Shard ToProto(const ShardSpec& shard);
// The spec, its digest in hex and the page bytes of each layer group.
v1::Model DescribeModel(const Model& model);

// ModelSpecFromProto and Model::Create in one.
absl::StatusOr<Model> ModelFromProto(const v1::ModelSpec& proto);

// Equal specs give equal bytes, in every process of one protobuf version. Kept in the store.
std::string SerializeModelSpec(const ModelSpec& spec);
// DATA_LOSS when the bytes are not a ModelSpec.
absl::StatusOr<Model> ParseModelSpec(absl::string_view bytes);

v1::Tier ToProto(Tier tier);
// INVALID_ARGUMENT for UNSPECIFIED and unknown values.
absl::StatusOr<Tier> TierFromProto(v1::Tier tier);

}  // namespace pagetide

#endif  // PAGETIDE_RPC_MODEL_CODEC_H_
