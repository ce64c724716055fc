#include "worker/choose_device.h"

#include <cstdint>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"

namespace pagetide {

absl::StatusOr<ChosenDevice> ChooseDevice(absl::string_view wanted,
                                          const CpuDevice::Options& cpu_options,
                                          const CudaDeviceOptions& cuda_options) {
  if (wanted.empty() || wanted == "cpu") {
    return ChosenDevice{std::make_unique<CpuDevice>(cpu_options), ""};
  }
  if (wanted == "auto") {
    absl::StatusOr<std::unique_ptr<Device>> gpu = MakeCudaDevice(0, cuda_options);
    if (gpu.ok()) return ChosenDevice{*std::move(gpu), ""};
    return ChosenDevice{std::make_unique<CpuDevice>(cpu_options),
                        std::string(gpu.status().message())};
  }
  absl::string_view rest = wanted;
  uint32_t ordinal = 0;
  // Four digits hold any machine's GPUs.
  if (wanted != "cuda" && (!absl::ConsumePrefix(&rest, "cuda:") || rest.size() > 4 ||
                           rest.find_first_not_of("0123456789") != absl::string_view::npos ||
                           !absl::SimpleAtoi(rest, &ordinal))) {
    return absl::InvalidArgumentError(
        absl::StrCat("device is \"", wanted, "\", must be cpu, cuda, cuda:N or auto"));
  }
  absl::StatusOr<std::unique_ptr<Device>> gpu =
      MakeCudaDevice(static_cast<int>(ordinal), cuda_options);
  if (!gpu.ok()) {
    return absl::Status(gpu.status().code(),
                        absl::StrCat("device ", wanted, ": ", gpu.status().message(),
                                     "; device cpu needs no GPU, auto takes one if it can"));
  }
  return ChosenDevice{*std::move(gpu), ""};
}

}  // namespace pagetide
