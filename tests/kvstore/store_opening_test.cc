// What an opening of the embedded store finds gone or damaged: it refuses, or gives up what it was
// told to give up, and says so.
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <rocksdb/db.h>

#include <algorithm>
#include <atomic>
#include <filesystem>
#include <fstream>
#include <functional>
#include <iterator>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/byte_size.h"
#include "base/error_info.h"
#include "kvstore/rocksdb_page_store.h"
#include "tests/contract/test_page.h"
#include "tests/fault/faulty_disk.h"
#include "tests/kvstore/store_test_util.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::IsEmpty;

const MonotonicTime kForEver = MonotonicTime::InfiniteFuture();

std::string BytesOf(const std::string& file) {
  std::ifstream in(file, std::ios::binary);
  return std::string((std::istreambuf_iterator<char>(in)), std::istreambuf_iterator<char>());
}

class StoreOpeningTest : public ::testing::Test {
 protected:
  RocksdbPageStoreOptions Options() {
    RocksdbPageStoreOptions options;
    options.dir = dir_.path() + "/store";
    options.segment_bytes = kMiB;
    options.file_system = &disk_;
    options.index_env = disk_.env();
    options.clock = &clock_;
    return options;
  }
  absl::Status TryOpen(RocksdbPageStoreOptions options) {
    store_.reset();
    auto store = RocksdbPageStore::Open(std::move(options));
    if (store.ok()) store_ = *std::move(store);
    return store.status();
  }
  absl::Status TryOpen() { return TryOpen(Options()); }
  void Open() {
    const absl::Status opened = TryOpen();
    ASSERT_TRUE(opened.ok()) << opened;
  }
  void ExpectRefused(absl::StatusCode code, const std::string& text) {
    const absl::Status refused = TryOpen();
    EXPECT_EQ(refused.code(), code) << refused;
    EXPECT_THAT(std::string(refused.message()), HasSubstr(text));
  }

  absl::Status Put(const TestPage& page, Durability level = Durability::kLocal) {
    const PutPage put = page.put();
    return store_->PutPages({&put, 1}, level, kForEver)[0].status;
  }
  absl::Status Save(const std::string& name, const std::vector<TestPage>& pages,
                    uint64_t version = 0) {
    ManifestRecord manifest;
    manifest.name = name;
    for (const TestPage& page : pages) manifest.pages.push_back(page.ref());
    const auto saved = store_->PutManifest(manifest, version, std::nullopt, kForEver);
    if (!saved.ok()) return saved.status();
    return saved->committed ? absl::OkStatus() : absl::AbortedError("pages are missing");
  }
  bool HasManifest(const std::string& name) { return store_->GetManifest(name, kForEver).ok(); }
  bool Holds(const TestPage& page) {
    std::vector<std::byte> body(page.body.size());
    const GetPage get{page.meta.key, body, {}};
    return store_->GetPages({&get, 1}, kForEver)[0].outcome == GetOutcome::kHit &&
           body == page.body;
  }

  // The index's log that has `text`, and where; empty if none has.
  std::pair<std::string, uint64_t> FindInLog(const std::string& text) {
    for (const auto& entry : std::filesystem::directory_iterator(Options().dir + "/index")) {
      if (entry.path().extension() != ".log") continue;
      const size_t at = BytesOf(entry.path()).find(text);
      if (at != std::string::npos) return {entry.path(), at};
    }
    return {};
  }
  std::string LastLog() {
    std::string last;
    for (const auto& entry : std::filesystem::directory_iterator(Options().dir + "/index")) {
      if (entry.path().extension() == ".log") last = std::max(last, entry.path().string());
    }
    return last;
  }

