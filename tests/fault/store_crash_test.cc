// Crash campaigns on the page store. `kill -9` of the real pagetide-store with writes in flight,
// and power cuts under a store of this process; an oracle's journal outside the system says what
// must be there. Each campaign prints one JSON line. Planted bugs prove that the checker can fail.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <random>
#include <thread>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "kvstore/remote_page_store.h"
#include "kvstore/rocksdb_page_store.h"
#include "rpc/channel.h"
#include "tests/fault/faulty_disk.h"
#include "tests/fault/oracle_journal.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::TempDir;

constexpr int kKills = 20;
constexpr uint64_t kMinAcked = 5000;
constexpr int kWriters = 4;
constexpr size_t kBatch = 8;

uint64_t CampaignSeed() {
  uint64_t seed = 0;
  const char* given = std::getenv("PAGETIDE_TEST_SEED");
  if (given != nullptr && absl::SimpleAtoi(given, &seed)) return seed;
  return std::random_device{}();
}

double SecondsSince(MonotonicTime start) {
  return absl::ToDoubleSeconds(Clock::Real()->MonotonicNow() - start);
}

// Writers that put batches of pages at LOCAL, now and then a manifest over the last batch, and keep
// the journal, until Stop or until the store is gone.
class Load {
 public:
  Load(PageStore* store, OracleJournal* journal, int round, bool acknowledge_early)
      : store_(store), journal_(journal), round_(round), acknowledge_early_(acknowledge_early) {
    for (int w = 0; w < kWriters; ++w) threads_.emplace_back([this, w] { Write(w); });
  }
  ~Load() { Join(); }
  void Join() {
    stop_ = true;
    for (std::thread& t : threads_) {
      if (t.joinable()) t.join();
    }
  }
  uint64_t acked() const { return acked_; }
  int in_flight() const { return in_flight_; }
  bool has_ended() const { return ended_ == kWriters; }

 private:
  void Write(int writer) {
    for (uint64_t n = 0; !stop_; ++n) {
      std::vector<uint64_t> seeds;
      std::vector<TestPage> pages;
      std::vector<PutPage> puts;
      for (size_t i = 0; i < kBatch; ++i) {
        seeds.push_back(((static_cast<uint64_t>(round_) * kWriters + writer) << 32) + n * kBatch +
                        i);
        pages.push_back(MakeTestPage(seeds.back(), 4096 + seeds.back() * 7919 % 12288));
      }
      for (const TestPage& page : pages) puts.push_back(page.put());
      journal_->Intend(pages, seeds);
      if (acknowledge_early_) Acknowledge(seeds);
      ++in_flight_;
      const MonotonicTime deadline = Clock::Real()->MonotonicNow() + absl::Seconds(20);
      const auto results = store_->PutPages(puts, Durability::kLocal, deadline);
      --in_flight_;
      std::vector<uint64_t> acked;
      for (size_t i = 0; i < results.size(); ++i) {
        if (results[i].status.ok()) acked.push_back(seeds[i]);
      }
      if (!acked.empty() && !acknowledge_early_) Acknowledge(acked);
      if (acked.size() < kBatch) break;  // the store is gone
      if (n % 4 == 0 && !SaveManifest(absl::StrCat(round_, ".", writer, ".", n), pages, seeds))
        break;
    }
    ++ended_;
  }
  void Acknowledge(const std::vector<uint64_t>& seeds) {
    journal_->Acknowledge(seeds);
    acked_ += seeds.size();
  }
  bool SaveManifest(const std::string& name, const std::vector<TestPage>& pages,
                    const std::vector<uint64_t>& seeds) {
    ManifestRecord manifest;
    manifest.name = name;
    for (const TestPage& page : pages) manifest.pages.push_back(page.ref());
    ++in_flight_;
    const auto put = store_->PutManifest(manifest, 0, std::nullopt,
                                         Clock::Real()->MonotonicNow() + absl::Seconds(20));
    --in_flight_;
    if (!put.ok() || !put->committed) return false;
    journal_->AcknowledgeManifest(name, seeds);
    return true;
  }

