// Layer groups that are not full attention: a ring that keeps its first rows, states that cannot be
// cut, pages in the engine's own layout.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

constexpr uint32_t kPageTokens = 8;
constexpr uint32_t kWindow = 20;
constexpr uint32_t kKeep = 5;
enum Group : uint32_t { kFull, kRing, kState, kOpaque };

SequenceHandle HandleOf(const SequenceInfo& info) {
  return {info.id, info.epoch, std::nullopt};
}

HostUnderTest::Setup Mixed(uint32_t num_frames = 64, bool write_through = true) {
  return {.num_frames = num_frames,
          .write_through = write_through,
          .model = MixedModel(kPageTokens, kWindow, kKeep)};
}

// All that can be seen of a sequence without its bytes.
std::string ShownOf(HostUnderTest& t, SequenceId id) {
  const SequenceInfo info = *t.host->Get(t.tenant, id);
  std::string text = absl::StrCat(info.revision, " ", info.length, " ", info.canonical_length);
  const auto table = t.host->GetBlockTable(t.tenant, id);
  for (const BlockTableEntry& entry : table->entries) {
    absl::StrAppend(&text, "; ", entry.group, " ", entry.first_row, " ", entry.count, " ",
                    entry.page.value(), " ", entry.references);
  }
  return text;
}

TEST(LayerGroupsTest, AllGroupsMoveTogether) {
  HostUnderTest t(Mixed());
  const std::vector<uint32_t> tokens = Tokens(0, 100);
  auto info = t.OpenAndFill(std::span(tokens).first(30));
  ASSERT_TRUE(info.ok()) << info.status();
  for (size_t length = 31; length <= 100; ++length) {
    info = t.Step(*info, std::span(tokens).first(length));
    ASSERT_TRUE(info.ok()) << info.status();
    ASSERT_EQ(*t.WrongHeld(info->id, std::span(tokens).first(length)), 0) << length;
  }
  // Of the ring the page that is kept and those of the newest 15 rows; of the state one.
  uint64_t pages[4] = {};
  const auto table = t.host->GetBlockTable(t.tenant, info->id);
  for (const BlockTableEntry& entry : table->entries) {
    ++pages[entry.group];
  }
  EXPECT_EQ(pages[kFull], 13u);
  EXPECT_EQ(pages[kRing], 1u + 3u);
  EXPECT_EQ(pages[kState], 1u);
  EXPECT_EQ(pages[kOpaque], 13u);
  t.host->Quiesce();
}

TEST(LayerGroupsTest, WhatWouldCutAStateIsRefusedBeforeAnyGroupChanges) {
  HostUnderTest t(Mixed());
  const std::vector<uint32_t> tokens = Tokens(0, 24);
  auto a = t.OpenAndFill(tokens);
  auto empty = t.host->Open(t.tenant, {}, {}, {});
  auto other = t.OpenAndFill(Tokens(1000, 10));
  ASSERT_TRUE(a.ok() && empty.ok() && other.ok());
  const std::string before = ShownOf(t, a->id);
  const std::string other_before = ShownOf(t, other->id);
  const uint64_t n = a->number;
  const std::pair<SequenceEdit, const char*> kRefused[] = {
      {RemoveRangeEdit{n, {3, 9}}, "CANNOT_CUT"},
      {RemoveRangeEdit{n, {16, 24}}, "CANNOT_CUT"},
      {RewindEdit{n, 16}, "CANNOT_CUT"},
      {RewindEdit{n, 23}, "CANNOT_CUT"},
      {CopyRangeEdit{n, other->number, {0, -1}, true}, "CANNOT_CUT"},
      {CopyRangeEdit{n, empty->info.number, {0, 16}}, "CANNOT_CUT"},
      {ShiftWindowEdit{n, {.keep = 8, .discard = 8}}, "CANNOT_CUT"},
      {ShiftPositionsEdit{.sequence = n, .range = {0, -1}, .delta = 5}, "CANNOT_SHIFT"},
      {DividePositionsEdit{.sequence = n, .range = {0, -1}, .divisor = 2}, "CANNOT_SHIFT"},
  };
  const std::vector<SequenceHandle> handles = {HandleOf(*a), HandleOf(*other),
                                               HandleOf(empty->info)};
  for (const auto& [edit, reason] : kRefused) {
    const absl::Status status = t.host->Edit(t.tenant, handles, {&edit, 1}).status();
    EXPECT_TRUE(absl::IsFailedPrecondition(status)) << status;
    EXPECT_EQ(GetReason(status), reason) << edit.index() << ": " << status;
    EXPECT_EQ(GetReasonMetadata(status, "group"), "2") << status;
  }
  for (uint64_t length : {1, 16, 23}) {
    EXPECT_EQ(GetReason(t.host->Fork(t.tenant, handles[0], length, t.Soon()).status()),
              "CANNOT_CUT");
    EXPECT_EQ(GetReason(t.host->Snapshot(t.tenant, handles[0], length).status()), "CANNOT_CUT");
  }
  EXPECT_EQ(ShownOf(t, a->id), before);
  EXPECT_EQ(ShownOf(t, other->id), other_before);
  // What keeps the whole goes: a fork, a copy into nothing, a beam's swap, and the end of it all.
  auto fork = t.host->Fork(t.tenant, handles[0], 24, t.Soon());
  ASSERT_TRUE(fork.ok()) << fork.status();
  const SequenceEdit copy = CopyRangeEdit{n, empty->info.number, {0, -1}};
  ASSERT_TRUE(t.host->Edit(t.tenant, handles, {&copy, 1}).ok());
  EXPECT_EQ(*t.WrongHeld(empty->info.id, tokens), 0);
  const std::vector<uint32_t> longer = Concat(tokens, {7, 8, 9});
  ASSERT_TRUE(t.Append(*a, longer).ok());
  EXPECT_EQ(*t.WrongHeld(a->id, longer), 0);
  EXPECT_EQ(*t.WrongHeld(fork->info.id, tokens), 0);
  const SequenceEdit swap =
      ReorderEdit{.sequences = {n, other->number}, .order = {1, 0}, .allow_repeats = false};
  ASSERT_TRUE(t.host->Edit(t.tenant, handles, {&swap, 1}).ok());
  EXPECT_EQ(*t.WrongHeld(other->id, longer), 0);
  ASSERT_TRUE(t.host->Rewind(t.tenant, handles[0], 0).ok());
  t.host->Quiesce();
}

