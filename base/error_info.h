// ErrorInfo and retry delay on an absl::Status: a machine-readable reason, facts about it, and how
// long to wait. They travel inside the process as status payloads; rpc/status_mapping.h turns them
// into google.rpc.ErrorInfo and google.rpc.RetryInfo at the edge. All functions are pure and
// thread-safe.
#ifndef PAGETIDE_BASE_ERROR_INFO_H_
#define PAGETIDE_BASE_ERROR_INFO_H_

#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace pagetide {

// The domain of every reason that PageTide itself gives.
inline constexpr absl::string_view kErrorDomain = "pagetide";

// Reasons that callers act upon. A reason is SCREAMING_SNAKE_CASE and, once released, never
// changes.
namespace error_reason {
inline constexpr absl::string_view kStaleEpoch = "STALE_EPOCH";
inline constexpr absl::string_view kSequenceMoved = "SEQUENCE_MOVED";  // metadata: address
inline constexpr absl::string_view kPendingWrite = "PENDING_WRITE";
inline constexpr absl::string_view kVersionMismatch = "VERSION_MISMATCH";
inline constexpr absl::string_view kCannotShift = "CANNOT_SHIFT";
// A layer group holds a state of the whole sequence; metadata: group.
inline constexpr absl::string_view kCannotCut = "CANNOT_CUT";
// A window group gave up rows that the outcome would need; "group" and "row" say which.
inline constexpr absl::string_view kRowsReclaimed = "ROWS_RECLAIMED";
// An edit would put two rows at one position; metadata: position.
inline constexpr absl::string_view kPositionOccupied = "POSITION_OCCUPIED";
// Other sequences reference the rows; metadata: sequences (how many).
inline constexpr absl::string_view kRowsShared = "ROWS_SHARED";
inline constexpr absl::string_view kPoolTooSmall = "POOL_TOO_SMALL";
// The pool is full for now; metadata: needed, free, evictable (frames).
inline constexpr absl::string_view kPoolExhausted = "POOL_EXHAUSTED";
inline constexpr absl::string_view kDraining = "DRAINING";
inline constexpr absl::string_view kModelNotFound = "MODEL_NOT_FOUND";
// No worker can take the sequence now.
inline constexpr absl::string_view kNoWorker = "NO_WORKER";
// No group of workers can take a sharded sequence now.
inline constexpr absl::string_view kNoShardGroup = "NO_SHARD_GROUP";
}  // namespace error_reason

struct ErrorInfo {
  std::string reason;
  std::string domain{kErrorDomain};
  // Facts by lowerCamel or snake name, in the order given: {"address", "10.0.0.7:7101"}.
  std::vector<std::pair<std::string, std::string>> metadata;
  friend bool operator==(const ErrorInfo&, const ErrorInfo&) = default;
};

// Returns `status` with the reason attached, replacing an earlier one. An OK status stays as it is.
absl::Status WithReason(absl::Status status, absl::string_view reason,
                        std::vector<std::pair<std::string, std::string>> metadata = {});
absl::Status WithErrorInfo(absl::Status status, const ErrorInfo& info);
// Returns `status` with the shortest wait after which a retry makes sense; negative counts as zero.
absl::Status WithRetryDelay(absl::Status status, absl::Duration delay);

// Nullopt where the status carries none.
std::optional<ErrorInfo> GetErrorInfo(const absl::Status& status);
std::optional<absl::Duration> GetRetryDelay(const absl::Status& status);
// The reason, or an empty string.
std::string GetReason(const absl::Status& status);
// The value of one metadata key, or an empty string.
std::string GetReasonMetadata(const absl::Status& status, absl::string_view key);

}  // namespace pagetide

#endif  // PAGETIDE_BASE_ERROR_INFO_H_
