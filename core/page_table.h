// PageTable: which rows of which pages make up a sequence, in one layer group. Extents in the order
// of the sequence's rows; a row's position is the sequence's business (core/sequence_rows.h). Rows
// that the group no longer needs (behind a window) are gaps. Holds page ids, not references: the
// owner counts one for each extent. Not thread-safe.
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
  uint64_t first_row = 0;  // of the sequence
  int32_t shift = 0;       // K is still to be rotated by so many positions; 0 = as written
  uint64_t end_row() const { return first_row + count; }
  uint32_t end_slot() const { return first_slot + count; }
  friend bool operator==(const Extent&, const Extent&) = default;
};

class PageTable {
 public:
  // `extent` begins where the last one ends or behind it, and holds at least one row. It is joined
  // to the last one if it carries on in the same page with the same shift: false then, and true if
  // the table holds one extent more.
  bool Append(const Extent& extent);
  const Extent& back() const { return extents_.back(); }
  // For growing the last extent or exchanging its page for a copy.
  Extent& mutable_back() { return extents_.back(); }
  std::span<const Extent> extents() const { return extents_; }
  bool empty() const { return extents_.empty(); }
  // One past the last row.
  uint64_t num_rows() const { return extents_.empty() ? 0 : extents_.back().end_row(); }
  uint32_t NumExtentsOf(PageId page) const;
  // Puts `to`, which holds the same rows in the same slots, in the place of `from`. Returns how
  // many extents changed.
  uint32_t ReplacePage(PageId from, PageId to);

  // Cuts to the first `rows` rows. Returns the pages whose extents went, in order; the last extent
  // that stays may become shorter.
  std::vector<PageId> Truncate(uint64_t rows);
  // Drops extents that lie within rows [begin, end) as a whole, but never the last one: rows behind
  // it go on in its page. Returns their pages, in order.
  std::vector<PageId> DropWithin(uint64_t begin, uint64_t end);
  std::vector<PageId> DropFront(uint64_t row) { return DropWithin(0, row); }
  // An extent ends in front of `row`.
  bool HasEnd(uint64_t row) const;
  // Of rows [begin, end), the first that is not held; `end` when all are.
  uint64_t FirstGap(uint64_t begin, uint64_t end) const;
  // The extents of rows [begin, end), cut to that range and to the rows there are; none is empty.
  std::vector<Extent> Cover(uint64_t begin, uint64_t end) const;

 private:
  std::vector<Extent> extents_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_PAGE_TABLE_H_
