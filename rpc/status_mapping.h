// The one place where absl::Status becomes grpc::Status and back. Codes are equal by number; the
// reason and retry delay of base/error_info.h become google.rpc.ErrorInfo and google.rpc.RetryInfo
// in the details (trailer grpc-status-details-bin). All functions are pure and thread-safe.
#ifndef PAGETIDE_RPC_STATUS_MAPPING_H_
#define PAGETIDE_RPC_STATUS_MAPPING_H_

#include <grpcpp/support/status.h>

#include "absl/status/status.h"

namespace pagetide {

// Trailers share the 8 KiB of metadata that peers accept: a longer message is cut here, and
// metadata entries that no longer fit in the details are left out.
inline constexpr size_t kMaxStatusMessageBytes = 1024;
inline constexpr size_t kMaxStatusDetailBytes = 3072;

grpc::Status ToGrpcStatus(const absl::Status& status);
// Details of another shape than google.rpc.Status are ignored, details of other types are dropped.
absl::Status FromGrpcStatus(const grpc::Status& status);

}  // namespace pagetide

#endif  // PAGETIDE_RPC_STATUS_MAPPING_H_
