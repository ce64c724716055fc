#include "core/sequence_editor.h"

#include <algorithm>
#include <cmath>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/strings/str_cat.h"
#include "base/check.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

std::string RangeText(PositionRange range) {
  return absl::StrCat("[", range.begin, ", ", range.end, ")");
}

bool IsNothing(const EditOutcome& outcome) {
  return outcome == EditOutcome{};
}

}  // namespace

EditOutcome& EditOutcome::operator+=(const EditOutcome& other) {
  removed_rows += other.removed_rows;
  moved_rows += other.moved_rows;
  copied_rows += other.copied_rows;
  others_changed += other.others_changed;
  return *this;
}

SequenceEditor::SequenceEditor(Options options, const Sequences* sequences)
    : options_(std::move(options)), sequences_(sequences) {}

const SequenceRows& SequenceEditor::Rows(uint64_t sequence) const {
  const auto changed = changed_.find(sequence);
  if (changed != changed_.end()) return changed->second;
  const SequenceRows* rows = sequences_->Find(sequence);
  PT_CHECK(rows != nullptr);
  return *rows;
}

absl::Status SequenceEditor::Put(uint64_t sequence, std::span<const RowPiece> pieces) {
  // Built before it replaces what the pieces may come from.
  SequenceRows rows = Assemble(options_.groups, options_.page_tokens, pieces);
  if (const auto lacked = rows.LackedAt(options_.groups, rows.num_rows())) {
    return RowsLacking("edit", *lacked);
  }
  changed_.insert_or_assign(sequence, std::move(rows));
  return absl::OkStatus();
}

absl::StatusOr<SequenceEditor::RowRange> SequenceEditor::RowsIn(const SequenceRows& rows,
                                                                PositionRange range) const {
  const int64_t begin = std::max<int64_t>(range.begin, 0);
  const int64_t end = range.end < 0 ? kMaxPosition + 1 : range.end;
  if (begin > end && range.end >= 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("range ", RangeText(range), " begins behind its end"));
  }
  const uint64_t first = rows.RowAt(begin);
  return RowRange{first, std::max(first, rows.RowAt(end))};
}

absl::Status SequenceEditor::CheckCut(const SequenceRows& rows, uint64_t begin,
                                      uint64_t end) const {
  if (begin == end || (begin == 0 && end == rows.num_rows())) return absl::OkStatus();
  for (uint32_t g = 0; g < options_.groups.size(); ++g) {
    if (!options_.groups[g].is_whole) continue;
    // What is kept whole can end where one of its pages does.
    const bool is_end = end == rows.num_rows();
    if (is_end && !rows.LackedIn(g, options_.groups[g], begin)) continue;
    return CannotCut(absl::StrCat("cut rows [", begin, ", ", end, ") of ", rows.num_rows()), g);
  }
  return absl::OkStatus();
}

absl::Status SequenceEditor::CheckCopy(const SequenceRows& from, RowRange range,
                                       const SequenceRows& to) const {
  if (range.begin == range.end) return absl::OkStatus();
  for (uint32_t g = 0; g < options_.groups.size(); ++g) {
    if (!options_.groups[g].is_whole) continue;
    if (range.begin == 0 && to.num_rows() == 0 &&
        !from.LackedIn(g, options_.groups[g], range.end)) {
      continue;
    }
    return CannotCut(absl::StrCat("copy rows [", range.begin, ", ", range.end, ") of ",
                                  from.num_rows(), " to a sequence of ", to.num_rows(), " rows"),
                     g);
  }
  return absl::OkStatus();
}

absl::Status SequenceEditor::CannotCut(absl::string_view what, uint32_t group) const {
  const bool is_state = options_.groups[group].is_state;
  return WithReason(
      absl::FailedPreconditionError(absl::StrCat(
          what, ": layer group ", group, " holds ",
          is_state
              ? "a state of the whole sequence, which cannot be cut; checkpoints are the points "
                "to come back to"
              : "pages in the engine's own layout, which are whole or not at all")),
      error_reason::kCannotCut, {{"group", absl::StrCat(group)}});
}

absl::Status SequenceEditor::CheckShift() const {
  for (size_t g = 0; g < options_.groups.size(); ++g) {
    if (options_.groups[g].can_shift) continue;
    return WithReason(absl::FailedPreconditionError(
                          absl::StrCat("move positions: rows of layer group ", g,
                                       " cannot be rotated (packed, opaque, or of another basis)")),
                      error_reason::kCannotShift, {{"group", absl::StrCat(g)}});
  }
  return absl::OkStatus();
}

