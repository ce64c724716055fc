// K-shift of a layer group's rows: from the group's geometry to the kernels' arguments, and on the
// host. Pure; thread-safe.
#ifndef PAGETIDE_WORKER_K_SHIFT_H_
#define PAGETIDE_WORKER_K_SHIFT_H_

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>

#include "absl/status/status.h"
#include "core/geometry.h"
#include "kernels/rope_shift.h"

namespace pagetide {

// Consecutive K rows, stride k_row_bytes, that move by `delta` positions.
struct KShiftRun {
  const std::byte* in = nullptr;
  std::byte* out = nullptr;  // equal to `in`, or disjoint from every `in`
  uint32_t num_rows = 0;
  int64_t delta = 0;
};

// The kernel's arguments for K rows of one layer of the group, without runs; none where rows need
// no turning. Points into the group. Only for groups that CanShiftOnHost.
std::optional<kernels::RopeShiftArgs> KShiftArgsOf(const GroupGeometry& group);

// Can rows of the group be turned by the host's kernels? Groups without rotation need no turning:
// true.
bool CanShiftOnHost(const GroupGeometry& group);
// INVALID_ARGUMENT, naming what is wrong, unless CanShiftOnHost.
absl::Status ShiftOnHost(const GroupGeometry& group, std::span<const KShiftRun> runs);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_K_SHIFT_H_
