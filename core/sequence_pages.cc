#include "core/sequence_pages.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace pagetide {

namespace {

struct PageUse {
  uint32_t refs = 0;      // of one table
  uint32_t end_slot = 0;  // one past the last slot it references
};

PageUse UseOf(const PageTable& table, PageId id) {
  PageUse use;
  for (const Extent& extent : table.extents()) {
    if (extent.page != id) continue;
    ++use.refs;
    use.end_slot = std::max(use.end_slot, extent.end_slot());
  }
  return use;
}

}  // namespace

uint64_t TailPlan::num_copied_rows() const {
  uint64_t rows = 0;
  for (const SlotRun& run : copies) rows += run.count;
  return rows;
}

bool HoldsFromBase(const Extent& extent, uint64_t base) {
  return extent.first_slot == 0 && extent.first_row == base && extent.shift == 0;
}

TailPlan PlanTailCopy(const PageTable& table, uint32_t page_tokens) {
  TailPlan plan;
  if (table.empty()) return plan;
  const std::span<const Extent> extents = table.extents();
  size_t first = extents.size() - 1;
  while (first > 0 && extents[first - 1].page == extents[first].page &&
         extents[first - 1].end_row() == extents[first].first_row) {
    --first;
  }
  // Rows in the slots of their indices stay there.
  if (extents[first].first_slot == extents[first].first_row % page_tokens) {
    plan.rows = extents[first].first_slot;
  }
  for (size_t i = first; i < extents.size(); ++i) {
    const Extent& extent = extents[i];
    plan.copies.push_back(
        {extent.first_slot, plan.rows, extent.count, extent.first_row, extent.shift});
    plan.rows += extent.count;
  }
  plan.kind = TailPlan::Kind::kCopy;
  plan.page = table.back().page;
  return plan;
}

TailPlan PlanTail(const PageTable& table, const PageDirectory& pages, uint32_t page_tokens,
                  uint64_t next_row, bool is_canonical) {
  TailPlan plan;
  if (is_canonical) plan.rows = static_cast<uint32_t>(next_row % page_tokens);
  // Behind rows that the table gave up, the rows of its last page are not what this one follows.
  if (table.empty() || table.num_rows() != next_row) return plan;
  const PageId id = table.back().page;
  const Page& page = *pages.Find(id);
  const PageUse use = UseOf(table, id);
  const bool is_alone = page.refs() == use.refs;
  // Slots that were given up may still be read by a call that pinned the page before.
  const bool is_still_read = page.pins() > 0 && page.high_water_rows() > use.end_slot;
  if (!page.is_full() && is_alone && !is_still_read && table.back().end_slot() == use.end_slot &&
      use.end_slot < page_tokens) {
    plan.kind = TailPlan::Kind::kInPlace;
    plan.page = id;
    plan.rows = use.end_slot;
    return plan;
  }
  TailPlan copy = PlanTailCopy(table, page_tokens);
  return copy.rows < page_tokens ? copy : plan;
}

void SyncTails(const SequenceRows& rows, const PrefixKey& root, uint32_t page_tokens,
               PageDirectory& pages) {
  for (const PageTable& table : rows.tables) {
    if (table.empty()) continue;
    Page& page = pages.Get(table.back().page);
    const PageUse use = UseOf(table, page.id());
    // Rows of a full page, and rows that others reference, stay as they are.
    if (page.is_full() || page.refs() != use.refs) continue;
    page.SetRows(use.end_slot);
    const uint64_t base = rows.num_rows() / page_tokens * page_tokens;
    // Its tokens say which row is in which slot: not of rows that lie elsewhere, or have a gap.
    if (!rows.is_canonical() || base == rows.num_rows() || table.num_rows() != rows.num_rows() ||
        !HoldsFromBase(table.back(), base)) {
      pages.SetTailTokens(page, root, {}, false);
      continue;
    }
    const uint64_t index = base / page_tokens;
    pages.SetTailTokens(page, index == 0 ? root : rows.keys[index - 1],
                        std::vector<uint32_t>(rows.tokens.begin() + base, rows.tokens.end()),
                        !rows.inputs.empty() && rows.inputs.back().position >= base);
  }
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

void SwitchPage(PageId own, Page& known, std::optional<PageId> child, PageTable& table,
                PageDirectory& pages) {
  const uint32_t num_extents = table.ReplacePage(own, known.id());
  for (uint32_t i = 0; i < num_extents; ++i) {
    pages.Ref(known);
    pages.Unref(pages.Get(own));
  }
  pages.Touch(known);
  if (child) pages.SetParent(pages.Get(*child), known.id());
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
        const bool is_kept = page.is_findable();
        // A private page that is being spilled goes when that has ended.
        if (pages.Unref(page) || (is_last && !is_kept))
          ++dropped.freed;
        else if (is_last)
          ++dropped.cached;
      }
    }
  }
  return dropped;
}

}  // namespace pagetide
