// Checkpoints beside what goes wrong: a sequence that changes while it is copied, a store that
// loses answers or pages or is away.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <set>
#include <utility>

#include "kvstore/decorating_page_store.h"
#include "tests/worker/checkpoint_fixture.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

// Calls `before_manifest` once, when pages are there and their manifest is not.
class InterruptedStore final : public DecoratingPageStore {
 public:
  using DecoratingPageStore::DecoratingPageStore;
  absl::StatusOr<PutManifestResult> PutManifest(const ManifestRecord& manifest,
                                                uint64_t expected_version,
                                                const std::optional<WriteFence>& fence,
                                                MonotonicTime deadline) override {
    if (before_manifest) std::exchange(before_manifest, nullptr)();
    // As a client does that got no answer to the first.
    if (repeats_puts && !manifest.request_id.empty()) {
      EXPECT_TRUE(inner()->PutManifest(manifest, expected_version, fence, deadline).ok());
      ++num_repeats;
    }
    auto result = DecoratingPageStore::PutManifest(manifest, expected_version, fence, deadline);
    if (loses_answer) return absl::UnavailableError("the answer was lost");
    return result;
  }
  std::function<void()> before_manifest;
  bool loses_answer = false;
  bool repeats_puts = false;
  int num_repeats = 0;
};

TEST(CheckpointFaultsTest, WhatIsCutOrClosedWhileItIsCopiedIsNoCheckpoint) {
  MemoryPageStore memory;
  InterruptedStore store(&memory);
  HostUnderTest t({.num_groups = 2, .store = &store, .window_tokens = kWindow});
  const std::vector<uint32_t> tokens = Tokens(0, 40);
  auto info = t.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  const auto create = [&](CheckpointScope scope) {
    return t.host->CreateCheckpoint(t.tenant, Handle(*info), {.scope = scope, .tier = Tier::kStore},
                                    Soon());
  };
  const auto cut_and_refill = [&] {
    // The same tokens again: only what was told meanwhile can know.
    auto cut = t.host->Rewind(t.tenant, Handle(*info), 39);
    ASSERT_TRUE(cut.ok()) << cut.status();
    EXPECT_TRUE(t.host->ListCheckpoints(t.tenant, info->id)->empty());
    ASSERT_TRUE(t.Append(cut->info, tokens).ok());
  };
  store.before_manifest = cut_and_refill;
  const absl::Status cut = create(CheckpointScope::kNonRewindable).status();
  EXPECT_TRUE(absl::IsAborted(cut)) << cut;
  EXPECT_THAT(std::string(cut.message()), HasSubstr("cut in front of row 40"));
  EXPECT_TRUE(t.host->ListCheckpoints(t.tenant, info->id)->empty());
  t.host->Quiesce();
  EXPECT_EQ(Manifests(t), 0u);
  // One of all groups stands by itself.
  store.before_manifest = cut_and_refill;
  ASSERT_TRUE(create(CheckpointScope::kAll).ok());
  EXPECT_EQ(Manifests(t), 1u);
  // An answer that was lost leaves nothing behind either.
  store.loses_answer = true;
  EXPECT_TRUE(absl::IsUnavailable(create(CheckpointScope::kAll).status()));
  store.loses_answer = false;
  t.host->Quiesce();
  EXPECT_EQ(Manifests(t), 1u);
  store.before_manifest = [&] { ASSERT_TRUE(t.host->Close(t.tenant, info->id, info->epoch).ok()); };
  EXPECT_EQ(GetReason(create(CheckpointScope::kAll).status()), "SEQUENCE_NOT_FOUND");
  t.host->Quiesce();
  EXPECT_EQ(Manifests(t), 0u);
}

TEST(CheckpointFaultsTest, OneOfASequenceThatWasClosedAndOpenedAgainMeanwhileIsRefused) {
  MemoryPageStore memory;
  InterruptedStore store(&memory);
  HostUnderTest t({.store = &store});
  auto info = t.OpenAndFill(Tokens(0, 40));
  ASSERT_TRUE(info.ok()) << info.status();
  store.before_manifest = [&] {
    const auto snapshot = t.host->Snapshot(t.tenant, Handle(*info), std::nullopt);
    ASSERT_TRUE(snapshot.ok()) << snapshot.status();
    const auto put = (*snapshot)->PutPages({}, Durability::kProcess, Soon());
    ASSERT_TRUE(put.ok()) << put.status();
    ASSERT_TRUE(t.host->Close(t.tenant, info->id, info->epoch).ok());
    const auto again = t.host->OpenSaved(t.tenant, (*snapshot)->state(), put->pages, std::nullopt,
                                         SequenceIdentity{info->id, info->epoch + 2});
    ASSERT_TRUE(again.ok()) << again.status();
  };
  const absl::Status refused =
      t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = Tier::kStore}, Soon()).status();
  EXPECT_EQ(GetReason(refused), "SEQUENCE_NOT_FOUND") << refused;
  EXPECT_TRUE(t.host->ListCheckpoints(t.tenant, info->id)->empty());
  t.host->Quiesce();
  EXPECT_EQ(Manifests(t), 0u);
}

