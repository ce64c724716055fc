// CudaVmmLibrary: the functions of the CUDA driver by which memory of a GPU is given to other
// processes, found at run time, so that no program needs a driver to start. The prototypes, types
// and numbers are those of cuda.h of CUDA 12, which CUDA 13 keeps (tests/worker/cuda_header_test.cc
// compares them where the toolkit is).
//
// Immutable after Load; thread-safe. The library stays in the process.
#ifndef PAGETIDE_WORKER_CUDA_VMM_LIBRARY_H_
#define PAGETIDE_WORKER_CUDA_VMM_LIBRARY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

#include "absl/status/statusor.h"

namespace pagetide {

struct CudaVmmLibrary {
  // CUresult
  static constexpr int kSuccess = 0;
  static constexpr int kOutOfMemory = 2;
  // CUdevice_attribute
  static constexpr int kVmmSupported = 102;
  static constexpr int kDescriptorsSupported = 103;
  // CUmemAllocationType, CUmemLocationType, CUmemAllocationHandleType
  static constexpr int kPinned = 1;
  static constexpr int kOnDevice = 1;
  static constexpr int kFileDescriptor = 1;
  // CUmemAccess_flags
  static constexpr int kRead = 1;
  static constexpr int kReadWrite = 3;
  // CUmemAllocationGranularity_flags
  static constexpr int kMinimumGranularity = 0;
  // CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS
  static constexpr unsigned int kLazyPeerAccess = 1;

  using Address = unsigned long long;  // CUdeviceptr
  using Handle = unsigned long long;   // CUmemGenericAllocationHandle

  // CUmemLocation
  struct Location {
    int type = kOnDevice;
    int id = 0;  // CUdevice
  };
  // CUmemAllocationProp
  struct Properties {
    int type = kPinned;
    int handle_types = kFileDescriptor;
    Location location;
    void* win32_meta_data = nullptr;
    unsigned char flags[8] = {};
  };
  // CUmemAccessDesc
  struct Access {
    Location location;
    int flags = kReadWrite;
  };
  // CUipcMemHandle
  struct IpcHandle {
    char bytes[64];
  };
  // CUuuid
  struct Uuid {
    char bytes[16];
  };

  // `path`: as dlopen takes it. FAILED_PRECONDITION (NO_GPU): no driver, or one without a function.
  static absl::StatusOr<std::shared_ptr<const CudaVmmLibrary>> Load(const std::string& path);

  // "CUDA_ERROR_NOT_SUPPORTED (801)".
  std::string NameOf(int result) const;

  // CUcontext is a pointer to what the driver knows.
  int (*cuInit)(unsigned int flags) = nullptr;
  int (*cuGetErrorName)(int result, const char** name) = nullptr;
  int (*cuDeviceGetCount)(int* count) = nullptr;
  int (*cuDeviceGet)(int* device, int ordinal) = nullptr;
  int (*cuDeviceGetAttribute)(int* value, int attribute, int device) = nullptr;
  int (*cuDeviceGetUuid_v2)(Uuid* uuid, int device) = nullptr;
  int (*cuDevicePrimaryCtxRetain)(void** context, int device) = nullptr;
  int (*cuDevicePrimaryCtxRelease_v2)(int device) = nullptr;
  int (*cuCtxPushCurrent_v2)(void* context) = nullptr;
  int (*cuCtxPopCurrent_v2)(void** context) = nullptr;

  int (*cuMemGetAllocationGranularity)(size_t* granularity, const Properties* properties,
                                       int which) = nullptr;
  int (*cuMemCreate)(Handle* handle, size_t num_bytes, const Properties* properties,
                     unsigned long long flags) = nullptr;
  int (*cuMemRelease)(Handle handle) = nullptr;
  int (*cuMemAddressReserve)(Address* address, size_t num_bytes, size_t alignment, Address wanted,
                             unsigned long long flags) = nullptr;
  int (*cuMemAddressFree)(Address address, size_t num_bytes) = nullptr;
  int (*cuMemMap)(Address address, size_t num_bytes, size_t offset, Handle handle,
                  unsigned long long flags) = nullptr;
  int (*cuMemUnmap)(Address address, size_t num_bytes) = nullptr;
  int (*cuMemSetAccess)(Address address, size_t num_bytes, const Access* access,
                        size_t count) = nullptr;
  int (*cuMemExportToShareableHandle)(void* shareable, Handle handle, int type,
                                      unsigned long long flags) = nullptr;
  int (*cuMemImportFromShareableHandle)(Handle* handle, void* shareable, int type) = nullptr;
  int (*cuMemGetAllocationPropertiesFromHandle)(Properties* properties, Handle handle) = nullptr;

  int (*cuMemAlloc_v2)(Address* address, size_t num_bytes) = nullptr;
  int (*cuMemFree_v2)(Address address) = nullptr;
  int (*cuMemGetAddressRange_v2)(Address* base, size_t* num_bytes, Address address) = nullptr;
  int (*cuIpcGetMemHandle)(IpcHandle* handle, Address address) = nullptr;
  int (*cuIpcOpenMemHandle_v2)(Address* address, IpcHandle handle, unsigned int flags) = nullptr;
  int (*cuIpcCloseMemHandle)(Address address) = nullptr;
};
static_assert(sizeof(CudaVmmLibrary::Properties) == 32 && sizeof(CudaVmmLibrary::Access) == 12);

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_CUDA_VMM_LIBRARY_H_
