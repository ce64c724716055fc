// Put per level and get of 2 MiB pages through the embedded store, against the raw disk and the
// page cache in the same run.
//
//   store_bench --dir=DIR [--runs=5] [--pages=96]
//
// Alternates the cases run by run; prints one JSON line a case with the median. "raw" writes and
// reads one file with O_DIRECT, "file" with buffered calls (write + fdatasync; cold = dropped from
// the page cache).
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "bench/seconds_now.h"
#include "kvstore/rocksdb_page_store.h"

namespace pagetide {
namespace {

namespace fs = std::filesystem;
constexpr size_t kPageBytes = 2 << 20;
const MonotonicTime kForEver = MonotonicTime::InfiniteFuture();

void Check(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "store_bench: %s: %s\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}

void DropFromPageCache(const fs::path& dir) {
  for (const auto& entry : fs::recursive_directory_iterator(dir)) {
    const int fd = ::open(entry.path().c_str(), O_RDONLY | O_CLOEXEC);
    if (fd < 0) continue;
    ::fsync(fd);
    ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
    ::close(fd);
  }
}

struct Page {
  PageRecordMeta meta;
  std::vector<std::byte> body;
};

class Bench {
 public:
  Bench(std::string dir, size_t num_pages) : dir_(std::move(dir)) {
    pages_.resize(num_pages);
    for (size_t i = 0; i < num_pages; ++i) {
      Page& page = pages_[i];
      page.body.assign(kPageBytes, static_cast<std::byte>(i));
      std::memcpy(page.body.data(), &i, sizeof(i));
      page.meta.key = PageKey{Sha256Of(absl::StrCat("bench", i))};
      page.meta.checksum = ChecksumOf(page.body);
      page.meta.body_bytes = kPageBytes;
    }
  }
  double gb() const { return static_cast<double>(pages_.size() * kPageBytes) / 1e9; }

  // GB/s of putting all pages, `batch` at a time, from `threads` threads.
  double Put(Durability level, size_t batch, size_t threads) {
    Reset();
    auto store = Open();
    const double start = SecondsNow();
    std::vector<std::thread> workers;
    for (size_t t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        for (size_t at = t * batch; at < pages_.size(); at += threads * batch) {
          std::vector<PutPage> puts;
          for (size_t i = at; i < std::min(at + batch, pages_.size()); ++i) {
            puts.push_back({pages_[i].meta, pages_[i].body});
          }
          for (const PutPageResult& r : store->PutPages(puts, level, kForEver)) {
            Check(r.status.ok(), r.status.ToString());
          }
        }
      });
    }
    for (std::thread& worker : workers) worker.join();
    return gb() / (SecondsNow() - start);
  }

  // After a Put: reads all pages back, verified.
  double Get(bool cold, size_t threads) {
    auto store = Open();
    if (cold) DropFromPageCache(dir_);
    const double start = SecondsNow();
    std::vector<std::thread> workers;
    for (size_t t = 0; t < threads; ++t) {
      workers.emplace_back([&, t] {
        std::vector<std::byte> body(kPageBytes);
        for (size_t i = t; i < pages_.size(); i += threads) {
          const GetPage get{pages_[i].meta.key, body, {}};
          Check(store->GetPages({&get, 1}, kForEver)[0].outcome == GetOutcome::kHit, "get");
        }
      });
    }
    for (std::thread& worker : workers) worker.join();
    return gb() / (SecondsNow() - start);
  }

  enum class How { kDirect, kBuffered };
  double WriteFile(How how, size_t sync_every) {
    Reset();
    const int fd =
        ::open(FilePath().c_str(),
               O_RDWR | O_CREAT | O_CLOEXEC | (how == How::kDirect ? O_DIRECT : 0), 0600);
    Check(fd >= 0, "create file");
    const double start = SecondsNow();
    for (size_t i = 0; i < pages_.size(); ++i) {
      const void* from = pages_[i].body.data();
      if (how == How::kDirect) from = std::memcpy(aligned_.get(), from, kPageBytes);
      Check(::pwrite(fd, from, kPageBytes, static_cast<off_t>(i * kPageBytes)) == kPageBytes,
            "write");
      if (sync_every != 0 && i % sync_every == sync_every - 1)
        Check(::fdatasync(fd) == 0, "fdatasync");
    }
    const double seconds = SecondsNow() - start;
    ::close(fd);
    return gb() / seconds;
  }
  double ReadFile(How how, bool cold) {
    if (cold) DropFromPageCache(dir_);
    const int fd =
        ::open(FilePath().c_str(), O_RDONLY | O_CLOEXEC | (how == How::kDirect ? O_DIRECT : 0));
    Check(fd >= 0, "open file");
    const double start = SecondsNow();
    for (size_t i = 0; i < pages_.size(); ++i) {
      Check(
          ::pread(fd, aligned_.get(), kPageBytes, static_cast<off_t>(i * kPageBytes)) == kPageBytes,
          "read");
    }
    const double seconds = SecondsNow() - start;
    ::close(fd);
    return gb() / seconds;
  }

