// What only the embedded store promises: restarts, space, failing disks, damage at rest.
#include "kvstore/rocksdb_page_store.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rocksdb/db.h>

#include <filesystem>
#include <map>
#include <string>
#include <thread>
#include <utility>

#include "base/byte_size.h"
#include "base/error_info.h"
#include "kvstore/failpoint.h"
#include "kvstore/page_record.h"
#include "tests/contract/test_page.h"
#include "tests/fault/faulty_disk.h"
#include "tests/kvstore/store_test_util.h"
#include "tests/support/timing.h"

namespace pagetide {
namespace {

const MonotonicTime kForEver = MonotonicTime::InfiniteFuture();

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
  uint64_t BytesOnDisk();

  TempDir dir_;
  FaultyDisk disk_;
  FakeClock clock_;
  std::unique_ptr<RocksdbPageStore> store_;
};

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

// ---- space -------------------------------------------------------------------------------------

// What the store's files take at one moment. Reclaim moves pages from file to file meanwhile, and a
// listing that it overtakes counts them twice: two listings in a row must agree.
uint64_t RocksdbPageStoreTest::BytesOnDisk() {
  const auto list = [this] {
    std::map<std::string, uint64_t> files;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(dir_.path())) {
      std::error_code gone;
      const uint64_t size = entry.is_regular_file(gone) ? entry.file_size(gone) : 0;
      if (!gone) files[entry.path()] = size;
    }
    return files;
  };
  std::map<std::string, uint64_t> files;
  EXPECT_TRUE(testing::Eventually([&] {
    std::map<std::string, uint64_t> before = std::exchange(files, list());
    return before == files;
  }));
  uint64_t bytes = 0;
  for (const auto& [path, size] : files) bytes += size;
  return bytes;
}

// Holds whoever comes to a failpoint there.
class Gate {
 public:
  void Pass() {
    MutexLock lock(&mu_);
    ++num_arrived_;
    changed_.SignalAll();
    while (!is_open_) changed_.Wait(&mu_);
  }
  void AwaitArrival() {
    MutexLock lock(&mu_);
    while (num_arrived_ == 0) changed_.Wait(&mu_);
  }
  void Open() {
    MutexLock lock(&mu_);
    is_open_ = true;
    changed_.SignalAll();
  }

 private:
  Mutex mu_;
  CondVar changed_;
  int num_arrived_ ABSL_GUARDED_BY(mu_) = 0;
  bool is_open_ ABSL_GUARDED_BY(mu_) = false;
};

// Two puts, the second while the first one stands at the failpoint: let in, and not ended.
TEST_F(RocksdbPageStoreTest, OfTwoPutsThatDoNotBothFitOnTheDiskOneIsRefused) {
  RocksdbPageStoreOptions options = Options();
  options.min_free_bytes = kMiB;
  Open(options);
  disk_.set_free_bytes(options.min_free_bytes + 3 * kMiB / 2);
  const TestPage first = MakeTestPage(1, kMiB), second = MakeTestPage(2, kMiB);
  Gate gate;
  SetFailpointObserver([&gate](const char* name) {
    if (absl::string_view(name) == "put.before_body") gate.Pass();
  });
  PutPageResult put;
  std::thread writer([&] { put = Put(first); });
  gate.AwaitArrival();
  const absl::Status refused = Put(MakeTestPage(3, kMiB)).status;
  gate.Open();
  writer.join();
  SetFailpointObserver(nullptr);
  EXPECT_TRUE(put.status.ok()) << put.status;
  EXPECT_EQ(GetReason(refused), "STORE_FULL") << refused;
  EXPECT_TRUE(Put(second).status.ok()) << "nobody else is on the way now";
}

