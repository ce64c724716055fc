// Part of the contract of core/page_store.h (page_store_contract.h): records and leases.
#ifndef PAGETIDE_TESTS_CONTRACT_PAGE_STORE_RECORDS_CONTRACT_H_
#define PAGETIDE_TESTS_CONTRACT_PAGE_STORE_RECORDS_CONTRACT_H_

#include <string>

#include "base/error_info.h"
#include "tests/contract/page_store_harness.h"

namespace pagetide {

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

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_CONTRACT_PAGE_STORE_RECORDS_CONTRACT_H_