  PageStore* const store_;
  OracleJournal* const journal_;
  const int round_;
  const bool acknowledge_early_;  // planted: the acknowledgement does not wait for the store
  std::atomic<bool> stop_{false};
  std::atomic<uint64_t> acked_{0};
  std::atomic<int> in_flight_{0};
  std::atomic<int> ended_{0};
  std::vector<std::thread> threads_;
};

// Waits until the round has its share of acknowledgements and a write is in flight right now.
bool WaitForMomentToKill(const Load& load, uint64_t min_acked, std::mt19937_64* rng) {
  const MonotonicTime give_up = Clock::Real()->MonotonicNow() + absl::Seconds(120);
  while (load.acked() < min_acked && !load.has_ended()) {
    if (give_up < Clock::Real()->MonotonicNow()) return false;
    std::this_thread::sleep_for(std::chrono::microseconds(200));
  }
  std::this_thread::sleep_for(std::chrono::microseconds((*rng)() % 20000));
  while (load.in_flight() == 0 && !load.has_ended()) {
    if (give_up < Clock::Real()->MonotonicNow()) return false;
  }
  return !load.has_ended();
}

// ---- kill -9 -----------------------------------------------------------------------------------

CampaignResult RunKillCampaign(int kills, uint64_t min_acked, bool acknowledge_early) {
  CampaignResult result;
  result.seed = CampaignSeed();
  std::mt19937_64 rng(result.seed);
  TempDir dir;
  OracleJournal journal(dir / "journal");
  const auto start_store = [&] {
    return ChildProcess::Start(
        {.program = "pagetide-store",
         .args = {"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0",
                  absl::StrCat("--data-dir=", dir / "data"), "--log-level=warning"}});
  };
  for (int round = 0; round < kills; ++round) {
    const MonotonicTime start = Clock::Real()->MonotonicNow();
    auto process = start_store();
    if (!process.ok()) {
      ADD_FAILURE() << process.status();
      break;
    }
    RemotePageStore store(MakeChannel((*process)->Address("grpc"), {.own_connection = true}));
    EXPECT_TRUE(store.GetStats(start + absl::Seconds(90)).ok());
    if (round > 0) result.recovery_seconds.push_back(SecondsSince(start));
    Load load(&store, &journal, round, acknowledge_early);
    if (WaitForMomentToKill(load, min_acked / static_cast<uint64_t>(kills) + 1, &rng)) {
      ++result.kills_in_flight;
    }
    (*process)->Kill();
    ++result.kills;
    load.Join();
  }
  const MonotonicTime start = Clock::Real()->MonotonicNow();
  auto process = start_store();
  if (!process.ok()) {
    ADD_FAILURE() << process.status();
    return result;
  }
  RemotePageStore store(MakeChannel((*process)->Address("grpc"), {.own_connection = true}));
  EXPECT_TRUE(store.GetStats(start + absl::Seconds(90)).ok());
  result.recovery_seconds.push_back(SecondsSince(start));
  VerifyAgainstJournal(journal.Read(), &store, &result);
  const auto stats = store.GetStats(MonotonicTime::InfiniteFuture());
  EXPECT_TRUE(stats.ok()) << stats.status();
  EXPECT_EQ(stats.ok() ? stats->pages_evicted : 1u, 0u);
  EXPECT_EQ((*process)->Terminate().value_or(-1), 0) << "a drained store exits with 0";
  return result;
}

TEST(StoreCrashTest, KillNineLosesNothingThatWasAcknowledged) {
  const CampaignResult result = RunKillCampaign(kKills, kMinAcked, /*acknowledge_early=*/false);
  std::printf("%s\n", result.ToJson("kill9_store").c_str());
  EXPECT_EQ(result.kills, kKills);
  EXPECT_EQ(result.kills_in_flight, kKills) << "writes were in flight at every kill";
  EXPECT_GE(result.acked, kMinAcked);
  EXPECT_EQ(result.lost, 0u);
  EXPECT_EQ(result.wrong, 0u);
  EXPECT_GT(result.manifests_acked, 0u);
  EXPECT_EQ(result.manifests_lost, 0u);
  for (const double seconds : result.recovery_seconds) {
    EXPECT_LT(absl::Seconds(seconds), testing::Promised(absl::Seconds(2)));
  }
}

