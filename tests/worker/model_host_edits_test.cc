// Edits on a host: what happens to frames, and what concurrent calls see.
#include <gtest/gtest.h>

#include <algorithm>
#include <thread>

#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

SequenceHandle HandleOf(const SequenceInfo& info) {
  return {info.id, info.epoch, std::nullopt};
}

TEST(ModelHostEditsTest, ClearedDataIsZeroBeforeAnybodyGetsTheFrame) {
  for (const bool zero_data : {false, true}) {
    HostUnderTest t({.page_tokens = 16, .num_frames = 2, .no_store = true});
    const std::vector<uint32_t> tokens = Tokens(100, 30);
    auto info = t.OpenAndFill(tokens);
    ASSERT_TRUE(info.ok()) << info.status();
    auto cleared = t.host->Clear(t.tenant, HandleOf(*info), zero_data);
    ASSERT_TRUE(cleared.ok()) << cleared.status();
    EXPECT_EQ(cleared->freed_pages, zero_data ? 2u : 1u);
    EXPECT_EQ(cleared->cached_pages, zero_data ? 0u : 1u);
    // Both frames are taken again, by one row each.
    std::vector<SequenceInfo> others;
    for (uint32_t i = 0; i < 2; ++i) {
      auto other = t.OpenAndFill(Tokens(1000 * (i + 1), 1));
      ASSERT_TRUE(other.ok()) << other.status();
      others.push_back(*other);
    }
    uint64_t left_over = 0;
    for (const SequenceInfo& other : others) {
      const auto table = t.host->GetBlockTable(t.tenant, other.id);
      ASSERT_TRUE(table.ok());
      const GroupGeometry& geometry = t.model->geometry().group(0);
      std::vector<std::byte> page(geometry.page_bytes());
      ASSERT_TRUE(
          t.host->pool().Read(t.host->FrameOffset(0, *table->entries.front().frame), page).ok());
      for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
        const uint64_t at = geometry.RowOffset(layer, RowKind::kK, 1);
        left_over += std::count_if(page.begin() + at,
                                   page.begin() + geometry.RowOffset(layer, RowKind::kV, 0),
                                   [](std::byte b) { return b != std::byte{0}; });
      }
    }
    EXPECT_EQ(left_over == 0, zero_data);
  }
}

TEST(ModelHostEditsTest, ACopyOfAnOpenTailIsWrittenBehindByBoth) {
  HostUnderTest t({.page_tokens = 16, .num_frames = 16});
  const std::vector<uint32_t> tokens = Tokens(1, 20);
  auto from = t.OpenAndFill(tokens);
  ASSERT_TRUE(from.ok());
  // The source has a write open in the very page that is copied.
  const ReserveItem item{HandleOf(*from), 4};
  auto slots = t.host->Reserve(t.tenant, {&item, 1}, absl::Seconds(30), false, t.Soon());
  ASSERT_TRUE(slots.ok());
  auto to = t.host->Open(t.tenant, {}, {}, {});
  ASSERT_TRUE(to.ok());
  const std::vector<SequenceHandle> both = {HandleOf(*from), HandleOf(to->info)};
  const SequenceEdit copy = CopyRangeEdit{both[0].id.number, both[1].id.number, {0, -1}, false};
  auto copied = t.host->Edit(t.tenant, both, {&copy, 1});
  ASSERT_TRUE(copied.ok()) << copied.status();
  EXPECT_EQ(copied->infos[1].canonical_length, 20u);
  const std::vector<uint32_t> mine = Concat(tokens, Tokens(500, 4));
  const std::vector<uint32_t> other = Concat(tokens, Tokens(700, 9));
  ASSERT_TRUE(t.WriteAll(slots->front(), mine).ok());
  ASSERT_TRUE(t.Append(copied->infos[1], other).ok());
  ASSERT_TRUE(t.host
                  ->Commit(t.tenant, HandleOf(*from), slots->front().pending_id,
                           std::span(mine).subspan(20))
                  .ok());
  EXPECT_EQ(*t.WrongRows(from->id, mine), 0u);
  EXPECT_EQ(*t.WrongRows(to->info.id, other), 0u);
}

