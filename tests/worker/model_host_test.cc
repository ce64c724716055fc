// ModelHost: reuse, copy-on-write, spill and restore, refusals.
#include "worker/model_host.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>

#include "kvstore/fault_injecting_page_store.h"
#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

TEST(ModelHostTest, The400Plus200Plus80Case) {
  HostUnderTest t({.page_tokens = 256, .num_frames = 64});
  const std::vector<uint32_t> shared = Concat(Tokens(1000, 400), Tokens(5000, 200));
  const uint32_t suffix_lengths[] = {80, 81, 82};
  const uint64_t computed[] = {680, 81, 82};
  const uint64_t reused[] = {0, 600, 600};
  const uint64_t new_pages[] = {4, 2, 2};
  for (int job = 0; job < 3; ++job) {
    const std::vector<uint32_t> prompt =
        Concat(shared, Tokens(100000 * (job + 1), suffix_lengths[job]));
    const uint64_t pages_before = t.host->Counters().pages_created;
    PrefixReuse reuse;
    auto info = t.OpenAndFill(prompt, &reuse);
    ASSERT_TRUE(info.ok()) << info.status();
    EXPECT_EQ(reuse.reused_tokens, reused[job]);
    EXPECT_EQ(prompt.size() - reuse.reused_tokens, computed[job]);
    std::vector<uint32_t> all = prompt;
    for (int i = 0; i < 300; ++i) {
      all.push_back(7000000 + job * 1000 + i);
      info = t.Step(*info, all);
      ASSERT_TRUE(info.ok()) << info.status();
    }
    EXPECT_EQ(t.host->Counters().pages_created - pages_before, new_pages[job]);
    auto wrong = t.WrongRows(info->id, all);
    ASSERT_TRUE(wrong.ok()) << wrong.status();
    EXPECT_EQ(*wrong, 0u);
    ASSERT_TRUE(t.host->Close(t.tenant, info->id, info->epoch).ok());
  }
}

TEST(ModelHostTest, LeavesOneTokenToComputeUnlessAllowed) {
  HostUnderTest t({});
  const std::vector<uint32_t> prompt = Tokens(0, 32);  // two full pages
  ASSERT_TRUE(t.OpenAndFill(prompt).ok());
  auto again = t.host->Open(t.tenant, prompt, {}, {});
  ASSERT_TRUE(again.ok());
  EXPECT_EQ(again->reuse.reused_tokens, 31u);
  EXPECT_EQ(again->reuse.shared_pages, 1u);
  EXPECT_EQ(again->reuse.partial_rows, 15u);
  auto whole = t.host->Open(t.tenant, prompt, {}, {.allow_full_reuse = true});
  ASSERT_TRUE(whole.ok());
  EXPECT_EQ(whole->reuse.reused_tokens, 32u);
  EXPECT_EQ(whole->reuse.limit, ReuseLimit::kWholePrompt);
}

TEST(ModelHostTest, OtherTenantsHitNothing) {
  HostUnderTest t({});
  const std::vector<uint32_t> prompt = Tokens(0, 40);
  auto info = t.OpenAndFill(prompt);
  ASSERT_TRUE(info.ok());
  const Tenant other{"other", DeriveTenantSalt("secret", "other")};
  auto opened = t.host->Open(other, prompt, {}, {});
  ASSERT_TRUE(opened.ok());
  EXPECT_EQ(opened->reuse.reused_tokens, 0u);
  EXPECT_TRUE(absl::IsNotFound(t.host->Get(other, info->id).status()));
  EXPECT_TRUE(t.host->Close(other, info->id, info->epoch).ok());
  EXPECT_TRUE(t.host->Get(t.tenant, info->id).ok()) << "another tenant closed it";
}

TEST(ModelHostTest, ForkCopiesTheTailAndNeitherSideSeesTheOther) {
  HostUnderTest t({});
  const std::vector<uint32_t> base = Tokens(0, 40);  // 2 full pages and 8 rows
  auto a = t.OpenAndFill(base);
  ASSERT_TRUE(a.ok());
  auto fork = t.host->Fork(t.tenant, {a->id, a->epoch, std::nullopt}, std::nullopt, t.Soon());
  ASSERT_TRUE(fork.ok()) << fork.status();
  EXPECT_EQ(fork->shared_pages, 2u);
  EXPECT_EQ(fork->copied_rows, 8u);
  const std::vector<uint32_t> left = Concat(base, Tokens(500, 20));
  const std::vector<uint32_t> right = Concat(base, Tokens(900, 20));
  a = t.Append(*a, left);
  auto b = t.Append(fork->info, right);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(t.WrongRows(a->id, left).value(), 0u);
  EXPECT_EQ(t.WrongRows(b->id, right).value(), 0u);
}

