// Compaction: which rows of an edited sequence to move so that its extents become few. Pure.
#ifndef PAGETIDE_CORE_COMPACTION_H_
#define PAGETIDE_CORE_COMPACTION_H_

#include <cstdint>
#include <vector>

#include "core/page_table.h"

namespace pagetide {

// Consecutive extents whose rows move to one new page, from slot 0 on.
struct CompactionRun {
  uint64_t first_row = 0;
  uint32_t num_rows = 0;        // at most a page
  std::vector<Extent> extents;  // where they are now
};

struct CompactionOptions {
  uint32_t page_tokens = 0;
  // Rows in front of it keep the slots that their keys say.
  uint64_t canonical_rows = 0;
  // Most rows to move; one run is always allowed.
  uint64_t max_rows = 0;
  // Rows that are still to be turned move too, and are turned on the way.
  bool apply_shifts = false;
};

// Runs in order. Extents that fill three quarters of a page or more stay, unless they are to be
// turned. Empty: nothing to gain. Planning again after a plan was carried out gives what is left.
std::vector<CompactionRun> PlanCompaction(const PageTable& table, const CompactionOptions& options);

// The table with rows of runs[i] in pages[i]. `keeps_shifts`: as planned without apply_shifts.
PageTable CompactedTable(const PageTable& table, const std::vector<CompactionRun>& runs,
                         const std::vector<PageId>& pages, bool keeps_shifts);

}  // namespace pagetide

#endif  // PAGETIDE_CORE_COMPACTION_H_
