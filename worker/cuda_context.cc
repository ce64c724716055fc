#include "worker/cuda_context.h"

#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/cuda_status.h"

namespace pagetide {
namespace {

// Calls whose kernels run at a time; others wait their turn.
constexpr int kMaxWorks = 4;

// A quarter more than asked for, so that slowly growing calls do not allocate each time.
uint64_t WithRoom(uint64_t num_bytes) {
  constexpr uint64_t kUnit = uint64_t{1} << 20;
  return (num_bytes + num_bytes / 4 + kUnit - 1) / kUnit * kUnit;
}

}  // namespace

absl::StatusOr<std::unique_ptr<CudaWork>> CudaWork::Create() {
  std::unique_ptr<CudaWork> work(new CudaWork());
  PT_RETURN_IF_ERROR(CudaStatus("create a stream",
                                cudaStreamCreateWithFlags(&work->stream_, cudaStreamNonBlocking)));
  return work;
}

CudaWork::~CudaWork() {
  if (device_ != nullptr) (void)cudaFree(device_);
  if (pinned_ != nullptr) (void)cudaFreeHost(pinned_);
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
}

absl::Status CudaWork::Reserve(uint64_t device_bytes, uint64_t pinned_bytes) {
  if (device_bytes > device_bytes_) {
    if (device_ != nullptr) (void)cudaFree(std::exchange(device_, nullptr));
    device_bytes_ = 0;
    const uint64_t wanted = WithRoom(device_bytes);
    PT_RETURN_IF_ERROR(CudaStatus(absl::StrCat("allocate ", wanted, " bytes beside the pool"),
                                  cudaMalloc(&device_, wanted)));
    device_bytes_ = wanted;
  }
  if (pinned_bytes > pinned_bytes_) {
    if (pinned_ != nullptr) (void)cudaFreeHost(std::exchange(pinned_, nullptr));
    pinned_bytes_ = 0;
    const uint64_t wanted = WithRoom(pinned_bytes);
    PT_RETURN_IF_ERROR(
        CudaStatus(absl::StrCat("pin ", wanted, " bytes"), cudaMallocHost(&pinned_, wanted)));
    pinned_bytes_ = wanted;
  }
  return absl::OkStatus();
}

absl::Status CudaWork::Copy(void* to, const void* from, uint64_t num_bytes, cudaMemcpyKind kind) {
  return CudaStatus(absl::StrCat("copy ", num_bytes, " bytes"),
                    cudaMemcpyAsync(to, from, num_bytes, kind, stream_));
}

absl::Status CudaWork::Wait() {
  return CudaStatus("wait for the GPU", cudaStreamSynchronize(stream_));
}

CudaContext::CudaContext(int ordinal) : ordinal_(ordinal), name_(absl::StrCat("cuda:", ordinal)) {}

absl::StatusOr<std::shared_ptr<CudaContext>> CudaContext::Create(int ordinal) {
  std::shared_ptr<CudaContext> context(new CudaContext(ordinal));
  PT_RETURN_IF_ERROR(context->Use());
  PT_ASSIGN_OR_RETURN(context->to_device_, CudaTransfers::Create(ordinal, {}));
  PT_ASSIGN_OR_RETURN(context->from_device_, CudaTransfers::Create(ordinal, {}));
  std::vector<std::unique_ptr<CudaWork>> works;
  for (int i = 0; i < kMaxWorks; ++i) {
    PT_ASSIGN_OR_RETURN(std::unique_ptr<CudaWork> work, CudaWork::Create());
    works.push_back(std::move(work));
  }
  MutexLock lock(&context->mu_);
  context->free_ = std::move(works);
  return context;
}

CudaContext::~CudaContext() {
  (void)cudaSetDevice(ordinal_);  // for what the members give back
}

absl::Status CudaContext::Use() const {
  return CudaStatus(absl::StrCat("use ", name_), cudaSetDevice(ordinal_));
}

CudaContext::Borrowed::Borrowed(CudaContext* context) : context_(context) {
  MutexLock lock(&context_->mu_);
  while (context_->free_.empty()) context_->returned_.Wait(&context_->mu_);
  work_ = std::move(context_->free_.back());
  context_->free_.pop_back();
}

CudaContext::Borrowed::~Borrowed() {
  // After an error kernels may still run in the work's memory.
  (void)cudaStreamSynchronize(work_->stream());
  MutexLock lock(&context_->mu_);
  context_->free_.push_back(std::move(work_));
  context_->returned_.Signal();
}

}  // namespace pagetide
