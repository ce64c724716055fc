// Part of the contract of core/page_store.h (page_store_contract.h): retention: manifests that
// expire, pages that are pinned.
#ifndef PAGETIDE_TESTS_CONTRACT_PAGE_STORE_RETENTION_CONTRACT_H_
#define PAGETIDE_TESTS_CONTRACT_PAGE_STORE_RETENTION_CONTRACT_H_

#include <vector>

#include "tests/contract/page_store_harness.h"

namespace pagetide {

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
  const auto missing = store().SetRetention(keys, retention, std::nullopt, kForEver);
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
  ASSERT_TRUE(store().SetRetention({&page.meta.key, 1}, retention, std::nullopt, kForEver).ok());
  ASSERT_TRUE(store().SetRetention({&page.meta.key, 1}, Retention(), std::nullopt, kForEver).ok());
  EXPECT_EQ(store().DeletePages({&page.meta.key, 1}, kForEver).value(), 1u);
}

TEST_P(PageStoreContract, RetentionOfAnEpochThatIsOverIsRefused) {
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  Retention retention;
  retention.pinned_until = harness_->clock()->WallNow() + absl::Hours(1);
  const WriteFence fence{"worker/w", 1};
  const auto set = [&](const WriteFence& with) {
    return store().SetRetention({&page.meta.key, 1}, retention, with, kForEver).status();
  };
  EXPECT_EQ(GetReason(set(fence)), error_reason::kStaleEpoch) << "nobody owns it yet";
  ASSERT_TRUE(store().CompareAndSetRecord("owner", "worker/w", 0, "a", kForEver).ok());
  EXPECT_TRUE(set(fence).ok());
  EXPECT_EQ(store().GetStats(kForEver)->protected_pages, 1u);
  ASSERT_TRUE(store().SetRetention({&page.meta.key, 1}, Retention(), std::nullopt, kForEver).ok());
  ASSERT_TRUE(store().CompareAndSetRecord("owner", "worker/w", 1, "b", kForEver).ok());
  EXPECT_EQ(GetReason(set(fence)), error_reason::kStaleEpoch);
  EXPECT_EQ(store().GetStats(kForEver)->protected_pages, 0u) << "the late writer set nothing";
  EXPECT_TRUE(set(WriteFence{"worker/w", 2}).ok());
}

TEST_P(PageStoreContract, RefusesRetentionOutOfBounds) {
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  Retention retention;
  retention.priority = 101;
  EXPECT_EQ(
      store().SetRetention({&page.meta.key, 1}, retention, std::nullopt, kForEver).status().code(),
      absl::StatusCode::kInvalidArgument);
  retention = Retention();
  retention.pinned_until = harness_->clock()->WallNow() + kMaxPinTime + absl::Seconds(1);
  EXPECT_EQ(
      store().SetRetention({&page.meta.key, 1}, retention, std::nullopt, kForEver).status().code(),
      absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(store().DeletePages({&page.meta.key, 1}, kForEver).value(), 1u) << "nothing was pinned";
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_CONTRACT_PAGE_STORE_RETENTION_CONTRACT_H_
