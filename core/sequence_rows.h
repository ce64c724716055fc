// SequenceRows: what a sequence holds: its tokens, where each stands, and which rows of which pages
// hold their K and V. A value: edits make a new one, so that a refused edit changes nothing and
// several edits become visible at once.
//
// Rows are ordered by position; rows that share one (after DividePositions) keep the order they
// had. Positions are implicit (row n is at position n) until an edit makes them explicit. Rows in
// front of canonical_limit stand at their original positions and were computed over exactly the
// tokens before them; only they have keys. A window group holds at least the rows that the next
// token can attend to; those in front of them it gives up by and by. Not thread-safe.
#ifndef PAGETIDE_CORE_SEQUENCE_ROWS_H_
#define PAGETIDE_CORE_SEQUENCE_ROWS_H_

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/strings/string_view.h"
#include "core/geometry.h"
#include "core/keys.h"
#include "core/page_table.h"

namespace pagetide {

// Positions are 0 to this: what an engine's 32-bit position can hold.
inline constexpr int64_t kMaxPosition = std::numeric_limits<int32_t>::max();

// What the algebra must know of a layer group.
struct GroupTraits {
  bool can_shift = true;  // rows can be given another position
  bool rotates = true;    // K depends on the position: a move leaves a pending shift
  // Which rows a query sees; kNone: all in front of it.
  LayerGroupSpec::WindowType window = LayerGroupSpec::WindowType::kNone;
  uint32_t window_tokens = 0;
  int64_t keep_tokens = 0;  // kRing: positions below it are seen by every query
  // Pages are written and kept whole: their rows cannot be told apart.
  bool is_whole = false;
  // Of whole pages only the last is kept: the state behind the last row.
  bool is_state = false;
  // Later tokens do not need all rows.
  bool forgets() const { return is_state || window != LayerGroupSpec::WindowType::kNone; }
  // The first position, but for those kept for good, that a query at `next`, or at any position
  // behind it, can attend to.
  int64_t FirstVisible(int64_t next) const;
  friend bool operator==(const GroupTraits&, const GroupTraits&) = default;
};
GroupTraits TraitsOf(const LayerGroupSpec& group);

// Of one layer group. Of an empty one min and max are -1.
struct PositionExtent {
  int64_t min = -1;
  int64_t max = -1;
  uint64_t rows = 0;
  bool contiguous = false;  // every position from min to max has exactly one row
  friend bool operator==(const PositionExtent&, const PositionExtent&) = default;
};

// Rows of an extent that stand at consecutive positions.
struct PositionedRun {
  Extent extent;
  int64_t first_position = 0;
  friend bool operator==(const PositionedRun&, const PositionedRun&) = default;
};

// Rows [begin, end).
struct RowSpan {
  uint64_t begin = 0;
  uint64_t end = 0;
  friend bool operator==(const RowSpan&, const RowSpan&) = default;
};
// `spans` ascend.
bool Holds(std::span<const RowSpan> spans, uint64_t row);
// Of rows [begin, end), the first that `spans`, which ascend, do not hold; `end` when they hold
// all.
uint64_t FirstGap(std::span<const RowSpan> spans, uint64_t begin, uint64_t end);

// A row that a layer group would need and does not have, or not without those behind it.
struct LackedRow {
  uint32_t group = 0;
  uint64_t row = 0;
  bool is_inside = false;  // of a page or a state that cannot be cut there
};
// FAILED_PRECONDITION: ROWS_RECLAIMED, or CANNOT_CUT for what is inside.
absl::Status RowsLacking(absl::string_view what, const LackedRow& lacked);

// How many leading rows are of use to the next token, and what a longer prefix would lack.
struct UsablePrefix {
  uint64_t rows = 0;
  std::optional<LackedRow> lacked;
};

struct SequenceRows {
  static constexpr uint64_t kAllRows = std::numeric_limits<uint64_t>::max();

  std::vector<uint32_t> tokens;         // [row]
  std::vector<int32_t> positions;       // [row], never decreasing; empty: row n is at position n
  std::vector<PageTable> tables;        // [group]
  std::vector<PrefixKey> keys;          // of each full page of canonical rows
  std::vector<PositionedInput> inputs;  // of canonical rows, ascending
  uint64_t canonical_limit = kAllRows;  // rows from here on are not canonical

