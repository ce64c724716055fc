// The embedded store with compressed page records: restarts, records of before, damage, reclaim.
#include <gtest/gtest.h>
#include <rocksdb/db.h>

#include <cmath>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "base/byte_size.h"
#include "kvstore/page_record.h"
#include "kvstore/rocksdb_page_store.h"
#include "kvstore/store_database.h"
#include "tests/contract/test_page.h"
#include "tests/kvstore/store_test_util.h"

namespace pagetide {
namespace {

const MonotonicTime kForEver = MonotonicTime::InfiniteFuture();

// A page of f32 rows: the plane of signs and exponents packs, the others do not.
TestPage MakeRowsPage(uint64_t seed, size_t bytes = 64 * kKiB) {
  TestPage page = MakeTestPage(seed, bytes);
  std::mt19937_64 rng(seed);
  std::normal_distribution<float> normal;
  for (size_t at = 0; at + 4 <= bytes; at += 4) {
    const float x = normal(rng);
    std::memcpy(page.body.data() + at, &x, 4);
  }
  page.meta.checksum = ChecksumOf(page.body);
  return page;
}

class CompressedStoreTest : public ::testing::Test {
 protected:
  void Open(PageCompression compression) {
    store_.reset();
    RocksdbPageStoreOptions options;
    options.dir = dir_.path();
    options.segment_bytes = kMiB;
    options.clock = &clock_;
    options.compression = compression;
    auto store = RocksdbPageStore::Open(options);
    ASSERT_TRUE(store.ok()) << store.status();
    store_ = *std::move(store);
  }
  void Put(const TestPage& page, Durability level = Durability::kLocal) {
    const PutPage put = page.put();
    const PutPageResult result = store_->PutPages({&put, 1}, level, kForEver)[0];
    ASSERT_TRUE(result.status.ok()) << result.status;
    EXPECT_EQ(result.checksum, page.meta.checksum);
  }
  GetOutcome Get(const TestPage& page) {
    std::vector<std::byte> body(page.body.size());
    const GetPage get{page.meta.key, body, page.meta.checksum};
    const GetPageResult result = store_->GetPages({&get, 1}, kForEver)[0];
    EXPECT_TRUE(result.status.ok()) << result.status;
    EXPECT_TRUE(result.outcome != GetOutcome::kHit || body == page.body) << "wrong bytes";
    return result.outcome;
  }
  StoreStats Stats() { return *store_->GetStats(kForEver); }
  // 0: the folder has none.
  uint32_t SchemaOnDisk() {
    store_.reset();
    rocksdb::DB* raw = nullptr;
    std::vector<rocksdb::ColumnFamilyHandle*> handles;
    EXPECT_TRUE(rocksdb::DB::OpenForReadOnly({}, dir_.path() + "/index",
                                             {{"default", rocksdb::ColumnFamilyOptions()},
                                              {"meta", rocksdb::ColumnFamilyOptions()}},
                                             &handles, &raw)
                    .ok());
    const std::unique_ptr<rocksdb::DB> db(raw);
    std::string value;
    EXPECT_TRUE(db->Get(rocksdb::ReadOptions(), handles[1], "schema", &value).ok());
    for (auto* handle : handles) db->DestroyColumnFamilyHandle(handle).PermitUncheckedError();
    return value.empty() ? 0 : static_cast<uint8_t>(value[0]);
  }

