// The stored form of a manifest (docs/store_format.md): a format version, the fields
// length-prefixed and little-endian, an XXH3-128 of all of it at the end. Pure functions;
// thread-safe.
#ifndef PAGETIDE_KVSTORE_MANIFEST_RECORD_H_
#define PAGETIDE_KVSTORE_MANIFEST_RECORD_H_

#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "core/page_store.h"

namespace pagetide {

std::string EncodeManifest(const ManifestRecord& manifest);
// DATA_LOSS: damage; UNIMPLEMENTED: the version of a newer program. Lengths are checked before use.
absl::StatusOr<ManifestRecord> ParseManifest(absl::string_view bytes);

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_MANIFEST_RECORD_H_
