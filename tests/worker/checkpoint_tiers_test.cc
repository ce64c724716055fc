// Checkpoints by scope and tier: each gives back the same rows after the device's pages are gone,
// keeps what it says and nothing longer than it should.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <tuple>

#include "tests/support/timing.h"
#include "tests/worker/checkpoint_fixture.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

uint64_t FreeFrames(HostUnderTest& t) {
  uint64_t free = 0;
  for (const PoolUsage& pool : t.host->Usage()) free += pool.free_frames;
  return free;
}
// K of rows [begin, end) of the first layer that is not what it should be.
uint64_t WrongKRows(HostUnderTest& t, SequenceId id, std::span<const uint32_t> tokens,
                    uint64_t begin, uint64_t end) {
  auto rows = t.host->PinRows(t.tenant, id, 0, begin, end, Soon());
  EXPECT_TRUE(rows.ok()) << rows.status();
  if (!rows.ok()) return end - begin;
  const uint32_t row_bytes = t.model->geometry().group(0).row_bytes(RowKind::kK);
  const std::vector<std::byte> expected =
      RowOracle::Rows(tokens, 0, tokens.size(), 0, 0, RowKind::kK, row_bytes);
  uint64_t right = 0;
  for (const auto& run : (*rows)->Runs(0, RowKind::kK)) {
    std::vector<std::byte> bytes(run.num_bytes);
    EXPECT_TRUE(t.host->pool().Read(run.offset, bytes).ok());
    for (uint32_t i = 0; i < run.num_tokens; ++i) {
      right += std::memcmp(bytes.data() + i * row_bytes,
                           expected.data() + (run.first_token + i) * row_bytes, row_bytes) == 0;
    }
  }
  return end - begin - right;
}
// Other sequences come and go through all frames.
void TurnThePoolOver(HostUnderTest& t, uint32_t seed) {
  for (uint32_t i = 0; i < 6; ++i) {
    const std::vector<uint32_t> other = Tokens(seed + 1000 * i, 100);
    auto filled = t.OpenAndFill(other);
    ASSERT_TRUE(filled.ok()) << filled.status();
    ASSERT_EQ(*t.WrongRows(filled->id, other), 0u);
    ASSERT_TRUE(t.host->Close(t.tenant, filled->id, filled->epoch).ok());
  }
  ASSERT_TRUE(t.host->EvictPages(0, Soon()).ok());
  t.host->ClearCache(false);
}

class CheckpointTiersTest : public ::testing::TestWithParam<std::tuple<CheckpointScope, Tier>> {
 protected:
  CheckpointOptions options() const {
    return {.scope = std::get<0>(GetParam()), .tier = std::get<1>(GetParam())};
  }
};

TEST_P(CheckpointTiersTest, RowsComeBackAfterTheirFramesWereOthers) {
  // A full group and a window of 24 tokens, pages of 16; a length in the middle of a page.
  HostUnderTest t({.num_groups = 2, .num_frames = 12, .window_tokens = kWindow});
  const std::vector<uint32_t> tokens = Tokens(0, 90);
  auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  auto checkpoint = t.host->CreateCheckpoint(t.tenant, Handle(*info), options(), Soon());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(checkpoint->length, 90u);
  EXPECT_EQ(checkpoint->tier, options().tier);
  EXPECT_EQ(checkpoint->scope, options().scope);
  // 6 pages of the full group; of the window rows 67 to 89: pages 4 and 5.
  const bool is_all = options().scope == CheckpointScope::kAll;
  EXPECT_EQ(checkpoint->num_pages, is_all ? 8u : 2u);
  if (options().tier == Tier::kHost) {
    EXPECT_GE(t.host->Load().checkpoint_host_bytes, checkpoint->copied_bytes);
  } else {
    EXPECT_EQ(t.host->Load().checkpoint_host_bytes, 0u);
  }
  EXPECT_EQ(Manifests(t), options().tier == Tier::kStore ? 1u : 0u);

  // Two windows further the rows behind it are given up: no rewind goes back there.
  std::vector<uint32_t> longer = Concat(tokens, Tokens(5000, 2 * kWindow));
  auto appended = t.Append(*info, longer);
  ASSERT_TRUE(appended.ok()) << appended.status();
  EXPECT_EQ(GetReason(t.host->Rewind(t.tenant, Handle(*info), 90).status()), "ROWS_RECLAIMED");
  TurnThePoolOver(t, 100000);

  for (int again = 0; again < 3; ++again) {
    auto restored = t.host->RestoreCheckpoint(t.tenant, Handle(*info), checkpoint->id, Soon());
    ASSERT_TRUE(restored.ok()) << restored.status();
    EXPECT_EQ(restored->length, 90u);
    EXPECT_EQ(restored->canonical_length, 90u);
    EXPECT_EQ(*t.WrongRows(info->id, tokens), 0u);
    // Other rows behind it leave the checkpoint alone.
    longer = Concat(tokens, Tokens(7000 + again, 2 * kWindow));
    appended = t.Append(*restored, longer);
    ASSERT_TRUE(appended.ok()) << appended.status();
    EXPECT_EQ(*t.WrongRows(info->id, longer), 0u);
    TurnThePoolOver(t, 200000 + 10000 * again);
  }
  // It ends with the sequence, and nothing of it stays.
  ASSERT_TRUE(t.host->Close(t.tenant, info->id, info->epoch).ok());
  t.host->Quiesce();
  t.host->ClearCache(false);
  EXPECT_EQ(FreeFrames(t), 24u);
  EXPECT_EQ(t.host->Load().checkpoint_host_bytes, 0u);
  EXPECT_EQ(Manifests(t), 0u);
}

