#include <cuda_runtime.h>

#include <algorithm>

#include "tests/kernels/kernel_device.h"

namespace pagetide::kernels {
namespace {

class CudaKernelDevice final : public KernelDevice {
 public:
  CudaKernelDevice() { EXPECT_EQ(cudaStreamCreate(&stream_), cudaSuccess); }
  ~CudaKernelDevice() override {
    for (void* memory : memory_) cudaFree(memory);
    cudaStreamDestroy(stream_);
  }

  void* Allocate(size_t bytes) override {
    void* memory = nullptr;
    EXPECT_EQ(cudaMalloc(&memory, bytes), cudaSuccess);
    memory_.push_back(memory);
    return memory;
  }
  void Write(void* to, const void* from, size_t bytes) override {
    EXPECT_EQ(cudaMemcpy(to, from, bytes, cudaMemcpyHostToDevice), cudaSuccess);
  }
  void Read(void* to, const void* from, size_t bytes) override {
    EXPECT_EQ(cudaMemcpy(to, from, bytes, cudaMemcpyDeviceToHost), cudaSuccess);
  }

  int Run(const CopyRowsArgs& args) override { return Finish(CopyRowsCuda(args, stream_)); }
  int Run(const PageMoveArgs& args) override { return Finish(PageMoveCuda(args, stream_)); }
  int Run(const ConvertRowsArgs& args) override { return Finish(ConvertRowsCuda(args, stream_)); }
  int Run(const RopeShiftArgs& args) override { return Finish(RopeShiftCuda(args, stream_)); }
  int Run(const AttentionBatch& batch) override {
    const int64_t bytes = AttentionWorkspaceBytes(batch);
    EXPECT_GE(bytes, 0) << WhyNotAttendCuda(batch);
    // What a kernel reads there it must have written.
    void* workspace =
        Place(std::vector<uint8_t>(static_cast<size_t>(std::max<int64_t>(bytes, 1)), 0xff));
    return Finish(AttendCuda(batch, workspace, stream_));
  }
  int Split(const BytePlanesArgs& args) override {
    return Finish(SplitBytePlanesCuda(args, stream_));
  }
  int Merge(const BytePlanesArgs& args) override {
    return Finish(MergeBytePlanesCuda(args, stream_));
  }

 private:
  int Finish(int launched) {
    return launched != cudaSuccess ? launched : static_cast<int>(cudaStreamSynchronize(stream_));
  }

  cudaStream_t stream_ = nullptr;
  std::vector<void*> memory_;
};

}  // namespace

std::unique_ptr<KernelDevice> MakeCudaKernelDevice(std::string* why_not) {
  int count = 0;
  const cudaError_t error = cudaGetDeviceCount(&count);
  if (error != cudaSuccess || count == 0) {
    *why_not = std::string("no usable CUDA device: ") + cudaGetErrorString(error);
    return nullptr;
  }
  return std::make_unique<CudaKernelDevice>();
}

}  // namespace pagetide::kernels