TEST(LayerGroupsTest, OpaquePagesEndWherePagesDo) {
  ModelSpec spec = MixedModel(kPageTokens, kWindow, kKeep)->spec();
  spec.geometry.groups = {spec.geometry.groups[kFull], spec.geometry.groups[kOpaque]};
  HostUnderTest t({.model = std::make_shared<const Model>(Model::Create(spec).value())});
  const std::vector<uint32_t> tokens = Tokens(0, 30);
  auto a = t.OpenAndFill(tokens);
  ASSERT_TRUE(a.ok()) << a.status();
  EXPECT_EQ(GetReason(t.host->Rewind(t.tenant, HandleOf(*a), 20).status()), "CANNOT_CUT");
  EXPECT_EQ(GetReason(t.host->Fork(t.tenant, HandleOf(*a), 29, t.Soon()).status()), "CANNOT_CUT");
  auto fork = t.host->Fork(t.tenant, HandleOf(*a), 16, t.Soon());
  ASSERT_TRUE(fork.ok()) << fork.status();
  auto cut = t.host->Rewind(t.tenant, HandleOf(*a), 24);
  ASSERT_TRUE(cut.ok()) << cut.status();
  ASSERT_TRUE(t.Append(cut->info, tokens).ok());
  EXPECT_EQ(*t.WrongHeld(a->id, tokens), 0);
  EXPECT_EQ(*t.WrongHeld(fork->info.id, std::span(tokens).first(16)), 0);
  // A prompt reuses whole pages; that more of the next page is known helps nobody.
  PrefixReuse reuse;
  auto b = t.OpenAndFill(Concat(Tokens(0, 28), {99, 98}), &reuse);
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_EQ(reuse.reused_tokens, 24u);
  EXPECT_EQ(reuse.limit, ReuseLimit::kGroup);
  EXPECT_EQ(reuse.limiting_group, 1u);
  t.host->Quiesce();
}

TEST(LayerGroupsTest, TheGroupThatLacksAPageIsNamed) {
  MemoryPageStore store;
  const std::vector<uint32_t> tokens = Tokens(0, 64);
  std::vector<PageKey> keys;  // of the second group
  {
    HostUnderTest writer({.num_groups = 2, .num_frames = 32, .store = &store});
    auto info = writer.OpenAndFill(tokens);
    ASSERT_TRUE(info.ok()) << info.status();
    writer.host->Quiesce();
    const auto table = writer.host->GetBlockTable(writer.tenant, info->id);
    for (const BlockTableEntry& entry : table->entries) {
      if (entry.group == 1) keys.push_back(*entry.key);
    }
  }
  ASSERT_EQ(keys.size(), 4u);
  ASSERT_EQ(*store.DeletePages({&keys[2], 1}, HostUnderTest::Soon()), 1u);
  const auto expect_limited = [&](HostUnderTest& t, uint64_t reused) {
    const PrefixReuse reuse = *t.host->LookupPrefix(t.tenant, tokens, {}, {});
    EXPECT_EQ(reuse.reused_tokens, reused);
    EXPECT_EQ(reuse.limit, ReuseLimit::kGroup) << reuse.explanation;
    EXPECT_EQ(reuse.limiting_group, 1u);
  };
  // As the store says it, and as the worker knows it from then on.
  HostUnderTest t({.num_groups = 2, .num_frames = 32, .store = &store, .incarnation = 8});
  expect_limited(t, 32);
  expect_limited(t, 32);
  HostUnderTest local({.num_groups = 2, .num_frames = 32, .no_store = true});
  auto info = local.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  ASSERT_EQ(local.host->LookupPrefix(local.tenant, tokens, {}, {})->reused_tokens, 63u);
  // What nobody has is no group's fault.
  std::vector<uint32_t> longer = tokens;
  longer.resize(96, 5);
  const PrefixReuse never = *local.host->LookupPrefix(local.tenant, longer, {}, {});
  EXPECT_EQ(never.reused_tokens, 64u);
  EXPECT_EQ(never.limit, ReuseLimit::kNeverStored);
  // Without its first page the second group has nothing.
  ASSERT_EQ(*store.DeletePages({&keys[0], 1}, HostUnderTest::Soon()), 1u);
  HostUnderTest last({.num_groups = 2, .num_frames = 32, .store = &store, .incarnation = 9});
  expect_limited(last, 0);
}

