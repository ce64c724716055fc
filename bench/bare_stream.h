// What gRPC alone gives between two processes for the messages of ReadRows and AppendTokens: the
// same streams over the same server and channels as the worker's, with a handler that drops what it
// receives and sends bytes that lie ready. Between this figure and the plain socket's lies what the
// dependency costs; between it and the worker's, what we do. Of that the least is known: rows go
// into the pool that local peers map, and are checksummed. With `copy` and `checksum` the handler
// does these two and nothing else: what can be had with this gRPC on this machine.
#ifndef PAGETIDE_BENCH_BARE_STREAM_H_
#define PAGETIDE_BENCH_BARE_STREAM_H_

#include <grpcpp/channel.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

namespace pagetide::bench {

struct BareStreamTuning {
  bool use_callbacks = false;  // gRPC's callback API instead of the synchronous one
  bool copy = false;           // received rows into a pool like the worker's
  bool checksum = false;       // received rows, block by block while they are in the cache
};

// Serves at "unix:/path" or "127.0.0.1:0" out of `memory_bytes` bytes, all touched before; prints
// "bare_stream ready address=ADDRESS" and returns after SIGTERM.
int RunBareStreamServer(const std::string& address, uint64_t memory_bytes,
                        const BareStreamTuning& tuning);

// For several threads, which share a connection. Every failure ends the process with a message.
class BareStreamClient {
 public:
  explicit BareStreamClient(const std::string& address);
  // One call that brings bytes [begin, end) of the server's memory, in messages of part_bytes at
  // most. They are dropped.
  void Read(uint64_t begin, uint64_t end, uint64_t part_bytes);
  // One call that sends `from` in messages of part_bytes at most.
  void Write(std::span<const std::byte> from, uint64_t part_bytes);

 private:
  const std::shared_ptr<grpc::Channel> channel_;  // gRPC shares it with running calls
};

}  // namespace pagetide::bench

#endif  // PAGETIDE_BENCH_BARE_STREAM_H_
