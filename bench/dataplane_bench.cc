// The worker's data plane against plain sockets and against bare gRPC, in one run of alternating
// contenders: ReadRows and AppendTokens of 2 MiB pages over a unix socket and over TCP, reading in
// place through the memfd against memcpy, and CommitStep of 256 sequences.
//
//   dataplane_bench [--runs=9] [--pages=32] [--steps=210] [--only=TEXT] [--seconds=0]
//
// Starts a real pagetide-worker from its own folder, the socket_baseline program, and bare_stream:
// the same messages over the same gRPC with handlers that do nothing, or copy and checksum the
// rows they receive and do nothing else. CPU seconds are those of both processes. Bytes are
// compared with what was written, outside the timed parts.
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
#include "bench/alternating.h"
#include "bench/dataplane_rivals.h"
#include "bench/dataplane_worker.h"
#include "bench/seconds_now.h"
#include "clients/cpp/batch_step.h"
#include "clients/cpp/client.h"
#include "clients/cpp/in_place_rows.h"
#include "rpc/process_tuning.h"

namespace pagetide::bench {
namespace {

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

struct Flags {
  int runs = 9;
  uint64_t pages = 32;
  int steps = 210;  // of CommitStep; at most a page of tokens
  std::string only;
  // Longer than 0: repeats the first case of `only` for so long, for a profiler.
  double seconds = 0;
};

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
    const double began = SecondsNow();
    const auto step = Check(BatchStep::Begin(pointers, 1, /*will_attend=*/false), "begin step");
    if (step->is_local() != local_plane) Die("rows go another way than asked");
    for (size_t i = 0; i < num_sequences; ++i) {
      for (uint32_t layer = 0; layer < kLayers; ++layer) {
        row[0] = static_cast<std::byte>(n);
        row[1] = static_cast<std::byte>(i);
        Check(step->WriteRows(i, 0, layer, row, row), "write rows");
      }
    }
    std::vector<uint32_t> ids(num_sequences);
    std::vector<std::span<const uint32_t>> tokens;
    for (size_t i = 0; i < num_sequences; ++i) {
      ids[i] = static_cast<uint32_t>(i * 1000 + n);
      tokens.emplace_back(&ids[i], 1);
    }
    const double ready = SecondsNow();
    const auto results = Check(step->Commit(tokens), "commit step");
    const double done = SecondsNow();
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

void InTwoThreads(const std::function<void(int)>& work) {
  std::thread other([&] { work(1); });
  work(0);
  other.join();
}

int Main(const Flags& flags) {
  TempFolder folder;
  const uint64_t num_tokens = flags.pages * kPageTokens;
  const uint64_t num_bytes = flags.pages * kPageBytes;
  const Rows rows(num_tokens);
  WorkerSide worker(folder.path);
  uint64_t verified = 0;
  uint32_t salt = 0;

  struct Side {
    std::unique_ptr<Rivals> rivals;
    std::unique_ptr<Client> client;
    std::vector<std::unique_ptr<Sequence>> readers;
  };
  std::vector<std::unique_ptr<Side>> sides;
  std::vector<std::byte> part(kPartBytes);
  std::vector<Case> cases;
  // The last contender of a case: the worker itself.
  const auto add = [&](std::string name, std::vector<Contender> contenders,
                       std::function<Measured()> by_worker) {
    contenders.push_back({"PageTide", std::move(by_worker)});
    cases.push_back({std::move(name), num_bytes, std::move(contenders)});
  };
  for (const bool is_unix : {true, false}) {
    const char* const transport = is_unix ? "unix" : "tcp";
    auto side = std::make_unique<Side>();
    side->rivals = std::make_unique<Rivals>(folder.path, is_unix, num_bytes);
    side->client = worker.Connect(is_unix, false);
    for (int i = 0; i < 2; ++i) {
      side->readers.push_back(OpenEmpty(*side->client, worker));
      Append(*side->readers.back(), rows, 0, num_tokens, ++salt);
    }
    Side* const s = side.get();
    sides.push_back(std::move(side));
    add(absl::StrCat("ReadRows, ", transport, ", one stream"),
        s->rivals->Contenders(
            false, [&](SocketClient& client) { client.Read(1, num_bytes, 1, part); },
            [&](BareStreamClient& client) { client.Read(0, num_bytes, kPartBytes); }),
        [&, s] {
          return TimeWith(worker.process(), [&] {
            if (Read(*s->readers[0], 0, num_tokens) != num_bytes) Die("short read");
          });
        });
    add(absl::StrCat("ReadRows, ", transport, ", a page a call, 2 in flight"),
        s->rivals->Contenders(
            false, [&](SocketClient& client) { client.Read(flags.pages, kPageBytes, 2, part); },
            [&](BareStreamClient& client) {
              InTwoThreads([&](int t) {
                for (uint64_t p = t; p < flags.pages; p += 2) {
                  client.Read(p * kPageBytes, (p + 1) * kPageBytes, kRunBytes);
                }
              });
            }),
        [&, s] {
          return TimeWith(worker.process(), [&] {
            InTwoThreads([&](int t) {
              for (uint64_t p = t; p < flags.pages; p += 2) {
                Read(*s->readers[t], p * kPageTokens, (p + 1) * kPageTokens);
              }
            });
          });
        });
    add(absl::StrCat("AppendTokens, ", transport, ", one stream"),
        s->rivals->Contenders(
            true, [&](SocketClient& client) { client.Write(1, rows.all(), 1); },
            [&](BareStreamClient& client) { client.Write(rows.all(), kPartBytes); }),
        [&, s] {
          const auto sequence = OpenEmpty(*s->client, worker);
          ++salt;
          const Measured measured =
              TimeWith(worker.process(), [&] { Append(*sequence, rows, 0, num_tokens, salt); });
          if (salt % 4 == 0) verified += Verify(*sequence, rows);
          Check(sequence->Close(), "close");
          ClearCache(*sequence);
          return measured;
        });
    add(absl::StrCat("AppendTokens, ", transport, ", a page a call, 2 in flight"),
        s->rivals->Contenders(
            true, [&](SocketClient& client) { client.Write(flags.pages, rows.all(), 2); },
            [&](BareStreamClient& client) {
              InTwoThreads([&](int t) {
                for (uint64_t p = t; p < flags.pages; p += 2) {
                  client.Write(rows.all().subspan(p * kPageBytes, kPageBytes), kRunBytes);
                }
              });
            }),
        [&, s] {
          std::unique_ptr<Sequence> sequences[] = {OpenEmpty(*s->client, worker),
                                                   OpenEmpty(*s->client, worker)};
          const uint32_t first_salt = salt += 2;
          const Measured measured = TimeWith(worker.process(), [&] {
            InTwoThreads([&](int t) {
              for (uint64_t p = 0; p < flags.pages / 2; ++p) {
                Append(*sequences[t], rows, p * kPageTokens, (p + 1) * kPageTokens, first_salt + t);
              }
            });
          });
          for (const auto& sequence : sequences) Check(sequence->Close(), "close");
          ClearCache(*sequences[0]);
          return measured;
        });
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
        Check(
            in_place->CopyRows(0, layer, kind, std::span(copy).subspan(to, num_tokens * kRowBytes)),
            "copy rows");
      }
    }
    if (!in_place->IsValid()) Die("the lease ended while reading");
  };
  read_in_place();
  if (std::memcmp(copy.data(), rows.all().data(), num_bytes) != 0) Die("in place: wrong bytes");
  verified += num_bytes;
  // The frames' runs begin at memory pages and their places do not, which is memcpy's worst case;
  // the runs of our own memory are aligned as their places are.
  const auto copy_runs = [&] {
    for (uint64_t at = 0; at < num_bytes; at += kRunBytes) {
      std::memcpy(copy.data() + at, rows.all().data() + at, kRunBytes);
    }
  };
  add("copy out of the shared frames",
      {{"memcpy of all",
        [&] {
          return TimeWith(worker.process(),
                          [&] { std::memcpy(copy.data(), rows.all().data(), num_bytes); });
        }},
       {"memcpy of runs", [&] { return TimeWith(worker.process(), copy_runs); }}},
      [&] { return TimeWith(worker.process(), read_in_place); });

  std::erase_if(cases, [&](const Case& c) { return c.name.find(flags.only) == std::string::npos; });
  if (flags.seconds > 0 && !cases.empty()) {
    for (const double end = SecondsNow() + flags.seconds; SecondsNow() < end;) {
      cases[0].contenders.back().run();
    }
    return 0;
  }
  RunAlternating(cases, flags.runs);
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
