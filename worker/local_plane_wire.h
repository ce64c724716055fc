// The first and only message of a local client, taken from the bytes its socket gave, and the
// descriptors that came with it. Functions are stateless.
#ifndef PAGETIDE_WORKER_LOCAL_PLANE_WIRE_H_
#define PAGETIDE_WORKER_LOCAL_PLANE_WIRE_H_

#include <sys/types.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "pagetide/v1/local_plane.pb.h"
#include "worker/fd_closer.h"

namespace pagetide {

inline constexpr size_t kLocalLengthBytes = 4;  // u32 LE in front of a message
inline constexpr uint32_t kMaxLocalHelloBytes = 4096;
inline constexpr size_t kMaxLocalMemories = 32;

// Descriptors that a peer sent, closed with the object: by `closer`, which outlives it, what is no
// memory and so may hold its closing up. For one thread.
class ReceivedFds {
 public:
  explicit ReceivedFds(FdCloser* closer) : closer_(closer) {}
  ~ReceivedFds() { Clear(); }
  ReceivedFds(ReceivedFds&& other) noexcept
      : closer_(other.closer_), fds_(std::exchange(other.fds_, {})) {}
  ReceivedFds& operator=(ReceivedFds&& other) noexcept {
    std::swap(closer_, other.closer_);
    std::swap(fds_, other.fds_);
    return *this;
  }
  void Add(int fd) { fds_.push_back(fd); }
  void Clear();
  size_t size() const { return fds_.size(); }
  int operator[](size_t i) const { return fds_[i]; }

 private:
  FdCloser* closer_;
  std::vector<int> fds_;
};

// What a peer has sent: at most `max_bytes`, appended to *bytes, and descriptors, appended to *fds.
// As recv(MSG_DONTWAIT): the number of bytes, 0 at the end, -1 with errno; EMSGSIZE when more
// descriptors came than kMaxLocalMemories, or any though none are taken.
ssize_t ReceiveWithFds(int socket, size_t max_bytes, bool takes_fds, std::string* bytes,
                       ReceivedFds* fds);

// The hello in `received`; nullopt while it has not arrived whole. INVALID_ARGUMENT when it can no
// longer become one: too long, followed by more bytes, or no message.
absl::StatusOr<std::optional<v1::LocalHello>> ParseLocalHello(absl::string_view received);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_LOCAL_PLANE_WIRE_H_
