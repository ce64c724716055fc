// Does the store stay within its capacity, how long do puts wait, and are sessions intact, when far
// more is written than fits?
//
//   store_space_bench --dir=DIR [--capacity=512MiB] [--page=256KiB] [--factor=5] [--held=0.2]
//                     [--threads=4] [--rate=0]
//
// Writes factor × capacity of pages in chains of eight, as conversations make them, from several
// threads at level PROCESS, `rate` bytes a second in all (0: as fast as it goes); sessions
// (manifests) hold the first chains of each thread until a share `held` of the capacity is theirs,
// spread over the first capacity written. The disk is measured by the lengths of all files, every
// 20 ms. Afterwards every page of every session is read and compared, then once more after the
// store was opened again. Prints one JSON line; exit code 1 when the disk took more than 1.15 ×
// capacity, or a session is not intact.
#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/time/clock.h"
#include "base/byte_size.h"
#include "base/mutex.h"
#include "bench/seconds_now.h"
#include "kvstore/rocksdb_page_store.h"

namespace pagetide {
namespace {

namespace fs = std::filesystem;
const MonotonicTime kForEver = MonotonicTime::InfiniteFuture();
constexpr uint32_t kChain = 8;

struct Flags {
  std::string dir;
  std::string capacity = "512MiB";
  std::string page = "256KiB";
  std::string rate = "0";
  double factor = 5;
  double held = 0.2;
  int threads = 4;
};

uint64_t BytesOnDisk(const std::string& dir) {
  uint64_t total = 0;
  std::error_code ec;
  for (fs::recursive_directory_iterator it(dir, ec), end; !ec && it != end; it.increment(ec)) {
    std::error_code gone;
    if (!it->is_regular_file(gone) || gone) continue;
    const uint64_t size = it->file_size(gone);
    if (!gone) total += size;
  }
  return total;
}

void FillBody(uint64_t seed, std::vector<std::byte>* body) {
  std::mt19937_64 rng(seed);
  for (size_t i = 0; i + 8 <= body->size(); i += 8) {
    const uint64_t word = rng();
    std::memcpy(body->data() + i, &word, 8);
  }
}

PageRecordMeta MetaOf(uint64_t seed, uint32_t depth, const std::vector<std::byte>& body) {
  PageRecordMeta meta;
  meta.key = PageKey{Sha256Of(absl::StrCat("page", seed))};
  meta.fingerprint = Sha256Of("bench");
  meta.prefix = PrefixKey{Sha256Of(absl::StrCat("prefix", seed))};
  meta.parent = PrefixKey{Sha256Of(depth == 0 ? "root" : absl::StrCat("prefix", seed - 1))};
  meta.depth = depth;
  meta.numerics_id = "bench";
  meta.checksum = ChecksumOf(body);
  meta.body_bytes = body.size();
  return meta;
}

struct Session {
  std::string name;
  uint64_t first_seed = 0;
};

struct Shared {
  Mutex mu;
  std::vector<double> put_seconds ABSL_GUARDED_BY(mu);
  std::vector<double> save_seconds ABSL_GUARDED_BY(mu);
  std::vector<Session> sessions ABSL_GUARDED_BY(mu);
  std::atomic<uint64_t> written{0}, held{0}, refused{0};
};

void Write(PageStore* store, Shared* shared, uint64_t thread, uint64_t page_bytes,
           uint64_t total_bytes, uint64_t hold_bytes, uint64_t capacity, double rate) {
  std::vector<double> put_seconds, save_seconds;
  std::vector<Session> sessions;
  std::vector<std::byte> body(page_bytes);
  const double start = SecondsNow();
  for (uint64_t chain = 0; shared->written < total_bytes; ++chain) {
    const uint64_t first_seed = (thread << 40) + chain * kChain;
    ManifestRecord manifest;
    manifest.name = absl::StrCat("session/", thread, "/", chain);
    for (uint32_t i = 0; i < kChain; ++i) {
      FillBody(first_seed + i, &body);
      const PutPage put{MetaOf(first_seed + i, i, body), body};
      const double began = SecondsNow();
      const PutPageResult result = store->PutPages({&put, 1}, Durability::kProcess, kForEver)[0];
      put_seconds.push_back(SecondsNow() - began);
      shared->written += page_bytes;
      if (!result.status.ok()) ++shared->refused;
      manifest.pages.push_back({put.meta.key, put.meta.checksum});
      if (rate > 0) {
        const double ahead = static_cast<double>(shared->written) / rate - (SecondsNow() - start);
        if (ahead > 0) absl::SleepFor(absl::Seconds(ahead));
      }
    }
    // Of the first capacity written, the share that is to be held.
    const uint64_t due = std::min<uint64_t>(
        hold_bytes,
        static_cast<uint64_t>(static_cast<double>(hold_bytes) / static_cast<double>(capacity) *
                              static_cast<double>(shared->written.load())));
    const uint64_t bytes = kChain * page_bytes;
    if (shared->held.fetch_add(bytes) + bytes > due) {
      shared->held -= bytes;
      continue;
    }
    const double began = SecondsNow();
    const auto saved = store->PutManifest(manifest, 0, std::nullopt, kForEver);
    save_seconds.push_back(SecondsNow() - began);
    if (saved.ok() && saved->committed) {
      sessions.push_back({manifest.name, first_seed});
    } else {
      shared->held -= bytes;
      ++shared->refused;
    }
  }
  MutexLock lock(&shared->mu);
  const auto append = [](auto* to, const auto& from) {
    to->insert(to->end(), from.begin(), from.end());
  };
  append(&shared->put_seconds, put_seconds);
  append(&shared->save_seconds, save_seconds);
  append(&shared->sessions, sessions);
}

uint64_t CountIntact(PageStore* store, const std::vector<Session>& sessions, uint64_t page_bytes) {
  uint64_t intact = 0;
  std::vector<std::byte> want(page_bytes), got(page_bytes);
  for (const Session& session : sessions) {
    const auto manifest = store->GetManifest(session.name, kForEver);
    bool whole = manifest.ok() && manifest->pages.size() == kChain;
    for (uint32_t i = 0; whole && i < kChain; ++i) {
      FillBody(session.first_seed + i, &want);
      const GetPage get{manifest->pages[i].key, got, manifest->pages[i].checksum};
      whole = store->GetPages({&get, 1}, kForEver)[0].outcome == GetOutcome::kHit && got == want;
    }
    intact += whole ? 1 : 0;
  }
  return intact;
}

double Quantile(std::vector<double>* sorted, double q) {
  if (sorted->empty()) return 0;
  std::sort(sorted->begin(), sorted->end());
  const size_t at = static_cast<size_t>(q * static_cast<double>(sorted->size()));
  return (*sorted)[std::min(sorted->size() - 1, at)];
}

int Run(const Flags& flags) {
  uint64_t capacity = 0, page_bytes = 0, rate = 0;
  for (const auto& [flag, text, out] :
       {std::tuple("--capacity", &flags.capacity, &capacity),
        std::tuple("--page", &flags.page, &page_bytes), std::tuple("--rate", &flags.rate, &rate)}) {
    const absl::StatusOr<uint64_t> bytes = ParseByteSize(*text);
    if (!bytes.ok()) {
      std::fprintf(stderr, "store_space_bench: %s: %s\n", flag, bytes.status().ToString().c_str());
      return 2;
    }
    *out = *bytes;
  }
  RocksdbPageStoreOptions options;
  options.dir = flags.dir;
  options.capacity_bytes = capacity;
  auto store = RocksdbPageStore::Open(options);
  if (!store.ok()) {
    std::fprintf(stderr, "store_space_bench: %s\n", store.status().ToString().c_str());
    return 2;
  }
  Shared shared;
  const auto total = static_cast<uint64_t>(flags.factor * static_cast<double>(capacity));
  const auto hold = static_cast<uint64_t>(flags.held * static_cast<double>(capacity));
  std::atomic<bool> done{false};
  uint64_t peak = 0;
  std::thread watcher([&] {
    while (!done) {
      peak = std::max(peak, BytesOnDisk(flags.dir));
      absl::SleepFor(absl::Milliseconds(20));
    }
  });
  const double start = SecondsNow();
  std::vector<std::thread> threads;
  for (int t = 0; t < flags.threads; ++t) {
    threads.emplace_back(Write, store->get(), &shared, static_cast<uint64_t>(t) + 1, page_bytes,
                         total, hold, capacity, static_cast<double>(rate));
  }
  for (std::thread& t : threads) t.join();
  const double seconds = SecondsNow() - start;
  done = true;
  watcher.join();
  const uint64_t end_bytes = BytesOnDisk(flags.dir);
  const auto stats = (*store)->GetStats(kForEver);
  MutexLock lock(&shared.mu);
  const uint64_t intact = CountIntact(store->get(), shared.sessions, page_bytes);
  store->reset();
  store = RocksdbPageStore::Open(options);
  const uint64_t intact_reopened =
      store.ok() ? CountIntact(store->get(), shared.sessions, page_bytes) : 0;
  const double over = static_cast<double>(peak) / static_cast<double>(capacity);
  absl::PrintF(
      "{\"bench\":\"store_space\",\"capacity_bytes\":%d,\"page_bytes\":%d,\"threads\":%d,"
      "\"rate_bytes_per_second\":%d,\"written_bytes\":%d,\"held_bytes\":%d,"
      "\"peak_disk_bytes\":%d,\"peak_over_capacity\":%.3f,\"end_over_capacity\":%.3f,"
      "\"put_p50_ms\":%.3f,\"put_p99_ms\":%.3f,\"put_p999_ms\":%.3f,\"put_max_ms\":%.3f,"
      "\"save_p50_ms\":%.3f,\"save_p99_ms\":%.3f,\"put_mb_per_second\":%.1f,\"refused\":%d,"
      "\"pages_evicted\":%d,\"pages_held_now\":%d,\"sessions\":%d,\"sessions_intact\":%d,"
      "\"sessions_intact_after_reopening\":%d}\n",
      capacity, page_bytes, flags.threads, rate, shared.written.load(), shared.held.load(), peak,
      over, static_cast<double>(end_bytes) / static_cast<double>(capacity),
      1e3 * Quantile(&shared.put_seconds, 0.5), 1e3 * Quantile(&shared.put_seconds, 0.99),
      1e3 * Quantile(&shared.put_seconds, 0.999), 1e3 * Quantile(&shared.put_seconds, 1),
      1e3 * Quantile(&shared.save_seconds, 0.5), 1e3 * Quantile(&shared.save_seconds, 0.99),
      static_cast<double>(shared.written.load()) / seconds / 1e6, shared.refused.load(),
      stats.ok() ? stats->pages_evicted : 0, stats.ok() ? stats->pages : 0, shared.sessions.size(),
      intact, intact_reopened);
  return over <= 1.15 && !shared.sessions.empty() && intact == shared.sessions.size() &&
                 intact_reopened == shared.sessions.size()
             ? 0
             : 1;
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  pagetide::Flags flags;
  CLI::App app{"Writes far more than fits into a store and watches the disk."};
  app.add_option("--dir", flags.dir, "An empty folder on the disk to measure")->required();
  app.add_option("--capacity", flags.capacity, "Capacity of the store")->capture_default_str();
  app.add_option("--page", flags.page, "Bytes of a page")->capture_default_str();
  app.add_option("--factor", flags.factor, "How many capacities to write")->capture_default_str();
  app.add_option("--held", flags.held, "Share of the capacity that sessions hold")
      ->capture_default_str();
  app.add_option("--threads", flags.threads, "Writers")->capture_default_str();
  app.add_option("--rate", flags.rate, "Bytes a second of all writers; 0: no limit")
      ->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  return pagetide::Run(flags);
}
