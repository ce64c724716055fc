// bare_stream: the other process of dataplane_bench, which compares it with plain sockets and with
// a worker.
//
//   bare_stream --serve=ADDRESS --memory-bytes=N [--callbacks] [--copy] [--checksum]
#include <CLI/CLI.hpp>
#include <cstdint>
#include <string>

#include "bench/bare_stream.h"
#include "rpc/process_tuning.h"

int main(int argc, char** argv) {
  pagetide::TuneProcess();
  CLI::App app("What gRPC alone gives for the messages of the data plane");
  std::string address;
  uint64_t memory_bytes = uint64_t{64} << 20;
  pagetide::bench::BareStreamTuning tuning;
  app.add_option("--serve", address, "Address to serve at")->required();
  app.add_option("--memory-bytes", memory_bytes, "Memory that is read and written");
  app.add_flag("--callbacks", tuning.use_callbacks, "Handlers of gRPC's callback API");
  app.add_flag("--copy", tuning.copy, "Copy received rows into a pool");
  app.add_flag("--checksum", tuning.checksum, "Checksum received rows");
  CLI11_PARSE(app, argc, argv);
  return pagetide::bench::RunBareStreamServer(address, memory_bytes, tuning);
}
