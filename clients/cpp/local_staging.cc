#include "clients/cpp/local_staging.h"

#include <fcntl.h>
#include <poll.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "absl/base/internal/endian.h"
#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "pagetide/v1/local_plane.pb.h"

namespace pagetide {
namespace {

constexpr uint32_t kVersion = 1;
constexpr size_t kLengthBytes = 4;
constexpr uint32_t kMaxWelcomeBytes = 64 << 10;
constexpr size_t kMaxDescriptors = 16;

// Owns descriptors until they are released.
class Descriptors {
 public:
  Descriptors() = default;
  ~Descriptors() {
    for (const int fd : fds_) {
      if (fd >= 0) close(fd);
    }
  }
  Descriptors(const Descriptors&) = delete;
  Descriptors& operator=(const Descriptors&) = delete;
  void Add(int fd) { fds_.push_back(fd); }
  size_t size() const { return fds_.size(); }
  int operator[](size_t i) const { return fds_[i]; }
  void Release(size_t i) { fds_[i] = -1; }

 private:
  std::vector<int> fds_;
};

absl::Status SystemError(absl::string_view action, absl::string_view path) {
  return absl::UnavailableError(absl::StrCat(action, " ", path, ": ", strerror(errno)));
}

absl::Status WaitReadable(int fd, absl::Time deadline, absl::string_view path) {
  for (;;) {
    const int64_t left = absl::ToInt64Milliseconds(deadline - absl::Now());
    if (left <= 0) {
      return absl::DeadlineExceededError(
          absl::StrCat("local plane ", path, ": no welcome in time"));
    }
    pollfd polled{fd, POLLIN, 0};
    const int ready = poll(&polled, 1, static_cast<int>(left));
    if (ready > 0) return absl::OkStatus();
    if (ready < 0 && errno != EINTR) return SystemError("poll local plane", path);
  }
}

// Reads one framed message and the descriptors that came with it.
absl::Status ReceiveWelcome(int fd, absl::Time deadline, absl::string_view path,
                            v1::LocalWelcome* welcome, Descriptors* descriptors) {
  std::string received;
  uint32_t length = 0;
  for (;;) {
    if (received.size() >= kLengthBytes) {
      length = absl::little_endian::Load32(received.data());
      if (length > kMaxWelcomeBytes) {
        return absl::UnavailableError(
            absl::StrCat("local plane ", path, ": welcome of ", length, " bytes"));
      }
      if (received.size() >= kLengthBytes + length) break;
    }
    PT_RETURN_IF_ERROR(WaitReadable(fd, deadline, path));
    char buffer[4096];
    alignas(cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))];
    iovec part{buffer, sizeof(buffer)};
    msghdr message{};
    message.msg_iov = &part;
    message.msg_iovlen = 1;
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    const ssize_t n = recvmsg(fd, &message, MSG_CMSG_CLOEXEC);
    if (n < 0 && errno == EINTR) continue;
    if (n <= 0) return absl::UnavailableError(absl::StrCat("local plane ", path, " hung up"));
    for (cmsghdr* c = CMSG_FIRSTHDR(&message); c != nullptr; c = CMSG_NXTHDR(&message, c)) {
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
      const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (size_t i = 0; i < count; ++i) {
        int received_fd;
        std::memcpy(&received_fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
        descriptors->Add(received_fd);
      }
    }
    received.append(buffer, static_cast<size_t>(n));
  }
  if (!welcome->ParseFromArray(received.data() + kLengthBytes, static_cast<int>(length))) {
    return absl::UnavailableError(absl::StrCat("local plane ", path, ": welcome does not parse"));
  }
  if (!welcome->error().empty()) {
    return absl::FailedPreconditionError(
        absl::StrCat("local plane ", path, " refused: ", welcome->error()));
  }
  return absl::OkStatus();
}

// Touching a mapping behind the end of its file is a SIGBUS: believe the file, not the message, and
// only a file that nobody can make shorter.
absl::Status CheckMemory(int fd, uint64_t num_bytes, absl::string_view what,
                         absl::string_view path) {
  struct stat info;
  if (fstat(fd, &info) != 0) return SystemError(absl::StrCat("look at ", what, " of"), path);
  if (num_bytes == 0 || static_cast<uint64_t>(info.st_size) < num_bytes) {
    return absl::UnavailableError(absl::StrCat("local plane ", path, ": ", what, " of ",
                                               info.st_size, " bytes, announced ", num_bytes));
  }
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0) {
    return absl::UnavailableError(
        absl::StrCat("local plane ", path, ": ", what, " is not sealed against shrinking"));
  }
  return absl::OkStatus();
}

}  // namespace

