// worker/cuda_vmm_library.h against the toolkit's cuda.h: sizes, offsets, numbers and prototypes.
#include <cuda.h>

#include <cstddef>
#include <type_traits>

#include "gtest/gtest.h"
#include "worker/cuda_vmm_library.h"

namespace pagetide {
namespace {

using L = CudaVmmLibrary;

static_assert(L::kSuccess == CUDA_SUCCESS && L::kOutOfMemory == CUDA_ERROR_OUT_OF_MEMORY);
static_assert(L::kVmmSupported == CU_DEVICE_ATTRIBUTE_VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED);
static_assert(L::kDescriptorsSupported ==
              CU_DEVICE_ATTRIBUTE_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED);
static_assert(L::kPinned == CU_MEM_ALLOCATION_TYPE_PINNED);
static_assert(L::kOnDevice == CU_MEM_LOCATION_TYPE_DEVICE);
static_assert(L::kFileDescriptor == CU_MEM_HANDLE_TYPE_POSIX_FILE_DESCRIPTOR);
static_assert(L::kRead == CU_MEM_ACCESS_FLAGS_PROT_READ);
static_assert(L::kReadWrite == CU_MEM_ACCESS_FLAGS_PROT_READWRITE);
static_assert(L::kMinimumGranularity == CU_MEM_ALLOC_GRANULARITY_MINIMUM);
static_assert(L::kLazyPeerAccess == CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS);
static_assert(std::is_same_v<L::Address, CUdeviceptr>);
static_assert(std::is_same_v<L::Handle, CUmemGenericAllocationHandle>);
static_assert(sizeof(CUdevice) == sizeof(int) && sizeof(CUresult) == sizeof(int));
static_assert(sizeof(L::Location) == sizeof(CUmemLocation));
static_assert(sizeof(L::Properties) == sizeof(CUmemAllocationProp));
static_assert(offsetof(L::Properties, type) == offsetof(CUmemAllocationProp, type));
static_assert(offsetof(L::Properties, handle_types) ==
              offsetof(CUmemAllocationProp, requestedHandleTypes));
static_assert(offsetof(L::Properties, location) == offsetof(CUmemAllocationProp, location));
static_assert(offsetof(L::Properties, flags) == offsetof(CUmemAllocationProp, allocFlags));
static_assert(sizeof(L::Access) == sizeof(CUmemAccessDesc));
static_assert(offsetof(L::Access, flags) == offsetof(CUmemAccessDesc, flags));
static_assert(sizeof(L::IpcHandle) == sizeof(CUipcMemHandle) && sizeof(L::Uuid) == sizeof(CUuuid));

// As many parameters of the same sizes, in their order: a call by one prototype is one by the
// other.
template <typename A, typename B>
struct IsSameCall : std::false_type {};
template <typename... A, typename... B>
struct IsSameCall<int (*)(A...), CUresult (*)(B...)> {
  template <bool same_count>
  static constexpr bool Compare() {
    if constexpr (same_count) {
      return ((sizeof(A) == sizeof(B) && std::is_pointer_v<A> == std::is_pointer_v<B>)&&...);
    }
    return false;
  }
  static constexpr bool value = Compare<sizeof...(A) == sizeof...(B)>();
};
#define PT_SAME(name) static_assert(IsSameCall<decltype(L::name), decltype(&::name)>::value)
PT_SAME(cuInit);
PT_SAME(cuGetErrorName);
PT_SAME(cuDeviceGetCount);
PT_SAME(cuDeviceGet);
PT_SAME(cuDeviceGetAttribute);
PT_SAME(cuDeviceGetUuid_v2);
PT_SAME(cuDevicePrimaryCtxRelease_v2);
PT_SAME(cuCtxPushCurrent_v2);
PT_SAME(cuCtxPopCurrent_v2);
PT_SAME(cuMemGetAllocationGranularity);
PT_SAME(cuMemCreate);
PT_SAME(cuMemRelease);
PT_SAME(cuMemAddressReserve);
PT_SAME(cuMemAddressFree);
PT_SAME(cuMemMap);
PT_SAME(cuMemUnmap);
PT_SAME(cuMemSetAccess);
PT_SAME(cuMemExportToShareableHandle);
PT_SAME(cuMemImportFromShareableHandle);
PT_SAME(cuMemGetAllocationPropertiesFromHandle);
PT_SAME(cuMemAlloc_v2);
PT_SAME(cuMemFree_v2);
PT_SAME(cuMemGetAddressRange_v2);
PT_SAME(cuIpcGetMemHandle);
PT_SAME(cuIpcOpenMemHandle_v2);
PT_SAME(cuIpcCloseMemHandle);

TEST(CudaHeaderTest, TheDriversCallsAreThoseOfTheToolkit) {
  // Held by the compiler, above; this one is a context, which both know as a pointer.
  EXPECT_TRUE((IsSameCall<decltype(L::cuDevicePrimaryCtxRetain),
                          decltype(&::cuDevicePrimaryCtxRetain)>::value));
}

}  // namespace
}  // namespace pagetide
