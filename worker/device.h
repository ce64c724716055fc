// Device: the port to the memory that holds hot pages and to the kernels that work on it. Host code
// sees this, never a vendor's runtime. The CPU device keeps frames in a memfd.
#ifndef PAGETIDE_WORKER_DEVICE_H_
#define PAGETIDE_WORKER_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "core/geometry.h"

namespace pagetide {

struct RowMove;

// Consecutive rows of one layer in one frame, for attention.
struct DeviceExtent {
  uint64_t page_offset = 0;  // byte offset of the page's frame in the pool
  uint32_t first_slot = 0;
  uint32_t count = 0;
  uint64_t first_position = 0;  // absolute position of the first row
  int32_t shift = 0;            // K is to be turned by so many positions before it is attended to
};

struct AttentionCall {
  const GroupGeometry* group = nullptr;
  uint32_t layer = 0;                     // index within the group
  std::span<const DeviceExtent> extents;  // positions never decrease
  uint32_t num_queries = 0;
  uint32_t query_heads = 0;     // multiple of kv_heads
  uint64_t first_position = 0;  // of the first query
  float scale = 0;
  std::span<const float> queries;  // [num_queries, query_heads, k_dim]
  std::span<float> outputs;        // [num_queries, query_heads, v_dim]
  std::span<float> log_sum_exp;    // [num_queries, query_heads]
};

// How processes on the same host can map a pool. What lies behind it stays the pool's.
struct PoolExport {
  // Values equal the proto enum LocalMemory.Kind.
  enum class Kind : uint8_t {
    kNone = 0,
    kMemfd = 1,    // host memory; who gets the descriptor can map it for reading only
    kCudaVmm = 2,  // a GPU's: a descriptor for cuMemImportFromShareableHandle
    kCudaIpc = 3,  // a GPU's: a handle for cuIpcOpenMemHandle
  };
  Kind kind = Kind::kNone;
  int fd = -1;                // kMemfd, kCudaVmm
  std::string ipc_handle;     // kCudaIpc: 64 bytes
  uint64_t mapped_bytes = 0;  // what is mapped, from the pool's first byte on: at least the pool
  std::string device_uuid;    // kCudaVmm, kCudaIpc: the 16 bytes that name the GPU on any host
  std::string why_not;        // kNone: the reason
};

// One allocation, made once, that frames are carved from. Offsets are bytes from its start. Calls
// are complete on return. Ranges are the caller's to keep apart: the pool does not lock.
class DevicePool {
 public:
  virtual ~DevicePool() = default;
  virtual uint64_t size_bytes() const = 0;
  // Host address of the pool, or nullptr if the host cannot address it.
  virtual std::byte* host_view() = 0;
  virtual absl::Status Write(uint64_t offset, std::span<const std::byte> from) = 0;
  virtual absl::Status Read(uint64_t offset, std::span<std::byte> to) = 0;
  virtual absl::Status Copy(uint64_t to, uint64_t from, uint64_t num_bytes) = 0;
  virtual absl::Status Zero(uint64_t offset, uint64_t num_bytes) = 0;
  // FAILED_PRECONDITION (CANNOT_ATTEND) for types this device has no kernel for.
  virtual absl::Status Attend(const AttentionCall& call) = 0;
  // Can K rows of the group be turned to another position here? True where they need no turning.
  virtual bool CanShift(const GroupGeometry& group) const = 0;
  // `num_rows` K rows of a group from `offset` on, turned by `delta` positions. FAILED_PRECONDITION
  // (CANNOT_SHIFT) for rows this device cannot turn.
  virtual absl::Status ReadShifted(const GroupGeometry& group, uint64_t offset, uint32_t num_rows,
                                   int32_t delta, std::span<std::byte> to) = 0;
  // Rows between this pool, or the host, and memory of an engine that the device addresses.
  // INVALID_ARGUMENT where CheckRowMove says so.
  virtual absl::Status MoveRows(const RowMove& move) = 0;
  // For peers on the same host. Of a GPU's memory whoever maps it decides by itself whether it can
  // write: such a pool is exported only where the operator asked for it, to peers that he trusts.
  virtual PoolExport exported() const = 0;
};

// Memory that a process on the same host hands over.
struct PeerMemory {
  PoolExport::Kind kind = PoolExport::Kind::kNone;
  int fd = -1;                   // kCudaVmm; stays the caller's
  absl::string_view ipc_handle;  // kCudaIpc
  uint64_t size_bytes = 0;
};

struct ImportedPeerMemory {
  std::byte* data = nullptr;            // as the device addresses it
  std::shared_ptr<const void> mapping;  // mapped until the last holder lets it go
};

class Device {
 public:
  virtual ~Device() = default;
  virtual absl::string_view name() const = 0;  // "cpu", "cuda:0"
  // RESOURCE_EXHAUSTED when the memory is not to be had.
  virtual absl::StatusOr<std::unique_ptr<DevicePool>> CreatePool(uint64_t size_bytes) = 0;
  // Does this device map memory of peers of this kind? Of host memory no device is asked.
  virtual bool CanImport(PoolExport::Kind kind) const { return false; }
  // Memory of this device, or by IPC handle of one that it has peer access to. FAILED_PRECONDITION where it cannot be imported.
  virtual absl::StatusOr<ImportedPeerMemory> Import(const PeerMemory& memory) {
    return absl::UnimplementedError("import memory of a peer: this device does not");
  }
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_DEVICE_H_
