// A host in miniature for tests of the algebra: a page directory, memory that remembers what was
// written to each slot, and sequences over them. Rows have no bytes; a slot holds which write it
// was (`cell`, unique) and what was written (`content`, copied along). Of groups that are kept
// whole slot 0 stands for the page, or the state.
#ifndef PAGETIDE_TESTS_CORE_SEQUENCE_WORLD_H_
#define PAGETIDE_TESTS_CORE_SEQUENCE_WORLD_H_

#include <algorithm>
#include <cstdint>
#include <map>
#include <span>
#include <utility>
#include <vector>

#include "base/check.h"
#include "core/keys.h"
#include "core/page_directory.h"
#include "core/sequence_editor.h"
#include "core/sequence_pages.h"

namespace pagetide {

class SequenceWorld : public SequenceEditor::Sequences {
 public:
  struct Slot {
    uint64_t cell = 0;
    uint64_t content = 0;
    int64_t written_at = 0;
    friend bool operator==(const Slot&, const Slot&) = default;
  };
  struct Setup {
    uint32_t page_tokens = 8;
    std::vector<GroupTraits> groups = std::vector<GroupTraits>(1);
    uint32_t num_frames = 4096;
    // Appends and edits give up rows behind a window, as a host does.
    bool gives_up_masked = false;
    // Planted bugs: who writes behind rows that others reference writes into their page; rows are
    // given up while one more query sees them.
    bool skips_copy_on_write = false;
    bool gives_up_too_early = false;
  };
  explicit SequenceWorld(Setup setup)
      : setup_(std::move(setup)),
        pages_(static_cast<uint32_t>(setup_.groups.size()), setup_.num_frames,
               /*max_known_stored=*/64) {
    for (uint32_t g = 0; g < setup_.groups.size(); ++g) {
      if (setup_.groups[g].is_whole) pages_.SetWhole(g);
    }
  }

  const SequenceRows* Find(uint64_t number) const override {
    const auto it = sequences_.find(number);
    return it == sequences_.end() ? nullptr : &it->second;
  }
  void ForEach(absl::FunctionRef<void(uint64_t, const SequenceRows&)> fn) const override {
    for (const auto& [number, rows] : sequences_) fn(number, rows);
  }
  const SequenceRows& Rows(uint64_t number) const { return sequences_.at(number); }
  const PageDirectory& pages() const { return pages_; }
  size_t size() const { return sequences_.size(); }
  const Setup& setup() const { return setup_; }

  SequenceEditor Edit() const {
    return SequenceEditor({setup_.page_tokens, setup_.groups, uint64_t{1} << 20}, this);
  }
  DroppedPages Adopt(SequenceEditor& editor) {
    std::vector<RowsChange> changes;
    for (auto& [number, rows] : editor.changed()) {
      GiveUpMasked(rows);  // its references are not taken yet
      changes.push_back({&sequences_.at(number), std::move(rows)});
    }
    return AdoptRows(std::move(changes), pages_);
  }

  void Open(uint64_t number) {
    SequenceRows rows;
    rows.tables.resize(setup_.groups.size());
    sequences_.emplace(number, std::move(rows));
  }
  // Opens over the first `rows` canonical rows of another sequence, as a prompt with those tokens
  // would: pages by key, those that the next token needs, and leading rows of the last one. Fewer
  // rows where a group has given up, or evicted, a page of that length. Returns how many.
  uint64_t OpenShared(uint64_t number, uint64_t from, uint64_t rows) {
    Open(number);
    SequenceRows& to = sequences_.at(number);
    const SequenceRows& source = sequences_.at(from);
    const uint64_t size = setup_.page_tokens;
    for (size_t g = 0; g < setup_.groups.size();) {
      const bool is_cut_inside = setup_.groups[g].is_whole && rows % size != 0;
      bool is_served = !is_cut_inside;
      for (uint64_t k = 0; is_served && k * size < rows; ++k) {
        is_served = !NeedsPage(g, k, rows) ||
                    pages_.FindKeyed(static_cast<uint32_t>(g), source.keys[k]) != nullptr;
      }
      if (is_served) {
        ++g;
        continue;
      }
      rows = (rows - 1) / size * size;
      g = 0;  // at another length the groups in front may lack a page too
    }
    for (size_t g = 0; g < setup_.groups.size(); ++g) {
      for (uint64_t k = 0; k * size < rows; ++k) {
        if (!NeedsPage(g, k, rows)) continue;
        const uint64_t first = k * size;
        Page& page = *pages_.FindKeyed(static_cast<uint32_t>(g), source.keys[k]);
        AppendExtent(
            {page.id(), 0, static_cast<uint32_t>(std::min<uint64_t>(size, rows - first)), first},
            to.tables[g], pages_);
      }
    }
    to.tokens.assign(source.tokens.begin(), source.tokens.begin() + rows);
    to.keys.assign(source.keys.begin(), source.keys.begin() + rows / size);
    return rows;
  }
  void Close(uint64_t number) {
    SequenceRows empty;
    empty.tables.resize(setup_.groups.size());
    AdoptRows({{&sequences_.at(number), std::move(empty)}}, pages_);
    pages_.TrimKnown();
    sequences_.erase(number);
  }

