// What durable writes of the embedded store take, and what the marks of its log cost them.
//
//   store_save_bench --dir=DIR [--runs=5] [--writes=200]
//
// Cases, alternated run by run; one JSON line each with the medians over the runs:
//   put, save              one page of 64 KiB at LOCAL; a page and a manifest that names it. With a
//                          mark a second, as it is, and with none but those of opening and closing
//   mark                   a 4 KiB slot written over and fdatasynced, alone: the least that a mark
//                          before each acknowledgement would add to each of them
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <filesystem>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "bench/seconds_now.h"
#include "kvstore/log_mark.h"
#include "kvstore/rocksdb_page_store.h"

namespace pagetide {
namespace {

namespace fs = std::filesystem;
constexpr size_t kPageBytes = 64 << 10;
const MonotonicTime kForEver = MonotonicTime::InfiniteFuture();

void Check(const absl::Status& status) {
  if (status.ok()) return;
  std::fprintf(stderr, "store_save_bench: %s\n", status.ToString().c_str());
  std::exit(1);
}

class Bench {
 public:
  Bench(std::string dir, int writes) : dir_(std::move(dir)), writes_(writes) {}

  // Seconds that each write took.
  std::vector<double> Write(bool saves, absl::Duration mark_period) {
    fs::remove_all(dir_);
    RocksdbPageStoreOptions options;
    options.dir = dir_;
    options.mark_period = mark_period;
    auto store = RocksdbPageStore::Open(options);
    Check(store.status());
    std::vector<std::byte> body(kPageBytes);
    return Time([&](int i) {
      std::fill(body.begin(), body.end(), static_cast<std::byte>(i));
      PageRecordMeta meta;
      meta.key = PageKey{Sha256Of(absl::StrCat("bench", i))};
      meta.checksum = ChecksumOf(body);
      meta.body_bytes = body.size();
      const PutPage put{meta, body};
      const Durability level = saves ? Durability::kProcess : Durability::kLocal;
      Check((*store)->PutPages({&put, 1}, level, kForEver)[0].status);
      if (!saves) return;
      ManifestRecord manifest;
      manifest.name = absl::StrCat("session/bench/", i);
      manifest.pages = {{meta.key, meta.checksum}};
      Check((*store)->PutManifest(manifest, 0, std::nullopt, kForEver).status());
    });
  }
  std::vector<double> Mark() {
    fs::remove_all(dir_);
    fs::create_directories(dir_);
    auto mark = LogMark::Open(dir_ + "/log.mark", FileSystem::Posix());
    Check(mark.status());
    return Time([&](int i) {
      Check((*mark)->Write({static_cast<uint64_t>(i) + 1, absl::UnixEpoch()}));
    });
  }

 private:
  std::vector<double> Time(const std::function<void(int)>& write) {
    std::vector<double> seconds;
    for (int i = 0; i < writes_; ++i) {
      const double start = SecondsNow();
      write(i);
      seconds.push_back(SecondsNow() - start);
    }
    return seconds;
  }

  const std::string dir_;
  const int writes_;
};

double At(std::vector<double> values, double quantile) {
  std::sort(values.begin(), values.end());
  return values[std::min(values.size() - 1,
                         static_cast<size_t>(quantile * static_cast<double>(values.size())))];
}

int Run(int argc, char** argv) {
  std::string dir;
  int runs = 5, writes = 200;
  for (int i = 1; i < argc; ++i) {
    const absl::string_view arg = argv[i];
    const absl::string_view value = arg.substr(std::min(arg.find('=') + 1, arg.size()));
    const bool ok = absl::StartsWith(arg, "--dir=")      ? !(dir = std::string(value)).empty()
                    : absl::StartsWith(arg, "--runs=")   ? absl::SimpleAtoi(value, &runs)
                    : absl::StartsWith(arg, "--writes=") ? absl::SimpleAtoi(value, &writes)
                                                         : false;
    if (!ok || runs < 1 || writes < 1) {
      std::fprintf(stderr, "store_save_bench: what is %s?\n", argv[i]);
      return 2;
    }
  }
  if (dir.empty()) {
    std::fprintf(stderr, "store_save_bench: --dir=DIR is needed; it is emptied\n");
    return 2;
  }
  Bench bench(dir + "/store_save_bench", writes);
  const std::vector<std::pair<std::string, std::function<std::vector<double>()>>> cases = {
      {"put, a mark a second", [&] { return bench.Write(false, absl::Seconds(1)); }},
      {"put, no marks", [&] { return bench.Write(false, absl::InfiniteDuration()); }},
      {"save, a mark a second", [&] { return bench.Write(true, absl::Seconds(1)); }},
      {"save, no marks", [&] { return bench.Write(true, absl::InfiniteDuration()); }},
      {"mark", [&] { return bench.Mark(); }}};
  std::map<std::string, std::vector<double>> p50s, p99s;
  for (int run = 0; run < runs; ++run) {
    for (const auto& [name, measure] : cases) {
      const std::vector<double> seconds = measure();
      p50s[name].push_back(At(seconds, 0.5));
      p99s[name].push_back(At(seconds, 0.99));
    }
  }
  for (const auto& [name, measure] : cases) {
    std::printf("{\"case\":\"%s\",\"p50_ms\":%.3f,\"p99_ms\":%.3f,\"writes\":%d,\"runs\":%d}\n",
                name.c_str(), At(p50s[name], 0.5) * 1e3, At(p99s[name], 0.5) * 1e3, writes, runs);
  }
  fs::remove_all(dir + "/store_save_bench");
  return 0;
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  return pagetide::Run(argc, argv);
}