  // Changes one value of the index behind the back of a store that is closed.
  void ChangeInIndex(const std::string& family, const std::string& key,
                     const std::function<void(std::string*)>& change) {
    const std::string index = Options().dir + "/index";
    std::vector<std::string> names;
    ASSERT_TRUE(rocksdb::DB::ListColumnFamilies({}, index, &names).ok());
    std::vector<rocksdb::ColumnFamilyDescriptor> families;
    for (const std::string& name : names)
      families.emplace_back(name, rocksdb::ColumnFamilyOptions());
    std::vector<rocksdb::ColumnFamilyHandle*> handles;
    rocksdb::DB* opened = nullptr;
    ASSERT_TRUE(rocksdb::DB::Open({}, index, families, &handles, &opened).ok());
    const std::unique_ptr<rocksdb::DB> db(opened);
    for (rocksdb::ColumnFamilyHandle* handle : handles) {
      if (handle->GetName() == family) {
        std::string value;
        EXPECT_TRUE(db->Get({}, handle, key, &value).ok());
        change(&value);
        EXPECT_TRUE(db->Put({}, handle, key, value).ok());
      }
      db->DestroyColumnFamilyHandle(handle);
    }
  }

  TempDir dir_;
  FaultyDisk disk_;
  FakeClock clock_;
  std::unique_ptr<RocksdbPageStore> store_;
};

// ---- the index's log ---------------------------------------------------------------------------

TEST_F(StoreOpeningTest, ADamagedLogRecordDoesNotRollSavedManifestsBack) {
  Open();
  ASSERT_TRUE(Save("session-first", {}).ok());
  ASSERT_TRUE(Save("session-second", {}).ok());
  store_.reset();
  const auto [log, at] = FindInLog("session-first");
  ASSERT_FALSE(log.empty());
  FlipFileBit(log, at * 8);
  const std::string damaged = BytesOf(log);
  ExpectRefused(absl::StatusCode::kDataLoss, "start once with accept_loss \"log\"");
  // Nothing was changed: what can still be saved is there.
  EXPECT_EQ(BytesOf(log), damaged);
  FlipFileBit(log, at * 8);
  Open();
  EXPECT_TRUE(HasManifest("session-first"));
  EXPECT_TRUE(HasManifest("session-second"));
  EXPECT_THAT(store_->recovery().losses_accepted, IsEmpty());
}

TEST_F(StoreOpeningTest, ADamagedLogOfAKilledStoreIsRefused) {
  Open();
  ASSERT_TRUE(Save("session-first", {}).ok());
  clock_.Advance(Options().mark_period);
  store_->WaitForUpkeep();
  // What a kill leaves.
  std::filesystem::copy(Options().dir, dir_.path() + "/killed",
                        std::filesystem::copy_options::recursive);
  store_.reset();
  std::filesystem::remove_all(Options().dir);
  std::filesystem::rename(dir_.path() + "/killed", Options().dir);
  const auto [log, at] = FindInLog("session-first");
  ASSERT_FALSE(log.empty());
  FlipFileBit(log, at * 8);
  ExpectRefused(absl::StatusCode::kDataLoss, "was durable");
  FlipFileBit(log, at * 8);
  Open();
  EXPECT_TRUE(HasManifest("session-first"));
}

TEST_F(StoreOpeningTest, ALogThatLostItsEndIsRefused) {
  Open();
  ASSERT_TRUE(Save("session-first", {}).ok());
  store_.reset();
  const std::string log = LastLog();
  std::filesystem::resize_file(log, std::filesystem::file_size(log) - 1);
  ExpectRefused(absl::StatusCode::kDataLoss, "was durable");
}

TEST_F(StoreOpeningTest, AMissingIndexIsRefused) {
  Open();
  ASSERT_TRUE(Save("session-first", {}).ok());
  store_.reset();
  std::filesystem::remove_all(Options().dir + "/index");
  ExpectRefused(absl::StatusCode::kDataLoss, "up to mark 0");
  EXPECT_FALSE(std::filesystem::exists(Options().dir + "/index"));
}

