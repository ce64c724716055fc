#include "tests/support/cutting_proxy.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <sys/socket.h>
#include <unistd.h>

#include <cstdlib>
#include <utility>

#include "absl/strings/str_cat.h"

namespace pagetide::testing {
namespace {

sockaddr_in Loopback(uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_addr.s_addr = htonl(INADDR_LOOPBACK);
  address.sin_port = htons(port);
  return address;
}

}  // namespace

CuttingProxy::CuttingProxy(const std::string& target) : target_(target) {
  listener_ = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
  sockaddr_in address = Loopback(0);
  socklen_t size = sizeof(address);
  auto* const generic = reinterpret_cast<sockaddr*>(&address);
  if (listener_ < 0 || ::bind(listener_, generic, size) != 0 || ::listen(listener_, 16) != 0 ||
      ::getsockname(listener_, generic, &size) != 0) {
    abort();  // the machine has no loopback
  }
  address_ = absl::StrCat("127.0.0.1:", ntohs(address.sin_port));
  acceptor_ = std::thread([this] { Accept(); });
}

CuttingProxy::~CuttingProxy() {
  {
    MutexLock lock(&mu_);
    is_stopping_ = true;
  }
  ::shutdown(listener_, SHUT_RDWR);  // wakes accept
  acceptor_.join();
  Cut();
  std::vector<std::thread> pumps;
  {
    MutexLock lock(&mu_);
    pumps.swap(pumps_);
  }
  for (std::thread& pump : pumps) pump.join();
  MutexLock lock(&mu_);
  for (Connection& connection : connections_) {
    ::close(connection.client);
    ::close(connection.server);
  }
  ::close(listener_);
}

void CuttingProxy::Accept() {
  for (;;) {
    const int client = ::accept4(listener_, nullptr, nullptr, SOCK_CLOEXEC);
    MutexLock lock(&mu_);
    if (client < 0 || is_stopping_) {
      if (client >= 0) ::close(client);
      return;
    }
    const int server = ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC, 0);
    sockaddr_in address =
        Loopback(static_cast<uint16_t>(atoi(target_.c_str() + target_.rfind(':') + 1)));
    if (::connect(server, reinterpret_cast<sockaddr*>(&address), sizeof(address)) != 0) {
      ::close(client);
      ::close(server);
      continue;
    }
    const size_t index = connections_.size();
    connections_.push_back({.client = client, .server = server});
    pumps_.emplace_back([this, index] { Pump(index, true); });
    pumps_.emplace_back([this, index] { Pump(index, false); });
  }
}

void CuttingProxy::Pump(size_t index, bool to_server) {
  int from, to;
  {
    MutexLock lock(&mu_);
    from = to_server ? connections_[index].client : connections_[index].server;
    to = to_server ? connections_[index].server : connections_[index].client;
  }
  char buffer[16384];
  for (;;) {
    const ssize_t n = ::recv(from, buffer, sizeof(buffer), 0);
    if (n <= 0) break;
    for (ssize_t done = 0; done < n;) {
      const ssize_t sent = ::send(to, buffer + done, static_cast<size_t>(n - done), MSG_NOSIGNAL);
      if (sent <= 0) break;
      done += sent;
    }
    MutexLock lock(&mu_);
    if (to_server) forwarded_bytes_ += static_cast<uint64_t>(n);
  }
  MutexLock lock(&mu_);
  CutLocked(connections_[index]);
}

void CuttingProxy::CutLocked(Connection& connection) {
  if (connection.is_cut) return;
  connection.is_cut = true;
  for (const int fd : {connection.client, connection.server}) {
    // The descriptors stay until the end, so that no pump ever uses one that was given out again.
    ::shutdown(fd, SHUT_RDWR);
  }
}

void CuttingProxy::Cut() {
  MutexLock lock(&mu_);
  for (Connection& connection : connections_) CutLocked(connection);
}

uint64_t CuttingProxy::forwarded_bytes() const {
  MutexLock lock(&mu_);
  return forwarded_bytes_;
}

}  // namespace pagetide::testing
