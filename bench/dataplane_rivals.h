// The other contenders of dataplane_bench over one transport, each in a process of its own: plain
// sockets, and bare gRPC by both of its APIs. Every failure ends the process with a message.
#ifndef PAGETIDE_BENCH_DATAPLANE_RIVALS_H_
#define PAGETIDE_BENCH_DATAPLANE_RIVALS_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "bench/alternating.h"
#include "bench/bare_stream.h"
#include "bench/bench_process.h"
#include "bench/socket_baseline.h"

namespace pagetide::bench {

class Rivals {
 public:
  // Sockets go into `folder`; each process has num_bytes of memory to be read and written.
  Rivals(const std::string& folder, bool is_unix, uint64_t num_bytes);

  // Of one case. Appends also have those that copy and checksum. The rivals outlive the result.
  std::vector<Contender> Contenders(bool is_append, std::function<void(SocketClient&)> by_socket,
                                    std::function<void(BareStreamClient&)> by_grpc) const;

 private:
  struct Socket {
    std::unique_ptr<BenchProcess> server;
    std::unique_ptr<SocketClient> client;
  };
  struct Bare {
    std::string name;
    bool works = false;
    std::unique_ptr<BenchProcess> server;
    std::unique_ptr<BareStreamClient> client;
  };
  Socket socket_;
  std::vector<Bare> bare_;
};

}  // namespace pagetide::bench

#endif  // PAGETIDE_BENCH_DATAPLANE_RIVALS_H_
