#include "bench/socket_baseline.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <sys/mman.h>
#include <sys/socket.h>
#include <sys/uio.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

namespace pagetide::bench {
namespace {

enum Operation : uint32_t { kRead = 1, kWrite = 2 };

struct Header {
  uint32_t operation = 0;
  uint32_t index = 0;      // of a request: its bytes begin at index × num_bytes of the memory
  uint64_t num_bytes = 0;  // of the request, or of the part that follows
};

[[noreturn]] void Die(const char* action) {
  std::fprintf(stderr, "socket_baseline: %s: %s\n", action, std::strerror(errno));
  std::exit(1);
}

void SendAll(int fd, iovec* parts, int num_parts) {
  while (num_parts > 0) {
    msghdr message{};
    message.msg_iov = parts;
    message.msg_iovlen = num_parts;
    ssize_t sent = sendmsg(fd, &message, MSG_NOSIGNAL);
    if (sent < 0) Die("send");
    while (num_parts > 0 && static_cast<size_t>(sent) >= parts->iov_len) {
      sent -= static_cast<ssize_t>(parts->iov_len);
      ++parts;
      --num_parts;
    }
    if (num_parts > 0) {
      parts->iov_base = static_cast<char*>(parts->iov_base) + sent;
      parts->iov_len -= static_cast<size_t>(sent);
    }
  }
}

// False at the end of the stream.
bool ReceiveAll(int fd, void* to, size_t num_bytes) {
  char* at = static_cast<char*>(to);
  while (num_bytes > 0) {
    // Without MSG_WAITALL: taking what is there keeps the sender going.
    const ssize_t got = recv(fd, at, num_bytes, 0);
    if (got < 0) Die("receive");
    if (got == 0) return false;
    at += got;
    num_bytes -= static_cast<size_t>(got);
  }
  return true;
}

void SendHeader(int fd, Header header) {
  iovec part{&header, sizeof(header)};
  SendAll(fd, &part, 1);
}

void SendParts(int fd, std::span<const std::byte> bytes, uint32_t part_bytes) {
  for (size_t at = 0; at < bytes.size(); at += part_bytes) {
    Header header{.num_bytes = std::min<uint64_t>(part_bytes, bytes.size() - at)};
    iovec parts[] = {{&header, sizeof(header)},
                     {const_cast<std::byte*>(bytes.data() + at), header.num_bytes}};
    SendAll(fd, parts, 2);
  }
}

// Parts go one behind the other where `to` holds all of them, and one over the other otherwise.
bool ReceiveParts(int fd, uint64_t num_bytes, std::span<std::byte> to) {
  const bool has_room = to.size() >= num_bytes;
  for (uint64_t at = 0; at < num_bytes;) {
    Header header;
    if (!ReceiveAll(fd, &header, sizeof(header))) return false;
    if (header.num_bytes > std::min<uint64_t>(num_bytes - at, to.size())) {
      errno = EMSGSIZE;
      Die("receive part");
    }
    if (!ReceiveAll(fd, to.data() + (has_room ? at : 0), header.num_bytes)) return false;
    at += header.num_bytes;
  }
  return true;
}

void Tune(int fd, bool is_tcp, const SocketTuning& tuning) {
  const int one = 1;
  if (is_tcp && setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one)) != 0) Die("tune");
  if (tuning.buffer_bytes == 0) return;
  for (const int option : {SO_SNDBUF, SO_RCVBUF}) {
    if (setsockopt(fd, SOL_SOCKET, option, &tuning.buffer_bytes, sizeof(int)) != 0) Die("tune");
  }
}

struct Address {
  bool is_tcp = false;
  sockaddr_storage storage{};
  socklen_t size = 0;
  sockaddr* get() { return reinterpret_cast<sockaddr*>(&storage); }
};

