// Random operations on sequences that share pages, against a naive model: plain arrays of rows, a
// copy for each sequence, no pages, no extents, no sharing. After every step all rows, positions,
// owners, references and refusals are compared. The pool is smaller than what is open: pages are
// spilled and restored all the while.
//
// Replays by seed: PAGETIDE_TEST_SEED; longer: PAGETIDE_ALGEBRA_STEPS=100000. On a difference the
// seed, the step and the operation are printed.
#include <gtest/gtest.h>

#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <string>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/error_info.h"
#include "tests/core/sequence_world.h"

namespace pagetide {
namespace {

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  uint64_t value = otherwise;
  if (const char* text = std::getenv(name)) {
    if (!absl::SimpleAtoi(text, &value)) ADD_FAILURE() << name << " is not a number";
  }
  return value;
}

// --- the naive model ---

struct NaiveRow {
  uint32_t token = 0;
  int64_t position = 0;
  uint64_t cell = 0;
  uint64_t content = 0;
  int64_t written_at = 0;
  // Where it was before the edit: what is canonical follows from it.
  uint64_t from = 0;
  size_t index = 0;
};
struct NaiveSequence {
  std::vector<NaiveRow> rows;
  size_t canonical_limit = SIZE_MAX;
  size_t canonical() const { return std::min(canonical_limit, rows.size()); }
};
struct Refusal {
  std::string reason;  // or the code's name
};

class Naive {
 public:
  std::map<uint64_t, NaiveSequence> sequences;

