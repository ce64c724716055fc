#include <algorithm>

#include "kernels/convert_rows.h"
#include "kernels/device_codec.cuh"
#include "kernels/device_launch.cuh"

namespace pagetide::kernels {
namespace {

constexpr int kThreads = 256;

// wide: `out` is a multiple of 16 (block types have one path only).
__device__ inline void StoreAs(KvType type, bool wide, const float x[device::kLaneElements],
                               void* out, int64_t chunk) {
  switch (type) {
    case KvType::kF32:
      return wide ? device::StoreEight<KvType::kF32, true>(x, out, chunk)
                  : device::StoreEight<KvType::kF32, false>(x, out, chunk);
    case KvType::kF16:
      return wide ? device::StoreEight<KvType::kF16, true>(x, out, chunk)
                  : device::StoreEight<KvType::kF16, false>(x, out, chunk);
    case KvType::kBF16:
      return wide ? device::StoreEight<KvType::kBF16, true>(x, out, chunk)
                  : device::StoreEight<KvType::kBF16, false>(x, out, chunk);
    case KvType::kF8E4M3:
      return wide ? device::StoreEight<KvType::kF8E4M3, true>(x, out, chunk)
                  : device::StoreEight<KvType::kF8E4M3, false>(x, out, chunk);
    case KvType::kF8E5M2:
      return wide ? device::StoreEight<KvType::kF8E5M2, true>(x, out, chunk)
                  : device::StoreEight<KvType::kF8E5M2, false>(x, out, chunk);
    case KvType::kQ8_0:
      return device::StoreEight<KvType::kQ8_0, true>(x, out, chunk);
    case KvType::kQ5_0:
      return device::StoreEight<KvType::kQ5_0, true>(x, out, chunk);
    case KvType::kQ5_1:
      return device::StoreEight<KvType::kQ5_1, true>(x, out, chunk);
    case KvType::kQ4_0:
      return device::StoreEight<KvType::kQ4_0, true>(x, out, chunk);
    case KvType::kQ4_1:
      return device::StoreEight<KvType::kQ4_1, true>(x, out, chunk);
    case KvType::kIQ4NL:
      return device::StoreEight<KvType::kIQ4NL, true>(x, out, chunk);
  }
}

__device__ inline void StoreOne(KvType type, float x, void* out, int64_t index) {
  switch (type) {
    case KvType::kF32:
      return device::StorePlain<KvType::kF32>(x, out, index);
    case KvType::kF16:
      return device::StorePlain<KvType::kF16>(x, out, index);
    case KvType::kBF16:
      return device::StorePlain<KvType::kBF16>(x, out, index);
    case KvType::kF8E4M3:
      return device::StorePlain<KvType::kF8E4M3>(x, out, index);
    default:
      return device::StorePlain<KvType::kF8E5M2>(x, out, index);
  }
}

// A thread converts eight elements of a row at a time. Grid: x rows of a run, y runs (strided). The
// threads of a block take chunks of one row in order, so a group's four lanes stay together.
template <KvType kIn>
__global__ void __launch_bounds__(kThreads, 2) ConvertRowsKernel(ConvertRowsArgs args) {
  const int64_t chunks = args.row_elements / device::kLaneElements;
  for (int64_t r = blockIdx.y; r < args.num_runs; r += gridDim.y) {
    const ConvertRun run = args.runs[r];
    for (int64_t row = blockIdx.x; row < run.num_rows; row += gridDim.x) {
      const char* in = device::Global(static_cast<const char*>(run.in)) + row * args.in_row_bytes;
      char* out = device::Global(static_cast<char*>(run.out)) + row * args.out_row_bytes;
      const bool wide_in = device::IsAligned(in, 16);
      const bool wide_out = device::IsAligned(out, 16);
      for (int64_t chunk = threadIdx.x; chunk < chunks; chunk += kThreads) {
        float x[device::kLaneElements];
        if (IsBlockType(kIn) || wide_in) {
          device::LoadEight<kIn, true>(in, chunk, x);
        } else {
          device::LoadEight<kIn, false>(in, chunk, x);
        }
        StoreAs(args.out_type, wide_out, x, out, chunk);
      }
      // Only rows of plain types have a rest.
      if constexpr (!IsBlockType(kIn)) {
        const int64_t index = chunks * device::kLaneElements + threadIdx.x;
        if (index < args.row_elements) {
          StoreOne(args.out_type, device::LoadPlain<kIn>(in, index), out, index);
        }
      }
    }
  }
}

// Equal types: bytes.
__global__ void __launch_bounds__(kThreads, 2) CopyEncodedRowsKernel(ConvertRowsArgs args) {
  const int64_t row_bytes = EncodedBytes(args.in_type, args.row_elements);
  for (int64_t r = blockIdx.y; r < args.num_runs; r += gridDim.y) {
    const ConvertRun run = args.runs[r];
    for (int64_t row = blockIdx.x; row < run.num_rows; row += gridDim.x) {
      device::CopyBytes(device::Global(static_cast<const char*>(run.in)) + row * args.in_row_bytes,
                        device::Global(static_cast<char*>(run.out)) + row * args.out_row_bytes,
                        row_bytes, static_cast<int>(threadIdx.x), kThreads);
    }
  }
}

using Kernel = void (*)(ConvertRowsArgs);
constexpr Kernel kKernels[kNumKvTypes] = {
    ConvertRowsKernel<KvType::kF32>,    ConvertRowsKernel<KvType::kF16>,
    ConvertRowsKernel<KvType::kBF16>,   ConvertRowsKernel<KvType::kF8E4M3>,
    ConvertRowsKernel<KvType::kF8E5M2>, ConvertRowsKernel<KvType::kQ8_0>,
    ConvertRowsKernel<KvType::kQ5_0>,   ConvertRowsKernel<KvType::kQ5_1>,
    ConvertRowsKernel<KvType::kQ4_0>,   ConvertRowsKernel<KvType::kQ4_1>,
    ConvertRowsKernel<KvType::kIQ4NL>};

}  // namespace

int ConvertRowsCuda(const ConvertRowsArgs& args, CudaStream stream) {
  if (args.num_runs == 0 || args.max_rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(std::min<int64_t>(args.max_rows, 1 << 20)),
                  static_cast<unsigned>(std::min<int64_t>(args.num_runs, 65535)));
  const Kernel kernel = args.in_type == args.out_type ? CopyEncodedRowsKernel
                                                      : kKernels[static_cast<int>(args.in_type)];
  return device::Launch(kernel, grid, kThreads, 0, stream, args);
}

}  // namespace pagetide::kernels
