// How long a store that holds --bytes takes to open again.
//
//   store_restart_bench --dir=DIR [--bytes=1GiB] [--page-bytes=2MiB] [--runs=5]
//
// Cases, alternated run by run, one JSON line each with the median:
//   closed       the store was closed
//   killed       kill -9 after puts at LOCAL: a barrier covers every page
//   killed-cache kill -9 after puts at CACHE: no barrier, so every record is read and verified
// each with the files in the page cache (warm) and dropped from it (cold). Each opening ends with
// one verified read of a page, so that an open that did nothing would be noticed.
#include <fcntl.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/byte_size.h"
#include "base/log.h"
#include "kvstore/rocksdb_page_store.h"

namespace pagetide {
namespace {

namespace fs = std::filesystem;
constexpr size_t kPutBatch = 16;
const MonotonicTime kForEver = MonotonicTime::InfiniteFuture();

void Check(bool ok, const std::string& what) {
  if (ok) return;
  std::fprintf(stderr, "store_restart_bench: %s: %s\n", what.c_str(), std::strerror(errno));
  std::exit(1);
}

struct Case {
  const char* name;
  Durability level;
  bool is_killed;
};
constexpr Case kCases[] = {{"closed", Durability::kLocal, false},
                           {"killed", Durability::kLocal, true},
                           {"killed-cache", Durability::kCache, true}};

struct Options {
  std::string dir;
  uint64_t bytes = kGiB;
  uint64_t page_bytes = 2 * kMiB;
  int runs = 5;
};

class Bench {
 public:
  explicit Bench(Options options) : options_(std::move(options)), body_(options_.page_bytes) {}

  uint64_t num_pages() const { return options_.bytes / options_.page_bytes; }

  // Fills a fresh store in a child process, which closes it or is killed. A failed child is an
  // error here.
  void Fill(const Case& c) {
    fs::remove_all(options_.dir);
    fs::create_directories(options_.dir);
    const pid_t child = ::fork();
    Check(child >= 0, "fork");
    if (child == 0) {
      auto store = Open();
      for (uint64_t at = 0; at < num_pages(); at += kPutBatch) Put(*store, at, c.level);
      if (c.is_killed) ::raise(SIGKILL);
      store.reset();
      ::_exit(0);
    }
    int status = 0;
    Check(::waitpid(child, &status, 0) == child, "waitpid");
    const bool ended_as_told = c.is_killed ? WIFSIGNALED(status) && WTERMSIG(status) == SIGKILL
                                           : WIFEXITED(status) && WEXITSTATUS(status) == 0;
    Check(ended_as_told, absl::StrCat("the child that fills the store ended with ", status));
  }

  // Seconds until the store is open and has given back one page.
  double Reopen() {
    const MonotonicTime start = Clock::Real()->MonotonicNow();
    auto store = Open();
    const uint64_t last = num_pages() - 1;
    const GetPage get{MakeMeta(last).key, body_, {}};
    const GetPageResult got = store->GetPages({&get, 1}, kForEver)[0];
    const absl::Duration took = Clock::Real()->MonotonicNow() - start;
    Check(got.outcome == GetOutcome::kHit, "the last page is not there");
    const auto stats = store->GetStats(kForEver);
    Check(stats.ok() && stats->pages == num_pages(),
          absl::StrCat(stats.ok() ? stats->pages : 0, " of ", num_pages(), " pages are there"));
    return absl::ToDoubleSeconds(took);
  }

  void DropFromPageCache() {
    for (const auto& entry : fs::recursive_directory_iterator(options_.dir)) {
      const int fd = ::open(entry.path().c_str(), O_RDONLY | O_CLOEXEC);
      if (fd < 0) continue;
      ::fsync(fd);  // dirty pages are not dropped
      ::posix_fadvise(fd, 0, 0, POSIX_FADV_DONTNEED);
      ::close(fd);
    }
  }