absl::StatusOr<EditOutcome> SequenceEditor::Apply(const SequenceEdit& edit) {
  struct Visitor {
    SequenceEditor& editor;
    using Result = absl::StatusOr<EditOutcome>;
    Result operator()(const RemoveRangeEdit& e) { return editor.RemoveRange(e.sequence, e.range); }
    Result operator()(const CopyRangeEdit& e) {
      return editor.CopyRange(e.from, e.to, e.range, e.allow_overlap);
    }
    Result operator()(const KeepOnlyEdit& e) { return editor.KeepOnly(e.sequences); }
    Result operator()(const ShiftPositionsEdit& e) {
      return editor.ShiftPositions(e.sequence, e.range, e.delta, e.on_shared, e.allow_overlap);
    }
    Result operator()(const DividePositionsEdit& e) {
      return editor.DividePositions(e.sequence, e.range, e.divisor, e.allow_overlap);
    }
    Result operator()(const ShiftWindowEdit& e) { return editor.ShiftWindow(e.sequence, e.window); }
    Result operator()(const RewindEdit& e) { return editor.Rewind(e.sequence, e.rows); }
    Result operator()(const ClearEdit& e) { return editor.Clear(e.sequence); }
    Result operator()(const ReorderEdit& e) {
      return editor.Reorder(e.sequences, e.order, e.allow_repeats);
    }
  };
  return std::visit(Visitor{*this}, edit);
}

absl::StatusOr<EditOutcome> SequenceEditor::RemoveRange(uint64_t sequence, PositionRange range) {
  const SequenceRows& rows = Rows(sequence);
  PT_ASSIGN_OR_RETURN(const RowRange cut, RowsIn(rows, range));
  PT_RETURN_IF_ERROR(CheckCut(rows, cut.begin, cut.end));
  EditOutcome outcome;
  outcome.removed_rows = cut.end - cut.begin;
  if (outcome.removed_rows == 0) return outcome;
  PT_RETURN_IF_ERROR(Put(
      sequence, std::vector<RowPiece>{{&rows, 0, cut.begin}, {&rows, cut.end, rows.num_rows()}}));
  return outcome;
}

absl::StatusOr<EditOutcome> SequenceEditor::KeepRuns(uint64_t sequence,
                                                     std::span<const KeptRun> runs) {
  const SequenceRows& rows = Rows(sequence);
  PT_CHECK(rows.positions.empty());
  EditOutcome outcome;
  std::vector<RowPiece> pieces;
  uint64_t row = 0;
  for (const KeptRun& run : runs) {
    PT_CHECK(row <= run.begin && run.begin <= run.end && run.end <= rows.num_rows());
    PT_CHECK(run.position <= run.begin);
    PT_RETURN_IF_ERROR(CheckCut(rows, row, run.begin));
    const int64_t delta = static_cast<int64_t>(run.position) - static_cast<int64_t>(run.begin);
    if (delta != 0 && run.begin < run.end) {
      PT_RETURN_IF_ERROR(CheckShift());
      outcome.moved_rows += run.end - run.begin;
    }
    outcome.removed_rows += run.begin - row;
    pieces.push_back({&rows, run.begin, run.end, delta});
    row = run.end;
  }
  PT_RETURN_IF_ERROR(CheckCut(rows, row, rows.num_rows()));
  outcome.removed_rows += rows.num_rows() - row;
  if (!IsNothing(outcome)) PT_RETURN_IF_ERROR(Put(sequence, pieces));
  return outcome;
}

absl::StatusOr<EditOutcome> SequenceEditor::CopyRange(uint64_t from, uint64_t to,
                                                      PositionRange range, bool allow_overlap) {
  if (from == to) {
    return absl::InvalidArgumentError("copy range: source and target are the same sequence");
  }
  const SequenceRows& source = Rows(from);
  const SequenceRows& target = Rows(to);
  PT_ASSIGN_OR_RETURN(const RowRange copied, RowsIn(source, range));
  PT_RETURN_IF_ERROR(CheckCopy(source, copied, target));
  EditOutcome outcome;
  outcome.copied_rows = copied.end - copied.begin;
  if (outcome.copied_rows == 0) return outcome;
  if (target.num_rows() + outcome.copied_rows > options_.max_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("copy range ", RangeText(range), ": ", target.num_rows(), " + ",
                     outcome.copied_rows, " rows exceed the limit of ", options_.max_rows));
  }
  int64_t occupied = -1;
  const std::vector<RowPiece> merged = MergeByPosition(
      {{&target, 0, target.num_rows()}}, {{&source, copied.begin, copied.end}}, &occupied);
  if (occupied >= 0 && !allow_overlap) {
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat(
            "copy range ", RangeText(range), ": the target has a row at position ", occupied)),
        error_reason::kPositionOccupied, {{"position", absl::StrCat(occupied)}});
  }
  PT_RETURN_IF_ERROR(Put(to, merged));
  return outcome;
}

