// LocalPlane: the data plane for clients on the same machine (proto/pagetide/v1/local_plane.proto).
// A client connects to a unix socket, says hello, and gets a staging buffer to write rows into and,
// if it asks for a model, that model's pool to read frames in place: host memory, or, where the
// device exports it and the client says that it can map such memory, a GPU's. An engine hands its
// own memory over with the hello. The connection is the client's life: when it closes, the staging
// is freed, the reservations that used it are aborted, and on_client_gone ends what stood on its
// memory.
//
// One named thread serves the socket and never waits for a client, nor for what a client's
// descriptors lead to. Clients are hostile until proven otherwise: a bad length, version or message
// closes their connection and nothing else.
// Thread-safe. The worker outlives it.
#ifndef PAGETIDE_WORKER_LOCAL_PLANE_H_
#define PAGETIDE_WORKER_LOCAL_PLANE_H_

#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/byte_size.h"
#include "base/mutex.h"
#include "pagetide/v1/local_plane.pb.h"
#include "worker/engine_layout.h"
#include "worker/local_plane_wire.h"
#include "worker/staging_buffer.h"
#include "worker/worker.h"

namespace pagetide {

class LocalPlane {
 public:
  struct Options {
    std::string socket_path;
    // Staging a client; a smaller wish is granted as it is.
    uint64_t max_staging_bytes = 64 * kMiB;
    size_t max_clients = 64;
    absl::Duration handshake_timeout = absl::Seconds(5);
    // Longest wait for a model that a client names and that is not loaded yet.
    absl::Duration model_load_timeout = absl::Seconds(2);
    // Memory of its own that one client may hand over.
    uint64_t max_engine_bytes = 256 * kGiB;
    // A client that was welcomed is gone; from the plane's thread, which must not wait. May be
    // null.
    std::function<void(uint64_t client_id)> on_client_gone;
  };

  // INVALID_ARGUMENT for a path that does not fit a socket address, FAILED_PRECONDITION when
  // something else than a dead socket is at the path.
  static absl::StatusOr<std::unique_ptr<LocalPlane>> Create(Options options, Worker* worker);
  ~LocalPlane();
  LocalPlane(const LocalPlane&) = delete;
  LocalPlane& operator=(const LocalPlane&) = delete;

  // A reservation whose rows will lie in a client's staging buffer.
  struct Reservation {
    ModelHost* host = nullptr;
    Tenant tenant;
    SequenceId sequence;
    uint32_t num_tokens = 0;
    uint64_t num_bytes = 0;
    MonotonicTime expires;
  };
  // Returns the offset of the region. NOT_FOUND (LOCAL_CLIENT_NOT_FOUND), RESOURCE_EXHAUSTED.
  absl::StatusOr<uint64_t> Stage(uint64_t client_id, uint64_t reservation_id,
                                 Reservation reservation);
  struct StagedRows {
    // Shared, so that the bytes stay mapped while they are copied though the client may go.
    std::shared_ptr<StagingBuffer> buffer;
    uint64_t offset = 0;
    uint64_t num_bytes = 0;
    uint32_t num_tokens = 0;  // as reserved: decides the layout
    std::span<const std::byte> View(uint64_t at, uint64_t n) const {
      return buffer->View(offset + at, n);
    }
  };
  // NOT_FOUND unless the reservation has staging and belongs to `sequence`.
  absl::StatusOr<StagedRows> FindStaged(SequenceId sequence, uint64_t reservation_id) const;
  // Frees the region of a reservation of `sequence`. Does nothing if there is none.
  void Release(SequenceId sequence, uint64_t reservation_id);

  // NOT_FOUND (LOCAL_CLIENT_NOT_FOUND) unless this worker welcomed the client and it is still
  // there.
  absl::Status CheckClient(uint64_t client_id) const;
  // What the client handed over. NOT_FOUND (LOCAL_CLIENT_NOT_FOUND) when it is not connected.
  absl::StatusOr<EngineLayout::Memories> MemoriesOf(uint64_t client_id) const;

  const std::string& socket_path() const { return options_.socket_path; }
  size_t num_clients() const;
  uint64_t staging_bytes() const;             // given out now
  uint64_t staging_high_water_bytes() const;  // the most that ever was

 private:
  struct Connection {
    int fd = -1;
    MonotonicTime handshake_ends;
    std::string received;
    uint64_t client_id = 0;  // 0 until welcomed
    ReceivedFds fds;         // until the hello has been read
  };
  struct Client {
    std::shared_ptr<StagingBuffer> staging;
    EngineLayout::Memories memories;
  };
  struct Entry {
    Reservation reservation;
    uint64_t client_id = 0;
    std::shared_ptr<StagingBuffer> buffer;
    uint64_t offset = 0;
  };

  LocalPlane(Options options, Worker* worker, int listen_fd, int wake_fd);
  void Run();
  void Accept();
  // False: close the connection.
  bool Receive(Connection* connection);
  bool Welcome(Connection* connection, const v1::LocalHello& hello, const ReceivedFds& received);
  bool CanImport(v1::LocalMemory::Kind kind) const;
  absl::StatusOr<std::shared_ptr<const EngineMemory>> MapMemory(const v1::LocalMemory& memory,
                                                                int fd) const;
  absl::StatusOr<EngineLayout::Memories> MapMemories(const v1::LocalHello& hello,
                                                     const ReceivedFds& fds) const;
  void DropClient(uint64_t client_id);
  void DropExpired();
  // NOT_FOUND (LOCAL_CLIENT_NOT_FOUND). Holds as long as the lock does.
  absl::StatusOr<const Client*> FindClient(uint64_t client_id) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  Worker* const worker_;
  const int listen_fd_;
  const int wake_fd_;  // eventfd: stop
  FdCloser fd_closer_;
  std::vector<Connection> connections_;  // owned by the thread

  mutable Mutex mu_;
  std::map<uint64_t, Client> clients_ ABSL_GUARDED_BY(mu_);
  std::map<uint64_t, Entry> reservations_ ABSL_GUARDED_BY(mu_);
  uint64_t staging_bytes_ ABSL_GUARDED_BY(mu_) = 0;
  uint64_t staging_high_water_bytes_ ABSL_GUARDED_BY(mu_) = 0;

  std::thread thread_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_LOCAL_PLANE_H_