TEST(LayerGroupsTest, APrefixIsAsLongAsThereIsAStateOfIt) {
  HostUnderTest t(Mixed(64, /*write_through=*/false));
  const std::vector<uint32_t> tokens = Tokens(0, 48);
  // States stand behind token 16 and behind token 42.
  auto a = t.OpenAndFill(std::span(tokens).first(16));
  ASSERT_TRUE(a.ok()) << a.status();
  ASSERT_TRUE(t.Append(*a, std::span(tokens).first(42)).ok());
  PrefixReuse reuse;
  auto b = t.OpenAndFill(tokens, &reuse);
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_EQ(reuse.reused_tokens, 16u);
  EXPECT_EQ(reuse.limit, ReuseLimit::kGroup);
  EXPECT_EQ(reuse.limiting_group, kState);
  EXPECT_EQ(*t.WrongHeld(b->id, tokens), 0);
  t.host->Quiesce();
}

TEST(LayerGroupsTest, CheckpointsAreTheRewindPointsOfAState) {
  HostUnderTest t(Mixed());
  const std::vector<uint32_t> tokens = Tokens(0, 61);
  auto a = t.OpenAndFill(std::span(tokens).first(21));
  ASSERT_TRUE(a.ok()) << a.status();
  auto checkpoint = t.host->CreateCheckpoint(t.tenant, HandleOf(*a), {}, t.Soon());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  ASSERT_TRUE(t.Append(*a, tokens).ok());
  auto back = t.host->RestoreCheckpoint(t.tenant, HandleOf(*a), checkpoint->id, t.Soon());
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->length, 21u);
  EXPECT_EQ(*t.WrongHeld(a->id, std::span(tokens).first(21)), 0);
  const std::vector<uint32_t> other = Concat(Tokens(0, 21), {5, 5, 5});
  ASSERT_TRUE(t.Append(*back, other).ok());
  EXPECT_EQ(*t.WrongHeld(a->id, other), 0);
  t.host->Quiesce();
}

TEST(LayerGroupsTest, AutomaticCheckpointsAreTheRewindPointsOfAState) {
  HostUnderTest::Setup setup = Mixed();
  setup.checkpoint_every_pages = 2;
  HostUnderTest t(setup);
  const std::vector<uint32_t> tokens = Tokens(0, 80);
  auto info = t.OpenAndFill(std::span(tokens).first(5));
  ASSERT_TRUE(info.ok()) << info.status();
  for (size_t length = 6; length <= tokens.size(); ++length) {
    info = t.Step(*info, std::span(tokens).first(length));
    ASSERT_TRUE(info.ok()) << info.status();
  }
  // The state cannot be cut; where a checkpoint was left it can be gone back to.
  EXPECT_EQ(GetReason(t.host->Rewind(t.tenant, HandleOf(*info), 50).status()), "CANNOT_CUT");
  const auto list = t.host->ListCheckpoints(t.tenant, info->id);
  ASSERT_EQ(list->size(), 5u);
  for (size_t i = list->size(); i-- > 0;) {
    const CheckpointInfo& point = (*list)[i];
    ASSERT_EQ(point.length, 16 * (i + 1));
    EXPECT_TRUE(point.is_automatic);
    EXPECT_EQ(point.scope, CheckpointScope::kNonRewindable);
    ASSERT_TRUE(t.host->EvictPages(0, t.Soon()).ok());
    auto back = t.host->RestoreCheckpoint(t.tenant, HandleOf(*info), point.id, t.Soon());
    ASSERT_TRUE(back.ok()) << back.status();
    EXPECT_EQ(*t.WrongHeld(info->id, std::span(tokens).first(point.length)), 0);
    // Other tokens from there on: what lay behind is void.
    const std::vector<uint32_t> other =
        Concat(std::vector<uint32_t>(tokens.begin(), tokens.begin() + point.length), {7, 7, 7});
    info = t.Append(*back, other);
    ASSERT_TRUE(info.ok()) << info.status();
    EXPECT_EQ(*t.WrongHeld(info->id, other), 0);
    if (i + 1 == list->size()) continue;
    const absl::Status late =
        t.host->RestoreCheckpoint(t.tenant, HandleOf(*info), (*list)[i + 1].id, t.Soon()).status();
    EXPECT_EQ(GetReason(late), "CHECKPOINT_VOID") << late;
  }
  t.host->Quiesce();
}