Address Parse(const std::string& text) {
  Address address;
  if (text.rfind("unix:", 0) == 0) {
    auto* const to = reinterpret_cast<sockaddr_un*>(&address.storage);
    to->sun_family = AF_UNIX;
    const std::string path = text.substr(5);
    if (path.size() >= sizeof(to->sun_path)) {
      errno = ENAMETOOLONG;
      Die(text.c_str());
    }
    std::memcpy(to->sun_path, path.c_str(), path.size() + 1);
    address.size = sizeof(*to);
    return address;
  }
  address.is_tcp = true;
  auto* const to = reinterpret_cast<sockaddr_in*>(&address.storage);
  to->sin_family = AF_INET;
  const size_t colon = text.rfind(':');
  if (colon == std::string::npos ||
      inet_pton(AF_INET, text.substr(0, colon).c_str(), &to->sin_addr) != 1) {
    errno = EINVAL;
    Die(text.c_str());
  }
  to->sin_port = htons(static_cast<uint16_t>(std::atoi(text.c_str() + colon + 1)));
  address.size = sizeof(*to);
  return address;
}

void Serve(int fd, std::span<std::byte> memory, const SocketTuning& tuning) {
  Header request;
  while (ReceiveAll(fd, &request, sizeof(request))) {
    if (request.num_bytes == 0 || request.index >= memory.size() / request.num_bytes) break;
    const auto bytes = memory.subspan(request.index * request.num_bytes, request.num_bytes);
    if (request.operation == kRead) {
      SendParts(fd, bytes, tuning.part_bytes);
    } else {
      if (!ReceiveParts(fd, request.num_bytes, bytes)) break;
      SendHeader(fd, request);
    }
  }
  close(fd);
}

}  // namespace

void RunSocketServer(const std::string& text, uint64_t memory_bytes, const SocketTuning& tuning) {
  Address address = Parse(text);
  const int listener = socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
  if (listener < 0 || bind(listener, address.get(), address.size) != 0 ||
      listen(listener, 16) != 0) {
    Die("listen");
  }
  std::string bound = text;
  if (address.is_tcp) {
    socklen_t size = sizeof(address.storage);
    if (getsockname(listener, address.get(), &size) != 0) Die("getsockname");
    bound = "127.0.0.1:" +
            std::to_string(ntohs(reinterpret_cast<sockaddr_in*>(&address.storage)->sin_port));
  }
  void* const memory =
      mmap(nullptr, memory_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) Die("map");
  std::memset(memory, 0x5a, memory_bytes);
  std::printf("socket_baseline ready address=%s\n", bound.c_str());
  std::fflush(stdout);
  for (;;) {
    const int fd = accept4(listener, nullptr, nullptr, SOCK_CLOEXEC);
    if (fd < 0) Die("accept");
    Tune(fd, address.is_tcp, tuning);
    // Lives as long as its connection; the process ends by a signal.
    std::thread(Serve, fd, std::span(static_cast<std::byte*>(memory), memory_bytes), tuning)
        .detach();
  }
}

SocketClient::SocketClient(const std::string& text, const SocketTuning& tuning)
    : tuning_(tuning), fd_([&] {
        Address address = Parse(text);
        const int fd = socket(address.storage.ss_family, SOCK_STREAM | SOCK_CLOEXEC, 0);
        if (fd < 0) Die("socket");
        Tune(fd, address.is_tcp, tuning);  // the window of a TCP connection is agreed at its start
        if (connect(fd, address.get(), address.size) != 0) Die("connect");
        return fd;
      }()) {}

SocketClient::~SocketClient() {
  close(fd_);
}

void SocketClient::Read(uint64_t num_requests, uint64_t num_bytes, uint64_t in_flight,
                        std::span<std::byte> to) {
  uint64_t asked = 0;
  for (uint64_t done = 0; done < num_requests; ++done) {
    for (; asked < std::min(num_requests, done + in_flight); ++asked) {
      SendHeader(fd_, {kRead, static_cast<uint32_t>(asked), num_bytes});
    }
    if (!ReceiveParts(fd_, num_bytes, to)) Die("read");
  }
}

void SocketClient::Write(uint64_t num_requests, std::span<const std::byte> from,
                         uint64_t in_flight) {
  const uint64_t num_bytes = from.size() / num_requests;
  uint64_t sent = 0;
  for (uint64_t done = 0; done < num_requests; ++done) {
    for (; sent < std::min(num_requests, done + in_flight); ++sent) {
      SendHeader(fd_, {kWrite, static_cast<uint32_t>(sent), num_bytes});
      SendParts(fd_, from.subspan(sent * num_bytes, num_bytes), tuning_.part_bytes);
    }
    Header answer;
    if (!ReceiveAll(fd_, &answer, sizeof(answer))) Die("write");
  }
}

}  // namespace pagetide::bench
