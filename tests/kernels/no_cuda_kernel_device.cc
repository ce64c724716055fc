#include "tests/kernels/kernel_device.h"

namespace pagetide::kernels {

std::unique_ptr<KernelDevice> MakeCudaKernelDevice(std::string* why_not) {
  *why_not = "built without CUDA (PAGETIDE_WITH_CUDA is off)";
  return nullptr;
}

}  // namespace pagetide::kernels