TEST_F(StoreOpeningTest, AnAcceptedLossOfTheLogIsSaidAndOpensAsEverAfterwards) {
  Open();
  const TestPage page = MakeTestPage(1);
  ASSERT_TRUE(Put(page).ok());
  ASSERT_TRUE(Save("session-first", {page}).ok());
  Open();  // from here on a new log
  ASSERT_TRUE(Save("session-second", {page}).ok());
  store_.reset();
  const auto [log, at] = FindInLog("session-second");
  ASSERT_FALSE(log.empty());
  FlipFileBit(log, at * 8);
  RocksdbPageStoreOptions options = Options();
  options.accepted_loss.log = true;
  const absl::Status opened = TryOpen(options);
  ASSERT_TRUE(opened.ok()) << opened;
  EXPECT_THAT(store_->recovery().losses_accepted, ElementsAre("log"));
  EXPECT_TRUE(HasManifest("session-first"));
  EXPECT_FALSE(HasManifest("session-second"));
  EXPECT_TRUE(Holds(page));
  ASSERT_TRUE(Save("session-third", {page}).ok());
  Open();
  EXPECT_THAT(store_->recovery().losses_accepted, IsEmpty());
  EXPECT_TRUE(HasManifest("session-third"));
  // And the flag alone gives nothing up.
  ASSERT_TRUE(TryOpen(options).ok());
  EXPECT_THAT(store_->recovery().losses_accepted, IsEmpty());
  EXPECT_TRUE(HasManifest("session-third"));
}

TEST_F(StoreOpeningTest, ATornTailOfTheLogIsNoLoss) {
  Open();
  ASSERT_TRUE(Save("session-first", {}).ok());
  store_.reset();
  std::ofstream(LastLog(), std::ios::binary | std::ios::app) << std::string(700, '\x5a');
  Open();
  EXPECT_TRUE(HasManifest("session-first"));
  // Neither is what a power cut leaves of writes that no barrier covered.
  for (uint64_t seed = 0; seed < 10; ++seed) {
    ASSERT_TRUE(Save(absl::StrCat("saved-", seed), {}).ok());
    for (uint64_t i = 0; i < 20; ++i) {
      ASSERT_TRUE(Put(MakeTestPage(seed * 100 + i), Durability::kProcess).ok());
    }
    disk_.CutPower();
    store_.reset();
    disk_.DropUnsynced(seed);
    Open();
    EXPECT_TRUE(HasManifest(absl::StrCat("saved-", seed)));
  }
}

TEST_F(StoreOpeningTest, APowerCutWhileMarksAreWrittenIsNoLoss) {
  RocksdbPageStoreOptions options = Options();
  options.clock = Clock::Real();
  options.mark_period = absl::ZeroDuration();
  ASSERT_TRUE(TryOpen(options).ok());
  for (uint64_t seed = 0; seed < 12; ++seed) {
    std::atomic<bool> is_cut{false};
    std::thread marks([&] {
      while (!is_cut) store_->WaitForUpkeep();
    });
    uint64_t saved = 0;
    std::thread saver([&] {
      while (Save(absl::StrCat("saved-", seed, ".", saved), {}).ok()) ++saved;
    });
    absl::SleepFor(absl::Milliseconds(10 + 7 * static_cast<int64_t>(seed)));  // some are in flight
    disk_.CutPower();
    is_cut = true;
    saver.join();
    marks.join();
    store_.reset();
    disk_.DropUnsynced(seed);
    const absl::Status opened = TryOpen(options);
    ASSERT_TRUE(opened.ok()) << opened;
    EXPECT_GT(saved, 0u);
    for (uint64_t i = 0; i < saved; ++i) {
      EXPECT_TRUE(HasManifest(absl::StrCat("saved-", seed, ".", i)));
    }
  }
}

