// Pages that became full while the store took none: they reach it when it is back, so that a crash
// of the worker later loses none of them. Pages that it never takes hold up no others.
#include <gtest/gtest.h>

#include <atomic>
#include <cstddef>
#include <thread>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "kvstore/decorating_page_store.h"
#include "kvstore/fault_injecting_page_store.h"
#include "tests/support/timing.h"
#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;

// Puts that come while it is told to hold them wait until it lets go.
class HoldingStore final : public DecoratingPageStore {
 public:
  using DecoratingPageStore::DecoratingPageStore;
  std::vector<PutPageResult> PutPages(std::span<const PutPage> pages, Durability level,
                                      MonotonicTime deadline) override {
    {
      MutexLock lock(&mu_);
      while (is_holding_) changed_.WaitWithTimeout(&mu_, absl::Seconds(1));
    }
    return inner()->PutPages(pages, level, deadline);
  }
  void Hold() {
    MutexLock lock(&mu_);
    is_holding_ = true;
  }
  void LetGo() {
    MutexLock lock(&mu_);
    is_holding_ = false;
    changed_.SignalAll();
  }

 private:
  Mutex mu_;
  CondVar changed_;
  bool is_holding_ ABSL_GUARDED_BY(mu_) = false;
};

// Refuses some pages whenever they are put, and takes the others.
class PickyStore final : public DecoratingPageStore {
 public:
  using DecoratingPageStore::DecoratingPageStore;
  std::vector<PutPageResult> PutPages(std::span<const PutPage> pages, Durability level,
                                      MonotonicTime deadline) override {
    std::vector<PutPageResult> results = inner()->PutPages(TakenOf(pages), level, deadline);
    MutexLock lock(&mu_);
    for (size_t i = 0; i < pages.size(); ++i) {
      if (!refused_.contains(pages[i].meta.key)) continue;
      ++num_refused_;
      PutPageResult refusal;
      refusal.status = absl::InvalidArgumentError("put page: not this one");
      results.insert(results.begin() + static_cast<std::ptrdiff_t>(i), std::move(refusal));
    }
    return results;
  }
  void Refuse(const PageKey& key) {
    MutexLock lock(&mu_);
    refused_.insert(key);
  }
  uint64_t num_refused() const {
    MutexLock lock(&mu_);
    return num_refused_;
  }

 private:
  std::vector<PutPage> TakenOf(std::span<const PutPage> pages) const {
    MutexLock lock(&mu_);
    std::vector<PutPage> taken;
    for (const PutPage& page : pages) {
      if (!refused_.contains(page.meta.key)) taken.push_back(page);
    }
    return taken;
  }

  mutable Mutex mu_;
  absl::flat_hash_set<PageKey> refused_ ABSL_GUARDED_BY(mu_);
  uint64_t num_refused_ ABSL_GUARDED_BY(mu_) = 0;
};

class LateWriteThrough : public ::testing::Test {
 protected:
  static constexpr uint32_t kPageTokens = 16;

  // Frames hold `num_frames` pages; the store is down from the start.
  void Start(uint32_t num_frames, bool write_through = true) {
    faulty_.FailWith(absl::UnavailableError("the store is down"));
    under_test_ =
        std::make_unique<HostUnderTest>(HostUnderTest::Setup{.num_frames = num_frames,
                                                             .write_through = write_through,
                                                             .store = &faulty_,
                                                             .incarnation = 1,
                                                             .clock = &clock_});
  }
  HostUnderTest& t() { return *under_test_; }
  ModelHost& host() { return *under_test_->host; }
  // The store is back, and the host's pauses are over.
  void Heal() {
    faulty_.FailWith(absl::OkStatus());
    EndPauses();
  }
  void EndPauses() {
    clock_.Advance(absl::Seconds(1));  // 50 times store_backoff
    ASSERT_FALSE(host().Load().is_store_degraded);
  }
  void Tick() {
    host().Tick();
    host().Quiesce();
  }
  // Of each page of a sequence, in order: has the store got it?
  std::vector<bool> IsStored(SequenceId id) {
    std::vector<PageKey> keys;
    const auto table = host().GetBlockTable(t().tenant, id)->entries;
    for (const BlockTableEntry& entry : table) {
      if (entry.key) keys.push_back(*entry.key);
    }
    return AreStored(keys);
  }
  std::vector<bool> AreStored(const std::vector<PageKey>& keys) {
    std::vector<bool> stored;
    const auto found = shared_.LookupPages(keys, clock_.MonotonicNow() + absl::Seconds(20)).value();
    for (const LookupResult& page : found) stored.push_back(page.present);
    return stored;
  }
  std::vector<PageKey> KeysOf(const std::vector<uint32_t>& tokens) {
    std::vector<PageKey> keys;
    PrefixKey parent = RootPrefixKey(t().tenant.salt, t().model->identity(), kPageTokens);
    for (size_t at = 0; at + kPageTokens <= tokens.size(); at += kPageTokens) {
      parent = NextPrefixKey(parent, std::span(tokens).subspan(at, kPageTokens));
      keys.push_back(MakePageKey(parent, t().model->geometry().group(0).fingerprint()));
    }
    return keys;
  }

