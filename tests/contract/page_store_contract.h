// The contract of core/page_store.h, as one suite over every implementation:
//
//   INSTANTIATE_TEST_SUITE_P(Memory, PageStoreContract, ::testing::Values(&MakeMemoryHarness));
//
// Each test gets a fresh, empty store from a harness. Headers of the suite define TEST_Ps: include
// it in exactly one file of a test program.
#ifndef PAGETIDE_TESTS_CONTRACT_PAGE_STORE_CONTRACT_H_
#define PAGETIDE_TESTS_CONTRACT_PAGE_STORE_CONTRACT_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "core/page_store.h"
#include "tests/contract/test_page.h"

namespace pagetide {

class PageStoreHarness {
 public:
  virtual ~PageStoreHarness() = default;
  virtual PageStore* store() = 0;
  // The clock that times the store's leases.
  virtual FakeClock* clock() = 0;
  // Returns when the upkeep that was due has run (expiry of manifests).
  virtual void RunUpkeep() = 0;
  // Damages one stored bit of the page's body, behind the store's back.
  virtual void FlipStoredBit(const PageKey& key, uint64_t bit) = 0;
};

class PageStoreContract : public ::testing::TestWithParam<std::unique_ptr<PageStoreHarness> (*)()> {
 protected:
  const MonotonicTime kForEver = MonotonicTime::InfiniteFuture();

  void SetUp() override {
    harness_ = GetParam()();
    ASSERT_NE(harness_, nullptr);
  }
  PageStore& store() { return *harness_->store(); }

  PutPageResult Put(const TestPage& page, Durability level = Durability::kProcess) {
    const PutPage put = page.put();
    return store().PutPages({&put, 1}, level, kForEver)[0];
  }
  GetPageResult Get(const PageKey& key, std::vector<std::byte>* body,
                    std::optional<Checksum128> expected = std::nullopt) {
    const GetPage get{key, *body, expected};
    return store().GetPages({&get, 1}, kForEver)[0];
  }
  GetOutcome OutcomeOf(const TestPage& page) {
    std::vector<std::byte> body(page.body.size());
    const GetPageResult result = Get(page.meta.key, &body);
    EXPECT_TRUE(result.status.ok()) << result.status;
    EXPECT_TRUE(result.outcome != GetOutcome::kHit || body == page.body) << "wrong bytes";
    return result.outcome;
  }
  LookupResult Lookup(const PageKey& key) {
    const auto results = store().LookupPages({&key, 1}, kForEver);
    EXPECT_TRUE(results.ok()) << results.status();
    return results.ok() ? (*results)[0] : LookupResult{};
  }
  ManifestRecord ManifestOf(const std::string& name, const std::vector<TestPage>& pages) {
    ManifestRecord manifest;
    manifest.name = name;
    for (const TestPage& page : pages) manifest.pages.push_back(page.ref());
    manifest.payload = std::string("tokens\0of the session", 21);
    manifest.saved_at = absl::FromUnixSeconds(1700000000);
    return manifest;
  }

  std::unique_ptr<PageStoreHarness> harness_;
};

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

TEST_P(PageStoreContract, ManifestIsReadBackWhole) {
  const TestPage a = MakeTestPage(1), b = MakeTestPage(2, 777, /*keyed=*/false);
  ASSERT_TRUE(Put(a).status.ok());
  ASSERT_TRUE(Put(b).status.ok());
  ManifestRecord manifest = ManifestOf("session.one", {a, b});
  manifest.request_id = "r1";
  const auto put = store().PutManifest(manifest, 0, std::nullopt, kForEver);
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_TRUE(put->committed);
  EXPECT_EQ(put->version, 1u);
  const auto got = store().GetManifest("session.one", kForEver);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->name, "session.one");
  EXPECT_EQ(got->version, 1u);
  EXPECT_EQ(got->payload, manifest.payload);
  EXPECT_EQ(got->request_id, "r1");
  EXPECT_EQ(got->saved_at, manifest.saved_at);
  ASSERT_EQ(got->pages.size(), 2u);
  EXPECT_EQ(got->pages[1].key, b.meta.key);
  EXPECT_EQ(got->pages[1].checksum, b.meta.checksum);
  EXPECT_EQ(store().GetManifest("session.two", kForEver).status().code(),
            absl::StatusCode::kNotFound);
}