TEST_F(StoreOpeningTest, AStoreFromBeforeMarksOpens) {
  Open();
  ASSERT_TRUE(Save("session-first", {}).ok());
  store_.reset();
  std::filesystem::remove(Options().dir + "/log.mark");
  Open();
  EXPECT_TRUE(HasManifest("session-first"));
  ASSERT_TRUE(Save("session-second", {}).ok());
  store_.reset();
  const auto [log, at] = FindInLog("session-second");
  FlipFileBit(log, at * 8);
  ExpectRefused(absl::StatusCode::kDataLoss, "was durable");
}

TEST_F(StoreOpeningTest, AnOpeningBesideARunningStoreIsNotTakenForALoss) {
  Open();
  ASSERT_TRUE(Save("session-first", {}).ok());
  const auto second = RocksdbPageStore::Open(Options());
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable) << second.status();
  EXPECT_TRUE(Save("session-second", {}).ok());
}

// ---- segments ----------------------------------------------------------------------------------

TEST_F(StoreOpeningTest, AMissingFolderOfSegmentsDoesNotEraseTheIndex) {
  const TestPage page = MakeTestPage(1);
  Open();
  ASSERT_TRUE(Put(page).ok());
  ASSERT_TRUE(Save("session", {page}).ok());
  store_.reset();
  const std::string segments = Options().dir + "/segments", away = dir_.path() + "/away";
  std::filesystem::rename(segments, away);
  ExpectRefused(absl::StatusCode::kFailedPrecondition, "accept_loss \"segments\"");
  EXPECT_FALSE(std::filesystem::exists(segments)) << "it may be where a disk is to be mounted";
  // The same where it is mounted on nothing.
  std::filesystem::create_directory(segments);
  ExpectRefused(absl::StatusCode::kFailedPrecondition, "not the segments of this index");
  ExpectRefused(absl::StatusCode::kFailedPrecondition, "not the segments of this index");
  std::filesystem::remove(segments);
  std::filesystem::rename(away, segments);
  Open();
  EXPECT_TRUE(Holds(page));
  EXPECT_EQ(store_->recovery().dropped_entries, 0u);
  EXPECT_THAT(store_->recovery().losses_accepted, IsEmpty());
}

TEST_F(StoreOpeningTest, ASegmentFileThatIsGoneOrCutIsRefusedAndErasesNothing) {
  const TestPage kept = MakeTestPage(1, 700 * kKiB), lost = MakeTestPage(2, 700 * kKiB);
  Open();
  ASSERT_TRUE(Put(kept).ok());
  ASSERT_TRUE(Put(lost).ok());
  ASSERT_TRUE(Save("session", {lost}).ok());
  const std::string file = FindStoredRecord(Options().dir, lost.meta.key).file;
  ASSERT_NE(file, FindStoredRecord(Options().dir, kept.meta.key).file);
  store_.reset();
  const std::string whole = BytesOf(file);
  std::filesystem::resize_file(file, whole.size() / 2);
  ExpectRefused(absl::StatusCode::kFailedPrecondition, "with 1 durable pages are absent");
  std::filesystem::remove(file);
  ExpectRefused(absl::StatusCode::kFailedPrecondition, "with 1 durable pages are absent");
  ExpectRefused(absl::StatusCode::kFailedPrecondition, "with 1 durable pages are absent");
  std::ofstream(file, std::ios::binary) << whole;
  Open();
  EXPECT_TRUE(Holds(lost));
  store_.reset();
  std::filesystem::remove(file);
  RocksdbPageStoreOptions options = Options();
  options.accepted_loss.segments = true;
  const absl::Status opened = TryOpen(options);
  ASSERT_TRUE(opened.ok()) << opened;
  EXPECT_THAT(store_->recovery().losses_accepted, ElementsAre("segments"));
  EXPECT_EQ(store_->recovery().dropped_entries, 1u);
  EXPECT_EQ(store_->recovery().lost_manifest_pages, 1u);
  EXPECT_TRUE(Holds(kept));
  EXPECT_FALSE(Holds(lost));
  ASSERT_TRUE(Put(lost).ok());
  Open();
  EXPECT_THAT(store_->recovery().losses_accepted, IsEmpty());
  EXPECT_TRUE(Holds(lost));
}