  FakeClock clock_;
  MemoryPageStore shared_{MemoryPageStore::Options{.clock = &clock_}};
  HoldingStore slow_{&shared_};
  PickyStore picky_{&slow_};
  FaultInjectingPageStore faulty_{&picky_};
  std::unique_ptr<HostUnderTest> under_test_;
};

TEST_F(LateWriteThrough, PagesFilledDuringAHiccupOfTheStoreReachItAfterwards) {
  Start(16);
  const std::vector<uint32_t> tokens = Tokens(0, 4 * kPageTokens);
  std::vector<uint32_t> so_far;
  SequenceInfo info = host().Open(t().tenant, tokens, {}, {})->info;
  for (uint32_t page = 0; page < 4;
       ++page) {  // the first put fails, the others fall into the pause
    so_far = Tokens(0, (page + 1) * kPageTokens);
    const auto appended = t().Append(info, so_far);
    ASSERT_TRUE(appended.ok()) << appended.status();
    info = *appended;
    host().Quiesce();
  }
  EXPECT_GT(host().Counters().store_errors, 0u);
  EXPECT_EQ(host().Load().owed_pages, 4u);
  EXPECT_EQ(IsStored(info.id), std::vector<bool>(4, false));
  Tick();  // while it is down nothing changes
  EXPECT_EQ(host().Load().owed_pages, 4u);

  Heal();
  for (uint64_t left : {3, 0}) {
    Tick();
    EXPECT_EQ(host().Load().owed_pages, left);
  }
  EXPECT_EQ(IsStored(info.id), std::vector<bool>(4, true));
  EXPECT_EQ(host().Counters().pages_written_through, 4u);
  EXPECT_EQ(host().Counters().pages_spilled, 0u);

  // The worker dies; another computes nothing again.
  HostUnderTest second({.store = &shared_, .incarnation = 2});
  const auto opened = second.host->Open(second.tenant, tokens, {}, {.allow_full_reuse = true});
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reuse.reused_tokens, 4 * kPageTokens);
  ASSERT_TRUE(second.WaitReady(opened->info.id).ok());
  EXPECT_EQ(second.WrongRows(opened->info.id, tokens).value(), 0u);
}

TEST_F(LateWriteThrough, OnePageAsksWhetherTheStoreTakesAnyThenManyGoInTurn) {
  Start(128);
  const auto info = t().OpenAndFill(Tokens(0, 100 * kPageTokens));
  ASSERT_TRUE(info.ok()) << info.status();
  host().Quiesce();
  EXPECT_EQ(host().Load().owed_pages, 100u);
  // It pauses after each refusal; then one page is sent, not all of them again.
  for (int i = 0; i < 3; ++i) {
    EndPauses();
    const uint64_t failed = host().Counters().store_errors;
    Tick();
    EXPECT_EQ(host().Counters().store_errors, failed + 1);
    EXPECT_TRUE(host().Load().is_store_degraded);
    Tick();
    EXPECT_EQ(host().Counters().store_errors, failed + 1);
  }
  Heal();
  // The first three have asked.
  size_t from = 3, num_stored = 0;
  for (const size_t count : {1, 32, 32, 32, 3}) {
    Tick();
    num_stored += count;
    std::vector<bool> expected(100, false);
    for (size_t i = from; i < from + num_stored; ++i) expected[i % 100] = true;
    EXPECT_EQ(IsStored(info->id), expected);
    EXPECT_EQ(host().Load().owed_pages, 100 - num_stored);
  }
}

TEST_F(LateWriteThrough, APageThatIsAlwaysRefusedHoldsUpNoOther) {
  Start(16);
  const std::vector<uint32_t> tokens = Tokens(0, 4 * kPageTokens);
  auto info = t().OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  host().Quiesce();
  picky_.Refuse(KeysOf(tokens).front());
  faulty_.FailWith(absl::OkStatus());
  for (int i = 0; i < 3; ++i) {  // it asks first, then another, then all
    EndPauses();
    Tick();
  }
  EXPECT_EQ(IsStored(info->id), (std::vector<bool>{false, true, true, true}));
  EXPECT_EQ(host().Load().owed_pages, 1u);

  // It is tried now and then, and what becomes full goes at once.
  std::vector<uint32_t> more = tokens;
  for (int i = 0; i < 3; ++i) {
    EndPauses();
    const uint64_t refused = picky_.num_refused();
    Tick();
    EXPECT_EQ(picky_.num_refused(), refused + 1);
    EXPECT_FALSE(host().Load().is_store_degraded);
    Tick();
    EXPECT_EQ(picky_.num_refused(), refused + 1);
    more = Concat(std::move(more), Tokens(1000 * (i + 1), kPageTokens));
    info = t().Append(*info, more);
    ASSERT_TRUE(info.ok()) << info.status();
    host().Quiesce();
    EXPECT_TRUE(IsStored(info->id).back());
  }
}

