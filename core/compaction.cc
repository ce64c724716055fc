#include "core/compaction.h"

#include <algorithm>
#include <utility>

#include "base/check.h"

namespace pagetide {
namespace {

// Extents that moving the rows would leave: one, or one for each pending shift that stays.
size_t ExtentsAfter(const std::vector<Extent>& extents, bool keeps_shifts) {
  if (!keeps_shifts) return 1;
  size_t after = 1;
  for (size_t i = 1; i < extents.size(); ++i) {
    if (extents[i].shift != extents[i - 1].shift) ++after;
  }
  return after;
}

bool HasShift(const std::vector<Extent>& extents) {
  return std::any_of(extents.begin(), extents.end(),
                     [](const Extent& extent) { return extent.shift != 0; });
}

}  // namespace

std::vector<CompactionRun> PlanCompaction(const PageTable& table,
                                          const CompactionOptions& options) {
  const uint32_t page_tokens = options.page_tokens;
  const uint64_t base = options.canonical_rows / page_tokens * page_tokens;
  std::vector<CompactionRun> runs;
  uint64_t moved = 0;
  CompactionRun run;
  // Keeps the run gathered so far if it gains something. False when the budget is spent.
  const auto finish = [&]() {
    CompactionRun done = std::exchange(run, {});
    if (done.extents.empty()) return true;
    const bool gains = ExtentsAfter(done.extents, !options.apply_shifts) < done.extents.size() ||
                       (options.apply_shifts && HasShift(done.extents));
    if (!gains) return true;
    if (!runs.empty() && moved + done.num_rows > options.max_rows) return false;
    moved += done.num_rows;
    runs.push_back(std::move(done));
    return true;
  };
  for (const Extent& extent : table.Cover(base, table.num_rows())) {
    const bool is_dense = uint64_t{extent.count} * 4 >= uint64_t{page_tokens} * 3;
    const bool stays = is_dense && !(options.apply_shifts && extent.shift != 0);
    const bool carries_on =
        !run.extents.empty() && run.extents.back().end_row() == extent.first_row;
    if (stays || !carries_on || run.num_rows + extent.count > page_tokens) {
      if (!finish()) return runs;
    }
    if (stays) continue;
    if (run.extents.empty()) run.first_row = extent.first_row;
    run.num_rows += extent.count;
    run.extents.push_back(extent);
  }
  finish();
  return runs;
}

PageTable CompactedTable(const PageTable& table, const std::vector<CompactionRun>& runs,
                         const std::vector<PageId>& pages, bool keeps_shifts) {
  PT_CHECK(runs.size() == pages.size());
  PageTable out;
  uint64_t row = 0;
  for (size_t i = 0; i <= runs.size(); ++i) {
    const uint64_t next = i < runs.size() ? runs[i].first_row : table.num_rows();
    for (const Extent& extent : table.Cover(row, next)) out.Append(extent);
    if (i == runs.size()) break;
    uint32_t slot = 0;
    for (const Extent& extent : runs[i].extents) {
      out.Append({pages[i], slot, extent.count, extent.first_row, keeps_shifts ? extent.shift : 0});
      slot += extent.count;
    }
    row = next + runs[i].num_rows;
  }
  return out;
}

}  // namespace pagetide