TEST(ModelHostEditsTest, ATailCutWhileItWasSharedIsNotFoundByWhatWasCutOff) {
  HostUnderTest t({.page_tokens = 16, .num_frames = 16});
  const std::vector<uint32_t> tokens = Tokens(1, 12);
  auto a = t.OpenAndFill(tokens);
  ASSERT_TRUE(a.ok());
  auto b = t.host->Open(t.tenant, {}, {}, {});
  ASSERT_TRUE(b.ok());
  const std::vector<SequenceHandle> both = {HandleOf(*a), HandleOf(b->info)};
  const SequenceEdit copy = CopyRangeEdit{both[0].id.number, both[1].id.number, {0, -1}, false};
  ASSERT_TRUE(t.host->Edit(t.tenant, both, {&copy, 1}).ok());
  // Cut while shared; then the other owner goes, and the page is written in place.
  auto cut = t.host->Rewind(t.tenant, HandleOf(*a), 6);
  ASSERT_TRUE(cut.ok());
  ASSERT_TRUE(t.host->Close(t.tenant, b->info.id, b->info.epoch).ok());
  const std::vector<uint32_t> other = Concat(Tokens(1, 6), Tokens(900, 5));
  ASSERT_TRUE(t.Append(cut->info, other).ok());
  PrefixReuse reuse;
  auto c = t.OpenAndFill(tokens, &reuse);
  ASSERT_TRUE(c.ok());
  EXPECT_EQ(reuse.reused_tokens, 6u);
  EXPECT_EQ(*t.WrongRows(c->id, tokens), 0u);
}

// A chunked window at the beginning of a chunk, behind rows that it gave up and an edit moved to
// the end of the sequence: the tail that it still holds is of rows that no later token sees. New
// rows once took a copy of it, or went behind it, and had to have it in a frame for that.
TEST(ModelHostEditsTest, BehindRowsThatAWindowGaveUpNewRowsNeedNoTail) {
  ModelSpec spec = TestModel(/*page_tokens=*/16, /*num_groups=*/2)->spec();
  LayerGroupSpec& chunked = spec.geometry.groups[1];
  chunked.kind = LayerGroupSpec::Kind::kWindow;
  chunked.window_type = LayerGroupSpec::WindowType::kChunked;
  chunked.window_tokens = 24;
  const auto model = std::make_shared<const Model>(Model::Create(std::move(spec)).value());
  const std::vector<uint32_t> tokens = Tokens(1, 28);
  const std::vector<uint32_t> added = Tokens(500, 5);
  for (const bool is_tail_shared : {true, false}) {
    HostUnderTest t({.num_frames = 16, .model = model});
    auto a = t.OpenAndFill(tokens);  // rows 16 to 27 of the chunked group
    ASSERT_TRUE(a.ok()) << a.status();
    auto b = t.host->Open(t.tenant, {}, {}, {});
    ASSERT_TRUE(b.ok());
    const std::vector<SequenceHandle> both = {HandleOf(*a), HandleOf(b->info)};
    const std::vector<SequenceEdit> edits = {
        CopyRangeEdit{both[0].id.number, both[1].id.number, {0, -1}, false},
        ShiftPositionsEdit{both[1].id.number, {0, 16}, 32}};
    auto edited = t.host->Edit(t.tenant, both, edits);
    ASSERT_TRUE(edited.ok()) << edited.status();
    ASSERT_EQ(edited->infos[1].end_position, 48);  // a chunk begins
    if (!is_tail_shared) {
      ASSERT_TRUE(t.host->Close(t.tenant, a->id, a->epoch).ok());
    }
    ASSERT_TRUE(t.host->EvictPages(100, t.Soon()).ok());
    const HostCounters before = t.host->Counters();

    auto slot = t.host->BeginAppend(t.tenant, both[1], "a", 28, added, {}, false, t.Soon());
    ASSERT_TRUE(slot.ok()) << slot.status();
    ASSERT_EQ(slot->first_position, 48u);
    // Its rows are those of `added` behind 48 others.
    const std::vector<uint32_t> written = Concat(Tokens(1000, 48), added);
    ASSERT_TRUE(t.WriteAll(*slot, written).ok());
    ASSERT_TRUE(t.host->Commit(t.tenant, both[1], slot->pending_id, {}).ok());
    EXPECT_EQ(t.host->Counters().rows_copied, before.rows_copied);
    EXPECT_EQ(t.host->Counters().pages_restored, before.pages_restored);

    const auto table = t.host->GetBlockTable(t.tenant, both[1].id);
    ASSERT_TRUE(table.ok());
    const BlockTableEntry& last = table->entries.back();
    EXPECT_EQ(last.group, 1u);
    EXPECT_EQ(last.first_row, 28u);
    EXPECT_EQ(last.first_slot, 0u);
    EXPECT_EQ(last.count, 5u);
    for (uint32_t g = 0; g < 2; ++g) {
      const GroupGeometry& geometry = model->geometry().group(g);
      auto rows = t.host->PinRows(t.tenant, both[1].id, g, 28, 0, t.Soon());
      ASSERT_TRUE(rows.ok()) << rows.status();
      for (uint32_t layer = 0; layer < geometry.num_layers(); ++layer) {
        for (RowKind kind : {RowKind::kK, RowKind::kV}) {
          std::vector<std::byte> bytes;
          for (const auto& run : (*rows)->Runs(layer, kind)) {
            std::vector<std::byte> part(run.num_bytes);
            ASSERT_TRUE(t.host->pool().Read(run.offset, part).ok());
            bytes.insert(bytes.end(), part.begin(), part.end());
          }
          EXPECT_EQ(bytes,
                    RowOracle::Rows(written, 48, 53, g, layer, kind, geometry.row_bytes(kind)));
        }
      }
    }
    if (is_tail_shared) {
      EXPECT_EQ(*t.WrongHeld(a->id, tokens), 0);
    }
  }
}

