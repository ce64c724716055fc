#include "worker/nccl_collective.h"

#include <cstring>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/device_addressed.h"

namespace pagetide {
namespace {

// Between two looks at what a GPU or a peer does.
constexpr absl::Duration kPoll = absl::Microseconds(50);
// For the last bytes of this member to reach the others.
constexpr absl::Duration kFinalize = absl::Seconds(5);

absl::Status NoGpu(absl::string_view what) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat("use NCCL: ", what)), "NO_GPU");
}

}  // namespace

absl::Status NcclLink::Check() {
  if (library_ == nullptr) {
    PT_ASSIGN_OR_RETURN(library_, NcclLibrary::Load(options_.paths));
  }
  int count = 0;
  if (const int error = library_->cuInit(0); error != kCudaSuccess) {
    return NoGpu(absl::StrCat("cuInit answers ", error));
  }
  if (const int error = library_->cuDeviceGetCount(&count); error != kCudaSuccess) {
    return NoGpu(absl::StrCat("cuDeviceGetCount answers ", error));
  }
  if (options_.gpu >= 0 && options_.gpu < count) return absl::OkStatus();
  return NoGpu(absl::StrCat("there are ", count, " GPUs, not one of number ", options_.gpu));
}

absl::StatusOr<std::string> NcclLink::MakeId() {
  PT_RETURN_IF_ERROR(Check());
  NcclUniqueId id;
  if (const int result = library_->ncclGetUniqueId(&id); result != kNcclSuccess) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat(
                          "make an id for NCCL: ", library_->ncclGetErrorString(result))),
                      "NCCL_FAILED");
  }
  return std::string(id.internal, sizeof(id.internal));
}

absl::StatusOr<std::unique_ptr<Collective>> NcclLink::Join(uint32_t rank, uint32_t size,
                                                           absl::string_view id,
                                                           MonotonicTime deadline) {
  if (rank >= size || size > kMaxGroupSize || id.size() != sizeof(NcclUniqueId)) {
    return absl::InvalidArgumentError(
        absl::StrCat("join rank ", rank, " of ", size, " with an id of ", id.size(), " bytes"));
  }
  PT_RETURN_IF_ERROR(Check());
  NcclUniqueId unique;
  std::memcpy(unique.internal, id.data(), sizeof(unique.internal));
  auto collective =
      std::unique_ptr<NcclCollective>(new NcclCollective(library_, clock_, rank, size));
  PT_RETURN_IF_ERROR(collective->Open(options_.gpu, unique, deadline));
  return std::unique_ptr<Collective>(std::move(collective));
}

absl::Status NcclCollective::Open(int gpu, const NcclUniqueId& id, MonotonicTime deadline) {
  int device = 0;
  if (library_->cuDeviceGet(&device, gpu) != kCudaSuccess ||
      library_->cuDevicePrimaryCtxRetain(&context_, device) != kCudaSuccess) {
    return NoGpu(absl::StrCat("GPU ", gpu, " gives no context"));
  }
  device_ = device;
  // NCCL takes the GPU that is the thread's.
  if (library_->cuCtxSetCurrent(context_) != kCudaSuccess ||
      library_->cuStreamCreate(&stream_, kCudaStreamNonBlocking) != kCudaSuccess) {
    return NoGpu(absl::StrCat("GPU ", gpu, " gives no stream"));
  }
  NcclConfig config;
  const int result = library_->ncclCommInitRankConfig(&comm_, static_cast<int>(size_), id,
                                                      static_cast<int>(rank_), &config);
  return WaitTaken("join", result, deadline);
}

NcclCollective::~NcclCollective() {
  if (context_ != nullptr) library_->cuCtxSetCurrent(context_);
  if (comm_ != nullptr && !is_aborted_) {
    const absl::Status finalized =
        WaitTaken("leave", library_->ncclCommFinalize(comm_), clock_->MonotonicNow() + kFinalize);
    if (finalized.ok()) library_->ncclCommDestroy(std::exchange(comm_, nullptr));
  }
  Drop();
  if (stream_ != nullptr) library_->cuStreamDestroy_v2(stream_);
  if (device_ >= 0) library_->cuDevicePrimaryCtxRelease_v2(device_);
}

void NcclCollective::Drop() {
  if (comm_ != nullptr) library_->ncclCommAbort(std::exchange(comm_, nullptr));
}

absl::Status NcclCollective::Failed(absl::string_view action, int result) const {
  return WithReason(
      absl::FailedPreconditionError(absl::StrCat("nccl ", action, " of rank ", rank_, " of ", size_,
                                                 ": ", library_->ncclGetErrorString(result))),
      "NCCL_FAILED");
}