TEST_F(LateWriteThrough, APageThatIsAlwaysRefusedDoesNotStandInFrontOfOtherVictims) {
  Start(3, /*write_through=*/false);
  picky_.Refuse(KeysOf(Tokens(0, kPageTokens)).front());
  faulty_.FailWith(absl::OkStatus());
  // Both in use, so that they are put before their frames are given; the refused one is older.
  const auto refused = t().OpenAndFill(Tokens(0, kPageTokens));
  ASSERT_TRUE(refused.ok()) << refused.status();
  const auto taken = t().OpenAndFill(Tokens(1000, kPageTokens));
  ASSERT_TRUE(taken.ok()) << taken.status();
  std::atomic<bool> is_done = false;
  absl::StatusOr<SequenceInfo> filled = absl::UnknownError("not answered");
  std::thread call([&] {
    filled = t().OpenAndFill(Tokens(2000, 2 * kPageTokens));
    is_done = true;
  });
  // Each pause ends some time.
  EXPECT_TRUE(Eventually([&] {
    clock_.Advance(absl::Milliseconds(1));
    return is_done.load();
  }));
  if (!is_done) clock_.Advance(absl::Hours(24 * 36500));  // its deadline
  call.join();
  EXPECT_TRUE(filled.ok()) << filled.status();
  EXPECT_TRUE(IsStored(taken->id).front());
  EXPECT_FALSE(IsStored(refused->id).front());
}

TEST_F(LateWriteThrough, APageThatTheStoreHasGivesItsFrameBeforeOneThatItHasNot) {
  Start(4);
  const std::vector<uint32_t> tokens = Tokens(0, 2 * kPageTokens);
  const auto owed = t().OpenAndFill(tokens);
  ASSERT_TRUE(owed.ok()) << owed.status();
  ASSERT_TRUE(host().Close(t().tenant, owed->id, owed->epoch).ok());
  host().Quiesce();
  Heal();
  const auto stored = t().OpenAndFill(Tokens(1000, kPageTokens));
  ASSERT_TRUE(stored.ok()) << stored.status();
  ASSERT_TRUE(host().Close(t().tenant, stored->id, stored->epoch).ok());
  host().Quiesce();
  EXPECT_EQ(host().Load().owed_pages, 2u);
  // One frame is free, and the page used last is the one that the store has.
  const auto last = t().OpenAndFill(Tokens(2000, 2 * kPageTokens));
  ASSERT_TRUE(last.ok()) << last.status();
  host().Quiesce();
  EXPECT_EQ(host().Load().owed_pages, 2u);
  Tick();
  EXPECT_EQ(AreStored(KeysOf(tokens)), std::vector<bool>(2, true));
}

TEST_F(LateWriteThrough, ASlowPutHoldsUpNoFrame) {
  Start(4);
  const auto first = t().OpenAndFill(Tokens(0, 2 * kPageTokens));
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(host().Close(t().tenant, first->id, first->epoch).ok());
  host().Quiesce();
  EXPECT_EQ(host().Load().owed_pages, 2u);
  Heal();
  slow_.Hold();
  const std::vector<uint32_t> tokens = Tokens(1000, 4 * kPageTokens);
  std::atomic<bool> is_done = false;
  absl::StatusOr<SequenceInfo> second = absl::UnknownError("not answered");
  std::thread call([&] {
    second = t().OpenAndFill(tokens);  // takes every frame
    is_done = true;
  });
  EXPECT_TRUE(Eventually([&] { return is_done.load(); }));
  slow_.LetGo();
  call.join();
  host().Quiesce();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(t().WrongRows(second->id, tokens).value(), 0u);
  EXPECT_EQ(IsStored(second->id), std::vector<bool>(4, true));
}

TEST_F(LateWriteThrough, WhileTheStoreIsDownAPageThatNobodyReferencesGivesItsFrame) {
  Start(4);
  const auto first = t().OpenAndFill(Tokens(0, 2 * kPageTokens));
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(host().Close(t().tenant, first->id, first->epoch).ok());
  host().Quiesce();
  const std::vector<uint32_t> tokens = Tokens(1000, 4 * kPageTokens);
  const auto second = t().OpenAndFill(tokens);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(t().WrongRows(second->id, tokens).value(), 0u);
  host().Quiesce();
  EXPECT_EQ(host().Load().owed_pages, 4u) << "only those in frames are owed";
}

TEST_F(LateWriteThrough, WithoutWriteThroughNothingIsOwed) {
  Start(16, /*write_through=*/false);
  const auto info = t().OpenAndFill(Tokens(0, 2 * kPageTokens));
  ASSERT_TRUE(info.ok()) << info.status();
  Heal();
  Tick();
  EXPECT_EQ(host().Load().owed_pages, 0u);
  EXPECT_EQ(IsStored(info->id), std::vector<bool>(2, false));
}

}  // namespace
}  // namespace pagetide