TEST_P(PageStoreContract, ManifestListsWhatToPutAgain) {
  const TestPage a = MakeTestPage(1), b = MakeTestPage(2), c = MakeTestPage(3);
  ASSERT_TRUE(Put(a, Durability::kLocal).status.ok());
  ASSERT_TRUE(Put(c, Durability::kLocal).status.ok());
  harness_->FlipStoredBit(c.meta.key, 9);
  EXPECT_EQ(OutcomeOf(c), GetOutcome::kQuarantined);
  ManifestRecord manifest = ManifestOf("s", {a, b, c});
  auto put = store().PutManifest(manifest, 0, std::nullopt, kForEver);
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_FALSE(put->committed);
  EXPECT_THAT(put->missing, ::testing::ElementsAre(b.meta.key, c.meta.key));
  EXPECT_FALSE(store().GetManifest("s", kForEver).ok()) << "all or nothing";
  // Another body under the key is not what the manifest means.
  ASSERT_TRUE(Put(b).status.ok());
  ASSERT_TRUE(Put(c).status.ok());
  manifest.pages[0].checksum.low ^= 1;
  put = store().PutManifest(manifest, 0, std::nullopt, kForEver);
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_THAT(put->missing, ::testing::ElementsAre(a.meta.key));
  manifest.pages[0].checksum.low ^= 1;
  put = store().PutManifest(manifest, 0, std::nullopt, kForEver);
  ASSERT_TRUE(put.ok()) << put.status();
  EXPECT_TRUE(put->committed);
}

TEST_P(PageStoreContract, AListTellsOfManifestsWithoutTheirPayload) {
  const TestPage a = MakeTestPage(1), b = MakeTestPage(2);
  ASSERT_TRUE(Put(a).status.ok());
  ASSERT_TRUE(Put(b).status.ok());
  ManifestRecord manifest = ManifestOf("s", {a, b});
  manifest.summary = std::string("512 tokens\0of llama", 19);
  manifest.request_id = "r9";
  manifest.expires_at = harness_->clock()->WallNow() + absl::Hours(48);
  manifest.priority = 70;
  ASSERT_TRUE(store().PutManifest(manifest, 0, std::nullopt, kForEver).ok());
  ASSERT_TRUE(store().PutManifest(ManifestOf("t", {}), 0, std::nullopt, kForEver).ok());
  const auto list = store().ListManifests("", "", 10, kForEver);
  ASSERT_TRUE(list.ok()) << list.status();
  ASSERT_EQ(list->size(), 2u);
  const ManifestEntry& entry = (*list)[0];
  EXPECT_EQ(entry.name, "s");
  EXPECT_EQ(entry.version, 1u);
  EXPECT_EQ(entry.num_pages, 2u);
  EXPECT_EQ(entry.payload_bytes, manifest.payload.size());
  EXPECT_EQ(entry.summary, manifest.summary);
  EXPECT_EQ(entry.request_id, "r9");
  EXPECT_EQ(entry.saved_at, manifest.saved_at);
  EXPECT_EQ(entry.expires_at, manifest.expires_at);
  EXPECT_EQ(entry.priority, 70u);
  EXPECT_EQ((*list)[1].expires_at, std::nullopt);
  EXPECT_EQ((*list)[1].priority, kDefaultPriority);
  const auto got = store().GetManifest("s", kForEver);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->summary, manifest.summary);
  EXPECT_EQ(got->expires_at, manifest.expires_at);
  EXPECT_EQ(got->priority, 70u);
}