TEST(LayerGroupsTest, ABrokenWriteLeavesPageAndStateAsTheyWere) {
  HostUnderTest t(Mixed());
  const std::vector<uint32_t> tokens = Tokens(0, 30);
  auto a = t.OpenAndFill(std::span(tokens).first(20));
  ASSERT_TRUE(a.ok()) << a.status();
  auto slot = t.host->BeginAppend(t.tenant, HandleOf(*a), "a", 20, std::span(tokens).subspan(20),
                                  {}, false, t.Soon());
  ASSERT_TRUE(slot.ok()) << slot.status();
  ASSERT_TRUE(t.WriteAll(*slot, tokens).ok());
  ASSERT_TRUE(t.host->Abort(t.tenant, a->id, slot->pending_id).ok());
  EXPECT_EQ(*t.WrongHeld(a->id, std::span(tokens).first(20)), 0);
  ASSERT_TRUE(t.Append(*a, tokens).ok());
  EXPECT_EQ(*t.WrongHeld(a->id, tokens), 0);
  t.host->Quiesce();
}

TEST(LayerGroupsTest, BytesThatDoNotFitAreRefusedAndAMissingByteIsNamed) {
  HostUnderTest t(Mixed());
  const std::vector<uint32_t> tokens = Tokens(0, 10);
  auto a = t.host->Open(t.tenant, {}, {}, {});
  auto slot = t.host->BeginAppend(t.tenant, HandleOf(a->info), "a", 0, tokens, {}, false, t.Soon());
  ASSERT_TRUE(slot.ok()) << slot.status();
  const auto write = [&](const RowRun& run, uint64_t num_bytes) {
    return t.host->WriteRows(t.tenant, a->info.id, slot->pending_id, run, num_bytes,
                             [](uint64_t, std::span<std::byte>) {});
  };
  const RowRun kRuns[] = {
      {.group = kFull, .kind = RowKind::kPage},                     // has rows
      {.group = kState, .kind = RowKind::kK, .num_tokens = 1},      // has none
      {.group = kState, .kind = RowKind::kPage, .page = 1},         // one state
      {.group = kOpaque, .kind = RowKind::kPage, .page = 2},        // two pages
      {.group = kState, .kind = RowKind::kPage, .page_offset = 1},  // not in order
      {.group = 9, .kind = RowKind::kPage},                         // no such group
  };
  for (const RowRun& run : kRuns) {
    EXPECT_TRUE(absl::IsInvalidArgument(write(run, 8))) << run.group << " " << run.page;
  }
  EXPECT_TRUE(absl::IsInvalidArgument(write({.group = kState, .kind = RowKind::kPage}, 201)));
  EXPECT_TRUE(absl::IsInvalidArgument(write({.group = kState, .kind = RowKind::kPage}, 0)));
  ASSERT_TRUE(t.WriteAll(*slot, tokens).ok());
  // A state may be sent once more, as rows may.
  ASSERT_TRUE(write({.group = kState, .kind = RowKind::kPage}, 200).ok());
  ASSERT_TRUE(t.host->Abort(t.tenant, a->info.id, slot->pending_id).ok());
  slot = t.host->BeginAppend(t.tenant, HandleOf(a->info), "b", 0, tokens, {}, false, t.Soon());
  for (uint32_t g : {kFull, kRing}) {
    for (uint32_t layer = 0; layer < t.model->geometry().group(g).num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        ASSERT_TRUE(
            write({g, layer, kind, 0, 10}, 10 * t.model->geometry().group(g).row_bytes(kind)).ok());
      }
    }
  }
  ASSERT_TRUE(write({.group = kState, .kind = RowKind::kPage}, 199).ok());
  const absl::Status status =
      t.host->Commit(t.tenant, HandleOf(a->info), slot->pending_id, {}).status();
  EXPECT_EQ(GetReason(status), "ROWS_MISSING") << status;
  EXPECT_NE(status.message().find("199 of 200 bytes"), std::string::npos) << status;
}

TEST(LayerGroupsTest, OfADraftTreeOnlyTheFirstTokensCanBeTaken) {
  HostUnderTest t(Mixed());
  const std::vector<uint32_t> tokens = Tokens(0, 12);
  auto a = t.OpenAndFill(std::span(tokens).first(9));
  ASSERT_TRUE(a.ok()) << a.status();
  const ReserveItem item{HandleOf(*a), 3, {-1, -1, 1}};
  auto slots = t.host->Reserve(t.tenant, {&item, 1}, absl::Seconds(60), false, t.Soon());
  ASSERT_TRUE(slots.ok()) << slots.status();
  ASSERT_TRUE(t.WriteAll(slots->front(), tokens).ok());
  const std::vector<uint32_t> second = {1, 2};
  EXPECT_EQ(GetReason(t.host
                          ->Accept(t.tenant, item.sequence, slots->front().pending_id, second,
                                   std::span(tokens).first(2))
                          .status()),
            "CANNOT_CUT");
  EXPECT_EQ(t.host->Get(t.tenant, a->id)->length, 9u);
}