  uint64_t num_rows() const { return tokens.size(); }
  uint64_t canonical_rows() const { return std::min<uint64_t>(canonical_limit, tokens.size()); }
  bool is_canonical() const { return canonical_limit >= tokens.size(); }
  // Will the next row be, at the next position? Rows of a private sequence never are.
  bool is_next_canonical() const { return canonical_limit > tokens.size(); }
  int64_t position(uint64_t row) const {
    return positions.empty() ? static_cast<int64_t>(row) : positions[row];
  }
  // One past the last row's position, where the next token goes; 0 when there is none.
  int64_t end_position() const { return tokens.empty() ? 0 : position(tokens.size() - 1) + 1; }
  // The first row at `at` or behind it; num_rows() when there is none.
  uint64_t RowAt(int64_t at) const;
  PositionExtent ExtentOf(uint32_t group) const;
  // Leading rows that stay, whatever the next position.
  uint64_t KeptRows(const GroupTraits& traits) const { return RowAt(traits.keep_tokens); }
  // Rows in front of this one, but for kept ones, are behind the window of a query at `next`.
  uint64_t MaskedRows(const GroupTraits& traits, int64_t next) const {
    return RowAt(traits.FirstVisible(next));
  }
  // What the next token could attend to and a group does not hold, if only the first `rows` rows
  // were there.
  std::optional<LackedRow> LackedAt(std::span<const GroupTraits> groups, uint64_t rows) const;
  // The same of one group.
  std::optional<LackedRow> LackedIn(uint32_t group, const GroupTraits& traits, uint64_t rows) const;
  // The same of a copy of the sequence that holds held[group] of its rows, spans that ascend. No
  // group is whole: of pages that cannot be cut spans do not tell where they end.
  std::optional<LackedRow> LackedAt(std::span<const GroupTraits> groups,
                                    std::span<const std::vector<RowSpan>> held,
                                    uint64_t rows) const;
  // The longest prefix of such a copy, of at most `rows` rows, that lacks nothing.
  UsablePrefix LongestUsable(std::span<const GroupTraits> groups,
                             std::span<const std::vector<RowSpan>> held, uint64_t rows) const;
  // Gives up extents that no later token can attend to. Returns their pages, one for each extent.
  std::vector<PageId> DropMasked(std::span<const GroupTraits> groups);
  // The rows that a group holds, ascending; neighbours are one span.
  std::vector<RowSpan> HeldRows(uint32_t group) const;
  // A group gives up what is outside `spans`, which ascend. References are the caller's to count.
  void KeepRows(uint32_t group, std::span<const RowSpan> spans);
  // Rows [begin, end) of a group, cut where positions or slots do not carry on.
  std::vector<PositionedRun> Runs(uint32_t group, uint64_t begin, uint64_t end) const;

  // Adds tokens at the next positions. The tables are the caller's to grow.
  void AppendTokens(std::span<const uint32_t> added);
  // Adds tokens at positions of their own, which ascend from end_position() or behind it. From the
  // first gap on the rows are not canonical.
  void AppendTokens(std::span<const uint32_t> added, std::span<const int64_t> at);
  // Cuts to the first `rows` rows. Returns the pages whose extents went. A sequence that is cut
  // back to its canonical rows is canonical again.
  std::vector<PageId> Truncate(uint64_t rows, uint32_t page_tokens);
};

// Rows [begin, end) of a sequence, moved by `delta` positions.
struct RowPiece {
  const SequenceRows* from = nullptr;
  uint64_t begin = 0;
  uint64_t end = 0;
  int64_t delta = 0;
  bool empty() const { return begin >= end; }
  int64_t position(uint64_t row) const { return from->position(row) + delta; }
};

// The sequence that consists of `pieces` in order; positions must not decrease along them and lie
// in [0, kMaxPosition]. It shares pages with where they come from. What of it is canonical follows
// from the pieces: rows at their own index of one source, unmoved.
SequenceRows Assemble(std::span<const GroupTraits> groups, uint32_t page_tokens,
                      std::span<const RowPiece> pieces);

// The rows of `a` and `b`, each ordered by position, in the order of positions. Rows at the same
// position keep their order if they come from one sequence; else those of `a` come first. *occupied
// becomes the first position that both lists hold, or -1.
std::vector<RowPiece> MergeByPosition(std::vector<RowPiece> a, std::vector<RowPiece> b,
                                      int64_t* occupied);

}  // namespace pagetide

#endif  // PAGETIDE_CORE_SEQUENCE_ROWS_H_