absl::Status NcclCollective::CheckTime(absl::string_view action, MonotonicTime deadline) const {
  if (is_aborted_) {
    return absl::CancelledError(absl::StrCat("nccl ", action, ": the group was aborted"));
  }
  if (clock_->MonotonicNow() < deadline) return absl::OkStatus();
  return absl::DeadlineExceededError(
      absl::StrCat("nccl ", action, " of rank ", rank_, " of ", size_, " did not end in time"));
}

absl::Status NcclCollective::WaitTaken(absl::string_view action, int result,
                                       MonotonicTime deadline) {
  absl::Status status;
  while (result == kNcclInProgress && status.ok()) {
    absl::SleepFor(kPoll);
    if (library_->ncclCommGetAsyncError(comm_, &result) != kNcclSuccess) break;
    if (result == kNcclInProgress) status = CheckTime(action, deadline);
  }
  if (status.ok() && result != kNcclSuccess) status = Failed(action, result);
  if (!status.ok()) Drop();
  return status;
}

absl::Status NcclCollective::WaitStream(absl::string_view action, MonotonicTime deadline) {
  absl::Status status;
  for (;;) {
    const int state = library_->cuStreamQuery(stream_);
    if (state == kCudaSuccess) return absl::OkStatus();
    int result = kNcclSuccess;
    library_->ncclCommGetAsyncError(comm_, &result);
    if (state != kCudaNotReady) {
      status = WithReason(absl::FailedPreconditionError(
                              absl::StrCat("nccl ", action, ": cuStreamQuery answers ", state)),
                          "NCCL_FAILED");
    } else if (result != kNcclSuccess && result != kNcclInProgress) {
      status = Failed(action, result);
    } else {
      status = CheckTime(action, deadline);
    }
    if (!status.ok()) break;
    absl::SleepFor(kPoll);
  }
  Drop();
  // What was enqueued must not write into the buffer any more when this answers.
  const MonotonicTime ended_by = clock_->MonotonicNow() + kFinalize;
  while (library_->cuStreamQuery(stream_) == kCudaNotReady && clock_->MonotonicNow() < ended_by) {
    absl::SleepFor(kPoll);
  }
  return status;
}

absl::Status NcclCollective::Run(absl::string_view action, uint32_t peer, bool may_be_self,
                                 const CollectiveBuffer& buffer, MonotonicTime deadline,
                                 const std::function<int(void* address)>& start) {
  if (peer >= size_ || (peer == rank_ && !may_be_self)) {
    return absl::InvalidArgumentError(
        absl::StrCat("nccl ", action, ": rank ", peer, " at rank ", rank_, " of ", size_));
  }
  auto* const memory = dynamic_cast<DeviceAddressed*>(buffer.pool);
  if (memory == nullptr) {
    return absl::InvalidArgumentError(
        absl::StrCat("nccl ", action, ": the buffer is not in the memory of a GPU"));
  }
  if (comm_ == nullptr || is_aborted_) {
    return WithReason(absl::FailedPreconditionError(absl::StrCat(
                          "nccl ", action, ": an earlier call failed, or the group was aborted")),
                      "GROUP_BROKEN");
  }
  if (absl::Status late = CheckTime(action, deadline); !late.ok()) {
    Drop();  // the others' calls are matched with this one, which never began
    return late;
  }
  library_->cuCtxSetCurrent(context_);
  void* const address = static_cast<std::byte*>(memory->device_address()) + buffer.offset;
  PT_RETURN_IF_ERROR(WaitTaken(action, start(address), deadline));
  return WaitStream(action, deadline);
}

absl::Status NcclCollective::Broadcast(uint32_t root, const CollectiveBuffer& buffer,
                                       MonotonicTime deadline) {
  return Run("broadcast", root, /*may_be_self=*/true, buffer, deadline, [&](void* address) {
    return library_->ncclBroadcast(address, address, buffer.num_bytes, kNcclUint8,
                                   static_cast<int>(root), comm_, stream_);
  });
}

absl::Status NcclCollective::Send(uint32_t to, const CollectiveBuffer& buffer,
                                  MonotonicTime deadline) {
  return Run("send", to, /*may_be_self=*/false, buffer, deadline, [&](void* address) {
    return library_->ncclSend(address, buffer.num_bytes, kNcclUint8, static_cast<int>(to), comm_,
                              stream_);
  });
}

absl::Status NcclCollective::Receive(uint32_t from, const CollectiveBuffer& buffer,
                                     MonotonicTime deadline) {
  return Run("receive", from, /*may_be_self=*/false, buffer, deadline, [&](void* address) {
    return library_->ncclRecv(address, buffer.num_bytes, kNcclUint8, static_cast<int>(from), comm_,
                              stream_);
  });
}

}  // namespace pagetide