TEST(LayerGroupsTest, FewerTokensThanReservedHaveTheirOwnState) {
  HostUnderTest t(Mixed());
  const std::vector<uint32_t> tokens = Tokens(0, 20);
  auto a = t.OpenAndFill(std::span(tokens).first(5));
  ASSERT_TRUE(a.ok()) << a.status();
  const ReserveItem item{HandleOf(*a), 12};
  auto slots = t.host->Reserve(t.tenant, {&item, 1}, absl::Seconds(60), false, t.Soon());
  ASSERT_TRUE(slots.ok()) << slots.status();
  PendingSlot taken = slots->front();
  taken.num_tokens = 3;  // up to the end of a page, where a state gets a key
  ASSERT_TRUE(t.WriteAll(taken, tokens).ok());
  auto done =
      t.host->Commit(t.tenant, item.sequence, taken.pending_id, std::span(tokens).subspan(5, 3));
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(*t.WrongHeld(a->id, std::span(tokens).first(8)), 0);
  PrefixReuse reuse;
  ASSERT_TRUE(t.OpenAndFill(tokens, &reuse).ok());
  EXPECT_EQ(reuse.reused_tokens, 8u);
  t.host->Quiesce();
}

TEST(LayerGroupsTest, SavedStateComesBackElsewhere) {
  MemoryPageStore store;
  HostUnderTest::Setup setup = Mixed();
  setup.store = &store;
  const std::vector<uint32_t> tokens = Tokens(0, 75);
  HostUnderTest t(setup);
  auto a = t.OpenAndFill(std::span(tokens).first(61));
  ASSERT_TRUE(a.ok()) << a.status();
  auto snapshot = t.host->Snapshot(t.tenant, HandleOf(*a), std::nullopt);
  ASSERT_TRUE(snapshot.ok()) << snapshot.status();
  auto put = (*snapshot)->PutPages({}, Durability::kProcess, t.Soon());
  ASSERT_TRUE(put.ok()) << put.status();
  setup.incarnation = 8;
  HostUnderTest other(setup);
  EXPECT_EQ(
      GetReason(
          other.host->OpenSaved(other.tenant, (*snapshot)->state(), put->pages, 60, std::nullopt)
              .status()),
      "CANNOT_CUT");
  auto loaded = other.host->OpenSaved(other.tenant, (*snapshot)->state(), put->pages, std::nullopt,
                                      std::nullopt);
  ASSERT_TRUE(loaded.ok()) << loaded.status();
  EXPECT_EQ(*other.WrongHeld(loaded->info.id, std::span(tokens).first(61)), 0);
  ASSERT_TRUE(other.Append(loaded->info, tokens).ok());
  EXPECT_EQ(*other.WrongHeld(loaded->info.id, tokens), 0);
  snapshot->reset();
  t.host->Quiesce();
}

constexpr uint32_t kChunk = 24;  // not a multiple of the page

// Full attention, and attention within chunks: at a chunk's begin nothing in front is needed.
HostUnderTest::Setup Chunked(PageStore* store, uint64_t incarnation = 7) {
  ModelSpec spec = TestModel(16)->spec();
  LayerGroupSpec chunked = spec.geometry.groups.front();
  chunked.layers = {1};
  chunked.kind = LayerGroupSpec::Kind::kWindow;
  chunked.window_type = LayerGroupSpec::WindowType::kChunked;
  chunked.window_tokens = kChunk;
  spec.geometry.groups.push_back(chunked);
  return {.num_frames = 64,
          .store = store,
          .incarnation = incarnation,
          .model = std::make_shared<const Model>(Model::Create(std::move(spec)).value())};
}

// A sequence of 24 rows whose chunked group holds none of them.
enum class CutBy { kRewind, kFork, kLoad };
class CutAtChunkTest : public ::testing::TestWithParam<CutBy> {
 protected:
  SequenceInfo MakeCut() {
    auto whole = first_.OpenAndFill(Tokens(0, 50));
    EXPECT_TRUE(whole.ok()) << whole.status();
    if (GetParam() == CutBy::kRewind) {
      return first_.host->Rewind(first_.tenant, HandleOf(*whole), kChunk).value().info;
    }
    if (GetParam() == CutBy::kFork) {
      return first_.host->Fork(first_.tenant, HandleOf(*whole), kChunk, first_.Soon()).value().info;
    }
    auto snapshot = first_.host->Snapshot(first_.tenant, HandleOf(*whole), std::nullopt);
    EXPECT_TRUE(snapshot.ok()) << snapshot.status();
    auto put = (*snapshot)->PutPages({}, Durability::kProcess, first_.Soon());
    EXPECT_TRUE(put.ok()) << put.status();
    return t_.host->OpenSaved(t_.tenant, (*snapshot)->state(), put->pages, kChunk, std::nullopt)
        .value()
        .info;
  }

  MemoryPageStore store_;
  HostUnderTest first_{Chunked(&store_)};
  HostUnderTest second_{Chunked(&store_, 8)};
  HostUnderTest& t_ = GetParam() == CutBy::kLoad ? second_ : first_;
};

INSTANTIATE_TEST_SUITE_P(All, CutAtChunkTest,
                         ::testing::Values(CutBy::kRewind, CutBy::kFork, CutBy::kLoad));

