// A stand-in for CUDA's cuda_runtime.h that runs kernels on the CPU, thread by thread: the device
// source (.cu) is compiled as C++ against it, so that its logic is tested where no GPU is. Not for
// speed, and silent about what only hardware shows (memory ordering, bandwidth).
//
// Blocks run one after another. The threads of a block run one after another too, until one waits
// at a warp or block barrier or in a shuffle; then the next goes on. So a missing barrier shows as
// a wrong result, and lanes that wait for ever abort the program and say so. Threads begin in
// ascending order in every other launch and in descending order in the rest. What is copied
// asynchronously arrives when its thread waits for it and is not a number before. One host thread
// at a time.
#ifndef PAGETIDE_TESTS_KERNELS_EMULATED_CUDA_CUDA_RUNTIME_H_
#define PAGETIDE_TESTS_KERNELS_EMULATED_CUDA_CUDA_RUNTIME_H_

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __host__
#define __shared__ static
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x_ = 1, unsigned y_ = 1, unsigned z_ = 1) : x(x_), y(y_), z(z_) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) {
  return {x, y, z, w};
}
inline float4 make_float4(float x, float y, float z, float w) {
  return {x, y, z, w};
}

// Of the thread that runs now.
extern dim3 threadIdx, blockIdx, blockDim, gridDim;

// The runtime's calls that our code makes. A stream that is not null does its copies when somebody
// waits for it, as late as the real one may: memory that is used too early, or filled anew too
// early, shows as wrong bytes. Thread-safe, but for kernels.
struct CUstream_st;
struct CUevent_st;
using cudaStream_t = CUstream_st*;
using cudaEvent_t = CUevent_st*;
enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorMemoryAllocation = 2,
  cudaErrorInvalidDevice = 101,
};
enum cudaMemcpyKind {
  cudaMemcpyHostToHost,
  cudaMemcpyHostToDevice,
  cudaMemcpyDeviceToHost,
  cudaMemcpyDeviceToDevice,
};
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrComputeCapabilityMajor,
};
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum cudaMemoryType { cudaMemoryTypeUnregistered, cudaMemoryTypeHost, cudaMemoryTypeDevice };
struct cudaPointerAttributes {
  cudaMemoryType type;
};
inline constexpr unsigned cudaStreamNonBlocking = 1;
inline constexpr unsigned cudaEventBlockingSync = 1;
inline constexpr unsigned cudaEventDisableTiming = 2;

const char* cudaGetErrorName(cudaError_t error);
const char* cudaGetErrorString(cudaError_t error);
inline cudaError_t cudaGetLastError() {
  return cudaSuccess;
}
inline cudaError_t cudaGetDeviceCount(int* count) {
  *count = 1;
  return cudaSuccess;
}
inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaSetDevice(int device) {
  return device == 0 ? cudaSuccess : cudaErrorInvalidDevice;
}
// As of an H100.
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  *value = attribute == cudaDevAttrComputeCapabilityMajor ? 9 : 227 * 1024;
  return cudaSuccess;
}
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel, cudaFuncAttribute, int) {
  return cudaSuccess;
}
cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned flags);
inline cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithFlags(stream, 0);
}
cudaError_t cudaStreamDestroy(cudaStream_t stream);
cudaError_t cudaStreamSynchronize(cudaStream_t stream);
cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned flags);
cudaError_t cudaEventDestroy(cudaEvent_t event);
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream);
cudaError_t cudaEventSynchronize(cudaEvent_t event);
// The device has 1 GiB.
cudaError_t cudaMalloc(void** memory, size_t bytes);
cudaError_t cudaFree(void* memory);
cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes);
cudaError_t cudaMallocHost(void** memory, size_t bytes);
cudaError_t cudaFreeHost(void* memory);
cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p);
cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream);
cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream);
inline cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

namespace emulated_cuda {

// Runs `thread` once for every thread of every block, after what the stream has to do.
void RunGrid(cudaStream_t stream, dim3 grid, dim3 block, size_t dynamic_shared_bytes,
             const std::function<void()>& thread);
void* DynamicShared();
// Waits for all threads of the block.
void BlockBarrier();
// Waits for the lanes of `mask` in this warp; returns what lane `source` brought.
uint32_t Exchange(unsigned mask, uint32_t value, int source);
int Lane();

// What device_matrix.cuh says of the functions of the same names; all lanes of a warp together.
void CopyAsync16(void* to, const void* from, int num_bytes);
void CommitCopies();
void WaitForCopies(int num_pending);
void LoadMatrices(bool transposed, uint32_t out[4], const void* row);
void MultiplyAdd(float sum[4], const uint32_t a[4], uint32_t b0, uint32_t b1,
                 float (*widen)(uint16_t));

template <typename T>
T Shuffle(unsigned mask, T value, int source) {
  static_assert(sizeof(T) == 4);
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  bits = Exchange(mask, bits, source);
  std::memcpy(&value, &bits, 4);
  return value;
}

}  // namespace emulated_cuda

inline void __syncthreads() {
  emulated_cuda::BlockBarrier();
}
inline void __syncwarp(unsigned mask = 0xffffffffu) {
  emulated_cuda::Exchange(mask, 0, emulated_cuda::Lane());
}
template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32) {
  const int lane = emulated_cuda::Lane();
  return emulated_cuda::Shuffle(mask, value, lane / width * width + source % width);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask) {
  return emulated_cuda::Shuffle(mask, value, emulated_cuda::Lane() ^ lane_mask);
}
inline unsigned __byte_perm(unsigned a, unsigned b, unsigned selector) {
  const uint64_t both = static_cast<uint64_t>(b) << 32 | a;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) {
    result |= static_cast<unsigned>(both >> (8 * (selector >> (4 * i) & 7)) & 255) << (8 * i);
  }
  return result;
}

#endif  // PAGETIDE_TESTS_KERNELS_EMULATED_CUDA_CUDA_RUNTIME_H_
