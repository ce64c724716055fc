// Frames of a GPU that are exported, imported again in this process: with a GPU where one is, and
// in kernels_emulated_test over a runtime and a driver that run on the CPU.
#include <cuda_runtime.h>

#include <cstdlib>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "base/error_info.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/worker/named_device.h"
#include "worker/cuda_shared_memory.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

class CudaExportTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto device = MakeNamedDevice("cuda_exported");
    if (!device.ok()) GTEST_SKIP() << device.status().message();
    device_ = *std::move(device);
    auto library = CudaVmmLibrary::Load(CUDA_DRIVER);
    ASSERT_TRUE(library.ok()) << library.status();
    library_ = *std::move(library);
  }
  static std::vector<std::byte> BytesAt(const std::byte* device, size_t num_bytes) {
    std::vector<std::byte> bytes(num_bytes);
    EXPECT_EQ(cudaMemcpy(bytes.data(), device, num_bytes, cudaMemcpyDeviceToHost), cudaSuccess);
    return bytes;
  }
  std::unique_ptr<Device> device_;
  std::shared_ptr<const CudaVmmLibrary> library_;
};

TEST_F(CudaExportTest, WhoImportsAPoolSeesItsBytesAsTheyChange) {
  auto pool = device_->CreatePool(5000);
  ASSERT_TRUE(pool.ok()) << pool.status();
  const PoolExport exported = (*pool)->exported();
  ASSERT_EQ(exported.kind, PoolExport::Kind::kCudaVmm) << exported.why_not;
  auto imported = ImportedMemory::FromFd(library_, 0, exported.fd, exported.mapped_bytes,
                                         ImportedMemory::Access::kRead);
  ASSERT_TRUE(imported.ok()) << imported.status();
  EXPECT_EQ((*imported)->device_uuid(), exported.device_uuid);
  // All of it begins as zeros, what lies behind the pool too: it could have been another tenant's.
  EXPECT_EQ(BytesAt((*imported)->data(), exported.mapped_bytes),
            std::vector<std::byte>(exported.mapped_bytes));
  const std::vector<std::byte> written(1000, std::byte{7});
  ASSERT_TRUE((*pool)->Write(4000, written).ok());
  EXPECT_EQ(BytesAt((*imported)->data() + 4000, 1000), written);
  // The memory is its importer's too.
  pool->reset();
  EXPECT_EQ(BytesAt((*imported)->data() + 4000, 1000), written);
}

TEST_F(CudaExportTest, APoolThatTheGpuLacksIsRefusedWithWhatIsFree) {
  const absl::Status status = device_->CreatePool(uint64_t{1} << 55).status();
  EXPECT_EQ(status.code(), absl::StatusCode::kResourceExhausted) << status;
  EXPECT_THAT(std::string(status.message()), HasSubstr("bytes are free"));
}

TEST_F(CudaExportTest, ADriverThatCannotLeavesAPlainPoolThatSaysSo) {
  auto device =
      MakeCudaDevice(0, {.export_frames = true, .driver = "libcuda-that-is-not-there.so.1"});
  ASSERT_TRUE(device.ok()) << device.status();
  const auto pool = (*device)->CreatePool(5000);
  ASSERT_TRUE(pool.ok()) << pool.status();
  EXPECT_EQ((*pool)->exported().kind, PoolExport::Kind::kNone);
  EXPECT_THAT((*pool)->exported().why_not, HasSubstr("libcuda-that-is-not-there.so.1"));
  EXPECT_TRUE((*pool)->Write(0, std::vector<std::byte>(5000)).ok());
}

#ifdef PAGETIDE_EMULATED_CUDA
TEST_F(CudaExportTest, AGpuWithoutDescriptorsExportsAHandle) {
  setenv("EMULATED_CUDA_DESCRIPTORS", "0", 1);
  const auto pool = device_->CreatePool(5000);
  unsetenv("EMULATED_CUDA_DESCRIPTORS");
  ASSERT_TRUE(pool.ok()) << pool.status();
  const PoolExport exported = (*pool)->exported();
  EXPECT_EQ(exported.kind, PoolExport::Kind::kCudaIpc);
  EXPECT_EQ(exported.fd, -1);
  EXPECT_EQ(exported.ipc_handle.size(), 64u);
  std::vector<std::byte> bytes(5000, std::byte{3});
  ASSERT_TRUE((*pool)->Write(0, bytes).ok());
  std::vector<std::byte> read(5000);
  ASSERT_TRUE((*pool)->Read(0, read).ok());
  EXPECT_EQ(read, bytes);
}

TEST_F(CudaExportTest, ADriverThatRefusesLeavesAPlainPoolThatSaysSo) {
  setenv("EMULATED_CUDA_GPUS", "0", 1);
  const auto pool = device_->CreatePool(5000);
  unsetenv("EMULATED_CUDA_GPUS");
  ASSERT_TRUE(pool.ok()) << pool.status();
  EXPECT_EQ((*pool)->exported().kind, PoolExport::Kind::kNone);
  EXPECT_THAT((*pool)->exported().why_not, HasSubstr("CUDA_ERROR_NO_DEVICE"));
}
#endif

}  // namespace
}  // namespace pagetide
