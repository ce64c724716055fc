// What devices share of the port's calls: checks, and the way from an AttentionCall to the kernels'
// arguments. Stateless and thread-safe; no memory of a pool is touched, so `base` may be a device
// address.
#ifndef PAGETIDE_WORKER_ATTENTION_CALL_H_
#define PAGETIDE_WORKER_ATTENTION_CALL_H_

#include <cstddef>
#include <cstdint>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "kernels/paged_attention.h"
#include "worker/device.h"
#include "worker/k_shift.h"

namespace pagetide {

// INVALID_ARGUMENT where the range leaves a pool of `pool_bytes`.
absl::Status CheckPoolRange(absl::string_view action, uint64_t offset, uint64_t num_bytes,
                            uint64_t pool_bytes);

// FAILED_PRECONDITION with the reason CANNOT_ATTEND. `device`: its name.
absl::Status CannotAttend(absl::string_view device, absl::string_view why);

// The kernel's shape of a call, every size of the call checked against it. CANNOT_ATTEND for rows
// that no kernel takes.
absl::StatusOr<kernels::AttentionShape> AttentionShapeOf(const AttentionCall& call,
                                                         absl::string_view device);

// Bytes of the copy that K rows with a pending shift go through: frames are shared, and stay as
// they were written.
absl::StatusOr<uint64_t> ShiftedBytesOf(const AttentionCall& call);

struct AttentionRuns {
  std::vector<kernels::KvRun> runs;  // of rows in the pool and in `shifted`
  std::vector<KShiftRun> shifts;     // to be done first, from the pool to `shifted`
  std::vector<int64_t> q_positions;
  int64_t num_rows = 0;
};
// `shifted` has room for ShiftedBytesOf(call). Extents and positions are checked.
absl::StatusOr<AttentionRuns> AttentionRunsOf(const AttentionCall& call, const std::byte* base,
                                              uint64_t pool_bytes, std::byte* shifted);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_ATTENTION_CALL_H_