TEST_P(CheckpointTiersTest, ADeletedOneLeavesNothing) {
  HostUnderTest t({.num_groups = 2, .num_frames = 12, .window_tokens = kWindow});
  const std::vector<uint32_t> tokens = Tokens(0, 90);
  auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok());
  auto checkpoint = t.host->CreateCheckpoint(t.tenant, Handle(*info), options(), Soon());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  ASSERT_TRUE(t.host->DeleteCheckpoint(t.tenant, Handle(*info), checkpoint->id).ok());
  t.host->Quiesce();
  EXPECT_EQ(t.host->Load().checkpoint_host_bytes, 0u);
  EXPECT_EQ(Manifests(t), 0u);
  EXPECT_EQ(*t.WrongRows(info->id, tokens), 0u);
  EXPECT_EQ(
      GetReason(
          t.host->RestoreCheckpoint(t.tenant, Handle(*info), checkpoint->id, Soon()).status()),
      "CHECKPOINT_NOT_FOUND");
}

INSTANTIATE_TEST_SUITE_P(
    All, CheckpointTiersTest,
    ::testing::Combine(::testing::Values(CheckpointScope::kAll, CheckpointScope::kNonRewindable),
                       ::testing::Values(Tier::kDevice, Tier::kHost, Tier::kStore)),
    [](const auto& info) {
      return std::string(std::get<0>(info.param) == CheckpointScope::kAll ? "all_"
                                                                          : "non_rewindable_") +
             TierName(std::get<1>(info.param));
    });

TEST(CheckpointTiersTest, ACopyInHostMemoryNeedsNoStore) {
  HostUnderTest t({.num_frames = 8, .no_store = true});
  const std::vector<uint32_t> tokens = Tokens(0, 100);
  auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok());
  auto checkpoint =
      t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = Tier::kHost}, Soon());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  // Without a store its frames are another's only once the sequence has let go of them.
  auto cut = t.host->Rewind(t.tenant, Handle(*info), 0);
  ASSERT_TRUE(cut.ok());
  TurnThePoolOver(t, 4000);
  auto restored = t.host->RestoreCheckpoint(t.tenant, Handle(*info), checkpoint->id, Soon());
  ASSERT_TRUE(restored.ok()) << restored.status();
  EXPECT_EQ(*t.WrongRows(info->id, tokens), 0u);
  // What came back is keyed again: a prompt finds it.
  PrefixReuse reuse;
  auto second = t.OpenAndFill(std::vector<uint32_t>(tokens.begin(), tokens.begin() + 33), &reuse);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(reuse.reused_tokens, 32u);
  const absl::Status stored =
      t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = Tier::kStore}, Soon()).status();
  EXPECT_EQ(GetReason(stored), "NO_STORE");
}