TEST_F(RocksdbPageStoreTest, OfTwoPutsThatDoNotBothFitIntoTheCapacityOneIsRefused) {
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = 8 * kMiB;
  Open(options);
  const TestPage first = MakeTestPage(1, 4 * kMiB), second = MakeTestPage(2, 4 * kMiB);
  Gate gate;
  SetFailpointObserver([&gate](const char* name) {
    if (absl::string_view(name) == "put.admitted") gate.Pass();
  });
  PutPageResult put;
  std::thread writer([&] { put = Put(first); });
  gate.AwaitArrival();
  const absl::Status refused = Put(second).status;
  gate.Open();
  writer.join();
  SetFailpointObserver(nullptr);
  EXPECT_TRUE(put.status.ok()) << put.status;
  EXPECT_EQ(GetReason(refused), "STORE_FULL") << refused;
  EXPECT_LE(BytesOnDisk(), options.capacity_bytes);
}

TEST_F(RocksdbPageStoreTest, TheLastOfTheDiskIsForWhatReleasesOnly) {
  RocksdbPageStoreOptions options = Options();
  Open(options);
  const TestPage pinned = MakeTestPage(1), free_page = MakeTestPage(2);
  ASSERT_TRUE(Put(pinned).status.ok());
  ASSERT_TRUE(Put(free_page).status.ok());
  ASSERT_TRUE(Save("s", {pinned})->committed);
  ASSERT_TRUE(store_->CompareAndSetRecord("k", "k", 0, "v", kForEver).ok());
  const auto lease = store_->AcquireLease("l", 1, absl::Seconds(60), kForEver);
  ASSERT_TRUE(lease.ok()) << lease.status();
  Retention pin;
  pin.pinned_until = clock_.WallNow() + absl::Hours(1);
  ASSERT_TRUE(store_->SetRetention({&pinned.meta.key, 1}, pin, std::nullopt, kForEver).ok());

  disk_.set_free_bytes(100 * kKiB);
  const absl::Status record = store_->CompareAndSetRecord("k", "k", 1, "w", kForEver).status();
  EXPECT_EQ(record.code(), absl::StatusCode::kResourceExhausted) << record;
  EXPECT_EQ(GetReason(record), "STORE_FULL");
  EXPECT_EQ(store_->GetRecord("k", "k", kForEver)->value, "v") << "a refusal changes nothing";
  EXPECT_EQ(GetReason(store_->AcquireLease("m", 1, absl::Seconds(60), kForEver).status()),
            "STORE_FULL");
  EXPECT_EQ(
      GetReason(
          store_->SetRetention({&free_page.meta.key, 1}, pin, std::nullopt, kForEver).status()),
      "STORE_FULL");
  EXPECT_EQ(Stats().protected_pages, 1u);
  EXPECT_EQ(GetReason(Save("t", {free_page}).status()), "STORE_FULL");
  // Whatever lets go goes through.
  EXPECT_TRUE(store_->SetRetention({&pinned.meta.key, 1}, {}, std::nullopt, kForEver).ok());
  EXPECT_TRUE(store_->ReleaseLease(*lease, kForEver).ok());
  EXPECT_TRUE(store_->CompareAndSetRecord("k", "k", 1, std::nullopt, kForEver).ok());
  EXPECT_TRUE(store_->DeleteManifest("s", 1, std::nullopt, kForEver).ok());
  EXPECT_EQ(Stats().protected_pages, 0u);
  EXPECT_EQ(*store_->DeletePages({&pinned.meta.key, 1}, kForEver), 1u);
  disk_.set_free_bytes(0);
  EXPECT_TRUE(Put(pinned).status.ok()) << "and nothing has failed for good";
}

