// Part of the contract of core/page_store.h (page_store_contract.h): pages: put, get, look up,
// delete, scrub, watch, counts.
#ifndef PAGETIDE_TESTS_CONTRACT_PAGE_STORE_PAGES_CONTRACT_H_
#define PAGETIDE_TESTS_CONTRACT_PAGE_STORE_PAGES_CONTRACT_H_

#include <atomic>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "tests/contract/page_store_harness.h"

namespace pagetide {

TEST_P(PageStoreContract, GivesBackWhatWasPut) {
  for (const Durability level : {Durability::kCache, Durability::kProcess, Durability::kLocal}) {
    for (const size_t bytes : {size_t{1}, size_t{4096}, size_t{100001}, size_t{3} << 20}) {
      const TestPage page = MakeTestPage(bytes * 10 + static_cast<uint64_t>(level), bytes);
      const PutPageResult put = Put(page, level);
      ASSERT_TRUE(put.status.ok()) << put.status;
      EXPECT_FALSE(put.already_present);
      EXPECT_EQ(put.checksum, page.meta.checksum);
      EXPECT_EQ(OutcomeOf(page), GetOutcome::kHit);
    }
  }
}

TEST_P(PageStoreContract, AnswersABatchInOrder) {
  std::vector<TestPage> pages;
  std::vector<PutPage> puts;
  for (uint64_t i = 0; i < 20; ++i) pages.push_back(MakeTestPage(i, 1000 + i * 77777));
  for (const TestPage& page : pages) puts.push_back(page.put());
  for (const PutPageResult& r : store().PutPages(puts, Durability::kLocal, kForEver)) {
    EXPECT_TRUE(r.status.ok()) << r.status;
  }
  std::vector<std::vector<std::byte>> bodies;
  std::vector<GetPage> gets;
  for (const TestPage& page : pages) bodies.emplace_back(page.body.size());
  const TestPage absent = MakeTestPage(999);
  std::vector<std::byte> absent_body(absent.body.size());
  for (size_t i = pages.size(); i-- > 0;) gets.push_back({pages[i].meta.key, bodies[i], {}});
  gets.insert(gets.begin() + 3, GetPage{absent.meta.key, absent_body, {}});
  const auto results = store().GetPages(gets, kForEver);
  ASSERT_EQ(results.size(), 21u);
  for (size_t i = 0; i < results.size(); ++i) {
    EXPECT_TRUE(results[i].status.ok()) << results[i].status;
    EXPECT_EQ(results[i].outcome, i == 3 ? GetOutcome::kMiss : GetOutcome::kHit) << i;
  }
  for (size_t i = 0; i < pages.size(); ++i) EXPECT_TRUE(bodies[i] == pages[i].body) << i;
}

TEST_P(PageStoreContract, AMissIsAValue) {
  const TestPage page = MakeTestPage(1);
  EXPECT_EQ(OutcomeOf(page), GetOutcome::kMiss);
  EXPECT_FALSE(Lookup(page.meta.key).present);
}

TEST_P(PageStoreContract, FirstBodyWins) {
  const TestPage first = MakeTestPage(1);
  TestPage second = MakeTestPage(2);
  second.meta.key = first.meta.key;
  ASSERT_TRUE(Put(first).status.ok());
  const PutPageResult again = Put(second);
  ASSERT_TRUE(again.status.ok()) << again.status;
  EXPECT_TRUE(again.already_present);
  EXPECT_EQ(again.checksum, first.meta.checksum);
  EXPECT_EQ(OutcomeOf(first), GetOutcome::kHit);
}

TEST_P(PageStoreContract, AnotherBodyThanExpectedIsAMiss) {
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  std::vector<std::byte> body(page.body.size());
  EXPECT_EQ(Get(page.meta.key, &body, Checksum128{1, 2}).outcome, GetOutcome::kMiss);
  EXPECT_EQ(Get(page.meta.key, &body, page.meta.checksum).outcome, GetOutcome::kHit);
}

TEST_P(PageStoreContract, RefusesABodyThatIsNotWhatTheHeaderSays) {
  TestPage page = MakeTestPage(1);
  page.meta.checksum.low ^= 1;
  EXPECT_EQ(Put(page).status.code(), absl::StatusCode::kInvalidArgument);
  page = MakeTestPage(1);
  page.meta.body_bytes += 1;
  EXPECT_EQ(Put(page).status.code(), absl::StatusCode::kInvalidArgument);
  page = MakeTestPage(1);
  page.meta.numerics_id.assign(257, 'x');
  EXPECT_EQ(Put(page).status.code(), absl::StatusCode::kInvalidArgument);
  page = MakeTestPage(1);
  page.meta.parent = page.meta.prefix;
  EXPECT_EQ(Put(page).status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(Lookup(page.meta.key).present) << "a refusal must change nothing";
}

TEST_P(PageStoreContract, ABadPageDoesNotSpoilItsBatch) {
  const TestPage good = MakeTestPage(1);
  TestPage bad = MakeTestPage(2);
  bad.meta.checksum.high ^= 4;
  const TestPage last = MakeTestPage(3);
  const std::vector<PutPage> puts = {good.put(), bad.put(), last.put()};
  const auto results = store().PutPages(puts, Durability::kLocal, kForEver);
  ASSERT_EQ(results.size(), 3u);
  EXPECT_TRUE(results[0].status.ok()) << results[0].status;
  EXPECT_EQ(results[1].status.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_TRUE(results[2].status.ok()) << results[2].status;
  EXPECT_EQ(OutcomeOf(last), GetOutcome::kHit);
}

TEST_P(PageStoreContract, RefusesABufferOfTheWrongSize) {
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  std::vector<std::byte> body(page.body.size() - 1);
  EXPECT_EQ(Get(page.meta.key, &body).status.code(), absl::StatusCode::kInvalidArgument);
}

TEST_P(PageStoreContract, AFlippedBitIsQuarantinedAndCanBePutAgain) {
  const TestPage page = MakeTestPage(1, 8192);
  ASSERT_TRUE(Put(page, Durability::kLocal).status.ok());
  harness_->FlipStoredBit(page.meta.key, 12345);
  EXPECT_EQ(OutcomeOf(page), GetOutcome::kQuarantined);
  const LookupResult lookup = Lookup(page.meta.key);
  EXPECT_FALSE(lookup.present);
  EXPECT_TRUE(lookup.quarantined);
  const auto stats = store().GetStats(kForEver);
  ASSERT_TRUE(stats.ok());
  EXPECT_EQ(stats->pages_quarantined, 1u);
  EXPECT_EQ(stats->pages, 0u);

  const PutPageResult again = Put(page, Durability::kLocal);
  ASSERT_TRUE(again.status.ok()) << again.status;
  EXPECT_FALSE(again.already_present) << "a quarantined page counts as absent";
  EXPECT_EQ(OutcomeOf(page), GetOutcome::kHit);
}

TEST_P(PageStoreContract, ScrubFindsDamageThatNobodyRead) {
  std::vector<TestPage> pages;
  for (uint64_t i = 0; i < 8; ++i) {
    pages.push_back(MakeTestPage(i));
    ASSERT_TRUE(Put(pages.back(), Durability::kLocal).status.ok());
  }
  harness_->FlipStoredBit(pages[5].meta.key, 77);
  const auto result = store().Scrub(0, kForEver);
  ASSERT_TRUE(result.ok()) << result.status();
  EXPECT_EQ(result->verified_pages, 8u);
  EXPECT_EQ(result->quarantined_pages, 1u);
  EXPECT_EQ(result->verified_bytes, 8u * 4096);
  EXPECT_TRUE(Lookup(pages[5].meta.key).quarantined);
}

TEST_P(PageStoreContract, DeletesWhatNoManifestProtects) {
  const TestPage a = MakeTestPage(1), b = MakeTestPage(2);
  ASSERT_TRUE(Put(a).status.ok());
  ASSERT_TRUE(Put(b).status.ok());
  const auto put = store().PutManifest(ManifestOf("s", {b}), 0, std::nullopt, kForEver);
  ASSERT_TRUE(put.ok() && put->committed) << put.status();
  const std::vector<PageKey> keys = {a.meta.key, b.meta.key, MakeTestPage(3).meta.key};
  const auto deleted = store().DeletePages(keys, kForEver);
  ASSERT_TRUE(deleted.ok()) << deleted.status();
  EXPECT_EQ(*deleted, 1u);
  EXPECT_EQ(OutcomeOf(a), GetOutcome::kMiss);
  EXPECT_EQ(OutcomeOf(b), GetOutcome::kHit);
  ASSERT_TRUE(store().DeleteManifest("s", 1, std::nullopt, kForEver).ok());
  EXPECT_EQ(store().DeletePages(keys, kForEver).value(), 1u);
  EXPECT_EQ(OutcomeOf(b), GetOutcome::kMiss);
}

TEST_P(PageStoreContract, CountsWhatItDoes) {
  const TestPage a = MakeTestPage(1, 1000), b = MakeTestPage(2, 500);
  ASSERT_TRUE(Put(a).status.ok());
  ASSERT_TRUE(Put(a).status.ok());
  ASSERT_TRUE(Put(b).status.ok());
  EXPECT_EQ(OutcomeOf(a), GetOutcome::kHit);
  EXPECT_EQ(OutcomeOf(a), GetOutcome::kHit);
  EXPECT_EQ(OutcomeOf(MakeTestPage(3)), GetOutcome::kMiss);
  ASSERT_TRUE(store().PutManifest(ManifestOf("m", {a}), 0, std::nullopt, kForEver).ok());
  const auto stats = store().GetStats(kForEver);
  ASSERT_TRUE(stats.ok()) << stats.status();
  EXPECT_EQ(stats->pages, 2u);
  EXPECT_EQ(stats->logical_bytes, 1500u);
  EXPECT_GE(stats->physical_bytes, 1500u);
  EXPECT_EQ(stats->pages_put, 2u);
  EXPECT_EQ(stats->bytes_put, 1500u);
  EXPECT_EQ(stats->pages_got, 2u);
  EXPECT_EQ(stats->bytes_got, 2000u);
  EXPECT_EQ(stats->pages_missed, 1u);
  EXPECT_EQ(stats->pages_ever_read, 1u);
  EXPECT_EQ(stats->manifests, 1u);
  EXPECT_EQ(stats->state, "serving");
  EXPECT_FALSE(stats->engine.empty());
}

TEST_P(PageStoreContract, AHitResetsTheEfficacyCount) {
  const TestPage a = MakeTestPage(1, 1000), b = MakeTestPage(2, 500);
  ASSERT_TRUE(Put(a).status.ok());
  ASSERT_TRUE(Put(b).status.ok());
  EXPECT_EQ(store().GetStats(kForEver)->bytes_put_since_hit, 1500u);
  EXPECT_EQ(store().GetStats(kForEver)->bytes_ever_read, 0u);
  EXPECT_EQ(OutcomeOf(a), GetOutcome::kHit);
  EXPECT_EQ(OutcomeOf(a), GetOutcome::kHit);
  EXPECT_EQ(store().GetStats(kForEver)->bytes_put_since_hit, 0u);
  EXPECT_EQ(store().GetStats(kForEver)->bytes_ever_read, 1000u);
  ASSERT_EQ(store().DeletePages({&a.meta.key, 1}, kForEver).value(), 1u);
  EXPECT_EQ(store().GetStats(kForEver)->bytes_ever_read, 0u);
}

TEST_P(PageStoreContract, WritersOfOneKeyAgree) {
  constexpr int kThreads = 8;
  std::vector<TestPage> bodies;
  for (int t = 0; t < kThreads; ++t) {
    bodies.push_back(MakeTestPage(static_cast<uint64_t>(t), 65536));
    bodies.back().meta.key = bodies.front().meta.key;
  }
  std::vector<PutPageResult> results(kThreads);
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] { results[t] = Put(bodies[t], Durability::kLocal); });
  }
  for (std::thread& thread : threads) thread.join();
  int won = 0;
  for (const PutPageResult& r : results) {
    EXPECT_TRUE(r.status.ok()) << r.status;
    EXPECT_EQ(r.checksum, results[0].checksum) << "all hear of the same body";
    won += r.already_present ? 0 : 1;
  }
  EXPECT_EQ(won, 1);
}