TEST(ModelHostTest, RewindIntoASharedPageCopiesItBeforeTheNextWrite) {
  HostUnderTest t({});
  const std::vector<uint32_t> base = Tokens(0, 48);
  auto a = t.OpenAndFill(base);
  ASSERT_TRUE(a.ok());
  auto b = t.host->Fork(t.tenant, {a->id, a->epoch, std::nullopt}, std::nullopt, t.Soon());
  ASSERT_TRUE(b.ok());
  auto cut = t.host->Rewind(t.tenant, {a->id, a->epoch, std::nullopt}, 20);
  ASSERT_TRUE(cut.ok());
  EXPECT_EQ(cut->removed_tokens, 28u);
  const std::vector<uint32_t> changed = Concat(Tokens(0, 20), Tokens(700, 30));
  auto grown = t.Append(cut->info, changed);
  ASSERT_TRUE(grown.ok()) << grown.status();
  EXPECT_EQ(t.WrongRows(a->id, changed).value(), 0u);
  EXPECT_EQ(t.WrongRows(b->info.id, base).value(), 0u);
  EXPECT_TRUE(absl::IsInvalidArgument(
      t.host->Rewind(t.tenant, {a->id, a->epoch, std::nullopt}, 51).status()));
  EXPECT_TRUE(absl::IsInvalidArgument(
      t.host->Rewind(t.tenant, {a->id, a->epoch, std::nullopt}, -1).status()));
}

TEST(ModelHostTest, TailsOfOpenSequencesGiveTheirRows) {
  HostUnderTest t({});
  auto a = t.OpenAndFill(Tokens(0, 10));  // a tail only
  ASSERT_TRUE(a.ok());
  const std::vector<uint32_t> prompt = Concat(Tokens(0, 7), Tokens(50, 5));
  PrefixReuse reuse;
  auto b = t.OpenAndFill(prompt, &reuse);
  ASSERT_TRUE(b.ok()) << b.status();
  EXPECT_EQ(reuse.partial_rows, 7u);
  EXPECT_EQ(t.WrongRows(b->id, prompt).value(), 0u);
}

TEST(ModelHostTest, RowsOfAnotherWorkersPageComeFromTheStore) {
  for (const int num_groups : {1, 2}) {
    MemoryPageStore shared;
    HostUnderTest first({.num_groups = num_groups, .store = &shared, .incarnation = 1});
    ASSERT_TRUE(first.OpenAndFill(Tokens(0, 50)).ok());  // three full pages and a tail
    first.host->Quiesce();
    HostUnderTest second({.num_groups = num_groups, .store = &shared, .incarnation = 2});
    // Leaves the first worker's third page after 9 of its 16 tokens.
    const std::vector<uint32_t> prompt = Concat(Tokens(0, 41), Tokens(900, 20));
    const auto looked = second.host->LookupPrefix(second.tenant, prompt, {}, {});
    ASSERT_TRUE(looked.ok()) << looked.status();
    EXPECT_EQ(looked->reused_tokens, 41u);
    PrefixReuse reuse;
    auto info = second.OpenAndFill(prompt, &reuse);
    ASSERT_TRUE(info.ok()) << info.status();
    EXPECT_EQ(reuse.shared_pages, 2u);
    EXPECT_EQ(reuse.partial_rows, 9u);
    EXPECT_EQ(reuse.store_tokens, 41u);
    EXPECT_EQ(reuse.limit, ReuseLimit::kDiverged);
    EXPECT_EQ(second.WrongRows(info->id, prompt).value(), 0u);
    // Its own page is as good now: the store is not needed for it.
    auto again = second.host->Open(second.tenant, prompt, {}, {.skip_store = true});
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(again->reuse.reused_tokens, 60u);
    // Another tenant finds nothing under the same tokens.
    const Tenant other{"other", DeriveTenantSalt("secret", "other")};
    EXPECT_EQ(second.host->LookupPrefix(other, prompt, {}, {})->reused_tokens, 0u);
  }
}

