// From the words of a flag to a device. Stateless.
#ifndef PAGETIDE_WORKER_CHOOSE_DEVICE_H_
#define PAGETIDE_WORKER_CHOOSE_DEVICE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "worker/cpu_device.h"
#include "worker/cuda_device.h"
#include "worker/device.h"

namespace pagetide {

struct ChosenDevice {
  std::unique_ptr<Device> device;
  // Why it is not the GPU that `auto` looked for; empty otherwise.
  std::string why_not_gpu;
};

// `wanted`: "cpu" (or empty), "cuda" (the first GPU), "cuda:N", or "auto": the first GPU that can
// be used, else the CPU device. INVALID_ARGUMENT for other words; FAILED_PRECONDITION, saying why
// and offering the CPU device, when a GPU is asked for that cannot be used.
absl::StatusOr<ChosenDevice> ChooseDevice(absl::string_view wanted,
                                          const CpuDevice::Options& cpu_options,
                                          const CudaDeviceOptions& cuda_options = {});

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_CHOOSE_DEVICE_H_
