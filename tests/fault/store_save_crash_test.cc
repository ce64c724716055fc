// Saves under power cuts and kills: savers put pages, then the manifest that names them, again and
// again, each session a growing list of pages; the power is cut, or the store kills itself, at a
// named failpoint between page writes, barrier, manifest and acknowledgement. After each,
// everything is compared with what the oracle, which is outside the store, knows was promised: an
// acknowledged save is there, whole; one that was not acknowledged is there whole or not at all; a
// writer of an epoch that was taken over is refused. At each manifest an evictor tries to drop the
// pages that it names. The same campaign with a planted bug must find it.
//
// PAGETIDE_CRASH_CUTS and PAGETIDE_CRASH_KILLS set how many (the full campaign: 2000 and 500),
// PAGETIDE_TEST_SEED repeats one. One JSON line a campaign.
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <thread>
#include <vector>

#include "absl/functional/function_ref.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "base/error_info.h"
#include "kvstore/failpoint.h"
#include "kvstore/remote_page_store.h"
#include "kvstore/rocksdb_page_store.h"
#include "rpc/channel.h"
#include "tests/contract/test_page.h"
#include "tests/fault/faulty_disk.h"
#include "tests/support/process.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::TempDir;

constexpr int kSavers = 3;
constexpr char kOwned[] = "sessions";  // one ownership record for all: takeovers hit every saver
constexpr const char* kFailpoints[] = {
    "put.before_body",         "put.before_index",       "put.done",
    "barrier.before_segments", "barrier.before_lengths", "barrier.done",
    "manifest.protected",      "manifest.pages_durable", "manifest.before_acknowledgement"};

uint64_t FromEnvironment(const char* name, uint64_t otherwise) {
  uint64_t value = 0;
  const char* given = std::getenv(name);
  return given != nullptr && absl::SimpleAtoi(given, &value) ? value : otherwise;
}

MonotonicTime In(absl::Duration d) {
  return Clock::Real()->MonotonicNow() + d;
}

TestPage PageOf(uint64_t seed) {
  return MakeTestPage(seed, 2048 + seed * 7919 % 6144, /*keyed=*/seed % 3 != 0);
}

// What was promised. Thread-safe.
class SaveOracle {
 public:
  struct Findings {
    uint64_t acked = 0, lost = 0, half_visible = 0, wrong = 0;
    uint64_t unacked_found = 0, unacked_absent = 0;  // both are right
    uint64_t stale_attempted = 0, stale_refused = 0, stale_accepted = 0;
    uint64_t evictions_attempted = 0;
    uint64_t pages_verified = 0, bytes_verified = 0;
  };

  void Intend(const std::string& name, uint64_t version, std::vector<uint64_t> seeds) {
    MutexLock lock(&mu_);
    Session& session = sessions_[name];
    session.intended_version = version;
    session.intended = std::move(seeds);
  }
  void Acknowledge(const std::string& name, uint64_t version) {
    MutexLock lock(&mu_);
    Session& session = sessions_[name];
    session.acked_version = version;
    session.acked = session.intended;
    session.acked_before[version] = session.acked;
    ++findings_.acked;
  }
  void CountStale(bool refused) {
    MutexLock lock(&mu_);
    ++findings_.stale_attempted;
    ++(refused ? findings_.stale_refused : findings_.stale_accepted);
  }
  void CountEviction() {
    MutexLock lock(&mu_);
    ++findings_.evictions_attempted;
  }
  // The version and pages that a saver goes on from.
  std::pair<uint64_t, std::vector<uint64_t>> Last(const std::string& name) const {
    MutexLock lock(&mu_);
    const auto it = sessions_.find(name);
    if (it == sessions_.end()) return {};
    return {it->second.acked_version, it->second.acked};
  }

