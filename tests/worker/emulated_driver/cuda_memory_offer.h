// What cuda_shared_memory_test and its peer send each other by a unix socket.
#ifndef PAGETIDE_TESTS_WORKER_EMULATED_DRIVER_CUDA_MEMORY_OFFER_H_
#define PAGETIDE_TESTS_WORKER_EMULATED_DRIVER_CUDA_MEMORY_OFFER_H_

#include <sys/socket.h>

#include <cstddef>
#include <cstdint>
#include <cstring>

namespace pagetide {

struct CudaMemoryOffer {
  uint64_t num_bytes = 0;
  char ipc_handle[64] = {};
};

// `fd` goes with it by SCM_RIGHTS unless it is negative.
inline bool SendOffer(int socket, CudaMemoryOffer offer, int fd) {
  iovec part{&offer, sizeof(offer)};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  if (fd >= 0) {
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    std::memcpy(CMSG_DATA(header), &fd, sizeof(int));
  }
  return sendmsg(socket, &message, MSG_NOSIGNAL) == static_cast<ssize_t>(sizeof(offer));
}

// The descriptor that came with it, or -1.
inline int ReceiveOffer(int socket, CudaMemoryOffer* offer) {
  iovec part{offer, sizeof(*offer)};
  msghdr message{};
  message.msg_iov = &part;
  message.msg_iovlen = 1;
  alignas(cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {};
  message.msg_control = control;
  message.msg_controllen = sizeof(control);
  int fd = -1;
  if (recvmsg(socket, &message, MSG_CMSG_CLOEXEC) != static_cast<ssize_t>(sizeof(*offer)))
    return fd;
  const cmsghdr* const header = CMSG_FIRSTHDR(&message);
  if (header != nullptr && header->cmsg_type == SCM_RIGHTS) {
    std::memcpy(&fd, CMSG_DATA(header), sizeof(int));
  }
  return fd;
}

// FNV-1a.
inline unsigned long long HashOf(const std::byte* bytes, uint64_t num_bytes) {
  unsigned long long hash = 0xcbf29ce484222325u;
  for (uint64_t i = 0; i < num_bytes; ++i) {
    hash = (hash ^ static_cast<unsigned long long>(bytes[i])) * 0x100000001b3u;
  }
  return hash;
}

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_WORKER_EMULATED_DRIVER_CUDA_MEMORY_OFFER_H_