TEST(CheckpointTiersTest, HostMemoryIsBoundedAndSaysByWhat) {
  const uint64_t page = TestModel(16)->geometry().bytes_per_page_of_tokens();
  HostUnderTest t({.checkpoint_host_bytes = 5 * page});
  auto info = t.OpenAndFill(Tokens(0, 48));
  ASSERT_TRUE(info.ok());
  auto first = t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = Tier::kHost}, Soon());
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->copied_bytes, 3 * page);
  // Beside the pages it keeps 48 tokens and where their rows are.
  const uint64_t taken = t.host->Load().checkpoint_host_bytes;
  EXPECT_GE(taken, 3 * page + 48 * sizeof(uint32_t));
  EXPECT_LT(taken, 4 * page);
  const absl::Status full =
      t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = Tier::kHost}, Soon()).status();
  EXPECT_EQ(GetReason(full), "CHECKPOINT_MEMORY") << full;
  EXPECT_THAT(std::string(full.message()),
              HasSubstr(absl::StrCat("needs ", taken, " bytes of host memory, ", 5 * page - taken,
                                     " of ", 5 * page, " are free")));
  EXPECT_EQ(t.host->Load().checkpoint_host_bytes, taken);
  EXPECT_EQ(t.host->ListCheckpoints(t.tenant, info->id)->size(), 1u);
  ASSERT_TRUE(t.host->DeleteCheckpoint(t.tenant, Handle(*info), first->id).ok());
  EXPECT_TRUE(
      t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = Tier::kHost}, Soon()).ok());
}

TEST(CheckpointTiersTest, ARestoreThatFindsNoFrameChangesNothing) {
  HostUnderTest t({.num_frames = 8, .no_store = true});
  const std::vector<uint32_t> tokens = Tokens(0, 96);
  auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok());
  auto checkpoint =
      t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = Tier::kHost}, Soon());
  ASSERT_TRUE(checkpoint.ok());
  auto cut = t.host->Rewind(t.tenant, Handle(*info), 16);
  ASSERT_TRUE(cut.ok());
  const std::vector<uint32_t> other = Tokens(9000, 96);
  auto holder = t.OpenAndFill(other);
  ASSERT_TRUE(holder.ok()) << holder.status();
  const absl::Status none = t.host
                                ->RestoreCheckpoint(t.tenant, Handle(*info), checkpoint->id,
                                                    HostUnderTest::In(absl::Milliseconds(50)))
                                .status();
  EXPECT_TRUE(absl::IsResourceExhausted(none)) << none;
  EXPECT_EQ(t.host->Get(t.tenant, info->id)->length, 16u);
  EXPECT_EQ(*t.WrongRows(info->id, std::vector<uint32_t>(tokens.begin(), tokens.begin() + 16)), 0u);
  EXPECT_EQ(*t.WrongRows(holder->id, other), 0u);
  ASSERT_TRUE(t.host->Close(t.tenant, holder->id, holder->epoch).ok());
  ASSERT_TRUE(t.host->RestoreCheckpoint(t.tenant, Handle(*info), checkpoint->id, Soon()).ok());
  EXPECT_EQ(*t.WrongRows(info->id, tokens), 0u);
}

TEST(CheckpointTiersTest, WhatOnlyCutGroupsNeedIsVoidOnceTheOthersChanged) {
  for (const Tier tier : {Tier::kDevice, Tier::kHost, Tier::kStore}) {
    SCOPED_TRACE(TierName(tier));
    HostUnderTest t({.num_groups = 2, .window_tokens = kWindow});
    const std::vector<uint32_t> tokens = Tokens(0, 60);
    auto info = t.OpenAndFill(std::vector<uint32_t>(tokens.begin(), tokens.begin() + 40));
    ASSERT_TRUE(info.ok());
    const CheckpointOptions options{.scope = CheckpointScope::kNonRewindable, .tier = tier};
    auto early = t.host->CreateCheckpoint(t.tenant, Handle(*info), options, Soon());
    ASSERT_TRUE(early.ok()) << early.status();
    info = t.Append(*info, tokens);
    ASSERT_TRUE(info.ok());
    auto late = t.host->CreateCheckpoint(t.tenant, Handle(*info), options, Soon());
    ASSERT_TRUE(late.ok()) << late.status();
    // Cut to 55 and continued with other tokens: rows 55 to 59 of the full group are others now.
    auto cut = t.host->Rewind(t.tenant, Handle(*info), 55);
    ASSERT_TRUE(cut.ok()) << cut.status();
    const std::vector<uint32_t> other =
        Concat(std::vector<uint32_t>(tokens.begin(), tokens.begin() + 55), Tokens(900, 20));
    info = t.Append(cut->info, other);
    ASSERT_TRUE(info.ok());
    const absl::Status gone =
        t.host->RestoreCheckpoint(t.tenant, Handle(*info), late->id, Soon()).status();
    EXPECT_EQ(GetReason(gone), "CHECKPOINT_VOID") << gone;
    EXPECT_EQ(*t.WrongRows(info->id, other), 0u);
    const auto list = t.host->ListCheckpoints(t.tenant, info->id);
    ASSERT_EQ(list->size(), 2u);
    EXPECT_FALSE((*list)[0].is_void);
    EXPECT_TRUE((*list)[1].is_void);
    auto restored = t.host->RestoreCheckpoint(t.tenant, Handle(*info), early->id, Soon());
    ASSERT_TRUE(restored.ok()) << restored.status();
    EXPECT_EQ(*t.WrongRows(info->id, std::vector<uint32_t>(tokens.begin(), tokens.begin() + 40)),
              0u);
  }
}

