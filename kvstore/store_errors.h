// The refusals of a page store, in one wording for every implementation.
#ifndef PAGETIDE_KVSTORE_STORE_ERRORS_H_
#define PAGETIDE_KVSTORE_STORE_ERRORS_H_

#include <cstdint>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/string_view.h"

namespace pagetide {

// FAILED_PRECONDITION, VERSION_MISMATCH. `what` is "manifest NAME" or "record KIND/KEY".
absl::Status VersionMismatchError(absl::string_view what, uint64_t current, uint64_t expected);
// FAILED_PRECONDITION, STALE_EPOCH.
absl::Status StaleEpochError(absl::string_view what, uint64_t current, uint64_t given);
// RESOURCE_EXHAUSTED, STORE_FULL.
absl::Status StoreFullError(absl::string_view what, uint64_t needed_bytes, uint64_t free_bytes);
// UNAVAILABLE, STORE_FAILED: the disk refused; nothing is acknowledged until the store is
// restarted.
absl::Status StoreFailedError(absl::string_view cause);

// INVALID_ARGUMENT unless 1 to 512 bytes without NUL. `field` is named in the error.
absl::Status CheckStoreName(absl::string_view field, absl::string_view name);

inline constexpr size_t kMaxStoreNameBytes = 512;
inline constexpr size_t kMaxRecordValueBytes = 1 << 20;

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_STORE_ERRORS_H_
