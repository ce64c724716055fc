// K-shift of a layer group's rows by the host's kernels: from the group's geometry to their
// arguments. Pure; thread-safe.
#ifndef PAGETIDE_WORKER_K_SHIFT_H_
#define PAGETIDE_WORKER_K_SHIFT_H_

#include <cstddef>
#include <cstdint>
#include <span>

#include "absl/status/status.h"
#include "core/geometry.h"

namespace pagetide {

// Consecutive K rows, stride k_row_bytes, that move by `delta` positions.
struct KShiftRun {
  const std::byte* in = nullptr;
  std::byte* out = nullptr;  // equal to `in`, or disjoint from every `in`
  uint32_t num_rows = 0;
  int64_t delta = 0;
};

// Can rows of the group be turned by the host's kernels? Groups without rotation need no turning:
// true.
bool CanShiftOnHost(const GroupGeometry& group);
// INVALID_ARGUMENT, naming what is wrong, unless CanShiftOnHost.
absl::Status ShiftOnHost(const GroupGeometry& group, std::span<const KShiftRun> runs);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_K_SHIFT_H_