  // Compares what a store that was just opened holds with what was promised. What it holds counts
  // as promised from now on.
  void Verify(PageStore* store) {
    MutexLock lock(&mu_);
    for (auto& [name, session] : sessions_) {
      const auto manifest = store->GetManifest(name, In(absl::Seconds(30)));
      if (!manifest.ok() && !absl::IsNotFound(manifest.status())) {
        ADD_FAILURE() << manifest.status();
      }
      const uint64_t version = manifest.ok() ? manifest->version : 0;
      const bool was_in_flight = session.intended_version > session.acked_version;
      if (version < session.acked_version || version > session.intended_version) {
        ++findings_.lost;
        // Savers go on from what is there, or nothing of the rest of a campaign would be done.
        const auto before = session.acked_before.find(version);
        session.acked_version = session.intended_version = version;
        session.acked = session.intended =
            before == session.acked_before.end() ? std::vector<uint64_t>() : before->second;
        continue;
      }
      const bool is_acked = version == session.acked_version;
      if (was_in_flight) ++(is_acked ? findings_.unacked_absent : findings_.unacked_found);
      const std::vector<uint64_t>& seeds = is_acked ? session.acked : session.intended;
      if (version > 0 && !HoldsAll(*manifest, seeds, store)) {
        ++(is_acked ? findings_.lost : findings_.half_visible);
      }
      session.acked_version = session.intended_version = version;
      session.acked = session.intended = seeds;
      session.acked_before[version] = session.acked;
    }
  }
  Findings findings() const {
    MutexLock lock(&mu_);
    return findings_;
  }

 private:
  struct Session {
    uint64_t acked_version = 0, intended_version = 0;
    std::vector<uint64_t> acked, intended;
    std::map<uint64_t, std::vector<uint64_t>> acked_before;  // by version
  };

  bool HoldsAll(const ManifestRecord& manifest, const std::vector<uint64_t>& seeds,
                PageStore* store) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_) {
    if (manifest.pages.size() != seeds.size()) return false;
    bool whole = true;
    for (size_t i = 0; i < seeds.size(); ++i) {
      const TestPage page = PageOf(seeds[i]);
      std::vector<std::byte> body(page.body.size());
      const GetPage get{manifest.pages[i].key, body, manifest.pages[i].checksum};
      const GetPageResult got = store->GetPages({&get, 1}, In(absl::Seconds(30)))[0];
      EXPECT_TRUE(got.status.ok()) << got.status;
      if (manifest.pages[i].key != page.meta.key || got.outcome != GetOutcome::kHit) {
        whole = false;
        continue;
      }
      if (body != page.body) ++findings_.wrong;
      ++findings_.pages_verified;
      findings_.bytes_verified += body.size();
    }
    return whole;
  }

  mutable Mutex mu_;
  std::map<std::string, Session> sessions_ ABSL_GUARDED_BY(mu_);
  Findings findings_ ABSL_GUARDED_BY(mu_);
};

// Polls are for what other threads and processes do by themselves.
void Pause() {
  std::this_thread::sleep_for(std::chrono::microseconds(200));
}

// Keys that the save of this thread names; for the evictor, which is called on the same thread.
thread_local std::vector<PageKey> keys_of_this_save;

// Savers over one life of a store, until it is gone or they are told to stop. Meanwhile ownership
// is taken over; a saver learns of it by being refused.
class Savers {
 public:
  // `epoch`: of the ownership record now. It is taken over before the first save, so that all begin
  // with an epoch that is not theirs any more.
  Savers(PageStore* store, SaveOracle* oracle, uint64_t round, uint64_t epoch)
      : store_(store), oracle_(oracle), round_(round), owner_epoch_(epoch) {
    TakeOver();
    for (int s = 0; s < kSavers; ++s) threads_.emplace_back([this, s, epoch] { Save(s, epoch); });
    threads_.emplace_back([this] {
      while (!stop_ && num_saved_ < kSavers && num_ended_ < kSavers) Pause();
      if (!stop_) TakeOver();
    });
  }
  ~Savers() {
    stop_ = true;
    for (std::thread& t : threads_) t.join();
  }

 private:
  void TakeOver() {
    const auto taken =
        store_->CompareAndSetRecord("owner", kOwned, owner_epoch_, "next", In(absl::Seconds(20)));
    // If not, the store is gone; whether it happened shows when it is back.
    if (taken.ok()) owner_epoch_ = *taken;
  }

