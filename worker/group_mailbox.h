// GroupMailbox: where bytes from other members of a group meet the calls that wait for them.
// Neither side keeps bytes for the other: who delivers waits until somebody receives, then writes
// into the receiver's memory.
//
// A delivery is named by tenant, group, sender, receiver and number, which counts what one member
// has sent to another. Domain: knows no gRPC. Thread-safe; the clock outlives it.
#ifndef PAGETIDE_WORKER_GROUP_MAILBOX_H_
#define PAGETIDE_WORKER_GROUP_MAILBOX_H_

#include <atomic>
#include <compare>
#include <cstdint>
#include <map>
#include <memory>
#include <span>
#include <string>
#include <utility>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "base/checksum.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/mutex.h"
#include "worker/collective.h"
#include "worker/model_host.h"

namespace pagetide {

struct DeliveryName {
  std::string tenant;
  std::string group;
  uint32_t from = 0;
  uint32_t to = 0;
  uint64_t number = 0;
  friend auto operator<=>(const DeliveryName&, const DeliveryName&) = default;
};

// Proof that a worker of this deployment delivers it for this tenant:
//   HMAC-SHA-256(salt, "pagetide.group.v1" SHA-256(field group, u32 from, u32 to, u64 number, u64
//   num_bytes))
Digest ProveDelivery(const DeliveryName& name, uint64_t num_bytes, const TenantSalt& salt);

class GroupMailbox {
 public:
  // Deliveries that nobody receives yet, at a time.
  static constexpr size_t kMaxWaiting = 256;

  explicit GroupMailbox(const Clock* clock) : clock_(clock) {}

  // Waits until all bytes of the delivery are in `buffer`. DEADLINE_EXCEEDED, CANCELLED (*cancelled
  // turned true; looked at ten times a second), INVALID_ARGUMENT (the other's size), DATA_LOSS.
  // ALREADY_EXISTS when it is being received.
  absl::Status Receive(const DeliveryName& name, const CollectiveBuffer& buffer,
                       const std::atomic<bool>* cancelled, MonotonicTime deadline);

 private:
  struct Slot {
    const CollectiveBuffer buffer;
    bool is_taken = false;    // somebody delivers
    bool is_writing = false;  // into the buffer, right now
    bool is_done = false;
    absl::Status status;
  };

 public:
  // The right to write one delivery into its receiver's memory. Its end without Finish is the
  // receiver's failure.
  class Delivery {
   public:
    ~Delivery();
    Delivery(const Delivery&) = delete;
    Delivery& operator=(const Delivery&) = delete;
    // In order. INVALID_ARGUMENT beyond the size.
    absl::Status Write(std::span<const std::byte> bytes);
    // DATA_LOSS: other bytes than the checksum says, or too few.
    absl::Status Finish(const Checksum128& checksum);

   private:
    friend class GroupMailbox;
    Delivery(GroupMailbox* mailbox, std::shared_ptr<Slot> slot)
        : mailbox_(mailbox), slot_(std::move(slot)) {}
    void End(absl::Status status);
    GroupMailbox* const mailbox_;
    std::shared_ptr<Slot> slot_;  // shared with the receiver that waits
    ChecksumStream stream_;
    uint64_t written_ = 0;
  };
  // Waits until somebody receives it. Errors as Receive; RESOURCE_EXHAUSTED (TOO_MANY_DELIVERIES).
  absl::StatusOr<std::unique_ptr<Delivery>> Deliver(const DeliveryName& name, uint64_t num_bytes,
                                                    MonotonicTime deadline);

 private:
  const Clock* const clock_;
  Mutex mu_;
  CondVar changed_;
  std::map<DeliveryName, std::shared_ptr<Slot>> slots_ ABSL_GUARDED_BY(mu_);  // being received
  size_t num_waiting_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_GROUP_MAILBOX_H_
