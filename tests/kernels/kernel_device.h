// KernelDevice: where a contract test runs a kernel. The same test body runs the host twin over
// heap memory and the CUDA launcher over device memory; where there is no CUDA it is skipped and
// says why.
#ifndef PAGETIDE_TESTS_KERNELS_KERNEL_DEVICE_H_
#define PAGETIDE_TESTS_KERNELS_KERNEL_DEVICE_H_

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "kernels/byte_planes.h"
#include "kernels/convert_rows.h"
#include "kernels/copy_rows.h"
#include "kernels/page_move.h"
#include "kernels/paged_attention.h"
#include "kernels/rope_shift.h"

namespace pagetide::kernels {

class KernelDevice {
 public:
  virtual ~KernelDevice() = default;

  // 256-byte aligned memory of the device that lives as long as the device object.
  virtual void* Allocate(size_t bytes) = 0;
  virtual void Write(void* to, const void* from, size_t bytes) = 0;
  virtual void Read(void* to, const void* from, size_t bytes) = 0;

  // Each returns when the kernel is done; 0 is success.
  virtual int Run(const CopyRowsArgs& args) = 0;
  virtual int Run(const PageMoveArgs& args) = 0;
  virtual int Run(const ConvertRowsArgs& args) = 0;
  virtual int Run(const RopeShiftArgs& args) = 0;
  virtual int Run(const AttentionBatch& batch) = 0;
  virtual int Split(const BytePlanesArgs& args) = 0;
  virtual int Merge(const BytePlanesArgs& args) = 0;

  // A copy of `values` in device memory, and back.
  template <typename T>
  T* Place(const std::vector<T>& values, size_t misalign_bytes = 0) {
    char* at = static_cast<char*>(Allocate(values.size() * sizeof(T) + misalign_bytes + 1));
    at += misalign_bytes;
    if (!values.empty()) Write(at, values.data(), values.size() * sizeof(T));
    return reinterpret_cast<T*>(at);
  }
  template <typename T>
  std::vector<T> Fetch(const T* from, size_t count) {
    std::vector<T> values(count);
    if (count > 0) Read(values.data(), from, count * sizeof(T));
    return values;
  }
};

class HostKernelDevice final : public KernelDevice {
 public:
  void* Allocate(size_t bytes) override {
    memory_.push_back(std::make_unique<char[]>(bytes + 256));
    const auto address = reinterpret_cast<uintptr_t>(memory_.back().get());
    return reinterpret_cast<void*>((address + 255) / 256 * 256);
  }
  void Write(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }
  void Read(void* to, const void* from, size_t bytes) override { std::memcpy(to, from, bytes); }

  int Run(const CopyRowsArgs& args) override {
    EXPECT_STREQ(CheckCopyRowsArgs(args), nullptr);
    CopyRowsHost(args);
    return 0;
  }
  int Run(const PageMoveArgs& args) override {
    EXPECT_STREQ(CheckPageMoveArgs(args), nullptr);
    PageMoveHost(args);
    return 0;
  }
  int Run(const ConvertRowsArgs& args) override {
    EXPECT_STREQ(CheckConvertRowsArgs(args), nullptr);
    ConvertRowsHost(args);
    return 0;
  }
  int Run(const RopeShiftArgs& args) override {
    EXPECT_STREQ(CheckRopeShiftArgs(args), nullptr);
    RopeShiftHost(args);
    return 0;
  }
  int Run(const AttentionBatch& batch) override {
    EXPECT_STREQ(CheckAttentionBatch(batch), nullptr);
    AttendHost(batch);
    return 0;
  }
  int Split(const BytePlanesArgs& args) override {
    EXPECT_STREQ(CheckBytePlanesArgs(args), nullptr);
    SplitBytePlanesHost(args);
    return 0;
  }
  int Merge(const BytePlanesArgs& args) override {
    EXPECT_STREQ(CheckBytePlanesArgs(args), nullptr);
    MergeBytePlanesHost(args);
    return 0;
  }

 private:
  std::vector<std::unique_ptr<char[]>> memory_;
};

// Null, and why, where kernels cannot run on a GPU: built without CUDA, or no usable device. In
// kernels_emulated_test the device source runs on the CPU instead (emulated_cuda/).
std::unique_ptr<KernelDevice> MakeCudaKernelDevice(std::string* why_not);

// The device of a suite's parameter: "host", else the CUDA one.
inline std::unique_ptr<KernelDevice> MakeKernelDevice(const std::string& name,
                                                      std::string* why_not) {
  if (name == "host") return std::make_unique<HostKernelDevice>();
  return MakeCudaKernelDevice(why_not);
}

}  // namespace pagetide::kernels

#endif  // PAGETIDE_TESTS_KERNELS_KERNEL_DEVICE_H_
