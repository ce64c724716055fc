// The worker's data plane against plain sockets, in one run of alternating cases: ReadRows and
// AppendTokens of 2 MiB pages over a unix socket and over TCP, reading in place through the memfd
// against memcpy, and CommitStep of 256 sequences.
//
//   dataplane_bench [--runs=9] [--pages=32] [--steps=210] [--only=TEXT] [--seconds=0]
//
// Starts a real pagetide-worker from its own folder, and for the baseline the socket_baseline
// program. A case and its baseline run next to each other; the ratio is the median of the ratios of
// such pairs, which a drift of the machine cannot move. The best of all runs says what either can
// do when the machine's other users leave it alone. CPU seconds are those of both processes. Bytes
// are compared with what was written, outside the timed parts.
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "bench/bench_process.h"
#include "bench/socket_baseline.h"
#include "clients/cpp/batch_step.h"
#include "clients/cpp/client.h"
#include "clients/cpp/in_place_rows.h"
#include "kvstore/rocksdb_page_store.h"
#include "rpc/model_codec.h"
#include "rpc/process_tuning.h"

namespace pagetide::bench {
namespace {

// 4 layers of 4 heads of 128 f16: rows of 1 KiB, pages of 256 tokens of 2 MiB.
constexpr uint32_t kPageTokens = 256;
constexpr uint32_t kLayers = 4;
constexpr uint32_t kRowBytes = 1024;
constexpr uint64_t kPageBytes = uint64_t{kPageTokens} * kLayers * 2 * kRowBytes;
constexpr uint64_t kPoolBytes = uint64_t{640} << 20;

[[noreturn]] void Die(const std::string& what) {
  std::fprintf(stderr, "dataplane_bench: %s\n", what.c_str());
  std::exit(1);
}
void Check(const absl::Status& status, const char* what) {
  if (!status.ok()) Die(absl::StrCat(what, ": ", status.ToString()));
}
template <typename T>
T Check(absl::StatusOr<T> result, const char* what) {
  Check(result.status(), what);
  return *std::move(result);
}

double Now() {
  return absl::ToDoubleSeconds(Clock::Real()->MonotonicNow().since_boot);
}

double Median(std::vector<double> values) {
  if (values.empty()) return 0;
  std::sort(values.begin(), values.end());
  return values[values.size() / 2];
}

struct Flags {
  int runs = 9;
  uint64_t pages = 32;
  int steps = 210;  // of CommitStep; at most a page of tokens
  std::string only;
  // Longer than 0: repeats the first case of `only` for so long, for a profiler.
  double seconds = 0;
};

// [layer][K, V][token][row], as one append of `pages` pages has it.
class Rows {
 public:
  explicit Rows(uint64_t num_tokens)
      : num_tokens_(num_tokens), bytes_(num_tokens * kLayers * 2 * kRowBytes) {
    uint64_t x = 88172645463325252;
    for (size_t i = 0; i + 8 <= bytes_.size(); i += 8) {
      x ^= x << 13;
      x ^= x >> 7;
      x ^= x << 17;
      std::memcpy(bytes_.data() + i, &x, 8);
    }
  }
  uint64_t num_tokens() const { return num_tokens_; }
  std::span<const std::byte> all() const { return bytes_; }
  std::span<const std::byte> Of(uint32_t layer, RowKind kind, uint64_t begin, uint64_t end) const {
    const uint64_t first = (layer * 2 + (kind == RowKind::kV)) * num_tokens_ + begin;
    return std::span(bytes_).subspan(first * kRowBytes, (end - begin) * kRowBytes);
  }