TEST_P(PageStoreContract, ConcurrentPutsGetsAndManifestsKeepEveryByte) {
  constexpr int kThreads = 4;
  constexpr uint64_t kPages = 40;
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (uint64_t i = 0; i < kPages; ++i) {
        // Half of the keys are shared between threads.
        const uint64_t seed = i % 2 == 0 ? i : i * 1000 + static_cast<uint64_t>(t);
        const TestPage page = MakeTestPage(seed, 2000 + seed % 5000);
        if (!Put(page).status.ok()) ++wrong;
        std::vector<std::byte> body(page.body.size());
        if (Get(page.meta.key, &body).outcome != GetOutcome::kHit || body != page.body) ++wrong;
        if (i % 10 == 0) {
          const auto put = store().PutManifest(ManifestOf(absl::StrCat("t", t, "/", i), {page}), 0,
                                               std::nullopt, kForEver);
          if (!put.ok() || !put->committed) ++wrong;
        }
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(wrong, 0);
  EXPECT_EQ(store().GetStats(kForEver)->pages, kPages / 2 + kThreads * kPages / 2);
}

TEST_P(PageStoreContract, APassedDeadlineIsSaidSo) {
  const TestPage page = MakeTestPage(1);
  const MonotonicTime past = MonotonicTime{absl::ZeroDuration()} - absl::Hours(1);
  const PutPage put = page.put();
  EXPECT_EQ(store().PutPages({&put, 1}, Durability::kProcess, past)[0].status.code(),
            absl::StatusCode::kDeadlineExceeded);
  std::vector<std::byte> body(page.body.size());
  const GetPage get{page.meta.key, body, {}};
  EXPECT_EQ(store().GetPages({&get, 1}, past)[0].status.code(),
            absl::StatusCode::kDeadlineExceeded);
}

// Residency goes by the first 16 bytes of a prefix key.
inline std::string HintOf(const PrefixKey& prefix) {
  return std::string(prefix.digest.view().substr(0, 16));
}

TEST_P(PageStoreContract, WatchGivesSnapshotThenTail) {
  const TestPage before = MakeTestPage(1), later = MakeTestPage(2);
  const TestPage hidden = MakeTestPage(3, 100, /*keyed=*/false);
  ASSERT_TRUE(Put(before).status.ok());
  ASSERT_TRUE(Put(hidden).status.ok());
  std::atomic<bool> snapshot_done{false};
  std::vector<StoreEvent> snapshot, tail;
  absl::Status ended;
  std::thread watcher([&] {
    ended = store().Watch(
        [&](bool is_snapshot, bool snapshot_end, std::span<const StoreEvent> events) {
          auto& to = is_snapshot ? snapshot : tail;
          to.insert(to.end(), events.begin(), events.end());
          if (snapshot_end) snapshot_done = true;
          return tail.size() < 2;
        },
        Clock::Real()->MonotonicNow() + absl::Seconds(20));
  });
  const MonotonicTime give_up = Clock::Real()->MonotonicNow() + absl::Seconds(10);
  while (!snapshot_done && Clock::Real()->MonotonicNow() < give_up) std::this_thread::yield();
  EXPECT_TRUE(Put(later).status.ok());
  EXPECT_TRUE(store().DeletePages({&before.meta.key, 1}, kForEver).ok());
  watcher.join();
  EXPECT_TRUE(ended.ok()) << ended;
  ASSERT_EQ(snapshot.size(), 1u);
  EXPECT_EQ(HintOf(snapshot[0].prefix), HintOf(*before.meta.prefix));
  EXPECT_EQ(snapshot[0].group, 1u);
  EXPECT_EQ(snapshot[0].body_bytes, before.meta.body_bytes);
  ASSERT_EQ(tail.size(), 2u);
  EXPECT_EQ(HintOf(tail[0].prefix), HintOf(*later.meta.prefix));
  EXPECT_FALSE(tail[0].removed);
  EXPECT_EQ(HintOf(tail[1].prefix), HintOf(*before.meta.prefix));
  EXPECT_TRUE(tail[1].removed);
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_CONTRACT_PAGE_STORE_PAGES_CONTRACT_H_
