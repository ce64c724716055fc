// CpuDevice: the device of machines without a GPU, and the oracle of those with one. A pool is a
// memfd mapped into this process, so that local peers can map the same frames read-only.
//
// The device is thread-safe. A pool's calls may run in parallel on ranges that do not overlap; they
// run on the caller's thread. Pools outlive their device if need be.
#ifndef PAGETIDE_WORKER_CPU_DEVICE_H_
#define PAGETIDE_WORKER_CPU_DEVICE_H_

#include <cstdint>
#include <memory>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/device.h"

namespace pagetide {

class CpuDevice final : public Device {
 public:
  struct Options {
    // Ask the kernel for huge pages (MADV_HUGEPAGE): fewer TLB misses on page copies. Advice only:
    // it is heeded where /sys/kernel/mm/transparent_hugepage/shmem_enabled allows it.
    bool huge_pages = false;
    // Take the memory at creation, which finds out then whether it is to be had, at the cost of
    // touching all of it. Off: memory comes as frames are first written.
    bool reserve_memory = false;
  };

  CpuDevice() : CpuDevice(Options{}) {}
  explicit CpuDevice(Options options) : options_(options) {}

  absl::string_view name() const override { return "cpu"; }

  // All bytes start as zero. The size is rounded up to whole memory pages in the file descriptor
  // only. INVALID_ARGUMENT for 0 bytes; RESOURCE_EXHAUSTED if the machine has less memory, or if
  // reserve_memory is set and it is not free.
  //
  // The pool's Attend takes f32, f16 and bf16 rows of full and window groups, in the plain basis
  // and without scales (else FAILED_PRECONDITION, CANNOT_ATTEND). A latent group (v_dim 0) attends
  // to its K rows as values: `outputs` is then [num_queries, query_heads, w] with any 1 ≤ w ≤ k_dim
  // (w = k_dim if kv_heads > 1), the leading w elements of each head. A scale of 0 means
  // 1 / sqrt(k_dim); log_sum_exp may be empty.
  //
  // The exported descriptor is sealed against resizing and against new writable mappings and writes
  // by anyone, this process included; only the mapping made here can write.
  absl::StatusOr<std::unique_ptr<DevicePool>> CreatePool(uint64_t size_bytes) override;

 private:
  const Options options_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_CPU_DEVICE_H_