TEST_P(CutAtChunkTest, APageWithoutItsFirstRowsIsFoundByNobody) {
  const SequenceInfo cut = MakeCut();
  const std::vector<uint32_t> tokens = Concat(Tokens(0, kChunk), Tokens(1000, 24));
  auto a = t_.Append(cut, tokens);
  ASSERT_TRUE(a.ok()) << a.status();
  EXPECT_EQ(*t_.WrongHeld(a->id, tokens), 0);
  PrefixReuse reuse;
  const std::vector<uint32_t> prompt(tokens.begin(), tokens.begin() + 33);
  auto b = t_.OpenAndFill(prompt, &reuse);
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_EQ(*t_.WrongHeld(b->id, prompt), 0);
  // Of its second page the rows that an earlier sequence had in the same slots.
  EXPECT_EQ(reuse.reused_tokens, kChunk);
  EXPECT_EQ(reuse.limiting_group, 1u);
  // The page behind it is whole again, and has its key.
  const auto table = t_.host->GetBlockTable(t_.tenant, a->id)->entries;
  EXPECT_EQ(table.back().group, 1u);
  EXPECT_EQ(table.back().first_row, 32u);
  EXPECT_EQ(table.back().first_slot, 0u);
  EXPECT_TRUE(table.back().key.has_value());
  t_.host->Quiesce();
}

TEST_P(CutAtChunkTest, ATailWithoutItsFirstRowsIsFoundByNobody) {
  const SequenceInfo cut = MakeCut();
  const std::vector<uint32_t> tokens = Concat(Tokens(0, kChunk), Tokens(1000, 6));
  auto a = t_.Append(cut, tokens);
  ASSERT_TRUE(a.ok()) << a.status();
  const std::vector<uint32_t> prompt =
      Concat({tokens.begin(), tokens.begin() + 28}, Tokens(2000, 8));
  auto b = t_.OpenAndFill(prompt);
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_EQ(*t_.WrongHeld(b->id, prompt), 0);
  // A copy of such a tail goes on where it was: behind its page come pages with keys.
  auto fork = t_.host->Fork(t_.tenant, HandleOf(*a), std::nullopt, t_.Soon());
  ASSERT_TRUE(fork.ok()) << fork.status();
  const std::vector<uint32_t> longer = Concat(tokens, Tokens(3000, 18));
  ASSERT_TRUE(t_.Append(fork->info, longer).ok());
  EXPECT_EQ(*t_.WrongHeld(fork->info.id, longer), 0);
  EXPECT_TRUE(t_.host->GetBlockTable(t_.tenant, fork->info.id)->entries.back().key.has_value());
  EXPECT_EQ(*t_.WrongHeld(a->id, tokens), 0);
  t_.host->Quiesce();
}

// Cuts at any length that is allowed, appends, and prompts that share what is known, whoever made
// it. PAGETIDE_TEST_SEED replays.
TEST(LayerGroupsTest, RandomCutsOfChunks) {
  uint64_t seed = 20261121;
  if (const char* text = std::getenv("PAGETIDE_TEST_SEED")) {
    ASSERT_TRUE(absl::SimpleAtoi(text, &seed));
  }
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 rng(seed);
  MemoryPageStore store;
  HostUnderTest t(Chunked(&store));
  struct Open {
    SequenceInfo info;
    std::vector<uint32_t> tokens;
  };
  std::vector<Open> open;
  uint64_t num_cut = 0, num_reused = 0;
  const auto grow = [&](std::vector<uint32_t>& tokens) {
    for (uint64_t i = 1 + rng() % 30; i > 0; --i) {
      tokens.push_back(static_cast<uint32_t>(tokens.size() + rng() % 16 / 15 * 5000));
    }
  };
  for (int step = 0; step < 1500; ++step) {
    const uint32_t what = rng() % 100;
    if (open.size() < 3 || (what < 30 && open.size() < 12)) {
      std::vector<uint32_t> prompt;
      if (!open.empty()) prompt = open[rng() % open.size()].tokens;
      prompt.resize(rng() % (prompt.size() + 1));
      grow(prompt);
      PrefixReuse reuse;
      auto info = t.OpenAndFill(prompt, &reuse);
      ASSERT_TRUE(info.ok()) << step << ": " << info.status();
      ASSERT_EQ(*t.WrongHeld(info->id, prompt), 0) << step;
      num_reused += reuse.reused_tokens;
      open.push_back({*info, prompt});
      continue;
    }
    Open& one = open[rng() % open.size()];
    if (what < 60 && one.tokens.size() < 120) {
      grow(one.tokens);
      auto next = rng() % 2 == 0 ? t.Append(one.info, one.tokens) : t.Step(one.info, one.tokens);
      ASSERT_TRUE(next.ok()) << step << ": " << next.status();
      one.info = *next;
    } else if (what < 85) {
      // Mostly where a chunk begins: elsewhere rows of it may be gone.
      uint64_t length = rng() % (one.tokens.size() + 1);
      if (rng() % 4 != 0) length = length / kChunk * kChunk;
      auto cut = t.host->Rewind(t.tenant, HandleOf(one.info), static_cast<int64_t>(length));
      if (!cut.ok()) {
        ASSERT_EQ(GetReason(cut.status()), "ROWS_RECLAIMED") << step << ": " << cut.status();
        continue;
      }
      one.info = cut->info;
      one.tokens.resize(length);
      ++num_cut;
    } else {
      ASSERT_EQ(*t.WrongHeld(one.info.id, one.tokens), 0) << step;
      ASSERT_TRUE(t.host->Close(t.tenant, one.info.id, one.info.epoch).ok());
      std::swap(one, open.back());
      open.pop_back();
    }
  }
  for (const Open& one : open) EXPECT_EQ(*t.WrongHeld(one.info.id, one.tokens), 0);
  t.host->Quiesce();
  EXPECT_EQ(t.host->Counters().checksum_failures, 0u);
  EXPECT_GT(num_cut, 100u);
  EXPECT_GT(num_reused, 1000u);
}

