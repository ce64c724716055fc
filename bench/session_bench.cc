// Time to save and to load one large state, through real programs, against the raw disk in the same
// run.
//
//   session_bench --dir=DIR [--mib=1024] [--runs=3]
//
// Each run starts a store, a router and two workers in DIR (on the disk to be measured), fills a
// sequence, saves it from one worker, loads it on the other with the page cache dropped, and checks
// a layer of it byte by byte. "raw" writes and reads one file of the same size with O_DIRECT before
// and after. Prints one JSON line a run and one of the medians.
#include <fcntl.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "CLI/CLI.hpp"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "bench/bench_process.h"
#include "bench/seconds_now.h"
#include "clients/cpp/client.h"

namespace pagetide::bench {
namespace {

namespace fs = std::filesystem;
constexpr uint32_t kPageTokens = 256;
constexpr uint32_t kLayers = 4;
constexpr uint32_t kRowBytes = 8 * 128 * 2;  // kv_heads × dim × f16
constexpr uint64_t kPageBytes = uint64_t{kLayers} * 2 * kPageTokens * kRowBytes;  // 4 MiB
constexpr uint32_t kChunkTokens = 2048;

[[noreturn]] void Fail(const std::string& what) {
  std::fprintf(stderr, "session_bench: %s\n", what.c_str());
  std::exit(1);
}

void Check(const absl::Status& status, const char* what) {
  if (!status.ok()) Fail(absl::StrCat(what, ": ", status.ToString()));
}
template <typename T>
T Check(absl::StatusOr<T> value, const char* what) {
  Check(value.status(), what);
  return *std::move(value);
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

// Seconds to write, and to read, one file with O_DIRECT in pieces of a page.
struct RawTimes {
  double write = 0;
  double read = 0;
};
RawTimes MeasureRaw(const fs::path& file, uint64_t num_bytes) {
  void* memory = nullptr;
  if (::posix_memalign(&memory, 4096, kPageBytes) != 0) Fail("no memory");
  std::memset(memory, 0x5a, kPageBytes);
  RawTimes times;
  const auto run = [&](int flags, auto transfer) {
    const int fd = ::open(file.c_str(), flags | O_DIRECT | O_CLOEXEC, 0600);
    if (fd < 0) Fail(absl::StrCat("open ", file.string(), ": ", std::strerror(errno)));
    const double began = SecondsNow();
    for (uint64_t at = 0; at < num_bytes; at += kPageBytes) {
      if (transfer(fd, at) != static_cast<ssize_t>(kPageBytes)) {
        Fail(absl::StrCat("raw transfer at ", at, ": ", std::strerror(errno)));
      }
    }
    if (::fdatasync(fd) != 0) Fail("fdatasync");
    const double took = SecondsNow() - began;
    ::close(fd);
    return took;
  };
  times.write = run(O_WRONLY | O_CREAT | O_TRUNC, [&](int fd, uint64_t at) {
    return ::pwrite(fd, memory, kPageBytes, static_cast<off_t>(at));
  });
  times.read = run(O_RDONLY, [&](int fd, uint64_t at) {
    return ::pread(fd, memory, kPageBytes, static_cast<off_t>(at));
  });
  std::free(memory);
  fs::remove(file);
  return times;
}

ModelSpec BenchModel() {
  ModelSpec spec;
  spec.name = "session-bench";
  spec.geometry.page_tokens = kPageTokens;
  LayerGroupSpec group;
  for (uint32_t layer = 0; layer < kLayers; ++layer) group.layers.push_back(layer);
  group.kv_heads = 8;
  group.k_dim = group.v_dim = 128;
  spec.geometry.groups.push_back(group);
  return spec;
}

// Rows [first, first + count) of a layer and kind: incompressible, and different everywhere.
std::vector<std::byte> Rows(uint32_t layer, RowKind kind, uint64_t first, uint32_t count) {
  std::mt19937_64 random((first << 8) | (layer << 1) | (kind == RowKind::kV));
  std::vector<std::byte> rows(uint64_t{count} * kRowBytes);
  for (size_t at = 0; at < rows.size(); at += 8) {
    const uint64_t word = random();
    std::memcpy(rows.data() + at, &word, 8);
  }
  return rows;
}

struct RunResult {
  RawTimes raw;
  double save = 0;
  double save_again = 0;
  double load_open = 0;   // LoadSession answered
  double load_ready = 0;  // all pages resident and verified
};

RunResult RunOnce(const fs::path& dir, uint64_t num_bytes) {
  RunResult result;
  fs::remove_all(dir);
  fs::create_directories(dir);
  result.raw = MeasureRaw(dir / "raw", num_bytes);

  const std::string listen = "--listen=127.0.0.1:0";
  BenchProcess store(SiblingPath("pagetide-store"),
                     {absl::StrCat("--data-dir=", (dir / "store").string()), listen});
  const std::string store_flag = absl::StrCat("--store=", store.Value("grpc"));
  BenchProcess router(SiblingPath("pagetide-router"), {store_flag, listen});
  // So many that nothing is spilled in the background before it is saved.
  const std::string pool = absl::StrCat("--pool-bytes=", num_bytes / 4 * 5 + 16 * kPageBytes);
  const auto worker_args = [&](const char* id) {
    return std::vector<std::string>{absl::StrCat("--worker-id=", id), store_flag, pool, listen,
                                    "--write-through=false"};
  };
  BenchProcess first(SiblingPath("pagetide-worker"), worker_args("w1"));
  BenchProcess second(SiblingPath("pagetide-worker"), worker_args("w2"));
  CallOptions call{.timeout = absl::Minutes(5)};
  const auto model =
      Check(Check(Client::Create({.router_address = router.Value("grpc"), .call = call}), "client")
                ->RegisterModel(BenchModel()),
            "register model");

  const uint64_t num_tokens = num_bytes / kPageBytes * kPageTokens;
  std::vector<uint32_t> tokens(num_tokens);
  for (uint64_t i = 0; i < num_tokens; ++i) tokens[i] = static_cast<uint32_t>(i * 2654435761u);
  const auto writer =
      Check(Client::Create({.worker_address = first.Value("grpc"), .call = call}), "client");
  auto sequence = Check(writer->Open(model, {}), "open");
  for (uint64_t at = 0; at < num_tokens; at += kChunkTokens) {
    const uint32_t count = static_cast<uint32_t>(std::min<uint64_t>(kChunkTokens, num_tokens - at));
    auto append =
        Check(sequence->BeginAppend(std::span(tokens).subspan(at, count), /*will_attend=*/false),
              "append");
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        Check(append->WriteRows(0, layer, kind, 0, Rows(layer, kind, at, count)), "rows");
      }
    }
    Check(append->Commit().status(), "commit");
  }

