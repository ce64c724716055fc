// What RocksdbPageStore locks in its KeyedLock, and the key of a record's row in the index.
#ifndef PAGETIDE_KVSTORE_STORE_LOCK_KEYS_H_
#define PAGETIDE_KVSTORE_STORE_LOCK_KEYS_H_

#include <string>

#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"
#include "core/keys.h"
#include "kvstore/manifest_record.h"

namespace pagetide {

inline std::string PageLock(const PageKey& key) {
  return absl::StrCat("p", key.digest.view());
}
inline std::string ManifestLock(absl::string_view name) {
  return absl::StrCat("m", name);
}
// For whoever deletes a manifest.
inline std::string DeletionLock(absl::string_view name) {
  return absl::StrCat("d", VersionBucketOf(name));
}
inline std::string RecordRow(absl::string_view kind, absl::string_view key) {
  return absl::StrCat(kind, absl::string_view("\0", 1), key);
}
inline std::string RecordLock(absl::string_view kind, absl::string_view key) {
  return absl::StrCat("r", RecordRow(kind, key));
}

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_STORE_LOCK_KEYS_H_
