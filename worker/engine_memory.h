// EngineMemory: memory of an engine on this host that the worker may read and write: a memfd that
// the engine made and handed over, or memory of the worker's GPU, which a device has imported.
//
// Of a memfd: the engine may write into it at any time; it cannot make our
// mapping fault: it cannot shrink the memory (F_SEAL_SHRINK), and it is plain memory, so that a
// hole is zeros and no file system can be full. A hole that is touched is filled at the expense of
// who touches it, so pools are registered only in memory that has none.
//
// Immutable, and so thread-safe; the bytes are the engine's to keep apart. Shared by the client's
// connection, its pools and the jobs at work on them: unmapped when the last of them is gone, alive
// or dead engine.
#ifndef PAGETIDE_WORKER_ENGINE_MEMORY_H_
#define PAGETIDE_WORKER_ENGINE_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"

namespace pagetide {

class EngineMemory {
 public:
  // Maps the first `size_bytes` of `fd`, which stays the caller's. What is no memfd is told by
  // calls that ask no file system: it may be a stranger's, and never answer. INVALID_ARGUMENT
  // (size), FAILED_PRECONDITION (no memfd, seals, not open for writing), RESOURCE_EXHAUSTED (cannot
  // be mapped).
  static absl::StatusOr<std::shared_ptr<const EngineMemory>> Map(int fd, uint64_t size_bytes);
  // Memory that a device addresses, and the host does not; mapped as long as `mapping` lives, which
  // is shared with nobody else.
  static std::shared_ptr<const EngineMemory> OnDevice(std::shared_ptr<const void> mapping,
                                                      std::byte* data, uint64_t size_bytes);
  ~EngineMemory();
  EngineMemory(const EngineMemory&) = delete;
  EngineMemory& operator=(const EngineMemory&) = delete;

  bool is_on_device() const { return fd_ < 0; }
  // INVALID_ARGUMENT when there is a hole; a GPU's memory has none. The engine can make one later:
  // then our touch fills it. Looks at every page: takes a second for some hundred GiB.
  absl::Status CheckAllocated() const;

  // Const says what the object is, not the bytes, which are the engine's.
  std::byte* data() const { return data_; }
  uint64_t size_bytes() const { return size_bytes_; }

 private:
  EngineMemory(int fd, std::byte* data, uint64_t size_bytes)
      : fd_(fd), data_(data), size_bytes_(size_bytes) {}

  const int fd_;  // ours; of a GPU's memory -1
  std::byte* const data_;
  const uint64_t size_bytes_;
  std::shared_ptr<const void> mapping_;  // of a GPU's memory; set by OnDevice only
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_ENGINE_MEMORY_H_
