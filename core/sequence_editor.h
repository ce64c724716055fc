// SequenceEditor: the algebra of sequences (FEATURES B). A transaction: it works on copies of the
// sequences it touches, and its owner puts them in place together, or throws the editor away after
// the first refusal. Edits move references and positions only; no row is copied or rotated. Rows
// that two sequences reference are copied when one of them writes behind them
// (core/sequence_pages.h); K is rotated when it is read, by the shift of its extent.
//
// Ranges are [p0, p1) over positions. Errors: INVALID_ARGUMENT for what can never be right,
// FAILED_PRECONDITION with a reason (CANNOT_CUT, CANNOT_SHIFT, POSITION_OCCUPIED, ROWS_SHARED,
// ROWS_RECLAIMED) for what the sequence or its model does not allow. Not thread-safe; the sequences
// must not change while it lives.
#ifndef PAGETIDE_CORE_SEQUENCE_EDITOR_H_
#define PAGETIDE_CORE_SEQUENCE_EDITOR_H_

#include <cstdint>
#include <optional>
#include <span>
#include <string>
#include <variant>
#include <vector>

#include "absl/container/btree_map.h"
#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "core/sequence_rows.h"

namespace pagetide {

// [begin, end) as given by callers: begin < 0 means 0, end < 0 means the end of the sequence.
struct PositionRange {
  int64_t begin = 0;
  int64_t end = -1;
};

// What to do with rows that other sequences reference too.
enum class OnShared : uint8_t {
  kCopy = 0,     // they stay where they are for the others
  kMoveAll = 1,  // they move for the others too
  kReject = 2,   // refuse: FAILED_PRECONDITION (ROWS_SHARED)
};

// Rows [keep, keep + number to discard) go, those behind close the gap. Exactly one of the two is
// set.
struct WindowShift {
  int64_t keep = 0;
  std::optional<int64_t> discard;  // rows
  std::optional<double> fraction;  // of the rows behind the first `keep`; rounded down
};

// Edits as data, for transactions. Sequences go by number.
struct RemoveRangeEdit {
  uint64_t sequence = 0;
  PositionRange range;
};
struct CopyRangeEdit {
  uint64_t from = 0;
  uint64_t to = 0;
  PositionRange range;
  bool allow_overlap = false;
};
struct KeepOnlyEdit {
  std::vector<uint64_t> sequences;
};
struct ShiftPositionsEdit {
  uint64_t sequence = 0;
  PositionRange range;
  int64_t delta = 0;
  OnShared on_shared = OnShared::kCopy;
  bool allow_overlap = false;
};
struct DividePositionsEdit {
  uint64_t sequence = 0;
  PositionRange range;
  int64_t divisor = 1;
  bool allow_overlap = false;
};
struct ShiftWindowEdit {
  uint64_t sequence = 0;
  WindowShift window;
};
struct RewindEdit {
  uint64_t sequence = 0;
  int64_t rows = 0;
};
struct ClearEdit {
  uint64_t sequence = 0;
};
struct ReorderEdit {
  std::vector<uint64_t> sequences;
  std::vector<uint32_t> order;
  bool allow_repeats = false;
};
using SequenceEdit =
    std::variant<RemoveRangeEdit, CopyRangeEdit, KeepOnlyEdit, ShiftPositionsEdit,
                 DividePositionsEdit, ShiftWindowEdit, RewindEdit, ClearEdit, ReorderEdit>;

struct EditOutcome {
  uint64_t removed_rows = 0;
  uint64_t moved_rows = 0;      // rows that have another position now
  uint64_t copied_rows = 0;     // rows that a further sequence references now
  uint64_t others_changed = 0;  // sequences besides the one named that changed
  EditOutcome& operator+=(const EditOutcome& other);
  friend bool operator==(const EditOutcome&, const EditOutcome&) = default;
};

class SequenceEditor {
 public:
  // The sequences of one tenant and model, by number.
  class Sequences {
   public:
    virtual ~Sequences() = default;
    // Null when unknown.
    virtual const SequenceRows* Find(uint64_t number) const = 0;
    virtual void ForEach(absl::FunctionRef<void(uint64_t, const SequenceRows&)> fn) const = 0;
  };
  struct Options {
    uint32_t page_tokens = 0;
    std::vector<GroupTraits> groups;
    uint64_t max_rows = uint64_t{1} << 22;  // of a sequence
  };
  // `sequences` outlives the editor. Numbers given to edits are known to it.
  SequenceEditor(Options options, const Sequences* sequences);