  void Save(int saver, uint64_t epoch) {
    const std::string name = absl::StrCat("session-", saver);
    auto [version, seeds] = oracle_->Last(name);
    for (uint64_t n = 0; !stop_; ++n) {
      std::mt19937_64 rng(round_ * 1000003 + n * 17 + static_cast<uint64_t>(saver));
      std::vector<uint64_t> next = seeds;
      // A session that has grown long begins anew with its last pages.
      const bool is_cut = next.size() > 12;
      if (is_cut) next.erase(next.begin(), next.end() - 3);
      const size_t kept = is_cut ? 0 : next.size();
      std::vector<TestPage> fresh;
      for (size_t i = 0, count = 1 + rng() % 3; i < count; ++i) {
        next.push_back((round_ << 32) + n * 64 + i * 16 + static_cast<uint64_t>(saver));
        fresh.push_back(PageOf(next.back()));
      }
      std::vector<PutPage> puts;
      for (const TestPage& page : fresh) puts.push_back(page.put());
      ManifestRecord manifest;
      manifest.name = name;
      manifest.request_id = absl::StrCat(round_, ".", n);
      manifest.keep_pages = kept;
      keys_of_this_save.clear();
      for (size_t i = kept; i < next.size(); ++i) manifest.pages.push_back(PageOf(next[i]).ref());
      for (const uint64_t seed : next) keys_of_this_save.push_back(PageOf(seed).meta.key);
      oracle_->Intend(name, version + 1, next);
      for (const PutPageResult& put :
           store_->PutPages(puts, Durability::kProcess, In(absl::Seconds(20)))) {
        if (!put.status.ok()) return End();
      }
      for (;;) {
        const bool is_stale = epoch < owner_epoch_;
        const auto saved = store_->PutManifest(manifest, version, WriteFence{kOwned, epoch},
                                               In(absl::Seconds(20)));
        if (saved.ok() && saved->committed) {
          if (is_stale) oracle_->CountStale(/*refused=*/false);
          break;
        }
        if (GetReason(saved.status()) == error_reason::kStaleEpoch) {
          if (is_stale) oracle_->CountStale(/*refused=*/true);
          epoch = owner_epoch_;
          if (stop_ || num_ended_ > 0) return End();
          continue;
        }
        if (!saved.ok()) return End();
        // Only with a planted bug: what an earlier manifest named is gone.
        std::vector<TestPage> again;
        puts.clear();
        for (const uint64_t seed : next) again.push_back(PageOf(seed));
        for (const TestPage& page : again) puts.push_back(page.put());
        store_->PutPages(puts, Durability::kProcess, In(absl::Seconds(20)));
      }
      oracle_->Acknowledge(name, ++version);
      seeds = std::move(next);
      ++num_saved_;
    }
    End();
  }
  void End() { ++num_ended_; }

  PageStore* const store_;
  SaveOracle* const oracle_;
  const uint64_t round_;
  std::atomic<uint64_t> owner_epoch_;  // of the last takeover that was answered
  std::atomic<bool> stop_{false};
  std::atomic<int> num_saved_{0};
  std::atomic<int> num_ended_{0};
  std::vector<std::thread> threads_;
};

uint64_t OwnerEpoch(PageStore* store) {
  const auto owner = store->GetRecord("owner", kOwned, In(absl::Seconds(30)));
  EXPECT_TRUE(owner.ok() || absl::IsNotFound(owner.status())) << owner.status();
  return owner.ok() ? owner->version : 0;
}

struct Campaign {
  std::string name;
  uint64_t seed = 0;
  uint64_t crashes = 0;
  std::map<std::string, uint64_t> crashes_at;  // by failpoint: each was reached
  std::vector<double> recovery_seconds;
  uint64_t dropped_bytes = 0;
  SaveOracle oracle;

  void Print() {
    const SaveOracle::Findings f = oracle.findings();
    std::sort(recovery_seconds.begin(), recovery_seconds.end());
    const auto at = [this](double q) {
      if (recovery_seconds.empty()) return 0.0;
      return recovery_seconds[std::min(
          recovery_seconds.size() - 1,
          static_cast<size_t>(q * static_cast<double>(recovery_seconds.size())))];
    };
    std::string points;
    for (const auto& [point, hits] : crashes_at) {
      absl::StrAppend(&points, points.empty() ? "" : ",", "\"", point, "\":", hits);
    }
    absl::PrintF(
        "{\"campaign\":\"%s\",\"crashes\":%d,\"acked\":%d,\"lost\":%d,\"half_visible\":%d,"
        "\"wrong\":%d,\"unacked_found\":%d,\"unacked_absent\":%d,\"stale_attempted\":%d,"
        "\"stale_refused\":%d,\"stale_accepted\":%d,\"evictions_attempted\":%d,"
        "\"pages_verified\":%d,\"bytes_verified\":%d,\"dropped_bytes\":%d,\"crashes_at\":{%s},"
        "\"recovery_p50\":%.3f,\"recovery_p99\":%.3f,\"recovery_max\":%.3f,\"seed\":%d}\n",
        name, crashes, f.acked, f.lost, f.half_visible, f.wrong, f.unacked_found, f.unacked_absent,
        f.stale_attempted, f.stale_refused, f.stale_accepted, f.evictions_attempted,
        f.pages_verified, f.bytes_verified, dropped_bytes, points, at(0.5), at(0.99), at(1), seed);
    std::fflush(stdout);
  }
};

