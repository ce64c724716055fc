// Part of the contract of core/page_store.h (page_store_contract.h): manifests: all or nothing,
// compare-and-set, lists.
#ifndef PAGETIDE_TESTS_CONTRACT_PAGE_STORE_MANIFESTS_CONTRACT_H_
#define PAGETIDE_TESTS_CONTRACT_PAGE_STORE_MANIFESTS_CONTRACT_H_

#include <string>
#include <vector>

#include "base/error_info.h"
#include "tests/contract/page_store_harness.h"

namespace pagetide {

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

TEST_P(PageStoreContract, AVersionOfADeletedManifestIsNotThatOfItsSuccessor) {
  const auto put = [&](const std::string& name, uint64_t expected) {
    ManifestRecord manifest = ManifestOf(name, {});
    manifest.request_id = absl::StrCat("r", expected);
    return store().PutManifest(manifest, expected, std::nullopt, kForEver);
  };
  for (uint64_t version = 0; version < 3; ++version) {
    ASSERT_EQ(put("s", version)->version, version + 1);
  }
  ASSERT_TRUE(store().DeleteManifest("s", 3, std::nullopt, kForEver).ok());
  // Made anew and written three times; who still holds version 3 does not hold this one's.
  ASSERT_EQ(put("s", 0)->version, 4u);
  EXPECT_EQ(put("s", 0)->version, 4u) << "a repeat is still known as one";
  EXPECT_EQ(GetReason(put("s", 1).status()), error_reason::kVersionMismatch);
  ASSERT_EQ(put("s", 4)->version, 5u);
  ASSERT_EQ(put("s", 5)->version, 6u);
  EXPECT_EQ(GetReason(put("s", 3).status()), error_reason::kVersionMismatch);
  EXPECT_EQ(GetReason(store().DeleteManifest("s", 3, std::nullopt, kForEver)),
            error_reason::kVersionMismatch);
  ASSERT_TRUE(store().DeleteManifest("s", 6, std::nullopt, kForEver).ok());
  EXPECT_EQ(put("s", 0)->version, 7u);
  EXPECT_EQ(put("another", 0)->version, 1u);
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

TEST_P(PageStoreContract, ASaveUnderTheRequestIdOfAnotherIsNotTakenForIt) {
  const TestPage a = MakeTestPage(1), b = MakeTestPage(2);
  ASSERT_TRUE(Put(a).status.ok());
  ASSERT_TRUE(Put(b).status.ok());
  ManifestRecord first = ManifestOf("s", {a});
  first.request_id = "save-7";
  first.summary = "one";
  ASSERT_TRUE(store().PutManifest(first, 0, std::nullopt, kForEver)->committed);
  // A repeat tells a later time, that is all.
  ManifestRecord repeat = first;
  repeat.saved_at += absl::Seconds(3);
  EXPECT_EQ(store().PutManifest(repeat, 0, std::nullopt, kForEver)->version, 1u);
  const auto is_refused = [&](const ManifestRecord& other, uint64_t expected_version) {
    return GetReason(
               store().PutManifest(other, expected_version, std::nullopt, kForEver).status()) ==
           error_reason::kVersionMismatch;
  };
  ManifestRecord other = first;
  other.pages = {b.ref()};
  EXPECT_TRUE(is_refused(other, 0)) << "another page";
  other.pages = {a.ref(), b.ref()};
  EXPECT_TRUE(is_refused(other, 0)) << "one page more";
  other = first;
  other.pages[0].checksum.high ^= 1;
  EXPECT_TRUE(is_refused(other, 0)) << "another body of the page";
  other = first;
  other.payload.back() ^= 1;
  EXPECT_TRUE(is_refused(other, 0)) << "another payload";
  other = first;
  other.summary = "two";
  EXPECT_TRUE(is_refused(other, 0)) << "another summary";
  other = first;
  other.priority = 51;
  EXPECT_TRUE(is_refused(other, 0)) << "another priority";
  EXPECT_EQ(store().GetManifest("s", kForEver)->summary, "one");
  // Nor is one that appends to what was there.
  ManifestRecord second = ManifestOf("s", {b});
  second.keep_pages = 1;
  second.keep_payload_bytes = first.payload.size();
  second.request_id = "save-8";
  ASSERT_EQ(store().PutManifest(second, 1, std::nullopt, kForEver)->version, 2u);
  EXPECT_EQ(store().PutManifest(second, 1, std::nullopt, kForEver)->version, 2u);
  other = second;
  other.keep_pages = 0;
  EXPECT_TRUE(is_refused(other, 1)) << "that keeps nothing";
  other = second;
  other.keep_payload_bytes = ~uint64_t{0};
  EXPECT_TRUE(is_refused(other, 1)) << "that keeps more than there is";
  other = second;
  other.pages = {a.ref()};
  EXPECT_TRUE(is_refused(other, 1));
  EXPECT_EQ(store().GetManifest("s", kForEver)->version, 2u);
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

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_CONTRACT_PAGE_STORE_MANIFESTS_CONTRACT_H_