TEST(CheckpointTiersTest, TheStoreKeepsWhatItNamesAndLetsGoOfItInTime) {
  FakeClock clock;
  MemoryPageStore store({.clock = &clock});
  HostUnderTest t({.write_through = false, .store = &store, .clock = &clock});
  const auto soon = [&] { return clock.MonotonicNow() + absl::Seconds(20); };
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto opened = t.host->Open(t.tenant, tokens, {}, {});
  ASSERT_TRUE(opened.ok());
  auto slot =
      t.host->BeginAppend(t.tenant, Handle(opened->info), "a", 0, tokens, {}, false, soon());
  ASSERT_TRUE(slot.ok()) << slot.status();
  ASSERT_TRUE(t.WriteAll(*slot, tokens).ok());
  auto done = t.host->Commit(t.tenant, Handle(opened->info), slot->pending_id, {});
  ASSERT_TRUE(done.ok());
  const SequenceInfo info = done->info;
  for (const absl::Duration ttl :
       {absl::ZeroDuration(), -absl::Seconds(1), kMaxCheckpointTtl + absl::Seconds(1)}) {
    const absl::Status bad =
        t.host->CreateCheckpoint(t.tenant, Handle(info), {.tier = Tier::kStore, .ttl = ttl}, soon())
            .status();
    EXPECT_TRUE(absl::IsInvalidArgument(bad)) << bad;
  }
  auto checkpoint = t.host->CreateCheckpoint(t.tenant, Handle(info),
                                             {.tier = Tier::kStore, .ttl = absl::Hours(1)}, soon());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status();
  EXPECT_EQ(*checkpoint->expires_at, clock.WallNow() + absl::Hours(1));
  EXPECT_EQ(store.GetStats(soon())->protected_pages, 3u);
  clock.Advance(absl::Hours(1) + absl::Seconds(1));
  const absl::Status late =
      t.host->RestoreCheckpoint(t.tenant, Handle(info), checkpoint->id, soon()).status();
  EXPECT_EQ(GetReason(late), "CHECKPOINT_EXPIRED") << late;
  // The store lets go of it by itself.
  EXPECT_TRUE(testing::Eventually([&] { return store.GetStats(soon())->manifests == 0; }));
}

TEST(CheckpointTiersTest, AnEditOfSeveralThatIsRefusedVoidsNothing) {
  HostUnderTest t({.num_groups = 2, .num_frames = 32, .window_tokens = kWindow});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto a = t.OpenAndFill(tokens);
  auto b = t.OpenAndFill(Tokens(900, 20));
  ASSERT_TRUE(a.ok() && b.ok());
  auto point = t.host->CreateCheckpoint(t.tenant, Handle(*a),
                                        {.scope = CheckpointScope::kNonRewindable}, Soon());
  ASSERT_TRUE(point.ok()) << point.status();
  auto slot = t.host->BeginAppend(t.tenant, Handle(*b), "x", 20, Tokens(920, 4), {}, false, Soon());
  ASSERT_TRUE(slot.ok()) << slot.status();
  const SequenceEdit edits[] = {RewindEdit{a->number, 39}, RewindEdit{b->number, 15}};
  const SequenceHandle handles[] = {Handle(*a), Handle(*b)};
  EXPECT_EQ(GetReason(t.host->Edit(t.tenant, handles, edits).status()),
            error_reason::kPendingWrite);
  EXPECT_FALSE(t.host->ListCheckpoints(t.tenant, a->id)->front().is_void);
  ASSERT_TRUE(t.host->Abort(t.tenant, b->id, slot->pending_id).ok());
  ASSERT_TRUE(t.host->Edit(t.tenant, handles, edits).ok());
  EXPECT_TRUE(t.host->ListCheckpoints(t.tenant, a->id)->front().is_void);
}

