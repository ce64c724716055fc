// FrameLink: pages of transfers between the frames of two workers' GPUs, past host memory: by a
// group of two, made for one transfer over a FastLink and gone with it. A communicator takes memory
// of the GPU and time to make, so few run at once, and only for many bytes; whatever fails, the
// pages go the other way (TransferService.PushPages).
//
// Domain: knows no gRPC. Thread-safe; clock and metrics outlive it, and it its transfers.
#ifndef PAGETIDE_WORKER_FRAME_LINK_H_
#define PAGETIDE_WORKER_FRAME_LINK_H_

#include <cstdint>
#include <functional>
#include <memory>
#include <span>
#include <string>

#include "absl/functional/function_ref.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/byte_size.h"
#include "base/clock.h"
#include "base/digest.h"
#include "base/metrics.h"
#include "base/mutex.h"
#include "worker/collective.h"
#include "worker/incoming_transfers.h"
#include "worker/sequence_transfer.h"
#include "worker/stream_slots.h"

namespace pagetide {

// Proof that a worker of this deployment asks for the group, for this tenant:
//   HMAC-SHA-256(salt, "pagetide.link.v1" SHA-256(field transfer id, field link))
Digest ProveLink(absl::string_view transfer_id, absl::string_view link, const TenantSalt& salt);

class FrameLink {
 public:
  struct Options {
    uint32_t max_running = 2;
    // Of what lies in frames; fewer are not worth a communicator.
    uint64_t min_bytes = 64 * kMiB;
    absl::Duration join_timeout = absl::Seconds(5);
    // A page that takes longer breaks the group.
    absl::Duration page_timeout = absl::Seconds(5);
  };
  static constexpr absl::Duration kMaxJoinTimeout = absl::Seconds(10);

  // `make_link` is called from any thread; each of its links serves one transfer.
  FrameLink(Options options, std::function<std::unique_ptr<FastLink>()> make_link,
            const Clock* clock, Metrics* metrics);

  const Options& options() const { return options_; }
  // "nccl"; empty when this worker cannot use it, which is looked at once.
  const std::string& name() const { return name_; }
  const std::string& why_not() const { return why_not_; }

  // One transfer's use of the link. For one thread, but for Abort.
  class Pair {
   public:
    // By the target, once.
    absl::StatusOr<std::string> MakeId() { return link_->MakeId(); }
    // The two ends: they join, the pages go in their order, and they leave: both at the same time,
    // since to leave a group of GPUs of one machine may wait for the other. FAILED_PRECONDITION
    // (NO_NCCL, NO_GPU, NCCL_FAILED), DEADLINE_EXCEEDED, CANCELLED; of Send those of
    // OutgoingSequence::VisitFrames, of Receive those of IncomingTransfers::Push::Fill.
    absl::Status Send(absl::string_view id, absl::Duration join_timeout, OutgoingSequence& outgoing,
                      std::span<const uint32_t> pages, MonotonicTime deadline);
    absl::Status Receive(absl::string_view id, absl::Duration join_timeout,
                         IncomingTransfers::Push& push, std::span<const uint32_t> pages,
                         MonotonicTime deadline);
    // Ends the call that runs, as soon as it has joined. From any thread.
    void Abort();

   private:
    friend class FrameLink;
    Pair(FrameLink* parent, std::unique_ptr<StreamSlots::Slot> slot, std::unique_ptr<FastLink> link)
        : parent_(parent), slot_(std::move(slot)), link_(std::move(link)) {}
    // Joined, runs `move`, and leaves.
    absl::Status Run(uint32_t rank, absl::string_view id, absl::Duration join_timeout,
                     MonotonicTime deadline,
                     absl::FunctionRef<absl::Status(Collective& group)> move);
    MonotonicTime PageDeadline(MonotonicTime deadline) const;

    FrameLink* const parent_;
    const std::unique_ptr<StreamSlots::Slot> slot_;
    const std::unique_ptr<FastLink> link_;
    Mutex mu_;
    bool is_aborted_ ABSL_GUARDED_BY(mu_) = false;
    Collective* group_ ABSL_GUARDED_BY(mu_) = nullptr;  // while it runs
  };
  // FAILED_PRECONDITION (NO_LINK), RESOURCE_EXHAUSTED (TOO_MANY_LINKS).
  absl::StatusOr<std::unique_ptr<Pair>> Take(absl::string_view tenant);

 private:
  const Options options_;
  const std::function<std::unique_ptr<FastLink>()> make_link_;
  const Clock* const clock_;
  Counter* const sent_pages_;
  Counter* const received_pages_;
  std::string name_;
  std::string why_not_;
  StreamSlots slots_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_FRAME_LINK_H_
