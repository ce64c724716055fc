// Plans of transfers as messages. Pure functions; thread-safe.
#ifndef PAGETIDE_WORKER_TRANSFER_WIRE_H_
#define PAGETIDE_WORKER_TRANSFER_WIRE_H_

#include <cstddef>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/checksum.h"
#include "pagetide/v1/transfer.pb.h"
#include "worker/model_host.h"
#include "worker/sequence_transfer.h"

namespace pagetide {

inline constexpr size_t kMaxTransferPartBytes = size_t{1} << 20;
inline constexpr size_t kMaxGroupIdBytes = 128;

// 16 bytes: low, high, each little-endian.
void SetChecksum(const Checksum128& checksum, std::string* bytes);
// INVALID_ARGUMENT names the field.
absl::StatusOr<Checksum128> ChecksumFromBytes(absl::string_view field, absl::string_view bytes);

// All but request_id and ttl, with the proof for this tenant.
v1::ReserveTransferRequest PlanToProto(const TransferPlan& plan, const Tenant& tenant);
// INVALID_ARGUMENT names the field; PERMISSION_DENIED (NOT_PROVEN); DATA_LOSS: the state is
// damaged.
absl::StatusOr<TransferPlan> PlanFromProto(const v1::ReserveTransferRequest& request,
                                           const Tenant& tenant);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_TRANSFER_WIRE_H_