absl::StatusOr<EditOutcome> SequenceEditor::KeepOnly(std::span<const uint64_t> sequences) {
  if (sequences.empty()) return absl::InvalidArgumentError("keep only: no sequence is named");
  EditOutcome outcome;
  std::vector<uint64_t> others;
  sequences_->ForEach([&](uint64_t number, const SequenceRows&) {
    if (std::find(sequences.begin(), sequences.end(), number) == sequences.end()) {
      others.push_back(number);
    }
  });
  for (uint64_t other : others) {
    const uint64_t num_rows = Rows(other).num_rows();
    if (num_rows == 0) continue;
    outcome.removed_rows += num_rows;
    ++outcome.others_changed;
    PT_RETURN_IF_ERROR(Put(other, {}));
  }
  return outcome;
}

std::vector<SequenceEditor::RowRange> SequenceEditor::SharedRows(const SequenceRows& rows,
                                                                 RowRange range,
                                                                 const SequenceRows& other) const {
  std::vector<RowRange> found;
  for (size_t g = 0; g < options_.groups.size(); ++g) {
    absl::flat_hash_map<PageId, std::vector<Extent>> by_page;
    for (const Extent& extent : rows.tables[g].Cover(range.begin, range.end)) {
      by_page[extent.page].push_back(extent);
    }
    for (const Extent& extent : other.tables[g].extents()) {
      const auto it = by_page.find(extent.page);
      if (it == by_page.end()) continue;
      for (const Extent& mine : it->second) {
        const uint32_t first = std::max(mine.first_slot, extent.first_slot);
        const uint32_t last = std::min(mine.end_slot(), extent.end_slot());
        if (first >= last) continue;
        const uint64_t row = extent.first_row + (first - extent.first_slot);
        found.push_back({row, row + (last - first)});
      }
    }
  }
  std::sort(found.begin(), found.end(),
            [](const RowRange& a, const RowRange& b) { return a.begin < b.begin; });
  std::vector<RowRange> joined;
  for (const RowRange& next : found) {
    if (!joined.empty() && next.begin <= joined.back().end)
      joined.back().end = std::max(joined.back().end, next.end);
    else
      joined.push_back(next);
  }
  return joined;
}

absl::StatusOr<EditOutcome> SequenceEditor::Settle(uint64_t sequence, std::vector<RowPiece> resting,
                                                   std::vector<RowPiece> moved,
                                                   bool allow_overlap) {
  int64_t occupied = -1;
  EditOutcome outcome;
  for (const RowPiece& piece : moved) {
    if (piece.delta != 0) outcome.moved_rows += piece.end - piece.begin;
  }
  const std::vector<RowPiece> merged =
      MergeByPosition(std::move(resting), std::move(moved), &occupied);
  if (occupied >= 0 && !allow_overlap) {
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat(
            "move positions: a row that does not move is at position ", occupied, " already")),
        error_reason::kPositionOccupied, {{"position", absl::StrCat(occupied)}});
  }
  PT_RETURN_IF_ERROR(Put(sequence, merged));
  return outcome;
}

absl::StatusOr<EditOutcome> SequenceEditor::Move(uint64_t sequence,
                                                 std::span<const RowRange> ranges, int64_t delta,
                                                 bool allow_overlap) {
  const SequenceRows& rows = Rows(sequence);
  std::vector<RowPiece> resting, moved;
  uint64_t at = 0;
  uint64_t removed = 0;
  for (const RowRange& range : ranges) {
    if (range.begin == range.end) continue;
    int64_t last = 0;
    if (__builtin_add_overflow(rows.position(range.end - 1), delta, &last) || last > kMaxPosition) {
      return absl::InvalidArgumentError(absl::StrCat("move positions: position ",
                                                     rows.position(range.end - 1), " + ", delta,
                                                     " is above ", kMaxPosition));
    }
    // Rows that would stand in front of position 0 go.
    const uint64_t begin =
        delta < 0 ? std::clamp(rows.RowAt(-delta), range.begin, range.end) : range.begin;
    if (begin > range.begin) PT_RETURN_IF_ERROR(CheckCut(rows, range.begin, begin));
    removed += begin - range.begin;
    resting.push_back({&rows, at, range.begin});
    moved.push_back({&rows, begin, range.end, delta});
    at = range.end;
  }
  resting.push_back({&rows, at, rows.num_rows()});
  PT_ASSIGN_OR_RETURN(EditOutcome outcome,
                      Settle(sequence, std::move(resting), std::move(moved), allow_overlap));
  outcome.removed_rows = removed;
  return outcome;
}

