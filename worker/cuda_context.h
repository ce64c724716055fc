// CudaContext: what the pools of one GPU share: its streams, and the memory beside the pools that
// calls work in.
//
// A CudaContext is thread-safe; a CudaWork is for one thread at a time. Contexts are held by their
// device and pools together.
#ifndef PAGETIDE_WORKER_CUDA_CONTEXT_H_
#define PAGETIDE_WORKER_CUDA_CONTEXT_H_

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/mutex.h"
#include "worker/cuda_transfers.h"

namespace pagetide {

// Places in one allocation, each at a multiple of 256.
class Arena {
 public:
  uint64_t Take(uint64_t num_bytes) {
    const uint64_t at = bytes_;
    bytes_ += (num_bytes + 255) / 256 * 256;
    return at;
  }
  uint64_t bytes() const { return bytes_; }

 private:
  uint64_t bytes_ = 0;
};

// A stream for kernels, with memory on both sides that has grown to what calls needed.
class CudaWork {
 public:
  static absl::StatusOr<std::unique_ptr<CudaWork>> Create();
  // The GPU is the thread's, and nothing runs on the stream.
  ~CudaWork();
  CudaWork(const CudaWork&) = delete;
  CudaWork& operator=(const CudaWork&) = delete;

  // What was there before is lost; nothing may run. RESOURCE_EXHAUSTED.
  absl::Status Reserve(uint64_t device_bytes, uint64_t pinned_bytes);
  std::byte* device() const { return static_cast<std::byte*>(device_); }
  std::byte* pinned() const { return static_cast<std::byte*>(pinned_); }
  cudaStream_t stream() const { return stream_; }

  // Enqueues the copy.
  absl::Status Copy(void* to, const void* from, uint64_t num_bytes, cudaMemcpyKind kind);
  absl::Status Wait();

 private:
  CudaWork() = default;

  cudaStream_t stream_ = nullptr;
  void* device_ = nullptr;
  void* pinned_ = nullptr;
  uint64_t device_bytes_ = 0;
  uint64_t pinned_bytes_ = 0;
};

class CudaContext {
 public:
  static absl::StatusOr<std::shared_ptr<CudaContext>> Create(int ordinal);
  ~CudaContext();
  CudaContext(const CudaContext&) = delete;
  CudaContext& operator=(const CudaContext&) = delete;

  int ordinal() const { return ordinal_; }
  const std::string& name() const { return name_; }  // "cuda:0"
  // Makes the GPU the calling thread's: every call begins with it.
  absl::Status Use() const;
  CudaTransfers& to_device() { return *to_device_; }
  CudaTransfers& from_device() { return *from_device_; }

  // A CudaWork for the length of a call; waits for one, and, when it is given back, for its stream.
  class Borrowed {
   public:
    explicit Borrowed(CudaContext* context);
    ~Borrowed();
    Borrowed(const Borrowed&) = delete;
    Borrowed& operator=(const Borrowed&) = delete;
    CudaWork& operator*() const { return *work_; }
    CudaWork* operator->() const { return work_.get(); }

   private:
    CudaContext* const context_;
    std::unique_ptr<CudaWork> work_;
  };

 private:
  explicit CudaContext(int ordinal);

  const int ordinal_;
  const std::string name_;
  // Const after Create.
  std::unique_ptr<CudaTransfers> to_device_;
  std::unique_ptr<CudaTransfers> from_device_;

  Mutex mu_;
  CondVar returned_;
  std::vector<std::unique_ptr<CudaWork>> free_ ABSL_GUARDED_BY(mu_);
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_CUDA_CONTEXT_H_