  TempDir dir_;
  FakeClock clock_;
  std::unique_ptr<RocksdbPageStore> store_;
};

TEST_F(CompressedStoreTest, RecordsOfBeforeAndOfNowAreReadTogether) {
  std::vector<TestPage> pages;
  for (uint64_t i = 0; i < 24; ++i) pages.push_back(MakeRowsPage(i));
  Open(PageCompression::kNone);
  for (uint64_t i = 0; i < 8; ++i) Put(pages[i]);
  EXPECT_EQ(Stats().stored_bytes, Stats().logical_bytes);
  Open(PageCompression::kZstd);
  for (uint64_t i = 8; i < 16; ++i) Put(pages[i]);
  StoreStats stats = Stats();
  EXPECT_EQ(stats.logical_bytes, 16 * 64 * kKiB);
  EXPECT_LT(stats.stored_bytes, stats.logical_bytes * 15 / 16);
  EXPECT_EQ(stats.codec_bytes.raw.in + stats.codec_bytes.zstd.in + stats.codec_bytes.lz4.in,
            8 * 64 * kKiB);
  EXPECT_LT(stats.codec_bytes.zstd.out, stats.codec_bytes.zstd.in);
  // Not the new ones only: it goes on raw when it is told to.
  Open(PageCompression::kNone);
  for (uint64_t i = 16; i < 24; ++i) Put(pages[i]);
  for (PageCompression compression : {PageCompression::kNone, PageCompression::kLz4}) {
    Open(compression);
    EXPECT_EQ(store_->recovery().dropped_entries, 0u);
    for (const TestPage& page : pages) EXPECT_EQ(Get(page), GetOutcome::kHit);
    EXPECT_EQ(Stats().decompressed_bytes, 8 * 64 * kKiB);
    const auto scrubbed = store_->Scrub(0, kForEver);
    ASSERT_TRUE(scrubbed.ok());
    EXPECT_EQ(scrubbed->verified_pages, 24u);
    EXPECT_EQ(scrubbed->quarantined_pages, 0u);
  }
}

TEST_F(CompressedStoreTest, APageThatDoesNotPackIsStoredRaw) {
  Open(PageCompression::kZstd);
  const TestPage noise = MakeTestPage(1, 64 * kKiB), rows = MakeRowsPage(2);
  Put(noise);
  EXPECT_EQ(Stats().stored_bytes, noise.body.size());
  Put(rows);
  EXPECT_LT(Stats().stored_bytes, noise.body.size() + rows.body.size() * 15 / 16);
  EXPECT_EQ(Get(noise), GetOutcome::kHit);
  EXPECT_EQ(Stats().decompressed_bytes, 0u);
  EXPECT_EQ(Get(rows), GetOutcome::kHit);
  EXPECT_EQ(Stats().decompressed_bytes, rows.body.size());
}

TEST_F(CompressedStoreTest, WhatNoBarrierCoveredIsVerifiedWhenItIsOpened) {
  Open(PageCompression::kZstd);
  const TestPage sound = MakeRowsPage(1), damaged = MakeRowsPage(2);
  Put(sound, Durability::kProcess);
  Put(damaged, Durability::kProcess);
  store_.reset();
  const FoundRecord record = FindStoredRecord(dir_.path(), damaged.meta.key);
  FlipFileBit(record.file, (record.offset + PageRecordHeaderBytes(damaged.meta) + 40'000) * 8);
  Open(PageCompression::kZstd);
  EXPECT_EQ(store_->recovery().verified_records, 2u);
  EXPECT_EQ(store_->recovery().dropped_entries, 1u);
  EXPECT_EQ(Get(sound), GetOutcome::kHit);
  EXPECT_EQ(Get(damaged), GetOutcome::kMiss);
}

TEST_F(CompressedStoreTest, AFlippedBitOfACompressedRecordNeverGivesWrongBytes) {
  std::mt19937_64 rng(20261121);
  Open(PageCompression::kZstd);
  uint64_t num_found = 0;
  constexpr uint64_t kPages = 60;
  for (uint64_t i = 0; i < kPages; ++i) {
    const TestPage page = MakeRowsPage(i, 8 * kKiB);
    const uint64_t before = Stats().stored_bytes;
    Put(page);
    const uint64_t stored = Stats().stored_bytes - before;
    ASSERT_LT(stored, page.body.size());
    const uint64_t header = PageRecordHeaderBytes(page.meta);
    // The header of the first chunk, and then anywhere.
    const uint64_t bit = i < 20 ? header * 8 + rng() % (26 * 8) : rng() % ((header + stored) * 8);
    const FoundRecord record = FindStoredRecord(dir_.path(), page.meta.key);
    ASSERT_FALSE(record.file.empty());
    FlipFileBit(record.file, record.offset * 8 + bit);
    // A hit compares the bytes: zstd has bits that mean nothing.
    if (Get(page) == GetOutcome::kHit) continue;
    ++num_found;
    EXPECT_EQ(Get(page), GetOutcome::kQuarantined) << "bit " << bit;
    Put(page);
    EXPECT_EQ(Get(page), GetOutcome::kHit) << "put again, it is whole again";
  }
  EXPECT_GE(num_found, kPages - 2);
  EXPECT_EQ(Stats().pages_quarantined, num_found);
}

TEST_F(CompressedStoreTest, ReclaimMovesCompressedRecordsAsTheyAre) {
  Open(PageCompression::kZstd);
  std::vector<TestPage> pages;
  for (uint64_t i = 0; i < 96; ++i) {
    pages.push_back(MakeRowsPage(i));
    Put(pages.back(), Durability::kProcess);
  }
  std::vector<PageKey> gone;
  for (size_t i = 0; i < pages.size(); ++i) {
    if (i % 4 != 0) gone.push_back(pages[i].meta.key);
  }
  ASSERT_EQ(store_->DeletePages(gone, kForEver).value(), gone.size());
  const StoreStats before = Stats();
  ASSERT_GT(store_->Compact(kForEver).value(), 0u);
  const StoreStats after = Stats();
  EXPECT_LT(after.physical_bytes, before.physical_bytes * 2 / 3);
  EXPECT_EQ(after.stored_bytes, before.stored_bytes);
  EXPECT_EQ(after.codec_bytes.zstd.in, before.codec_bytes.zstd.in);
  Open(PageCompression::kZstd);
  for (size_t i = 0; i < pages.size(); i += 4) EXPECT_EQ(Get(pages[i]), GetOutcome::kHit);
}

TEST_F(CompressedStoreTest, TheFolderIsMarkedOnceItMayHoldCompressedRecords) {
  Open(PageCompression::kNone);
  EXPECT_EQ(SchemaOnDisk(), StoreDatabase::kSchemaVersion);
  Open(PageCompression::kLz4);
  EXPECT_EQ(SchemaOnDisk(), StoreDatabase::kCompressedSchemaVersion);
  Open(PageCompression::kNone);
  EXPECT_EQ(SchemaOnDisk(), StoreDatabase::kCompressedSchemaVersion);
}

}  // namespace
}  // namespace pagetide
