#include <algorithm>

#include "kernels/copy_rows.h"
#include "kernels/device_codec.cuh"
#include "kernels/device_launch.cuh"

namespace pagetide::kernels {
namespace {

constexpr int kThreads = 256;
constexpr int64_t kBlockBytes = 32 * 1024;  // of one run that one thread block copies

// Grid: x pieces of a run, y runs (strided), z planes (strided).
__global__ void __launch_bounds__(kThreads, 2) CopyRowsKernel(CopyRowsArgs args) {
  for (int64_t r = blockIdx.y; r < args.num_runs; r += gridDim.y) {
    const CopyRun run = args.runs[r];
    for (int64_t plane = blockIdx.z; plane < args.num_planes; plane += gridDim.z) {
      const char* in =
          device::Global(static_cast<const char*>(run.in)) + plane * args.in_plane_bytes;
      char* out = device::Global(static_cast<char*>(run.out)) + plane * args.out_plane_bytes;
      for (int64_t at = blockIdx.x * kBlockBytes; at < run.num_bytes;
           at += gridDim.x * kBlockBytes) {
        const int64_t n = run.num_bytes - at < kBlockBytes ? run.num_bytes - at : kBlockBytes;
        device::CopyBytes(in + at, out + at, n, static_cast<int>(threadIdx.x), kThreads);
      }
    }
  }
}

}  // namespace

int CopyRowsCuda(const CopyRowsArgs& args, CudaStream stream) {
  if (args.num_runs == 0 || args.max_run_bytes == 0) return cudaSuccess;
  const int64_t pieces = (args.max_run_bytes + kBlockBytes - 1) / kBlockBytes;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(pieces, 1 << 20)),
                  static_cast<unsigned>(std::min<int64_t>(args.num_runs, 65535)),
                  static_cast<unsigned>(std::min(args.num_planes, 65535)));
  return device::Launch(CopyRowsKernel, grid, kThreads, 0, stream, args);
}

}  // namespace pagetide::kernels
