// Where the rows of a reservation lie in a staging region:
//   [group][layer][K: num_tokens rows][V: num_tokens rows], without gaps.
// Client and worker compute it from the geometry alone. Pure functions.
#ifndef PAGETIDE_CORE_STAGING_LAYOUT_H_
#define PAGETIDE_CORE_STAGING_LAYOUT_H_

#include <cstdint>

#include "core/geometry.h"

namespace pagetide {

// Bytes of `num_tokens` staged rows of all layers of one group; groups without rows take none.
inline uint64_t StagedGroupBytes(const GroupGeometry& group, uint32_t num_tokens) {
  if (!group.has_rows()) return 0;
  return uint64_t{num_tokens} * group.num_layers() * (group.k_row_bytes() + group.v_row_bytes());
}

inline uint64_t StagedBytes(const PageGeometry& geometry, uint32_t num_tokens) {
  uint64_t total = 0;
  for (uint32_t g = 0; g < geometry.num_groups(); ++g) {
    total += StagedGroupBytes(geometry.group(g), num_tokens);
  }
  return total;
}

// Offset of the first row of a layer and kind from the start of the region.
inline uint64_t StagedOffset(const PageGeometry& geometry, uint32_t num_tokens, uint32_t group,
                             uint32_t layer, RowKind kind) {
  uint64_t offset = 0;
  for (uint32_t g = 0; g < group; ++g) offset += StagedGroupBytes(geometry.group(g), num_tokens);
  const GroupGeometry& own = geometry.group(group);
  offset += uint64_t{layer} * num_tokens * (own.k_row_bytes() + own.v_row_bytes());
  if (kind == RowKind::kV) offset += uint64_t{num_tokens} * own.k_row_bytes();
  return offset;
}

}  // namespace pagetide

#endif  // PAGETIDE_CORE_STAGING_LAYOUT_H_
