#include "core/sequence_pages.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace pagetide {

TailPlan PlanTail(const PageTable& table, const PageDirectory& pages, uint32_t page_tokens) {
  TailPlan plan;
  if (table.empty()) return plan;
  const PageId id = table.back().page;
  const Page& page = *pages.Find(id);

  // The rows at the end of the sequence that lie in the last page, and what else it references
  // there.
  const std::span<const Extent> extents = table.extents();
  size_t first = extents.size() - 1;
  while (first > 0 && extents[first - 1].page == id &&
         extents[first - 1].end_row() == extents[first].first_row) {
    --first;
  }
  uint32_t own_refs = 0;
  uint32_t used_end = 0;
  for (const Extent& extent : extents) {
    if (extent.page != id) continue;
    ++own_refs;
    used_end = std::max(used_end, extent.end_slot());
  }
  const bool is_alone = page.refs() == own_refs;
  // Slots that were given up may still be read by a call that pinned the page before.
  const bool is_still_read = page.pins() > 0 && page.high_water_rows() > used_end;
  if (!page.is_full() && is_alone && !is_still_read && table.back().end_slot() == used_end &&
      used_end < page_tokens) {
    plan.kind = TailPlan::Kind::kInPlace;
    plan.page = id;
    plan.rows = used_end;
    return plan;
  }
  uint32_t rows = 0;
  for (size_t i = first; i < extents.size(); ++i) {
    const Extent& extent = extents[i];
    plan.copies.push_back({extent.first_slot, rows, extent.count, extent.first_row, extent.shift});
    rows += extent.count;
  }
  if (rows >= page_tokens) {
    plan.copies.clear();
    return plan;
  }
  plan.kind = TailPlan::Kind::kCopy;
  plan.page = id;
  plan.rows = rows;
  return plan;
}

void ReplaceTail(const TailPlan& plan, Page& copy, PageTable& table, PageDirectory& pages) {
  PT_CHECK(plan.kind == TailPlan::Kind::kCopy);
  const std::vector<PageId> gone = table.Truncate(plan.copies.front().first_row);
  bool has_creators = true;
  for (const TailPlan::SlotRun& run : plan.copies) {
    const Extent extent{copy.id(), run.to_slot, run.count, run.first_row, run.shift};
    if (!table.Append(extent)) continue;
    if (!std::exchange(has_creators, false)) pages.Ref(copy);
  }
  for (PageId id : gone) pages.Unref(pages.Get(id));
}

void AppendExtent(const Extent& extent, PageTable& table, PageDirectory& pages) {
  if (table.Append(extent)) pages.Ref(pages.Get(extent.page));
}

DroppedPages AdoptRows(std::vector<RowsChange> changes, PageDirectory& pages) {
  for (const RowsChange& change : changes) {
    for (const PageTable& table : change.next.tables) {
      for (const Extent& extent : table.extents()) pages.Ref(pages.Get(extent.page));
    }
  }
  DroppedPages dropped;
  for (RowsChange& change : changes) {
    const SequenceRows old = std::exchange(*change.rows, std::move(change.next));
    for (const PageTable& table : old.tables) {
      for (const Extent& extent : table.extents()) {
        Page& page = pages.Get(extent.page);
        const bool is_last = page.refs() == 1;
        if (pages.Unref(page))
          ++dropped.freed;
        else if (is_last)
          ++dropped.cached;
      }
    }
  }
  return dropped;
}

}  // namespace pagetide
