// NaiveSequences: what the algebra means, in plain arrays of rows: a copy for each sequence, no
// pages, no extents, no sharing. The other side of randomised tests. Every operation either applies
// itself or returns what it must be refused with, and then has changed nothing.
#ifndef PAGETIDE_TESTS_CORE_NAIVE_SEQUENCES_H_
#define PAGETIDE_TESTS_CORE_NAIVE_SEQUENCES_H_

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <optional>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "core/sequence_editor.h"

namespace pagetide {

inline constexpr size_t kMaxNaiveGroups = 5;

// Where a layer group has a row. Of a group that is kept whole the cell is that of the page, or of
// the state, that the row lies in.
struct NaivePlace {
  uint64_t cell = 0;     // which write it was; 0: not held
  uint64_t content = 0;  // what was written
  bool is_end = false;   // of whole groups: the page or the state ends behind this row
  friend bool operator==(const NaivePlace&, const NaivePlace&) = default;
};
struct NaiveRow {
  uint32_t token = 0;
  int64_t position = 0;
  int64_t written_at = 0;
  std::array<NaivePlace, kMaxNaiveGroups> in{};  // [group]
  // Where it was before the edit: what is canonical follows from it.
  uint64_t from = 0;
  size_t index = 0;
};
struct NaiveSequence {
  std::vector<NaiveRow> rows;
  size_t canonical_limit = SIZE_MAX;
  size_t canonical() const { return std::min(canonical_limit, rows.size()); }
};

class NaiveSequences {
 public:
  using Refusal = std::optional<std::string>;  // the reason, or the code's name

  NaiveSequences(std::vector<GroupTraits> groups, uint32_t page_tokens)
      : groups_(std::move(groups)), page_tokens_(page_tokens) {}

  std::map<uint64_t, NaiveSequence> sequences;

  // Whether a query at position `query` may attend to a key at `key`, in front of it (FEATURES C2,
  // C3).
  static bool IsSeen(const GroupTraits& group, int64_t key, int64_t query) {
    const int64_t window = group.window_tokens;
    switch (group.window) {
      case LayerGroupSpec::WindowType::kNone:
        return true;
      case LayerGroupSpec::WindowType::kStandard:
        return query - key < window;
      case LayerGroupSpec::WindowType::kChunked:
        return key >= query / window * window;
      case LayerGroupSpec::WindowType::kSymmetric:
        return std::llabs(query - key) <= window / 2;
      case LayerGroupSpec::WindowType::kRing:
        return key < group.keep_tokens || query - key < window - group.keep_tokens;
    }
    return false;
  }
  // Whether the token behind these rows needs rows[i] of a group that has rows.
  static bool IsNeeded(const GroupTraits& group, const std::vector<NaiveRow>& rows, size_t i) {
    return IsSeen(group, rows[i].position, rows.back().position + 1);
  }

  void Number(uint64_t s) {
    std::vector<NaiveRow>& rows = sequences[s].rows;
    for (size_t i = 0; i < rows.size(); ++i) {
      rows[i].from = s;
      rows[i].index = i;
    }
  }

  // Rows [rows.size() - count, rows.size()) were added: what whole groups hold then. The page or
  // state that ends behind row i was written as `first_content` + i - (the first added row).
  void WriteWhole(uint64_t s, uint64_t count, uint64_t first_content) {
    std::vector<NaiveRow>& rows = sequences[s].rows;
    const size_t first = rows.size() - count;
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (!groups_[g].is_whole) continue;
      size_t at = first / page_tokens_ * page_tokens_;
      if (groups_[g].is_state) {
        at = (rows.size() - 1) / page_tokens_ * page_tokens_;
        for (size_t i = 0; i < at; ++i) rows[i].in[g] = {};
      }
      while (at < rows.size()) {
        const size_t end =
            std::min<size_t>(at / page_tokens_ * page_tokens_ + page_tokens_, rows.size());
        const uint64_t cell = first_content + (end - 1 - first);
        for (; at < end; ++at) rows[at].in[g] = {cell, cell, at + 1 == end};
      }
    }
  }

