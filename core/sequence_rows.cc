#include "core/sequence_rows.h"

#include <tuple>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/error_info.h"

namespace pagetide {
namespace {

// A place in a list of pieces; row is in pieces[piece].
struct Cursor {
  std::span<const RowPiece> pieces;
  size_t piece = 0;
  uint64_t row = 0;

  explicit Cursor(std::span<const RowPiece> list) : pieces(list) { Enter(0); }
  void Enter(size_t index) {
    piece = index;
    while (piece < pieces.size() && pieces[piece].empty()) ++piece;
    if (piece < pieces.size()) row = pieces[piece].begin;
  }
  bool done() const { return piece == pieces.size(); }
  const RowPiece& at() const { return pieces[piece]; }
  int64_t position() const { return at().position(row); }
};

// The first row that the next token behind `rows` rows (> 0) could attend to and that is not there:
// of rows [begin, end) first_gap(begin, end) is the first that is not, or `end`.
template <typename FirstGapFn>
std::optional<uint64_t> FirstLacked(const SequenceRows& sequence, const GroupTraits& traits,
                                    uint64_t rows, const FirstGapFn& first_gap) {
  const uint64_t kept = std::min(sequence.KeptRows(traits), rows);
  if (const uint64_t gap = first_gap(0, kept); gap < kept) return gap;
  const uint64_t masked =
      std::min(sequence.MaskedRows(traits, sequence.position(rows - 1) + 1), rows);
  if (const uint64_t gap = first_gap(masked, rows); gap < rows) return gap;
  return std::nullopt;
}

}  // namespace

GroupTraits TraitsOf(const LayerGroupSpec& group) {
  const bool has_rows =
      group.kind == LayerGroupSpec::Kind::kFull || group.kind == LayerGroupSpec::Kind::kWindow;
  GroupTraits traits;
  traits.rotates = has_rows && group.rope.style != RopeSpec::Style::kNone;
  // Packed rows hide their K; K in another basis or with several position components does not
  // rotate pair by pair.
  traits.can_shift = has_rows && group.packed_row_bytes == 0 &&
                     (!traits.rotates || (group.rope.position_components <= 1 &&
                                          group.basis == LayerGroupSpec::Basis::kPlain));
  if (group.kind == LayerGroupSpec::Kind::kWindow) {
    traits.window = group.window_type;
    traits.window_tokens = group.window_tokens;
    traits.keep_tokens = group.keep_tokens;
  }
  traits.is_whole = !has_rows;
  traits.is_state = group.kind == LayerGroupSpec::Kind::kRecurrent;
  return traits;
}

int64_t GroupTraits::FirstVisible(int64_t next) const {
  if (is_state) return std::max<int64_t>(0, next - 1);
  const int64_t window_size = window_tokens;
  switch (window) {
    case LayerGroupSpec::WindowType::kNone:
      return 0;
    case LayerGroupSpec::WindowType::kStandard:  // masked when next - position >= window
      return std::max<int64_t>(0, next - window_size + 1);
    case LayerGroupSpec::WindowType::kChunked:  // masked in front of next's chunk
      return next / window_size * window_size;
    case LayerGroupSpec::WindowType::kSymmetric:  // masked when |next - position| > window / 2
      return std::max<int64_t>(0, next - window_size / 2);
    case LayerGroupSpec::WindowType::kRing:  // a standard window over what is not kept for good
      return std::max<int64_t>(0, next - (window_size - keep_tokens) + 1);
  }
  return 0;
}

absl::Status RowsLacking(absl::string_view what, const LackedRow& lacked) {
  if (lacked.is_inside) {
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat(what, ": layer group ", lacked.group,
                                                   " cannot be cut behind row ", lacked.row,
                                                   ", which is inside a page or a state that is "
                                                   "kept whole; only checkpoints hold others")),
        error_reason::kCannotCut,
        {{"group", absl::StrCat(lacked.group)}, {"row", absl::StrCat(lacked.row)}});
  }
  return WithReason(absl::FailedPreconditionError(absl::StrCat(
                        what, ": layer group ", lacked.group, " gave up row ", lacked.row,
                        ", which was behind its window, and would need it again")),
                    error_reason::kRowsReclaimed,
                    {{"group", absl::StrCat(lacked.group)}, {"row", absl::StrCat(lacked.row)}});
}