uint64_t CampaignSeed() {
  return FromEnvironment("PAGETIDE_TEST_SEED", std::random_device{}());
}

// ---- power cuts --------------------------------------------------------------------------------

void RunPowerCuts(Campaign* campaign, uint64_t cuts, const std::vector<std::string>& failpoints) {
  campaign->seed = CampaignSeed();
  std::mt19937_64 rng(campaign->seed);
  TempDir dir;
  FaultyDisk disk;
  const auto open = [&] {
    const MonotonicTime start = Clock::Real()->MonotonicNow();
    auto store = RocksdbPageStore::Open({.dir = dir / "data",
                                         .segment_bytes = uint64_t{1} << 20,
                                         .file_system = &disk,
                                         .index_env = disk.env()});
    campaign->recovery_seconds.push_back(
        absl::ToDoubleSeconds(Clock::Real()->MonotonicNow() - start));
    return store;
  };
  for (uint64_t round = 0; round <= cuts; ++round) {
    auto store = open();
    if (!store.ok()) {
      ADD_FAILURE() << store.status();
      return;
    }
    campaign->oracle.Verify(store->get());
    if (round == cuts) return;
    const uint64_t epoch = OwnerEpoch(store->get());
    const std::string& point = failpoints[round % failpoints.size()];
    std::atomic<int64_t> hits_left{static_cast<int64_t>(4 + rng() % 8)};
    std::atomic<bool> is_cut{false};
    SetFailpointObserver([&](const char* name) {
      const absl::string_view at(name);
      if (!is_cut && (at == "manifest.protected" || at == "manifest.pages_durable") &&
          !keys_of_this_save.empty()) {
        campaign->oracle.CountEviction();
        (*store)->DeletePages(keys_of_this_save, In(absl::Seconds(20))).IgnoreError();
      }
      if (at == point && hits_left.fetch_sub(1) == 1) {
        disk.CutPower();
        is_cut = true;
      }
    });
    {
      Savers savers(store->get(), &campaign->oracle, round + 1, epoch);
      const MonotonicTime give_up = In(absl::Seconds(60));
      while (!is_cut && Clock::Real()->MonotonicNow() < give_up) Pause();
    }
    SetFailpointObserver(nullptr);
    EXPECT_TRUE(is_cut) << point << " was not reached";
    if (is_cut) {
      ++campaign->crashes;
      ++campaign->crashes_at[point];
    }
    if (!is_cut) disk.CutPower();
    store->reset();
    disk.DropUnsynced(rng());
    campaign->dropped_bytes = disk.dropped_bytes();
  }
}

TEST(StoreSaveCrashTest, PowerCutsLeaveEverySaveWholeOrAbsent) {
  Campaign campaign{.name = "power_cut_saves"};
  const uint64_t cuts = FromEnvironment("PAGETIDE_CRASH_CUTS", 50);
  RunPowerCuts(&campaign, cuts, {std::begin(kFailpoints), std::end(kFailpoints)});
  campaign.Print();
  const SaveOracle::Findings f = campaign.oracle.findings();
  EXPECT_EQ(campaign.crashes, cuts);
  EXPECT_EQ(campaign.crashes_at.size(), std::size(kFailpoints)) << "each was reached";
  EXPECT_GE(f.acked, cuts);
  EXPECT_EQ(f.lost, 0u);
  EXPECT_EQ(f.half_visible, 0u);
  EXPECT_EQ(f.wrong, 0u);
  EXPECT_GT(f.unacked_found + f.unacked_absent, 0u) << "saves were in flight";
  EXPECT_GE(f.stale_attempted, cuts);
  EXPECT_EQ(f.stale_refused, f.stale_attempted);
  EXPECT_GT(f.evictions_attempted, 0u);
  EXPECT_GT(f.bytes_verified, 0u);
  EXPECT_GT(campaign.dropped_bytes, 0u) << "the cuts must have cost something";
}

