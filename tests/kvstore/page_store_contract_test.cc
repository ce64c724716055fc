// The contract suite over the stores of this process.
#include "tests/contract/page_store_contract.h"

#include "kvstore/memory_page_store.h"
#include "kvstore/page_record.h"
#include "kvstore/rocksdb_page_store.h"
#include "tests/kvstore/store_test_util.h"

namespace pagetide {
namespace {

class MemoryHarness final : public PageStoreHarness {
 public:
  PageStore* store() override { return &store_; }
  FakeClock* clock() override { return &clock_; }
  void RunUpkeep() override {}
  void FlipStoredBit(const PageKey& key, uint64_t bit) override {
    ASSERT_TRUE(store_.FlipBit(key, bit));
  }

 private:
  FakeClock clock_;
  MemoryPageStore store_{{.clock = &clock_}};
};

class RocksdbHarness final : public PageStoreHarness {
 public:
  explicit RocksdbHarness(PageCompression compression) {
    auto store =
        RocksdbPageStore::Open({.dir = dir_.path(), .compression = compression, .clock = &clock_});
    EXPECT_TRUE(store.ok()) << store.status();
    if (store.ok()) store_ = *std::move(store);
  }
  PageStore* store() override { return store_.get(); }
  FakeClock* clock() override { return &clock_; }
  void RunUpkeep() override { store_->WaitForUpkeep(); }
  void FlipStoredBit(const PageKey& key, uint64_t bit) override {
    const FoundRecord record = FindStoredRecord(dir_.path(), key);
    ASSERT_FALSE(record.file.empty());
    FlipFileBit(record.file,
                (record.offset + PageRecordHeaderBytes(MakeTestPage(0).meta)) * 8 + bit);
  }

 private:
  TempDir dir_;
  FakeClock clock_;
  std::unique_ptr<RocksdbPageStore> store_;
};

std::unique_ptr<PageStoreHarness> MakeMemory() {
  return std::make_unique<MemoryHarness>();
}
std::unique_ptr<PageStoreHarness> MakeRocksdb() {
  return std::make_unique<RocksdbHarness>(PageCompression::kNone);
}
std::unique_ptr<PageStoreHarness> MakeCompressingRocksdb() {
  return std::make_unique<RocksdbHarness>(PageCompression::kZstd);
}

INSTANTIATE_TEST_SUITE_P(Memory, PageStoreContract, ::testing::Values(&MakeMemory));
INSTANTIATE_TEST_SUITE_P(Rocksdb, PageStoreContract, ::testing::Values(&MakeRocksdb));
INSTANTIATE_TEST_SUITE_P(CompressingRocksdb, PageStoreContract,
                         ::testing::Values(&MakeCompressingRocksdb));

}  // namespace
}  // namespace pagetide
