#include "rpc/channel.h"

#include <grpcpp/create_channel.h>
#include <grpcpp/create_channel_posix.h>
#include <grpcpp/support/channel_arguments.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/status_macros.h"

namespace pagetide {

namespace {

constexpr absl::string_view kUnixPrefix = "unix:";

// A connected, non-blocking socket.
absl::StatusOr<int> ConnectUnix(absl::string_view path) {
  const auto error = [path](absl::string_view action) {
    return absl::UnavailableError(absl::StrCat(action, " unix:", path, ": ", strerror(errno)));
  };
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (path.empty() || path.size() >= sizeof(address.sun_path)) {
    return absl::InvalidArgumentError(absl::StrCat("connect to unix:", path, ": a path of ",
                                                   path.size(), " bytes, must have 1 to ",
                                                   sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, path.data(), path.size());
  // Non-blocking from the start: a full backlog is EAGAIN then, not a wait without an end.
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return error("create socket for");
  SetUnixSendBuffer(fd);
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    const absl::Status status = error("connect to");
    close(fd);
    return status;
  }
  return fd;
}

// A busy peer answers in this time; one that refuses is known at once.
constexpr absl::Duration kConnectTimeout = absl::Seconds(2);

grpc::ChannelArguments ArgumentsOf(const ChannelOptions& options) {
  const auto milliseconds = [](absl::Duration d) {
    return static_cast<int>(absl::ToInt64Milliseconds(d));
  };
  grpc::ChannelArguments args;
  args.SetMaxReceiveMessageSize(kMaxMessageBytes);
  args.SetMaxSendMessageSize(kMaxMessageBytes);
  args.SetInt(GRPC_ARG_MAX_METADATA_SIZE, kMaxMetadataBytes);
  args.SetInt(GRPC_ARG_HTTP2_MAX_FRAME_SIZE, kHttp2MaxFrameBytes);
  args.SetInt(GRPC_ARG_HTTP2_WRITE_BUFFER_SIZE, kHttp2WriteBufferBytes);
  args.SetInt(GRPC_ARG_ENABLE_RETRIES, 0);
  // Pages are of no use through an HTTP proxy named in the environment of the process.
  args.SetInt(GRPC_ARG_ENABLE_HTTP_PROXY, 0);
  args.SetInt(GRPC_ARG_KEEPALIVE_TIME_MS, milliseconds(options.keepalive_time));
  args.SetInt(GRPC_ARG_KEEPALIVE_TIMEOUT_MS, milliseconds(options.keepalive_timeout));
  args.SetInt(GRPC_ARG_KEEPALIVE_PERMIT_WITHOUT_CALLS, 1);
  args.SetInt(GRPC_ARG_HTTP2_MAX_PINGS_WITHOUT_DATA, 0);
  args.SetInt(GRPC_ARG_INITIAL_RECONNECT_BACKOFF_MS,
              milliseconds(options.initial_reconnect_backoff));
  // Despite its name, what an attempt to connect may take: until the server's settings have come.
  args.SetInt(GRPC_ARG_MIN_RECONNECT_BACKOFF_MS, milliseconds(kConnectTimeout));
  args.SetInt(GRPC_ARG_MAX_RECONNECT_BACKOFF_MS, milliseconds(options.max_reconnect_backoff));
  if (options.own_connection) args.SetInt(GRPC_ARG_USE_LOCAL_SUBCHANNEL_POOL, 1);
  return args;
}

}  // namespace

void SetUnixSendBuffer(int fd) {
  // The kernel takes its own limit where that is lower; slower, not wrong.
  setsockopt(fd, SOL_SOCKET, SO_SNDBUF, &kUnixSendBufferBytes, sizeof(kUnixSendBufferBytes));
}

std::shared_ptr<grpc::Channel> MakeChannel(absl::string_view target,
                                           const ChannelOptions& options) {
  return grpc::CreateCustomChannel(
      std::string(target),
      options.credentials != nullptr ? options.credentials : grpc::InsecureChannelCredentials(),
      ArgumentsOf(options));
}

absl::StatusOr<std::shared_ptr<grpc::Channel>> MakeBulkChannel(absl::string_view target,
                                                               ChannelOptions options) {
  options.own_connection = true;
  if (options.credentials != nullptr || !absl::StartsWith(target, kUnixPrefix)) {
    return MakeChannel(target, options);
  }
  PT_ASSIGN_OR_RETURN(const int fd, ConnectUnix(absl::StripPrefix(target, kUnixPrefix)));
  // The channel closes the socket.
  return grpc::CreateCustomInsecureChannelFromFd(std::string(target), fd, ArgumentsOf(options));
}

}  // namespace pagetide
