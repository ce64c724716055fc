// Random operations on sequences that share pages, against a naive model: plain arrays of rows, a
// copy for each sequence, no pages, no extents, no sharing (tests/core/naive_sequences.h). For
// models of full attention, of every kind of window, and of groups that are kept whole. After every
// step all rows, positions, owners, references, rows given up and refusals are compared. The pool
// is smaller than what is open: pages are spilled and restored all the while.
//
// Replays by seed: PAGETIDE_TEST_SEED; longer: PAGETIDE_ALGEBRA_STEPS=100000, of each model. On a
// difference the seed is printed, and the fewest steps that lead to one.
#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <set>
#include <span>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/error_info.h"
#include "tests/core/naive_sequences.h"
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

constexpr uint32_t kPageTokens = 8;
constexpr uint32_t kNumFrames = 16;

// The layer groups of a model.
struct Kind {
  const char* name;
  std::vector<GroupTraits> groups;
};

std::vector<Kind> Kinds() {
  using Type = LayerGroupSpec::WindowType;
  const GroupTraits full;
  const GroupTraits standard{.window = Type::kStandard, .window_tokens = 12};
  // Neither of the two ends where a page does.
  const GroupTraits chunked{.rotates = false, .window = Type::kChunked, .window_tokens = 12};
  const GroupTraits symmetric{.window = Type::kSymmetric, .window_tokens = 30};
  const GroupTraits ring{.window = Type::kRing, .window_tokens = 20, .keep_tokens = 5};
  const GroupTraits state{.can_shift = false, .rotates = false, .is_whole = true, .is_state = true};
  const GroupTraits opaque{.can_shift = false, .rotates = false, .is_whole = true};
  return {{"Full", {full, GroupTraits{.rotates = false}}},
          {"Windows", {full, standard, chunked, symmetric, ring}},
          {"WindowsOnly", {ring, standard}},
          {"Opaque", {full, opaque}},
          {"Whole", {full, ring, state, opaque}}};
}

class ModelRun {
 public:
  explicit ModelRun(const SequenceWorld::Setup& setup)
      : world_(setup), naive_(setup.groups, setup.page_tokens) {}