TEST(StoreCrashTest, PlantedAcknowledgementBeforeTheWriteIsCaughtByKillNine) {
  // A kill may spare what was acknowledged too early: again until one does not.
  uint64_t lost = 0;
  for (int attempt = 0; attempt < 30 && lost == 0; ++attempt) {
    const CampaignResult result = RunKillCampaign(3, 200, /*acknowledge_early=*/true);
    std::printf("%s\n", result.ToJson("kill9_store_planted").c_str());
    lost = result.lost;
  }
  EXPECT_GT(lost, 0u) << "the checker must see this bug";
}

// ---- power cuts --------------------------------------------------------------------------------

CampaignResult RunPowerCutCampaign(int cuts, uint64_t min_acked, bool ignore_syncs) {
  CampaignResult result;
  result.seed = CampaignSeed();
  std::mt19937_64 rng(result.seed);
  TempDir dir;
  OracleJournal journal(dir / "journal");
  FaultyDisk disk;
  const auto open = [&] {
    return RocksdbPageStore::Open({.dir = dir / "data",
                                   .segment_bytes = uint64_t{1} << 20,
                                   .file_system = &disk,
                                   .index_env = disk.env()});
  };
  for (int round = 0; round < cuts; ++round) {
    disk.set_ignore_syncs(false);
    const MonotonicTime start = Clock::Real()->MonotonicNow();
    auto store = open();
    if (!store.ok()) {
      ADD_FAILURE() << store.status();
      break;
    }
    if (round > 0) result.recovery_seconds.push_back(SecondsSince(start));
    disk.set_ignore_syncs(ignore_syncs);
    {
      Load load(store->get(), &journal, round, /*acknowledge_early=*/false);
      if (WaitForMomentToKill(load, min_acked / static_cast<uint64_t>(cuts) + 1, &rng)) {
        ++result.kills_in_flight;
      }
      disk.CutPower();
      ++result.kills;
    }
    store->reset();
    disk.DropUnsynced(rng());
  }
  disk.set_ignore_syncs(false);
  const MonotonicTime start = Clock::Real()->MonotonicNow();
  auto store = open();
  if (!store.ok()) {
    // With the planted bug even the index may be beyond repair: everything is lost then.
    EXPECT_TRUE(ignore_syncs) << store.status();
    for (const auto& [seed, entry] : journal.Read().pages) result.lost += entry.acked ? 1 : 0;
    return result;
  }
  result.recovery_seconds.push_back(SecondsSince(start));
  VerifyAgainstJournal(journal.Read(), store->get(), &result);
  if (!ignore_syncs) {
    EXPECT_EQ((*store)->recovery().lost_manifest_pages, 0u);
    EXPECT_GT(disk.dropped_bytes(), 0u) << "the cuts must have cost something";
  }
  return result;
}

TEST(StoreCrashTest, PowerCutsLoseNothingThatWasAcknowledged) {
  const CampaignResult result = RunPowerCutCampaign(kKills, kMinAcked, /*ignore_syncs=*/false);
  std::printf("%s\n", result.ToJson("power_cut_store").c_str());
  EXPECT_EQ(result.kills, kKills);
  EXPECT_EQ(result.kills_in_flight, kKills);
  EXPECT_GE(result.acked, kMinAcked);
  EXPECT_EQ(result.lost, 0u);
  EXPECT_EQ(result.wrong, 0u);
  EXPECT_GT(result.manifests_acked, 0u);
  EXPECT_EQ(result.manifests_lost, 0u);
  for (const double seconds : result.recovery_seconds) {
    EXPECT_LT(absl::Seconds(seconds), testing::Promised(absl::Seconds(2)));
  }
}

TEST(StoreCrashTest, PlantedAcknowledgementBeforeFsyncIsCaughtByPowerCuts) {
  uint64_t lost = 0;
  for (int attempt = 0; attempt < 30 && lost == 0; ++attempt) {
    const CampaignResult result = RunPowerCutCampaign(1, 500, /*ignore_syncs=*/true);
    std::printf("%s\n", result.ToJson("power_cut_store_planted").c_str());
    lost = result.lost;
    EXPECT_EQ(result.wrong, 0u) << "even then never wrong bytes";
  }
  EXPECT_GT(lost, 0u) << "the checker must see this bug";
}

}  // namespace
}  // namespace pagetide
