// PageTable: which rows of which pages make up a sequence, in one layer group. Ordered extents
// without gaps; positions are implicit (row n is at position n) until an edit makes them explicit.
// Holds page ids, not references: the owner counts. Not thread-safe.
#ifndef PAGETIDE_CORE_PAGE_TABLE_H_
#define PAGETIDE_CORE_PAGE_TABLE_H_

#include <cstdint>
#include <span>
#include <vector>

#include "core/ids.h"

namespace pagetide {

struct Extent {
  PageId page;
  uint32_t first_slot = 0;
  uint32_t count = 0;
  uint64_t first_position = 0;
  int32_t shift = 0;  // pending K rotation in positions; 0 = rows are as written
  friend bool operator==(const Extent&, const Extent&) = default;
};

class PageTable {
 public:
  // `extent` must begin where the last one ends, and hold at least one row.
  void Append(const Extent& extent);
  const Extent& back() const { return extents_.back(); }
  // For growing the last extent or exchanging its page for a copy.
  Extent& mutable_back() { return extents_.back(); }
  std::span<const Extent> extents() const { return extents_; }
  bool empty() const { return extents_.empty(); }
  uint64_t num_rows() const;

  // Cuts to the first `rows` rows. Returns the pages whose extents went, in order; the last extent
  // that stays may become shorter.
  std::vector<PageId> Truncate(uint64_t rows);
  // The extents of rows [begin, end), cut to that range and to the rows there are; none is empty.
  std::vector<Extent> Cover(uint64_t begin, uint64_t end) const;

 private:
  std::vector<Extent> extents_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_PAGE_TABLE_H_
