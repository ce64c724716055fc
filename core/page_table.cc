#include "core/page_table.h"

#include <algorithm>

#include "base/check.h"

namespace pagetide {

void PageTable::Append(const Extent& extent) {
  PT_CHECK(extent.count > 0 && extent.first_position == num_rows());
  extents_.push_back(extent);
}

uint64_t PageTable::num_rows() const {
  return extents_.empty() ? 0 : extents_.back().first_position + extents_.back().count;
}

std::vector<PageId> PageTable::Truncate(uint64_t rows) {
  auto first_gone =
      std::partition_point(extents_.begin(), extents_.end(),
                           [rows](const Extent& extent) { return extent.first_position < rows; });
  std::vector<PageId> gone;
  for (auto it = first_gone; it != extents_.end(); ++it) gone.push_back(it->page);
  extents_.erase(first_gone, extents_.end());
  if (num_rows() > rows) {
    extents_.back().count = static_cast<uint32_t>(rows - extents_.back().first_position);
  }
  return gone;
}

std::vector<Extent> PageTable::Cover(uint64_t begin, uint64_t end) const {
  std::vector<Extent> out;
  if (begin >= end) return out;
  auto it = std::partition_point(extents_.begin(), extents_.end(), [begin](const Extent& extent) {
    return extent.first_position + extent.count <= begin;
  });
  for (; it != extents_.end() && it->first_position < end; ++it) {
    Extent cut = *it;
    if (cut.first_position < begin) {
      const uint32_t skip = static_cast<uint32_t>(begin - cut.first_position);
      cut.first_position = begin;
      cut.first_slot += skip;
      cut.count -= skip;
    }
    cut.count = static_cast<uint32_t>(std::min<uint64_t>(cut.count, end - cut.first_position));
    out.push_back(cut);
  }
  return out;
}

}  // namespace pagetide
