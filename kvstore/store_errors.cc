#include "kvstore/store_errors.h"

#include "base/error_info.h"

namespace pagetide {

absl::Status VersionMismatchError(absl::string_view what, uint64_t current, uint64_t expected) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat("write ", what, ": version is ",
                                                               current, ", expected ", expected)),
                    error_reason::kVersionMismatch, {{"current_version", absl::StrCat(current)}});
}

absl::Status StaleEpochError(absl::string_view what, uint64_t current, uint64_t given) {
  return WithReason(absl::FailedPreconditionError(
                        absl::StrCat(what, ": epoch is ", current, ", the call has ", given)),
                    error_reason::kStaleEpoch, {{"current_epoch", absl::StrCat(current)}});
}

absl::Status StoreFullError(absl::string_view what, uint64_t needed_bytes, uint64_t free_bytes) {
  return WithRetryDelay(
      WithReason(
          absl::ResourceExhaustedError(
              absl::StrCat(what, ": needs ", needed_bytes, " bytes, free are ", free_bytes)),
          "STORE_FULL",
          {{"needed_bytes", absl::StrCat(needed_bytes)}, {"free_bytes", absl::StrCat(free_bytes)}}),
      absl::Seconds(1));
}

absl::Status StoreFailedError(absl::string_view cause) {
  return WithReason(absl::UnavailableError(absl::StrCat("page store failed: ", cause)),
                    "STORE_FAILED");
}

absl::Status CheckStoreName(absl::string_view field, absl::string_view name) {
  if (name.empty() || name.size() > kMaxStoreNameBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat(field, " has ", name.size(), " bytes, allowed are 1 to ", kMaxStoreNameBytes));
  }
  const size_t nul = name.find('\0');
  if (nul != absl::string_view::npos) {
    return absl::InvalidArgumentError(absl::StrCat(field, " has a zero byte at ", nul));
  }
  return absl::OkStatus();
}

}  // namespace pagetide