  void Number(uint64_t s) {
    std::vector<NaiveRow>& rows = sequences[s].rows;
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i].from = s;
      rows[i].index = i;
    }
  }

  // Each returns a refusal, or applies itself. `out` counts.
  std::optional<Refusal> Remove(uint64_t s, int64_t p0, int64_t p1, EditOutcome* out) {
    if (!Normalise(p0, p1)) return Refusal{"INVALID_ARGUMENT"};
    std::vector<NaiveRow> kept;
    for (const NaiveRow& row : sequences[s].rows) {
      if (row.position < p0 || row.position >= p1) kept.push_back(row);
    }
    out->removed_rows += sequences[s].rows.size() - kept.size();
    Put(s, kept);
    return std::nullopt;
  }
  std::optional<Refusal> Copy(uint64_t from, uint64_t to, int64_t p0, int64_t p1, bool overlap,
                              EditOutcome* out) {
    if (from == to || !Normalise(p0, p1)) return Refusal{"INVALID_ARGUMENT"};
    std::vector<NaiveRow> copied;
    for (const NaiveRow& row : sequences[from].rows) {
      if (row.position >= p0 && row.position < p1) copied.push_back(row);
    }
    for (const NaiveRow& mine : sequences[to].rows) {
      for (const NaiveRow& row : copied) {
        if (mine.position == row.position && !overlap) return Refusal{"POSITION_OCCUPIED"};
      }
    }
    out->copied_rows += copied.size();
    std::vector<NaiveRow> all = sequences[to].rows;
    all.insert(all.end(), copied.begin(), copied.end());
    Sort(all);
    Put(to, all);
    return std::nullopt;
  }
  std::optional<Refusal> KeepOnly(const std::vector<uint64_t>& kept, EditOutcome* out) {
    if (kept.empty()) return Refusal{"INVALID_ARGUMENT"};
    for (auto& [number, sequence] : sequences) {
      if (std::find(kept.begin(), kept.end(), number) != kept.end() || sequence.rows.empty()) {
        continue;
      }
      out->removed_rows += sequence.rows.size();
      ++out->others_changed;
      sequence = {};
    }
    return std::nullopt;
  }
  std::optional<Refusal> Shift(uint64_t s, int64_t p0, int64_t p1, int64_t delta,
                               OnShared on_shared, bool overlap, EditOutcome* out) {
    if (!Normalise(p0, p1) || delta > kMaxPosition || delta < -kMaxPosition) {
      return Refusal{"INVALID_ARGUMENT"};
    }
    if (delta == 0) return std::nullopt;
    std::set<uint64_t> cells;
    for (const NaiveRow& row : sequences[s].rows) {
      if (row.position >= p0 && row.position < p1) cells.insert(row.cell);
    }
    std::vector<uint64_t> owners;
    for (const auto& [number, sequence] : sequences) {
      const bool owns = std::any_of(sequence.rows.begin(), sequence.rows.end(),
                                    [&](const NaiveRow& row) { return cells.contains(row.cell); });
      if (number != s && owns) owners.push_back(number);
    }
    if (on_shared == OnShared::kReject && !owners.empty()) return Refusal{"ROWS_SHARED"};
    const auto before = sequences;
    auto refused = Move(
        s, [&](const NaiveRow& r) { return r.position >= p0 && r.position < p1; },
        [&](int64_t p) { return p + delta; }, overlap, out);
    if (on_shared == OnShared::kMoveAll) {
      for (uint64_t other : owners) {
        if (refused) break;
        ++out->others_changed;
        refused = Move(
            other, [&](const NaiveRow& r) { return cells.contains(r.cell); },
            [&](int64_t p) { return p + delta; }, overlap, out);
      }
    }
    if (refused) sequences = before;
    return refused;
  }
  std::optional<Refusal> Divide(uint64_t s, int64_t p0, int64_t p1, int64_t divisor, bool overlap,
                                EditOutcome* out) {
    if (!Normalise(p0, p1) || divisor < 1) return Refusal{"INVALID_ARGUMENT"};
    const bool changes =
        std::any_of(sequences[s].rows.begin(), sequences[s].rows.end(), [&](const NaiveRow& r) {
          return r.position >= p0 && r.position < p1 && r.position / divisor != r.position;
        });
    if (!changes) return std::nullopt;
    return Move(
        s, [&](const NaiveRow& r) { return r.position >= p0 && r.position < p1; },
        [&](int64_t p) { return p / divisor; }, overlap, out);
  }
  std::optional<Refusal> Window(uint64_t s, const WindowShift& window, EditOutcome* out) {
    std::vector<NaiveRow> rows = sequences[s].rows;
    const int64_t n = static_cast<int64_t>(rows.size());
    if (window.discard.has_value() == window.fraction.has_value() || window.keep < 0 ||
        window.keep > n) {
      return Refusal{"INVALID_ARGUMENT"};
    }
    const int64_t rest = n - window.keep;
    if (window.fraction && !(*window.fraction >= 0 && *window.fraction <= 1)) {
      return Refusal{"INVALID_ARGUMENT"};
    }
    const int64_t discard =
        window.discard ? *window.discard : static_cast<int64_t>(rest * *window.fraction);
    if (discard < 0 || discard > rest) return Refusal{"INVALID_ARGUMENT"};
    if (discard == 0) return std::nullopt;
    const int64_t at = rows[window.keep].position;
    rows.erase(rows.begin() + window.keep, rows.begin() + window.keep + discard);
    out->removed_rows += discard;
    const int64_t gap =
        window.keep < static_cast<int64_t>(rows.size()) ? rows[window.keep].position - at : 0;
    for (size_t i = window.keep; i < rows.size(); ++i) rows[i].position -= gap;
    if (gap != 0) out->moved_rows += rows.size() - window.keep;
    Put(s, rows);
    return std::nullopt;
  }
  std::optional<Refusal> Rewind(uint64_t s, int64_t length, EditOutcome* out) {
    std::vector<NaiveRow> rows = sequences[s].rows;
    if (length < 0 || length > static_cast<int64_t>(rows.size())) {
      return Refusal{"INVALID_ARGUMENT"};
    }
    out->removed_rows += rows.size() - length;
    rows.resize(length);
    Put(s, rows);
    return std::nullopt;
  }
  std::optional<Refusal> Reorder(const std::vector<uint64_t>& named,
                                 const std::vector<uint32_t>& order, bool repeats,
                                 EditOutcome* out) {
    if (named.empty() || named.size() != order.size()) return Refusal{"INVALID_ARGUMENT"};
    if (std::set<uint64_t>(named.begin(), named.end()).size() != named.size()) {
      return Refusal{"INVALID_ARGUMENT"};
    }
    for (uint32_t index : order) {
      if (index >= order.size()) return Refusal{"INVALID_ARGUMENT"};
    }
    if (!repeats && std::set<uint32_t>(order.begin(), order.end()).size() != order.size()) {
      return Refusal{"INVALID_ARGUMENT"};
    }
    const auto before = sequences;
    for (size_t i = 0; i < order.size(); ++i) {
      if (order[i] == i) continue;
      sequences[named[i]] = before.at(named[order[i]]);
      Number(named[i]);
      out->copied_rows += sequences[named[i]].rows.size();
      ++out->others_changed;
    }
    return std::nullopt;
  }

 private:
  static bool Normalise(int64_t& p0, int64_t& p1) {
    if (p0 < 0) p0 = 0;
    if (p1 < 0) {
      p1 = INT64_MAX;
      return true;
    }
    return p0 <= p1;
  }
  static void Sort(std::vector<NaiveRow>& rows) {
    std::stable_sort(rows.begin(), rows.end(),
                     [](const NaiveRow& a, const NaiveRow& b) { return a.position < b.position; });
  }
  // Canonical is what still is the beginning of one sequence, row for row, at its positions.
  void Put(uint64_t s, const std::vector<NaiveRow>& rows) {
    size_t canonical = 0;
    if (!rows.empty()) {
      const NaiveSequence& source = sequences[rows[0].from];
      while (canonical < rows.size() && rows[canonical].from == rows[0].from &&
             rows[canonical].index == canonical &&
             rows[canonical].position == source.rows[canonical].position) {
        ++canonical;
      }
      canonical = std::min(canonical, source.canonical_limit);
    }
    sequences[s].rows = rows;
    sequences[s].canonical_limit = canonical == rows.size() ? SIZE_MAX : canonical;
    Number(s);
  }
  template <typename In, typename To>
  std::optional<Refusal> Move(uint64_t s, In in_range, To to, bool overlap, EditOutcome* out) {
    std::vector<NaiveRow> rows;
    std::multiset<int64_t> resting, landing;
    EditOutcome mine;
    for (NaiveRow row : sequences[s].rows) {
      if (!in_range(row)) {
        resting.insert(row.position);
        rows.push_back(row);
        continue;
      }
      const int64_t moved = to(row.position);
      if (moved > kMaxPosition) return Refusal{"INVALID_ARGUMENT"};
      if (moved < 0) {
        ++mine.removed_rows;
        continue;
      }
      if (moved != row.position) ++mine.moved_rows;
      row.position = moved;
      landing.insert(moved);
      rows.push_back(row);
    }
    if (!overlap) {
      for (int64_t position : landing) {
        if (resting.contains(position)) return Refusal{"POSITION_OCCUPIED"};
      }
    }
    *out += mine;
    Sort(rows);
    Put(s, rows);
    return std::nullopt;
  }
};

