// The functions of libcuda.so.1 that worker/cuda_vmm_library.h names, over memfds: two GPUs of 1
// GiB each, whose memory this process addresses and other processes get by real descriptors. As
// strict as the documentation of the driver lets one be: units, exact ranges, everything given back
// in its order and by who has it; access is that of the mapping. What is held is counted, and any
// one call can be made to fail. Thread-safe.
//
// Environment, read at each call: EMULATED_CUDA_GPUS (2), EMULATED_CUDA_DESCRIPTORS (1).
#include "tests/worker/emulated_driver/emulated_cuda_driver.h"

#include <dlfcn.h>
#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

namespace {

using Address = unsigned long long;
using Handle = unsigned long long;

constexpr int kSuccess = 0, kInvalidValue = 1, kOutOfMemory = 2, kNotInitialized = 3;
constexpr int kNoDevice = 100, kInvalidDevice = 101, kInvalidContext = 201;
constexpr int kInvalidHandle = 400, kNotSupported = 801, kUnknown = 999;
constexpr size_t kUnit = size_t{2} << 20;
constexpr size_t kDeviceBytes = size_t{1} << 30;
constexpr int kMaxGpus = 2;
constexpr char kName[] = "emulated-cuda:";

struct Location {
  int type, id;
};
struct Properties {
  int type, handle_types;
  Location location;
  void* win32_meta_data;
  unsigned char flags[8];
};
struct Access {
  Location location;
  int flags;
};
struct Uuid {
  char bytes[16];
};
struct IpcHandle {
  char bytes[64];
};
// What the 64 bytes are.
struct IpcContents {
  char magic[16];
  int pid, fd, device;
  uint64_t num_bytes;
};

// Memory of a GPU; it is there as long as a handle or a mapping is.
struct Physical {
  int fd = -1;
  int device = 0;
  size_t num_bytes = 0;
  ~Physical() { close(fd); }
};
struct Mapping {
  std::shared_ptr<Physical> physical;
  size_t num_bytes = 0;
};
struct Range {
  size_t num_bytes = 0;
  int device = 0;
  std::shared_ptr<Physical> physical;
};

std::mutex mu;
bool is_initialized = false;
int fail_at = 0;
Handle next_handle = 0x7f0000000001;
std::map<Handle, std::shared_ptr<Physical>> handles;
std::map<Address, size_t> reservations;
std::map<Address, Mapping> mappings;
std::map<Address, Range> allocations;
std::map<Address, Range> opened;
int retained[kMaxGpus];
char contexts[kMaxGpus];
thread_local std::vector<void*> stack;

int Setting(const char* name, int otherwise) {
  const char* const text = getenv(name);
  return text == nullptr ? otherwise : atoi(text);
}
int NumGpus() {
  return Setting("EMULATED_CUDA_GPUS", kMaxGpus);
}

// Of a call that can fail: is this the one?
bool Fails() {
  return fail_at > 0 && --fail_at == 0;
}

// The GPU of the thread's context; -1: none.
int CurrentGpu() {
  return stack.empty() ? -1 : static_cast<int>(static_cast<char*>(stack.back()) - contexts);
}

// Tells the runtime that kernels and copies run in, if there is one in this program.
void Tell(Address address, size_t num_bytes) {
  using Note = void (*)(void*, size_t);
  const auto note = reinterpret_cast<Note>(dlsym(RTLD_DEFAULT, "emulated_cuda_note_memory"));
  if (note != nullptr) note(reinterpret_cast<void*>(address), num_bytes);
}

std::shared_ptr<Physical> MakePhysical(int device, size_t num_bytes) {
  size_t used = 0;
  for (const auto& [handle, physical] : handles) used += physical->num_bytes;
  for (const auto& [address, range] : allocations) used += range.num_bytes;
  if (num_bytes > kDeviceBytes - used) return nullptr;
  auto physical = std::make_shared<Physical>();
  const std::string name = kName + std::to_string(device);
  physical->fd = memfd_create(name.c_str(), MFD_CLOEXEC | MFD_ALLOW_SEALING);
  physical->device = device;
  physical->num_bytes = num_bytes;
  if (ftruncate(physical->fd, static_cast<off_t>(num_bytes)) != 0) return nullptr;
  // Whatever was there before.
  const std::vector<char> noise(kUnit, '\xff');
  for (size_t at = 0; at < num_bytes; at += kUnit) {
    const size_t part = num_bytes - at < kUnit ? num_bytes - at : kUnit;
    if (pwrite(physical->fd, noise.data(), part, static_cast<off_t>(at)) < 0) return nullptr;
  }
  return physical;
}

void* At(Address address) {
  return reinterpret_cast<void*>(address);
}
Address Of(void* p) {
  return reinterpret_cast<Address>(p);
}

int CheckProperties(const Properties* properties) {
  const bool is_good = properties->type == 1 && properties->location.type == 1 &&
                       properties->location.id >= 0 && properties->location.id < NumGpus() &&
                       properties->win32_meta_data == nullptr;
  if (!is_good) return kInvalidValue;
  if (properties->handle_types == 1) {
    return Setting("EMULATED_CUDA_DESCRIPTORS", 1) != 0 ? kSuccess : kNotSupported;
  }
  return properties->handle_types == 0 ? kSuccess : kNotSupported;
}

}  // namespace