 private:
  std::string FilePath() const { return dir_ + "/raw"; }
  void Reset() {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
  }
  std::unique_ptr<RocksdbPageStore> Open() {
    auto store = RocksdbPageStore::Open({.dir = dir_});
    Check(store.ok(), store.status().ToString());
    return *std::move(store);
  }

  const std::string dir_;
  std::vector<Page> pages_;
  std::unique_ptr<void, void (*)(void*)> aligned_{std::aligned_alloc(4096, kPageBytes), &std::free};
};

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  using pagetide::Bench;
  using pagetide::Durability;
  std::string dir;
  int runs = 5;
  size_t pages = 96;
  for (int a = 1; a < argc; ++a) {
    const std::string arg = argv[a];
    if (arg.rfind("--dir=", 0) == 0) {
      dir = arg.substr(6);
    } else if (arg.rfind("--runs=", 0) == 0) {
      runs = std::stoi(arg.substr(7));
    } else if (arg.rfind("--pages=", 0) == 0) {
      pages = std::stoull(arg.substr(8));
    } else {
      dir.clear();
      break;
    }
  }
  if (dir.empty()) {
    std::fprintf(stderr, "usage: store_bench --dir=DIR [--runs=N] [--pages=N]\n");
    return 2;
  }
  Bench bench(dir + "/store_bench", pages);
  std::vector<std::pair<std::string, std::function<double()>>> cases = {
      {"raw O_DIRECT write", [&] { return bench.WriteFile(Bench::How::kDirect, 0); }},
      {"raw O_DIRECT write, fdatasync each",
       [&] { return bench.WriteFile(Bench::How::kDirect, 1); }},
      {"raw O_DIRECT read", [&] { return bench.ReadFile(Bench::How::kDirect, true); }},
      {"file write, fdatasync each", [&] { return bench.WriteFile(Bench::How::kBuffered, 1); }},
      {"file write, fdatasync each 8", [&] { return bench.WriteFile(Bench::How::kBuffered, 8); }},
      {"file write, page cache", [&] { return bench.WriteFile(Bench::How::kBuffered, 0); }},
      {"file read, cold", [&] { return bench.ReadFile(Bench::How::kBuffered, true); }},
      {"file read, hot", [&] { return bench.ReadFile(Bench::How::kBuffered, false); }},
      {"put LOCAL, 1 page a call", [&] { return bench.Put(Durability::kLocal, 1, 1); }},
      {"put LOCAL, 8 pages a call", [&] { return bench.Put(Durability::kLocal, 8, 1); }},
      {"put LOCAL, 1 page a call, 8 threads", [&] { return bench.Put(Durability::kLocal, 1, 8); }},
      {"put PROCESS", [&] { return bench.Put(Durability::kProcess, 1, 1); }},
      {"put CACHE", [&] { return bench.Put(Durability::kCache, 1, 1); }},
      {"get cold", [&] { return bench.Get(true, 1); }},
      {"get cold, 4 threads", [&] { return bench.Get(true, 4); }},
      {"get hot", [&] { return bench.Get(false, 1); }},
      {"get hot, 2 threads", [&] { return bench.Get(false, 2); }},
  };
  std::map<std::string, std::vector<double>> results;
  for (int run = 0; run < runs; ++run) {
    for (const auto& [name, measure] : cases) results[name].push_back(measure());
  }
  for (const auto& [name, measure] : cases) {
    std::vector<double>& v = results[name];
    std::sort(v.begin(), v.end());
    std::printf(
        "{\"case\":\"%s\",\"page_bytes\":%zu,\"runs\":%d,\"median_gb_s\":%.2f,\"min\":%.2f,"
        "\"max\":%.2f}\n",
        name.c_str(), pagetide::kPageBytes, runs, v[v.size() / 2], v.front(), v.back());
  }
  std::filesystem::remove_all(dir + "/store_bench");
  return 0;
}
