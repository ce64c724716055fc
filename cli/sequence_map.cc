#include "cli/sequence_map.h"

#include <string>
#include <vector>

#include "absl/strings/escaping.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "cli/output.h"

namespace pagetide {
namespace {

using Extent = v1::GetBlockTableResponse::Extent;

constexpr size_t kStripWidth = 96;

// Capital: in a frame; small: in the store only.
char LetterOf(const Extent& extent) {
  const bool is_here = extent.page_state() == "resident" || extent.page_state() == "spilling";
  if (extent.page_state() == "restoring") return '>';
  if (extent.page_state() == "quarantined") return '!';
  if (!extent.page_key().empty()) return is_here ? 'K' : 'k';
  return is_here ? 'P' : 'p';
}

}  // namespace

void PrintSequenceMap(const v1::GetBlockTableResponse& table, std::ostream& out) {
  const v1::SequenceState& state = table.state();
  out << "sequence " << state.sequence_id() << " on " << state.worker_id() << ": " << state.length()
      << " tokens (" << state.canonical_length() << " canonical), next position "
      << state.end_position() << ", revision " << state.revision() << ", epoch " << state.epoch()
      << "\n";
  if (state.pending_tokens() > 0) {
    out << "a write of " << state.pending_tokens() << " tokens is pending\n";
  }
  std::vector<std::string> strips;
  for (const Extent& extent : table.extents()) {
    if (strips.size() <= extent.group()) strips.resize(extent.group() + 1);
    strips[extent.group()] += LetterOf(extent);
  }
  for (size_t g = 0; g < strips.size(); ++g) {
    for (size_t at = 0; at < strips[g].size(); at += kStripWidth) {
      out << (at == 0 ? absl::StrFormat("group %-2d ", g) : "         ")
          << strips[g].substr(at, kStripWidth) << "\n";
    }
  }
  if (!strips.empty()) {
    out << "one letter an extent: K keyed, P private, small in the store only, > restoring, "
           "! lost\n\n";
  }
  std::vector<std::vector<std::string>> rows = {{"GROUP", "ROWS", "POSITIONS", "PAGE", "SLOTS",
                                                 "STATE", "FRAME", "REFS", "PINS", "SHIFT", "KEY"}};
  for (const Extent& extent : table.extents()) {
    rows.push_back(
        {absl::StrCat(extent.group()),
         absl::StrCat(extent.first_row(), "-", extent.first_row() + extent.count() - 1),
         absl::StrCat(extent.first_position(), "-", extent.first_position() + extent.count() - 1),
         absl::StrCat(extent.page_id()),
         absl::StrCat(extent.first_slot(), "-", extent.first_slot() + extent.count() - 1),
         extent.page_state(), extent.has_frame() ? absl::StrCat(extent.frame()) : "-",
         absl::StrCat(extent.references()), absl::StrCat(extent.pins()),
         extent.pending_shift() == 0 ? "-" : absl::StrFormat("%+d", extent.pending_shift()),
         extent.page_key().empty() ? "-" : absl::BytesToHexString(extent.page_key().substr(0, 6))});
  }
  PrintTable(rows, out);
}

}  // namespace pagetide