TEST_F(RocksdbPageStoreTest, AFullDiskDropsWhatMayGoBeforeItRefusesAPut) {
  RocksdbPageStoreOptions options = Options();
  options.min_free_bytes = 4 * kMiB;
  Open(options);  // without a capacity
  disk_.set_disk_bytes(12 * kMiB);
  std::vector<TestPage> saved;
  for (uint64_t i = 0; i < 160; ++i) {  // 20 MiB
    const TestPage page = MakeTestPage(i, 128 * kKiB);
    const PutPageResult put = Put(page, Durability::kProcess);
    ASSERT_TRUE(put.status.ok()) << i << ": " << put.status;
    if (i % 20 == 0) {
      ASSERT_TRUE(Save(absl::StrCat("s", i), {page})->committed);
      saved.push_back(page);
    }
    EXPECT_GE(*disk_.FreeBytes(dir_.path()), 3 * kMiB) << "the index's room";
  }
  for (const TestPage& page : saved) EXPECT_EQ(Get(page), GetOutcome::kHit);
  EXPECT_GT(Stats().pages_evicted, 60u);
  EXPECT_GT(Stats().logical_bytes, 5 * kMiB) << "no more than was needed";
  EXPECT_EQ(Stats().state, "serving");
}

TEST_F(RocksdbPageStoreTest, AFullDiskOfProtectedPagesRefusesPutsUntilSomethingIsReleased) {
  RocksdbPageStoreOptions options = Options();
  options.min_free_bytes = 4 * kMiB;
  Open(options);
  disk_.set_disk_bytes(8 * kMiB);
  absl::Status refused;
  uint64_t num_saved = 0;
  for (; num_saved < 100; ++num_saved) {
    const TestPage page = MakeTestPage(num_saved, 128 * kKiB);
    refused = Put(page).status;
    if (!refused.ok()) break;
    ASSERT_TRUE(Save(absl::StrCat("s", num_saved), {page})->committed);
  }
  EXPECT_EQ(GetReason(refused), "STORE_FULL") << refused;
  EXPECT_EQ(Stats().pages_evicted, 0u);
  ASSERT_GT(num_saved, 16u);
  for (uint64_t i = 0; i < 16; ++i) {
    ASSERT_TRUE(store_->DeleteManifest(absl::StrCat("s", i), 1, std::nullopt, kForEver).ok());
  }
  EXPECT_TRUE(Put(MakeTestPage(1000, 128 * kKiB)).status.ok());
  EXPECT_EQ(Stats().state, "serving");
  EXPECT_TRUE(Holds(MakeTestPage(num_saved - 1, 128 * kKiB)));
}

TEST_F(RocksdbPageStoreTest, CopiesOfReclaimLeaveTheirReserve) {
  RocksdbPageStoreOptions options = Options();
  options.min_free_bytes = 4 * kMiB;
  Open(options);
  std::vector<TestPage> pages;
  std::vector<PageKey> gone;
  for (uint64_t i = 0; i < 16; ++i) {
    pages.push_back(MakeTestPage(i, 128 * kKiB));
    ASSERT_TRUE(Put(pages.back(), Durability::kProcess).status.ok());
    if (i % 2 == 0) gone.push_back(pages.back().meta.key);
  }
  ASSERT_EQ(*store_->DeletePages(gone, kForEver), 8u);
  disk_.set_free_bytes(kMiB + 64 * kKiB);
  EXPECT_EQ(GetReason(store_->Compact(kForEver).status()), "STORE_FULL");
  // Less than puts may have, enough for copies.
  disk_.set_free_bytes(2 * kMiB);
  const auto reclaimed = store_->Compact(kForEver);
  ASSERT_TRUE(reclaimed.ok()) << reclaimed.status();
  EXPECT_GT(*reclaimed, 0u);
  for (uint64_t i = 1; i < 16; i += 2) EXPECT_EQ(Get(pages[i]), GetOutcome::kHit);
}