// --- random steps ---

enum Op {
  kOpen,
  kOpenShared,
  kClose,
  kAppend,
  kRemove,
  kCopy,
  kKeepOnly,
  kShift,
  kDivide,
  kWindow,
  kRewind,
  kClear,
  kReorder,
  kTransaction,
  kNumOps
};
constexpr const char* kOpNames[] = {"Open",
                                    "OpenShared",
                                    "Close",
                                    "Append",
                                    "RemoveRange",
                                    "CopyRange",
                                    "KeepOnly",
                                    "ShiftPositions",
                                    "DividePositions",
                                    "ShiftWindow",
                                    "Rewind",
                                    "Clear",
                                    "ReorderSequences",
                                    "EditSequence"};
// In parts of a thousand. Closes nearly balance opens: above nine sequences an Open is a Close
// instead, and every operation is to have its share (ExpectCoverage).
constexpr std::array<int, kNumOps> kWeights = {40,  30, 50, 260, 90, 110, 25,
                                               120, 50, 60, 60,  25, 40,  40};

class ModelRun {
 public:
  ModelRun(uint64_t seed, bool planted)
      : rng_(seed),
        world_({.page_tokens = 8,
                .groups = {GroupTraits{}, GroupTraits{.rotates = false}},
                .num_frames = 16,
                .skips_copy_on_write = planted}) {}

  // Empty, or what differs.
  std::string Step() {
    const Op op = Pick();
    ++steps_;
    ++counts_[op];
    doing_ = kOpNames[op];
    std::string difference = Do(op);
    if (difference.empty()) difference = Compare();
    if (HasSharedPages()) ++shared_steps_;
    if (difference.empty()) return difference;
    return absl::StrCat("step ", steps_, ", ", doing_, ": ", difference);
  }