 private:
  std::unique_ptr<RocksdbPageStore> Open() {
    auto store = RocksdbPageStore::Open({.dir = options_.dir});
    Check(store.ok(), store.status().ToString());
    return *std::move(store);
  }

  // The body differs from page to page in its first bytes.
  void MakeBody(uint64_t page) {
    std::fill(body_.begin(), body_.end(), static_cast<std::byte>(page));
    std::memcpy(body_.data(), &page, sizeof(page));
  }
  PageRecordMeta MakeMeta(uint64_t page) const {
    PageRecordMeta meta;
    meta.key = PageKey{Sha256Of(absl::StrCat("restart", page))};
    meta.prefix = PrefixKey{meta.key.digest};
    meta.body_bytes = options_.page_bytes;
    return meta;
  }
  void Put(RocksdbPageStore& store, uint64_t first, Durability level) {
    std::vector<std::vector<std::byte>> bodies;
    std::vector<PutPage> puts;
    for (uint64_t page = first; page < std::min(first + kPutBatch, num_pages()); ++page) {
      MakeBody(page);
      bodies.push_back(body_);
      PageRecordMeta meta = MakeMeta(page);
      meta.checksum = ChecksumOf(body_);
      puts.push_back({meta, bodies.back()});
    }
    for (const PutPageResult& result : store.PutPages(puts, level, kForEver)) {
      Check(result.status.ok(), result.status.ToString());
    }
  }

  const Options options_;
  std::vector<std::byte> body_;
};

uint64_t BytesOf(const std::string& text) {
  const auto bytes = ParseByteSize(text);
  Check(bytes.ok() && *bytes > 0, std::string(bytes.status().message()));
  return *bytes;
}

int Main(int argc, char** argv) {
  Options options;
  for (int i = 1; i < argc; ++i) {
    const std::string arg = argv[i];
    const std::string value = arg.substr(std::min(arg.size(), arg.find('=') + 1));
    if (arg.rfind("--dir=", 0) == 0) {
      options.dir = value;
    } else if (arg.rfind("--bytes=", 0) == 0) {
      options.bytes = BytesOf(value);
    } else if (arg.rfind("--page-bytes=", 0) == 0) {
      options.page_bytes = BytesOf(value);
    } else if (arg.rfind("--runs=", 0) == 0) {
      options.runs = std::atoi(value.c_str());
    } else {
      Check(false, absl::StrCat("unknown flag ", arg));
    }
  }
  if (options.dir.empty() || options.runs < 1 || options.bytes < options.page_bytes) {
    std::fprintf(stderr, "store_restart_bench: needs --dir=DIR, runs >= 1, bytes >= page-bytes\n");
    return 2;
  }
  if (const absl::Status s = SetLogLevel("error"); !s.ok()) return 2;
  const std::string dir = options.dir;
  options.dir = absl::StrCat(dir, "/store_restart_bench");
  Bench bench(options);
  std::map<std::string, std::vector<double>> seconds;
  for (int run = 0; run < options.runs; ++run) {
    for (const Case& c : kCases) {
      for (const bool is_cold : {false, true}) {
        bench.Fill(c);
        if (is_cold) bench.DropFromPageCache();
        seconds[absl::StrCat(c.name, is_cold ? ", cold" : ", warm")].push_back(bench.Reopen());
      }
    }
  }
  fs::remove_all(options.dir);
  for (auto& [name, values] : seconds) {
    std::sort(values.begin(), values.end());
    std::printf(
        "{\"case\":\"restart %s\",\"bytes\":%llu,\"page_bytes\":%llu,\"runs\":%d,"
        "\"median_s\":%.3f,\"min\":%.3f,\"max\":%.3f}\n",
        name.c_str(), static_cast<unsigned long long>(options.bytes),
        static_cast<unsigned long long>(options.page_bytes), options.runs,
        values[values.size() / 2], values.front(), values.back());
  }
  return 0;
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  return pagetide::Main(argc, argv);
}
