// Memory of a GPU that two processes of a host map: ExportableMemory in the one that has it, and
// ImportedMemory in the one that was given its descriptor (by SCM_RIGHTS) or handle. Over the
// driver alone (cuda_vmm_library.h), beside CUDA's runtime or without it.
//
// The physical memory lives until the last process has let it go: the death of one, by whatever
// signal, takes its own mapping only. Who imports decides how it maps: nothing that the exporter
// could do keeps a peer from writing, so memory is exported to peers that are trusted with all of
// it. Memory that goes by a handle (kIpc) must be closed by its importers before its owner frees
// it.
//
// Objects are immutable after construction and may go on any thread; the bytes are the GPU's, and
// the callers' to keep apart. No thread's current context is changed.
//
// FAILED_PRECONDITION has the reason NO_GPU (no driver, no such GPU, no context), CANNOT_EXPORT or
// CANNOT_IMPORT, with the driver's call and error; RESOURCE_EXHAUSTED: the GPU lacks the memory.
// What fails gives back what it had taken.
#ifndef PAGETIDE_WORKER_CUDA_SHARED_MEMORY_H_
#define PAGETIDE_WORKER_CUDA_SHARED_MEMORY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/cuda_vmm_library.h"

namespace pagetide {

// What was taken of the driver for one memory, given back in the opposite order.
class CudaHoldings;

class ExportableMemory {
 public:
  enum class Kind : uint8_t {
    kVmm,  // a descriptor
    kIpc,  // a handle: of GPUs and systems that give no descriptors
  };

  // At least `size_bytes` of GPU `ordinal` of those that this process sees, whole units of the
  // driver, in an allocation that holds nothing else. What the bytes are is not said.
  // INVALID_ARGUMENT for 0 bytes.
  static absl::StatusOr<std::unique_ptr<ExportableMemory>> Create(
      std::shared_ptr<const CudaVmmLibrary> library, int ordinal, uint64_t size_bytes);
  ~ExportableMemory();
  ExportableMemory(const ExportableMemory&) = delete;
  ExportableMemory& operator=(const ExportableMemory&) = delete;

  std::byte* data() const;  // device, to be read and written
  uint64_t size_bytes() const;
  Kind kind() const { return kind_; }
  int fd() const { return fd_; }                                 // kVmm; stays this object's
  const std::string& ipc_handle() const { return ipc_handle_; }  // kIpc: 64 bytes
  const std::string& device_uuid() const;                        // 16 bytes

 private:
  explicit ExportableMemory(std::unique_ptr<CudaHoldings> holdings);

  const std::unique_ptr<CudaHoldings> holdings_;
  // Set by Create only.
  Kind kind_ = Kind::kVmm;
  int fd_ = -1;
  std::string ipc_handle_;
};

class ImportedMemory {
 public:
  // kRead is this process's own promise, which the GPU holds it to.
  enum class Access : uint8_t { kRead, kReadWrite };

  // Maps all `size_bytes`, as the exporter states them, of the memory behind `fd`, which stays the
  // caller's. INVALID_ARGUMENT for sizes that are no whole units of the driver.
  static absl::StatusOr<std::unique_ptr<ImportedMemory>> FromFd(
      std::shared_ptr<const CudaVmmLibrary> library, int ordinal, int fd, uint64_t size_bytes,
      Access access);
  // For reading and writing: handles know nothing else. Not in the process that exported it.
  // INVALID_ARGUMENT for a handle that has not 64 bytes and for memory of fewer bytes.
  static absl::StatusOr<std::unique_ptr<ImportedMemory>> FromIpcHandle(
      std::shared_ptr<const CudaVmmLibrary> library, int ordinal, absl::string_view handle,
      uint64_t size_bytes);
  ~ImportedMemory();
  ImportedMemory(const ImportedMemory&) = delete;
  ImportedMemory& operator=(const ImportedMemory&) = delete;

  std::byte* data() const;  // device
  uint64_t size_bytes() const { return size_bytes_; }
  const std::string& device_uuid() const;

 private:
  ImportedMemory(std::unique_ptr<CudaHoldings> holdings, uint64_t size_bytes);

  const std::unique_ptr<CudaHoldings> holdings_;
  const uint64_t size_bytes_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_CUDA_SHARED_MEMORY_H_
