// Launch and shared memory, spelled so that the device source also compiles as C++: tests run it on
// the CPU, thread by thread, where no GPU is (tests/kernels/emulated_cuda).
#ifndef PAGETIDE_KERNELS_DEVICE_LAUNCH_CUH_
#define PAGETIDE_KERNELS_DEVICE_LAUNCH_CUH_

#include <cuda_runtime.h>

#include <cstddef>

#include "kernels/cuda_stream.h"

#ifdef __CUDACC__
// Declares `name`, the block's dynamic shared memory, as an array of `type`.
#define PAGETIDE_DYNAMIC_SHARED(type, name) extern __shared__ type name[]
#else
#define PAGETIDE_DYNAMIC_SHARED(type, name) \
  type* name = static_cast<type*>(emulated_cuda::DynamicShared())
#endif

namespace pagetide::kernels::device {

// Enqueues the kernel; returns the cudaError_t of the launch.
template <typename... Parameters, typename... Arguments>
int Launch(void (*kernel)(Parameters...), dim3 grid, dim3 block, size_t shared_bytes,
           CudaStream stream, Arguments... arguments) {
#ifdef __CUDACC__
  kernel<<<grid, block, shared_bytes, stream>>>(arguments...);
#else
  emulated_cuda::RunGrid(stream, grid, block, shared_bytes, [=] { kernel(arguments...); });
#endif
  return cudaGetLastError();
}

}  // namespace pagetide::kernels::device

#endif  // PAGETIDE_KERNELS_DEVICE_LAUNCH_CUH_
