#define _GNU_SOURCE /* memfd_create, seals, MSG_CMSG_CLOEXEC */
#include "clients/c/plane.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <sys/un.h>
#include <unistd.h>

#include "clients/c/wire.h"

enum {
  kVersion = 1,
  kLengthBytes = 4,
  kMaxWelcomeBytes = 64 << 10,
  kMaxDescriptors = 16,
  kSeconds = 10
};

struct Welcome {
  uint8_t bytes[kLengthBytes + kMaxWelcomeBytes];
  size_t size;
  int fds[kMaxDescriptors];
  size_t num_fds;
};

static bool Fail(char* error, size_t error_size, const char* what, const char* why) {
  snprintf(error, error_size, "%s: %s", what, why);
  return false;
}

static bool SendAll(int to, const uint8_t* data, size_t size, int fd) {
  struct iovec part = {(void*)data, size};
  struct msghdr message = {.msg_iov = &part, .msg_iovlen = 1};
  _Alignas(struct cmsghdr) char control[CMSG_SPACE(sizeof(int))] = {0};
  if (fd >= 0) {
    /* Descriptors travel with the first byte. */
    message.msg_control = control;
    message.msg_controllen = sizeof(control);
    struct cmsghdr* const header = CMSG_FIRSTHDR(&message);
    header->cmsg_level = SOL_SOCKET;
    header->cmsg_type = SCM_RIGHTS;
    header->cmsg_len = CMSG_LEN(sizeof(int));
    memcpy(CMSG_DATA(header), &fd, sizeof(int));
  }
  while (part.iov_len > 0) {
    const ssize_t sent = sendmsg(to, &message, MSG_NOSIGNAL);
    if (sent < 0 && errno == EINTR) continue;
    if (sent <= 0) return false;
    part.iov_base = (uint8_t*)part.iov_base + sent;
    part.iov_len -= (size_t)sent;
    message.msg_control = NULL;
    message.msg_controllen = 0;
  }
  return true;
}

/* False at the end of the connection, after kSeconds, and when more comes than a welcome can be. */
static bool ReceiveWelcome(int from, struct Welcome* welcome) {
  for (;;) {
    if (welcome->size >= kLengthBytes) {
      uint32_t length = 0;
      for (int i = 0; i < kLengthBytes; ++i) length |= (uint32_t)welcome->bytes[i] << (8 * i);
      if (length > kMaxWelcomeBytes) return false;
      if (welcome->size >= kLengthBytes + length) return welcome->size == kLengthBytes + length;
    }
    struct iovec part = {welcome->bytes + welcome->size, sizeof(welcome->bytes) - welcome->size};
    _Alignas(struct cmsghdr) char control[CMSG_SPACE(kMaxDescriptors * sizeof(int))];
    struct msghdr message = {.msg_iov = &part,
                             .msg_iovlen = 1,
                             .msg_control = control,
                             .msg_controllen = sizeof(control)};
    const ssize_t got = recvmsg(from, &message, MSG_CMSG_CLOEXEC);
    if (got < 0 && errno == EINTR) continue;
    if (got <= 0) return false;
    welcome->size += (size_t)got;
    for (struct cmsghdr* c = CMSG_FIRSTHDR(&message); c != NULL; c = CMSG_NXTHDR(&message, c)) {
      if (c->cmsg_level != SOL_SOCKET || c->cmsg_type != SCM_RIGHTS) continue;
      const size_t count = (c->cmsg_len - CMSG_LEN(0)) / sizeof(int);
      for (size_t i = 0; i < count; ++i) {
        int fd = -1;
        memcpy(&fd, CMSG_DATA(c) + i * sizeof(int), sizeof(int));
        if (welcome->num_fds < kMaxDescriptors) {
          welcome->fds[welcome->num_fds++] = fd;
        } else {
          close(fd);
        }
      }
    }
    if ((message.msg_flags & MSG_CTRUNC) != 0) return false;
  }
}

/* Reading behind the end of a file is a SIGBUS: believe the descriptor, not the message. */
static const uint8_t* MapPool(int fd, uint64_t num_bytes) {
  struct stat info;
  const int seals = fcntl(fd, F_GET_SEALS);
  if (seals < 0 || (seals & F_SEAL_SHRINK) == 0 || fstat(fd, &info) != 0 || num_bytes == 0 ||
      (uint64_t)info.st_size < num_bytes) {
    return NULL;
  }
  void* const data = mmap(NULL, num_bytes, PROT_READ, MAP_SHARED, fd, 0);
  return data == MAP_FAILED ? NULL : data;
}