TEST(ModelHostTest, ADamagedPageOfAnotherWorkerGivesNoRows) {
  MemoryPageStore shared;
  HostUnderTest first({.store = &shared, .incarnation = 1});
  ASSERT_TRUE(first.OpenAndFill(Tokens(0, 16)).ok());
  first.host->Quiesce();
  const PrefixKey root = RootPrefixKey(first.tenant.salt, first.model->identity(),
                                       first.model->geometry().page_tokens());
  const Digest fingerprint = first.model->geometry().group(0).fingerprint();
  const PageKey key = MakePageKey(NextPrefixKey(root, Tokens(0, 16)), fingerprint);
  ASSERT_TRUE(shared.FlipBit(key, 77));
  HostUnderTest second({.store = &shared, .incarnation = 2});
  const std::vector<uint32_t> prompt = Concat(Tokens(0, 10), Tokens(900, 20));
  const auto opened = second.host->Open(second.tenant, prompt, {}, {});
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reuse.partial_rows, 10u) << "damage shows when the page is read";
  const auto ready = second.WaitReady(opened->info.id);
  ASSERT_TRUE(ready.ok()) << ready.status();
  const auto cut = second.host->Get(second.tenant, opened->info.id);
  ASSERT_TRUE(cut.ok()) << cut.status();
  EXPECT_EQ(cut->length, 0u);
  auto info = second.Append(*cut, prompt);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(second.WrongRows(info->id, prompt).value(), 0u);
  second.host->Quiesce();  // its page is written through
  // Now it is known to be damaged, and nobody offers it again.
  HostUnderTest third({.store = &shared, .incarnation = 3});
  EXPECT_EQ(third.host->LookupPrefix(third.tenant, prompt, {}, {})->reused_tokens, 16u)
      << "the second worker's own page";
}

TEST(ModelHostTest, AStoreThatCannotTellOfPartialPagesIsNoHindrance) {
  MemoryPageStore shared;
  HostUnderTest first({.store = &shared, .incarnation = 1});
  ASSERT_TRUE(first.OpenAndFill(Tokens(0, 16)).ok());
  first.host->Quiesce();
  FaultInjectingPageStore faulty(&shared);
  HostUnderTest second({.store = &faulty, .incarnation = 2});
  faulty.FailWith(absl::UnavailableError("down"));
  // Too short for a full page, so that the partial page is all that is asked for.
  const auto looked = second.host->LookupPrefix(second.tenant, Tokens(0, 12), {}, {});
  ASSERT_TRUE(looked.ok()) << looked.status();
  EXPECT_EQ(looked->reused_tokens, 0u);
  const uint64_t failed = faulty.num_failed();
  EXPECT_EQ(failed, 1u);
  // Not asked again at once: each question may cost the time of a lookup.
  ASSERT_TRUE(second.host->LookupPrefix(second.tenant, Tokens(0, 12), {}, {}).ok());
  EXPECT_EQ(faulty.num_failed(), failed);
}

TEST(ModelHostTest, MoreSequencesThanFramesComeBackWholeFromTheStore) {
  for (bool write_through : {true, false}) {
    HostUnderTest t({.num_frames = 8, .write_through = write_through});
    std::vector<std::pair<SequenceInfo, std::vector<uint32_t>>> open;
    for (uint32_t i = 0; i < 30; ++i) {
      const std::vector<uint32_t> tokens = Tokens(i * 1000, 20 + i % 50);
      auto info = t.OpenAndFill(tokens);
      ASSERT_TRUE(info.ok()) << info.status();
      open.emplace_back(*info, tokens);
    }
    for (const auto& [info, tokens] : open) {
      auto wrong = t.WrongRows(info.id, tokens);
      ASSERT_TRUE(wrong.ok()) << wrong.status();
      EXPECT_EQ(*wrong, 0u);
    }
    EXPECT_GT(t.host->Counters().pages_restored, 30u);
    for (const auto& [info, tokens] : open) {
      ASSERT_TRUE(t.host->Close(t.tenant, info.id, info.epoch).ok());
    }
    t.host->Quiesce();
    t.host->ClearCache(false);
    EXPECT_EQ(t.host->Usage()[0].free_frames, 8u) << "frames did not come back";
  }
}