TEST_F(RocksdbPageStoreTest, StaysWithinItsCapacityWithAFifthPinned) {
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = 32 * kMiB;
  options.clock = Clock::Real();
  Open(options);
  constexpr size_t kPage = 128 * kKiB;
  std::vector<TestPage> pinned;
  uint64_t peak = 0;
  for (uint64_t i = 0; i < 5 * 32 * 8; ++i) {  // five capacities
    const TestPage page = MakeTestPage(i, kPage);
    const PutPageResult put = Put(page, Durability::kProcess);
    ASSERT_TRUE(put.status.ok()) << i << ": " << put.status;
    if (i % 5 == 0 && pinned.size() < 51) {  // a fifth of the capacity
      ASSERT_TRUE(Save(absl::StrCat("pin", i), {page})->committed);
      pinned.push_back(page);
    }
    if (i % 16 == 0) peak = std::max(peak, BytesOnDisk());
  }
  EXPECT_LE(peak, options.capacity_bytes) << "physical bytes, as the disk sees them";
  EXPECT_GE(peak, options.capacity_bytes / 2);
  for (const TestPage& page : pinned) EXPECT_EQ(Get(page), GetOutcome::kHit);
  const StoreStats stats = Stats();
  EXPECT_GT(stats.pages_evicted, 500u);
  EXPECT_GT(stats.pages * kPage, options.capacity_bytes / 2) << "and the room is used";
  Open(options);
  EXPECT_EQ(store_->recovery().lost_manifest_pages, 0u);
  for (const TestPage& page : pinned) EXPECT_EQ(Get(page), GetOutcome::kHit);
}

TEST_F(RocksdbPageStoreTest, EvictsByRecencyAndKeepsTheOrderOverARestart) {
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = 16 * kMiB;
  options.clock = Clock::Real();
  Open(options);
  std::vector<TestPage> first;
  for (uint64_t i = 0; i < 40; ++i) {
    first.push_back(MakeTestPage(i, 128 * kKiB));
    ASSERT_TRUE(Put(first.back()).status.ok());
  }
  // The first ten are read again, so that they are the most recent ones.
  for (uint64_t i = 0; i < 10; ++i) EXPECT_EQ(Get(first[i]), GetOutcome::kHit);
  Open(options);
  for (uint64_t i = 100; i < 180; ++i) {
    ASSERT_TRUE(Put(MakeTestPage(i, 128 * kKiB)).status.ok());
  }
  int read_kept = 0, unread_kept = 0;
  for (uint64_t i = 0; i < 40; ++i) (i < 10 ? read_kept : unread_kept) += Holds(first[i]) ? 1 : 0;
  EXPECT_LT(unread_kept, 30);
  EXPECT_TRUE(read_kept == 10 || unread_kept == 0)
      << read_kept << " of the read pages kept with " << unread_kept << " of the others";
}

TEST_F(RocksdbPageStoreTest, PriorityOutlivesRecencyAndSurvivesARestart) {
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = 16 * kMiB;
  options.clock = Clock::Real();
  Open(options);
  std::vector<TestPage> low, normal, high;
  for (uint64_t i = 0; i < 10; ++i) {
    for (std::vector<TestPage>* kind : {&high, &normal, &low}) {
      kind->push_back(MakeTestPage(i * 3 + (kind == &low      ? 0
                                            : kind == &normal ? 1
                                                              : 2),
                                   128 * kKiB, /*keyed=*/false));
      ASSERT_TRUE(Put(kind->back()).status.ok());
    }
  }
  const auto set = [&](const std::vector<TestPage>& pages, uint32_t priority) {
    std::vector<PageKey> keys;
    for (const TestPage& page : pages) keys.push_back(page.meta.key);
    Retention retention;
    retention.priority = priority;
    const auto missing = store_->SetRetention(keys, retention, std::nullopt, kForEver);
    ASSERT_TRUE(missing.ok() && missing->empty()) << missing.status();
  };
  set(high, 100);
  set(low, 0);
  Open(options);
  for (uint64_t i = 1000; i < 1100; ++i) {
    ASSERT_TRUE(Put(MakeTestPage(i, 128 * kKiB, /*keyed=*/false)).status.ok());
  }
  const auto held = [&](const std::vector<TestPage>& pages) {
    int n = 0;
    for (const TestPage& page : pages) n += Holds(page) ? 1 : 0;
    return n;
  };
  EXPECT_EQ(held(low), 0);
  EXPECT_EQ(held(high), 10);
  EXPECT_LE(held(normal), held(high));
  EXPECT_GT(Stats().pages_evicted, 0u);
}

