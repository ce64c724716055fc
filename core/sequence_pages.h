// Sequences over the page directory: references, and where the next rows go (copy on write). Pure
// bookkeeping: who plans, copies rows and completes is the host. Not thread-safe.
//
// Rule: a page is written only where no row of it is referenced yet, and only while one sequence is
// its single owner. Full pages, and tails that two sequences reference, never change: who writes
// behind such rows gets a copy of them in a page of its own first.
#ifndef PAGETIDE_CORE_SEQUENCE_PAGES_H_
#define PAGETIDE_CORE_SEQUENCE_PAGES_H_

#include <cstdint>
#include <optional>
#include <vector>

#include "core/page_directory.h"
#include "core/page_table.h"
#include "core/sequence_rows.h"

namespace pagetide {

// Where the rows behind a table's last row go.
struct TailPlan {
  enum class Kind : uint8_t {
    kNewPage,  // the last page has no room, or there is none: into a new one, from slot `rows` on
    kInPlace,  // into `page`, from slot `rows` on
    kCopy,     // the rows of `copies` go to a new page first; the new ones follow at slot `rows`
    kWhole,    // to new pages, the first with what the last page, of `rows` rows, holds now
  };
  struct SlotRun {
    uint32_t from_slot = 0;  // in `page`
    uint32_t to_slot = 0;    // in the new page
    uint32_t count = 0;
    uint64_t first_row = 0;
    int32_t shift = 0;  // copied as written: the shift stays pending
    friend bool operator==(const SlotRun&, const SlotRun&) = default;
  };
  Kind kind = Kind::kNewPage;
  PageId page;
  uint32_t rows = 0;
  std::vector<SlotRun> copies;

  uint64_t num_copied_rows() const;
};
// `next_row`: which row comes next. Where the table has no row right in front of it (behind a
// window), it follows nothing that the last page holds: nothing of that is copied, nor needed in a
// frame, and the row begins a page. A canonical row goes to the slot of its index there, so that
// the page behind it can have a key again.
TailPlan PlanTail(const PageTable& table, const PageDirectory& pages, uint32_t page_tokens,
                  uint64_t next_row, bool is_canonical);
// A copy of the rows that lie in the last page, whoever owns it.
TailPlan PlanTailCopy(const PageTable& table, uint32_t page_tokens);
// Whether an extent holds its rows as the page of tokens from row `base` on would, whose key says
// where each row lies: row `base` in the first slot, and no row of another place in front of it.
bool HoldsFromBase(const Extent& extent, uint64_t base);

// Puts `copy` in the place of the rows of a kCopy plan. `copy` comes with one reference, its
// creator's, which becomes the table's; references of the page that was copied are dropped.
void ReplaceTail(const TailPlan& plan, Page& copy, PageTable& table, PageDirectory& pages);

// Makes a tail that only `rows` references agree with it: how many slots it has, and what of it
// other prompts may find: its tokens while the sequence is canonical, nothing after an edit. For
// each group; after every change of the table's end.
void SyncTails(const SequenceRows& rows, const PrefixKey& root, uint32_t page_tokens,
               PageDirectory& pages);

// Appends and takes a reference if the table holds one extent more.
void AppendExtent(const Extent& extent, PageTable& table, PageDirectory& pages);

// Puts the full page `known`, which holds the same rows, in the place of `own`, and drops `own`. A
// page that was made to follow `own` follows `known`: `child`, if there is one.
void SwitchPage(PageId own, Page& known, std::optional<PageId> child, PageTable& table,
                PageDirectory& pages);

struct DroppedPages {
  uint64_t freed = 0;   // forgotten: nobody could find them again
  uint64_t cached = 0;  // keyed: nobody references them, the cache keeps them until it needs room
};
// Rows and what they become.
struct RowsChange {
  SequenceRows* rows = nullptr;
  SequenceRows next;
};
// Makes all changes: references of all new extents are taken before those of old ones are dropped,
// so that pages may pass from one sequence to another.
DroppedPages AdoptRows(std::vector<RowsChange> changes, PageDirectory& pages);

}  // namespace pagetide

#endif  // PAGETIDE_CORE_SEQUENCE_PAGES_H_