// The same campaign, with the bug, until the oracle finds what `findings` counts. A cut may spare
// what the bug has left open, so one campaign proves nothing by finding nothing.
bool IsCaught(const std::string& bug, const std::vector<std::string>& failpoints,
              absl::FunctionRef<uint64_t(const SaveOracle::Findings&)> findings) {
  for (int attempt = 0; attempt < 30; ++attempt) {
    Campaign campaign{.name = absl::StrCat("planted_", bug)};
    PlantBug(bug);
    RunPowerCuts(&campaign, 6, failpoints);
    PlantBug("");
    campaign.Print();
    if (findings(campaign.oracle.findings()) > 0) return true;
  }
  return false;
}

TEST(StoreSaveCrashTest, PlantedAcknowledgementBeforeTheBarrierIsCaught) {
  EXPECT_TRUE(IsCaught("acknowledge_before_barrier", {"manifest.before_acknowledgement"},
                       [](const SaveOracle::Findings& f) { return f.lost; }));
}

TEST(StoreSaveCrashTest, PlantedManifestBeforeItsPagesIsCaught) {
  EXPECT_TRUE(IsCaught("manifest_before_pages", {"manifest.before_pages"},
                       [](const SaveOracle::Findings& f) { return f.half_visible; }));
}

TEST(StoreSaveCrashTest, PlantedMissingEpochCheckIsCaught) {
  EXPECT_TRUE(IsCaught("no_epoch_check", {"manifest.pages_durable"},
                       [](const SaveOracle::Findings& f) { return f.stale_accepted; }));
}

TEST(StoreSaveCrashTest, PlantedEvictionBetweenCheckAndManifestIsCaught) {
  EXPECT_TRUE(IsCaught("evict_between_check_and_manifest", {"manifest.before_acknowledgement"},
                       [](const SaveOracle::Findings& f) { return f.lost + f.half_visible; }));
}

// ---- kills -------------------------------------------------------------------------------------

TEST(StoreSaveCrashTest, KillsAtFailpointsLeaveEverySaveWholeOrAbsent) {
  Campaign campaign{.name = "kill9_saves"};
  campaign.seed = CampaignSeed();
  std::mt19937_64 rng(campaign.seed);
  const uint64_t kills = FromEnvironment("PAGETIDE_CRASH_KILLS", std::size(kFailpoints));
  TempDir dir;
  for (uint64_t round = 0; round <= kills; ++round) {
    const std::string point = kFailpoints[round % std::size(kFailpoints)];
    ChildProcess::Options options{
        .program = "pagetide-store",
        .args = {"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0",
                 absl::StrCat("--data-dir=", dir / "data"), "--log-level=warning"}};
    if (round < kills) {
      // An opening has a barrier of its own.
      options.environment = {{"PAGETIDE_FAILPOINT", absl::StrCat(point, ":", 5 + rng() % 8)}};
    }
    const MonotonicTime start = Clock::Real()->MonotonicNow();
    auto process = ChildProcess::Start(options);
    ASSERT_TRUE(process.ok()) << process.status();
    RemotePageStore store(MakeChannel((*process)->Address("grpc"), {.own_connection = true}));
    ASSERT_TRUE(store.GetStats(In(absl::Seconds(30))).ok());
    campaign.recovery_seconds.push_back(
        absl::ToDoubleSeconds(Clock::Real()->MonotonicNow() - start));
    campaign.oracle.Verify(&store);
    const uint64_t epoch = OwnerEpoch(&store);
    if (round == kills) {
      EXPECT_EQ((*process)->Terminate().value_or(-1), 0);
      break;
    }
    Savers savers(&store, &campaign.oracle, round + 1, epoch);
    const auto code = (*process)->Wait(absl::Seconds(60));
    EXPECT_TRUE(code.ok() && *code == 128 + 9) << point << ": " << code.status();
    if (code.ok()) {
      ++campaign.crashes;
      ++campaign.crashes_at[point];
    }
  }
  campaign.Print();
  const SaveOracle::Findings f = campaign.oracle.findings();
  EXPECT_EQ(campaign.crashes, kills);
  EXPECT_EQ(campaign.crashes_at.size(), std::min<size_t>(kills, std::size(kFailpoints)));
  EXPECT_GE(f.acked, kills);
  EXPECT_EQ(f.lost, 0u);
  EXPECT_EQ(f.half_visible, 0u);
  EXPECT_EQ(f.wrong, 0u);
  EXPECT_GE(f.stale_attempted, kills);
  EXPECT_EQ(f.stale_refused, f.stale_attempted);
}

}  // namespace
}  // namespace pagetide
