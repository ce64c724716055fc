// What the contract of core/page_store.h needs of an implementation, and what its tests share. Each
// test gets a fresh, empty store from a harness.
#ifndef PAGETIDE_TESTS_CONTRACT_PAGE_STORE_HARNESS_H_
#define PAGETIDE_TESTS_CONTRACT_PAGE_STORE_HARNESS_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "base/clock.h"
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

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_CONTRACT_PAGE_STORE_HARNESS_H_
