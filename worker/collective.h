// Collective: bytes between the members of a small group of workers, from and to frames or host
// memory. The port over gRPC (everywhere) and NCCL (between GPUs).
//
// All members make the same broadcasts in the same order; between two members, sends and receives
// are matched in their order, and so are their sizes. A call that fails leaves its group broken:
// the bytes that it was to write are not to be used, and every later call answers
// FAILED_PRECONDITION (GROUP_BROKEN). Make another group then.
//
// One call at a time, but for Abort, which is for any thread.
#ifndef PAGETIDE_WORKER_COLLECTIVE_H_
#define PAGETIDE_WORKER_COLLECTIVE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <span>
#include <string>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "base/clock.h"
#include "worker/device.h"

namespace pagetide {

// A range of a pool, or of host memory. Names it; the bytes are the caller's, and stay until the
// call is over.
struct CollectiveBuffer {
  DevicePool* pool = nullptr;  // null: `host`
  uint64_t offset = 0;
  uint64_t num_bytes = 0;
  std::byte* host = nullptr;

  static CollectiveBuffer Of(DevicePool* pool, uint64_t offset, uint64_t num_bytes) {
    return {.pool = pool, .offset = offset, .num_bytes = num_bytes};
  }
  static CollectiveBuffer Of(std::span<std::byte> host) {
    return {.num_bytes = host.size(), .host = host.data()};
  }
  // [at, at + to.size()) lies within it.
  absl::Status Read(uint64_t at, std::span<std::byte> to) const {
    if (pool != nullptr) return pool->Read(offset + at, to);
    std::memcpy(to.data(), host + at, to.size());
    return absl::OkStatus();
  }
  absl::Status Write(uint64_t at, std::span<const std::byte> from) const {
    if (pool != nullptr) return pool->Write(offset + at, from);
    std::memcpy(host + at, from.data(), from.size());
    return absl::OkStatus();
  }
};

inline constexpr uint32_t kMaxGroupSize = 64;

class Collective {
 public:
  virtual ~Collective() = default;
  virtual absl::string_view name() const = 0;  // "grpc", "nccl"
  virtual uint32_t rank() const = 0;
  virtual uint32_t size() const = 0;
  // The bytes of `root` become those of all. INVALID_ARGUMENT breaks no group: root, the buffer.
  virtual absl::Status Broadcast(uint32_t root, const CollectiveBuffer& buffer,
                                 MonotonicTime deadline) = 0;
  // Answers when the other has all of it. INVALID_ARGUMENT as above: to, from, the buffer.
  virtual absl::Status Send(uint32_t to, const CollectiveBuffer& buffer,
                            MonotonicTime deadline) = 0;
  virtual absl::Status Receive(uint32_t from, const CollectiveBuffer& buffer,
                               MonotonicTime deadline) = 0;
  // Ends the call that runs, CANCELLED, and breaks the group here. Others learn it by their
  // deadlines. Idempotent.
  virtual void Abort() = 0;
};

// A faster way between the same members, which not all of them need have.
class FastLink {
 public:
  virtual ~FastLink() = default;
  virtual absl::string_view name() const = 0;
  // Could this member join? FAILED_PRECONDITION says why not.
  virtual absl::Status Check() = 0;
  // By rank 0, once a group: what the others need to know, at most kMaxIdBytes.
  static constexpr size_t kMaxIdBytes = 256;
  virtual absl::StatusOr<std::string> MakeId() = 0;
  // All members, at the same time.
  virtual absl::StatusOr<std::unique_ptr<Collective>> Join(uint32_t rank, uint32_t size,
                                                           absl::string_view id,
                                                           MonotonicTime deadline) = 0;
};

// The collective of a group: over `fast` if all its members can, else `slow`. All members call it;
// what they need to agree on goes over `slow`, the id among it. An error is of `slow`, and the
// group's then.
struct ChosenCollective {
  std::unique_ptr<Collective> collective;
  std::string why_not_fast;  // empty: it is
};
absl::StatusOr<ChosenCollective> ChooseCollective(std::unique_ptr<Collective> slow, FastLink* fast,
                                                  MonotonicTime deadline);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_COLLECTIVE_H_
