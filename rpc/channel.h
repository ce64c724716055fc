// Limits that client and server of one connection must agree on, and the one way to make a channel.
#ifndef PAGETIDE_RPC_CHANNEL_H_
#define PAGETIDE_RPC_CHANNEL_H_

#include <grpcpp/channel.h>
#include <grpcpp/security/credentials.h>

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace pagetide {

// A message holds at most 4 MiB of payload; the rest is room for its header fields.
inline constexpr int kMaxPayloadBytes = 4 << 20;
inline constexpr int kMaxMessageBytes = kMaxPayloadBytes + (256 << 10);
// Headers or trailers of one call.
inline constexpr int kMaxMetadataBytes = 8 << 10;
// One page then fits in one HTTP/2 frame: the largest that RFC 9113 allows (2^24 - 1).
inline constexpr int kHttp2MaxFrameBytes = (16 << 20) - 1;

// What a stream may have handed to its connection and not yet written: enough that the writer of
// parts of 1 MiB is a part ahead of the socket.
inline constexpr int kHttp2WriteBufferBytes = 2 << 20;
// Buffer of a unix socket at the side that sends. The default of 208 KiB makes both ends sleep and
// wake five times for each part. TCP adapts its buffers by itself.
inline constexpr int kUnixSendBufferBytes = 2 << 20;

// Gives a unix socket that buffer. For both ends of a connection.
void SetUnixSendBuffer(int fd);

struct ChannelOptions {
  // An idle or blocked connection is probed after this time; the server allows half of it.
  absl::Duration keepalive_time = absl::Seconds(20);
  absl::Duration keepalive_timeout = absl::Seconds(10);
  // Reconnection after a failure starts with the first and doubles up to the second.
  absl::Duration initial_reconnect_backoff = absl::Milliseconds(100);
  absl::Duration max_reconnect_backoff = absl::Seconds(2);
  // Channels of one process to one target share a connection unless this is set. Bulk transfers
  // want their own: a page then never stands in front of a small call.
  bool own_connection = false;
  // Null = plaintext.
  std::shared_ptr<grpc::ChannelCredentials> credentials;
};

// `target`: "host:port" or "unix:/path". Never fails and never waits: a connection is made by the
// first call. gRPC's own retries are off: rpc/retry.h retries by trait and knows what is safe to
// repeat.
std::shared_ptr<grpc::Channel> MakeChannel(absl::string_view target,
                                           const ChannelOptions& options = {});

// A channel for rows and pages, on a connection of its own. To a unix socket without credentials it
// connects here and now, with kUnixSendBufferBytes (UNAVAILABLE if nobody listens), and is of no
// use any more after its first UNAVAILABLE: make another. To anything else it is as MakeChannel's.
absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeBulkChannel(absl::string_view target,
                                                               ChannelOptions options = {});

}  // namespace pagetide

#endif  // PAGETIDE_RPC_CHANNEL_H_