  // One operation; `seed` decides which and all of its arguments, by what is open. Empty, or what
  // differs.
  std::string Step(uint64_t seed) {
    rng_.seed(seed);
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

  const std::string& doing() const { return doing_; }

  void ExpectCoverage() const {
    for (int op = 0; op < kNumOps; ++op) {
      EXPECT_GE(counts_[op] * 50, steps_) << kOpNames[op];
    }
    EXPECT_GE(refusals_ * 5, steps_)
        << refusals_ << " of " << steps_ << " steps, " << edits_ << " edits";
    EXPECT_GE(shared_steps_ * 10, steps_ * 3);
    EXPECT_GT(world_.spills(), 0u);
    EXPECT_GT(world_.restores(), 0u);
    EXPECT_GT(reused_rows_, 0u);
    for (const GroupTraits& group : groups()) {
      EXPECT_TRUE(group.window_tokens == 0 || given_up_rows_ > 0);
      EXPECT_TRUE(!group.is_whole || refused_with_.contains("CANNOT_CUT"));
      EXPECT_TRUE(group.can_shift || refused_with_.contains("CANNOT_SHIFT"));
    }
    absl::PrintF(
        "%d steps, %d edits, %.1f %% refused, shared pages in %.1f %%, canonical in %.1f %%\n",
        steps_, edits_, 100.0 * refusals_ / edits_, 100.0 * shared_steps_ / steps_,
        100.0 * canonical_ / std::max<uint64_t>(1, compared_));
    absl::PrintF("  %d pages spilled, %d restored; %d rows reused, %d given up\n", world_.spills(),
                 world_.restores(), reused_rows_, given_up_rows_);
    for (const auto& [reason, count] : refused_with_) absl::PrintF("  %-18s %d\n", reason, count);
    for (int op = 0; op < kNumOps; ++op) {
      absl::PrintF("  %-16s %5.1f %%\n", kOpNames[op], 100.0 * counts_[op] / steps_);
    }
  }

 private:
  // Adds what a step works on to its name.
  template <typename... Words>
  void Say(const Words&... words) {
    absl::StrAppend(&doing_, " ", words...);
  }
  static std::string Text(PositionRange range) {
    return absl::StrCat("[", range.begin, ", ", range.end, ")");
  }
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
    NaiveSequences::Refusal refusal;
    switch (op) {
      case kRemove: {
        const PositionRange range = AnyRange(s);
        Say(s, " ", Text(range));
        got = editor.RemoveRange(s, range);
        refusal = naive_.Remove(s, range.begin, range.end, &expected);
        break;
      }
      case kCopy: {
        uint64_t to = OneIn(12) ? s : AnySequence();
        PositionRange range = OneIn(3) ? PositionRange{0, -1} : AnyRange(s);
        // What is kept whole goes as a whole, to where nothing is yet.
        if (OneIn(3)) {
          for (const auto& [number, sequence] : naive_.sequences) {
            if (sequence.rows.empty() && number != s) to = number;
          }
          range = {0, -1};
        }
        const bool overlap = OneIn(6);
        Say(s, " to ", to, " ", Text(range), overlap ? " overlapping" : "");
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
        Say(absl::StrJoin(kept, ","));
        got = editor.KeepOnly(kept);
        refusal = naive_.KeepOnly(kept, &expected);
        break;
      }
      case kShift: {
        const PositionRange range = AnyRange(s);
        int64_t delta = static_cast<int64_t>(Random(60)) - 30;
        if (OneIn(5)) delta = static_cast<int64_t>(rng_());
        if (OneIn(10)) delta = kMaxPosition - static_cast<int64_t>(Random(40));
        const OnShared on_shared = static_cast<OnShared>(Random(3));
        const bool overlap = OneIn(6);
        constexpr const char* kOnSharedNames[] = {"copy", "move all", "reject"};
        Say(s, " ", Text(range), " by ", delta, ", ", kOnSharedNames[static_cast<int>(on_shared)],
            overlap ? ", overlapping" : "");
        got = editor.ShiftPositions(s, range, delta, on_shared, overlap);
        refusal = naive_.Shift(s, range.begin, range.end, delta, on_shared, overlap, &expected);
        break;
      }
      case kDivide: {
        const PositionRange range = AnyRange(s);
        const int64_t divisor = OneIn(6) ? -static_cast<int64_t>(Random(5)) : 1 + Random(4);
        const bool overlap = OneIn(5);
        Say(s, " ", Text(range), " by ", divisor, overlap ? ", overlapping" : "");
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
        Say(s, " keep ", window.keep,
            window.discard ? absl::StrCat(" discard ", *window.discard) : "",
            window.fraction ? absl::StrCat(" fraction ", *window.fraction) : "");
        got = editor.ShiftWindow(s, window);
        refusal = naive_.Window(s, window, &expected);
        break;
      }
      case kRewind: {
        const int64_t length =
            static_cast<int64_t>(Random(naive_.sequences[s].rows.size() + 4)) - (OneIn(8) ? 50 : 0);
        Say(s, " to ", length);
        got = editor.Rewind(s, length);
        refusal = naive_.Rewind(s, length, &expected);
        break;
      }
      case kClear:
        Say(s);
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
        Say(absl::StrJoin(named, ","), " as ", absl::StrJoin(order, ","),
            repeats ? " repeats" : "");
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
                          refusal.value_or("OK"));
    }
    if (refusal) {
      const std::string reason = GetReason(got.status());
      const std::string text =
          reason.empty() ? absl::StatusCodeToString(got.status().code()) : reason;
      ++refused_with_[text];
      return text == *refusal ? "" : absl::StrCat(text, " instead of ", *refusal);
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
        Say(next_number_);
        naive_.sequences[next_number_] = {};
        world_.Open(next_number_++);
        return "";
      case kOpenShared: {
        const uint64_t from = AnySequence();
        const NaiveSequence& source = naive_.sequences[from];
        const uint64_t keyed = world_.Rows(from).keys.size() * world_.setup().page_tokens;
        uint64_t rows = keyed == 0 ? 0 : Random(keyed + 1);
        rows = world_.OpenShared(next_number_, from, rows);
        Say(next_number_, " over ", rows, " rows of ", from);
        NaiveSequence opened;
        opened.rows.assign(source.rows.begin(), source.rows.begin() + rows);
        const std::string difference = TakeFound(world_.Rows(next_number_), opened.rows);
        if (!difference.empty()) return difference;
        naive_.sequences[next_number_] = opened;
        naive_.Number(next_number_++);
        reused_rows_ += rows;
        return "";
      }
      case kClose: {
        const uint64_t s = AnySequence();
        Say(s);
        world_.Close(s);
        naive_.sequences.erase(s);
        return "";
      }
      case kAppend: {
        const uint64_t s = AnySequence();
        std::vector<NaiveRow>& rows = naive_.sequences[s].rows;
        uint64_t count = 1 + Random(OneIn(3) ? 20 : 5);
        if (OneIn(3)) count = kPageTokens - rows.size() % kPageTokens;  // to the end of a page
        const int64_t first = rows.empty() ? 0 : rows.back().position + 1;
        if (first + static_cast<int64_t>(count) > kMaxPosition || rows.size() > 300) return "";
        std::vector<uint32_t> tokens;
        for (uint64_t i = 0; i < count; ++i) tokens.push_back(static_cast<uint32_t>(Random(3)));
        Say(s, " ", count, " rows from ", rows.size(), " on, at position ", first);
        const uint64_t content = next_cell_;
        next_cell_ += count;
        const auto moves = world_.Append(s, tokens, content, &next_cell_);
        for (size_t g = 0; g < moves.size(); ++g) {
          const std::string difference = TakeMoves(g, moves[g], rows);
          if (!difference.empty()) return difference;
        }
        const bool is_canonical = naive_.sequences[s].canonical() == rows.size();
        for (uint64_t i = 0; i < count; ++i) {
          NaiveRow row{.token = tokens[i],
                       .position = first + static_cast<int64_t>(i),
                       .written_at = first + static_cast<int64_t>(i),
                       .from = s,
                       .index = rows.size()};
          for (size_t g = 0; g < groups().size(); ++g) row.in[g] = {content + i, content + i};
          rows.push_back(row);
          if (!is_canonical) continue;
          std::vector<uint32_t>& over = computed_over_[content + i];
          for (const NaiveRow& before : rows) over.push_back(before.token);
        }
        naive_.WriteWhole(s, count, content);
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

  const std::vector<GroupTraits>& groups() const { return world_.setup().groups; }

  // What is found by key may be rows that another sequence computed, over the same tokens.
  std::string TakeFound(const SequenceRows& found, std::vector<NaiveRow>& rows) {
    std::vector<uint32_t> tokens;
    for (const NaiveRow& row : rows) tokens.push_back(row.token);
    for (NaiveRow& row : rows) row.in = {};
    for (size_t g = 0; g < groups().size(); ++g) {
      for (const Extent& extent : found.tables[g].extents()) {
        for (uint32_t i = 0; i < extent.count; ++i) {
          const uint64_t row = extent.first_row + i;
          const bool is_whole = groups()[g].is_whole;
          const SequenceWorld::Slot& slot =
              world_.At(extent.page, is_whole ? 0 : extent.first_slot + i);
          const uint64_t end = is_whole ? extent.end_row() : row + 1;
          const auto over = computed_over_.find(slot.content);
          if (over == computed_over_.end() || !std::equal(over->second.begin(), over->second.end(),
                                                          tokens.begin(), tokens.begin() + end)) {
            return absl::StrCat("found row ", row, " of group ", g, ", computed over other tokens");
          }
          rows[row].in[g] = {slot.cell, slot.content, is_whole && row + 1 == end};
        }
      }
    }
    return "";
  }

  // Rows are copied because the new ones follow them in their page: they are the sequence's last
  // ones, of every group.
  static std::string TakeMoves(size_t g, const SequenceWorld::Moves& moves,
                               std::vector<NaiveRow>& rows) {
    if (moves.size() >= kPageTokens) return "copied a whole page";
    if (moves.size() > rows.size()) return "copied more rows than there are";
    for (size_t back = 1; back <= moves.size(); ++back) {
      uint64_t& cell = rows[rows.size() - back].in[g].cell;
      const auto& [from, to] = moves[moves.size() - back];
      if (cell != from) return "copied a row of another sequence";
      cell = to;
    }
    return "";
  }

  bool HasSharedPages() const {
    std::map<PageId, std::set<uint64_t>> owners;
    world_.ForEach([&](uint64_t number, const SequenceRows& rows) {
      for (const PageTable& table : rows.tables) {
        for (const Extent& extent : table.extents()) owners[extent.page].insert(number);
      }
    });
    return std::any_of(owners.begin(), owners.end(),
                       [](const auto& entry) { return entry.second.size() > 1; });
  }

  // One layer group of one sequence. What the group gave up, it may give up: then the model forgets
  // it too.
  std::string CompareGroup(const SequenceRows& rows, uint32_t g, std::vector<NaiveRow>& expected) {
    const GroupTraits& group = groups()[g];
    const std::span<const Extent> extents = rows.tables[g].extents();
    std::vector<bool> is_held(expected.size(), false);
    PositionExtent extent_query{.contiguous = !extents.empty()};
    for (const Extent& extent : extents) {
      bool is_needed = extent == extents.back();
      if (extent.end_row() > expected.size()) return absl::StrCat("row ", extent.end_row() - 1);
      for (uint32_t i = 0; i < extent.count; ++i) {
        const uint64_t at = extent.first_row + i;
        const NaiveRow& row = expected[at];
        const NaivePlace& place = row.in[g];
        is_held[at] = true;
        is_needed = is_needed || group.is_whole || NaiveSequences::IsNeeded(group, expected, at);
        const SequenceWorld::Slot& slot =
            world_.At(extent.page, group.is_whole ? 0 : extent.first_slot + i);
        const int32_t shift =
            group.rotates ? static_cast<int32_t>(row.position - row.written_at) : 0;
        if (slot.cell != place.cell || slot.content != place.content || extent.shift != shift ||
            (!group.is_whole && slot.written_at != row.written_at) ||
            (group.is_whole && place.is_end != (i + 1 == extent.count))) {
          return absl::StrFormat("row %d: content %d, cell %d, shift %d instead of %d, %d, %d", at,
                                 slot.content, slot.cell, extent.shift, place.content, place.cell,
                                 shift);
        }
        if (extent_query.rows == 0) extent_query.min = row.position;
        if (extent_query.rows > 0 && row.position != extent_query.max + 1) {
          extent_query.contiguous = false;
        }
        extent_query.max = row.position;
        ++extent_query.rows;
      }
      if (!is_needed && world_.setup().gives_up_masked) {
        return absl::StrCat("rows from ", extent.first_row, " on are behind the window, and held");
      }
    }
    for (size_t at = 0; at < expected.size(); ++at) {
      if (is_held[at]) continue;
      if (expected[at].in[g].cell != 0) {
        if (group.is_whole || NaiveSequences::IsNeeded(group, expected, at)) {
          return absl::StrCat("row ", at, " is not held, and needed");
        }
        ++given_up_rows_;
      }
      expected[at].in[g] = {};
    }
    if (rows.ExtentOf(g) != extent_query) return "extent query";
    return "";
  }

  std::string Compare() {
    std::map<PageId, uint32_t> refs;
    using Owner = std::tuple<uint32_t, uint64_t, uint64_t>;  // group, cell, sequence
    std::vector<Owner> owners, naive_owners;
    for (auto& [number, naive] : naive_.sequences) {
      const SequenceRows& rows = world_.Rows(number);
      const std::string name = absl::StrCat("sequence ", number, ": ");
      if (rows.num_rows() != naive.rows.size()) {
        return absl::StrCat(name, rows.num_rows(), " rows instead of ", naive.rows.size());
      }
      for (size_t at = 0; at < naive.rows.size(); ++at) {
        const NaiveRow& row = naive.rows[at];
        if (rows.tokens[at] == row.token && rows.position(at) == row.position) continue;
        return absl::StrFormat("%srow %d: token %d at %d instead of %d at %d", name, at,
                               rows.tokens[at], rows.position(at), row.token, row.position);
      }
      for (uint32_t g = 0; g < rows.tables.size(); ++g) {
        const std::string difference = CompareGroup(rows, g, naive.rows);
        if (!difference.empty()) return absl::StrCat(name, "group ", g, ": ", difference);
        for (const Extent& extent : rows.tables[g].extents()) {
          ++refs[extent.page];
          const uint32_t num_slots = groups()[g].is_whole ? 1 : extent.count;
          for (uint32_t i = 0; i < num_slots; ++i) {
            owners.emplace_back(g, world_.At(extent.page, extent.first_slot + i).cell, number);
          }
        }
        for (const NaiveRow& row : naive.rows) {
          if (row.in[g].cell != 0) naive_owners.emplace_back(g, row.in[g].cell, number);
        }
      }
      if (rows.canonical_rows() != naive.canonical()) {
        return absl::StrCat(name, rows.canonical_rows(), " canonical rows instead of ",
                            naive.canonical(), " of ", naive.rows.size());
      }
      if (rows.keys.size() != naive.canonical() / kPageTokens) {
        return absl::StrCat(name, rows.keys.size(), " keys");
      }
      if (naive.canonical() == naive.rows.size()) ++canonical_;
      ++compared_;
    }
    for (std::vector<Owner>* list : {&owners, &naive_owners}) {
      std::sort(list->begin(), list->end());
      list->erase(std::unique(list->begin(), list->end()), list->end());
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
  NaiveSequences naive_;
  uint64_t next_number_ = 1;
  uint64_t next_cell_ = 1;
  // What the contents of canonical rows were computed over: the tokens up to and with their own. Of
  // groups that are kept whole those up to the end of the page or state.
  std::map<uint64_t, std::vector<uint32_t>> computed_over_;
  std::string doing_;
  std::array<uint64_t, kNumOps> counts_{};
  std::map<std::string, uint64_t> refused_with_;
  uint64_t steps_ = 0, edits_ = 0, refusals_ = 0, shared_steps_ = 0, canonical_ = 0, compared_ = 0;
  uint64_t reused_rows_ = 0, given_up_rows_ = 0;
};

SequenceWorld::Setup SetupOf(const Kind& kind) {
  return {.page_tokens = kPageTokens,
          .groups = kind.groups,
          .num_frames = kNumFrames,
          .gives_up_masked = true};
}

uint64_t Seed() {
  return FromEnvironment("PAGETIDE_TEST_SEED", 20261121);
}

// The seeds of a run's steps.
std::vector<uint64_t> StepSeeds(uint64_t count) {
  std::mt19937_64 rng(Seed());
  std::vector<uint64_t> seeds(count);
  for (uint64_t& seed : seeds) seed = rng();
  return seeds;
}

// The first difference, or empty; then `steps` ends with the step that made it.
std::string FirstDifference(const SequenceWorld::Setup& setup, std::vector<uint64_t>& steps) {
  ModelRun run(setup);
  for (size_t i = 0; i < steps.size(); ++i) {
    std::string difference = run.Step(steps[i]);
    if (difference.empty()) continue;
    steps.resize(i + 1);
    return difference;
  }
  return "";
}

// Leaves out steps, ever fewer at a time, as long as some difference stays; until nothing more can
// be left out.
void Shrink(const SequenceWorld::Setup& setup, std::vector<uint64_t>& steps) {
  constexpr int kMaxRuns = 4000;
  int runs = 0;
  for (size_t before = 0; before != steps.size();) {
    before = steps.size();
    for (size_t size = std::max<size_t>(1, before / 2); size > 0; size /= 2) {
      for (size_t at = 0; at < steps.size() && runs < kMaxRuns; ++runs) {
        std::vector<uint64_t> fewer(steps.begin(), steps.begin() + at);
        fewer.insert(fewer.end(), steps.begin() + std::min(at + size, steps.size()), steps.end());
        if (FirstDifference(setup, fewer).empty())
          at += size;
        else
          steps = std::move(fewer);
      }
    }
  }
}

// Shrinks, and says what the steps that are left do.
std::string Story(const SequenceWorld::Setup& setup, std::vector<uint64_t>& steps) {
  const size_t num_steps = steps.size();
  Shrink(setup, steps);
  std::string text = absl::StrCat("of ", num_steps, " steps these do:\n");
  ModelRun run(setup);
  for (uint64_t seed : steps) {
    const std::string difference = run.Step(seed);
    absl::StrAppend(&text, "  ", run.doing(), difference.empty() ? "" : ": ", difference, "\n");
  }
  return text;
}

class SequenceModelTest : public ::testing::TestWithParam<Kind> {};

TEST_P(SequenceModelTest, AgreesWithPlainArrays) {
  absl::PrintF("%s, seed %d\n", GetParam().name, Seed());
  const SequenceWorld::Setup setup = SetupOf(GetParam());
  std::vector<uint64_t> steps = StepSeeds(FromEnvironment("PAGETIDE_ALGEBRA_STEPS", 2000));
  ModelRun run(setup);
  for (size_t i = 0; i < steps.size(); ++i) {
    const std::string difference = run.Step(steps[i]);
    if (difference.empty()) continue;
    steps.resize(i + 1);
    FAIL() << "seed " << Seed() << ", " << difference << "\n" << Story(setup, steps);
  }
  run.ExpectCoverage();
}

TEST_P(SequenceModelTest, FindsAndShrinksAPlantedWriteIntoASharedPage) {
#ifdef __SANITIZE_ADDRESS__
  GTEST_SKIP() << "shrinking takes the same steps thousands of times: no new ones for a sanitizer";
#endif
  SequenceWorld::Setup setup = SetupOf(GetParam());
  setup.skips_copy_on_write = true;
  std::vector<uint64_t> steps = StepSeeds(6000);
  ASSERT_NE(FirstDifference(setup, steps), "") << "seed " << Seed();
  absl::PrintF("%s", Story(setup, steps));
  EXPECT_LE(steps.size(), 30u);  // two sequences, rows, a way to share them, one that goes on
}

TEST_P(SequenceModelTest, FindsAPlantedRowThatIsGivenUpTooEarly) {
  SequenceWorld::Setup setup = SetupOf(GetParam());
  setup.gives_up_too_early = true;
  const bool has_windows =
      std::any_of(setup.groups.begin(), setup.groups.end(),
                  [](const GroupTraits& group) { return group.window_tokens > 0; });
  if (!has_windows) return;
  std::vector<uint64_t> steps = StepSeeds(6000);
  EXPECT_NE(FirstDifference(setup, steps), "") << "seed " << Seed();
}

INSTANTIATE_TEST_SUITE_P(Kinds, SequenceModelTest, ::testing::ValuesIn(Kinds()),
                         [](const auto& info) { return std::string(info.param.name); });

}  // namespace
}  // namespace pagetide