TEST_F(RocksdbPageStoreTest, APinSurvivesARestartAndEndsByBothClocks) {
  RocksdbPageStoreOptions options = Options();
  options.expiry_grace = absl::Minutes(10);
  Open(options);
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  Retention retention;
  retention.pinned_until = clock_.WallNow() + absl::Hours(1);
  ASSERT_TRUE(store_->SetRetention({&page.meta.key, 1}, retention, std::nullopt, kForEver).ok());
  // The machine comes up with a clock that is a day ahead, and sets it right soon after.
  store_.reset();
  clock_.JumpWall(absl::Hours(24));
  Open(options);
  clock_.Advance(absl::Minutes(9));
  EXPECT_EQ(store_->DeletePages({&page.meta.key, 1}, kForEver).value(), 0u);
  clock_.JumpWall(-absl::Hours(24));
  clock_.Advance(absl::Minutes(50));
  EXPECT_EQ(store_->DeletePages({&page.meta.key, 1}, kForEver).value(), 0u);
  clock_.Advance(absl::Minutes(1));
  EXPECT_EQ(store_->DeletePages({&page.meta.key, 1}, kForEver).value(), 1u);
}

TEST_F(RocksdbPageStoreTest, AnEndOfAManifestSurvivesARestart) {
  RocksdbPageStoreOptions options = Options();
  options.expiry_grace = absl::Minutes(10);
  Open(options);
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).status.ok());
  ManifestRecord manifest;
  manifest.name = "s";
  manifest.pages.push_back(page.ref());
  manifest.saved_at = clock_.WallNow();
  manifest.expires_at = clock_.WallNow() + absl::Hours(1);
  manifest.priority = 90;
  ASSERT_TRUE(store_->PutManifest(manifest, 0, std::nullopt, kForEver).ok());
  store_.reset();
  clock_.Advance(absl::Hours(2));  // it ended while the store was away
  Open(options);
  store_->WaitForUpkeep();
  EXPECT_TRUE(store_->GetManifest("s", kForEver).ok()) << "the grace after an opening";
  clock_.Advance(absl::Minutes(10));
  store_->WaitForUpkeep();
  EXPECT_TRUE(absl::IsNotFound(store_->GetManifest("s", kForEver).status()));
  EXPECT_EQ(Stats().protected_pages, 0u);
  EXPECT_TRUE(store_->ListManifests("", "", 10, kForEver)->empty());
  EXPECT_EQ(Get(page), GetOutcome::kHit) << "released, not deleted";
}

TEST_F(RocksdbPageStoreTest, ChildrenSurviveARestart) {
  Open(Options());
  const PrefixKey root{Sha256Of("root")};
  const TestPage page = MakeTokenPage(root, {1, 2, 3, 4}, 1);
  ASSERT_TRUE(Put(page, Durability::kLocal).status.ok());
  Open(Options());
  const std::vector<uint32_t> tokens = {1, 2, 3, 9};
  const PartialQuery query{root, page.meta.fingerprint, tokens};
  const auto found = store_->FindPartialPages({&query, 1}, kForEver);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ((*found)[0].common_tokens, 3u);
  EXPECT_EQ((*found)[0].key, page.meta.key);
}