absl::StatusOr<EditOutcome> SequenceEditor::ShiftPositions(uint64_t sequence, PositionRange range,
                                                           int64_t delta, OnShared on_shared,
                                                           bool allow_overlap) {
  const SequenceRows& rows = Rows(sequence);
  PT_ASSIGN_OR_RETURN(const RowRange moved, RowsIn(rows, range));
  if (delta > kMaxPosition || delta < -kMaxPosition) {
    return absl::InvalidArgumentError(
        absl::StrCat("shift positions: delta ", delta, " is not within +-", kMaxPosition));
  }
  if (delta == 0) return EditOutcome{};
  PT_RETURN_IF_ERROR(CheckShift());
  if (moved.begin == moved.end) return EditOutcome{};

  std::vector<std::pair<uint64_t, std::vector<RowRange>>> sharers;
  if (on_shared != OnShared::kCopy) {
    sequences_->ForEach([&](uint64_t number, const SequenceRows&) {
      if (number == sequence) return;
      std::vector<RowRange> shared = SharedRows(rows, moved, Rows(number));
      if (!shared.empty()) sharers.emplace_back(number, std::move(shared));
    });
  }
  if (on_shared == OnShared::kReject && !sharers.empty()) {
    return WithReason(absl::FailedPreconditionError(
                          absl::StrCat("shift positions ", RangeText(range), ": ", sharers.size(),
                                       " other sequences reference rows in the range")),
                      error_reason::kRowsShared, {{"sequences", absl::StrCat(sharers.size())}});
  }
  PT_ASSIGN_OR_RETURN(EditOutcome outcome, Move(sequence, {&moved, 1}, delta, allow_overlap));
  for (const auto& [number, shared] : sharers) {
    PT_ASSIGN_OR_RETURN(const EditOutcome other, Move(number, shared, delta, allow_overlap));
    outcome += other;
    ++outcome.others_changed;
  }
  return outcome;
}

absl::StatusOr<EditOutcome> SequenceEditor::DividePositions(uint64_t sequence, PositionRange range,
                                                            int64_t divisor, bool allow_overlap) {
  const SequenceRows& rows = Rows(sequence);
  PT_ASSIGN_OR_RETURN(const RowRange divided, RowsIn(rows, range));
  if (divisor < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("divide positions: divisor ", divisor, " is not at least 1"));
  }
  if (divisor == 1) return EditOutcome{};
  PT_RETURN_IF_ERROR(CheckShift());
  std::vector<RowPiece> moved;
  for (uint64_t row = divided.begin; row < divided.end; ++row) {
    const int64_t at = rows.position(row);
    const int64_t delta = at / divisor - at;
    if (!moved.empty() && moved.back().delta == delta)
      moved.back().end = row + 1;
    else
      moved.push_back({&rows, row, row + 1, delta});
  }
  const bool changes = std::any_of(moved.begin(), moved.end(),
                                   [](const RowPiece& piece) { return piece.delta != 0; });
  if (!changes) return EditOutcome{};
  return Settle(sequence, {{&rows, 0, divided.begin}, {&rows, divided.end, rows.num_rows()}},
                std::move(moved), allow_overlap);
}