// Threads append to, edit and close forks of one sequence, through a pool smaller than what they
// hold. Rows are a function of the tokens in front of them (tests/worker/row_oracle.h), so only
// edits that keep them so are checked by their bytes: truncations, copies of a beginning, reorders.
TEST(ModelHostEditsTest, ForksOfOneSequenceAreEditedFromSeveralThreads) {
  constexpr int kThreads = 4;
  constexpr int kRounds = 40;
  HostUnderTest t({.page_tokens = 16, .num_frames = 24});
  const std::vector<uint32_t> base = Tokens(1, 40);
  auto root = t.OpenAndFill(base);
  ASSERT_TRUE(root.ok());
  std::vector<std::thread> threads;
  for (int id = 0; id < kThreads; ++id) {
    threads.emplace_back([&, id] {
      for (int round = 0; round < kRounds; ++round) {
        const auto first = static_cast<uint32_t>(10000 * (id + 1) + 100 * round);
        auto mine = t.host->Open(t.tenant, {}, {}, {});
        ASSERT_TRUE(mine.ok()) << mine.status();
        const std::vector<SequenceHandle> both = {HandleOf(*root), HandleOf(mine->info)};
        const int64_t kept = 1 + (id * 7 + round) % 40;
        const std::vector<SequenceEdit> edits = {
            CopyRangeEdit{both[0].id.number, both[1].id.number, {0, -1}, false},
            RewindEdit{both[1].id.number, kept}};
        auto copied = t.host->Edit(t.tenant, both, edits);
        ASSERT_TRUE(copied.ok()) << copied.status();
        std::vector<uint32_t> tokens =
            Concat({base.begin(), base.begin() + kept}, Tokens(first, 25));
        auto info = t.Append(copied->infos[1], tokens);
        ASSERT_TRUE(info.ok()) << info.status();
        EXPECT_EQ(*t.WrongRows(info->id, tokens), 0u);
        // Rows of a middle part go: what stays in front of them is as it was.
        const SequenceEdit remove = RemoveRangeEdit{info->id.number, {kept, kept + 5}};
        const SequenceHandle handle = HandleOf(*info);
        auto edited = t.host->Edit(t.tenant, {&handle, 1}, {&remove, 1});
        ASSERT_TRUE(edited.ok()) << edited.status();
        EXPECT_EQ(edited->infos[0].canonical_length, static_cast<uint64_t>(kept));
        auto cut = t.host->Rewind(t.tenant, handle, kept);
        ASSERT_TRUE(cut.ok());
        tokens.resize(kept);
        EXPECT_EQ(*t.WrongRows(info->id, tokens), 0u);
        EXPECT_TRUE(t.host->Close(t.tenant, info->id, info->epoch).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(*t.WrongRows(root->id, base), 0u);
}

}  // namespace
}  // namespace pagetide