extern "C" {

void emulated_cuda_fail_at(int call) {
  const std::lock_guard<std::mutex> lock(mu);
  fail_at = call;
}
int emulated_cuda_has_failed() {
  const std::lock_guard<std::mutex> lock(mu);
  return fail_at == 0;
}
int emulated_cuda_num_held() {
  const std::lock_guard<std::mutex> lock(mu);
  size_t held = handles.size() + reservations.size() + mappings.size() + allocations.size() +
                opened.size() + stack.size();
  for (const int count : retained) held += static_cast<size_t>(count);
  return static_cast<int>(held);
}

int cuInit(unsigned flags) {
  const std::lock_guard<std::mutex> lock(mu);
  if (flags != 0) return kInvalidValue;
  if (NumGpus() == 0) return kNoDevice;
  if (Fails()) return kUnknown;
  is_initialized = true;
  return kSuccess;
}
int cuGetErrorName(int error, const char** name) {
  switch (error) {
    case kInvalidValue:
      *name = "CUDA_ERROR_INVALID_VALUE";
      return kSuccess;
    case kOutOfMemory:
      *name = "CUDA_ERROR_OUT_OF_MEMORY";
      return kSuccess;
    case kNoDevice:
      *name = "CUDA_ERROR_NO_DEVICE";
      return kSuccess;
    case kInvalidContext:
      *name = "CUDA_ERROR_INVALID_CONTEXT";
      return kSuccess;
    case kNotSupported:
      *name = "CUDA_ERROR_NOT_SUPPORTED";
      return kSuccess;
    case kUnknown:
      *name = "CUDA_ERROR_UNKNOWN";
      return kSuccess;
    default:
      *name = nullptr;
      return kInvalidValue;
  }
}
int cuDeviceGetCount(int* count) {
  const std::lock_guard<std::mutex> lock(mu);
  if (!is_initialized) return kNotInitialized;
  if (Fails()) return kUnknown;
  *count = NumGpus();
  return kSuccess;
}
int cuDeviceGet(int* device, int ordinal) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  if (ordinal < 0 || ordinal >= NumGpus()) return kInvalidDevice;
  *device = ordinal;
  return kSuccess;
}
int cuDeviceGetAttribute(int* value, int attribute, int) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  if (attribute != 102 && attribute != 103) return kInvalidValue;
  *value = attribute == 102 || Setting("EMULATED_CUDA_DESCRIPTORS", 1) != 0;
  return kSuccess;
}
int cuDeviceGetUuid_v2(Uuid* uuid, int device) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  std::memcpy(uuid->bytes, "emulated GPU no ", 16);
  uuid->bytes[15] = static_cast<char>('0' + device);
  return kSuccess;
}
int cuDevicePrimaryCtxRetain(void** context, int device) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  ++retained[device];
  *context = &contexts[device];
  return kSuccess;
}
int cuDevicePrimaryCtxRelease_v2(int device) {
  const std::lock_guard<std::mutex> lock(mu);
  if (retained[device] == 0) return kInvalidContext;
  --retained[device];
  return kSuccess;
}
int cuCtxPushCurrent_v2(void* context) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  if (context < contexts || context >= contexts + kMaxGpus) return kInvalidContext;
  stack.push_back(context);
  return kSuccess;
}
int cuCtxPopCurrent_v2(void** context) {
  if (stack.empty()) return kInvalidContext;
  *context = stack.back();
  stack.pop_back();
  return kSuccess;
}

