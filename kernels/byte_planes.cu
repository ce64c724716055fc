#include <algorithm>

#include "kernels/byte_planes.h"
#include "kernels/device_codec.cuh"
#include "kernels/device_launch.cuh"

namespace pagetide::kernels {
namespace {

constexpr int kThreads = 256;

// Bytes b of four words: {a.b, b.b, c.b, d.b}.
__device__ inline uint32_t Pick(uint32_t w0, uint32_t w1, uint32_t w2, uint32_t w3, int b) {
  const uint32_t select = static_cast<uint32_t>(b) | static_cast<uint32_t>(b + 4) << 4;
  return __byte_perm(__byte_perm(w0, w1, select), __byte_perm(w2, w3, select), 0x5410);
}

// Sixteen elements a thread. Split reads kWidth 16-byte words and writes one to each plane; merge
// is the inverse. Addresses are multiples of 16 and count a multiple of 16.
template <int kWidth, bool kMerge>
__global__ void __launch_bounds__(kThreads, 2)
    WidePlanesKernel(const uint8_t* in, uint8_t* out, int64_t count) {
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * 16;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * 16; i < count;
       i += stride) {
    uint32_t element[4 * kWidth];  // sixteen elements, packed
    uint32_t plane[4 * kWidth];    // [kWidth, 16] bytes
    if (kMerge) {
#pragma unroll
      for (int b = 0; b < kWidth; ++b) {
        const uint4 v = *reinterpret_cast<const uint4*>(in + b * count + i);
        plane[4 * b] = v.x, plane[4 * b + 1] = v.y, plane[4 * b + 2] = v.z, plane[4 * b + 3] = v.w;
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (kWidth == 2) {
          element[2 * q] = __byte_perm(plane[q], plane[4 + q], 0x5140);
          element[2 * q + 1] = __byte_perm(plane[q], plane[4 + q], 0x7362);
        } else {
#pragma unroll
          for (int k = 0; k < 4; ++k) {
            element[4 * q + k] =
                Pick(plane[q], plane[4 + q], plane[8 + q], plane[kWidth == 4 ? 12 + q : q], k);
          }
        }
      }
    } else {
#pragma unroll
      for (int w = 0; w < kWidth; ++w) {
        const uint4 v = *reinterpret_cast<const uint4*>(in + i * kWidth + 16 * w);
        element[4 * w] = v.x, element[4 * w + 1] = v.y, element[4 * w + 2] = v.z,
                    element[4 * w + 3] = v.w;
      }
#pragma unroll
      for (int q = 0; q < 4; ++q) {
        if (kWidth == 2) {
          plane[q] = __byte_perm(element[2 * q], element[2 * q + 1], 0x6420);
          plane[4 + q] = __byte_perm(element[2 * q], element[2 * q + 1], 0x7531);
        } else {
#pragma unroll
          for (int b = 0; b < kWidth; ++b) {
            plane[4 * b + q] =
                Pick(element[4 * q], element[4 * q + 1], element[4 * q + 2], element[4 * q + 3], b);
          }
        }
      }
    }
    const uint32_t* result = kMerge ? element : plane;
#pragma unroll
    for (int w = 0; w < kWidth; ++w) {
      const uint4 v =
          make_uint4(result[4 * w], result[4 * w + 1], result[4 * w + 2], result[4 * w + 3]);
      *reinterpret_cast<uint4*>(kMerge ? out + i * kWidth + 16 * w : out + w * count + i) = v;
    }
  }
}

// Any width and alignment: a thread a byte, neighbours in the plane.
template <bool kMerge>
__global__ void __launch_bounds__(kThreads, 2) AnyPlanesKernel(BytePlanesArgs args) {
  const uint8_t* in = static_cast<const uint8_t*>(args.in);
  uint8_t* out = static_cast<uint8_t*>(args.out);
  const int64_t total = args.count * args.element_bytes;
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x; i < total;
       i += stride) {
    const int64_t packed = i % args.count * args.element_bytes + i / args.count;
    if (kMerge) {
      out[packed] = in[i];
    } else {
      out[i] = in[packed];
    }
  }
}

template <bool kMerge>
int Launch(const BytePlanesArgs& args, CudaStream stream) {
  if (args.count == 0) return cudaSuccess;
  const bool aligned =
      ((reinterpret_cast<uintptr_t>(args.in) | reinterpret_cast<uintptr_t>(args.out) |
        static_cast<uintptr_t>(args.count)) &
       15) == 0;
  const bool wide = aligned && (args.element_bytes == 2 || args.element_bytes == 4);
  const int64_t units = wide ? args.count / 16 : args.count * args.element_bytes;
  const unsigned grid =
      static_cast<unsigned>(std::min<int64_t>((units + kThreads - 1) / kThreads, 1 << 20));
  const uint8_t* in = static_cast<const uint8_t*>(args.in);
  uint8_t* out = static_cast<uint8_t*>(args.out);
  if (!wide) {
    return device::Launch(AnyPlanesKernel<kMerge>, grid, kThreads, 0, stream, args);
  }
  const auto kernel =
      args.element_bytes == 2 ? WidePlanesKernel<2, kMerge> : WidePlanesKernel<4, kMerge>;
  return device::Launch(kernel, grid, kThreads, 0, stream, in, out, args.count);
}

}  // namespace

int SplitBytePlanesCuda(const BytePlanesArgs& args, CudaStream stream) {
  return Launch<false>(args, stream);
}

int MergeBytePlanesCuda(const BytePlanesArgs& args, CudaStream stream) {
  return Launch<true>(args, stream);
}

}  // namespace pagetide::kernels