 private:
  const uint64_t num_tokens_;
  std::vector<std::byte> bytes_;
};

Model BenchModel() {
  ModelSpec spec;
  spec.name = "dataplane-bench";
  spec.geometry.page_tokens = kPageTokens;
  LayerGroupSpec group;
  for (uint32_t layer = 0; layer < kLayers; ++layer) group.layers.push_back(layer);
  group.k_type = group.v_type = DataType::kF16;
  group.kv_heads = 4;
  group.k_dim = group.v_dim = 128;
  spec.geometry.groups.push_back(group);
  return Check(Model::Create(spec), "make model");
}

struct TempFolder {
  TempFolder() {
    char pattern[] = "/tmp/dataplane-bench-XXXXXX";
    if (mkdtemp(pattern) == nullptr) Die("make a folder");
    path = pattern;
  }
  ~TempFolder() {
    std::error_code ignored;
    std::filesystem::remove_all(path, ignored);
  }
  std::string path;
};

// One worker process and a client of it over one transport.
class WorkerSide {
 public:
  WorkerSide(const std::string& folder, std::shared_ptr<const Model> model)
      : folder_(folder), model_(std::move(model)) {
    const std::string store_dir = absl::StrCat(folder, "/store");
    {
      // As a router registers it, while no process has the store open.
      auto store = Check(RocksdbPageStore::Open({.dir = store_dir}), "open store");
      Check(store
                ->CompareAndSetRecord("model", model_->digest().ToHex(), 0,
                                      SerializeModelSpec(model_->spec()),
                                      MonotonicTime::InfiniteFuture())
                .status(),
            "register model");
    }
    process_ = std::make_unique<BenchProcess>(
        SiblingPath("pagetide-worker"),
        std::vector<std::string>{
            "--listen=127.0.0.1:0", absl::StrCat("--listen=unix:", folder, "/grpc.sock"),
            absl::StrCat("--local-socket=", local_socket()),
            absl::StrCat("--store-dir=", store_dir), absl::StrCat("--pool-bytes=", kPoolBytes),
            // The disk is store_bench's matter.
            "--write-through=false", "--spill-high-watermark=1"});
  }
  std::unique_ptr<Client> Connect(bool unix_socket, bool local_plane) const {
    ClientOptions options;
    options.worker_address =
        unix_socket ? absl::StrCat("unix:", folder_, "/grpc.sock") : process_->Value("grpc");
    options.worker_local_socket = local_socket();
    options.use_local_plane = local_plane;
    options.staging_bytes = 16 << 20;
    return Check(Client::Create(options), "make client");
  }
  std::string local_socket() const { return absl::StrCat(folder_, "/local.sock"); }
  const BenchProcess& process() const { return *process_; }
  const std::shared_ptr<const Model>& model() const { return model_; }