  void ExpectCoverage() const {
    for (int op = 0; op < kNumOps; ++op) {
      EXPECT_GE(counts_[op] * 50, steps_) << kOpNames[op];
    }
    EXPECT_GE(refusals_ * 5, edits_) << refusals_ << " of " << edits_ << " edits";
    EXPECT_GE(shared_steps_ * 10, steps_ * 3);
    EXPECT_GT(world_.spills(), 0u);
    EXPECT_GT(world_.restores(), 0u);
    absl::PrintF(
        "%d steps, %d edits, %.1f %% refused, shared pages in %.1f %%, canonical in %.1f %%\n",
        steps_, edits_, 100.0 * refusals_ / edits_, 100.0 * shared_steps_ / steps_,
        100.0 * canonical_ / std::max<uint64_t>(1, compared_));
    absl::PrintF("  %d pages spilled, %d restored\n", world_.spills(), world_.restores());
    for (int op = 0; op < kNumOps; ++op) {
      absl::PrintF("  %-16s %5.1f %%\n", kOpNames[op], 100.0 * counts_[op] / steps_);
    }
  }

 private:
  uint64_t Random(uint64_t below) { return rng_() % below; }
  bool OneIn(uint64_t n) { return Random(n) == 0; }
  Op Pick() {
    if (world_.size() < 2) return kOpen;
    int at = static_cast<int>(Random(1000));
    for (int op = 0; op < kNumOps; ++op) {
      at -= kWeights[op];
      if (at < 0) return (op == kOpen && world_.size() > 9) ? kClose : static_cast<Op>(op);
    }
    return kAppend;
  }
  uint64_t AnySequence() {
    auto it = naive_.sequences.begin();
    std::advance(it, Random(naive_.sequences.size()));
    return it->first;
  }
  // Mostly near the sequence's own positions; at times wild.
  int64_t AnyPosition(uint64_t s) {
    if (OneIn(25)) return static_cast<int64_t>(rng_());
    if (OneIn(12)) return -1;
    const auto& rows = naive_.sequences[s].rows;
    if (rows.empty()) return static_cast<int64_t>(Random(20));
    return rows[Random(rows.size())].position + static_cast<int64_t>(Random(3)) - 1;
  }
  PositionRange AnyRange(uint64_t s) {
    PositionRange range{AnyPosition(s), AnyPosition(s)};
    if (range.begin > range.end && range.end >= 0 && !OneIn(6)) std::swap(range.begin, range.end);
    return range;
  }