TEST(CheckpointTiersTest, SharedPagesComeBackAsTheSharedPages) {
  // What the store has under the same name gets its bytes from the copy, not from the store.
  HostUnderTest t({.num_frames = 12});
  const std::vector<uint32_t> tokens = Tokens(0, 64);
  auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok());
  auto point = t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = Tier::kHost}, Soon());
  ASSERT_TRUE(point.ok()) << point.status();
  ASSERT_TRUE(t.host->Rewind(t.tenant, Handle(*info), 0).ok());
  ASSERT_TRUE(t.host->EvictPages(0, Soon()).ok());
  const uint64_t restored = t.host->Counters().pages_restored;
  auto back = t.host->RestoreCheckpoint(t.tenant, Handle(*info), point->id, Soon());
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(*t.WrongRows(info->id, tokens), 0u);
  EXPECT_EQ(back->shared_pages, 4u);
  EXPECT_EQ(t.host->Counters().pages_restored, restored);
}

TEST(CheckpointTiersTest, ASequenceLargerThanOneBatchFitsAPoolThatIsSmaller) {
  // The last page is full, or partly filled: then the store has it under no name that is found.
  for (const auto& [tier, length] :
       {std::pair(Tier::kHost, 96), std::pair(Tier::kHost, 90), std::pair(Tier::kStore, 96)}) {
    HostUnderTest t({.num_frames = 4});
    const std::vector<uint32_t> tokens = Tokens(0, length);
    auto info = t.OpenAndFill(std::vector<uint32_t>(tokens.begin(), tokens.begin() + 40));
    for (size_t end = 41; end <= tokens.size() && info.ok(); ++end) {
      info = t.Step(*info, std::vector<uint32_t>(tokens.begin(), tokens.begin() + end));
    }
    ASSERT_TRUE(info.ok()) << info.status();
    auto point = t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = tier}, Soon());
    ASSERT_TRUE(point.ok()) << point.status();
    EXPECT_EQ(point->num_pages, 6u);
    ASSERT_TRUE(t.host->Rewind(t.tenant, Handle(*info), 0).ok());
    ASSERT_TRUE(t.host->EvictPages(0, Soon()).ok());
    auto restored = t.host->RestoreCheckpoint(t.tenant, Handle(*info), point->id, Soon());
    ASSERT_TRUE(restored.ok()) << restored.status();
    EXPECT_EQ(restored->length, tokens.size());
    // Not more of it than the pool holds at once.
    EXPECT_EQ(WrongKRows(t, info->id, tokens, 0, 48), 0u);
    EXPECT_EQ(WrongKRows(t, info->id, tokens, 48, tokens.size()), 0u);
  }
}

TEST(CheckpointTiersTest, AVoidOneHoldsNothing) {
  for (const Tier tier : {Tier::kDevice, Tier::kHost, Tier::kStore}) {
    SCOPED_TRACE(TierName(tier));
    HostUnderTest t({.num_groups = 2, .num_frames = 32, .window_tokens = kWindow});
    const std::vector<uint32_t> tokens = Tokens(0, 100);
    auto info = t.OpenAndFill(std::vector<uint32_t>(tokens.begin(), tokens.begin() + 40));
    ASSERT_TRUE(info.ok()) << info.status();
    const CheckpointOptions options{.scope = CheckpointScope::kNonRewindable, .tier = tier};
    auto point = t.host->CreateCheckpoint(t.tenant, Handle(*info), options, Soon());
    ASSERT_TRUE(point.ok()) << point.status();
    // Behind the window the sequence lets go of the first pages; the checkpoint has them still.
    info = t.Append(*info, tokens);
    ASSERT_TRUE(info.ok()) << info.status();
    const SequenceEdit clear = ClearEdit{info->number};
    const SequenceHandle handle = Handle(*info);
    ASSERT_TRUE(t.host->Edit(t.tenant, {&handle, 1}, {&clear, 1}).ok());
    ASSERT_TRUE(t.host->ListCheckpoints(t.tenant, info->id)->front().is_void);
    t.host->Quiesce();
    t.host->ClearCache(false);
    EXPECT_EQ(FreeFrames(t), 64u);
    EXPECT_EQ(t.host->Load().checkpoint_host_bytes, 0u);
    EXPECT_EQ(Manifests(t), 0u);
    EXPECT_EQ(GetReason(t.host->RestoreCheckpoint(t.tenant, handle, point->id, Soon()).status()),
              "CHECKPOINT_VOID");
    // And goes once.
    ASSERT_TRUE(t.host->DeleteCheckpoint(t.tenant, handle, point->id).ok());
    ASSERT_TRUE(t.host->Close(t.tenant, info->id, info->epoch).ok());
    t.host->Quiesce();
    EXPECT_EQ(FreeFrames(t), 64u);
  }
}

}  // namespace
}  // namespace pagetide