std::optional<LackedRow> SequenceRows::LackedIn(uint32_t group, const GroupTraits& traits,
                                                uint64_t rows) const {
  if (rows == 0) return std::nullopt;
  const PageTable& table = tables[group];
  if (traits.is_whole && !table.HasEnd(rows)) return LackedRow{group, rows - 1, true};
  const auto lacked = FirstLacked(*this, traits, rows, [&table](uint64_t begin, uint64_t end) {
    return table.FirstGap(begin, end);
  });
  if (lacked) return LackedRow{group, *lacked};
  return std::nullopt;
}

std::optional<LackedRow> SequenceRows::LackedAt(std::span<const GroupTraits> groups,
                                                uint64_t rows) const {
  for (uint32_t g = 0; g < tables.size(); ++g) {
    if (const auto lacked = LackedIn(g, groups[g], rows)) return lacked;
  }
  return std::nullopt;
}

std::optional<LackedRow> SequenceRows::LackedAt(std::span<const GroupTraits> groups,
                                                std::span<const std::vector<RowSpan>> held,
                                                uint64_t rows) const {
  if (rows == 0) return std::nullopt;
  for (uint32_t g = 0; g < groups.size(); ++g) {
    const auto lacked = FirstLacked(
        *this, groups[g], rows,
        [&held, g](uint64_t begin, uint64_t end) { return FirstGap(held[g], begin, end); });
    if (lacked) return LackedRow{g, *lacked};
  }
  return std::nullopt;
}

UsablePrefix SequenceRows::LongestUsable(std::span<const GroupTraits> groups,
                                         std::span<const std::vector<RowSpan>> held,
                                         uint64_t rows) const {
  UsablePrefix usable{rows, std::nullopt};
  // A row that is lacked at a length is lacked at every length from there to the row itself: no
  // window begins later for a shorter prefix.
  while (const auto lacked = LackedAt(groups, held, usable.rows)) {
    usable = {lacked->row, lacked};
  }
  return usable;
}

std::vector<PageId> SequenceRows::DropMasked(std::span<const GroupTraits> groups) {
  std::vector<PageId> gone;
  for (uint32_t g = 0; g < tables.size(); ++g) {
    if (!groups[g].forgets()) continue;
    const std::vector<PageId> pages =
        tables[g].DropWithin(KeptRows(groups[g]), MaskedRows(groups[g], end_position()));
    gone.insert(gone.end(), pages.begin(), pages.end());
  }
  return gone;
}

bool Holds(std::span<const RowSpan> spans, uint64_t row) {
  const auto after =
      std::upper_bound(spans.begin(), spans.end(), row,
                       [](uint64_t r, const RowSpan& span) { return r < span.begin; });
  return after != spans.begin() && row < (after - 1)->end;
}

uint64_t FirstGap(std::span<const RowSpan> spans, uint64_t begin, uint64_t end) {
  auto it = std::partition_point(spans.begin(), spans.end(),
                                 [begin](const RowSpan& span) { return span.end <= begin; });
  for (; it != spans.end() && it->begin <= begin && begin < end; ++it) begin = it->end;
  return std::min(begin, end);
}

std::vector<RowSpan> SequenceRows::HeldRows(uint32_t group) const {
  std::vector<RowSpan> spans;
  for (const Extent& extent : tables[group].extents()) {
    if (!spans.empty() && spans.back().end == extent.first_row)
      spans.back().end = extent.end_row();
    else
      spans.push_back({extent.first_row, extent.end_row()});
  }
  return spans;
}

void SequenceRows::KeepRows(uint32_t group, std::span<const RowSpan> spans) {
  PageTable kept;
  for (const RowSpan& span : spans) {
    for (const Extent& extent : tables[group].Cover(span.begin, span.end)) kept.Append(extent);
  }
  tables[group] = std::move(kept);
}