  // Rows that got another cell because their page was shared: old → new cell.
  using Moves = std::vector<std::pair<uint64_t, uint64_t>>;
  // Appends tokens whose rows hold `first_content`, + 1, …; cells are numbered like the contents,
  // and from *next_copy on for rows that had to be copied first. Of a group that is kept whole, a
  // page or state has the number that its last row would have. Returns the moves of each group.
  std::vector<Moves> Append(uint64_t number, std::span<const uint32_t> tokens,
                            uint64_t first_content, uint64_t* next_copy) {
    SequenceRows& rows = sequences_.at(number);
    const uint64_t first_row = rows.num_rows();
    const bool is_canonical = rows.is_next_canonical();
    const int64_t first_position = rows.end_position();
    rows.AppendTokens(tokens);
    const std::vector<PrefixKey> keys = PrefixKeysOf(PrefixKey{}, rows.tokens, setup_.page_tokens);
    std::vector<Moves> moves(setup_.groups.size());
    const uint64_t copies_from = *next_copy;
    for (size_t g = 0; g < setup_.groups.size(); ++g) {
      if (setup_.groups[g].is_whole) {
        AppendWhole(g, rows, keys, first_row, first_content);
        continue;
      }
      uint64_t copy_at = copies_from;
      PageTable& table = rows.tables[g];
      TailPlan plan = PlanTail(table, pages_, setup_.page_tokens, first_row, is_canonical);
      if (setup_.skips_copy_on_write && plan.kind == TailPlan::Kind::kCopy &&
          pages_.Get(plan.page).refs() > table.NumExtentsOf(plan.page) &&
          !pages_.Get(plan.page).is_full()) {
        plan.kind = TailPlan::Kind::kInPlace;
        plan.rows = table.back().end_slot();
      }
      Page* page = nullptr;
      uint32_t slot = plan.rows;
      if (plan.kind == TailPlan::Kind::kInPlace) {
        page = &Resident(plan.page);
        pages_.BeginWrite(*page);
        page->SetRows(slot);
      } else if (plan.kind == TailPlan::Kind::kCopy) {
        Page& source = Resident(plan.page);
        pages_.Pin(source);
        page = &NewPage(g);
        pages_.Unpin(source);
        for (const TailPlan::SlotRun& run : plan.copies) {
          for (uint32_t i = 0; i < run.count; ++i) {
            Slot copy = At(plan.page, run.from_slot + i);
            moves[g].emplace_back(copy.cell, copy_at);
            copy.cell = copy_at++;
            At(page->id(), run.to_slot + i) = copy;
          }
        }
        ReplaceTail(plan, *page, table, pages_);
      }
      for (uint64_t i = 0; i < tokens.size(); ++i) {
        if (page == nullptr || slot == setup_.page_tokens) {
          slot = page == nullptr ? plan.rows : 0;
          page = &NewPage(g);
        }
        const bool is_fresh = page->refs() == 1 && table.NumExtentsOf(page->id()) == 0;
        At(page->id(), slot) = {first_content + i, first_content + i,
                                first_position + static_cast<int64_t>(i)};
        const Extent extent{page->id(), slot, 1, first_row + i};
        if (is_fresh)
          table.Append(extent);  // the creator's reference becomes the table's
        else
          AppendExtent(extent, table, pages_);
        page->SetRows(++slot);
        if (slot == setup_.page_tokens) FillPage(*page, table.back(), rows, keys);
      }
      *next_copy = std::max(*next_copy, copy_at);
    }
    if (rows.is_canonical()) rows.keys = keys;
    for (PageId id : GiveUpMasked(rows)) pages_.Unref(pages_.Get(id));
    pages_.TrimKnown();
    return moves;
  }

  uint64_t spills() const { return spills_; }
  uint64_t restores() const { return restores_; }
  const Slot& At(PageId page, uint32_t slot) const { return memory_.at(page)[slot]; }
  Slot& At(PageId page, uint32_t slot) { return memory_.at(page)[slot]; }