TEST_F(RocksdbPageStoreTest, TheBackgroundFindsDamageAtItsRate) {
  RocksdbPageStoreOptions options = Options();
  options.scrub_bytes_per_second = 1000 * 4096;  // a page a millisecond of the fake clock
  Open(options);
  std::vector<TestPage> pages;
  for (uint64_t i = 0; i < 12; ++i) {
    pages.push_back(MakeTestPage(i));
    ASSERT_TRUE(Put(pages.back(), Durability::kLocal).status.ok());
  }
  const FoundRecord record = FindStoredRecord(dir_.path(), pages[5].meta.key);
  FlipFileBit(record.file, (record.offset + PageRecordHeaderBytes(pages[5].meta)) * 8 + 99);
  const MonotonicTime give_up = Clock::Real()->MonotonicNow() + absl::Seconds(90);
  clock_.Advance(absl::Seconds(1));  // when it begins
  for (uint64_t step = 1; step <= 12; ++step) {
    while (Stats().pages_scrubbed < step && Clock::Real()->MonotonicNow() < give_up) {
      std::this_thread::yield();
    }
    EXPECT_EQ(Stats().pages_scrubbed, step) << "no faster than told";
    clock_.Advance(absl::Milliseconds(1));
  }
  EXPECT_EQ(Stats().pages_quarantined, 1u);
}

TEST_F(RocksdbPageStoreTest, APrefixOutlivesWhatContinuesIt) {
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = 16 * kMiB;
  options.clock = Clock::Real();
  Open(options);
  // A chain of four, put parent first: by plain recency the root would go first.
  std::vector<TestPage> chain;
  for (uint64_t i = 0; i < 4; ++i) {
    chain.push_back(MakeTestPage(i, 128 * kKiB, true, i == 0 ? nullptr : &chain.back()));
    ASSERT_TRUE(Put(chain.back()).status.ok());
  }
  bool was_cut = false;
  for (uint64_t i = 100; i < 300; ++i) {
    ASSERT_TRUE(Put(MakeTestPage(i, 128 * kKiB, false)).status.ok());
    for (size_t c = 1; c < chain.size(); ++c) {
      EXPECT_TRUE(!Holds(chain[c]) || Holds(chain[c - 1])) << "page " << c << " without its parent";
      was_cut = was_cut || !Holds(chain[c]);
    }
  }
  EXPECT_TRUE(was_cut) << "nothing was evicted: the test did nothing";
}

TEST_F(RocksdbPageStoreTest, AFullStoreOfProtectedPagesRefusesPutsAndServesReads) {
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = 8 * kMiB;
  options.clock = Clock::Real();
  options.put_wait = absl::Milliseconds(500);
  Open(options);
  std::vector<TestPage> pages;
  absl::Status refused;
  for (uint64_t i = 0; i < 100 && refused.ok(); ++i) {
    const TestPage page = MakeTestPage(i, 128 * kKiB);
    refused = Put(page).status;
    if (!refused.ok()) break;
    ASSERT_TRUE(Save(absl::StrCat("m", i), {page})->committed);
    pages.push_back(page);
  }
  EXPECT_EQ(refused.code(), absl::StatusCode::kResourceExhausted) << refused;
  EXPECT_EQ(GetReason(refused), "STORE_FULL");
  EXPECT_TRUE(GetRetryDelay(refused).has_value());
  EXPECT_EQ(Stats().state, "full");
  EXPECT_GT(pages.size(), 30u);
  for (const TestPage& page : pages) EXPECT_EQ(Get(page), GetOutcome::kHit);
  for (size_t i = 0; i < 20; ++i) {
    ASSERT_TRUE(store_->DeleteManifest(absl::StrCat("m", i), 1, std::nullopt, kForEver).ok());
  }
  store_->WaitForUpkeep();
  EXPECT_TRUE(Put(MakeTestPage(1000, 128 * kKiB)).status.ok()) << "room was made";
  EXPECT_EQ(Stats().state, "serving");
}

