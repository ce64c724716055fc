#include "core/page_table.h"

#include <algorithm>

#include "base/check.h"

namespace pagetide {

bool PageTable::Append(const Extent& extent) {
  PT_CHECK(extent.count > 0 && extent.first_row >= num_rows());
  if (!extents_.empty()) {
    Extent& last = extents_.back();
    if (last.page == extent.page && last.end_slot() == extent.first_slot &&
        last.end_row() == extent.first_row && last.shift == extent.shift) {
      last.count += extent.count;
      return false;
    }
  }
  extents_.push_back(extent);
  return true;
}

uint32_t PageTable::NumExtentsOf(PageId page) const {
  return static_cast<uint32_t>(
      std::count_if(extents_.begin(), extents_.end(),
                    [page](const Extent& extent) { return extent.page == page; }));
}

uint32_t PageTable::ReplacePage(PageId from, PageId to) {
  uint32_t changed = 0;
  for (Extent& extent : extents_) {
    if (extent.page != from) continue;
    extent.page = to;
    ++changed;
  }
  return changed;
}

std::vector<PageId> PageTable::Truncate(uint64_t rows) {
  auto first_gone =
      std::partition_point(extents_.begin(), extents_.end(),
                           [rows](const Extent& extent) { return extent.first_row < rows; });
  std::vector<PageId> gone;
  for (auto it = first_gone; it != extents_.end(); ++it) gone.push_back(it->page);
  extents_.erase(first_gone, extents_.end());
  if (num_rows() > rows) {
    extents_.back().count = static_cast<uint32_t>(rows - extents_.back().first_row);
  }
  return gone;
}

std::vector<PageId> PageTable::DropWithin(uint64_t begin, uint64_t end) {
  std::vector<PageId> gone;
  if (extents_.empty()) return gone;
  const auto first =
      std::partition_point(extents_.begin(), extents_.end() - 1,
                           [begin](const Extent& extent) { return extent.first_row < begin; });
  auto last = first;
  while (last != extents_.end() - 1 && last->end_row() <= end) gone.push_back((last++)->page);
  extents_.erase(first, last);
  return gone;
}

bool PageTable::HasEnd(uint64_t row) const {
  const auto it =
      std::partition_point(extents_.begin(), extents_.end(),
                           [row](const Extent& extent) { return extent.end_row() < row; });
  return it != extents_.end() && it->end_row() == row;
}

uint64_t PageTable::FirstGap(uint64_t begin, uint64_t end) const {
  auto it = std::partition_point(extents_.begin(), extents_.end(), [begin](const Extent& extent) {
    return extent.end_row() <= begin;
  });
  for (; it != extents_.end() && it->first_row <= begin && begin < end; ++it) begin = it->end_row();
  return std::min(begin, end);
}

std::vector<Extent> PageTable::Cover(uint64_t begin, uint64_t end) const {
  std::vector<Extent> out;
  if (begin >= end) return out;
  auto it = std::partition_point(extents_.begin(), extents_.end(), [begin](const Extent& extent) {
    return extent.first_row + extent.count <= begin;
  });
  for (; it != extents_.end() && it->first_row < end; ++it) {
    Extent cut = *it;
    if (cut.first_row < begin) {
      const uint32_t skip = static_cast<uint32_t>(begin - cut.first_row);
      cut.first_row = begin;
      cut.first_slot += skip;
      cut.count -= skip;
    }
    cut.count = static_cast<uint32_t>(std::min<uint64_t>(cut.count, end - cut.first_row));
    out.push_back(cut);
  }
  return out;
}

}  // namespace pagetide