uint64_t SequenceRows::RowAt(int64_t at) const {
  if (positions.empty()) {
    return at < 0 ? 0 : std::min<uint64_t>(static_cast<uint64_t>(at), tokens.size());
  }
  return std::lower_bound(positions.begin(), positions.end(), at) - positions.begin();
}

PositionExtent SequenceRows::ExtentOf(uint32_t group) const {
  PositionExtent out;
  if (tables[group].empty()) return out;
  out.contiguous = true;
  for (const Extent& extent : tables[group].extents()) {
    for (uint64_t row = extent.first_row; row < extent.end_row(); ++row) {
      const int64_t at = position(row);
      if (out.rows == 0)
        out.min = at;
      else if (at != out.max + 1)
        out.contiguous = false;
      out.max = at;
      ++out.rows;
      if (!positions.empty()) continue;
      // Implicit positions are contiguous inside an extent.
      out.rows += extent.count - 1;
      out.max = at + extent.count - 1;
      break;
    }
  }
  return out;
}

std::vector<PositionedRun> SequenceRows::Runs(uint32_t group, uint64_t begin, uint64_t end) const {
  std::vector<PositionedRun> runs;
  for (const Extent& extent : tables[group].Cover(begin, end)) {
    uint64_t row = extent.first_row;
    while (row < extent.end_row()) {
      uint64_t last = row + 1;
      if (positions.empty()) last = extent.end_row();
      while (last < extent.end_row() && positions[last] == positions[last - 1] + 1) ++last;
      Extent part = extent;
      part.first_slot += static_cast<uint32_t>(row - extent.first_row);
      part.count = static_cast<uint32_t>(last - row);
      part.first_row = row;
      runs.push_back({part, position(row)});
      row = last;
    }
  }
  return runs;
}

void SequenceRows::AppendTokens(std::span<const uint32_t> added) {
  int64_t at = end_position();
  PT_CHECK(at + static_cast<int64_t>(added.size()) <= kMaxPosition + 1);
  const bool is_explicit = !positions.empty();
  tokens.insert(tokens.end(), added.begin(), added.end());
  for (size_t i = 0; is_explicit && i < added.size(); ++i) {
    positions.push_back(static_cast<int32_t>(at++));
  }
}

std::vector<PageId> SequenceRows::Truncate(uint64_t rows, uint32_t page_tokens) {
  std::vector<PageId> gone;
  if (rows >= num_rows()) return gone;
  for (PageTable& table : tables) {
    const std::vector<PageId> pages = table.Truncate(rows);
    gone.insert(gone.end(), pages.begin(), pages.end());
  }
  tokens.resize(rows);
  if (!positions.empty()) positions.resize(rows);
  if (canonical_limit >= rows) {
    canonical_limit = kAllRows;
    positions.clear();
  }
  keys.resize(std::min<size_t>(keys.size(), canonical_rows() / page_tokens));
  std::erase_if(inputs, [&](const PositionedInput& input) { return input.position >= rows; });
  return gone;
}

void SequenceRows::AppendTokens(std::span<const uint32_t> added, std::span<const int64_t> at) {
  PT_CHECK(added.size() == at.size());
  for (size_t i = 0; i < added.size(); ++i) {
    const int64_t next = end_position();
    PT_CHECK(at[i] >= next && at[i] <= kMaxPosition);
    if (at[i] != next) {
      canonical_limit = std::min(canonical_limit, num_rows());
      if (positions.empty()) {
        for (uint64_t row = 0; row < num_rows(); ++row) {
          positions.push_back(static_cast<int32_t>(row));
        }
        positions.reserve(positions.size() + added.size());
      }
    }
    // Still implicit only while there is no gap; of an empty sequence a first gap makes it
    // explicit.
    if (!positions.empty() || at[i] != next) positions.push_back(static_cast<int32_t>(at[i]));
    tokens.push_back(added[i]);
  }
}