TEST_F(StoreOpeningTest, AnAcceptedLossOfAllSegmentsOpensAsEverAfterwards) {
  Open();
  ASSERT_TRUE(Put(MakeTestPage(1)).ok());
  store_.reset();
  std::filesystem::remove_all(Options().dir + "/segments");
  RocksdbPageStoreOptions options = Options();
  options.accepted_loss.segments = true;
  ASSERT_TRUE(TryOpen(options).ok());
  EXPECT_THAT(store_->recovery().losses_accepted, ElementsAre("segments"));
  ASSERT_TRUE(Put(MakeTestPage(2)).ok());
  Open();
  EXPECT_TRUE(Holds(MakeTestPage(2)));
}

TEST_F(StoreOpeningTest, ADamagedIdOfTheSegmentsIsNotAnotherStores) {
  const TestPage page = MakeTestPage(1);
  Open();
  ASSERT_TRUE(Put(page).ok());
  store_.reset();
  const std::string file = Options().dir + "/segments/store.id";
  const std::string id = BytesOf(file);
  for (uint64_t bit = 0; bit < id.size() * 8; bit += 7) {
    std::ofstream(file, std::ios::binary) << id;
    FlipFileBit(file, bit);
    ExpectRefused(absl::StatusCode::kFailedPrecondition, "store.id is absent or damaged");
  }
  RocksdbPageStoreOptions options = Options();
  options.accepted_loss.segments = true;
  ASSERT_TRUE(TryOpen(options).ok());
  EXPECT_TRUE(Holds(page));
  EXPECT_EQ(BytesOf(file), id) << "written anew";
  Open();
}

TEST_F(StoreOpeningTest, TheSegmentsOfAnotherStoreAreNeverTakenForItsOwn) {
  const TestPage page = MakeTestPage(1);
  Open();
  ASSERT_TRUE(Put(page).ok());
  RocksdbPageStoreOptions other = Options();
  other.dir = dir_.path() + "/other";
  ASSERT_TRUE(TryOpen(other).ok());
  ASSERT_TRUE(Put(page).ok());
  store_.reset();
  const std::string segments = Options().dir + "/segments", away = dir_.path() + "/away";
  std::filesystem::rename(segments, away);
  std::filesystem::rename(other.dir + "/segments", segments);
  ExpectRefused(absl::StatusCode::kFailedPrecondition, "are those of another store");
  RocksdbPageStoreOptions options = Options();
  options.accepted_loss.segments = true;
  EXPECT_EQ(TryOpen(options).code(), absl::StatusCode::kFailedPrecondition);
  std::filesystem::rename(segments, other.dir + "/segments");
  std::filesystem::rename(away, segments);
  Open();
  EXPECT_TRUE(Holds(page));
  ASSERT_TRUE(TryOpen(other).ok());
  EXPECT_TRUE(Holds(page));
}

TEST_F(StoreOpeningTest, VersionsOfADeletedManifestDoNotComeBack) {
  Open();
  ASSERT_TRUE(Save("session", {}).ok());
  ASSERT_TRUE(Save("session", {}, 1).ok());
  ASSERT_TRUE(store_->DeleteManifest("session", 2, std::nullopt, kForEver).ok());
  Open();
  ASSERT_TRUE(Save("session", {}).ok());
  EXPECT_EQ(store_->GetManifest("session", kForEver)->version, 3u);
}

// ---- manifests ---------------------------------------------------------------------------------