  // One edit on the editor and on the model.
  std::string EditOnce(Op op, SequenceEditor& editor, uint64_t s, bool* refused) {
    absl::StatusOr<EditOutcome> got;
    EditOutcome expected;
    std::optional<Refusal> refusal;
    switch (op) {
      case kRemove: {
        const PositionRange range = AnyRange(s);
        got = editor.RemoveRange(s, range);
        refusal = naive_.Remove(s, range.begin, range.end, &expected);
        break;
      }
      case kCopy: {
        const uint64_t to = OneIn(12) ? s : AnySequence();
        const PositionRange range = OneIn(3) ? PositionRange{0, -1} : AnyRange(s);
        const bool overlap = OneIn(3);
        got = editor.CopyRange(s, to, range, overlap);
        refusal = naive_.Copy(s, to, range.begin, range.end, overlap, &expected);
        break;
      }
      case kKeepOnly: {
        std::vector<uint64_t> kept;
        for (const auto& [number, sequence] : naive_.sequences) {
          if (!OneIn(5)) kept.push_back(number);
        }
        if (OneIn(5)) kept.clear();
        got = editor.KeepOnly(kept);
        refusal = naive_.KeepOnly(kept, &expected);
        break;
      }
      case kShift: {
        const PositionRange range = AnyRange(s);
        int64_t delta = static_cast<int64_t>(Random(60)) - 30;
        if (OneIn(10)) delta = static_cast<int64_t>(rng_());
        if (OneIn(10)) delta = kMaxPosition - static_cast<int64_t>(Random(40));
        const OnShared on_shared = static_cast<OnShared>(Random(3));
        const bool overlap = OneIn(3);
        got = editor.ShiftPositions(s, range, delta, on_shared, overlap);
        refusal = naive_.Shift(s, range.begin, range.end, delta, on_shared, overlap, &expected);
        break;
      }
      case kDivide: {
        const PositionRange range = AnyRange(s);
        const int64_t divisor = OneIn(6) ? -static_cast<int64_t>(Random(5)) : 1 + Random(4);
        const bool overlap = OneIn(2);
        got = editor.DividePositions(s, range, divisor, overlap);
        refusal = naive_.Divide(s, range.begin, range.end, divisor, overlap, &expected);
        break;
      }
      case kWindow: {
        WindowShift window;
        window.keep = static_cast<int64_t>(Random(naive_.sequences[s].rows.size() + 2));
        if (OneIn(2)) window.keep /= 4;
        if (!OneIn(3)) window.discard = static_cast<int64_t>(Random(20)) - (OneIn(8) ? 20 : 0);
        if (!window.discard || OneIn(10)) window.fraction = static_cast<double>(Random(110)) / 100;
        got = editor.ShiftWindow(s, window);
        refusal = naive_.Window(s, window, &expected);
        break;
      }
      case kRewind: {
        const int64_t length =
            static_cast<int64_t>(Random(naive_.sequences[s].rows.size() + 4)) - (OneIn(8) ? 50 : 0);
        got = editor.Rewind(s, length);
        refusal = naive_.Rewind(s, length, &expected);
        break;
      }
      case kClear:
        got = editor.Clear(s);
        refusal = naive_.Rewind(s, 0, &expected);
        break;
      case kReorder: {
        std::vector<uint64_t> named;
        for (const auto& [number, sequence] : naive_.sequences) {
          if (OneIn(2)) named.push_back(number);
        }
        std::vector<uint32_t> order;
        for (uint32_t i = 0; i < named.size(); ++i) order.push_back(i);
        std::shuffle(order.begin(), order.end(), rng_);
        const bool repeats = OneIn(2);
        for (uint32_t& index : order) {
          if (OneIn(6)) index = static_cast<uint32_t>(Random(order.size() + OneIn(10)));
        }
        if (OneIn(10)) order.push_back(0);
        got = editor.Reorder(named, order, repeats);
        refusal = naive_.Reorder(named, order, repeats, &expected);
        break;
      }
      default:
        break;
    }
    *refused = refusal.has_value();
    if (got.ok() != !refusal.has_value()) {
      return absl::StrCat(got.ok() ? "OK" : got.status().ToString(), " instead of ",
                          refusal ? refusal->reason : "OK");
    }
    if (refusal) {
      const std::string reason = GetReason(got.status());
      const std::string text =
          reason.empty() ? absl::StatusCodeToString(got.status().code()) : reason;
      return text == refusal->reason ? "" : absl::StrCat(text, " instead of ", refusal->reason);
    }
    if (*got == expected) return "";
    return absl::StrFormat("removed %d, moved %d, copied %d, others %d instead of %d, %d, %d, %d",
                           got->removed_rows, got->moved_rows, got->copied_rows,
                           got->others_changed, expected.removed_rows, expected.moved_rows,
                           expected.copied_rows, expected.others_changed);
  }

