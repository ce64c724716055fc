// CudaTransfers: bytes between this process and one GPU, in one direction, over one stream.
//
// Pageable memory goes through pinned buffers, the copy of one overlapping the transfer of the
// others; memory that is pinned already is transferred as it is. A call returns when its bytes are
// there. Thread-safe: calls run in parallel, up to Options::max_calls of them; others wait their
// turn. No lock is held during a copy or a wait for the device.
#ifndef PAGETIDE_WORKER_CUDA_TRANSFERS_H_
#define PAGETIDE_WORKER_CUDA_TRANSFERS_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"

namespace pagetide {

class CudaTransfers {
 public:
  struct Options {
    uint64_t buffer_bytes = uint64_t{2} << 20;
    int buffers_per_call = 3;  // one filled or emptied here while the others are on their way
    int max_calls = 4;
  };

  // Takes buffers_per_call × max_calls pinned buffers. RESOURCE_EXHAUSTED without them.
  static absl::StatusOr<std::unique_ptr<CudaTransfers>> Create(int ordinal, const Options& options);
  ~CudaTransfers();
  CudaTransfers(const CudaTransfers&) = delete;
  CudaTransfers& operator=(const CudaTransfers&) = delete;

  absl::Status ToDevice(void* device, std::span<const std::byte> from);
  absl::Status FromDevice(const void* device, std::span<std::byte> to);

 private:
  struct Buffer {
    std::byte* bytes = nullptr;
    cudaEvent_t done = nullptr;
    std::span<std::byte> target;  // of what is on its way from the device; empty: nothing is
    bool is_in_flight = false;
  };
  // What one call uses: owned by it while borrowed.
  struct Lane {
    std::vector<Buffer> buffers;
  };
  class Borrowed;

  CudaTransfers(int ordinal, const Options& options) : ordinal_(ordinal), options_(options) {}
  absl::Status Init();
  // Starts one piece; waits for what the buffer was used for before.
  absl::Status Start(Buffer& buffer, void* to, const void* from, size_t num_bytes,
                     cudaMemcpyKind kind);
  // Waits for the buffer's transfer and hands its bytes to their target.
  static absl::Status Finish(Buffer& buffer);

  const int ordinal_;
  const Options options_;
  cudaStream_t stream_ = nullptr;
  std::vector<Lane> lanes_;  // fixed after Init; entries belong to who took them from free_

  Mutex mu_;
  CondVar returned_;
  std::vector<Lane*> free_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_CUDA_TRANSFERS_H_