TEST_F(RocksdbPageStoreTest, APutThatWaitsForRoomDoesNotBlockTheReclaimOfItsDamagedPage) {
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = 8 * kMiB;
  options.clock = Clock::Real();
  options.put_wait = absl::Seconds(60);  // what the two would wait for each other
  Open(options);
  std::vector<TestPage> pages;
  for (uint64_t i = 0; i < 100; ++i) {
    pages.push_back(MakeTestPage(i, 128 * kKiB));
    if (!Put(pages.back()).status.ok()) break;
    ASSERT_TRUE(Save(absl::StrCat("m", i), {pages.back()})->committed);
  }
  ASSERT_EQ(Stats().state, "full");
  // The first to go, and the one that is put again.
  const FoundRecord oldest = FindStoredRecord(dir_.path(), pages[0].meta.key);
  FlipFileBit(oldest.file, (oldest.offset + 1000) * 8);
  ASSERT_EQ(Get(pages[0]), GetOutcome::kQuarantined);
  for (size_t i = 0; i + 1 < pages.size(); ++i) {
    ASSERT_TRUE(store_->DeleteManifest(absl::StrCat("m", i), 1, std::nullopt, kForEver).ok());
  }
  const PutPageResult put = Put(pages[0]);
  EXPECT_TRUE(put.status.ok()) << put.status;
  EXPECT_EQ(Get(pages[0]), GetOutcome::kHit);
}

TEST_F(RocksdbPageStoreTest, APagePutForAManifestIsNotEvictedBeforeItIsNamed) {
  // Everything else is protected, so that a fresh page is the only one that could go.
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = 8 * kMiB;
  options.put_wait = absl::Milliseconds(100);
  options.clock = Clock::Real();
  Open(options);
  int saved = 0;
  for (uint64_t i = 0; i < 100; ++i) {
    const TestPage page = MakeTestPage(i, 128 * kKiB);
    if (!Put(page).status.ok()) break;
    if (i > 30) store_->WaitForUpkeep();  // reclaim has had its chance
    const auto put = Save(absl::StrCat("m", i), {page});
    ASSERT_TRUE(put.ok()) << put.status();
    ASSERT_TRUE(put->committed) << "page " << i << " was evicted between put and save";
    ++saved;
  }
  EXPECT_GT(saved, 30);
  EXPECT_LT(saved, 100);
}

TEST_F(RocksdbPageStoreTest, TheVersionBeforeCanStillBeLoadedWhenANewOneWasSaved) {
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = 16 * kMiB;
  Open(options);  // by the fake clock: no grace ends by time
  const TestPage old_page = MakeTestPage(1, 128 * kKiB), new_page = MakeTestPage(2, 128 * kKiB);
  ASSERT_TRUE(Put(old_page).status.ok());
  ASSERT_TRUE(Save("s", {old_page})->committed);
  for (uint64_t i = 10; i < 120; ++i) {
    ASSERT_TRUE(Put(MakeTestPage(i, 128 * kKiB), Durability::kProcess).status.ok());
  }
  ASSERT_TRUE(Put(new_page).status.ok());
  ASSERT_TRUE(Save("s", {new_page}, 1)->committed);
  // The oldest of all pages would be the first to go, and 15 are not an eighth of the capacity.
  store_->WaitForUpkeep();
  const uint64_t evicted = Stats().pages_evicted;
  for (uint64_t i = 200; i < 215; ++i) {
    ASSERT_TRUE(Put(MakeTestPage(i, 128 * kKiB), Durability::kProcess).status.ok());
  }
  store_->WaitForUpkeep();
  EXPECT_GT(Stats().pages_evicted, evicted);
  EXPECT_EQ(Get(old_page), GetOutcome::kHit);
}

TEST_F(RocksdbPageStoreTest, CompactGivesBackDeadBytes) {
  Open();
  std::vector<TestPage> pages;
  std::vector<PageKey> gone;
  for (uint64_t i = 0; i < 64; ++i) {
    pages.push_back(MakeTestPage(i, 128 * kKiB));
    ASSERT_TRUE(Put(pages.back()).status.ok());
    if (i % 2 == 0) gone.push_back(pages.back().meta.key);
  }
  ASSERT_EQ(*store_->DeletePages(gone, kForEver), 32u);
  const auto reclaimed = store_->Compact(kForEver);
  ASSERT_TRUE(reclaimed.ok()) << reclaimed.status();
  EXPECT_GE(*reclaimed, 3 * kMiB);
  for (uint64_t i = 0; i < 64; ++i) {
    EXPECT_EQ(Get(pages[i]), i % 2 == 0 ? GetOutcome::kMiss : GetOutcome::kHit);
  }
  Open();
  for (uint64_t i = 1; i < 64; i += 2) EXPECT_EQ(Get(pages[i]), GetOutcome::kHit);
}