  std::string Do(Op op) {
    switch (op) {
      case kOpen:
        naive_.sequences[next_number_] = {};
        world_.Open(next_number_++);
        return "";
      case kOpenShared: {
        const uint64_t from = AnySequence();
        const NaiveSequence& source = naive_.sequences[from];
        const uint64_t keyed = world_.Rows(from).keys.size() * world_.setup().page_tokens;
        uint64_t rows = keyed == 0 ? 0 : Random(keyed + 1);
        rows = world_.OpenShared(next_number_, from, rows);
        NaiveSequence opened;
        opened.rows.assign(source.rows.begin(), source.rows.begin() + rows);
        // What is found by key may be rows that another sequence computed, over the same tokens.
        std::vector<uint32_t> tokens;
        for (NaiveRow& row : opened.rows) {
          const SequenceWorld::Slot slot = SlotOf(world_.Rows(next_number_), 0, tokens.size());
          tokens.push_back(row.token);
          const auto found = computed_over_.find(slot.content);
          if (found == computed_over_.end() || found->second != tokens) {
            return absl::StrCat("found row ", tokens.size() - 1, ", computed over other tokens");
          }
          row.cell = slot.cell;
          row.content = slot.content;
        }
        naive_.sequences[next_number_] = opened;
        naive_.Number(next_number_++);
        return "";
      }
      case kClose: {
        const uint64_t s = AnySequence();
        world_.Close(s);
        naive_.sequences.erase(s);
        return "";
      }
      case kAppend: {
        const uint64_t s = AnySequence();
        std::vector<NaiveRow>& rows = naive_.sequences[s].rows;
        const uint64_t count = 1 + Random(OneIn(3) ? 20 : 5);
        const int64_t first = rows.empty() ? 0 : rows.back().position + 1;
        if (first + static_cast<int64_t>(count) > kMaxPosition || rows.size() > 300) return "";
        std::vector<uint32_t> tokens;
        for (uint64_t i = 0; i < count; ++i) tokens.push_back(static_cast<uint32_t>(Random(3)));
        const uint64_t content = next_cell_;
        next_cell_ += count;
        const auto moves = world_.Append(s, tokens, content, &next_cell_);
        if (moves.size() >= world_.setup().page_tokens) return "copied a whole page";
        std::map<uint64_t, uint64_t> new_cell(moves.begin(), moves.end());
        // A copied row is one of the last of its sequence.
        for (size_t back = 1; back <= moves.size(); ++back) {
          if (back > rows.size()) return "copied more rows than there are";
          NaiveRow& row = rows[rows.size() - back];
          if (!new_cell.contains(row.cell)) return "copied a row of another sequence";
          row.cell = moves[moves.size() - back].second;
        }
        const bool is_canonical = naive_.sequences[s].canonical() == rows.size();
        for (uint64_t i = 0; i < count; ++i) {
          const int64_t at = first + static_cast<int64_t>(i);
          rows.push_back({tokens[i], at, content + i, content + i, at, s, rows.size()});
          if (!is_canonical) continue;
          std::vector<uint32_t>& over = computed_over_[content + i];
          for (const NaiveRow& row : rows) over.push_back(row.token);
        }
        return "";
      }
      case kTransaction: {
        ++edits_;
        const uint64_t s = AnySequence();
        const auto before = naive_.sequences;
        SequenceEditor editor = world_.Edit();
        constexpr Op kParts[] = {kRemove, kCopy, kShift, kDivide, kWindow, kRewind};
        const uint64_t parts = 1 + Random(4);
        for (uint64_t i = 0; i < parts; ++i) {
          const Op part = kParts[Random(std::size(kParts))];
          absl::StrAppend(&doing_, " ", kOpNames[part]);
          bool refused = false;
          const std::string difference = EditOnce(part, editor, s, &refused);
          if (!difference.empty()) return difference;
          if (!refused) continue;
          ++refusals_;
          naive_.sequences = before;  // nothing of it happened
          return "";
        }
        world_.Adopt(editor);
        return "";
      }
      default: {
        ++edits_;
        SequenceEditor editor = world_.Edit();
        bool refused = false;
        const std::string difference = EditOnce(op, editor, AnySequence(), &refused);
        if (!difference.empty()) return difference;
        if (refused)
          ++refusals_;
        else
          world_.Adopt(editor);
        return "";
      }
    }
  }

  SequenceWorld::Slot SlotOf(const SequenceRows& rows, size_t group, uint64_t row) const {
    const Extent extent = rows.tables[group].Cover(row, row + 1).front();
    return world_.At(extent.page, extent.first_slot);
  }

  bool HasSharedPages() const {
    std::map<PageId, std::set<uint64_t>> owners;
    world_.ForEach([&](uint64_t number, const SequenceRows& rows) {
      for (const Extent& extent : rows.tables[0].extents()) owners[extent.page].insert(number);
    });
    return std::any_of(owners.begin(), owners.end(),
                       [](const auto& entry) { return entry.second.size() > 1; });
  }

