#include "absl/strings/str_cat.h"
#include "worker/cuda_device.h"

namespace pagetide {

absl::StatusOr<std::unique_ptr<Device>> MakeCudaDevice(int ordinal, const CudaDeviceOptions&) {
  return absl::FailedPreconditionError(
      absl::StrCat("use cuda:", ordinal, ": this program was built without CUDA"));
}

}  // namespace pagetide