TEST_P(PageStoreContract, ASaveThatAppendsSendsWhatIsNew) {
  std::vector<TestPage> pages;
  for (uint64_t i = 0; i < 4; ++i) {
    pages.push_back(MakeTestPage(i));
    ASSERT_TRUE(Put(pages.back()).status.ok());
  }
  ManifestRecord first = ManifestOf("s", {pages[0], pages[1], pages[2]});
  first.payload = "tokens 1 2 3 and a tail";
  ASSERT_TRUE(store().PutManifest(first, 0, std::nullopt, kForEver).ok());
  ManifestRecord second = ManifestOf("s", {pages[3]});
  second.keep_pages = 2;
  second.payload = "4";
  second.keep_payload_bytes = 9;
  const auto put = store().PutManifest(second, 1, std::nullopt, kForEver);
  ASSERT_TRUE(put.ok() && put->committed) << put.status();
  const auto got = store().GetManifest("s", kForEver);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->payload, "tokens 1 4");
  ASSERT_EQ(got->pages.size(), 3u);
  EXPECT_EQ(got->pages[1].key, pages[1].meta.key);
  EXPECT_EQ(got->pages[2].key, pages[3].meta.key);
  EXPECT_EQ(got->keep_pages, 0u);
  // The page that is not named any more can go, the kept ones cannot.
  const std::vector<PageKey> keys = {pages[0].meta.key, pages[2].meta.key};
  EXPECT_EQ(store().DeletePages(keys, kForEver).value(), 1u);
  EXPECT_EQ(OutcomeOf(pages[0]), GetOutcome::kHit);
  second.keep_pages = 4;
  EXPECT_EQ(store().PutManifest(second, 2, std::nullopt, kForEver).status().code(),
            absl::StatusCode::kInvalidArgument)
      << "more than the present version has";
  second.keep_pages = 0;
  second.keep_payload_bytes = 11;
  EXPECT_EQ(store().PutManifest(second, 2, std::nullopt, kForEver).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_P(PageStoreContract, TwoManifestsShareAPage) {
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  // A page may also be named twice by one.
  ASSERT_TRUE(store().PutManifest(ManifestOf("a", {page, page}), 0, std::nullopt, kForEver).ok());
  ASSERT_TRUE(store().PutManifest(ManifestOf("b", {page}), 0, std::nullopt, kForEver).ok());
  EXPECT_EQ(store().GetStats(kForEver)->protected_pages, 1u);
  EXPECT_EQ(store().GetStats(kForEver)->protected_bytes, page.body.size());
  ASSERT_TRUE(store().DeleteManifest("a", 1, std::nullopt, kForEver).ok());
  EXPECT_EQ(store().DeletePages({&page.meta.key, 1}, kForEver).value(), 0u);
  ASSERT_TRUE(store().DeleteManifest("b", 1, std::nullopt, kForEver).ok());
  EXPECT_EQ(store().GetStats(kForEver)->protected_pages, 0u);
  EXPECT_EQ(store().DeletePages({&page.meta.key, 1}, kForEver).value(), 1u);
}

TEST_P(PageStoreContract, RefusesAManifestOutOfBounds) {
  ManifestRecord manifest = ManifestOf("s", {});
  manifest.priority = 101;
  EXPECT_EQ(store().PutManifest(manifest, 0, std::nullopt, kForEver).status().code(),
            absl::StatusCode::kInvalidArgument);
  manifest = ManifestOf("s", {});
  manifest.summary.assign(kMaxManifestSummaryBytes + 1, 's');
  EXPECT_EQ(store().PutManifest(manifest, 0, std::nullopt, kForEver).status().code(),
            absl::StatusCode::kInvalidArgument);
  manifest = ManifestOf("s", {});
  manifest.payload.assign(kMaxManifestBytes + 1, 'p');
  EXPECT_EQ(store().PutManifest(manifest, 0, std::nullopt, kForEver).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_FALSE(store().GetManifest("s", kForEver).ok());
  manifest.payload.resize(kMaxManifestBytes);
  EXPECT_TRUE(store().PutManifest(manifest, 0, std::nullopt, kForEver).ok());
  EXPECT_EQ(store().GetManifest("s", kForEver)->payload.size(), kMaxManifestBytes);
}

TEST_P(PageStoreContract, AnExpiredManifestGoesAndReleasesItsPages) {
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  FakeClock& clock = *harness_->clock();
  ManifestRecord manifest = ManifestOf("s", {page});
  manifest.saved_at = clock.WallNow();
  manifest.expires_at = clock.WallNow() + absl::Hours(2);
  ASSERT_TRUE(store().PutManifest(manifest, 0, std::nullopt, kForEver).ok());
  ASSERT_TRUE(store().PutManifest(ManifestOf("kept", {}), 0, std::nullopt, kForEver).ok());
  // A wall clock that is set ahead ends nothing early.
  clock.Advance(absl::Hours(1));
  clock.JumpWall(absl::Hours(24));
  harness_->RunUpkeep();
  EXPECT_TRUE(store().GetManifest("s", kForEver).ok());
  // One that is set back delays the end.
  clock.Advance(absl::Hours(1));
  clock.JumpWall(-absl::Hours(25));
  harness_->RunUpkeep();
  EXPECT_TRUE(store().GetManifest("s", kForEver).ok());
  EXPECT_EQ(store().DeletePages({&page.meta.key, 1}, kForEver).value(), 0u);
  clock.Advance(absl::Hours(1));
  harness_->RunUpkeep();
  EXPECT_EQ(store().GetManifest("s", kForEver).status().code(), absl::StatusCode::kNotFound);
  EXPECT_TRUE(store().GetManifest("kept", kForEver).ok());
  EXPECT_EQ(store().GetStats(kForEver)->manifests_expired, 1u);
  EXPECT_EQ(store().GetStats(kForEver)->manifests, 1u);
  EXPECT_EQ(store().DeletePages({&page.meta.key, 1}, kForEver).value(), 1u);
  // The name is free again.
  EXPECT_TRUE(store().PutManifest(ManifestOf("s", {}), 0, std::nullopt, kForEver).ok());
}

TEST_P(PageStoreContract, ASaveThatRenewsTheEndIsNotRemovedAtTheOldOne) {
  FakeClock& clock = *harness_->clock();
  ManifestRecord manifest = ManifestOf("s", {});
  manifest.saved_at = clock.WallNow();
  manifest.expires_at = clock.WallNow() + absl::Hours(1);
  ASSERT_TRUE(store().PutManifest(manifest, 0, std::nullopt, kForEver).ok());
  manifest.expires_at = clock.WallNow() + absl::Hours(5);
  ASSERT_TRUE(store().PutManifest(manifest, 1, std::nullopt, kForEver).ok());
  clock.Advance(absl::Hours(4));
  harness_->RunUpkeep();
  EXPECT_TRUE(store().GetManifest("s", kForEver).ok());
  manifest.expires_at.reset();
  ASSERT_TRUE(store().PutManifest(manifest, 2, std::nullopt, kForEver).ok());
  clock.Advance(absl::Hours(4));
  harness_->RunUpkeep();
  EXPECT_TRUE(store().GetManifest("s", kForEver).ok());
}

TEST_P(PageStoreContract, APinHoldsAPageUntilItsEnd) {
  const TestPage page = MakeTestPage(1), absent = MakeTestPage(2);
  ASSERT_TRUE(Put(page).status.ok());
  FakeClock& clock = *harness_->clock();
  Retention retention;
  retention.priority = 80;
  retention.pinned_until = clock.WallNow() + absl::Hours(1);
  const std::vector<PageKey> keys = {page.meta.key, absent.meta.key};
  const auto missing = store().SetRetention(keys, retention, kForEver);
  ASSERT_TRUE(missing.ok()) << missing.status();
  EXPECT_THAT(*missing, ::testing::ElementsAre(absent.meta.key));
  EXPECT_EQ(store().GetStats(kForEver)->protected_pages, 1u);
  EXPECT_EQ(store().DeletePages(keys, kForEver).value(), 0u);
  clock.JumpWall(absl::Hours(5));
  EXPECT_EQ(store().DeletePages(keys, kForEver).value(), 0u) << "a jump of the wall clock";
  clock.Advance(absl::Hours(1));
  EXPECT_EQ(store().DeletePages(keys, kForEver).value(), 1u);
}

TEST_P(PageStoreContract, RetentionReplacesWhatWasSet) {
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  Retention retention;
  retention.pinned_until = harness_->clock()->WallNow() + absl::Hours(1);
  ASSERT_TRUE(store().SetRetention({&page.meta.key, 1}, retention, kForEver).ok());
  ASSERT_TRUE(store().SetRetention({&page.meta.key, 1}, Retention(), kForEver).ok());
  EXPECT_EQ(store().DeletePages({&page.meta.key, 1}, kForEver).value(), 1u);
}

TEST_P(PageStoreContract, RefusesRetentionOutOfBounds) {
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  Retention retention;
  retention.priority = 101;
  EXPECT_EQ(store().SetRetention({&page.meta.key, 1}, retention, kForEver).status().code(),
            absl::StatusCode::kInvalidArgument);
  retention = Retention();
  retention.pinned_until = harness_->clock()->WallNow() + kMaxPinTime + absl::Seconds(1);
  EXPECT_EQ(store().SetRetention({&page.meta.key, 1}, retention, kForEver).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(store().DeletePages({&page.meta.key, 1}, kForEver).value(), 1u) << "nothing was pinned";
}

TEST_P(PageStoreContract, FindsThePageThatBeginsMostAlike) {
  const PrefixKey root{Sha256Of("root")}, other{Sha256Of("another root")};
  const TestPage low = MakeTokenPage(root, {1, 2, 3, 4}, 11);
  const TestPage mid = MakeTokenPage(root, {1, 2, 300, 4}, 12);
  const TestPage high = MakeTokenPage(root, {1, 70000, 3, 4}, 13);
  const TestPage elsewhere = MakeTokenPage(other, {1, 2, 300, 9}, 14);
  const TestPage shard = MakeTokenPage(root, {1, 2, 300, 5}, 15, "another component");
  for (const TestPage* page : {&low, &mid, &high, &elsewhere, &shard}) {
    ASSERT_TRUE(Put(*page).status.ok());
  }
  const auto find = [&](const PrefixKey& parent, std::vector<uint32_t> tokens) {
    const PartialQuery query{parent, Sha256Of("fingerprint"), tokens};
    const auto found = store().FindPartialPages({&query, 1}, kForEver);
    EXPECT_TRUE(found.ok() && found->size() == 1) << found.status();
    return found.ok() && !found->empty() ? (*found)[0] : PartialResult{};
  };
  PartialResult found = find(root, {1, 2, 300, 4});
  EXPECT_EQ(found.common_tokens, 4u);
  EXPECT_EQ(found.key, mid.meta.key);
  EXPECT_EQ(found.checksum, mid.meta.checksum);
  EXPECT_EQ(found.body_bytes, mid.body.size());
  EXPECT_EQ(found.tokens, mid.tokens);
  found = find(root, {1, 2, 299});
  EXPECT_EQ(found.common_tokens, 2u);
  found = find(root, {1, 2, 3, 9, 9});
  EXPECT_EQ(found.common_tokens, 3u);
  EXPECT_EQ(found.key, low.meta.key);
  // In the order of numbers, not of bytes in some machine's order.
  found = find(root, {1, 69999});
  EXPECT_EQ(found.common_tokens, 1u);
  found = find(root, {1, 70000});
  EXPECT_EQ(found.key, high.meta.key);
  EXPECT_EQ(found.common_tokens, 2u);
  EXPECT_EQ(find(root, {2}).common_tokens, 0u);
  EXPECT_EQ(find(root, {}).common_tokens, 0u);
  EXPECT_EQ(find(other, {1, 2, 300, 9}).key, elsewhere.meta.key);
  EXPECT_EQ(find(PrefixKey{Sha256Of("nobody")}, {1, 2}).common_tokens, 0u);
  // What is gone is not found, its neighbour is.
  ASSERT_EQ(store().DeletePages({&mid.meta.key, 1}, kForEver).value(), 1u);
  found = find(root, {1, 2, 300, 4});
  EXPECT_EQ(found.key, low.meta.key);
  EXPECT_EQ(found.common_tokens, 2u);
}

TEST_P(PageStoreContract, ADamagedPageIsNotFoundByItsTokens) {
  const PrefixKey root{Sha256Of("root")};
  const TestPage good = MakeTokenPage(root, {5, 5, 1, 1}, 1);
  const TestPage damaged = MakeTokenPage(root, {5, 5, 5, 5}, 2);
  ASSERT_TRUE(Put(good, Durability::kLocal).status.ok());
  ASSERT_TRUE(Put(damaged, Durability::kLocal).status.ok());
  harness_->FlipStoredBit(damaged.meta.key, 100);
  EXPECT_EQ(OutcomeOf(damaged), GetOutcome::kQuarantined);
  const std::vector<uint32_t> tokens = {5, 5, 5, 5};
  const PartialQuery query{root, damaged.meta.fingerprint, tokens};
  auto found = store().FindPartialPages({&query, 1}, kForEver);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ((*found)[0].key, good.meta.key);
  EXPECT_EQ((*found)[0].common_tokens, 2u);
  ASSERT_TRUE(Put(damaged).status.ok());
  found = store().FindPartialPages({&query, 1}, kForEver);
  EXPECT_EQ((*found)[0].common_tokens, 4u);
}

TEST_P(PageStoreContract, RefusesTokensThatAreNotThePages) {
  const PrefixKey root{Sha256Of("root")};
  TestPage page = MakeTokenPage(root, {1, 2, 3}, 1);
  page.tokens[1] = 9;
  EXPECT_EQ(Put(page).status.code(), absl::StatusCode::kInvalidArgument);
  page = MakeTestPage(2, 100, /*keyed=*/false);
  page.tokens = {1, 2, 3};
  EXPECT_EQ(Put(page).status.code(), absl::StatusCode::kInvalidArgument);
  page = MakeTokenPage(root, std::vector<uint32_t>(kMaxIndexedPageTokens + 1, 7), 3);
  EXPECT_EQ(Put(page).status.code(), absl::StatusCode::kInvalidArgument);
  page = MakeTokenPage(root, std::vector<uint32_t>(kMaxIndexedPageTokens, 7), 3);
  EXPECT_TRUE(Put(page).status.ok());
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

TEST_P(PageStoreContract, ManifestIsCompareAndSet) {
  ASSERT_TRUE(store().PutManifest(ManifestOf("s", {}), 0, std::nullopt, kForEver).ok());
  const auto again = store().PutManifest(ManifestOf("s", {}), 0, std::nullopt, kForEver);
  EXPECT_EQ(again.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(GetReason(again.status()), error_reason::kVersionMismatch);
  EXPECT_EQ(GetReasonMetadata(again.status(), "current_version"), "1");
  const auto next = store().PutManifest(ManifestOf("s", {}), 1, std::nullopt, kForEver);
  ASSERT_TRUE(next.ok()) << next.status();
  EXPECT_EQ(next->version, 2u);
  EXPECT_EQ(store().DeleteManifest("s", 1, std::nullopt, kForEver).code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(store().DeleteManifest("s", 2, std::nullopt, kForEver).ok());
  EXPECT_EQ(store().DeleteManifest("s", 2, std::nullopt, kForEver).code(),
            absl::StatusCode::kNotFound);
}

TEST_P(PageStoreContract, ARepeatedSaveSucceedsOnce) {
  ManifestRecord manifest = ManifestOf("s", {});
  manifest.request_id = "save-7";
  ASSERT_TRUE(store().PutManifest(manifest, 0, std::nullopt, kForEver).ok());
  const auto retried = store().PutManifest(manifest, 0, std::nullopt, kForEver);
  ASSERT_TRUE(retried.ok()) << retried.status();
  EXPECT_TRUE(retried->committed);
  EXPECT_EQ(retried->version, 1u);
  manifest.request_id = "save-8";
  EXPECT_FALSE(store().PutManifest(manifest, 0, std::nullopt, kForEver).ok());
}

TEST_P(PageStoreContract, AStaleEpochIsRefused) {
  const WriteFence fence{"sequence-1", 1};
  EXPECT_EQ(GetReason(store().PutManifest(ManifestOf("s", {}), 0, fence, kForEver).status()),
            error_reason::kStaleEpoch)
      << "nobody owns it yet";
  ASSERT_EQ(store().CompareAndSetRecord("owner", "sequence-1", 0, "w1", kForEver).value(), 1u);
  EXPECT_TRUE(store().PutManifest(ManifestOf("s", {}), 0, fence, kForEver).ok());
  ASSERT_EQ(store().CompareAndSetRecord("owner", "sequence-1", 1, "w2", kForEver).value(), 2u);
  const auto stale = store().PutManifest(ManifestOf("s", {}), 1, fence, kForEver);
  EXPECT_EQ(stale.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(GetReason(stale.status()), error_reason::kStaleEpoch);
  EXPECT_EQ(GetReason(store().DeleteManifest("s", 1, fence, kForEver)), error_reason::kStaleEpoch);
  EXPECT_TRUE(
      store().PutManifest(ManifestOf("s", {}), 1, WriteFence{"sequence-1", 2}, kForEver).ok());
}

TEST_P(PageStoreContract, ListsManifestsByPages) {
  for (const char* name : {"b/2", "a/1", "b/1", "b/3", "c"}) {
    ASSERT_TRUE(store().PutManifest(ManifestOf(name, {}), 0, std::nullopt, kForEver).ok());
  }
  const auto names = [&](absl::string_view prefix, absl::string_view after, size_t limit) {
    std::vector<std::string> out;
    const auto list = store().ListManifests(prefix, after, limit, kForEver);
    EXPECT_TRUE(list.ok()) << list.status();
    if (list.ok()) {
      for (const ManifestEntry& m : *list) out.push_back(m.name);
    }
    return out;
  };
  EXPECT_THAT(names("b/", "", 2), ::testing::ElementsAre("b/1", "b/2"));
  EXPECT_THAT(names("b/", "b/2", 2), ::testing::ElementsAre("b/3"));
  EXPECT_THAT(names("", "", 100), ::testing::ElementsAre("a/1", "b/1", "b/2", "b/3", "c"));
  EXPECT_THAT(names("d", "", 100), ::testing::IsEmpty());
}

TEST_P(PageStoreContract, RecordsAreCompareAndSet) {
  EXPECT_EQ(store().GetRecord("model", "m", kForEver).status().code(), absl::StatusCode::kNotFound);
  const std::string value("v\0one", 5);
  EXPECT_EQ(store().CompareAndSetRecord("model", "m", 0, value, kForEver).value(), 1u);
  EXPECT_EQ(GetReason(store().CompareAndSetRecord("model", "m", 0, "x", kForEver).status()),
            error_reason::kVersionMismatch);
  EXPECT_EQ(store().CompareAndSetRecord("model", "m", 1, "v2", kForEver).value(), 2u);
  EXPECT_EQ(store().CompareAndSetRecord("other", "m", 0, "o", kForEver).value(), 1u);
  const auto got = store().GetRecord("model", "m", kForEver);
  ASSERT_TRUE(got.ok()) << got.status();
  EXPECT_EQ(got->key, "m");
  EXPECT_EQ(got->version, 2u);
  EXPECT_EQ(got->value, "v2");
  EXPECT_TRUE(store().CompareAndSetRecord("model", "m", 2, std::nullopt, kForEver).ok());
  EXPECT_FALSE(store().GetRecord("model", "m", kForEver).ok());
  EXPECT_EQ(store().GetRecord("other", "m", kForEver)->value, "o");
}

TEST_P(PageStoreContract, ListsRecordsOfOneKind) {
  for (const char* key : {"x1", "x2", "x3", "y"}) {
    ASSERT_TRUE(store().CompareAndSetRecord("k", key, 0, key, kForEver).ok());
  }
  ASSERT_TRUE(store().CompareAndSetRecord("kk", "x9", 0, "no", kForEver).ok());
  auto list = store().ListRecords("k", "x", "", 2, kForEver);
  ASSERT_TRUE(list.ok()) << list.status();
  ASSERT_EQ(list->size(), 2u);
  EXPECT_EQ((*list)[1].key, "x2");
  EXPECT_EQ((*list)[1].value, "x2");
  list = store().ListRecords("k", "x", "x2", 10, kForEver);
  ASSERT_TRUE(list.ok()) << list.status();
  ASSERT_EQ(list->size(), 1u);
  EXPECT_EQ((*list)[0].key, "x3");
}

TEST_P(PageStoreContract, RefusesBadNames) {
  const std::string zero("a\0b", 3), large(513, 'n');
  for (const std::string& name : {std::string(), zero, large}) {
    EXPECT_EQ(store().PutManifest(ManifestOf(name, {}), 0, std::nullopt, kForEver).status().code(),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(store().CompareAndSetRecord("kind", name, 0, "", kForEver).status().code(),
              absl::StatusCode::kInvalidArgument);
    EXPECT_EQ(store().AcquireLease(name, 1, absl::Seconds(5), kForEver).status().code(),
              absl::StatusCode::kInvalidArgument);
  }
  EXPECT_EQ(store()
                .CompareAndSetRecord("k", "k", 0, std::string((1 << 20) + 1, 'v'), kForEver)
                .status()
                .code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_P(PageStoreContract, ALeaseHasOneHolder) {
  const auto first = store().AcquireLease("worker/a", 11, absl::Seconds(5), kForEver);
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_EQ(first->epoch, 1u);
  EXPECT_EQ(store().AcquireLease("worker/a", 22, absl::Seconds(5), kForEver).status().code(),
            absl::StatusCode::kAlreadyExists);
  // The same incarnation may ask again: the answer may have been lost.
  EXPECT_EQ(store().AcquireLease("worker/a", 11, absl::Seconds(5), kForEver)->epoch, 1u);
  harness_->clock()->Advance(absl::Seconds(4));
  EXPECT_TRUE(store().RenewLease(*first, absl::Seconds(5), kForEver).ok());
  harness_->clock()->Advance(absl::Seconds(4));
  EXPECT_TRUE(store().RenewLease(*first, absl::Seconds(5), kForEver).ok());
  harness_->clock()->Advance(absl::Seconds(5));
  EXPECT_EQ(GetReason(store().RenewLease(*first, absl::Seconds(5), kForEver)),
            error_reason::kStaleEpoch)
      << "an expired lease cannot be renewed";
  const auto second = store().AcquireLease("worker/a", 22, absl::Seconds(5), kForEver);
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(second->epoch, 2u);
  EXPECT_FALSE(store().RenewLease(*first, absl::Seconds(5), kForEver).ok());
  EXPECT_FALSE(store().ReleaseLease(*first, kForEver).ok());
  EXPECT_TRUE(store().ReleaseLease(*second, kForEver).ok());
  const auto third = store().AcquireLease("worker/a", 33, absl::Seconds(5), kForEver);
  ASSERT_TRUE(third.ok()) << third.status();
  EXPECT_EQ(third->epoch, 3u) << "epochs never repeat";
  EXPECT_EQ(store().AcquireLease("worker/b", 1, absl::Seconds(-1), kForEver).status().code(),
            absl::StatusCode::kInvalidArgument);
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

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_CONTRACT_PAGE_STORE_CONTRACT_H_
