// Which key positions a query sees, from the mask of its layer group: the same functions for host
// and device. Plain C++17, stateless.
#ifndef PAGETIDE_KERNELS_ATTENTION_MASK_H_
#define PAGETIDE_KERNELS_ATTENTION_MASK_H_

#include <cstdint>

#include "kernels/host_device.h"
#include "kernels/paged_attention.h"

namespace pagetide::kernels {

inline constexpr int64_t kLowestPosition = INT64_MIN;

// The closed interval [first, last] and, whatever its window, all positions below `kept`.
struct VisiblePositions {
  int64_t first;
  int64_t last;
  int64_t kept;
};

PAGETIDE_HD inline bool Sees(const VisiblePositions& visible, int64_t position) {
  return (position >= visible.first && position <= visible.last) || position < visible.kept;
}

// Of a query at position `p`.
PAGETIDE_HD inline VisiblePositions VisibleTo(const AttentionShape& shape, int64_t p) {
  switch (shape.mask) {
    case AttentionMask::kCausal:
      return {kLowestPosition, p, kLowestPosition};
    case AttentionMask::kWindowStandard:
      return {p - shape.window + 1, p, kLowestPosition};
    case AttentionMask::kWindowChunked: {
      const int64_t remainder = ((p % shape.window) + shape.window) % shape.window;
      return {p - remainder, p, kLowestPosition};
    }
    case AttentionMask::kWindowSymmetric:
      return {p - shape.window / 2, p + shape.window / 2, kLowestPosition};
    case AttentionMask::kWindowRing:
      return {p - shape.window + 1, p, shape.keep < p + 1 ? shape.keep : p + 1};
  }
  return {kLowestPosition, p, kLowestPosition};
}

}  // namespace pagetide::kernels

#endif  // PAGETIDE_KERNELS_ATTENTION_MASK_H_