TEST_F(RocksdbPageStoreTest, ASegmentStaysWhileAPutIntoItHasNotEnded) {
  Open();
  std::vector<PageKey> others;
  for (uint64_t i = 0; i < 4; ++i) {
    const TestPage page = MakeTestPage(i, 128 * kKiB);
    ASSERT_TRUE(Put(page).status.ok());
    others.push_back(page.meta.key);
  }
  const TestPage page = MakeTestPage(100, 128 * kKiB);
  Gate gate;
  SetFailpointObserver([&gate](const char* name) {
    if (absl::string_view(name) == "put.committed") gate.Pass();
  });
  PutPageResult put;
  std::thread writer([&] { put = Put(page); });
  gate.AwaitArrival();
  // All that the index knows of the segment goes.
  EXPECT_EQ(*store_->DeletePages(others, kForEver), others.size());
  const auto reclaimed = store_->Compact(kForEver);
  gate.Open();
  writer.join();
  SetFailpointObserver(nullptr);
  ASSERT_TRUE(reclaimed.ok()) << reclaimed.status();
  ASSERT_TRUE(put.status.ok()) << put.status;
  const auto saved = Save("s", {page});
  ASSERT_TRUE(saved.ok()) << saved.status();
  EXPECT_TRUE(saved->committed);
  Open();
  EXPECT_EQ(store_->recovery().lost_manifest_pages, 0u);
  EXPECT_EQ(Get(page), GetOutcome::kHit);
  // Now it can go.
  EXPECT_GE(*store_->Compact(kForEver), 4 * 128 * kKiB);
  EXPECT_EQ(Get(page), GetOutcome::kHit);
}

TEST_F(RocksdbPageStoreTest, APowerCutAfterTheFirstBarrierDoesNotTakeTheFolderAway) {
  for (uint64_t seed = 0; seed < 4; ++seed) {
    RocksdbPageStoreOptions options = Options();
    options.dir = absl::StrCat(dir_.path(), "/", seed, "/nodes/store");
    Open(options);
    const TestPage page = MakeTestPage(seed);
    ASSERT_TRUE(Put(page).status.ok());
    disk_.CutPower();
    store_.reset();
    disk_.DropUnsynced(seed);
    Open(options);
    EXPECT_EQ(Get(page), GetOutcome::kHit) << "seed " << seed;
  }
}

TEST_F(RocksdbPageStoreTest, APowerCutDuringReclaimLosesNothingProtected) {
  RocksdbPageStoreOptions options = Options();
  options.capacity_bytes = 8 * kMiB;
  options.clock = Clock::Real();
  std::vector<TestPage> pinned;
  for (uint64_t round = 0; round < 10; ++round) {
    Open(options);
    EXPECT_EQ(store_->recovery().lost_manifest_pages, 0u) << "round " << round;
    for (uint64_t i = 0; i < 60; ++i) {
      const TestPage page = MakeTestPage(round * 1000 + i, 128 * kKiB);
      if (!Put(page).status.ok()) break;
      if (i % 30 == 0) {
        const auto saved = Save(absl::StrCat("m", round, ".", i), {page});
        ASSERT_TRUE(saved.ok() && saved->committed) << saved.status();
        pinned.push_back(page);
      }
    }
    disk_.CutPower();
    store_.reset();
    disk_.DropUnsynced(round);
  }
  Open(options);
  EXPECT_GE(pinned.size(), 15u);
  for (const TestPage& page : pinned) EXPECT_EQ(Get(page), GetOutcome::kHit);
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