TEST(ModelHostTest, AnotherHostContinuesFromTheStore) {
  MemoryPageStore store;
  const std::vector<uint32_t> tokens = Tokens(0, 100);
  {
    HostUnderTest first({.store = &store, .incarnation = 1});
    ASSERT_TRUE(first.OpenAndFill(tokens).ok());
    first.host->Quiesce();
  }
  HostUnderTest second({.store = &store, .incarnation = 2});
  auto opened = second.host->Open(second.tenant, tokens, {}, {});
  ASSERT_TRUE(opened.ok());
  EXPECT_EQ(opened->reuse.reused_tokens, 96u);
  EXPECT_EQ(opened->reuse.store_tokens, 96u);
  auto ready = second.WaitReady(opened->info.id);
  ASSERT_TRUE(ready.ok()) << ready.status();
  EXPECT_EQ(ready->resident_tokens, 96u);
  auto info = second.Append(opened->info, tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  EXPECT_EQ(second.WrongRows(info->id, tokens).value(), 0u);
  EXPECT_EQ(second.host->Counters().pages_restored, 6u);
}

TEST(ModelHostTest, SeveralLayerGroupsMoveTogether) {
  HostUnderTest t({.num_groups = 2, .num_frames = 6});
  const std::vector<uint32_t> x = Tokens(0, 40), y = Tokens(900, 70);
  auto a = t.OpenAndFill(x);
  auto b = t.OpenAndFill(y);
  ASSERT_TRUE(a.ok() && b.ok());
  EXPECT_EQ(t.WrongRows(a->id, x).value(), 0u);
  EXPECT_EQ(t.WrongRows(b->id, y).value(), 0u);
}

TEST(ModelHostTest, RefusalsChangeNothing) {
  HostUnderTest t({.num_frames = 4});
  const std::vector<uint32_t> tokens = Tokens(0, 20);
  auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok());
  const SequenceHandle good{info->id, info->epoch, std::nullopt};
  const SequenceHandle stale{info->id, info->epoch + 1, std::nullopt};
  EXPECT_EQ(GetReason(t.host->Rewind(t.tenant, stale, 0).status()), "STALE_EPOCH");
  const SequenceHandle old{info->id, info->epoch, info->revision + 1};
  EXPECT_EQ(GetReason(t.host->Rewind(t.tenant, old, 0).status()), "REVISION_MISMATCH");
  EXPECT_EQ(GetReason(t.host->Get(t.tenant, {7, 999}).status()), "SEQUENCE_NOT_FOUND");
  // Larger than the pool: the caller's error, with the numbers.
  const std::vector<uint32_t> huge = Tokens(0, 20 + 5 * 16);
  auto append = t.host->BeginAppend(t.tenant, good, "x", 20, std::span(huge).subspan(20), {}, false,
                                    t.Soon());
  EXPECT_EQ(GetReason(append.status()), "POOL_TOO_SMALL") << append.status();
  EXPECT_TRUE(absl::IsInvalidArgument(append.status()));
  auto wrong_length = t.host->BeginAppend(t.tenant, good, "x", 19, std::span(huge).subspan(0, 2),
                                          {}, false, t.Soon());
  EXPECT_EQ(GetReason(wrong_length.status()), "LENGTH_MISMATCH");

  auto slot = t.host->BeginAppend(t.tenant, good, "x", 20, std::span(huge).subspan(20, 2), {},
                                  false, t.Soon());
  ASSERT_TRUE(slot.ok());
  EXPECT_EQ(GetReason(t.host->Rewind(t.tenant, good, 0).status()), "PENDING_WRITE");
  const auto none = [](uint64_t, std::span<std::byte>) {};
  EXPECT_TRUE(absl::IsInvalidArgument(t.host->WriteRows(t.tenant, info->id, slot->pending_id,
                                                        {0, 0, RowKind::kK, 0, 3}, 96, none)));
  EXPECT_THAT(
      t.host->WriteRows(t.tenant, info->id, slot->pending_id, {0, 0, RowKind::kK, 0, 2}, 63, none)
          .message(),
      HasSubstr("63 bytes, expected 2 tokens x 32 = 64"));
  EXPECT_TRUE(absl::IsInvalidArgument(t.host->WriteRows(t.tenant, info->id, slot->pending_id,
                                                        {0, 9, RowKind::kK, 0, 2}, 64, none)));
  EXPECT_EQ(GetReason(t.host->Commit(t.tenant, good, slot->pending_id, {}).status()),
            "ROWS_MISSING");
  ASSERT_TRUE(t.host->Abort(t.tenant, info->id, slot->pending_id).ok());
  auto after = t.host->Get(t.tenant, info->id);
  ASSERT_TRUE(after.ok());
  EXPECT_EQ(after->length, 20u);
  EXPECT_EQ(after->revision, info->revision);
  EXPECT_EQ(t.WrongRows(info->id, tokens).value(), 0u);
}

