// AcceptLoop: listening sockets and the thread that accepts from them. It exists because the accept
// loop of gRPC before 1.57 stops for good once all descriptors are used up (CVE-2023-4785). This
// one caps connections, in all and a peer, and keeps one descriptor in reserve to refuse with when
// none is left.
//
// Thread-safe. Listen, then Start once; Stop or the destructor joins the thread.
#ifndef PAGETIDE_RPC_ACCEPT_LOOP_H_
#define PAGETIDE_RPC_ACCEPT_LOOP_H_

#include <sys/socket.h>
#include <sys/types.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/metrics.h"

namespace pagetide {

// Where to listen: "host:port" (an IPv4 address, an IPv6 address in brackets, or "localhost"; port
// 0 = any free one) or "unix:/path". INVALID_ARGUMENT for all else: no name is looked up.
struct ListenAddress {
  std::string unix_path;  // empty for TCP
  std::string host;       // numeric
  uint16_t port = 0;
  bool is_loopback = false;  // true for unix sockets

  static absl::StatusOr<ListenAddress> Parse(absl::string_view text);
  // As a client dials it: "127.0.0.1:7100", "[::1]:7100", "unix:/path".
  std::string ToString() const;
  // Fills `out` for bind or connect and returns its size.
  socklen_t ToSockaddr(sockaddr_storage* out) const;
};

class AcceptLoop {
 public:
  struct Options {
    // Open connections over all listeners; the next one is closed at once.
    size_t max_connections = 4096;
    // Open connections from one peer: an IP address, or a user id on a unix socket.
    size_t max_connections_per_peer = 1024;
    // Descriptors that connections may never take: files, other sockets. The cap of connections is
    // lowered to the limit of descriptors minus these.
    size_t reserved_descriptors = 128;
    int backlog = 1024;
    // Pause after a failure for want of descriptors or memory, doubled up to the longest.
    absl::Duration shortest_pause = absl::Milliseconds(5);
    absl::Duration longest_pause = absl::Milliseconds(250);
    mode_t unix_mode = 0600;
  };
  // Takes ownership of a connected, non-blocking socket.
  using Handler = std::function<void(int listener_fd, int fd)>;

  // Binds and listens on all addresses or on none. `metrics` outlives the loop.
  static absl::StatusOr<std::unique_ptr<AcceptLoop>> Create(
      const Options& options, const std::vector<ListenAddress>& addresses, Metrics* metrics);
  ~AcceptLoop();
  AcceptLoop(const AcceptLoop&) = delete;
  AcceptLoop& operator=(const AcceptLoop&) = delete;

  void Start(Handler handler);
  // Closes the listening sockets (new peers are refused by the kernel) and joins. Idempotent.
  void Stop();

  // Ends the connections that are open, both ways: their owner reads the end of the stream. What
  // was written still goes out. After Stop only.
  void CloseConnections();

  // What was bound, with the real ports, in the order asked for.
  const std::vector<ListenAddress>& addresses() const { return addresses_; }
  // Connections accepted and not yet seen closed: exact after at most one second.
  size_t num_connections() const { return num_open_.load(std::memory_order_relaxed); }

 private:
  // A connection handed over is recognised as open while its descriptor still is the same socket:
  // the new owner closes it without telling, and the number may by then name something else.
  struct Connection {
    ino_t inode = 0;
    std::string peer;
  };

  AcceptLoop(const Options& options, Metrics* metrics);
  absl::Status Bind(const ListenAddress& address);
  void Run();
  // Accepts all that wait on one listener. Returns false when descriptors or memory ran out.
  bool AcceptAll(size_t listener);
  void Admit(size_t listener, int fd);
  void RefuseWithReserve(int listener_fd);
  // Forgets connections that their owner closed.
  void Sweep();
  size_t Cap() const;

  const Options options_;
  Counter* const accepted_;
  Counter* const refused_total_cap_;
  Counter* const refused_peer_cap_;
  Counter* const refused_descriptors_;
  Gauge* const open_gauge_;
  std::vector<ListenAddress> addresses_;  // const after Create
  std::vector<int> listeners_;            // const from Create to Stop; -1 after
  int wake_fd_ = -1;                      // eventfd; const after Create
  Handler handler_;                       // const after Start
  std::atomic<bool> stopping_{false};     // set once, then wake_fd_ is signalled
  std::atomic<size_t> num_open_{0};       // written by the accept thread; a statistic for others

  // Owned by the accept thread; after Stop by who stopped it.
  int reserve_fd_ = -1;
  absl::flat_hash_map<int, Connection> open_;
  absl::flat_hash_map<std::string, size_t> per_peer_;

  std::thread thread_;
};

}  // namespace pagetide

#endif  // PAGETIDE_RPC_ACCEPT_LOOP_H_
