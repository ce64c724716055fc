#include "worker/cuda_transfers.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/copy_bytes.h"
#include "base/status_macros.h"
#include "worker/cuda_status.h"

namespace pagetide {
namespace {

// Below this, asking about the memory costs more than a copy of it.
constexpr size_t kMinAskedBytes = 256 << 10;

bool IsPinned(const void* p, size_t num_bytes) {
  if (num_bytes < kMinAskedBytes) return false;
  cudaPointerAttributes attributes;
  // Registrations are whole: the first and the last byte stand for all.
  for (const void* at :
       {p, static_cast<const void*>(static_cast<const char*>(p) + num_bytes - 1)}) {
    if (cudaPointerGetAttributes(&attributes, at) != cudaSuccess) {
      (void)cudaGetLastError();
      return false;
    }
    if (attributes.type != cudaMemoryTypeHost) return false;
  }
  return true;
}

}  // namespace

// A lane for the length of a call; nothing of it is in flight when it is given back.
class CudaTransfers::Borrowed {
 public:
  explicit Borrowed(CudaTransfers* transfers) : transfers_(transfers) {
    MutexLock lock(&transfers_->mu_);
    while (transfers_->free_.empty()) transfers_->returned_.Wait(&transfers_->mu_);
    lane_ = transfers_->free_.back();
    transfers_->free_.pop_back();
  }
  ~Borrowed() {
    // After an error: nobody wants the bytes, but the buffers are the device's until then.
    for (Buffer& buffer : lane_->buffers) {
      if (buffer.is_in_flight) (void)cudaEventSynchronize(buffer.done);
      buffer.is_in_flight = false;
      buffer.target = {};
    }
    MutexLock lock(&transfers_->mu_);
    transfers_->free_.push_back(lane_);
    transfers_->returned_.Signal();
  }
  Borrowed(const Borrowed&) = delete;
  Borrowed& operator=(const Borrowed&) = delete;

  std::vector<Buffer>& buffers() { return lane_->buffers; }

 private:
  CudaTransfers* const transfers_;
  Lane* lane_;
};

absl::StatusOr<std::unique_ptr<CudaTransfers>> CudaTransfers::Create(int ordinal,
                                                                     const Options& options) {
  if (options.buffer_bytes == 0 || options.buffers_per_call < 1 || options.max_calls < 1) {
    return absl::InvalidArgumentError(
        absl::StrCat("transfers by ", options.max_calls, " calls of ", options.buffers_per_call,
                     " buffers of ", options.buffer_bytes, " bytes: all must be positive"));
  }
  std::unique_ptr<CudaTransfers> transfers(new CudaTransfers(ordinal, options));
  PT_RETURN_IF_ERROR(transfers->Init());
  return transfers;
}

absl::Status CudaTransfers::Init() {
  PT_RETURN_IF_ERROR(CudaStatus("use the GPU", cudaSetDevice(ordinal_)));
  PT_RETURN_IF_ERROR(
      CudaStatus("create a stream", cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking)));
  lanes_.resize(static_cast<size_t>(options_.max_calls));
  for (Lane& lane : lanes_) {
    lane.buffers.resize(static_cast<size_t>(options_.buffers_per_call));
    for (Buffer& buffer : lane.buffers) {
      void* bytes = nullptr;
      PT_RETURN_IF_ERROR(
          CudaStatus(absl::StrCat("pin a buffer of ", options_.buffer_bytes, " bytes"),
                     cudaMallocHost(&bytes, options_.buffer_bytes)));
      buffer.bytes = static_cast<std::byte*>(bytes);
      // Threads that wait sleep: many wait for few transfers.
      PT_RETURN_IF_ERROR(CudaStatus(
          "create an event",
          cudaEventCreateWithFlags(&buffer.done, cudaEventDisableTiming | cudaEventBlockingSync)));
    }
  }
  MutexLock lock(&mu_);
  for (Lane& lane : lanes_) free_.push_back(&lane);
  return absl::OkStatus();
}