TEST(ModelHostTest, AReservationThatIsNotCommittedExpires) {
  HostUnderTest t({});
  auto info = t.OpenAndFill(Tokens(0, 16));
  ASSERT_TRUE(info.ok());
  const ReserveItem item{{info->id, info->epoch, std::nullopt}, 1};
  auto slots = t.host->Reserve(t.tenant, {&item, 1}, absl::Milliseconds(1), false, t.Soon());
  ASSERT_TRUE(slots.ok());
  const MonotonicTime give_up = t.Soon();
  while (t.host->Get(t.tenant, info->id)->pending_tokens > 0) {
    ASSERT_LT(Clock::Real()->MonotonicNow(), give_up);
    t.host->Tick();
  }
  EXPECT_EQ(GetReason(t.host
                          ->Commit(t.tenant, {info->id, info->epoch, std::nullopt},
                                   slots->front().pending_id, Tokens(99, 1))
                          .status()),
            "WRITE_NOT_OPEN");
}

TEST(ModelHostTest, ReserveTakesAllItemsOrNone) {
  HostUnderTest t({});
  auto a = t.OpenAndFill(Tokens(0, 16));
  auto b = t.OpenAndFill(Tokens(500, 16));
  ASSERT_TRUE(a.ok() && b.ok());
  const ReserveItem items[] = {{{a->id, a->epoch, std::nullopt}, 1},
                               {{b->id, b->epoch + 5, std::nullopt}, 1}};
  EXPECT_EQ(GetReason(t.host->Reserve(t.tenant, items, absl::Seconds(5), false, t.Soon()).status()),
            "STALE_EPOCH");
  EXPECT_EQ(t.host->Get(t.tenant, a->id)->pending_tokens, 0u);
}

TEST(ModelHostTest, WhenFramesAreHeldTheRefusalStatesTheNumbers) {
  HostUnderTest t({.num_frames = 2});
  auto a = t.OpenAndFill(Tokens(0, 16));
  ASSERT_TRUE(a.ok());
  auto b = t.host->Open(t.tenant, Tokens(500, 32), {}, {});
  ASSERT_TRUE(b.ok());
  auto rows = t.host->PinRows(t.tenant, a->id, 0, 0, 0, t.Soon());
  ASSERT_TRUE(rows.ok());
  const std::vector<uint32_t> two_pages = Tokens(500, 32);
  const absl::Status status =
      t.host
          ->BeginAppend(t.tenant, {b->info.id, b->info.epoch, std::nullopt}, "b", 0, two_pages, {},
                        false, t.In(absl::Milliseconds(50)))
          .status();
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_EQ(GetReasonMetadata(status, "needed"), "2");
  EXPECT_TRUE(GetRetryDelay(status).has_value());
  EXPECT_EQ(t.host->Get(t.tenant, b->info.id)->pending_tokens, 0u);
}

TEST(ModelHostTest, ACallUnderAnAppendWaitsUntilTheAppendHasItsFrames) {
  HostUnderTest t({.num_frames = 2});
  auto a = t.OpenAndFill(Tokens(0, 16));
  ASSERT_TRUE(a.ok());
  auto b = t.host->Open(t.tenant, Tokens(500, 32), {}, {});
  ASSERT_TRUE(b.ok());
  auto rows = t.host->PinRows(t.tenant, a->id, 0, 0, 0, t.Soon());  // one of the two frames
  ASSERT_TRUE(rows.ok());
  const std::vector<uint32_t> two_pages = Tokens(500, 32);
  absl::StatusOr<PendingSlot> slot;
  std::thread append([&] {
    slot = t.host->BeginAppend(t.tenant, {b->info.id, b->info.epoch, std::nullopt}, "b", 0,
                               two_pages, {}, true, t.Soon());
  });
  while (t.host->Get(t.tenant, b->info.id)->pending_tokens == 0) std::this_thread::yield();
  // The append is in line now. A call under it must find it open, not refused.
  absl::StatusOr<uint64_t> found;
  std::thread find([&] { found = t.host->FindAppend(t.tenant, b->info.id, "b", t.Soon()); });
  rows->reset();  // the append gets its frames
  append.join();
  find.join();
  ASSERT_TRUE(slot.ok()) << slot.status();
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(*found, slot->pending_id);
  EXPECT_TRUE(t.WriteAll(*slot, two_pages).ok());
}

