#include "worker/loaded_rows.h"

#include <algorithm>
#include <limits>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"

namespace pagetide {
namespace {

// `spans` stay ascending and apart.
void Join(RowSpan span, std::vector<RowSpan>* spans) {
  const auto from = std::partition_point(
      spans->begin(), spans->end(), [&](const RowSpan& there) { return there.end < span.begin; });
  auto to = from;
  for (; to != spans->end() && to->begin <= span.end; ++to) {
    span.begin = std::min(span.begin, to->begin);
    span.end = std::max(span.end, to->end);
  }
  spans->insert(spans->erase(from, to), span);
}

}  // namespace

const EngineSlotMap& MapOf(std::span<const EngineSlotMap> maps, uint32_t group) {
  return maps.size() == 1 ? maps.front() : maps[group];
}

LoadedRows::LoadedRows(const PageGeometry& geometry, std::span<const EngineSlotMap> maps)
    : geometry_(geometry), maps_(maps), first_mapped_(std::numeric_limits<uint64_t>::max()) {
  for (uint32_t g = 0; g < geometry_.num_groups(); ++g) {
    traits_.push_back(TraitsOf(geometry_.group(g).spec()));
    const uint64_t first = MapOf(maps_, g).first_token;
    first_mapped_ = std::min(first_mapped_, first);
    // Rows in front of a slot map are the engine's own: the map says so. A group that forgets rows
    // may have none there, so of it only what was loaded counts.
    std::vector<RowSpan>& spans = loaded_.emplace_back();
    if (first > 0 && !traits_.back().forgets()) spans.push_back({0, first});
  }
}

absl::StatusOr<uint64_t> LoadedRows::Plan(SequenceContents contents) {
  const uint64_t length = contents.tokens.size();
  if (length > rows_.tokens.size()) {
    rows_.tokens = std::move(contents.tokens);
    rows_.positions = std::move(contents.positions);
  }
  held_ = std::move(contents.held);
  std::vector<std::vector<RowSpan>> planned = loaded_;
  for (uint32_t g = 0; g < geometry_.num_groups(); ++g) {
    for (const RowSpan& span : Wanted(g, 0, length)) Join(span, &planned[g]);
  }
  planned_ = rows_.LongestUsable(traits_, planned, length);
  if (planned_.rows > 0 || length == 0) return planned_.rows;
  const LackedRow lacked = *rows_.LackedAt(traits_, planned, length);
  const uint64_t mapped = MapOf(maps_, lacked.group).first_token;
  if (lacked.row >= mapped) return RowsLacking("load pages", lacked);
  return WithReason(absl::FailedPreconditionError(absl::StrCat(
                        "slot_maps of layer group ", lacked.group, " begin at token ", mapped,
                        "; behind ", length, " tokens its window begins at ", lacked.row)),
                    "WINDOW_NOT_MAPPED", {{"group", absl::StrCat(lacked.group)}});
}

std::vector<RowSpan> LoadedRows::Wanted(uint32_t group, uint64_t begin, uint64_t end) const {
  const std::vector<RowSpan>& loaded = loaded_[group];
  std::vector<RowSpan> wanted;
  for (const RowSpan& span : held_[group]) {
    uint64_t from = std::max({span.begin, begin, MapOf(maps_, group).first_token});
    const uint64_t to = std::min(span.end, end);
    while (from < to) {
      const uint64_t gap = FirstGap(loaded, from, to);
      if (gap == to) break;
      const auto next = std::partition_point(
          loaded.begin(), loaded.end(), [gap](const RowSpan& there) { return there.begin <= gap; });
      from = next == loaded.end() ? to : std::min(to, next->begin);
      wanted.push_back({gap, from});
    }
  }
  return wanted;
}

void LoadedRows::Add(uint32_t group, const RowSpan& span) {
  Join(span, &loaded_[group]);
}

LoadedRows::Usable LoadedRows::UsableOf(uint64_t rows) const {
  const UsablePrefix prefix =
      rows_.LongestUsable(traits_, loaded_, std::min(rows, rows_.num_rows()));
  Usable usable{prefix.rows, std::nullopt};
  if (!prefix.lacked) return usable;
  if (planned_.lacked && prefix.rows >= planned_.rows) {
    usable.limiting_group = planned_.lacked->group;
    return usable;
  }
  for (uint32_t g = 0; g < loaded_.size(); ++g) {
    if (g != prefix.lacked->group && Holds(loaded_[g], prefix.lacked->row)) {
      usable.limiting_group = prefix.lacked->group;
    }
  }
  return usable;
}

}  // namespace pagetide
