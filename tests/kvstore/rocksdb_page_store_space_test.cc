// The embedded store's space: what it takes, what it drops for it and in which order, what protects
// a page.
#include "kvstore/rocksdb_page_store.h"

#include <filesystem>
#include <map>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "base/byte_size.h"
#include "base/error_info.h"
#include "base/mutex.h"
#include "kvstore/failpoint.h"
#include "kvstore/page_record.h"
#include "tests/kvstore/rocksdb_store_fixture.h"
#include "tests/support/timing.h"

namespace pagetide {
namespace {

// What the store's files take at one moment. Reclaim moves pages from file to file meanwhile, and a
// listing that it overtakes counts them twice: two listings in a row must agree.
uint64_t BytesIn(const std::string& dir) {
  const auto list = [&] {
    std::map<std::string, uint64_t> files;
    for (const auto& entry : std::filesystem::recursive_directory_iterator(dir)) {
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

class RocksdbStoreSpaceTest : public RocksdbPageStoreTest {
 protected:
  uint64_t BytesOnDisk() { return BytesIn(dir_.path()); }
};

// Two puts, the second while the first one stands at the failpoint: let in, and not ended.
TEST_F(RocksdbStoreSpaceTest, OfTwoPutsThatDoNotBothFitOnTheDiskOneIsRefused) {
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

TEST_F(RocksdbStoreSpaceTest, OfTwoPutsThatDoNotBothFitIntoTheCapacityOneIsRefused) {
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

TEST_F(RocksdbStoreSpaceTest, TheLastOfTheDiskIsForWhatReleasesOnly) {
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

TEST_F(RocksdbStoreSpaceTest, AFullDiskDropsWhatMayGoBeforeItRefusesAPut) {
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

TEST_F(RocksdbStoreSpaceTest, AFullDiskOfProtectedPagesRefusesPutsUntilSomethingIsReleased) {
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

TEST_F(RocksdbStoreSpaceTest, CopiesOfReclaimLeaveTheirReserve) {
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

TEST_F(RocksdbStoreSpaceTest, StaysWithinItsCapacityWithAFifthPinned) {
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

TEST_F(RocksdbStoreSpaceTest, EvictsByRecencyAndKeepsTheOrderOverARestart) {
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

TEST_F(RocksdbStoreSpaceTest, PriorityOutlivesRecencyAndSurvivesARestart) {
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

TEST_F(RocksdbStoreSpaceTest, APinSurvivesARestartAndEndsByBothClocks) {
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

TEST_F(RocksdbStoreSpaceTest, AnEndOfAManifestSurvivesARestart) {
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

TEST_F(RocksdbStoreSpaceTest, ChildrenSurviveARestart) {
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

TEST_F(RocksdbStoreSpaceTest, TheBackgroundFindsDamageAtItsRate) {
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

TEST_F(RocksdbStoreSpaceTest, APrefixOutlivesWhatContinuesIt) {
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

TEST_F(RocksdbStoreSpaceTest, AFullStoreOfProtectedPagesRefusesPutsAndServesReads) {
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

TEST_F(RocksdbStoreSpaceTest, APutThatWaitsForRoomDoesNotBlockTheReclaimOfItsDamagedPage) {
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

TEST_F(RocksdbStoreSpaceTest, APagePutForAManifestIsNotEvictedBeforeItIsNamed) {
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

TEST_F(RocksdbStoreSpaceTest, TheVersionBeforeCanStillBeLoadedWhenANewOneWasSaved) {
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

TEST_F(RocksdbStoreSpaceTest, CompactGivesBackDeadBytes) {
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

TEST_F(RocksdbStoreSpaceTest, ASegmentStaysWhileAPutIntoItHasNotEnded) {
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

TEST_F(RocksdbStoreSpaceTest, APowerCutAfterTheFirstBarrierDoesNotTakeTheFolderAway) {
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

TEST_F(RocksdbStoreSpaceTest, APowerCutDuringReclaimLosesNothingProtected) {
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

}  // namespace
}  // namespace pagetide