// What the call in line had got was lost for good when its sequence was closed meanwhile.
TEST(ModelHostTest, AnAppendWhoseSequenceIsClosedLeavesTheLineAndItsFramesComeBack) {
  HostUnderTest t({.num_frames = 2});
  auto a = t.OpenAndFill(Tokens(0, 16));
  ASSERT_TRUE(a.ok());
  auto b = t.host->Open(t.tenant, Tokens(500, 32), {}, {});
  ASSERT_TRUE(b.ok());
  for (const bool has_room : {false, true}) {
    auto rows = t.host->PinRows(t.tenant, a->id, 0, 0, 0, t.Soon());  // one of the two frames
    ASSERT_TRUE(rows.ok());
    const std::vector<uint32_t> two_pages = Tokens(500, 32);
    absl::StatusOr<PendingSlot> slot;
    std::thread append([&] {
      slot = t.host->BeginAppend(t.tenant, {b->info.id, b->info.epoch, std::nullopt}, "b", 0,
                                 two_pages, {}, false, t.Soon());
    });
    while (t.host->Get(t.tenant, b->info.id)->pending_tokens == 0) std::this_thread::yield();
    EXPECT_TRUE(t.host->Close(t.tenant, b->info.id, b->info.epoch).ok());
    // It wakes with its frames there, or without.
    if (has_room) rows->reset();
    append.join();
    EXPECT_EQ(GetReason(slot.status()), "SEQUENCE_NOT_FOUND") << slot.status();
    if (!has_room) rows->reset();
    b = t.host->Open(t.tenant, Tokens(500, 32), {}, {});
    ASSERT_TRUE(b.ok());
  }
  EXPECT_TRUE(t.host->Close(t.tenant, a->id, a->epoch).ok());
  t.host->Quiesce();
  t.host->ClearCache(/*zero_data=*/false);
  EXPECT_EQ(t.host->Usage()[0].free_frames, 2u) << "frames did not come back";
}

// A sequence that needs all four frames is watched while a reader holds one of them.
class WatchedInLine : public ::testing::Test {
 protected:
  void SetUp() override {
    auto watched = t_.OpenAndFill(tokens_);
    ASSERT_TRUE(watched.ok()) << watched.status();
    watched_ = watched->id;
    ASSERT_TRUE(t_.host->EvictPages(0, t_.Soon()).ok());
    auto other = t_.OpenAndFill(Tokens(500, 32));
    ASSERT_TRUE(other.ok()) << other.status();
    other_ = other->id;
    auto rows = t_.host->PinRows(t_.tenant, other_, 0, 0, 16, t_.Soon());
    ASSERT_TRUE(rows.ok()) << rows.status();
    rows_ = *std::move(rows);
  }
  // Watches until the watcher has been asked `max_asks` times.
  absl::Status Watch(int max_asks) {
    return t_.host->WatchReadiness(t_.tenant, watched_, t_.Soon(), [&](const Readiness& readiness) {
      last_ = readiness;
      return ++asks_ < max_asks;
    });
  }

  HostUnderTest t_{{.num_frames = 4}};
  const std::vector<uint32_t> tokens_ = Tokens(0, 64);
  SequenceId watched_, other_;
  std::shared_ptr<const ModelHost::PinnedRows> rows_;
  std::atomic<int> asks_ = 0;
  Readiness last_;
};