  std::string Compare() {
    std::map<PageId, uint32_t> refs;
    std::map<uint64_t, std::set<uint64_t>> owners, naive_owners;  // of each cell
    for (const auto& [number, naive] : naive_.sequences) {
      const SequenceRows& rows = world_.Rows(number);
      const std::string name = absl::StrCat("sequence ", number, ": ");
      if (rows.num_rows() != naive.rows.size()) {
        return absl::StrCat(name, rows.num_rows(), " rows instead of ", naive.rows.size());
      }
      PositionExtent expected;
      expected.rows = naive.rows.size();
      if (!naive.rows.empty()) {
        expected.min = naive.rows.front().position;
        expected.max = naive.rows.back().position;
        expected.contiguous = true;
        for (size_t i = 1; i < naive.rows.size(); ++i) {
          if (naive.rows[i].position != naive.rows[i - 1].position + 1) expected.contiguous = false;
        }
      }
      for (uint32_t g = 0; g < rows.tables.size(); ++g) {
        if (rows.ExtentOf(g) != expected) return absl::StrCat(name, "extent query of group ", g);
        uint64_t at = 0;
        for (const Extent& extent : rows.tables[g].extents()) {
          ++refs[extent.page];
          if (extent.first_row != at) return absl::StrCat(name, "a gap at row ", at);
          for (uint32_t i = 0; i < extent.count; ++i, ++at) {
            const NaiveRow& row = naive.rows[at];
            const SequenceWorld::Slot& slot = world_.At(extent.page, extent.first_slot + i);
            const int32_t shift = g == 0 ? static_cast<int32_t>(row.position - row.written_at) : 0;
            if (rows.tokens[at] != row.token || rows.position(at) != row.position ||
                slot.cell != row.cell || slot.content != row.content ||
                slot.written_at != row.written_at || extent.shift != shift) {
              return absl::StrFormat(
                  "%sgroup %d, row %d: token %d, position %d, content %d, cell %d, shift %d "
                  "instead "
                  "of %d, %d, %d, %d, %d",
                  name, g, at, rows.tokens[at], rows.position(at), slot.content, slot.cell,
                  extent.shift, row.token, row.position, row.content, row.cell, shift);
            }
            if (g == 0) {
              owners[slot.cell].insert(number);
              naive_owners[row.cell].insert(number);
            }
          }
        }
        if (at != naive.rows.size()) return absl::StrCat(name, "rows end at ", at);
      }
      if (rows.canonical_rows() != naive.canonical()) {
        return absl::StrCat(name, rows.canonical_rows(), " canonical rows instead of ",
                            naive.canonical(), " of ", naive.rows.size());
      }
      if (rows.keys.size() != naive.canonical() / world_.setup().page_tokens) {
        return absl::StrCat(name, rows.keys.size(), " keys");
      }
      if (naive.canonical() == naive.rows.size()) ++canonical_;
      ++compared_;
    }
    if (owners != naive_owners) return "owners differ";
    std::string difference;
    world_.pages().ForEachPage([&](const Page& page) {
      const auto it = refs.find(page.id());
      const uint32_t expected = it == refs.end() ? 0 : it->second;
      if (page.refs() != expected) {
        difference = absl::StrCat("page ", page.id().value(), ": ", page.refs(),
                                  " references instead of ", expected);
      }
    });
    world_.pages().CheckInvariants();
    return difference;
  }

  std::mt19937_64 rng_;
  SequenceWorld world_;
  Naive naive_;
  uint64_t next_number_ = 1;
  uint64_t next_cell_ = 1;
  // What the contents of canonical rows were computed over: the tokens up to and with their own.
  std::map<uint64_t, std::vector<uint32_t>> computed_over_;
  std::string doing_;
  std::array<uint64_t, kNumOps> counts_{};
  uint64_t steps_ = 0, edits_ = 0, refusals_ = 0, shared_steps_ = 0, canonical_ = 0, compared_ = 0;
};

TEST(SequenceModelTest, AgreesWithPlainArrays) {
  const uint64_t seed = FromEnvironment("PAGETIDE_TEST_SEED", 20261121);
  const uint64_t steps = FromEnvironment("PAGETIDE_ALGEBRA_STEPS", 6000);
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  ModelRun run(seed, /*planted=*/false);
  for (uint64_t i = 0; i < steps; ++i) {
    const std::string difference = run.Step();
    ASSERT_EQ(difference, "") << "seed " << seed;
  }
  run.ExpectCoverage();
}

TEST(SequenceModelTest, FindsAPlantedWriteIntoASharedPage) {
  const uint64_t seed = FromEnvironment("PAGETIDE_TEST_SEED", 20261121);
  ModelRun run(seed, /*planted=*/true);
  std::string difference;
  for (int i = 0; i < 6000 && difference.empty(); ++i) difference = run.Step();
  std::printf("found: %s\n", difference.c_str());
  EXPECT_NE(difference, "") << "seed " << seed;
}

}  // namespace
}  // namespace pagetide