int cuMemGetAllocationGranularity(size_t* unit, const Properties* properties, int which) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  if (which != 0 && which != 1) return kInvalidValue;
  *unit = kUnit;
  return CheckProperties(properties);
}
int cuMemCreate(Handle* handle, size_t num_bytes, const Properties* properties,
                unsigned long long flags) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  if (CurrentGpu() < 0) return kInvalidContext;
  if (num_bytes == 0 || num_bytes % kUnit != 0 || flags != 0) return kInvalidValue;
  if (const int error = CheckProperties(properties); error != kSuccess) return error;
  auto physical = MakePhysical(properties->location.id, num_bytes);
  if (physical == nullptr) return kOutOfMemory;
  handles.emplace(next_handle, std::move(physical));
  *handle = next_handle++;
  return kSuccess;
}
int cuMemRelease(Handle handle) {
  const std::lock_guard<std::mutex> lock(mu);
  return handles.erase(handle) == 1 ? kSuccess : kInvalidHandle;
}
int cuMemAddressReserve(Address* address, size_t num_bytes, size_t alignment, Address wanted,
                        unsigned long long flags) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  if (num_bytes == 0 || num_bytes % kUnit != 0 || alignment != 0 || wanted != 0 || flags != 0) {
    return kInvalidValue;
  }
  void* const p =
      mmap(nullptr, num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (p == MAP_FAILED) return kOutOfMemory;
  reservations.emplace(Of(p), num_bytes);
  *address = Of(p);
  return kSuccess;
}
// Refused while something is mapped there.
int cuMemAddressFree(Address address, size_t num_bytes) {
  const std::lock_guard<std::mutex> lock(mu);
  const auto at = reservations.find(address);
  if (at == reservations.end() || at->second != num_bytes || mappings.count(address) != 0) {
    return kInvalidValue;
  }
  reservations.erase(at);
  munmap(At(address), num_bytes);
  return kSuccess;
}
// The whole of a reservation.
int cuMemMap(Address address, size_t num_bytes, size_t offset, Handle handle,
             unsigned long long flags) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  const auto at = reservations.find(address);
  const auto memory = handles.find(handle);
  if (at == reservations.end() || at->second != num_bytes || mappings.count(address) != 0 ||
      memory == handles.end() || offset != 0 || num_bytes > memory->second->num_bytes ||
      flags != 0) {
    return kInvalidValue;
  }
  void* const p =
      mmap(At(address), num_bytes, PROT_NONE, MAP_SHARED | MAP_FIXED, memory->second->fd, 0);
  if (p == MAP_FAILED) return kOutOfMemory;
  mappings[address] = {memory->second, num_bytes};
  return kSuccess;
}
int cuMemUnmap(Address address, size_t num_bytes) {
  const std::lock_guard<std::mutex> lock(mu);
  const auto at = mappings.find(address);
  if (at == mappings.end() || at->second.num_bytes != num_bytes) return kInvalidValue;
  mmap(At(address), num_bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED,
       -1, 0);
  mappings.erase(at);
  Tell(address, 0);
  return kSuccess;
}
int cuMemSetAccess(Address address, size_t num_bytes, const Access* access, size_t count) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  const auto at = mappings.find(address);
  if (at == mappings.end() || at->second.num_bytes != num_bytes || count != 1 ||
      access->location.type != 1 || access->location.id != at->second.physical->device ||
      (access->flags != 1 && access->flags != 3)) {
    return kInvalidValue;
  }
  mprotect(At(address), num_bytes, access->flags == 1 ? PROT_READ : PROT_READ | PROT_WRITE);
  Tell(address, num_bytes);
  return kSuccess;
}
int cuMemExportToShareableHandle(void* shareable, Handle handle, int type,
                                 unsigned long long flags) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  const auto memory = handles.find(handle);
  if (memory == handles.end()) return kInvalidHandle;
  if (type != 1 || flags != 0) return kInvalidValue;
  const int fd = dup(memory->second->fd);
  std::memcpy(shareable, &fd, sizeof(fd));
  return kSuccess;
}
int cuMemImportFromShareableHandle(Handle* handle, void* shareable, int type) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  if (CurrentGpu() < 0) return kInvalidContext;
  const int fd = static_cast<int>(reinterpret_cast<intptr_t>(shareable));
  char target[64] = {};
  const std::string link = "/proc/self/fd/" + std::to_string(fd);
  if (type != 1 || readlink(link.c_str(), target, sizeof(target) - 1) < 0) return kInvalidValue;
  const std::string prefix = std::string("/memfd:") + kName;
  if (std::strncmp(target, prefix.c_str(), prefix.size()) != 0) return kInvalidValue;
  struct stat info {};
  auto physical = std::make_shared<Physical>();
  physical->fd = fcntl(fd, F_DUPFD_CLOEXEC, 0);
  if (physical->fd < 0 || fstat(fd, &info) != 0) return kInvalidValue;
  physical->device = atoi(target + prefix.size());
  physical->num_bytes = static_cast<size_t>(info.st_size);
  handles.emplace(next_handle, std::move(physical));
  *handle = next_handle++;
  return kSuccess;
}
int cuMemGetAllocationPropertiesFromHandle(Properties* properties, Handle handle) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  const auto memory = handles.find(handle);
  if (memory == handles.end()) return kInvalidHandle;
  *properties = {1, 1, {1, memory->second->device}, nullptr, {}};
  return kSuccess;
}