TEST(CheckpointFaultsTest, APutWhoseAnswerWasLostIsRepeated) {
  MemoryPageStore memory;
  InterruptedStore store(&memory);
  HostUnderTest t({.store = &store});
  auto info = t.OpenAndFill(Tokens(0, 40));
  ASSERT_TRUE(info.ok()) << info.status();
  store.repeats_puts = true;
  auto point = t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = Tier::kStore}, Soon());
  ASSERT_TRUE(point.ok()) << point.status();
  EXPECT_EQ(store.num_repeats, 1);
  EXPECT_EQ(Manifests(t), 1u);
  ASSERT_TRUE(t.host->DeleteCheckpoint(t.tenant, Handle(*info), point->id).ok());
  t.host->Quiesce();
  EXPECT_EQ(Manifests(t), 0u);
}

TEST(CheckpointFaultsTest, ACopyThatFailsCostsNoOther) {
  MemoryPageStore memory;
  InterruptedStore store(&memory);
  HostUnderTest t({.num_groups = 2,
                   .num_frames = 64,
                   .store = &store,
                   .window_tokens = kWindow,
                   .checkpoint_every_pages = 1});
  auto info = t.OpenAndFill(Tokens(0, 20));
  ASSERT_TRUE(info.ok()) << info.status();
  while (t.host->ListCheckpoints(t.tenant, info->id)->size() < 32) {
    ASSERT_TRUE(t.host->CreateCheckpoint(t.tenant, Handle(*info), {}, Soon()).ok());
  }
  const auto create = [&] {
    return t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = Tier::kStore}, Soon());
  };
  store.loses_answer = true;
  EXPECT_TRUE(absl::IsUnavailable(create().status()));
  store.loses_answer = false;
  auto list = t.host->ListCheckpoints(t.tenant, info->id);
  ASSERT_EQ(list->size(), 32u);
  EXPECT_TRUE(list->front().is_automatic);
  // While one is copied another takes the last place: the automatic one can give way to one only.
  store.before_manifest = [&] {
    EXPECT_EQ(GetReason(t.host->CreateCheckpoint(t.tenant, Handle(*info), {}, Soon()).status()),
              "TOO_MANY_CHECKPOINTS");
    EXPECT_EQ(t.host->ListCheckpoints(t.tenant, info->id)->size(), 32u);
  };
  auto point = create();
  ASSERT_TRUE(point.ok()) << point.status();
  list = t.host->ListCheckpoints(t.tenant, info->id);
  ASSERT_EQ(list->size(), 32u);
  EXPECT_FALSE(list->front().is_automatic);
  EXPECT_EQ(list->back().id, point->id);
}

// Counts deletions of manifests, and refuses them while it is away.
class CountingStore final : public DecoratingPageStore {
 public:
  CountingStore(PageStore* inner, FakeClock* clock) : DecoratingPageStore(inner), clock_(clock) {}
  absl::Status DeleteManifest(absl::string_view name, uint64_t expected_version,
                              const std::optional<WriteFence>& fence,
                              MonotonicTime deadline) override {
    {
      MutexLock lock(&mu_);
      ++num_deletes_;
      deadlines_.insert(deadline.since_boot);
    }
    clock_->Advance(absl::Milliseconds(100));
    if (is_away) return absl::UnavailableError("the store is away");
    return inner()->DeleteManifest(name, expected_version, fence, deadline);
  }
  int num_deletes() const {
    MutexLock lock(&mu_);
    return num_deletes_;
  }
  size_t num_deadlines() const {
    MutexLock lock(&mu_);
    return deadlines_.size();
  }
  std::atomic<bool> is_away = false;

 private:
  FakeClock* const clock_;
  mutable Mutex mu_;
  int num_deletes_ ABSL_GUARDED_BY(mu_) = 0;
  std::set<absl::Duration> deadlines_ ABSL_GUARDED_BY(mu_);
};