TEST_F(WatchedInLine, KeepsItsPlaceHoweverOftenItIsAsked) {
  absl::Status status;
  std::thread watch([&] { status = Watch(1 << 30); });
  while (asks_ < 10) std::this_thread::yield();
  rows_.reset();
  watch.join();
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_TRUE(last_.done);
  EXPECT_EQ(last_.resident_tokens, 64u);
  EXPECT_EQ(t_.host->Counters().acquire_waits, 1u) << "it stood in line more than once";
  EXPECT_EQ(t_.WrongRows(watched_, tokens_).value(), 0u);
}

TEST_F(WatchedInLine, AWatcherWhoLeavesGivesUpItsPlaceAndItsFrames) {
  const absl::Status status = Watch(10);
  EXPECT_TRUE(absl::IsCancelled(status)) << status;
  // The second page of the other sequence has room beside the first, which is still read.
  auto rows = t_.host->PinRows(t_.tenant, other_, 0, 16, 32, t_.Soon());
  ASSERT_TRUE(rows.ok()) << rows.status();
}

TEST_F(WatchedInLine, ASequenceClosedMeanwhileIsNotFound) {
  absl::Status status;
  std::thread watch([&] { status = Watch(1 << 30); });
  while (asks_ < 3) std::this_thread::yield();
  EXPECT_TRUE(t_.host->Close(t_.tenant, watched_, 1).ok());
  watch.join();
  EXPECT_EQ(GetReason(status), "SEQUENCE_NOT_FOUND") << status;
}

TEST(ModelHostTest, AFlippedByteInTheStoreIsAMissNeverWrongBytes) {
  HostUnderTest t({.num_frames = 4, .write_through = false});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok());
  // Flip a byte of the first page in its frame, as a failing memory would: the spill must notice.
  auto table = t.host->GetBlockTable(t.tenant, info->id);
  ASSERT_TRUE(table.ok());
  const uint64_t at = t.host->FrameOffset(0, *table->entries.front().frame);
  std::byte byte;
  ASSERT_TRUE(t.host->pool().Read(at + 3, {&byte, 1}).ok());
  byte ^= std::byte{1};
  ASSERT_TRUE(t.host->pool().Write(at + 3, {&byte, 1}).ok());
  ASSERT_TRUE(t.host->EvictPages(0, t.Soon()).ok());
  EXPECT_EQ(t.host->Counters().checksum_failures, 1u);
  auto wrong = t.WrongRows(info->id, tokens);
  EXPECT_EQ(GetReason(wrong.status()), "PREFIX_LOST") << wrong.status();
  EXPECT_EQ(t.host->Get(t.tenant, info->id)->length, 0u);
}

TEST(ModelHostTest, CreateRefusesABudgetBelowOnePage) {
  CpuDevice device;
  ManualExecutor io;
  ModelHost::Options options;
  options.pool_bytes = 10;
  const auto host = ModelHost::Create(options, TestModel(16), &device, nullptr, &io, Clock::Real());
  EXPECT_EQ(GetReason(host.status()), "POOL_TOO_SMALL");
  EXPECT_THAT(std::string(host.status().message()), HasSubstr("10 bytes"));
}

TEST(ModelHostTest, APromptOfMorePagesThanAreRememberedIsFoundAndLeavesWhatOthersAskedFor) {
  HostUnderTest writer({.num_frames = 64});
  const std::vector<uint32_t> tokens = Tokens(0, 40 * 16);
  const std::vector<uint32_t> others = Tokens(9000, 3 * 16);
  ASSERT_TRUE(writer.OpenAndFill(tokens).ok());
  const Tenant other{"other", DeriveTenantSalt("secret", "other")};
  writer.host->Quiesce();
  HostUnderTest t(
      {.num_frames = 64, .store = writer.store, .incarnation = 8, .max_known_stored_pages = 8});
  const auto open = [&](const Tenant& tenant, std::span<const uint32_t> prompt) {
    const auto opened = writer.host->Open(tenant, {}, {}, {});
    const auto slot =
        writer.host->BeginAppend(tenant, {opened->info.id, opened->info.epoch, std::nullopt}, "a",
                                 0, prompt, {}, false, writer.Soon());
    for (uint32_t layer = 0; layer < 2; ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        const uint64_t bytes = prompt.size() * writer.model->geometry().group(0).row_bytes(kind);
        ASSERT_TRUE(writer.host
                        ->WriteRows(tenant, slot->sequence, slot->pending_id,
                                    {0, layer, kind, 0, slot->num_tokens}, bytes,
                                    [](uint64_t, std::span<std::byte>) {})
                        .ok());
      }
    }
    ASSERT_TRUE(writer.host
                    ->Commit(tenant, {opened->info.id, opened->info.epoch, std::nullopt},
                             slot->pending_id, {})
                    .ok());
  };
  open(other, others);
  writer.host->Quiesce();
  const PromptOptions all{.allow_full_reuse = true};
  EXPECT_EQ(t.host->LookupPrefix(other, others, {}, all)->reused_tokens, 3 * 16u);
  EXPECT_EQ(t.host->LookupPrefix(t.tenant, tokens, {}, all)->reused_tokens, 40 * 16u);
  // Without the store's help: the other's pages, and of the long prompt the first ones.
  const PromptOptions known{.allow_full_reuse = true, .skip_store = true};
  EXPECT_EQ(t.host->LookupPrefix(other, others, {}, known)->reused_tokens, 3 * 16u);
  EXPECT_EQ(t.host->LookupPrefix(t.tenant, tokens, {}, known)->reused_tokens, 5 * 16u);
  const auto opened = t.host->Open(t.tenant, tokens, {}, all);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reuse.reused_tokens, 40 * 16u);
  EXPECT_EQ(*t.WrongRows(opened->info.id, tokens), 0u);
  t.host->Quiesce();
}

