// What plain sockets give between two processes: the figure that the gRPC data plane is held
// against. The same bytes in the same parts as ReadRows and AppendTokens carry, from and into
// memory of the same size, with nothing on top: a 16-byte header a part instead of HTTP/2, no
// checksum, no table.
//
// The server is a process of its own (RunSocketServer in its main) with one thread a connection.
// SocketClient is for one thread at a time.
#ifndef PAGETIDE_BENCH_SOCKET_BASELINE_H_
#define PAGETIDE_BENCH_SOCKET_BASELINE_H_

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>

namespace pagetide::bench {

struct SocketTuning {
  // SO_SNDBUF and SO_RCVBUF on both ends; 0: the kernel's own choice (TCP then adapts it).
  int buffer_bytes = 4 << 20;
  // Payload that one header stands for.
  uint32_t part_bytes = 1 << 20;
};

// Serves at "unix:/path" or "127.0.0.1:0" out of `memory_bytes` bytes of memory, all touched
// before; prints "socket_baseline ready address=ADDRESS" and never returns. Exits on an error.
[[noreturn]] void RunSocketServer(const std::string& address, uint64_t memory_bytes,
                                  const SocketTuning& tuning);

class SocketClient {
 public:
  // Connects, or exits with a message: a benchmark has nobody to report to.
  SocketClient(const std::string& address, const SocketTuning& tuning);
  ~SocketClient();
  SocketClient(const SocketClient&) = delete;
  SocketClient& operator=(const SocketClient&) = delete;

  // The first num_requests × num_bytes bytes of the server's memory, num_bytes a request, at most
  // `in_flight` requests unanswered at a time. Received parts overwrite each other in `to` (at
  // least one part).
  void Read(uint64_t num_requests, uint64_t num_bytes, uint64_t in_flight, std::span<std::byte> to);
  // Sends `from` in num_requests requests of equal size to the start of the server's memory; the
  // server answers each when it has all of it.
  void Write(uint64_t num_requests, std::span<const std::byte> from, uint64_t in_flight);

 private:
  const SocketTuning tuning_;
  const int fd_;
};

}  // namespace pagetide::bench

#endif  // PAGETIDE_BENCH_SOCKET_BASELINE_H_
