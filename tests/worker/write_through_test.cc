// Pages that became full while the store took none: they reach it when it is back, so that a crash
// of the worker later loses none of them.
#include <gtest/gtest.h>

#include <vector>

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
                                                             .incarnation = 1});
  }
  HostUnderTest& t() { return *under_test_; }
  ModelHost& host() { return *under_test_->host; }
  // The store is back, and the host's back-off is over.
  void Heal() {
    faulty_.FailWith(absl::OkStatus());
    ASSERT_TRUE(Eventually([&] { return !host().Load().is_store_degraded; }));
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
    const auto found = shared_.LookupPages(keys, HostUnderTest::Soon()).value();
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

  MemoryPageStore shared_;
  HoldingStore slow_{&shared_};
  FaultInjectingPageStore faulty_{&slow_};
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
  host().Tick();  // while it is down nothing changes
  host().Quiesce();
  EXPECT_EQ(host().Load().owed_pages, 4u);

  Heal();
  for (uint64_t left : {3, 0}) {
    host().Tick();
    host().Quiesce();
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

TEST_F(LateWriteThrough, OnePageAsksWhetherTheStoreTakesAnyThenManyGoOldestFirst) {
  Start(128);
  const auto info = t().OpenAndFill(Tokens(0, 100 * kPageTokens));
  ASSERT_TRUE(info.ok()) << info.status();
  host().Quiesce();
  EXPECT_EQ(host().Load().owed_pages, 100u);
  // It pauses after each refusal; then one page is sent, not all of them again.
  for (int i = 0; i < 3; ++i) {
    ASSERT_TRUE(Eventually([&] { return !host().Load().is_store_degraded; }));
    const uint64_t failed = host().Counters().store_errors;
    host().Tick();
    host().Quiesce();
    EXPECT_EQ(host().Counters().store_errors, failed + 1);
  }
  Heal();
  for (size_t num_stored : {1, 33, 65, 97, 100}) {
    host().Tick();
    host().Quiesce();
    std::vector<bool> expected(100, false);
    std::fill_n(expected.begin(), num_stored, true);
    EXPECT_EQ(IsStored(info->id), expected);
    EXPECT_EQ(host().Load().owed_pages, 100 - num_stored);
  }
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
  for (int tick = 0; tick < 2; ++tick) {
    host().Tick();
    host().Quiesce();
  }
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
  const auto second = t().OpenAndFill(tokens);  // takes every frame
  EXPECT_TRUE(second.ok()) << second.status();
  slow_.LetGo();
  host().Quiesce();
  ASSERT_TRUE(second.ok());
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
  host().Tick();
  host().Quiesce();
  EXPECT_EQ(host().Load().owed_pages, 0u);
  EXPECT_EQ(IsStored(info->id), std::vector<bool>(2, false));
}

}  // namespace
}  // namespace pagetide