SequenceRows Assemble(std::span<const GroupTraits> groups, uint32_t page_tokens,
                      std::span<const RowPiece> pieces) {
  SequenceRows out;
  out.tables.resize(groups.size());
  const SequenceRows* base = nullptr;
  uint64_t row = 0;
  bool is_implicit = true;
  bool is_canonical = true;
  int64_t last = 0;
  std::vector<int32_t> positions;
  for (const RowPiece& piece : pieces) {
    if (piece.empty()) continue;
    const SequenceRows& from = *piece.from;
    if (is_canonical) {
      if (base == nullptr) base = &from;
      const bool is_unmoved = &from == base && piece.begin == row && piece.delta == 0;
      const uint64_t limit = is_unmoved ? std::min(from.canonical_limit, piece.end) : row;
      if (!is_unmoved || limit < piece.end) {
        is_canonical = false;
        out.canonical_limit = limit;
      }
    }
    out.tokens.insert(out.tokens.end(), from.tokens.begin() + piece.begin,
                      from.tokens.begin() + piece.end);
    for (uint64_t r = piece.begin; r < piece.end; ++r) {
      const int64_t at = piece.position(r);
      PT_CHECK(at >= last && at <= kMaxPosition);
      last = at;
      is_implicit = is_implicit && at == static_cast<int64_t>(row + (r - piece.begin));
      positions.push_back(static_cast<int32_t>(at));
    }
    for (size_t g = 0; g < groups.size(); ++g) {
      for (Extent extent : from.tables[g].Cover(piece.begin, piece.end)) {
        extent.first_row = row + (extent.first_row - piece.begin);
        if (groups[g].rotates) extent.shift = static_cast<int32_t>(extent.shift + piece.delta);
        out.tables[g].Append(extent);
      }
    }
    row += piece.end - piece.begin;
  }
  if (!is_implicit) out.positions = std::move(positions);
  if (base != nullptr) {
    const uint64_t canonical = out.canonical_rows();
    const size_t num_keys = std::min<size_t>(base->keys.size(), canonical / page_tokens);
    out.keys.assign(base->keys.begin(), base->keys.begin() + num_keys);
    for (const PositionedInput& input : base->inputs) {
      if (input.position < canonical) out.inputs.push_back(input);
    }
  }
  return out;
}

std::vector<RowPiece> MergeByPosition(std::vector<RowPiece> a, std::vector<RowPiece> b,
                                      int64_t* occupied) {
  std::vector<RowPiece> out;
  *occupied = -1;
  Cursor left(a), right(b);
  while (!left.done() || !right.done()) {
    bool take_left = right.done();
    // Of equal positions the one with the lower key comes first.
    const auto keys_of = [&]() -> std::pair<uint64_t, uint64_t> {
      if (left.at().from == right.at().from) return {left.row, right.row};
      return {0, 1};
    };
    if (!left.done() && !right.done()) {
      const auto [left_key, right_key] = keys_of();
      take_left = std::tuple(left.position(), left_key) < std::tuple(right.position(), right_key);
    }
    Cursor& from = take_left ? left : right;
    const Cursor& other = take_left ? right : left;
    const RowPiece& piece = from.at();
    // All rows of this piece that come before the other list's next row: at least one.
    uint64_t end = piece.end;
    if (!other.done()) {
      const bool is_same_source = piece.from == other.at().from;
      const int64_t limit = other.position();
      uint64_t low = from.row + 1;
      while (low < end) {
        const uint64_t middle = low + (end - low) / 2;
        const int64_t at = piece.position(middle);
        const bool is_before =
            at < limit || (at == limit && (is_same_source ? middle < other.row : take_left));
        if (is_before)
          low = middle + 1;
        else
          end = middle;
      }
      if (*occupied < 0 && piece.position(end - 1) == limit) *occupied = limit;
    }
    RowPiece taken{piece.from, from.row, end, piece.delta};
    if (!out.empty() && out.back().from == taken.from && out.back().end == taken.begin &&
        out.back().delta == taken.delta) {
      out.back().end = taken.end;
    } else {
      out.push_back(taken);
    }
    if (end == piece.end)
      from.Enter(from.piece + 1);
    else
      from.row = end;
  }
  return out;
}

}  // namespace pagetide