  Refusal Remove(uint64_t s, int64_t p0, int64_t p1, EditOutcome* out) {
    if (!Normalise(p0, p1)) return "INVALID_ARGUMENT";
    const std::vector<NaiveRow>& rows = sequences[s].rows;
    const auto [begin, end] = Between(rows, p0, p1);
    if (CannotCut(rows, begin, end)) return "CANNOT_CUT";
    if (begin == end) return std::nullopt;
    std::vector<NaiveRow> kept(rows.begin(), rows.begin() + begin);
    kept.insert(kept.end(), rows.begin() + end, rows.end());
    if (Refusal lacks = Lacks(kept)) return lacks;
    out->removed_rows += end - begin;
    Put(s, kept);
    return std::nullopt;
  }
  Refusal Copy(uint64_t from, uint64_t to, int64_t p0, int64_t p1, bool overlap, EditOutcome* out) {
    if (from == to || !Normalise(p0, p1)) return "INVALID_ARGUMENT";
    const std::vector<NaiveRow>& source = sequences[from].rows;
    const auto [begin, end] = Between(source, p0, p1);
    if (begin == end) return std::nullopt;
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (!groups_[g].is_whole) continue;
      // Only as a whole, to where nothing is yet.
      if (begin != 0 || !sequences[to].rows.empty() || !source[end - 1].in[g].is_end) {
        return "CANNOT_CUT";
      }
    }
    const std::vector<NaiveRow> copied(source.begin() + begin, source.begin() + end);
    for (const NaiveRow& mine : sequences[to].rows) {
      for (const NaiveRow& row : copied) {
        if (mine.position == row.position && !overlap) return "POSITION_OCCUPIED";
      }
    }
    std::vector<NaiveRow> all = sequences[to].rows;
    all.insert(all.end(), copied.begin(), copied.end());
    Sort(all);
    if (Refusal lacks = Lacks(all)) return lacks;
    out->copied_rows += copied.size();
    Put(to, all);
    return std::nullopt;
  }
  Refusal KeepOnly(const std::vector<uint64_t>& kept, EditOutcome* out) {
    if (kept.empty()) return "INVALID_ARGUMENT";
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
  Refusal Shift(uint64_t s, int64_t p0, int64_t p1, int64_t delta, OnShared on_shared, bool overlap,
                EditOutcome* out) {
    if (!Normalise(p0, p1) || delta > kMaxPosition || delta < -kMaxPosition) {
      return "INVALID_ARGUMENT";
    }
    if (delta == 0) return std::nullopt;
    if (CannotShift()) return "CANNOT_SHIFT";
    std::set<std::pair<size_t, uint64_t>> cells;  // group, cell
    for (const NaiveRow& row : sequences[s].rows) {
      if (row.position < p0 || row.position >= p1) continue;
      for (size_t g = 0; g < groups_.size(); ++g) {
        if (row.in[g].cell != 0) cells.emplace(g, row.in[g].cell);
      }
    }
    const auto is_shared = [&](const NaiveRow& row) {
      for (size_t g = 0; g < groups_.size(); ++g) {
        if (row.in[g].cell != 0 && cells.contains({g, row.in[g].cell})) return true;
      }
      return false;
    };
    std::vector<uint64_t> owners;
    for (const auto& [number, sequence] : sequences) {
      const bool owns = std::any_of(sequence.rows.begin(), sequence.rows.end(), is_shared);
      if (number != s && owns) owners.push_back(number);
    }
    if (on_shared == OnShared::kReject && !owners.empty()) return "ROWS_SHARED";
    const auto before = sequences;
    EditOutcome done = *out;
    Refusal refused = Move(
        s, [&](const NaiveRow& r) { return r.position >= p0 && r.position < p1; },
        [&](int64_t p) { return p + delta; }, overlap, &done);
    if (on_shared == OnShared::kMoveAll) {
      for (uint64_t other : owners) {
        if (refused) break;
        ++done.others_changed;
        refused = Move(
            other, is_shared, [&](int64_t p) { return p + delta; }, overlap, &done);
      }
    }
    if (refused)
      sequences = before;
    else
      *out = done;
    return refused;
  }
  Refusal Divide(uint64_t s, int64_t p0, int64_t p1, int64_t divisor, bool overlap,
                 EditOutcome* out) {
    if (!Normalise(p0, p1) || divisor < 1) return "INVALID_ARGUMENT";
    if (divisor == 1) return std::nullopt;
    if (CannotShift()) return "CANNOT_SHIFT";
    const auto in_range = [&](const NaiveRow& r) { return r.position >= p0 && r.position < p1; };
    const std::vector<NaiveRow>& rows = sequences[s].rows;
    const bool changes = std::any_of(rows.begin(), rows.end(), [&](const NaiveRow& r) {
      return in_range(r) && r.position / divisor != r.position;
    });
    if (!changes) return std::nullopt;
    return Move(
        s, in_range, [&](int64_t p) { return p / divisor; }, overlap, out);
  }
  Refusal Window(uint64_t s, const WindowShift& window, EditOutcome* out) {
    std::vector<NaiveRow> rows = sequences[s].rows;
    const int64_t n = static_cast<int64_t>(rows.size());
    if (window.discard.has_value() == window.fraction.has_value() || window.keep < 0 ||
        window.keep > n) {
      return "INVALID_ARGUMENT";
    }
    const int64_t rest = n - window.keep;
    if (window.fraction && !(*window.fraction >= 0 && *window.fraction <= 1)) {
      return "INVALID_ARGUMENT";
    }
    const int64_t discard =
        window.discard ? *window.discard : static_cast<int64_t>(rest * *window.fraction);
    if (discard < 0 || discard > rest) return "INVALID_ARGUMENT";
    if (discard == 0) return std::nullopt;
    const size_t keep = static_cast<size_t>(window.keep);
    if (CannotCut(rows, keep, keep + discard)) return "CANNOT_CUT";
    const int64_t at = rows[keep].position;
    rows.erase(rows.begin() + keep, rows.begin() + keep + discard);
    const int64_t gap = keep < rows.size() ? rows[keep].position - at : 0;
    if (gap != 0 && CannotShift()) return "CANNOT_SHIFT";
    for (size_t i = keep; i < rows.size(); ++i) rows[i].position -= gap;
    if (Refusal lacks = Lacks(rows)) return lacks;
    out->removed_rows += discard;
    if (gap != 0) out->moved_rows += rows.size() - keep;
    Put(s, rows);
    return std::nullopt;
  }
  Refusal Rewind(uint64_t s, int64_t length, EditOutcome* out) {
    std::vector<NaiveRow> rows = sequences[s].rows;
    if (length < 0 || length > static_cast<int64_t>(rows.size())) return "INVALID_ARGUMENT";
    const size_t kept = static_cast<size_t>(length);
    if (CannotCut(rows, kept, rows.size())) return "CANNOT_CUT";
    if (kept == rows.size()) return std::nullopt;
    const size_t removed = rows.size() - kept;
    rows.resize(kept);
    if (Refusal lacks = Lacks(rows)) return lacks;
    out->removed_rows += removed;
    Put(s, rows);
    return std::nullopt;
  }
  Refusal Reorder(const std::vector<uint64_t>& named, const std::vector<uint32_t>& order,
                  bool repeats, EditOutcome* out) {
    if (named.empty() || named.size() != order.size()) return "INVALID_ARGUMENT";
    if (std::set<uint64_t>(named.begin(), named.end()).size() != named.size()) {
      return "INVALID_ARGUMENT";
    }
    for (uint32_t index : order) {
      if (index >= order.size()) return "INVALID_ARGUMENT";
    }
    if (!repeats && std::set<uint32_t>(order.begin(), order.end()).size() != order.size()) {
      return "INVALID_ARGUMENT";
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
  // Rows go by position, so those of a range are neighbours.
  static std::pair<size_t, size_t> Between(const std::vector<NaiveRow>& rows, int64_t p0,
                                           int64_t p1) {
    size_t begin = 0;
    while (begin < rows.size() && rows[begin].position < p0) ++begin;
    size_t end = begin;
    while (end < rows.size() && rows[end].position < p1) ++end;
    return {begin, end};
  }

  bool CannotShift() const {
    return std::any_of(groups_.begin(), groups_.end(),
                       [](const GroupTraits& group) { return !group.can_shift; });
  }
  // What is kept whole loses all, or the end behind one of its pages.
  bool CannotCut(const std::vector<NaiveRow>& rows, size_t begin, size_t end) const {
    if (begin == end || (begin == 0 && end == rows.size())) return false;
    for (size_t g = 0; g < groups_.size(); ++g) {
      if (!groups_[g].is_whole) continue;
      if (end != rows.size()) return true;
      if (begin > 0 && !rows[begin - 1].in[g].is_end) return true;
    }
    return false;
  }
  // What the next token needs, and a group gave up.
  Refusal Lacks(const std::vector<NaiveRow>& rows) const {
    for (size_t g = 0; g < groups_.size() && !rows.empty(); ++g) {
      if (groups_[g].is_whole) {
        if (!rows.back().in[g].is_end) return "CANNOT_CUT";
        continue;
      }
      for (size_t i = 0; i < rows.size(); ++i) {
        if (rows[i].in[g].cell == 0 && IsNeeded(groups_[g], rows, i)) return "ROWS_RECLAIMED";
      }
    }
    return std::nullopt;
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
  Refusal Move(uint64_t s, In in_range, To to, bool overlap, EditOutcome* out) {
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
      if (moved > kMaxPosition) return "INVALID_ARGUMENT";
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
        if (resting.contains(position)) return "POSITION_OCCUPIED";
      }
    }
    Sort(rows);
    if (Refusal lacks = Lacks(rows)) return lacks;
    *out += mine;
    Put(s, rows);
    return std::nullopt;
  }

  const std::vector<GroupTraits> groups_;
  const uint32_t page_tokens_;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_CORE_NAIVE_SEQUENCES_H_
