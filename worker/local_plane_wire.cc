#include "worker/local_plane_wire.h"

#include <fcntl.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>

#include "absl/strings/str_cat.h"

namespace pagetide {

void ReceivedFds::Clear() {
  for (int fd : fds_) {
    if (fcntl(fd, F_GET_SEALS) >= 0) {
      close(fd);
    } else {
      closer_->Close(fd);
    }
  }
  fds_.clear();
}

ssize_t ReceiveWithFds(int socket, size_t max_bytes, bool takes_fds, std::string* bytes,
                       ReceivedFds* fds) {
  const size_t before = bytes->size();
  bytes->resize(before + max_bytes);
  iovec part{bytes->data() + before, max_bytes};
  alignas(cmsghdr) char control[CMSG_SPACE(kMaxLocalMemories * sizeof(int))];
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  if (takes_fds) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
  }
  const ssize_t n = recvmsg(socket, &message, MSG_DONTWAIT | MSG_CMSG_CLOEXEC);
  bytes->resize(before + static_cast<size_t>(n < 0 ? 0 : n));
  if (n < 0) return n;
  for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
    if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
    const size_t num_fds = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
    for (size_t i = 0; i < num_fds; ++i) {
      int fd = -1;
      std::memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
      fds->Add(fd);
    }
  }
  if ((message.msg_flags & MSG_CTRUNC) != 0 || fds->size() > kMaxLocalMemories) {
    errno = EMSGSIZE;
    return -1;
  }
  return n;
}

absl::StatusOr<std::optional<v1::LocalHello>> ParseLocalHello(absl::string_view received) {
  if (received.size() < kLocalLengthBytes) return std::nullopt;
  uint32_t length = 0;
  for (size_t i = 0; i < kLocalLengthBytes; ++i) {
    length |= uint32_t{static_cast<uint8_t>(received[i])} << (8 * i);
  }
  const absl::string_view message = received.substr(kLocalLengthBytes);
  if (length > kMaxLocalHelloBytes || message.size() > length) {
    return absl::InvalidArgumentError(absl::StrCat("a hello of ", length, " bytes (at most ",
                                                   kMaxLocalHelloBytes, ") came with ",
                                                   message.size()));
  }
  if (message.size() < length) return std::nullopt;
  v1::LocalHello hello;
  if (!hello.ParseFromArray(message.data(), static_cast<int>(message.size()))) {
    return absl::InvalidArgumentError(absl::StrCat(message.size(), " bytes are not a LocalHello"));
  }
  return hello;
}

}  // namespace pagetide
