#include "worker/worker_fence.h"

#include <utility>

#include "absl/strings/numbers.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/log.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

// Writers of one ownership record are few: one worker, and whoever takes its sequences over.
constexpr int kMaxFenceTries = 8;
constexpr char kLeaseMark[] = " lease ";

}  // namespace

std::string FenceValue(absl::string_view writer, uint64_t lease_epoch) {
  return absl::StrCat(writer, kLeaseMark, lease_epoch);
}

uint64_t LeaseEpochOf(absl::string_view fence_value) {
  const size_t at = fence_value.rfind(kLeaseMark);
  uint64_t epoch = 0;
  if (at == absl::string_view::npos ||
      !absl::SimpleAtoi(fence_value.substr(at + sizeof(kLeaseMark) - 1), &epoch)) {
    return 0;
  }
  return epoch;
}

WorkerFence::WorkerFence(absl::string_view worker_id, uint64_t incarnation, StoreLeaseKeeper* lease,
                         PageStore* store)
    : ownership_key_(absl::StrCat("worker/", worker_id)),
      incarnation_(incarnation),
      lease_(lease),
      store_(store) {}

absl::StatusOr<WriteFence> WorkerFence::Get(MonotonicTime deadline) {
  switch (lease_->AwaitFirst(deadline)) {
    case StoreLeaseKeeper::State::kHeld:
      break;
    case StoreLeaseKeeper::State::kHeldByOther:
      return WithReason(
          absl::FailedPreconditionError(absl::StrCat(
              "write durably: another incarnation holds the lease ", ownership_key_, " now")),
          error_reason::kStaleEpoch);
    case StoreLeaseKeeper::State::kAcquiring:
    case StoreLeaseKeeper::State::kLost:
      return WithRetryDelay(
          absl::UnavailableError(absl::StrCat("write durably: the lease ", ownership_key_,
                                              " is not held: ", lease_->last_error().message())),
          absl::Milliseconds(200));
  }
  const uint64_t lease_epoch = lease_->epoch();
  {
    MutexLock lock(&mu_);
    if (fence_ && lease_epoch_ == lease_epoch) return *fence_;
  }
  PT_ASSIGN_OR_RETURN(WriteFence fence, Advance(lease_epoch, deadline));
  MutexLock lock(&mu_);
  if (!fence_ || lease_epoch_ < lease_epoch) {
    fence_ = fence;
    lease_epoch_ = lease_epoch;
  }
  return fence;
}

absl::StatusOr<WriteFence> WorkerFence::Advance(uint64_t lease_epoch, MonotonicTime deadline) {
  // Names one lease of one life: whoever reads it back knows that the record is theirs already.
  const std::string mine =
      FenceValue(absl::StrCat(absl::Hex(incarnation_, absl::kZeroPad16)), lease_epoch);
  for (int attempt = 0; attempt < kMaxFenceTries; ++attempt) {
    const absl::StatusOr<StoreRecord> record =
        store_->GetRecord(kOwnerRecordKind, ownership_key_, deadline);
    if (!record.ok() && !absl::IsNotFound(record.status())) return record.status();
    if (record.ok() && record->value == mine) return WriteFence{ownership_key_, record->version};
    // The lease may have gone to another since the caller looked.
    if ((record.ok() && LeaseEpochOf(record->value) > lease_epoch) || !lease_->IsHeld()) break;
    const uint64_t version = record.ok() ? record->version : 0;
    const absl::StatusOr<uint64_t> epoch =
        store_->CompareAndSetRecord(kOwnerRecordKind, ownership_key_, version, mine, deadline);
    if (epoch.ok()) {
      LogInfo("worker", "owns ", ownership_key_, ", epoch ", *epoch);
      return WriteFence{ownership_key_, *epoch};
    }
    if (GetReason(epoch.status()) != error_reason::kVersionMismatch) return epoch.status();
  }
  return WithReason(absl::FailedPreconditionError(
                        absl::StrCat("write durably: ", ownership_key_, " was taken over")),
                    error_reason::kStaleEpoch);
}

}  // namespace pagetide
