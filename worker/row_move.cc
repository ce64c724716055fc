#include "worker/row_move.h"

#include <algorithm>
#include <limits>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/attention_call.h"

namespace pagetide {

absl::Status CheckRowMove(const RowMove& move, uint64_t pool_bytes) {
  if (move.plane.base == nullptr || move.engine_page_tokens < 1 || move.num_heads < 1 ||
      move.head_bytes < 1) {
    return absl::InvalidArgumentError(absl::StrCat(
        "move rows of ", move.num_heads, " heads of ", move.head_bytes, " bytes in blocks of ",
        move.engine_page_tokens, " tokens: all must be positive, and the plane somewhere"));
  }
  for (const RowMove::Rows& run : move.runs) {
    if (run.slots.size() > static_cast<size_t>(std::numeric_limits<int32_t>::max())) {
      return absl::InvalidArgumentError(absl::StrCat("move ", run.slots.size(), " rows at once"));
    }
    if (run.host == nullptr) {
      PT_RETURN_IF_ERROR(CheckPoolRange("move rows of", run.pool_offset,
                                        run.slots.size() * move.row_bytes(), pool_bytes));
    }
    for (const int64_t slot : run.slots) {
      if (slot >= 0) continue;
      return absl::InvalidArgumentError(absl::StrCat("move rows: slot ", slot, " is no slot"));
    }
  }
  return absl::OkStatus();
}

kernels::PageMoveArgs PageMoveArgsOf(const RowMove& move) {
  kernels::PageMoveArgs args{};
  args.direction = move.direction;
  args.num_planes = 1;
  args.num_pages = static_cast<int64_t>(move.runs.size());
  for (const RowMove::Rows& run : move.runs) {
    args.max_tokens = std::max(args.max_tokens, static_cast<int32_t>(run.slots.size()));
  }
  args.engine_page_tokens = move.engine_page_tokens;
  args.num_heads = move.num_heads;
  args.head_bytes = move.head_bytes;
  return args;
}

void MoveRowsOnHost(const RowMove& move, std::byte* pool) {
  std::vector<kernels::PageTokens> pages;
  pages.reserve(move.runs.size());
  for (const RowMove::Rows& run : move.runs) {
    pages.push_back({run.host != nullptr ? run.host : pool + run.pool_offset, run.slots.data(), 0,
                     static_cast<int32_t>(run.slots.size())});
  }
  kernels::PageMoveArgs args = PageMoveArgsOf(move);
  args.planes = &move.plane;
  args.pages = pages.data();
  kernels::PageMoveHost(args);
}

}  // namespace pagetide