TEST(ModelHostTest, TheRateOfPrefillIsOfThoseWhoComputeWhileTheyAppend) {
  HostUnderTest t({});
  auto sent = t.OpenAndFill(Tokens(0, 64));  // computed before: how fast it comes says nothing
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(t.host->Load().prefill_tokens_per_second, 0);
  auto opened = t.host->Open(t.tenant, Tokens(1000, 64), {}, {});
  ASSERT_TRUE(opened.ok()) << opened.status();
  ASSERT_TRUE(t.Append(opened->info, Tokens(1000, 64), /*pin_prefix=*/true).ok());
  EXPECT_GT(t.host->Load().prefill_tokens_per_second, 0);
}

TEST(ModelHostTest, AWatchOfALostPageWaitsForTheOpenWriteToEnd) {
  HostUnderTest t({});
  const std::vector<uint32_t> tokens = Tokens(0, 50);
  const auto info = t.OpenAndFill(std::span(tokens).first(32));
  ASSERT_TRUE(info.ok()) << info.status();
  t.host->Quiesce();
  ASSERT_EQ(t.host->EvictPages(2, t.Soon())->evicted_pages, 2u);
  const SequenceHandle handle{info->id, info->epoch, std::nullopt};
  const auto slot = t.host->BeginAppend(t.tenant, handle, "a", 32, std::span(tokens).subspan(32),
                                        {}, false, t.Soon());
  ASSERT_TRUE(slot.ok()) << slot.status();
  std::vector<PageKey> keys;
  const auto table = t.host->GetBlockTable(t.tenant, info->id)->entries;
  for (const BlockTableEntry& entry : table) keys.push_back(*entry.key);
  ASSERT_EQ(*t.store->DeletePages(keys, t.Soon()), 2u);
  // Told again and again, but not without a wait in between: of these nine waits of 100 ms one may
  // be cut short, or two.
  const MonotonicTime began = Clock::Real()->MonotonicNow();
  int num_told = 0;
  const absl::Status left = t.host->WatchReadiness(
      t.tenant, info->id, t.Soon(), [&](const Readiness&) { return ++num_told < 10; });
  EXPECT_TRUE(absl::IsCancelled(left)) << left;
  EXPECT_GT(Clock::Real()->MonotonicNow() - began, absl::Milliseconds(300));
  // The end of the write is the end of the wait.
  const auto ready = [&] {
    Readiness last;
    const absl::Status status =
        t.host->WatchReadiness(t.tenant, info->id, t.Soon(), [&](const Readiness& readiness) {
          last = readiness;
          if (!readiness.done) t.host->Abort(t.tenant, info->id, slot->pending_id).IgnoreError();
          return true;
        });
    EXPECT_TRUE(status.ok()) << status;
    return last;
  }();
  EXPECT_TRUE(ready.done);
  EXPECT_EQ(ready.length, 0u);
  EXPECT_NE(ready.shortened_because, "");
}

}  // namespace
}  // namespace pagetide