  absl::StatusOr<EditOutcome> Apply(const SequenceEdit& edit);

  // Rows at positions in the range go. None there: nothing changes.
  absl::StatusOr<EditOutcome> RemoveRange(uint64_t sequence, PositionRange range);
  // `to` references the rows of `from` in the range, at the positions they have there. Refused
  // where `to` has rows at one of them, unless `allow_overlap`.
  absl::StatusOr<EditOutcome> CopyRange(uint64_t from, uint64_t to, PositionRange range,
                                        bool allow_overlap);
  // All rows of all other sequences go.
  absl::StatusOr<EditOutcome> KeepOnly(std::span<const uint64_t> sequences);
  // Positions in the range, as they are now, grow by `delta`. Rows that would stand in front of
  // position 0 go. Refused where a row would meet one that does not move, unless `allow_overlap`.
  absl::StatusOr<EditOutcome> ShiftPositions(uint64_t sequence, PositionRange range, int64_t delta,
                                             OnShared on_shared, bool allow_overlap);
  // Positions in the range become position / divisor, rounded down.
  absl::StatusOr<EditOutcome> DividePositions(uint64_t sequence, PositionRange range,
                                              int64_t divisor, bool allow_overlap);
  absl::StatusOr<EditOutcome> ShiftWindow(uint64_t sequence, const WindowShift& window);
  // Of all rows only these stay: rows [begin, end) at positions from `position` on, where they
  // stand or in front of it. Rows and positions ascend from run to run; positions of the sequence
  // are implicit. As one removal a gap and one shift a run, in time linear in rows and runs.
  struct KeptRun {
    uint64_t begin = 0;
    uint64_t end = 0;
    uint64_t position = 0;
  };
  absl::StatusOr<EditOutcome> KeepRuns(uint64_t sequence, std::span<const KeptRun> runs);
  // Cuts to the first `rows` rows.
  absl::StatusOr<EditOutcome> Rewind(uint64_t sequence, int64_t rows);
  absl::StatusOr<EditOutcome> Clear(uint64_t sequence);
  // sequences[i] becomes what sequences[order[i]] was. An index twice is refused unless
  // `allow_repeats` (beams that have one parent).
  absl::StatusOr<EditOutcome> Reorder(std::span<const uint64_t> sequences,
                                      std::span<const uint32_t> order, bool allow_repeats);

  // What the edits so far made of the sequences that they changed.
  absl::btree_map<uint64_t, SequenceRows>& changed() { return changed_; }
  // A sequence as the edits so far left it.
  const SequenceRows& Rows(uint64_t sequence) const;

 private:
  struct RowRange {
    uint64_t begin = 0;
    uint64_t end = 0;
  };
  absl::StatusOr<RowRange> RowsIn(const SequenceRows& rows, PositionRange range) const;
  absl::Status CheckCut(const SequenceRows& rows, uint64_t begin, uint64_t end) const;
  absl::Status CheckCopy(const SequenceRows& from, RowRange range, const SequenceRows& to) const;
  absl::Status CannotCut(absl::string_view what, uint32_t group) const;
  absl::Status CheckShift() const;
  // Rows of `other` that lie in the same slots as rows [range) of `rows`; ascending, disjoint.
  std::vector<RowRange> SharedRows(const SequenceRows& rows, RowRange range,
                                   const SequenceRows& other) const;
  // Moves the rows of `ranges` (ascending, disjoint) by `delta`.
  absl::StatusOr<EditOutcome> Move(uint64_t sequence, std::span<const RowRange> ranges,
                                   int64_t delta, bool allow_overlap);
  // `moved` and `resting` are pieces of one sequence.
  absl::StatusOr<EditOutcome> Settle(uint64_t sequence, std::vector<RowPiece> resting,
                                     std::vector<RowPiece> moved, bool allow_overlap);
  // FAILED_PRECONDITION (ROWS_RECLAIMED) when a window group would lack rows.
  absl::Status Put(uint64_t sequence, std::span<const RowPiece> pieces);

  const Options options_;
  const Sequences* const sequences_;
  absl::btree_map<uint64_t, SequenceRows> changed_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_SEQUENCE_EDITOR_H_
