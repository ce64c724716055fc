#include "worker/cuda_vmm_library.h"

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/run_time_library.h"

namespace pagetide {

absl::StatusOr<std::shared_ptr<const CudaVmmLibrary>> CudaVmmLibrary::Load(
    const std::string& path) {
  PT_ASSIGN_OR_RETURN(const RunTimeLibrary cuda, RunTimeLibrary::Open(path, "NO_GPU"));
  auto found = std::make_shared<CudaVmmLibrary>();
#define PT_FIND(name) PT_RETURN_IF_ERROR(cuda.Find(#name, &found->name))
  PT_FIND(cuInit);
  PT_FIND(cuGetErrorName);
  PT_FIND(cuDeviceGetCount);
  PT_FIND(cuDeviceGet);
  PT_FIND(cuDeviceGetAttribute);
  PT_FIND(cuDeviceGetUuid_v2);
  PT_FIND(cuDevicePrimaryCtxRetain);
  PT_FIND(cuDevicePrimaryCtxRelease_v2);
  PT_FIND(cuCtxPushCurrent_v2);
  PT_FIND(cuCtxPopCurrent_v2);
  PT_FIND(cuMemGetAllocationGranularity);
  PT_FIND(cuMemCreate);
  PT_FIND(cuMemRelease);
  PT_FIND(cuMemAddressReserve);
  PT_FIND(cuMemAddressFree);
  PT_FIND(cuMemMap);
  PT_FIND(cuMemUnmap);
  PT_FIND(cuMemSetAccess);
  PT_FIND(cuMemExportToShareableHandle);
  PT_FIND(cuMemImportFromShareableHandle);
  PT_FIND(cuMemGetAllocationPropertiesFromHandle);
  PT_FIND(cuMemAlloc_v2);
  PT_FIND(cuMemFree_v2);
  PT_FIND(cuMemGetAddressRange_v2);
  PT_FIND(cuIpcGetMemHandle);
  PT_FIND(cuIpcOpenMemHandle_v2);
  PT_FIND(cuIpcCloseMemHandle);
#undef PT_FIND
  return std::shared_ptr<const CudaVmmLibrary>(std::move(found));
}

std::string CudaVmmLibrary::NameOf(int result) const {
  const char* name = nullptr;
  if (cuGetErrorName(result, &name) != kSuccess || name == nullptr) name = "unknown error";
  return absl::StrCat(name, " (", result, ")");
}

}  // namespace pagetide