int cuMemAlloc_v2(Address* address, size_t num_bytes) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  const int gpu = CurrentGpu();
  if (gpu < 0) return kInvalidContext;
  auto physical = MakePhysical(gpu, num_bytes);
  if (physical == nullptr) return kOutOfMemory;
  void* const p = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, physical->fd, 0);
  if (p == MAP_FAILED) return kOutOfMemory;
  allocations[Of(p)] = {num_bytes, gpu, std::move(physical)};
  *address = Of(p);
  Tell(Of(p), num_bytes);
  return kSuccess;
}
int cuMemFree_v2(Address address) {
  const std::lock_guard<std::mutex> lock(mu);
  const auto at = allocations.find(address);
  if (at == allocations.end()) return kInvalidValue;
  if (CurrentGpu() != at->second.device) return kInvalidContext;
  munmap(At(address), at->second.num_bytes);
  allocations.erase(at);
  Tell(address, 0);
  return kSuccess;
}
int cuMemGetAddressRange_v2(Address* base, size_t* num_bytes, Address address) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  for (const auto* ranges : {&allocations, &opened}) {
    const auto at = ranges->find(address);
    if (at == ranges->end()) continue;
    *base = address;
    *num_bytes = at->second.num_bytes;
    return kSuccess;
  }
  return kInvalidValue;
}
int cuIpcGetMemHandle(IpcHandle* handle, Address address) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  const auto at = allocations.find(address);
  if (at == allocations.end()) return kInvalidValue;
  IpcContents contents{"emulated handle", getpid(), at->second.physical->fd, at->second.device,
                       at->second.num_bytes};
  std::memset(handle, 0, sizeof(*handle));
  std::memcpy(handle, &contents, sizeof(contents));
  return kSuccess;
}
int cuIpcOpenMemHandle_v2(Address* address, IpcHandle handle, unsigned flags) {
  const std::lock_guard<std::mutex> lock(mu);
  if (Fails()) return kUnknown;
  IpcContents contents{};
  std::memcpy(&contents, &handle, sizeof(contents));
  if (std::memcmp(contents.magic, "emulated handle", 16) != 0 || flags != 1) return kInvalidValue;
  if (CurrentGpu() != contents.device || contents.pid == getpid()) return kInvalidContext;
  const std::string path =
      "/proc/" + std::to_string(contents.pid) + "/fd/" + std::to_string(contents.fd);
  const int fd = open(path.c_str(), O_RDWR | O_CLOEXEC);
  if (fd < 0) return kInvalidValue;
  auto physical = std::make_shared<Physical>();
  physical->fd = fd;
  physical->num_bytes = contents.num_bytes;
  void* const p = mmap(nullptr, contents.num_bytes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  if (p == MAP_FAILED) return kOutOfMemory;
  opened[Of(p)] = {contents.num_bytes, contents.device, std::move(physical)};
  *address = Of(p);
  Tell(Of(p), contents.num_bytes);
  return kSuccess;
}
int cuIpcCloseMemHandle(Address address) {
  const std::lock_guard<std::mutex> lock(mu);
  const auto at = opened.find(address);
  if (at == opened.end()) return kInvalidValue;
  munmap(At(address), at->second.num_bytes);
  opened.erase(at);
  Tell(address, 0);
  return kSuccess;
}

}  // extern "C"
