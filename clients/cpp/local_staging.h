// LocalStaging: memory shared with a worker on the same host. The worker gives out regions of it
// with ReserveSlots; rows written there need no RPC to carry them. If a model is named, its frames
// come too, read-only. Protocol: local_plane.proto.
//
// The connection is the client's life to the worker: while this object lives, so do its
// reservations. Thread-safe: regions are disjoint, and each belongs to the reservation that was
// granted it.
#ifndef PAGETIDE_CLIENTS_CPP_LOCAL_STAGING_H_
#define PAGETIDE_CLIENTS_CPP_LOCAL_STAGING_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"

namespace pagetide {

class LocalStaging {
 public:
  // UNAVAILABLE when nobody listens at `socket_path` (another host, or the local plane is off),
  // DEADLINE_EXCEEDED, FAILED_PRECONDITION with the worker's words when it refuses. `model_digest`:
  // whose pool to map; empty: none. A pool that this process cannot map, a GPU's among them, leaves
  // pool() empty.
  static absl::StatusOr<std::unique_ptr<LocalStaging>> Connect(absl::string_view socket_path,
                                                               uint64_t staging_bytes,
                                                               absl::Duration timeout,
                                                               absl::string_view model_digest = "");
  ~LocalStaging();
  LocalStaging(const LocalStaging&) = delete;
  LocalStaging& operator=(const LocalStaging&) = delete;

  // False once the worker has gone: another life of it has other memory.
  bool IsConnected() const;
  // Names this buffer in ReserveSlots.
  uint64_t client_id() const { return client_id_; }
  uint64_t num_bytes() const { return num_bytes_; }
  // Where the frames of the named model lie; offsets are those of GetBlockTable.
  std::span<const std::byte> pool() const { return {pool_, pool_bytes_}; }
  // Why pool() is empty, in the worker's words; empty if it told none.
  const std::string& why_no_pool() const { return why_no_pool_; }
  // OUT_OF_RANGE unless the region lies inside the buffer.
  absl::StatusOr<std::span<std::byte>> Region(uint64_t offset, uint64_t num_bytes) const;

 private:
  LocalStaging(int socket, std::byte* data, uint64_t num_bytes, uint64_t client_id);

  const int socket_;
  std::byte* const data_;  // mapped, read-write
  const uint64_t num_bytes_;
  const uint64_t client_id_;
  // Mapped, read-only; set by Connect only.
  const std::byte* pool_ = nullptr;
  uint64_t pool_bytes_ = 0;
  std::string why_no_pool_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CLIENTS_CPP_LOCAL_STAGING_H_
