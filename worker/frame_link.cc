#include "worker/frame_link.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {

Digest ProveLink(absl::string_view transfer_id, absl::string_view link, const TenantSalt& salt) {
  Sha256 hash;
  hash.AppendField(transfer_id).AppendField(link);
  return HmacSha256(salt.digest.view(), absl::StrCat("pagetide.link.v1", hash.Finish().view()));
}

FrameLink::FrameLink(Options options, std::function<std::unique_ptr<FastLink>()> make_link,
                     const Clock* clock, Metrics* metrics)
    : options_(options),
      make_link_(std::move(make_link)),
      clock_(clock),
      sent_pages_(metrics->GetCounter("pagetide_transfer_link_sent_pages_total",
                                      "Pages sent from this worker's GPU to another's")),
      received_pages_(
          metrics->GetCounter("pagetide_transfer_link_received_pages_total",
                              "Pages that came from another worker's GPU, and were verified")),
      slots_({.what = "transfers between GPUs",
              .reason = "TOO_MANY_LINKS",
              .in_all = options.max_running,
              .per_tenant = options.max_running}) {
  const std::unique_ptr<FastLink> link = make_link_();
  const absl::Status usable = link->Check();
  if (usable.ok()) {
    name_ = std::string(link->name());
  } else {
    why_not_ = std::string(usable.message());
  }
}

absl::StatusOr<std::unique_ptr<FrameLink::Pair>> FrameLink::Take(absl::string_view tenant) {
  if (name_.empty()) {
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat("link frames of GPUs: ", why_not_)), "NO_LINK");
  }
  PT_ASSIGN_OR_RETURN(std::unique_ptr<StreamSlots::Slot> slot, slots_.Take(tenant));
  return std::unique_ptr<Pair>(new Pair(this, std::move(slot), make_link_()));
}

MonotonicTime FrameLink::Pair::PageDeadline(MonotonicTime deadline) const {
  return std::min(deadline, parent_->clock_->MonotonicNow() + parent_->options_.page_timeout);
}

absl::Status FrameLink::Pair::Run(uint32_t rank, absl::string_view id, absl::Duration join_timeout,
                                  MonotonicTime deadline,
                                  absl::FunctionRef<absl::Status(Collective& group)> move) {
  const MonotonicTime join_by = std::min(deadline, parent_->clock_->MonotonicNow() + join_timeout);
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<Collective> group, link_->Join(rank, 2, id, join_by));
  {
    MutexLock lock(&mu_);
    group_ = group.get();
    // What was asked for while there was nothing to end.
    if (is_aborted_) group_->Abort();
  }
  const absl::Status status = move(*group);
  MutexLock lock(&mu_);
  group_ = nullptr;
  return status;
}

void FrameLink::Pair::Abort() {
  MutexLock lock(&mu_);
  is_aborted_ = true;
  if (group_ != nullptr) group_->Abort();
}

absl::Status FrameLink::Pair::Send(absl::string_view id, absl::Duration join_timeout,
                                   OutgoingSequence& outgoing, std::span<const uint32_t> pages,
                                   MonotonicTime deadline) {
  return Run(1, id, join_timeout, deadline, [&](Collective& group) {
    return outgoing.VisitFrames(pages,
                                [&](uint32_t, const CollectiveBuffer& frame) -> absl::Status {
                                  PT_RETURN_IF_ERROR(group.Send(0, frame, PageDeadline(deadline)));
                                  parent_->sent_pages_->Increment();
                                  return absl::OkStatus();
                                });
  });
}

absl::Status FrameLink::Pair::Receive(absl::string_view id, absl::Duration join_timeout,
                                      IncomingTransfers::Push& push,
                                      std::span<const uint32_t> pages, MonotonicTime deadline) {
  return Run(0, id, join_timeout, deadline, [&](Collective& group) -> absl::Status {
    for (uint32_t page : pages) {
      PT_RETURN_IF_ERROR(push.Fill(page, [&](const CollectiveBuffer& frame) {
        return group.Receive(1, frame, PageDeadline(deadline));
      }));
      parent_->received_pages_->Increment();
    }
    return absl::OkStatus();
  });
}

}  // namespace pagetide