// Cut to the end of a chunk, a window group holds nothing, and its next row stands inside a page
// whose first slots stay empty. Pages of such rows were found by the tokens of others once.
TEST(LayerGroupsTest, RowsBehindAChunkThatWasGivenUpAreNotFoundInOthersPlaces) {
  ModelSpec spec = TestModel(kPageTokens, 2)->spec();
  LayerGroupSpec& chunked = spec.geometry.groups[1];
  chunked.kind = LayerGroupSpec::Kind::kWindow;
  chunked.window_type = LayerGroupSpec::WindowType::kChunked;
  chunked.window_tokens = 12;
  const auto model = std::make_shared<const Model>(Model::Create(std::move(spec)).value());
  // 39 rows end inside the fifth page, 53 fill it.
  for (const uint32_t length : {39, 53}) {
    HostUnderTest t({.num_frames = 64, .model = model});
    auto info = t.OpenAndFill(Tokens(0, 48));
    ASSERT_TRUE(info.ok()) << info.status();
    auto cut = t.host->Rewind(t.tenant, HandleOf(*info), 36);
    ASSERT_TRUE(cut.ok()) << cut.status();
    const std::vector<uint32_t> tokens = Concat(Tokens(0, 36), Tokens(900, length - 36));
    ASSERT_TRUE(t.Append(cut->info, tokens).ok());
    EXPECT_EQ(*t.WrongHeld(info->id, tokens), 0);
    // The same up to row 43, of which a query there sees those from 36 on.
    const size_t num_same = std::min<size_t>(length, 43);
    const std::vector<uint32_t> prompt =
        Concat({tokens.begin(), tokens.begin() + num_same}, Tokens(5000, 4));
    PrefixReuse reuse;
    auto other = t.OpenAndFill(prompt, &reuse);
    ASSERT_TRUE(other.ok()) << other.status();
    EXPECT_GE(reuse.reused_tokens, 32u);
    EXPECT_EQ(*t.WrongHeld(other->id, prompt), 0) << length;
    t.host->Quiesce();
  }
}