static bool ReadWelcome(const struct Welcome* welcome, struct pt_plane* plane, bool wants_pool,
                        bool gave_memory, char* error, size_t error_size) {
  struct pt_reader reader = pt_read(welcome->bytes + kLengthBytes, welcome->size - kLengthBytes);
  struct pt_field field;
  uint64_t num_memories = 0;
  bool has_pool_fd = false;
  while (pt_next(&reader, &field)) {
    if (field.number == 1) plane->client_id = field.value;
    if (field.number == 3 && field.data != NULL) {
      struct pt_reader pool = pt_read(field.data, field.size);
      struct pt_field of_pool;
      while (pt_next(&pool, &of_pool)) {
        if (of_pool.number == 2) plane->pool_bytes = of_pool.value;
        if (of_pool.number == 3) has_pool_fd = of_pool.value != 0;
        if (of_pool.number == 4) plane->pool_kind = (enum pt_memory_kind)of_pool.value;
        if (of_pool.number == 5) pt_text(&of_pool, plane->why_no_pool, sizeof(plane->why_no_pool));
      }
    }
    if (field.number == 4 && field.size > 0) {
      char why[512];
      pt_text(&field, why, sizeof(why));
      return Fail(error, error_size, "the worker refused", why);
    }
    if (field.number == 5) num_memories = field.value;
  }
  if (reader.is_bad || plane->client_id == 0)
    return Fail(error, error_size, "welcome", "not a welcome");
  if (num_memories != (gave_memory ? 1u : 0u))
    return Fail(error, error_size, "welcome", "the memory was not taken");
  if (!wants_pool || !has_pool_fd) return true;
  plane->pool_kind = PT_MEMORY_MEMFD; /* of workers that do not say it too */
  /* The first descriptor is that of a staging buffer, in which rows are written; this client writes
   * none. */
  plane->pool = welcome->num_fds < 2 ? NULL : MapPool(welcome->fds[1], plane->pool_bytes);
  return plane->pool != NULL ||
         Fail(error, error_size, "map the pool", "its descriptor is not what was announced");
}

bool pt_plane_connect(struct pt_plane* plane, const char* socket_path, const char* model_digest,
                      int memory_fd, uint64_t memory_bytes, char* error, size_t error_size) {
  *plane = (struct pt_plane){.socket = -1};
  struct sockaddr_un address = {.sun_family = AF_UNIX};
  if (strlen(socket_path) >= sizeof(address.sun_path))
    return Fail(error, error_size, socket_path, "too long");
  memcpy(address.sun_path, socket_path, strlen(socket_path));
  plane->socket = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC, 0);
  const struct timeval limit = {kSeconds, 0};
  setsockopt(plane->socket, SOL_SOCKET, SO_RCVTIMEO, &limit, sizeof(limit));
  setsockopt(plane->socket, SOL_SOCKET, SO_SNDTIMEO, &limit, sizeof(limit));

  struct pt_message hello = {0};
  pt_put_uint(&hello, 1, kVersion);
  if (model_digest[0] != '\0') pt_put_string(&hello, 3, model_digest);
  if (memory_fd >= 0) {
    struct pt_message memory = {0};
    pt_put_uint(&memory, 1, PT_MEMORY_MEMFD);
    pt_put_uint(&memory, 2, memory_bytes);
    pt_put_message(&hello, 4, &memory);
    pt_free(&memory);
  }
  uint8_t frame[kLengthBytes + 512];
  bool is_done = false;
  static struct Welcome welcome; /* too large for a stack */
  welcome = (struct Welcome){.size = 0};
  if (hello.is_bad || hello.size > sizeof(frame) - kLengthBytes) {
    Fail(error, error_size, "hello", "too long");
  } else {
    for (int i = 0; i < kLengthBytes; ++i) frame[i] = (uint8_t)(hello.size >> (8 * i));
    memcpy(frame + kLengthBytes, hello.data, hello.size);
    if (connect(plane->socket, (const struct sockaddr*)&address, sizeof(address)) != 0 ||
        !SendAll(plane->socket, frame, kLengthBytes + hello.size, memory_fd)) {
      Fail(error, error_size, socket_path, strerror(errno));
    } else if (!ReceiveWelcome(plane->socket, &welcome)) {
      Fail(error, error_size, socket_path, "no welcome came");
    } else {
      is_done =
          ReadWelcome(&welcome, plane, model_digest[0] != '\0', memory_fd >= 0, error, error_size);
    }
  }
  pt_free(&hello);
  for (size_t i = 0; i < welcome.num_fds; ++i) close(welcome.fds[i]); /* a mapping keeps its own */
  if (!is_done) pt_plane_close(plane);
  return is_done;
}

void pt_plane_close(struct pt_plane* plane) {
  if (plane->pool != NULL) munmap((void*)plane->pool, plane->pool_bytes);
  if (plane->socket >= 0) close(plane->socket);
  *plane = (struct pt_plane){.socket = -1};
}

int pt_make_memory(uint64_t num_bytes, uint8_t** data) {
  const int fd = memfd_create("pagetide-engine", MFD_CLOEXEC | MFD_ALLOW_SEALING);
  if (fd < 0) return -1;
  /* A hole would be filled by who touches it first, which may be the worker: it refuses them. */
  const int allocated = posix_fallocate(fd, 0, (off_t)num_bytes);
  void* mapped = MAP_FAILED;
  if (allocated != 0) {
    errno = allocated;
  } else if (fcntl(fd, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW) == 0) {
    mapped = mmap(NULL, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  }
  if (mapped == MAP_FAILED) {
    const int why = errno;
    close(fd);
    errno = why;
    return -1;
  }
  *data = mapped;
  return fd;
}
