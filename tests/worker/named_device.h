// The devices that contract suites are instantiated over.
#ifndef PAGETIDE_TESTS_WORKER_NAMED_DEVICE_H_
#define PAGETIDE_TESTS_WORKER_NAMED_DEVICE_H_

#include <memory>
#include <string>

#include "absl/status/statusor.h"
#include "gtest/gtest.h"
#include "worker/cpu_device.h"
#include "worker/cuda_device.h"
#include "worker/device.h"

namespace pagetide {

#ifndef CUDA_DRIVER
#define CUDA_DRIVER "libcuda.so.1"
#endif

// "cpu", else the first GPU, of a name with "exported" with pools that peers can map.
// FAILED_PRECONDITION says why there is none.
inline absl::StatusOr<std::unique_ptr<Device>> MakeNamedDevice(const std::string& name) {
  if (name == "cpu") return std::make_unique<CpuDevice>();
  const bool is_exported = name.find("exported") != std::string::npos;
  return MakeCudaDevice(0, {.export_frames = is_exported, .driver = CUDA_DRIVER});
}

// A suite whose parameter is the name; skipped with the reason where the device is not.
class NamedDeviceTest : public testing::TestWithParam<std::string> {
 protected:
  void SetUp() override {
    absl::StatusOr<std::unique_ptr<Device>> device = MakeNamedDevice(GetParam());
    if (!device.ok()) GTEST_SKIP() << device.status();
    device_ = *std::move(device);
  }

  std::unique_ptr<Device> device_;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_WORKER_NAMED_DEVICE_H_