CudaTransfers::~CudaTransfers() {
  (void)cudaSetDevice(ordinal_);
  for (Lane& lane : lanes_) {
    for (Buffer& buffer : lane.buffers) {
      if (buffer.done != nullptr) (void)cudaEventDestroy(buffer.done);
      if (buffer.bytes != nullptr) (void)cudaFreeHost(buffer.bytes);
    }
  }
  if (stream_ != nullptr) (void)cudaStreamDestroy(stream_);
}

absl::Status CudaTransfers::Start(Buffer& buffer, void* to, const void* from, size_t num_bytes,
                                  cudaMemcpyKind kind) {
  PT_RETURN_IF_ERROR(CudaStatus(absl::StrCat("start a transfer of ", num_bytes, " bytes"),
                                cudaMemcpyAsync(to, from, num_bytes, kind, stream_)));
  buffer.is_in_flight = true;
  return CudaStatus("record a transfer", cudaEventRecord(buffer.done, stream_));
}

absl::Status CudaTransfers::Finish(Buffer& buffer) {
  if (!buffer.is_in_flight) return absl::OkStatus();
  PT_RETURN_IF_ERROR(CudaStatus("wait for a transfer", cudaEventSynchronize(buffer.done)));
  buffer.is_in_flight = false;
  if (!buffer.target.empty()) {
    CopyBytes({buffer.bytes, buffer.target.size()}, buffer.target.data());
    buffer.target = {};
  }
  return absl::OkStatus();
}

absl::Status CudaTransfers::ToDevice(void* device, std::span<const std::byte> from) {
  if (from.empty()) return absl::OkStatus();
  PT_RETURN_IF_ERROR(CudaStatus("use the GPU", cudaSetDevice(ordinal_)));
  Borrowed lane(this);
  std::vector<Buffer>& buffers = lane.buffers();
  if (IsPinned(from.data(), from.size())) {
    PT_RETURN_IF_ERROR(Start(buffers[0], device, from.data(), from.size(), cudaMemcpyHostToDevice));
    return Finish(buffers[0]);
  }
  size_t next = 0;
  for (size_t at = 0; at < from.size(); at += options_.buffer_bytes) {
    Buffer& buffer = buffers[next++ % buffers.size()];
    PT_RETURN_IF_ERROR(Finish(buffer));
    const auto piece = from.subspan(at, std::min(from.size() - at, options_.buffer_bytes));
    CopyBytes(piece, buffer.bytes);
    PT_RETURN_IF_ERROR(Start(buffer, static_cast<std::byte*>(device) + at, buffer.bytes,
                             piece.size(), cudaMemcpyHostToDevice));
  }
  for (Buffer& buffer : buffers) PT_RETURN_IF_ERROR(Finish(buffer));
  return absl::OkStatus();
}

absl::Status CudaTransfers::FromDevice(const void* device, std::span<std::byte> to) {
  if (to.empty()) return absl::OkStatus();
  PT_RETURN_IF_ERROR(CudaStatus("use the GPU", cudaSetDevice(ordinal_)));
  Borrowed lane(this);
  std::vector<Buffer>& buffers = lane.buffers();
  if (IsPinned(to.data(), to.size())) {
    PT_RETURN_IF_ERROR(Start(buffers[0], to.data(), device, to.size(), cudaMemcpyDeviceToHost));
    return Finish(buffers[0]);
  }
  size_t next = 0;
  for (size_t at = 0; at < to.size(); at += options_.buffer_bytes) {
    Buffer& buffer = buffers[next++ % buffers.size()];
    PT_RETURN_IF_ERROR(Finish(buffer));
    buffer.target = to.subspan(at, std::min(to.size() - at, options_.buffer_bytes));
    PT_RETURN_IF_ERROR(Start(buffer, buffer.bytes, static_cast<const std::byte*>(device) + at,
                             buffer.target.size(), cudaMemcpyDeviceToHost));
  }
  for (Buffer& buffer : buffers) PT_RETURN_IF_ERROR(Finish(buffer));
  return absl::OkStatus();
}

}  // namespace pagetide
