// A RocksDB page store over a disk that fails on demand, and what its tests do with it.
#ifndef PAGETIDE_TESTS_KVSTORE_ROCKSDB_STORE_FIXTURE_H_
#define PAGETIDE_TESTS_KVSTORE_ROCKSDB_STORE_FIXTURE_H_

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "base/byte_size.h"
#include "kvstore/rocksdb_page_store.h"
#include "tests/contract/test_page.h"
#include "tests/fault/faulty_disk.h"
#include "tests/kvstore/store_test_util.h"

namespace pagetide {

inline const MonotonicTime kForEver = MonotonicTime::InfiniteFuture();

class RocksdbPageStoreTest : public ::testing::Test {
 protected:
  RocksdbPageStoreOptions Options() {
    RocksdbPageStoreOptions options;
    options.dir = dir_.path();
    options.segment_bytes = kMiB;
    options.file_system = &disk_;
    options.index_env = disk_.env();
    options.clock = &clock_;
    return options;
  }
  void Open(RocksdbPageStoreOptions options) {
    store_.reset();
    auto store = RocksdbPageStore::Open(std::move(options));
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }
  void Open() { Open(Options()); }

  PutPageResult Put(const TestPage& page, Durability level = Durability::kLocal) {
    const PutPage put = page.put();
    return store_->PutPages({&put, 1}, level, kForEver)[0];
  }
  GetOutcome Get(const TestPage& page) {
    std::vector<std::byte> body(page.body.size());
    const GetPage get{page.meta.key, body, {}};
    const GetPageResult result = store_->GetPages({&get, 1}, kForEver)[0];
    EXPECT_TRUE(result.status.ok()) << result.status;
    EXPECT_TRUE(result.outcome != GetOutcome::kHit || body == page.body) << "wrong bytes";
    return result.outcome;
  }
  bool Holds(const TestPage& page) {
    return (*store_->LookupPages({&page.meta.key, 1}, kForEver))[0].present;
  }
  absl::StatusOr<PutManifestResult> Save(const std::string& name,
                                         const std::vector<TestPage>& pages, uint64_t version = 0) {
    ManifestRecord manifest;
    manifest.name = name;
    for (const TestPage& page : pages) manifest.pages.push_back(page.ref());
    return store_->PutManifest(manifest, version, std::nullopt, kForEver);
  }
  StoreStats Stats() { return *store_->GetStats(kForEver); }

  TempDir dir_;
  FaultyDisk disk_;
  FakeClock clock_;
  std::unique_ptr<RocksdbPageStore> store_;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_KVSTORE_ROCKSDB_STORE_FIXTURE_H_