 private:
  // Spills and evicts what the policy says when no frame is free.
  FrameId Frame(uint32_t group) {
    for (;;) {
      if (const auto grant = pages_.AllocateFrame(group, "t")) return grant->frame;
      const std::vector<PageId> victims =
          pages_.policy(group).PickVictims(4, [](PageId) { return true; });
      PT_CHECK(!victims.empty());
      for (PageId id : victims) {
        Page& victim = pages_.Get(id);
        if (!victim.is_clean()) {
          const PageKey key = victim.page_key()
                                  ? *victim.page_key()
                                  : MakePrivatePageKey(1, victim.id().value(), spills_);
          ++spills_;
          pages_.BeginSpill(victim);
          pages_.FinishSpill(victim, Page::StoredAs{key, Checksum128{}});
        }
        pages_.Evict(victim);
      }
    }
  }
  Page& Resident(PageId id) {
    Page& page = pages_.Get(id);
    if (page.state() != PageState::kStored) return page;
    ++restores_;
    pages_.BeginRestore(page, Frame(page.group()));
    pages_.FinishRestore(page);
    return page;
  }
  // Whether a sequence of `rows` rows in canonical order needs its page `k`.
  bool NeedsPage(size_t g, uint64_t k, uint64_t rows) const {
    const GroupTraits& group = setup_.groups[g];
    const uint64_t first = k * setup_.page_tokens;
    const uint64_t end = std::min<uint64_t>(first + setup_.page_tokens, rows);
    if (end % setup_.page_tokens != 0) return true;  // new rows go on in it
    return static_cast<int64_t>(first) < group.keep_tokens ||
           static_cast<int64_t>(end) > group.FirstVisible(static_cast<int64_t>(rows));
  }
  std::vector<PageId> GiveUpMasked(SequenceRows& rows) const {
    if (!setup_.gives_up_masked) return {};
    std::vector<GroupTraits> groups = setup_.groups;
    for (GroupTraits& group : groups) {
      if (setup_.gives_up_too_early && group.window_tokens > 0) --group.window_tokens;
    }
    return rows.DropMasked(groups);
  }
  // The page that the first new row falls into, given anew, and those behind it; or the state
  // behind the last row.
  void AppendWhole(size_t g, SequenceRows& rows, const std::vector<PrefixKey>& keys,
                   uint64_t first_row, uint64_t first_content) {
    PageTable& table = rows.tables[g];
    const uint64_t size = setup_.page_tokens;
    const bool is_state = setup_.groups[g].is_state;
    const uint64_t end = rows.num_rows();
    uint64_t at = (is_state ? end - 1 : first_row) / size * size;
    for (PageId id : table.Truncate(is_state ? 0 : at)) pages_.Unref(pages_.Get(id));
    while (at < end) {
      const uint64_t last = std::min(end, at + size) - 1;
      Page& page = NewPage(g);
      At(page.id(), 0) = {first_content + (last - first_row), first_content + (last - first_row)};
      const auto count = static_cast<uint32_t>(last + 1 - at);
      table.Append({page.id(), 0, count, at});
      page.SetRows(count);
      if (count == size) FillPage(page, table.back(), rows, keys);
      at = last + 1;
    }
  }
  Page& NewPage(size_t group) {
    const FrameId frame = Frame(static_cast<uint32_t>(group));
    Page& page = pages_.CreateTail(static_cast<uint32_t>(group), "t", frame, 0, std::nullopt);
    memory_[page.id()].resize(setup_.page_tokens);
    return page;
  }
  void FillPage(Page& page, const Extent& last, const SequenceRows& rows,
                const std::vector<PrefixKey>& keys) {
    page.SetFull(setup_.page_tokens, Checksum128{});
    const uint64_t index = (last.end_row() - 1) / setup_.page_tokens;
    if (!rows.is_canonical() || !HoldsFromBase(last, index * setup_.page_tokens)) return;
    pages_.SetKey(page, keys[index], index == 0 ? PrefixKey{} : keys[index - 1],
                  MakePageKey(keys[index], Digest{}),
                  std::make_shared<const std::vector<uint32_t>>(), /*has_inputs=*/true);
  }

  const Setup setup_;
  PageDirectory pages_;
  std::map<uint64_t, SequenceRows> sequences_;
  std::map<PageId, std::vector<Slot>> memory_;  // [page][slot], in frames and in the store
  uint64_t spills_ = 0;
  uint64_t restores_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_CORE_SEQUENCE_WORLD_H_