// Each checkpoint of a closed sequence once had a job and a timeout of its own.
TEST(CheckpointFaultsTest, AStoreThatIsAwayIsAskedOnceForAllThatEnded) {
  FakeClock clock;
  MemoryPageStore memory({.clock = &clock});
  CountingStore store(&memory, &clock);
  HostUnderTest t({.store = &store, .io_threads = 4, .clock = &clock});
  auto info = t.OpenAndFill(Tokens(0, 20));
  ASSERT_TRUE(info.ok()) << info.status();
  for (int i = 0; i < 20; ++i) {
    const auto made =
        t.host->CreateCheckpoint(t.tenant, Handle(*info), {.tier = Tier::kStore}, Soon());
    ASSERT_TRUE(made.ok()) << made.status();
  }
  EXPECT_EQ(Manifests(t), 20u);
  store.is_away = true;
  ASSERT_TRUE(t.host->Close(t.tenant, info->id, info->epoch).ok());
  t.host->Quiesce();
  EXPECT_EQ(store.num_deletes(), 1);
  t.host->Tick();
  t.host->Quiesce();
  EXPECT_EQ(store.num_deletes(), 1) << "again only after a pause";
  store.is_away = false;
  clock.Advance(absl::Seconds(2));
  t.host->Tick();
  t.host->Quiesce();
  EXPECT_EQ(Manifests(t), 0u);
  EXPECT_EQ(store.num_deletes(), 21);
  EXPECT_EQ(store.num_deadlines(), 2u) << "one for each job, however long its deletions take";
}

// Gives some pages out as lost.
class LossyStore final : public DecoratingPageStore {
 public:
  using DecoratingPageStore::DecoratingPageStore;
  std::vector<GetPageResult> GetPages(std::span<const GetPage> pages,
                                      MonotonicTime deadline) override {
    if (!loses_pages) return DecoratingPageStore::GetPages(pages, deadline);
    return std::vector<GetPageResult>(pages.size());  // misses
  }
  std::atomic<bool> loses_pages = false;
};

// A page that is lost and partly filled once ended the process when a commit was to seal it.
TEST(CheckpointFaultsTest, ACommitOverALostPageLeavesNoAutomaticOne) {
  MemoryPageStore memory;
  LossyStore store(&memory);
  HostUnderTest t(
      {.num_groups = 2, .store = &store, .window_tokens = kWindow, .checkpoint_every_pages = 1});
  // Rows of two tails of others: the first page is partly filled and nobody writes behind it.
  auto a = t.OpenAndFill(Tokens(100, 10));
  auto b = t.OpenAndFill(Tokens(200, 4));
  auto c = t.host->Open(t.tenant, {}, {}, {});
  ASSERT_TRUE(a.ok() && b.ok() && c.ok());
  const SequenceHandle handles[] = {Handle(*a), Handle(*b), Handle(c->info)};
  const SequenceEdit edits[] = {ShiftPositionsEdit{b->number, {0, -1}, 10, OnShared::kCopy, false},
                                CopyRangeEdit{a->number, c->info.number, {0, -1}, false},
                                CopyRangeEdit{b->number, c->info.number, {10, -1}, false}};
  auto edited = t.host->Edit(t.tenant, handles, edits);
  ASSERT_TRUE(edited.ok()) << edited.status();
  const SequenceInfo info = edited->infos[2];
  ASSERT_EQ(info.length, 14u);
  ASSERT_TRUE(t.host->Close(t.tenant, a->id, a->epoch).ok());
  ASSERT_TRUE(t.host->Close(t.tenant, b->id, b->epoch).ok());
  const ReserveItem item{Handle(info), 4};
  auto slots = t.host->Reserve(t.tenant, {&item, 1}, absl::Seconds(30), false, Soon());
  ASSERT_TRUE(slots.ok()) << slots.status();
  ASSERT_TRUE(t.WriteAll(slots->front(), Tokens(300, 18)).ok());
  // The first page leaves its frame, and the store has lost it when somebody reads.
  ASSERT_TRUE(t.host->EvictPages(0, Soon()).ok());
  store.loses_pages = true;
  EXPECT_FALSE(t.host->PinRows(t.tenant, info.id, 1, 0, 10, Soon()).ok());
  auto done = t.host->Commit(t.tenant, Handle(info), slots->front().pending_id, Tokens(314, 4));
  ASSERT_TRUE(done.ok()) << done.status();
  EXPECT_EQ(done->info.length, 18u);
  EXPECT_TRUE(t.host->ListCheckpoints(t.tenant, info.id)->empty());
  // The next change tells what was lost.
  const absl::Status lost = t.host->CreateCheckpoint(t.tenant, Handle(info), {}, Soon()).status();
  EXPECT_EQ(GetReason(lost), "PREFIX_LOST") << lost;
}

}  // namespace
}  // namespace pagetide
