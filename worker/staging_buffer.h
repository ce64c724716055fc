// StagingBuffer: memory that one local client and the worker share: a memfd of fixed size (sealed
// against growing and shrinking, so that the client cannot make our mapping fault), from which the
// worker gives out regions. The client may write into it at any time: what is read from it is
// checked only after it was copied. Thread-safe.
#ifndef PAGETIDE_WORKER_STAGING_BUFFER_H_
#define PAGETIDE_WORKER_STAGING_BUFFER_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>

#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "core/region_allocator.h"

namespace pagetide {

class StagingBuffer {
 public:
  // `num_bytes` is rounded up to whole memory pages. RESOURCE_EXHAUSTED when the memory is not to
  // be had. Shared by the client's connection and by the copies at work when it goes.
  static absl::StatusOr<std::shared_ptr<StagingBuffer>> Create(uint64_t num_bytes);
  ~StagingBuffer();
  StagingBuffer(const StagingBuffer&) = delete;
  StagingBuffer& operator=(const StagingBuffer&) = delete;

  int fd() const { return fd_; }
  uint64_t num_bytes() const { return num_bytes_; }
  std::span<const std::byte> View(uint64_t offset, uint64_t num_bytes) const {
    return {data_ + offset, num_bytes};
  }

  // Offset of a free region. RESOURCE_EXHAUSTED.
  absl::StatusOr<uint64_t> Allocate(uint64_t num_bytes);
  void Free(uint64_t offset);

 private:
  StagingBuffer(int fd, std::byte* data, uint64_t num_bytes);

  const int fd_;
  std::byte* const data_;
  const uint64_t num_bytes_;
  Mutex mu_;
  RegionAllocator regions_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_STAGING_BUFFER_H_
