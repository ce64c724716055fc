// The stored forms of a manifest (docs/store_format.md): the whole of it, and the entry that a list
// returns, kept apart so that listing reads no payload. Both carry a format version, fields that
// are length-prefixed and little-endian, and a checksum at the end. Pure functions; thread-safe.
#ifndef PAGETIDE_KVSTORE_MANIFEST_RECORD_H_
#define PAGETIDE_KVSTORE_MANIFEST_RECORD_H_

#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "core/page_store.h"

namespace pagetide {

std::string EncodeManifest(const ManifestRecord& manifest);
// DATA_LOSS: damage; UNIMPLEMENTED: the version of a newer program. Lengths are checked before use.
absl::StatusOr<ManifestRecord> ParseManifest(absl::string_view bytes);

ManifestEntry EntryOf(const ManifestRecord& manifest);
std::string EncodeManifestEntry(const ManifestEntry& entry);
// Errors as ParseManifest.
absl::StatusOr<ManifestEntry> ParseManifestEntry(absl::string_view bytes);

// Versions of a name never repeat, also when its manifest is deleted and made anew: a writer that
// held a version of the one before must not be taken for one that holds it now. So the highest
// version that a deletion ended is kept, not a name, of which there is no end, but a bucket of
// names; a new manifest goes on behind it.
inline constexpr uint32_t kNumVersionBuckets = 1 << 16;
uint32_t VersionBucketOf(absl::string_view name);

// What a PutManifest stores: `manifest` behind the part of `present` (null: there is none) that it
// keeps, with the next version; `deleted_version` is that of the name's bucket. INVALID_ARGUMENT
// names the field and the numbers: name, priority, summary, size, or more kept than `present` has.
absl::StatusOr<ManifestRecord> ComposeManifest(const ManifestRecord* present,
                                               const ManifestRecord& manifest,
                                               uint64_t deleted_version);

// Whether the save of `manifest` is the one that made `present`: the same request, and the same
// pages, payload, summary and priority, as far as `manifest` sends them and does not keep what was
// there before. A request id alone names no save: two workers may have been given the same. Times
// are left out, which a repeat takes anew.
bool IsSameSave(const ManifestRecord& present, const ManifestRecord& manifest);

// Each of the keys once, in the order of the first mention.
std::vector<PageKey> WithoutRepeats(const std::vector<PageKey>& keys);

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_MANIFEST_RECORD_H_
