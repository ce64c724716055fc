#include "rpc/accept_loop.h"

#include <arpa/inet.h>
#include <errno.h>
#include <fcntl.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <pthread.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/socket.h>
#include <sys/stat.h>
#include <sys/un.h>
#include <unistd.h>

#include <algorithm>
#include <utility>

#include "absl/strings/match.h"
#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/clock.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "rpc/channel.h"
#include "rpc/process_tuning.h"

namespace pagetide {
namespace {

constexpr absl::Duration kSweepPeriod = absl::Seconds(1);

absl::Status ErrnoStatus(absl::string_view action, absl::string_view object) {
  const int e = errno;
  const std::string text = absl::StrCat(action, " ", object, ": ", strerror(e));
  if (e == EADDRINUSE || e == EACCES || e == EADDRNOTAVAIL)
    return absl::FailedPreconditionError(text);
  return absl::UnavailableError(text);
}

// A socket file whose owner died refuses connections; only such a file is removed.
absl::Status RemoveDeadSocket(const ListenAddress& address) {
  struct stat st {};
  if (lstat(address.unix_path.c_str(), &st) != 0) return absl::OkStatus();
  if (!S_ISSOCK(st.st_mode)) {
    return absl::FailedPreconditionError(
        absl::StrCat("listen on ", address.ToString(), ": the path exists and is not a socket"));
  }
  const int probe = socket(AF_UNIX, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (probe < 0) return ErrnoStatus("probe", address.ToString());
  sockaddr_storage sa{};
  const socklen_t size = address.ToSockaddr(&sa);
  const bool is_dead =
      connect(probe, reinterpret_cast<const sockaddr*>(&sa), size) != 0 && errno == ECONNREFUSED;
  close(probe);
  if (!is_dead) {
    return absl::FailedPreconditionError(
        absl::StrCat("listen on ", address.ToString(), ": another process listens there"));
  }
  unlink(address.unix_path.c_str());
  return absl::OkStatus();
}

// One word for all connections of a peer. The port is left out: it differs for each connection.
std::string PeerOf(int fd) {
  sockaddr_storage sa{};
  socklen_t size = sizeof(sa);
  if (getpeername(fd, reinterpret_cast<sockaddr*>(&sa), &size) != 0) return "gone";
  char text[INET6_ADDRSTRLEN] = "";
  if (sa.ss_family == AF_INET) {
    inet_ntop(AF_INET, &reinterpret_cast<sockaddr_in*>(&sa)->sin_addr, text, sizeof(text));
  } else if (sa.ss_family == AF_INET6) {
    inet_ntop(AF_INET6, &reinterpret_cast<sockaddr_in6*>(&sa)->sin6_addr, text, sizeof(text));
  } else {
    ucred cred{};
    socklen_t cred_size = sizeof(cred);
    getsockopt(fd, SOL_SOCKET, SO_PEERCRED, &cred, &cred_size);
    return absl::StrCat("uid:", cred.uid);
  }
  return text;
}

bool IsOutOfResources(int e) {
  return e == EMFILE || e == ENFILE || e == ENOBUFS || e == ENOMEM;
}

Counter* RefusedCounter(Metrics* metrics, absl::string_view reason) {
  return metrics->GetCounter("pagetide_rpc_connections_refused_total",
                             "Connections closed by the accept loop, by reason",
                             {{"reason", std::string(reason)}});
}

}  // namespace

absl::StatusOr<ListenAddress> ListenAddress::Parse(absl::string_view text) {
  ListenAddress a;
  if (absl::StartsWith(text, "unix:")) {
    a.unix_path = std::string(text.substr(5));
    a.is_loopback = true;
    if (a.unix_path.empty() || a.unix_path[0] != '/' ||
        a.unix_path.size() >= sizeof(sockaddr_un::sun_path)) {
      return absl::InvalidArgumentError(absl::StrCat("address '", text,
                                                     "': a unix path is absolute and shorter than ",
                                                     sizeof(sockaddr_un::sun_path), " bytes"));
    }
    return a;
  }
  const size_t colon = text.rfind(':');
  int port = -1;
  if (colon == absl::string_view::npos || !absl::SimpleAtoi(text.substr(colon + 1), &port) ||
      port < 0 || port > 65535) {
    return absl::InvalidArgumentError(
        absl::StrCat("address '", text, "' is not host:port with a port of 0 to 65535"));
  }
  a.port = static_cast<uint16_t>(port);
  absl::string_view host = text.substr(0, colon);
  if (host == "localhost") host = "127.0.0.1";
  in_addr v4{};
  in6_addr v6{};
  if (host.size() > 2 && host.front() == '[' && host.back() == ']') {
    a.host = std::string(host.substr(1, host.size() - 2));
    if (inet_pton(AF_INET6, a.host.c_str(), &v6) == 1) {
      a.is_loopback = IN6_IS_ADDR_LOOPBACK(&v6);
      return a;
    }
  } else {
    a.host = std::string(host);
    if (inet_pton(AF_INET, a.host.c_str(), &v4) == 1) {
      a.is_loopback = (ntohl(v4.s_addr) >> 24) == 127;
      return a;
    }
  }
  return absl::InvalidArgumentError(
      absl::StrCat("address '", text,
                   "': host is not an IPv4 address, an IPv6 address in brackets or localhost"));
}

std::string ListenAddress::ToString() const {
  if (!unix_path.empty()) return absl::StrCat("unix:", unix_path);
  if (absl::StrContains(host, ':')) return absl::StrCat("[", host, "]:", port);
  return absl::StrCat(host, ":", port);
}

socklen_t ListenAddress::ToSockaddr(sockaddr_storage* out) const {
  *out = sockaddr_storage{};
  if (!unix_path.empty()) {
    auto* un = reinterpret_cast<sockaddr_un*>(out);
    un->sun_family = AF_UNIX;
    memcpy(un->sun_path, unix_path.data(), unix_path.size());  // Parse checked the size
    return static_cast<socklen_t>(offsetof(sockaddr_un, sun_path) + unix_path.size() + 1);
  }
  if (absl::StrContains(host, ':')) {
    auto* in6 = reinterpret_cast<sockaddr_in6*>(out);
    in6->sin6_family = AF_INET6;
    in6->sin6_port = htons(port);
    inet_pton(AF_INET6, host.c_str(), &in6->sin6_addr);
    return sizeof(*in6);
  }
  auto* in = reinterpret_cast<sockaddr_in*>(out);
  in->sin_family = AF_INET;
  in->sin_port = htons(port);
  inet_pton(AF_INET, host.c_str(), &in->sin_addr);
  return sizeof(*in);
}

absl::StatusOr<std::unique_ptr<AcceptLoop>> AcceptLoop::Create(
    const Options& options, const std::vector<ListenAddress>& addresses, Metrics* metrics) {
  std::unique_ptr<AcceptLoop> loop(new AcceptLoop(options, metrics));
  loop->wake_fd_ = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
  loop->reserve_fd_ = open("/dev/null", O_RDONLY | O_CLOEXEC);
  if (loop->wake_fd_ < 0 || loop->reserve_fd_ < 0) return ErrnoStatus("create", "accept loop");
  for (const ListenAddress& address : addresses) PT_RETURN_IF_ERROR(loop->Bind(address));
  return loop;
}

AcceptLoop::AcceptLoop(const Options& options, Metrics* metrics)
    : options_(options),
      accepted_(metrics->GetCounter("pagetide_rpc_connections_accepted_total",
                                    "Connections handed to the RPC server")),
      refused_total_cap_(RefusedCounter(metrics, "total_cap")),
      refused_peer_cap_(RefusedCounter(metrics, "peer_cap")),
      refused_descriptors_(RefusedCounter(metrics, "descriptors")),
      open_gauge_(metrics->GetGauge("pagetide_rpc_connections_open", "Connections now open")) {}

AcceptLoop::~AcceptLoop() {
  Stop();
  if (wake_fd_ >= 0) close(wake_fd_);
  if (reserve_fd_ >= 0) close(reserve_fd_);
}

absl::Status AcceptLoop::Bind(const ListenAddress& wanted) {
  ListenAddress address = wanted;
  const bool is_unix = !address.unix_path.empty();
  if (is_unix) PT_RETURN_IF_ERROR(RemoveDeadSocket(address));
  sockaddr_storage sa{};
  socklen_t size = address.ToSockaddr(&sa);
  const int fd = socket(sa.ss_family, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0);
  if (fd < 0) return ErrnoStatus("create socket for", address.ToString());
  const int one = 1;
  // A restarted server takes its port back while old connections are still in TIME_WAIT.
  if (!is_unix) setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, &one, sizeof(one));
  if (bind(fd, reinterpret_cast<sockaddr*>(&sa), size) != 0) {
    absl::Status status = ErrnoStatus("bind", address.ToString());
    close(fd);
    return status;
  }
  if (is_unix)
    chmod(address.unix_path.c_str(), options_.unix_mode);  // before listen: none is early
  if (listen(fd, options_.backlog) != 0) {
    absl::Status status = ErrnoStatus("listen on", address.ToString());
    close(fd);
    return status;
  }
  if (!is_unix) {
    size = sizeof(sa);
    getsockname(fd, reinterpret_cast<sockaddr*>(&sa), &size);
    address.port = ntohs(sa.ss_family == AF_INET6 ? reinterpret_cast<sockaddr_in6*>(&sa)->sin6_port
                                                  : reinterpret_cast<sockaddr_in*>(&sa)->sin_port);
  }
  listeners_.push_back(fd);
  addresses_.push_back(std::move(address));
  return absl::OkStatus();
}

void AcceptLoop::Start(Handler handler) {
  handler_ = std::move(handler);
  thread_ = std::thread([this] { Run(); });
}

void AcceptLoop::Stop() {
  if (!stopping_.exchange(true)) {
    const uint64_t one = 1;
    // An eventfd takes a write of 1 unless its counter is at the limit, which wakes just as well.
    [[maybe_unused]] const ssize_t n = write(wake_fd_, &one, sizeof(one));
  }
  if (thread_.joinable()) thread_.join();
  for (size_t i = 0; i < listeners_.size(); ++i) {
    if (listeners_[i] < 0) continue;
    close(std::exchange(listeners_[i], -1));
    if (!addresses_[i].unix_path.empty()) unlink(addresses_[i].unix_path.c_str());
  }
}

void AcceptLoop::CloseConnections() {
  Sweep();
  // A descriptor that gRPC closes and the process reuses just now would be hit in its place; the
  // process is about to end.
  for (const auto& [fd, connection] : open_) shutdown(fd, SHUT_RDWR);
}

size_t AcceptLoop::Cap() const {
  const uint64_t limit = DescriptorLimit();
  const uint64_t usable =
      limit > options_.reserved_descriptors ? limit - options_.reserved_descriptors : 1;
  return std::min<uint64_t>(options_.max_connections, usable);
}

void AcceptLoop::Run() {
  pthread_setname_np(pthread_self(), "rpc-accept");
  std::vector<pollfd> polled;
  for (int fd : listeners_) polled.push_back({fd, POLLIN, 0});
  polled.push_back({wake_fd_, POLLIN, 0});
  absl::Duration pause = absl::ZeroDuration();
  MonotonicTime next_sweep = Clock::Real()->MonotonicNow() + kSweepPeriod;
  while (!stopping_.load()) {
    // While pausing, only the wake-up counts: the listeners stay ready and would spin.
    const bool is_pausing = pause > absl::ZeroDuration();
    if (is_pausing) {
      poll(&polled.back(), 1, static_cast<int>(absl::ToInt64Milliseconds(pause)));
    } else {
      poll(polled.data(), polled.size(), static_cast<int>(absl::ToInt64Milliseconds(kSweepPeriod)));
    }
    if (stopping_.load()) return;
    bool has_resources = true;
    for (size_t i = 0; i < listeners_.size(); ++i) {
      if (is_pausing || polled[i].revents != 0) has_resources = AcceptAll(i) && has_resources;
    }
    pause = has_resources ? absl::ZeroDuration()
                          : std::clamp(pause * 2, options_.shortest_pause, options_.longest_pause);
    const MonotonicTime now = Clock::Real()->MonotonicNow();
    if (now >= next_sweep || !has_resources) {
      Sweep();
      next_sweep = now + kSweepPeriod;
    }
  }
}

bool AcceptLoop::AcceptAll(size_t listener) {
  while (!stopping_.load()) {
    const int fd = accept4(listeners_[listener], nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
    if (fd >= 0) {
      Admit(listener, fd);
      continue;
    }
    if (errno == EAGAIN || errno == EWOULDBLOCK) return true;
    if (IsOutOfResources(errno)) {
      RefuseWithReserve(listeners_[listener]);
      return false;
    }
    // ECONNABORTED, EINTR, EPROTO and the network errors of accept(2) concern one connection only.
    if (errno == EBADF || errno == EINVAL || errno == ENOTSOCK) return true;
  }
  return true;
}

void AcceptLoop::RefuseWithReserve(int listener_fd) {
  refused_descriptors_->Increment();
  if (reserve_fd_ >= 0) close(std::exchange(reserve_fd_, -1));
  // The peer learns at once that it is refused, instead of waiting in the backlog for its deadline.
  const int fd = accept4(listener_fd, nullptr, nullptr, SOCK_NONBLOCK | SOCK_CLOEXEC);
  if (fd >= 0) close(fd);
  reserve_fd_ = open("/dev/null", O_RDONLY | O_CLOEXEC);  // -1 when another thread was faster
}

void AcceptLoop::Admit(size_t listener, int fd) {
  const size_t cap = Cap();
  std::string peer = PeerOf(fd);
  size_t* from_peer = &per_peer_[peer];
  if (open_.size() >= cap || *from_peer >= options_.max_connections_per_peer) {
    Sweep();
    from_peer = &per_peer_[peer];  // Sweep drops peers without connections
  }
  struct stat st {};
  if (open_.size() >= cap || *from_peer >= options_.max_connections_per_peer ||
      fstat(fd, &st) != 0) {
    (open_.size() >= cap ? refused_total_cap_ : refused_peer_cap_)->Increment();
    close(fd);
    return;
  }
  const int one = 1;
  if (!addresses_[listener].unix_path.empty()) {
    SetUnixSendBuffer(fd);
  } else {
    setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &one, sizeof(one));
    // HTTP/2 pings find a dead peer within a minute; this is for peers that never finish the
    // handshake.
    setsockopt(fd, SOL_SOCKET, SO_KEEPALIVE, &one, sizeof(one));
    const int idle_s = 60, interval_s = 10, probes = 3;
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPIDLE, &idle_s, sizeof(idle_s));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPINTVL, &interval_s, sizeof(interval_s));
    setsockopt(fd, IPPROTO_TCP, TCP_KEEPCNT, &probes, sizeof(probes));
  }
  // A descriptor that is open here under the same number was closed by its owner and reused.
  if (auto old = open_.find(fd); old != open_.end()) {
    auto count = per_peer_.find(old->second.peer);
    if (count != per_peer_.end() && count->second > 0) --count->second;
    open_.erase(old);
  }
  ++per_peer_[peer];
  open_[fd] = Connection{st.st_ino, std::move(peer)};
  num_open_.store(open_.size(), std::memory_order_relaxed);
  open_gauge_->Set(static_cast<double>(open_.size()));
  accepted_->Increment();
  handler_(listeners_[listener], fd);
}

void AcceptLoop::Sweep() {
  per_peer_.clear();
  absl::erase_if(open_, [this](const auto& entry) {
    struct stat st {};
    const bool is_open =
        fstat(entry.first, &st) == 0 && S_ISSOCK(st.st_mode) && st.st_ino == entry.second.inode;
    if (is_open) ++per_peer_[entry.second.peer];
    return !is_open;
  });
  num_open_.store(open_.size(), std::memory_order_relaxed);
  open_gauge_->Set(static_cast<double>(open_.size()));
}

}  // namespace pagetide
