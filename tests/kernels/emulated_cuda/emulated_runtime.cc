// The runtime's calls of cuda_runtime.h.
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <mutex>

#include "tests/kernels/emulated_cuda/cuda_runtime.h"

struct CUstream_st {
  std::mutex mu;
  std::deque<std::function<void()>> work;
  int64_t num_enqueued = 0;
  int64_t num_done = 0;

  void Enqueue(std::function<void()> one) {
    std::lock_guard<std::mutex> lock(mu);
    work.push_back(std::move(one));
    ++num_enqueued;
  }
  void RunUntil(int64_t ticket) {
    std::lock_guard<std::mutex> lock(mu);
    while (num_done < ticket && !work.empty()) {
      work.front()();
      work.pop_front();
      ++num_done;
    }
  }
};

struct CUevent_st {
  CUstream_st* stream = nullptr;
  int64_t ticket = 0;
};

namespace {

constexpr size_t kDeviceBytes = size_t{1} << 30;

// Allocations by their first byte.
struct Memory {
  std::mutex mu;
  std::map<const void*, size_t> device;
  std::map<const void*, size_t> pinned;
  size_t device_bytes = 0;
};
Memory& memory() {
  static Memory* const instance = new Memory();
  return *instance;
}

bool Contains(const std::map<const void*, size_t>& allocations, const void* p) {
  auto it = allocations.upper_bound(p);
  if (it == allocations.begin()) return false;
  --it;
  return static_cast<const char*>(p) < static_cast<const char*>(it->first) + it->second;
}

void* Allocate(size_t bytes) {
  const size_t rounded = (bytes + 255) / 256 * 256;
  void* const p = std::aligned_alloc(256, rounded == 0 ? 256 : rounded);
  std::memset(p, 0xff, rounded);  // whatever was there before
  return p;
}

}  // namespace

const char* cudaGetErrorName(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "cudaErrorMemoryAllocation" : "cudaErrorUnknown";
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaErrorMemoryAllocation ? "out of memory" : "unknown error";
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* stream, unsigned) {
  *stream = new CUstream_st();
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  cudaStreamSynchronize(stream);
  delete stream;
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream != nullptr) stream->RunUntil(INT64_MAX);
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  *event = new CUevent_st();
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  delete event;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  event->stream = stream;
  std::lock_guard<std::mutex> lock(stream->mu);
  event->ticket = stream->num_enqueued;
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  if (event->stream != nullptr) event->stream->RunUntil(event->ticket);
  return cudaSuccess;
}

cudaError_t cudaMalloc(void** p, size_t bytes) {
  std::lock_guard<std::mutex> lock(memory().mu);
  if (bytes > kDeviceBytes - memory().device_bytes) return cudaErrorMemoryAllocation;
  *p = Allocate(bytes);
  memory().device[*p] = bytes;
  memory().device_bytes += bytes;
  return cudaSuccess;
}

cudaError_t cudaFree(void* p) {
  if (p == nullptr) return cudaSuccess;
  std::lock_guard<std::mutex> lock(memory().mu);
  const auto it = memory().device.find(p);
  if (it == memory().device.end()) return cudaErrorInvalidValue;
  memory().device_bytes -= it->second;
  memory().device.erase(it);
  std::free(p);
  return cudaSuccess;
}

// Memory that was made or mapped by the emulated driver (tests/worker/emulated_driver), which finds
// this function at run time; 0 bytes: it is gone.
extern "C" void emulated_cuda_note_memory(void* p, size_t bytes) {
  std::lock_guard<std::mutex> lock(memory().mu);
  if (bytes == 0) {
    memory().device.erase(p);
  } else {
    memory().device[p] = bytes;
  }
}

cudaError_t cudaMemGetInfo(size_t* free_bytes, size_t* total_bytes) {
  std::lock_guard<std::mutex> lock(memory().mu);
  *free_bytes = kDeviceBytes - memory().device_bytes;
  *total_bytes = kDeviceBytes;
  return cudaSuccess;
}

cudaError_t cudaMallocHost(void** p, size_t bytes) {
  std::lock_guard<std::mutex> lock(memory().mu);
  *p = Allocate(bytes);
  memory().pinned[*p] = bytes;
  return cudaSuccess;
}

cudaError_t cudaFreeHost(void* p) {
  if (p == nullptr) return cudaSuccess;
  std::lock_guard<std::mutex> lock(memory().mu);
  if (memory().pinned.erase(p) == 0) return cudaErrorInvalidValue;
  std::free(p);
  return cudaSuccess;
}

cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* p) {
  std::lock_guard<std::mutex> lock(memory().mu);
  attributes->type = Contains(memory().device, p)   ? cudaMemoryTypeDevice
                     : Contains(memory().pinned, p) ? cudaMemoryTypeHost
                                                    : cudaMemoryTypeUnregistered;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t stream) {
  {
    // Each side is where the kind says; host memory is pinned, or the copy would not be
    // asynchronous.
    std::lock_guard<std::mutex> lock(memory().mu);
    const auto& targets = kind == cudaMemcpyDeviceToHost ? memory().pinned : memory().device;
    const auto& sources = kind == cudaMemcpyHostToDevice ? memory().pinned : memory().device;
    if (bytes > 0 && (!Contains(targets, to) || !Contains(sources, from))) {
      std::fprintf(stderr, "emulated CUDA: copy of %zu bytes from %p to %p, kind %d\n", bytes, from,
                   to, static_cast<int>(kind));
      std::abort();
    }
  }
  stream->Enqueue([=] { std::memcpy(to, from, bytes); });
  return cudaSuccess;
}

cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t stream) {
  stream->Enqueue([=] { std::memset(to, value, bytes); });
  return cudaSuccess;
}
