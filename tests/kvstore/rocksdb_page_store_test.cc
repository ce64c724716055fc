// What only the embedded store promises: restarts, failing disks, damage at rest.
#include "kvstore/rocksdb_page_store.h"

#include <rocksdb/db.h>

#include <filesystem>
#include <string>
#include <thread>
#include <vector>

#include "base/byte_size.h"
#include "base/error_info.h"
#include "kvstore/page_record.h"
#include "tests/kvstore/rocksdb_store_fixture.h"

namespace pagetide {
namespace {

TEST_F(RocksdbPageStoreTest, KeepsEverythingOverARestart) {
  Open();
  std::vector<TestPage> pages;
  for (uint64_t i = 0; i < 200; ++i) {
    pages.push_back(MakeTestPage(i, 30000 + i, i % 2 == 0));
    ASSERT_TRUE(Put(pages.back(), Durability::kProcess).status.ok());
  }
  ASSERT_TRUE(Save("s", {pages[3], pages[4]})->committed);
  ASSERT_TRUE(store_->CompareAndSetRecord("owner", "q", 0, "me", kForEver).ok());
  ASSERT_TRUE(store_->CompareAndSetRecord("owner", "q", 1, "you", kForEver).ok());
  Open();
  EXPECT_EQ(store_->recovery().pages, 200u);
  EXPECT_EQ(store_->recovery().dropped_entries, 0u);
  for (const TestPage& page : pages) EXPECT_EQ(Get(page), GetOutcome::kHit);
  EXPECT_EQ(store_->GetManifest("s", kForEver)->pages.size(), 2u);
  EXPECT_EQ(store_->GetRecord("owner", "q", kForEver)->version, 2u);
  EXPECT_EQ(Stats().manifests, 1u);
  EXPECT_EQ(*store_->DeletePages(std::vector<PageKey>{pages[3].meta.key}, kForEver), 0u)
      << "protection survives a restart";
}

TEST_F(RocksdbPageStoreTest, VerifiesOnlyWhatNoBarrierCovered) {
  Open();
  for (uint64_t i = 0; i < 50; ++i)
    ASSERT_TRUE(Put(MakeTestPage(i), Durability::kLocal).status.ok());
  for (uint64_t i = 50; i < 60; ++i) {
    ASSERT_TRUE(Put(MakeTestPage(i), Durability::kProcess).status.ok());
  }
  Open();
  EXPECT_EQ(store_->recovery().pages, 60u);
  EXPECT_EQ(store_->recovery().verified_records, 10u);
  Open();
  EXPECT_EQ(store_->recovery().verified_records, 0u) << "opening makes all of it durable";
}

TEST_F(RocksdbPageStoreTest, APeriodicBarrierBoundsWhatAnOpeningVerifies) {
  const RocksdbPageStoreOptions options = Options();
  Open(options);
  for (uint64_t i = 0; i < 20; ++i) {
    ASSERT_TRUE(Put(MakeTestPage(i), Durability::kCache).status.ok());
  }
  clock_.Advance(options.access_period);
  store_->WaitForUpkeep();
  for (uint64_t i = 20; i < 23; ++i) {
    ASSERT_TRUE(Put(MakeTestPage(i), Durability::kCache).status.ok());
  }
  Open(options);
  EXPECT_EQ(store_->recovery().pages, 23u);
  EXPECT_EQ(store_->recovery().verified_records, 3u);
}

TEST_F(RocksdbPageStoreTest, KnownLeasesGetAFullTimeToLiveAfterARestart) {
  Open();
  const auto lease = store_->AcquireLease("worker/a", 1, absl::Seconds(5), kForEver);
  ASSERT_TRUE(lease.ok()) << lease.status();
  clock_.Advance(absl::Seconds(4));
  Open();
  clock_.Advance(absl::Seconds(4));
  EXPECT_TRUE(store_->RenewLease(*lease, absl::Seconds(5), kForEver).ok());
  clock_.Advance(absl::Seconds(6));
  Open();  // long expired, but the holder may not know: a full time to live again
  EXPECT_FALSE(store_->AcquireLease("worker/a", 2, absl::Seconds(5), kForEver).ok());
  clock_.Advance(absl::Seconds(6));
  EXPECT_EQ(store_->AcquireLease("worker/a", 2, absl::Seconds(5), kForEver)->epoch, 2u);
}

// ---- damage at rest ----------------------------------------------------------------------------

TEST_F(RocksdbPageStoreTest, TwoSwappedValidRecordsAreTwoMisses) {
  Open();
  const TestPage a = MakeTestPage(1), b = MakeTestPage(2);
  ASSERT_TRUE(Put(a).status.ok());
  ASSERT_TRUE(Put(b).status.ok());
  const FoundRecord at_a = FindStoredRecord(dir_.path(), a.meta.key);
  const FoundRecord at_b = FindStoredRecord(dir_.path(), b.meta.key);
  ASSERT_EQ(at_a.file, at_b.file);
  const size_t bytes = PageRecordHeaderBytes(a.meta) + a.body.size();
  std::string record_a(bytes, '\0'), record_b(bytes, '\0');
  std::fstream f(at_a.file, std::ios::in | std::ios::out | std::ios::binary);
  f.seekg(static_cast<std::streamoff>(at_a.offset));
  f.read(record_a.data(), static_cast<std::streamsize>(bytes));
  f.seekg(static_cast<std::streamoff>(at_b.offset));
  f.read(record_b.data(), static_cast<std::streamsize>(bytes));
  f.seekp(static_cast<std::streamoff>(at_a.offset));
  f.write(record_b.data(), static_cast<std::streamsize>(bytes));
  f.seekp(static_cast<std::streamoff>(at_b.offset));
  f.write(record_a.data(), static_cast<std::streamsize>(bytes));
  f.close();
  EXPECT_EQ(Get(a), GetOutcome::kQuarantined);
  EXPECT_EQ(Get(b), GetOutcome::kQuarantined);
  EXPECT_EQ(Stats().pages_quarantined, 2u);
}

TEST_F(RocksdbPageStoreTest, AnyFlippedBitOfARecordIsFound) {
  Open();
  const TestPage page = MakeTestPage(1, 1000);
  const uint64_t bits = (PageRecordHeaderBytes(page.meta) + page.body.size()) * 8;
  for (uint64_t i = 0; i < 200; ++i) {
    ASSERT_TRUE(Put(page).status.ok());
    const FoundRecord record = FindStoredRecord(dir_.path(), page.meta.key);
    // Not the key itself: the helper finds the record by it. PageRecordTest flips every bit.
    uint64_t bit = i * 7919 % bits;
    if (bit / 8 >= 32 && bit / 8 < 64) bit += 64 * 8;
    FlipFileBit(record.file, record.offset * 8 + bit);
    EXPECT_EQ(Get(page), GetOutcome::kQuarantined) << "bit " << bit;
    ASSERT_EQ(*store_->DeletePages({&page.meta.key, 1}, kForEver), 1u);
    ASSERT_TRUE(store_->Compact(kForEver).ok());
  }
}

TEST_F(RocksdbPageStoreTest, ARecordOfAnUnknownVersionIsAMiss) {
  Open();
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  const FoundRecord record = FindStoredRecord(dir_.path(), page.meta.key);
  FlipFileBit(record.file, (record.offset + 4) * 8 + 1);  // version 1 → 3
  EXPECT_EQ(Get(page), GetOutcome::kQuarantined);
  EXPECT_EQ(Get(page), GetOutcome::kQuarantined);
}

TEST_F(RocksdbPageStoreTest, QuarantineSurvivesARestart) {
  Open();
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  FlipFileBit(FindStoredRecord(dir_.path(), page.meta.key).file, 8 * 1000);
  EXPECT_EQ(Get(page), GetOutcome::kQuarantined);
  Open();
  EXPECT_FALSE(Holds(page));
  ASSERT_TRUE(Put(page).status.ok());
  EXPECT_EQ(Get(page), GetOutcome::kHit);
  Open();
  EXPECT_EQ(Get(page), GetOutcome::kHit);
}

TEST_F(RocksdbPageStoreTest, AMissingSegmentFileIsMissesNotACrash) {
  Open();
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  ASSERT_TRUE(Save("s", {page})->committed);
  store_.reset();
  std::filesystem::remove_all(dir_.path() + "/segments");
  RocksdbPageStoreOptions options = Options();
  options.accepted_loss.segments = true;
  Open(options);
  EXPECT_EQ(Get(page), GetOutcome::kMiss);
  EXPECT_EQ(store_->recovery().lost_manifest_pages, 1u) << "and it is said aloud";
}

TEST_F(RocksdbPageStoreTest, ANewSegmentDoesNotInheritTheLengthOfADeletedOne) {
  Open();
  const TestPage gone = MakeTestPage(1), page = MakeTestPage(2);
  ASSERT_TRUE(Put(gone).status.ok());
  const std::string file = FindStoredRecord(dir_.path(), gone.meta.key).file;
  ASSERT_EQ(*store_->DeletePages({&gone.meta.key, 1}, kForEver), 1u);
  store_.reset();
  // As reclaim leaves it when the process dies before the length of the last segment is forgotten.
  ASSERT_TRUE(std::filesystem::remove(file));
  Open();
  ASSERT_TRUE(Put(page, Durability::kProcess).status.ok());
  const FoundRecord record = FindStoredRecord(dir_.path(), page.meta.key);
  EXPECT_NE(record.file, file);
  store_.reset();
  // What a power cut leaves of a record that no barrier covered.
  FlipFileBit(record.file, (record.offset + PageRecordHeaderBytes(page.meta)) * 8);
  Open();
  EXPECT_EQ(store_->recovery().verified_records, 1u);
  EXPECT_EQ(store_->recovery().dropped_entries, 1u);
  EXPECT_FALSE(Holds(page));
}

TEST_F(RocksdbPageStoreTest, RefusesAStoreOfANewerProgram) {
  Open();
  store_.reset();
  {
    // A later schema version, written behind the store's back.
    rocksdb::DBOptions options;
    std::vector<std::string> names;
    ASSERT_TRUE(rocksdb::DB::ListColumnFamilies(options, dir_.path() + "/index", &names).ok());
    std::vector<rocksdb::ColumnFamilyDescriptor> families;
    for (const std::string& name : names)
      families.emplace_back(name, rocksdb::ColumnFamilyOptions());
    std::vector<rocksdb::ColumnFamilyHandle*> handles;
    rocksdb::DB* db = nullptr;
    ASSERT_TRUE(rocksdb::DB::Open(options, dir_.path() + "/index", families, &handles, &db).ok());
    for (rocksdb::ColumnFamilyHandle* handle : handles) {
      if (handle->GetName() == "meta") {
        ASSERT_TRUE(db->Put({}, handle, "schema", std::string("\4\0\0\0", 4)).ok());
      }
      db->DestroyColumnFamilyHandle(handle);
    }
    delete db;
  }
  const auto store = RocksdbPageStore::Open(Options());
  EXPECT_EQ(store.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_THAT(std::string(store.status().message()), ::testing::HasSubstr("schema version 4"));
}

// ---- failing disks -----------------------------------------------------------------------------

TEST_F(RocksdbPageStoreTest, AFailedFsyncIsNeverFollowedByAnAcknowledgement) {
  Open();
  const TestPage before = MakeTestPage(1), during = MakeTestPage(2), after = MakeTestPage(3);
  ASSERT_TRUE(Put(before).status.ok());
  disk_.set_fail_syncs(true);
  const absl::Status failed = Put(during).status;
  EXPECT_EQ(failed.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(GetReason(failed), "STORE_FAILED");
  disk_.set_fail_syncs(false);  // the disk seems well again: the lost pages are not
  EXPECT_EQ(GetReason(Put(after).status), "STORE_FAILED");
  EXPECT_EQ(GetReason(Put(after, Durability::kCache).status), "STORE_FAILED");
  EXPECT_EQ(GetReason(Save("s", {before}).status()), "STORE_FAILED");
  EXPECT_EQ(GetReason(store_->CompareAndSetRecord("k", "k", 0, "v", kForEver).status()),
            "STORE_FAILED");
  EXPECT_EQ(GetReason(store_->AcquireLease("l", 1, absl::Seconds(1), kForEver).status()),
            "STORE_FAILED");
  EXPECT_EQ(GetReason(store_->Barrier(Durability::kLocal, kForEver)), "STORE_FAILED");
  EXPECT_EQ(Stats().state, "failed");
  EXPECT_EQ(Get(before), GetOutcome::kHit) << "reads go on";
  Open();
  EXPECT_EQ(Get(before), GetOutcome::kHit);
  EXPECT_TRUE(Put(after).status.ok());
}

TEST_F(RocksdbPageStoreTest, AnOpeningDoesNotVouchForWhatAFailedFsyncLeftInThePageCache) {
  Open();
  const TestPage before = MakeTestPage(1), lost = MakeTestPage(2);
  ASSERT_TRUE(Put(before).status.ok());
  ASSERT_TRUE(Put(lost, Durability::kProcess).status.ok());
  disk_.set_fail_syncs(true);
  EXPECT_EQ(GetReason(store_->Barrier(Durability::kLocal, kForEver)), "STORE_FAILED");
  disk_.set_fail_syncs(false);
  EXPECT_EQ(Get(lost), GetOutcome::kHit) << "the page cache has it, the disk has not";
  Open();
  EXPECT_EQ(store_->recovery().verified_records, 1u);
  EXPECT_EQ(store_->recovery().dropped_entries, 1u);
  EXPECT_FALSE(Holds(lost));
  EXPECT_EQ(Save("s", {lost})->missing.size(), 1u);
  EXPECT_EQ(Get(before), GetOutcome::kHit);
  // Put again it is as durable as any.
  ASSERT_TRUE(Put(lost).status.ok());
  ASSERT_TRUE(Save("s", {before, lost})->committed);
  disk_.CutPower();
  store_.reset();
  disk_.DropUnsynced(1);
  Open();
  EXPECT_EQ(store_->recovery().lost_manifest_pages, 0u);
  EXPECT_EQ(Get(before), GetOutcome::kHit);
  EXPECT_EQ(Get(lost), GetOutcome::kHit);
}

TEST_F(RocksdbPageStoreTest, AFullDiskRefusesPutsServesReadsAndRecovers) {
  Open();
  const TestPage before = MakeTestPage(1), more = MakeTestPage(2);
  ASSERT_TRUE(Put(before).status.ok());
  disk_.set_free_bytes(kMiB);  // below the guard: nothing is even tried
  const absl::Status guarded = Put(more).status;
  EXPECT_EQ(guarded.code(), absl::StatusCode::kResourceExhausted) << guarded;
  EXPECT_EQ(GetReason(guarded), "STORE_FULL");
  EXPECT_EQ(Stats().state, "full");
  EXPECT_EQ(Get(before), GetOutcome::kHit);
  EXPECT_TRUE(Save("s", {before})->committed) << "small records still fit";
  disk_.set_free_bytes(0);
  disk_.set_full(true);  // the guard saw room, the write did not
  EXPECT_EQ(Put(more).status.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_EQ(Get(more), GetOutcome::kMiss);
  disk_.set_full(false);
  EXPECT_TRUE(Put(more).status.ok());
  EXPECT_EQ(Get(more), GetOutcome::kHit);
  EXPECT_EQ(Stats().state, "serving");
}

TEST_F(RocksdbPageStoreTest, AnUnreadableSegmentDoesNotStopTheReclaimOfOthers) {
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = 8 * kMiB;
  options.clock = Clock::Real();
  Open(options);
  const TestPage kept = MakeTestPage(0, 128 * kKiB);
  ASSERT_TRUE(Put(kept).status.ok());
  ASSERT_TRUE(Save("s", {kept})->committed);
  // Soon the deadest of all segments, but for the page that cannot be read.
  disk_.set_unreadable_file(FindStoredRecord(dir_.path(), kept.meta.key).file);
  for (uint64_t i = 1; i < 150; ++i) {
    const PutPageResult put = Put(MakeTestPage(i, 128 * kKiB), Durability::kProcess);
    ASSERT_TRUE(put.status.ok()) << i << ": " << put.status;
  }
  EXPECT_GT(Stats().pages_evicted, 50u);
  EXPECT_EQ(Stats().pages_quarantined, 0u);
  disk_.set_unreadable_file("");
  EXPECT_EQ(Get(kept), GetOutcome::kHit);
  ASSERT_TRUE(store_->Compact(kForEver).ok());
  EXPECT_EQ(Get(kept), GetOutcome::kHit) << "moved, now that it can be read";
}

TEST_F(RocksdbPageStoreTest, CompactMovesWhatItCanReadOfASegment) {
  Open();
  std::vector<TestPage> pages;
  std::vector<PageKey> gone;
  for (uint64_t i = 0; i < 64; ++i) {
    pages.push_back(MakeTestPage(i, 128 * kKiB));
    ASSERT_TRUE(Put(pages.back(), Durability::kProcess).status.ok());
    if (i % 2 == 0) gone.push_back(pages.back().meta.key);
  }
  ASSERT_EQ(*store_->DeletePages(gone, kForEver), 32u);
  disk_.set_unreadable_file(FindStoredRecord(dir_.path(), pages[1].meta.key).file);
  const auto reclaimed = store_->Compact(kForEver);
  ASSERT_TRUE(reclaimed.ok()) << reclaimed.status();
  EXPECT_GE(*reclaimed, 2 * kMiB);
  disk_.set_unreadable_file("");
  for (uint64_t i = 1; i < 64; i += 2) EXPECT_EQ(Get(pages[i]), GetOutcome::kHit);
  EXPECT_GT(*store_->Compact(kForEver), 0u) << "the one that was left";
  for (uint64_t i = 1; i < 64; i += 2) EXPECT_EQ(Get(pages[i]), GetOutcome::kHit);
}

TEST_F(RocksdbPageStoreTest, AScrubGoesOnBehindPagesThatCannotBeRead) {
  RocksdbPageStoreOptions options = Options();
  options.scrub_bytes_per_second = 0;
  Open(options);
  std::vector<TestPage> pages;
  uint64_t unreadable = 0;
  for (uint64_t i = 0; i < 16; ++i) {
    pages.push_back(MakeTestPage(i, 128 * kKiB));
    ASSERT_TRUE(Put(pages.back(), Durability::kProcess).status.ok());
  }
  const std::string file = FindStoredRecord(dir_.path(), pages[0].meta.key).file;
  for (const TestPage& page : pages) {
    unreadable += FindStoredRecord(dir_.path(), page.meta.key).file == file ? 1 : 0;
  }
  const FoundRecord damaged = FindStoredRecord(dir_.path(), pages[15].meta.key);
  ASSERT_NE(damaged.file, file);
  FlipFileBit(damaged.file, (damaged.offset + 1000) * 8);
  disk_.set_unreadable_file(file);
  // By steps, as the background does it: each page has its turn.
  uint64_t failed_steps = 0;
  for (size_t step = 0; step < pages.size(); ++step) {
    failed_steps += absl::IsUnavailable(store_->Scrub(1, kForEver).status()) ? 1 : 0;
  }
  EXPECT_EQ(failed_steps, unreadable);
  EXPECT_EQ(Stats().pages_scrubbed, pages.size() - unreadable);
  EXPECT_EQ(Stats().pages_quarantined, 1u) << "the damaged page, and none that could not be read";
  // All at once, but for the damaged one.
  const absl::Status whole = store_->Scrub(0, kForEver).status();
  EXPECT_TRUE(absl::IsUnavailable(whole)) << whole;
  EXPECT_THAT(std::string(whole.message()),
              ::testing::HasSubstr(absl::StrCat(unreadable, " of ", pages.size() - 1, " pages")));
  EXPECT_EQ(Stats().pages_scrubbed, 2 * (pages.size() - unreadable) - 1);
}

TEST_F(RocksdbPageStoreTest, LocalIsFsyncedAndTheWeakerLevelsAreNot) {
  Open();
  const uint64_t start = disk_.num_syncs();
  ASSERT_TRUE(Put(MakeTestPage(1), Durability::kCache).status.ok());
  ASSERT_TRUE(Put(MakeTestPage(2), Durability::kProcess).status.ok());
  EXPECT_EQ(disk_.num_syncs(), start);
  ASSERT_TRUE(Put(MakeTestPage(3), Durability::kLocal).status.ok());
  const uint64_t one = disk_.num_syncs() - start;
  EXPECT_GE(one, 2u) << "the body, then the index";
  // A page that is there already, but not yet durable, is made so before it is acknowledged.
  ASSERT_TRUE(Put(MakeTestPage(4), Durability::kProcess).status.ok());
  const uint64_t before = disk_.num_syncs();
  const PutPageResult again = Put(MakeTestPage(4), Durability::kLocal);
  EXPECT_TRUE(again.already_present);
  EXPECT_GT(disk_.num_syncs(), before);
}

TEST_F(RocksdbPageStoreTest, BarriersAreGrouped) {
  Open();
  constexpr int kThreads = 8, kPuts = 20;
  const uint64_t start = disk_.num_syncs();
  std::vector<std::thread> threads;
  for (int t = 0; t < kThreads; ++t) {
    threads.emplace_back([&, t] {
      for (int i = 0; i < kPuts; ++i) {
        EXPECT_TRUE(Put(MakeTestPage(static_cast<uint64_t>(t) * 1000 + i)).status.ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_LT(disk_.num_syncs() - start, uint64_t{2} * kThreads * kPuts)
      << "fewer than two syncs a put: waiters share them";
}

TEST_F(RocksdbPageStoreTest, ReadsDoNotWaitForAWriterOfTheSameStore) {
  Open();
  const TestPage page = MakeTestPage(1, 2 * kMiB);
  ASSERT_TRUE(Put(page).status.ok());
  std::atomic<bool> stop{false};
  std::thread writer([&] {
    for (uint64_t i = 10; !stop; ++i) Put(MakeTestPage(i, 64 * kKiB));
  });
  std::vector<std::thread> readers;
  for (int r = 0; r < 4; ++r) {
    readers.emplace_back([&] {
      for (int i = 0; i < 50; ++i) EXPECT_EQ(Get(page), GetOutcome::kHit);
    });
  }
  for (std::thread& reader : readers) reader.join();
  stop = true;
  writer.join();
  EXPECT_EQ(Stats().pages_got, 200u);
}

TEST_F(RocksdbPageStoreTest, NamesTheFieldOfABadOption) {
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = kMiB;
  const auto store = RocksdbPageStore::Open(options);
  EXPECT_EQ(store.status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(store.status().message()),
              ::testing::HasSubstr("capacity_bytes is 1048576"));
  options.dir.clear();
  EXPECT_FALSE(RocksdbPageStore::Open(options).ok());
}

}  // namespace
}  // namespace pagetide