 private:
  const std::string folder_;
  const std::shared_ptr<const Model> model_;  // shared with the client's sequences
  std::unique_ptr<BenchProcess> process_;
};

std::unique_ptr<Sequence> OpenEmpty(Client& client, const WorkerSide& worker) {
  // One token of a prompt is never reused: the sequence starts empty.
  const std::vector<uint32_t> prompt = {1};
  return Check(client.Open(worker.model(), prompt, {.no_reuse = true}), "open");
}

// All rows of tokens [begin, end) as one AppendTokens call. The rows are lent, not copied.
void Append(Sequence& sequence, const Rows& rows, uint64_t begin, uint64_t end, uint32_t salt) {
  static const auto owner = std::make_shared<int>(0);  // `rows` outlives all calls
  std::vector<uint32_t> tokens(end - begin);
  for (size_t i = 0; i < tokens.size(); ++i) {
    tokens[i] = salt * 1'000'003 + static_cast<uint32_t>(begin + i);
  }
  const auto append = Check(sequence.BeginAppend(tokens, /*will_attend=*/false), "begin append");
  for (uint32_t layer = 0; layer < kLayers; ++layer) {
    for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
      Check(append->WriteLentRows(0, layer, kind, 0, rows.Of(layer, kind, begin, end), owner),
            "write rows");
    }
  }
  Check(append->Commit().status(), "commit append");
}

uint64_t Read(Sequence& sequence, uint64_t begin, uint64_t end) {
  uint64_t bytes = 0;
  Check(sequence.ReadRowPieces(0, begin, end, {},
                               [&](const RowsPieces& part) {
                                 bytes += part.bytes->size();
                                 return absl::OkStatus();
                               }),
        "read rows");
  return bytes;
}

// Reads everything again and compares every byte.
uint64_t Verify(Sequence& sequence, const Rows& rows) {
  uint64_t verified = 0;
  Check(sequence.ReadRows(0, 0, 0, {},
                          [&](const RowsPart& part) -> absl::Status {
                            const auto expected = rows.Of(part.layer, part.kind, part.first_token,
                                                          part.first_token + part.num_tokens);
                            if (std::memcmp(expected.data(), part.bytes.data(), expected.size()) !=
                                0) {
                              return absl::DataLossError("a row differs from what was appended");
                            }
                            verified += expected.size();
                            return absl::OkStatus();
                          }),
        "verify rows");
  if (verified != rows.all().size()) Die(absl::StrCat("verified only ", verified, " bytes"));
  return verified;
}

struct Measured {
  double seconds = 0;
  double cpu_seconds = 0;
};

struct Case {
  std::string name;
  uint64_t num_bytes = 0;
  std::function<Measured()> baseline;
  std::function<Measured()> measured;
};

// Times `work`, with the CPU time that this process and `other` spent on it.
Measured Time(const BenchProcess& other, const std::function<void()>& work) {
  const double cpu = OwnCpuSeconds() + other.CpuSeconds();
  const double began = Now();
  work();
  const double seconds = Now() - began;
  return {seconds, OwnCpuSeconds() + other.CpuSeconds() - cpu};
}

void ClearCache(Sequence& sequence) {
  grpc::ClientContext context;
  v1::ClearCacheResponse response;
  Check(FromGrpcStatus(sequence.worker().admin()->ClearCache(&context, {}, &response)),
        "clear cache");
}

// Latencies of one call, in microseconds.
struct Latencies {
  std::vector<double> values;
  double Quantile(double q) {
    if (values.empty()) return 0;
    std::sort(values.begin(), values.end());
    return values[std::min(values.size() - 1,
                           static_cast<size_t>(q * static_cast<double>(values.size())))];
  }
};

// Decode steps of `num_sequences` sequences, one token each: reserve, write the rows of all layers,
// commit. The rows of one step are 8 KiB a sequence.
void MeasureSteps(const WorkerSide& worker, bool is_unix, bool local_plane, size_t num_sequences,
                  int num_steps) {
  const auto client = worker.Connect(is_unix, local_plane);
  std::vector<std::unique_ptr<Sequence>> sequences;
  std::vector<Sequence*> pointers;
  for (size_t i = 0; i < num_sequences; ++i) {
    sequences.push_back(OpenEmpty(*client, worker));
    pointers.push_back(sequences.back().get());
  }
  std::vector<std::byte> row(kRowBytes);
  Latencies commit, step_time;
  uint64_t verified = 0;
  for (int n = 0; n < num_steps; ++n) {
    const double began = Now();
    const auto step = Check(BatchStep::Begin(pointers, 1, /*will_attend=*/false), "begin step");
    if (step->is_local() != local_plane) Die("rows go another way than asked");
    for (size_t i = 0; i < num_sequences; ++i) {
      for (uint32_t layer = 0; layer < kLayers; ++layer) {
        row[0] = static_cast<std::byte>(n);
        row[1] = static_cast<std::byte>(i);
        Check(step->WriteRows(i, 0, layer, row, row), "write rows");
      }
    }
    const std::vector<uint32_t> token = {static_cast<uint32_t>(n)};
    const std::vector<std::span<const uint32_t>> tokens(num_sequences, token);
    const double ready = Now();
    const auto results = Check(step->Commit(tokens), "commit step");
    const double done = Now();
    for (const absl::Status& result : results) Check(result, "commit of a sequence");
    if (n < 10) continue;  // warms up
    commit.values.push_back((done - ready) * 1e6);
    step_time.values.push_back((done - began) * 1e6);
  }
  for (size_t i = 0; i < num_sequences; i += 17) {
    Check(sequences[i]->ReadRows(0, 0, 0, {},
                                 [&](const RowsPart& part) -> absl::Status {
                                   for (uint32_t t = 0; t < part.num_tokens; ++t) {
                                     const std::byte* const at = part.bytes.data() + t * kRowBytes;
                                     if (at[0] != static_cast<std::byte>(part.first_token + t) ||
                                         at[1] != static_cast<std::byte>(i)) {
                                       return absl::DataLossError(
                                           "a row differs from what was committed");
                                     }
                                   }
                                   verified += part.num_tokens;
                                   return absl::OkStatus();
                                 }),
          "verify steps");
  }
  if (verified == 0) Die("no row of a step was compared");
  std::printf("| CommitStep of %zu sequences, %s | %.0f | %.0f | %.0f | %.0f |\n", num_sequences,
              local_plane ? "rows in shared memory"
                          : (is_unix ? "rows in the call, unix" : "rows in the call, tcp"),
              commit.Quantile(0.5), commit.Quantile(0.99), step_time.Quantile(0.5),
              step_time.Quantile(0.99));
}

int Main(const Flags& flags) {
  TempFolder folder;
  const uint64_t num_tokens = flags.pages * kPageTokens;
  const uint64_t num_bytes = flags.pages * kPageBytes;
  const Rows rows(num_tokens);
  WorkerSide worker(folder.path, std::make_shared<const Model>(BenchModel()));
  uint64_t verified = 0;
  uint32_t salt = 0;

  struct Side {
    std::unique_ptr<BenchProcess> socket_server;
    std::unique_ptr<SocketClient> socket;
    std::unique_ptr<Client> client;
    std::vector<std::unique_ptr<Sequence>> readers;
  };
  std::vector<std::unique_ptr<Side>> sides;
  std::vector<std::byte> part(1 << 20);
  std::vector<Case> cases;
  for (const bool is_unix : {true, false}) {
    const char* const transport = is_unix ? "unix" : "tcp";
    SocketTuning tuning;
    tuning.buffer_bytes = is_unix ? 1 << 20 : 0;
    auto side = std::make_unique<Side>();
    side->socket_server = std::make_unique<BenchProcess>(
        SiblingPath("socket_baseline"),
        std::vector<std::string>{
            absl::StrCat("--serve=",
                         is_unix ? absl::StrCat("unix:", folder.path, "/raw.sock") : "127.0.0.1:0"),
            absl::StrCat("--buffer-bytes=", tuning.buffer_bytes),
            absl::StrCat("--memory-bytes=", num_bytes)});
    side->socket = std::make_unique<SocketClient>(side->socket_server->Value("address"), tuning);
    side->client = worker.Connect(is_unix, false);
    for (int i = 0; i < 2; ++i) {
      side->readers.push_back(OpenEmpty(*side->client, worker));
      Append(*side->readers.back(), rows, 0, num_tokens, ++salt);
    }
    Side* const s = side.get();
    sides.push_back(std::move(side));
    const auto two_threads = [](const std::function<void(int)>& work) {
      std::thread other([&] { work(1); });
      work(0);
      other.join();
    };
    cases.push_back({absl::StrCat("ReadRows, ", transport, ", one stream"), num_bytes,
                     [&, s] {
                       return Time(*s->socket_server,
                                   [&] { s->socket->Read(1, num_bytes, 1, part); });
                     },
                     [&, s] {
                       return Time(worker.process(), [&] {
                         if (Read(*s->readers[0], 0, num_tokens) != num_bytes) Die("short read");
                       });
                     }});
    cases.push_back({absl::StrCat("ReadRows, ", transport, ", a page a call, 2 in flight"),
                     num_bytes,
                     [&, s] {
                       return Time(*s->socket_server,
                                   [&] { s->socket->Read(flags.pages, kPageBytes, 2, part); });
                     },
                     [&, s, two_threads] {
                       return Time(worker.process(), [&] {
                         two_threads([&](int t) {
                           for (uint64_t p = t; p < flags.pages; p += 2) {
                             Read(*s->readers[t], p * kPageTokens, (p + 1) * kPageTokens);
                           }
                         });
                       });
                     }});
    cases.push_back(
        {absl::StrCat("AppendTokens, ", transport, ", one stream"), num_bytes,
         [&, s] { return Time(*s->socket_server, [&] { s->socket->Write(1, rows.all(), 1); }); },
         [&, s] {
           const auto sequence = OpenEmpty(*s->client, worker);
           ++salt;
           const Measured measured =
               Time(worker.process(), [&] { Append(*sequence, rows, 0, num_tokens, salt); });
           if (salt % 4 == 0) verified += Verify(*sequence, rows);
           Check(sequence->Close(), "close");
           ClearCache(*sequence);
           return measured;
         }});
    cases.push_back(
        {absl::StrCat("AppendTokens, ", transport, ", a page a call, 2 in flight"), num_bytes,
         [&, s] {
           return Time(*s->socket_server,
                       [&] { s->socket->Write(flags.pages, rows.all().first(kPageBytes), 2); });
         },
         [&, s, two_threads] {
           std::unique_ptr<Sequence> sequences[] = {OpenEmpty(*s->client, worker),
                                                    OpenEmpty(*s->client, worker)};
           const uint32_t first_salt = salt += 2;
           const Measured measured = Time(worker.process(), [&] {
             two_threads([&](int t) {
               for (uint64_t p = 0; p < flags.pages / 2; ++p) {
                 Append(*sequences[t], rows, p * kPageTokens, (p + 1) * kPageTokens,
                        first_salt + t);
               }
             });
           });
           for (const auto& sequence : sequences) Check(sequence->Close(), "close");
           ClearCache(*sequences[0]);
           return measured;
         }});
  }
  for (const auto& side : sides) {
    for (const auto& reader : side->readers) verified += Verify(*reader, rows);
  }

  // Through the mapped frames of the worker, the lease included, against the same memcpy from
  // memory of our own.
  const auto local_client = worker.Connect(true, true);
  const auto mapped = OpenEmpty(*local_client, worker);
  Append(*mapped, rows, 0, num_tokens, ++salt);
  std::vector<std::byte> copy(num_bytes);
  const auto read_in_place = [&] {
    const auto in_place = Check(mapped->ReadInPlace(absl::Seconds(5)), "read in place");
    for (uint32_t layer = 0; layer < kLayers; ++layer) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        const auto to = rows.Of(layer, kind, 0, num_tokens).data() - rows.all().data();
        for (const InPlaceRows::Run& run : in_place->Rows(0, layer, kind)) {
          std::memcpy(copy.data() + to + run.first_token * kRowBytes, run.bytes.data(),
                      run.bytes.size());
        }
      }
    }
    if (!in_place->IsValid()) Die("the lease ended while reading");
  };
  read_in_place();
  if (std::memcmp(copy.data(), rows.all().data(), num_bytes) != 0) Die("in place: wrong bytes");
  verified += num_bytes;
  cases.push_back({"copy out of the shared frames (baseline: memcpy)", num_bytes,
                   [&] {
                     return Time(worker.process(),
                                 [&] { std::memcpy(copy.data(), rows.all().data(), num_bytes); });
                   },
                   [&] { return Time(worker.process(), read_in_place); }});

  std::erase_if(cases, [&](const Case& c) { return c.name.find(flags.only) == std::string::npos; });
  if (flags.seconds > 0 && !cases.empty()) {
    for (const double end = Now() + flags.seconds; Now() < end;) cases[0].measured();
    return 0;
  }
  struct Result {
    std::vector<double> ratio, baseline, measured, baseline_cpu, measured_cpu;
    double best_baseline = 0, best_measured = 0;
  };
  std::vector<Result> results(cases.size());
  for (int run = 0; run <= flags.runs; ++run) {
    for (size_t i = 0; i < cases.size(); ++i) {
      const Measured baseline = cases[i].baseline();
      const Measured measured = cases[i].measured();
      if (run == 0) continue;  // warms up
      const double gb = static_cast<double>(cases[i].num_bytes) / 1e9;
      results[i].ratio.push_back(baseline.seconds / measured.seconds);
      results[i].baseline.push_back(gb / baseline.seconds);
      results[i].measured.push_back(gb / measured.seconds);
      results[i].best_baseline = std::max(results[i].best_baseline, gb / baseline.seconds);
      results[i].best_measured = std::max(results[i].best_measured, gb / measured.seconds);
      results[i].baseline_cpu.push_back(baseline.cpu_seconds / gb);
      results[i].measured_cpu.push_back(measured.cpu_seconds / gb);
    }
  }
  std::printf(
      "| case | baseline GB/s | measured GB/s | ratio | best baseline | best measured | ratio of "
      "the best | "
      "baseline CPU-s/GB | measured CPU-s/GB |\n");
  std::printf("|---|---|---|---|---|---|---|---|---|\n");
  for (size_t i = 0; i < cases.size(); ++i) {
    const Result& r = results[i];
    std::printf("| %s | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f | %.2f |\n",
                cases[i].name.c_str(), Median(r.baseline), Median(r.measured), Median(r.ratio),
                r.best_baseline, r.best_measured, r.best_measured / r.best_baseline,
                Median(r.baseline_cpu), Median(r.measured_cpu));
  }
  if (std::string("CommitStep").find(flags.only) != std::string::npos || flags.only.empty()) {
    for (const auto& side : sides) side->readers.clear();
    Check(mapped->Close(), "close");
    ClearCache(*mapped);
    std::printf("\n| case | commit p50 µs | p99 µs | reserve + write + commit p50 µs | p99 µs |\n");
    std::printf("|---|---|---|---|---|\n");
    MeasureSteps(worker, true, true, 256, flags.steps);
    MeasureSteps(worker, true, false, 256, flags.steps);
    MeasureSteps(worker, false, false, 256, flags.steps);
  }
  std::printf("\n%d runs of %llu MiB; %.2f GB compared byte by byte, 0 wrong\n", flags.runs,
              static_cast<unsigned long long>(num_bytes >> 20),
              static_cast<double>(verified) / 1e9);
  return 0;
}

}  // namespace
}  // namespace pagetide::bench

int main(int argc, char** argv) {
  pagetide::TuneProcess();
  pagetide::bench::Flags flags;
  for (int a = 1; a < argc; ++a) {
    const std::string arg = argv[a];
    const std::string value = arg.substr(std::min(arg.size(), arg.find('=') + 1));
    if (arg.rfind("--runs=", 0) == 0) {
      flags.runs = std::max(1, std::stoi(value));
    } else if (arg.rfind("--pages=", 0) == 0) {
      flags.pages = std::stoull(value);
    } else if (arg.rfind("--steps=", 0) == 0) {
      flags.steps =
          std::clamp(std::stoi(value), 20, static_cast<int>(pagetide::bench::kPageTokens));
    } else if (arg.rfind("--only=", 0) == 0) {
      flags.only = value;
    } else if (arg.rfind("--seconds=", 0) == 0) {
      flags.seconds = std::stod(value);
    } else {
      std::fprintf(stderr,
                   "usage: dataplane_bench [--runs=N] [--pages=N] [--steps=N] [--only=TEXT] "
                   "[--seconds=S]\n");
      return 2;
    }
  }
  return pagetide::bench::Main(flags);
}
