#include "worker/group_mailbox.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

// How often a wait looks at its clock and at whether it was cancelled.
constexpr absl::Duration kLook = absl::Milliseconds(100);

std::string TextOf(const DeliveryName& name) {
  return absl::StrCat("delivery ", name.number, " of group ", name.group, " from rank ", name.from,
                      " to rank ", name.to);
}

}  // namespace

Digest ProveDelivery(const DeliveryName& name, uint64_t num_bytes, const TenantSalt& salt) {
  Sha256 hash;
  hash.AppendField(name.group).AppendU32(name.from).AppendU32(name.to);
  hash.AppendU64(name.number).AppendU64(num_bytes);
  return HmacSha256(salt.digest.view(), absl::StrCat("pagetide.group.v1", hash.Finish().view()));
}

absl::Status GroupMailbox::Receive(const DeliveryName& name, const CollectiveBuffer& buffer,
                                   const std::atomic<bool>* cancelled, MonotonicTime deadline) {
  const std::shared_ptr<Slot> slot(new Slot{.buffer = buffer});
  MutexLock lock(&mu_);
  if (!slots_.try_emplace(name, slot).second) {
    return absl::AlreadyExistsError(absl::StrCat(TextOf(name), " is being received"));
  }
  changed_.SignalAll();
  absl::Status given_up;
  while (!slot->is_done) {
    const absl::Duration left = deadline - clock_->MonotonicNow();
    if (given_up.ok() && cancelled->load()) {
      given_up = absl::CancelledError(absl::StrCat(TextOf(name), ": the group was aborted"));
    }
    if (given_up.ok() && left <= absl::ZeroDuration()) {
      given_up = absl::DeadlineExceededError(absl::StrCat(
          TextOf(name), slot->is_taken ? " did not come whole in time" : " did not begin in time"));
    }
    // The deliverer stops at its next part; a write that runs ends by itself.
    if (!given_up.ok()) {
      slot->status = given_up;
      if (!slot->is_writing) break;
    }
    changed_.WaitWithTimeout(&mu_, given_up.ok() ? std::min(left, kLook) : kLook);
  }
  const auto it = slots_.find(name);
  if (it != slots_.end() && it->second == slot) slots_.erase(it);
  return given_up.ok() ? slot->status : given_up;
}

absl::StatusOr<std::unique_ptr<GroupMailbox::Delivery>> GroupMailbox::Deliver(
    const DeliveryName& name, uint64_t num_bytes, MonotonicTime deadline) {
  MutexLock lock(&mu_);
  if (num_waiting_ >= kMaxWaiting) {
    return WithRetryDelay(
        WithReason(absl::ResourceExhaustedError(absl::StrCat(
                       TextOf(name), ": ", num_waiting_, " deliveries wait for their receivers")),
                   "TOO_MANY_DELIVERIES"),
        absl::Seconds(1));
  }
  ++num_waiting_;
  auto it = slots_.find(name);
  while (it == slots_.end() || it->second->is_taken || it->second->is_done) {
    const absl::Duration left = deadline - clock_->MonotonicNow();
    if (left <= absl::ZeroDuration()) break;
    changed_.WaitWithTimeout(&mu_, std::min(left, kLook));
    it = slots_.find(name);
  }
  --num_waiting_;
  if (it == slots_.end() || it->second->is_taken || it->second->is_done) {
    return absl::DeadlineExceededError(absl::StrCat(TextOf(name), ": nobody received it in time"));
  }
  const std::shared_ptr<Slot> slot = it->second;
  if (!slot->status.ok()) return slot->status;
  if (slot->buffer.num_bytes != num_bytes) {
    slot->status = absl::InvalidArgumentError(absl::StrCat(
        TextOf(name), " has ", num_bytes, " bytes, the receiver takes ", slot->buffer.num_bytes));
    slot->is_done = true;
    changed_.SignalAll();
    return slot->status;
  }
  slot->is_taken = true;
  return std::unique_ptr<Delivery>(new Delivery(this, slot));
}

GroupMailbox::Delivery::~Delivery() {
  if (slot_ != nullptr) {
    End(absl::UnavailableError(absl::StrCat("the delivery broke behind ", written_, " bytes of ",
                                            slot_->buffer.num_bytes)));
  }
}

void GroupMailbox::Delivery::End(absl::Status status) {
  {
    MutexLock lock(&mailbox_->mu_);
    if (slot_->status.ok()) slot_->status = std::move(status);
    slot_->is_done = true;
    slot_->is_taken = false;
    mailbox_->changed_.SignalAll();
  }
  slot_.reset();
}

absl::Status GroupMailbox::Delivery::Write(std::span<const std::byte> bytes) {
  if (bytes.size() > slot_->buffer.num_bytes - written_) {
    return absl::InvalidArgumentError(absl::StrCat("a delivery of ", slot_->buffer.num_bytes,
                                                   " bytes has ", bytes.size(), " more behind ",
                                                   written_));
  }
  {
    MutexLock lock(&mailbox_->mu_);
    if (!slot_->status.ok()) return slot_->status;  // the receiver gave up
    if (slot_->is_done) return absl::AbortedError("a delivery that is done gets no more bytes");
    slot_->is_writing = true;
  }
  const absl::Status written = slot_->buffer.Write(written_, bytes);
  {
    MutexLock lock(&mailbox_->mu_);
    slot_->is_writing = false;
    mailbox_->changed_.SignalAll();
  }
  PT_RETURN_IF_ERROR(written);
  stream_.Update(bytes);
  written_ += bytes.size();
  return absl::OkStatus();
}

absl::Status GroupMailbox::Delivery::Finish(const Checksum128& checksum) {
  const Checksum128 found = stream_.Get();
  absl::Status status;
  if (written_ != slot_->buffer.num_bytes) {
    status = absl::DataLossError(absl::StrCat("a delivery ended behind ", written_, " of ",
                                              slot_->buffer.num_bytes, " bytes"));
  } else if (found != checksum) {
    status = absl::DataLossError(absl::StrCat("a delivery of ", written_, " bytes: checksum 0x",
                                              found.ToHex(), " != 0x", checksum.ToHex()));
  }
  End(status);
  return status;
}

}  // namespace pagetide