  double began = SecondsNow();
  auto saved = Check(sequence->Save("state"), "save");
  result.save = SecondsNow() - began;
  if (saved.bytes_written() != num_bytes) {
    Fail(absl::StrCat("the save wrote ", saved.bytes_written(), " of ", num_bytes, " bytes"));
  }
  began = SecondsNow();
  saved = Check(sequence->Save("state"), "save again");
  result.save_again = SecondsNow() - began;
  if (saved.bytes_written() != 0) Fail("the second save wrote something");

  DropFromPageCache(dir / "store");
  const auto reader =
      Check(Client::Create({.worker_address = second.Value("grpc"), .call = call}), "client");
  began = SecondsNow();
  auto loaded = Check(reader->LoadSession(model, "state"), "load");
  result.load_open = SecondsNow() - began;
  const uint64_t length = Check(loaded.sequence->WaitReady(), "wait");
  result.load_ready = SecondsNow() - began;
  if (length != num_tokens) Fail(absl::StrCat("loaded ", length, " of ", num_tokens, " tokens"));
  uint64_t compared = 0;
  const std::vector<uint32_t> layers = {kLayers - 1};
  std::vector<std::byte> expected;
  Check(
      loaded.sequence->ReadRows(
          0, 0, 0, layers,
          [&](const RowsPart& part) {
            for (uint32_t i = 0; i < part.num_tokens; ++i) {
              const uint64_t row = part.first_token + i;
              if (row % kChunkTokens == 0) {
                expected =
                    Rows(part.layer, part.kind, row,
                         static_cast<uint32_t>(std::min<uint64_t>(kChunkTokens, num_tokens - row)));
              }
              if (std::memcmp(part.bytes.data() + uint64_t{i} * kRowBytes,
                              expected.data() + (row % kChunkTokens) * kRowBytes, kRowBytes) != 0) {
                return absl::DataLossError(absl::StrCat("row ", row, " differs"));
              }
              ++compared;
            }
            return absl::OkStatus();
          }),
      "read back");
  if (compared != 2 * num_tokens) Fail(absl::StrCat("compared ", compared, " rows"));
  return result;
}

double Median(std::vector<double> values) {
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

int Main(int argc, char** argv) {
  CLI::App app{"Save and load one large state, against the raw disk"};
  std::string dir;
  uint64_t mib = 1024;
  int runs = 3;
  app.add_option("--dir", dir, "Folder on the disk to measure; its content is replaced")
      ->required();
  app.add_option("--mib", mib, "Size of the state, a multiple of 4")->check(CLI::Range(4, 65536));
  app.add_option("--runs", runs, "Runs; the median counts")->check(CLI::Range(1, 100));
  CLI11_PARSE(app, argc, argv);
  const uint64_t num_bytes = mib * (1 << 20) / kPageBytes * kPageBytes;
  const double gb = static_cast<double>(num_bytes) / 1e9;
  std::vector<RunResult> results;
  for (int run = 0; run < runs; ++run) {
    results.push_back(RunOnce(fs::path(dir) / "session_bench", num_bytes));
    const RunResult& r = results.back();
    std::printf(
        "{\"run\":%d,\"bytes\":%llu,\"raw_write_s\":%.3f,\"raw_read_s\":%.3f,"
        "\"save_s\":%.3f,\"save_again_s\":%.4f,\"load_answer_s\":%.4f,"
        "\"load_ready_s\":%.3f}\n",
        run, static_cast<unsigned long long>(num_bytes), r.raw.write, r.raw.read, r.save,
        r.save_again, r.load_open, r.load_ready);
    std::fflush(stdout);
  }
  fs::remove_all(fs::path(dir) / "session_bench");
  const auto median = [&](auto field) {
    std::vector<double> values;
    for (const RunResult& r : results) values.push_back(field(r));
    return Median(values);
  };
  const double raw_write = median([](const RunResult& r) { return r.raw.write; });
  const double raw_read = median([](const RunResult& r) { return r.raw.read; });
  const double save = median([](const RunResult& r) { return r.save; });
  const double ready = median([](const RunResult& r) { return r.load_ready; });
  std::printf(
      "{\"median_of\":%d,\"raw_write_gb_s\":%.3f,\"raw_read_gb_s\":%.3f,"
      "\"save_gb_s\":%.3f,\"load_gb_s\":%.3f,\"save_over_raw\":%.2f,"
      "\"load_over_raw\":%.2f}\n",
      runs, gb / raw_write, gb / raw_read, gb / save, gb / ready, save / raw_write,
      ready / raw_read);
  return 0;
}

}  // namespace
}  // namespace pagetide::bench

int main(int argc, char** argv) {
  return pagetide::bench::Main(argc, argv);
}