class UnreadableManifestTest : public StoreOpeningTest {
 protected:
  RocksdbPageStoreOptions SmallOptions() {
    RocksdbPageStoreOptions options = Options();
    options.capacity_bytes = 8 * kMiB;
    options.clock = Clock::Real();
    options.put_wait = absl::Milliseconds(500);
    options.put_grace = absl::ZeroDuration();
    return options;
  }
  // A store with a manifest that names `page_` and cannot be read.
  void SetUp() override {
    ASSERT_TRUE(TryOpen(SmallOptions()).ok());
    ASSERT_TRUE(Put(page_).ok());
    ASSERT_TRUE(Save("session", {page_}).ok());
    store_.reset();
    ChangeInIndex("manifests", "session", [](std::string* value) { value->at(20) ^= 1; });
  }
  // Puts three times what the store can hold; OK if all was taken.
  absl::Status Fill() {
    absl::Status first_refusal;
    for (uint64_t i = 0; i < 192; ++i) {
      first_refusal.Update(Put(MakeTestPage(next_++, 128 * kKiB), Durability::kProcess));
    }
    return first_refusal;
  }

  const TestPage page_ = MakeTestPage(1, 128 * kKiB);
  uint64_t next_ = 100;
};

TEST_F(UnreadableManifestTest, ItsPagesAreNotEvictedUnderIt) {
  ASSERT_TRUE(TryOpen(SmallOptions()).ok());
  EXPECT_EQ(store_->num_unreadable_manifests(), 1u);
  EXPECT_THAT(store_->recovery().losses_accepted, IsEmpty());
  EXPECT_EQ(store_->GetManifest("session", kForEver).status().code(), absl::StatusCode::kDataLoss);
  EXPECT_EQ(*store_->DeletePages({&page_.meta.key, 1}, kForEver), 0u);
  const absl::Status full = Fill();
  EXPECT_EQ(GetReason(full), "STORE_FULL") << full;
  EXPECT_EQ(store_->GetStats(kForEver)->pages_evicted, 0u);
  EXPECT_TRUE(Holds(page_));
  // Once its owner has given it up, room is made again.
  EXPECT_EQ(GetReason(store_->DeleteManifest("session", 2, std::nullopt, kForEver)),
            error_reason::kVersionMismatch);
  const absl::Status deleted = store_->DeleteManifest("session", 1, std::nullopt, kForEver);
  ASSERT_TRUE(deleted.ok()) << deleted;
  EXPECT_EQ(store_->num_unreadable_manifests(), 0u);
  EXPECT_EQ(store_->GetStats(kForEver)->manifests, 0u);
  EXPECT_TRUE(Fill().ok());
  EXPECT_GT(store_->GetStats(kForEver)->pages_evicted, 0u);
  ASSERT_TRUE(TryOpen(SmallOptions()).ok());
  EXPECT_EQ(store_->num_unreadable_manifests(), 0u);
  EXPECT_TRUE(absl::IsNotFound(store_->GetManifest("session", kForEver).status()));
}

TEST_F(UnreadableManifestTest, MayBeGivenUpForOneOpening) {
  RocksdbPageStoreOptions options = SmallOptions();
  options.accepted_loss.manifests = true;
  ASSERT_TRUE(TryOpen(options).ok());
  EXPECT_THAT(store_->recovery().losses_accepted, ElementsAre("manifests"));
  EXPECT_EQ(store_->num_unreadable_manifests(), 1u) << "it is still there to be seen";
  EXPECT_TRUE(Fill().ok());
  EXPECT_GT(store_->GetStats(kForEver)->pages_evicted, 0u);
}

TEST_F(UnreadableManifestTest, CanBeDeletedWhereItsListEntryIsDamagedToo) {
  ChangeInIndex("manifest_entries", "session", [](std::string* value) { value->resize(9); });
  ASSERT_TRUE(TryOpen(SmallOptions()).ok());
  EXPECT_EQ(store_->num_unreadable_manifests(), 1u);
  EXPECT_TRUE(store_->DeleteManifest("session", 0, std::nullopt, kForEver).ok());
  EXPECT_EQ(store_->num_unreadable_manifests(), 0u);
}

}  // namespace
}  // namespace pagetide