// Random calls against what must be: every byte that a group holds, that it holds what the next
// token needs, and which calls are refused. PAGETIDE_TEST_SEED replays.
TEST(LayerGroupsTest, RandomCallsOnMixedGroups) {
  uint64_t seed = 20261121;
  if (const char* text = std::getenv("PAGETIDE_TEST_SEED")) {
    ASSERT_TRUE(absl::SimpleAtoi(text, &seed));
  }
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  std::mt19937_64 rng(seed);
  HostUnderTest::Setup setup = Mixed(/*num_frames=*/24);
  setup.checkpoint_host_bytes = uint64_t{1} << 30;
  HostUnderTest t(setup);
  struct Checkpoint {
    uint64_t id = 0;
    std::vector<uint32_t> tokens;
  };
  struct Open {
    SequenceInfo info;
    std::vector<uint32_t> tokens;
    std::vector<Checkpoint> checkpoints;
  };
  std::map<uint64_t, Open> open;
  uint64_t num_refused = 0, num_reused = 0, num_restored = 0, num_void = 0, num_checked = 0;
  const auto pick = [&]() { return std::next(open.begin(), rng() % open.size()); };
  for (int step = 0; step < 6000; ++step) {
    const uint32_t what = rng() % 100;
    if (open.size() < 4 || (what < 15 && open.size() < 16)) {
      // Few distinct prompts, whose chunks end at pages' ends now and then.
      std::vector<uint32_t> prompt = Tokens(rng() % 3 * 1000, 8 * (1 + rng() % 6) + rng() % 2);
      PrefixReuse reuse;
      auto info = t.OpenAndFill(prompt, &reuse);
      ASSERT_TRUE(info.ok()) << step << ": " << info.status();
      num_reused += reuse.reused_tokens;
      open[info->number] = {*info, prompt, {}};
    } else if (what < 40) {
      Open& one = pick()->second;
      if (one.tokens.size() > 90) continue;
      const auto n = static_cast<uint32_t>(1 + rng() % 12);
      for (uint32_t i = 0; i < n; ++i) one.tokens.push_back(one.tokens.size() + rng() % 2 * 5000);
      auto next = rng() % 2 == 0 ? t.Append(one.info, one.tokens) : t.Step(one.info, one.tokens);
      ASSERT_TRUE(next.ok()) << step << ": " << next.status();
      one.info = *next;
    } else if (what < 55) {
      const Open& one = pick()->second;
      const uint64_t length = rng() % 3 == 0 ? one.tokens.size() : rng() % (one.tokens.size() + 1);
      const std::string before = ShownOf(t, one.info.id);
      const bool is_allowed = length == 0 || length == one.tokens.size();
      if (rng() % 2 == 0 && open.size() < 16) {
        auto fork = t.host->Fork(t.tenant, HandleOf(one.info), length, t.Soon());
        ASSERT_EQ(fork.ok(), is_allowed) << step << ": " << fork.status();
        if (!fork.ok()) {
          ASSERT_EQ(ShownOf(t, one.info.id), before);
        } else {
          open[fork->info.number] = {
              fork->info,
              std::vector<uint32_t>(one.tokens.begin(), one.tokens.begin() + length),
              {}};
        }
      } else if (!is_allowed) {
        const absl::Status cut = t.host->Rewind(t.tenant, HandleOf(one.info), length).status();
        ASSERT_EQ(GetReason(cut), "CANNOT_CUT") << step << ": " << cut;
        ASSERT_EQ(ShownOf(t, one.info.id), before);
      }
      num_refused += !is_allowed;
    } else if (what < 61) {
      Open& one = pick()->second;
      CheckpointOptions options;
      options.tier = static_cast<Tier>(rng() % 3);
      if (rng() % 2 == 0) options.scope = CheckpointScope::kNonRewindable;
      auto made = t.host->CreateCheckpoint(t.tenant, HandleOf(one.info), options, t.Soon());
      if (one.checkpoints.size() >= 32) continue;
      ASSERT_TRUE(made.ok()) << step << ": " << made.status();
      one.checkpoints.push_back({made->id, one.tokens});
    } else if (what < 67) {
      Open& one = pick()->second;
      if (one.checkpoints.empty()) continue;
      const Checkpoint point = one.checkpoints[rng() % one.checkpoints.size()];
      auto back = t.host->RestoreCheckpoint(t.tenant, HandleOf(one.info), point.id, t.Soon());
      const auto listed = t.host->ListCheckpoints(t.tenant, one.info.id);
      bool is_void = false;
      for (const CheckpointInfo& other : *listed) {
        if (!other.is_void) continue;
        ASSERT_EQ(other.scope, CheckpointScope::kNonRewindable);
        ASSERT_EQ(
            GetReason(t.host->RestoreCheckpoint(t.tenant, HandleOf(one.info), other.id, t.Soon())
                          .status()),
            "CHECKPOINT_VOID");
        is_void = is_void || other.id == point.id;
        ++num_void;
      }
      if (is_void) {
        ASSERT_FALSE(back.ok());
        ASSERT_EQ(t.host->Get(t.tenant, one.info.id)->revision, one.info.revision);
        continue;
      }
      ASSERT_TRUE(back.ok()) << step << ": " << back.status();
      one.info = *back;
      one.tokens = point.tokens;
      ++num_restored;
    } else if (what < 74) {
      auto it = pick();
      ASSERT_TRUE(t.host->Close(t.tenant, it->second.info.id, it->second.info.epoch).ok());
      open.erase(it);
    } else if (what < 80) {
      ASSERT_TRUE(t.host->EvictPages(rng() % 4, t.Soon()).ok());
    } else if (what < 82) {
      t.host->ClearCache(false);
    } else if (what < 84) {
      t.host->Tick();
    } else {
      const Open& one = pick()->second;
      auto wrong = t.WrongHeld(one.info.id, one.tokens);
      ASSERT_TRUE(wrong.ok()) << step << ": " << wrong.status();
      ASSERT_EQ(*wrong, 0) << step;
      ++num_checked;
    }
  }
  for (const auto& [number, one] : open) {
    ASSERT_EQ(t.WrongHeld(one.info.id, one.tokens).value(), 0);
    ASSERT_TRUE(t.host->Close(t.tenant, one.info.id, one.info.epoch).ok());
  }
  t.host->Quiesce();
  t.host->ClearCache(false);
  for (const PoolUsage& usage : t.host->Usage()) EXPECT_EQ(usage.free_frames, usage.num_frames);
  EXPECT_EQ(t.host->Load().checkpoint_host_bytes, 0u);
  EXPECT_EQ(t.store->GetStats(t.Soon())->manifests, 0u);
  EXPECT_EQ(t.host->Counters().checksum_failures, 0u);
  EXPECT_GT(num_refused, 300u);
  EXPECT_GT(num_reused, 300u);
  EXPECT_GT(num_restored, 50u);
  EXPECT_GT(num_void, 20u);
  EXPECT_GT(num_checked, 300u);
  EXPECT_GT(t.host->Counters().pages_restored, 100u);
}

}  // namespace
}  // namespace pagetide
