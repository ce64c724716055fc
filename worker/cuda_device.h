// The device of machines with an NVIDIA GPU: pools in its memory, the kernels of pt_kernels_cuda
// over them. Defined in cuda_device.cc where the build has CUDA and in no_cuda_device.cc where not,
// so that callers need not know.
//
// A pool is one plain allocation; with export_frames it is one that peers can map
// (cuda_shared_memory.h). The device is thread-safe; calls of its pools may run in parallel on
// ranges that do not overlap: transfers have a stream a direction and pinned buffers
// (cuda_transfers.h), the work of kernels has streams of its own. Pools outlive their device if
// need be. Host code cannot address a pool: host_view is null.
#ifndef PAGETIDE_WORKER_CUDA_DEVICE_H_
#define PAGETIDE_WORKER_CUDA_DEVICE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "worker/device.h"

namespace pagetide {

struct CudaDeviceOptions {
  // Make pools that processes on this host can map, and take their memory in this GPU in return
  // (Import). Off, because nothing keeps such a peer from writing into a pool, nor from taking its
  // own memory away under a kernel. Where GPU or driver cannot, pools are made as without, and say
  // why.
  bool export_frames = false;
  // The driver's library that exports go through, as dlopen takes it.
  std::string driver = "libcuda.so.1";
};

// GPU `ordinal` of those that this process sees. FAILED_PRECONDITION says why there is none that
// can be used: built without CUDA, no driver, no such GPU, or one too old (compute capability below
// 8.0). Takes the GPU's context and about 50 MiB of pinned memory.
//
// CreatePool: INVALID_ARGUMENT for 0 bytes; RESOURCE_EXHAUSTED, with what is free, if the GPU has
// less. All bytes start as zero.
//
// Attend takes the groups that the CPU device takes, with rows aligned to their elements, and
// deviates from it by the bounds of docs/kernels.md; MLA of more than 512 value elements and shapes
// whose tiles do not fit the GPU's shared memory are CANNOT_ATTEND. The other calls give the CPU
// device's bits.
absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(int ordinal,
                                                       const CudaDeviceOptions& options = {});

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_CUDA_DEVICE_H_
