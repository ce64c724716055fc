// A sequence on its way to another worker: what it is, and the bytes of its pages.
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "worker/device_addressed.h"
#include "worker/model_host_impl.h"

namespace pagetide {

class ModelHostImpl::OutgoingImpl final : public OutgoingSequence {
 public:
  OutgoingImpl(ModelHostImpl* host, std::unique_ptr<PagedSnapshot> snapshot, TransferKind kind,
               SequenceIdentity identity, uint64_t hold)
      : host_(host), snapshot_(std::move(snapshot)), hold_(hold) {
    plan_.kind = kind;
    plan_.state = snapshot_->state();
    plan_.identity = identity;
  }
  ~OutgoingImpl() override {
    if (hold_ != 0) host_->EndHold(plan_.identity.id, hold_);
  }

  absl::Status Describe(MonotonicTime deadline) {
    for (uint32_t p = 0; p < snapshot_->num_pages(); ++p) {
      PT_ASSIGN_OR_RETURN(const StateSnapshot::Copy copy, snapshot_->DescribePage(p, deadline));
      plan_.pages.push_back({copy.ref, copy.rows, copy.is_full});
    }
    return absl::OkStatus();
  }

  const TransferPlan& plan() const override { return plan_; }
  uint64_t page_bytes(uint32_t page) const override {
    return host_->Geometry(snapshot_->GroupOf(page)).page_bytes();
  }

  absl::Status ReadPages(std::span<const uint32_t> pages, MonotonicTime deadline,
                         PageSink sink) override {
    for (uint32_t page : pages) {
      if (page < plan_.pages.size()) continue;
      return absl::InvalidArgumentError(
          absl::StrCat("read page ", page, " of a transfer of ", plan_.pages.size()));
    }
    return snapshot_->ReadPages(
        pages, deadline,
        [&](uint32_t page, const ManifestPageRef& ref,
            std::span<const std::byte> body) -> absl::Status {
          const ManifestPageRef& said = plan_.pages[page].ref;
          if (ref.key != said.key || ref.checksum != said.checksum) {
            return absl::AbortedError(absl::StrCat(
                "send sequence: page ", page, " changed while it was sent: checksum 0x",
                ref.checksum.ToHex(), " != 0x", said.checksum.ToHex()));
          }
          return sink(page, body);
        });
  }

  std::vector<uint32_t> InFrames(std::span<const uint32_t> pages) override {
    std::vector<uint32_t> found;
    for (uint32_t page : pages) {
      if (page < plan_.pages.size() && snapshot_->IsInFrame(page, plan_.pages[page].ref.checksum)) {
        found.push_back(page);
      }
    }
    return found;
  }
  absl::Status VisitFrames(std::span<const uint32_t> pages, FrameSink sink) override {
    for (uint32_t page : pages) {
      if (page >= plan_.pages.size()) {
        return absl::InvalidArgumentError(
            absl::StrCat("send page ", page, " of a transfer of ", plan_.pages.size()));
      }
      PT_RETURN_IF_ERROR(snapshot_->VisitFrame(page, plan_.pages[page].ref.checksum, sink));
    }
    return absl::OkStatus();
  }

  uint64_t KeepHold() override { return std::exchange(hold_, 0); }

 private:
  ModelHostImpl* const host_;
  const std::unique_ptr<PagedSnapshot> snapshot_;
  TransferPlan plan_;
  uint64_t hold_ = 0;  // 0: none, or not ours to end
};

absl::StatusOr<std::unique_ptr<OutgoingSequence>> ModelHostImpl::BeginOutgoing(
    const Tenant& tenant, const SequenceHandle& handle, TransferKind kind,
    absl::string_view address, MonotonicTime deadline) {
  const bool is_move = kind == TransferKind::kMove;
  std::unique_ptr<OutgoingImpl> outgoing;
  {
    std::unique_ptr<PagedSnapshot> snapshot;  // its end takes the lock
    MutexLock lock(&mu_);
    SequencePtr sequence;
    uint64_t hold = 0;
    if (is_move) {
      PT_ASSIGN_OR_RETURN(sequence, FindForChange(tenant, handle));
    } else {
      PT_ASSIGN_OR_RETURN(sequence, FindSequence(tenant, handle.id));
      PT_RETURN_IF_ERROR(CheckHandle(*sequence, handle));
    }
    if (!sequence->pending) PT_RETURN_IF_ERROR(CutIfLost(*sequence));
    PT_ASSIGN_OR_RETURN(snapshot,
                        TakeSnapshot(tenant, *sequence, std::nullopt, CheckpointScope::kAll));
    if (is_move) {
      // It never expires by itself: who made it knows when the outcome is known.
      sequence->pending = NewPending(*sequence, 0, /*pin_prefix=*/false);
      sequence->pending->state = Pending::State::kOpen;
      sequence->pending->moving_to = std::string(address);
      hold = sequence->pending->id;
    }
    outgoing = std::make_unique<OutgoingImpl>(
        this, std::move(snapshot), kind, SequenceIdentity{sequence->id, sequence->epoch}, hold);
  }
  PT_RETURN_IF_ERROR(CheckManifestSize(absl::StrCat("send sequence ", handle.id.ToString()),
                                       outgoing->plan().state));
  PT_RETURN_IF_ERROR(outgoing->Describe(deadline));
  Flush();
  return std::unique_ptr<OutgoingSequence>(std::move(outgoing));
}

void ModelHostImpl::EndHold(SequenceId id, uint64_t hold) {
  {
    MutexLock lock(&mu_);
    const auto it = sequences_.find(NumberOfLocked(id));
    if (it == sequences_.end()) return;
    const SequencePtr sequence = it->second;
    if (sequence->pending == nullptr || sequence->pending->id != hold) return;
    sequence->pending->aborted = true;
    Settle(*sequence);
  }
  Flush();
}

absl::Status ModelHostImpl::CloseMoved(const Tenant& tenant, SequenceId id, uint64_t epoch) {
  {
    MutexLock lock(&mu_);
    const absl::StatusOr<SequencePtr> found = FindSequence(tenant, id);
    if (!found.ok()) return absl::OkStatus();
    PT_RETURN_IF_ERROR(CheckHandle(**found, {id, epoch, std::nullopt}));
    CloseNow(**found);
  }
  Flush();
  return absl::OkStatus();
}

bool ModelHostImpl::has_device_addresses() const {
  return dynamic_cast<DeviceAddressed*>(pool_.get()) != nullptr;
}

TransferHost& TransfersOf(ModelHost& host) {
  return static_cast<ModelHostImpl&>(host);  // the one implementation
}

}  // namespace pagetide