absl::StatusOr<EditOutcome> SequenceEditor::ShiftWindow(uint64_t sequence,
                                                        const WindowShift& window) {
  const SequenceRows& rows = Rows(sequence);
  const int64_t num_rows = static_cast<int64_t>(rows.num_rows());
  if (window.discard.has_value() == window.fraction.has_value()) {
    return absl::InvalidArgumentError(
        "shift window: exactly one of discard and fraction must be given");
  }
  if (window.keep < 0 || window.keep > num_rows) {
    return absl::InvalidArgumentError(
        absl::StrCat("shift window: keep = ", window.keep, " is not 0 to ", num_rows));
  }
  const int64_t rest = num_rows - window.keep;
  int64_t discard = 0;
  if (window.discard) {
    discard = *window.discard;
    if (discard < 0 || discard > rest) {
      return absl::InvalidArgumentError(
          absl::StrCat("shift window: discard = ", discard, " is not 0 to ", rest,
                       ", the rows behind the ", window.keep, " kept"));
    }
  } else {
    if (!(*window.fraction >= 0 && *window.fraction <= 1)) {
      return absl::InvalidArgumentError(
          absl::StrCat("shift window: fraction = ", *window.fraction, " is not 0 to 1"));
    }
    discard = static_cast<int64_t>(std::floor(static_cast<double>(rest) * *window.fraction));
  }
  if (discard == 0) return EditOutcome{};
  const uint64_t keep = static_cast<uint64_t>(window.keep);
  const uint64_t next = keep + static_cast<uint64_t>(discard);
  PT_RETURN_IF_ERROR(CheckCut(rows, keep, next));
  EditOutcome outcome;
  outcome.removed_rows = static_cast<uint64_t>(discard);
  if (next == rows.num_rows()) {
    PT_RETURN_IF_ERROR(Put(sequence, std::vector<RowPiece>{{&rows, 0, keep}}));
    return outcome;
  }
  // The first row that stays takes the place of the first that goes.
  const int64_t delta = rows.position(keep) - rows.position(next);
  if (delta != 0) {
    PT_RETURN_IF_ERROR(CheckShift());
    outcome.moved_rows = rows.num_rows() - next;
  }
  PT_RETURN_IF_ERROR(Put(
      sequence, std::vector<RowPiece>{{&rows, 0, keep}, {&rows, next, rows.num_rows(), delta}}));
  return outcome;
}

absl::StatusOr<EditOutcome> SequenceEditor::Rewind(uint64_t sequence, int64_t wanted) {
  const SequenceRows& rows = Rows(sequence);
  if (wanted < 0 || static_cast<uint64_t>(wanted) > rows.num_rows()) {
    return absl::InvalidArgumentError(
        absl::StrCat("rewind: length = ", wanted, " is not 0 to ", rows.num_rows()));
  }
  const uint64_t kept = static_cast<uint64_t>(wanted);
  PT_RETURN_IF_ERROR(CheckCut(rows, kept, rows.num_rows()));
  EditOutcome outcome;
  outcome.removed_rows = rows.num_rows() - kept;
  if (!IsNothing(outcome)) {
    PT_RETURN_IF_ERROR(Put(sequence, std::vector<RowPiece>{{&rows, 0, kept}}));
  }
  return outcome;
}

absl::StatusOr<EditOutcome> SequenceEditor::Clear(uint64_t sequence) {
  return Rewind(sequence, 0);
}

absl::StatusOr<EditOutcome> SequenceEditor::Reorder(std::span<const uint64_t> sequences,
                                                    std::span<const uint32_t> order,
                                                    bool allow_repeats) {
  if (sequences.empty() || sequences.size() != order.size()) {
    return absl::InvalidArgumentError(absl::StrCat("reorder sequences: ", sequences.size(),
                                                   " sequences and ", order.size(),
                                                   " indices; one index for each is needed"));
  }
  std::vector<uint64_t> sorted(sequences.begin(), sequences.end());
  std::sort(sorted.begin(), sorted.end());
  if (std::adjacent_find(sorted.begin(), sorted.end()) != sorted.end()) {
    return absl::InvalidArgumentError("reorder sequences: a sequence is named twice");
  }
  std::vector<bool> is_used(order.size(), false);
  for (size_t i = 0; i < order.size(); ++i) {
    if (order[i] >= order.size()) {
      return absl::InvalidArgumentError(absl::StrCat(
          "reorder sequences: order[", i, "] = ", order[i], " is not below ", order.size()));
    }
    if (is_used[order[i]] && !allow_repeats) {
      return absl::InvalidArgumentError(
          absl::StrCat("reorder sequences: order[", i, "] = ", order[i],
                       " is there twice: not a permutation, and repeats are not allowed"));
    }
    is_used[order[i]] = true;
  }
  EditOutcome outcome;
  std::vector<SequenceRows> made;
  for (uint32_t index : order) made.push_back(Rows(sequences[index]));
  for (size_t i = 0; i < order.size(); ++i) {
    if (order[i] == i) continue;
    outcome.copied_rows += made[i].num_rows();
    ++outcome.others_changed;
    changed_.insert_or_assign(sequences[i], std::move(made[i]));
  }
  return outcome;
}

}  // namespace pagetide
