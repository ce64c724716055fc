// socket_baseline: bytes a second through plain sockets between two processes.
//
//   socket_baseline [--runs=5] [--mib=128] [--part-kib=1024]
//   socket_baseline --serve=ADDRESS [--buffer-bytes=N] [--memory-bytes=N]   the other process
//
// Tries the kernel's own socket buffers and several fixed sizes, alternating, and prints the median
// of each: dataplane_bench uses the best of them.
#include <unistd.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <string>
#include <vector>

#include "bench/bench_process.h"
#include "bench/seconds_now.h"
#include "bench/socket_baseline.h"

namespace pagetide::bench {
namespace {

struct Flags {
  std::string serve;
  uint64_t memory_bytes = 0;
  SocketTuning tuning;
  int runs = 5;
  uint64_t num_bytes = 128 << 20;
};

int Main(const Flags& flags) {
  if (!flags.serve.empty()) RunSocketServer(flags.serve, flags.memory_bytes, flags.tuning);
  char folder[] = "/tmp/socket-baseline-XXXXXX";
  if (mkdtemp(folder) == nullptr) return 1;
  struct Case {
    std::string name;
    std::unique_ptr<BenchProcess> server;
    std::unique_ptr<SocketClient> client;
    std::vector<double> read, write;
  };
  std::vector<Case> cases;
  for (const char* transport : {"unix", "tcp"}) {
    for (const int buffer_bytes : {0, 256 << 10, 1 << 20, 4 << 20}) {
      Case c;
      c.name =
          std::string(transport) + ", buffers of " +
          (buffer_bytes == 0 ? "the kernel's choice" : std::to_string(buffer_bytes >> 10) + " KiB");
      SocketTuning tuning = flags.tuning;
      tuning.buffer_bytes = buffer_bytes;
      const std::string address =
          std::strcmp(transport, "tcp") == 0
              ? "127.0.0.1:0"
              : "unix:" + std::string(folder) + "/" + std::to_string(buffer_bytes) + ".sock";
      c.server = std::make_unique<BenchProcess>(
          OwnPath(),
          std::vector<std::string>{"--serve=" + address,
                                   "--part-kib=" + std::to_string(tuning.part_bytes >> 10),
                                   "--buffer-bytes=" + std::to_string(buffer_bytes),
                                   "--memory-bytes=" + std::to_string(flags.num_bytes)});
      c.client = std::make_unique<SocketClient>(c.server->Value("address"), tuning);
      cases.push_back(std::move(c));
    }
  }
  std::vector<std::byte> part(flags.tuning.part_bytes);
  std::vector<std::byte> all(flags.num_bytes, std::byte{1});
  for (int run = 0; run <= flags.runs; ++run) {
    for (Case& c : cases) {
      const double began = SecondsNow();
      c.client->Read(1, flags.num_bytes, 1, part);
      const double middle = SecondsNow();
      c.client->Write(1, all, 1);
      if (run == 0) continue;  // warms up
      c.read.push_back(static_cast<double>(flags.num_bytes) / (middle - began) / 1e9);
      c.write.push_back(static_cast<double>(flags.num_bytes) / (SecondsNow() - middle) / 1e9);
    }
  }
  for (Case& c : cases) {
    std::sort(c.read.begin(), c.read.end());
    std::sort(c.write.begin(), c.write.end());
    std::printf(
        "{\"case\":\"%s\",\"bytes\":%llu,\"part_bytes\":%u,\"runs\":%d,\"read_gb_s\":%.2f,"
        "\"write_gb_s\":%.2f}\n",
        c.name.c_str(), static_cast<unsigned long long>(flags.num_bytes), flags.tuning.part_bytes,
        flags.runs, c.read[c.read.size() / 2], c.write[c.write.size() / 2]);
  }
  cases.clear();
  for (const int buffer_bytes : {0, 256 << 10, 1 << 20, 4 << 20}) {
    unlink((std::string(folder) + "/" + std::to_string(buffer_bytes) + ".sock").c_str());
  }
  rmdir(folder);
  return 0;
}

}  // namespace
}  // namespace pagetide::bench

int main(int argc, char** argv) {
  pagetide::bench::Flags flags;
  for (int a = 1; a < argc; ++a) {
    const std::string arg = argv[a];
    const std::string value = arg.substr(std::min(arg.size(), arg.find('=') + 1));
    if (arg.rfind("--serve=", 0) == 0) {
      flags.serve = value;
    } else if (arg.rfind("--runs=", 0) == 0) {
      flags.runs = std::max(1, std::stoi(value));
    } else if (arg.rfind("--mib=", 0) == 0) {
      flags.num_bytes = std::stoull(value) << 20;
    } else if (arg.rfind("--part-kib=", 0) == 0) {
      flags.tuning.part_bytes = static_cast<uint32_t>(std::stoul(value) << 10);
    } else if (arg.rfind("--buffer-bytes=", 0) == 0) {
      flags.tuning.buffer_bytes = std::stoi(value);
    } else if (arg.rfind("--memory-bytes=", 0) == 0) {
      flags.memory_bytes = std::stoull(value);
    } else {
      std::fprintf(stderr, "usage: socket_baseline [--runs=N] [--mib=N] [--part-kib=N]\n");
      return 2;
    }
  }
  return pagetide::bench::Main(flags);
}