absl::StatusOr<std::unique_ptr<LocalStaging>> LocalStaging::Connect(
    absl::string_view socket_path, uint64_t staging_bytes, absl::Duration timeout,
    absl::string_view model_digest) {
  const absl::Time deadline = absl::Now() + timeout;
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  if (socket_path.empty() || socket_path.size() >= sizeof(address.sun_path)) {
    return absl::UnavailableError(absl::StrCat("local plane: socket path of ", socket_path.size(),
                                               " bytes, must have 1 to ",
                                               sizeof(address.sun_path) - 1));
  }
  std::memcpy(address.sun_path, socket_path.data(), socket_path.size());
  const int fd = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (fd < 0) return SystemError("create socket for local plane", socket_path);
  Descriptors owned;  // the socket first, then what the welcome brings
  owned.Add(fd);
  // Bounds connect, which waits while the queue of a worker that stands still is full, and send.
  const timeval bound = absl::ToTimeval(timeout);
  if (setsockopt(fd, SOL_SOCKET, SO_SNDTIMEO, &bound, sizeof(bound)) != 0) {
    return SystemError("bound calls to local plane", socket_path);
  }
  if (connect(fd, reinterpret_cast<const sockaddr*>(&address), sizeof(address)) != 0) {
    return SystemError("connect to local plane", socket_path);
  }

  v1::LocalHello hello;
  hello.set_version(kVersion);
  hello.set_staging_bytes(staging_bytes);
  hello.set_model_digest(std::string(model_digest));
  std::string frame(kLengthBytes, '\0');
  absl::little_endian::Store32(frame.data(), static_cast<uint32_t>(hello.ByteSizeLong()));
  hello.AppendToString(&frame);
  if (send(fd, frame.data(), frame.size(), MSG_NOSIGNAL) != static_cast<ssize_t>(frame.size())) {
    return SystemError("greet local plane", socket_path);
  }
  v1::LocalWelcome welcome;
  PT_RETURN_IF_ERROR(ReceiveWelcome(fd, deadline, socket_path, &welcome, &owned));
  if (owned.size() < 2) {
    return absl::UnavailableError(
        absl::StrCat("local plane ", socket_path, ": welcome without a staging descriptor"));
  }
  PT_RETURN_IF_ERROR(CheckMemory(owned[1], welcome.staging_bytes(), "staging", socket_path));
  void* data =
      mmap(nullptr, welcome.staging_bytes(), PROT_READ | PROT_WRITE, MAP_SHARED, owned[1], 0);
  if (data == MAP_FAILED) return SystemError("map staging of", socket_path);
  std::unique_ptr<LocalStaging> staging(new LocalStaging(
      fd, static_cast<std::byte*>(data), welcome.staging_bytes(), welcome.client_id()));
  owned.Release(0);  // the socket is the staging's now
  if (welcome.pools_size() > 0 && welcome.pools(0).has_fd() && owned.size() > 2) {
    const uint64_t bytes = welcome.pools(0).size_bytes();
    PT_RETURN_IF_ERROR(CheckMemory(owned[2], bytes, "pool", socket_path));
    void* pool = mmap(nullptr, bytes, PROT_READ, MAP_SHARED, owned[2], 0);
    if (pool == MAP_FAILED) return SystemError("map pool of", socket_path);
    staging->pool_ = static_cast<const std::byte*>(pool);
    staging->pool_bytes_ = bytes;
  } else if (welcome.pools_size() > 0) {
    staging->why_no_pool_ = welcome.pools(0).why_not();
  }
  return staging;
}

LocalStaging::LocalStaging(int socket, std::byte* data, uint64_t num_bytes, uint64_t client_id)
    : socket_(socket), data_(data), num_bytes_(num_bytes), client_id_(client_id) {}

LocalStaging::~LocalStaging() {
  munmap(data_, num_bytes_);
  if (pool_ != nullptr) munmap(const_cast<std::byte*>(pool_), pool_bytes_);
  close(socket_);
}

bool LocalStaging::IsConnected() const {
  // The worker says nothing after its welcome: what can be read is the end.
  char byte;
  return recv(socket_, &byte, 1, MSG_PEEK | MSG_DONTWAIT) < 0 &&
         (errno == EAGAIN || errno == EWOULDBLOCK);
}

absl::StatusOr<std::span<std::byte>> LocalStaging::Region(uint64_t offset,
                                                          uint64_t num_bytes) const {
  if (offset > num_bytes_ || num_bytes > num_bytes_ - offset) {
    return absl::OutOfRangeError(absl::StrCat("staging region [", offset, ", +", num_bytes,
                                              ") of a buffer of ", num_bytes_, " bytes"));
  }
  return std::span<std::byte>(data_ + offset, num_bytes);
}

}  // namespace pagetide
