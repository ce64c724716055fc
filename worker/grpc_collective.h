// GrpcCollective: a Collective over TransferService.DeliverBytes: works between any workers that
// reach each other, from and to frames of any device and host memory. What it receives comes in by
// the GroupMailbox of its worker.
#ifndef PAGETIDE_WORKER_GRPC_COLLECTIVE_H_
#define PAGETIDE_WORKER_GRPC_COLLECTIVE_H_

#include <atomic>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "base/clock.h"
#include "base/mutex.h"
#include "pagetide/v1/transfer.grpc.pb.h"
#include "worker/collective.h"
#include "worker/group_mailbox.h"
#include "worker/model_host.h"

namespace pagetide {

class GrpcCollective final : public Collective {
 public:
  struct Options {
    std::string group_id;  // 1 to 128 bytes; of all members, and of no other group ever
    uint32_t rank = 0;
    std::vector<std::string> addresses;  // [rank] gRPC addresses
    Tenant tenant;
  };
  // INVALID_ARGUMENT. Mailbox and clock outlive it.
  static absl::StatusOr<std::unique_ptr<GrpcCollective>> Create(Options options,
                                                                GroupMailbox* mailbox,
                                                                const Clock* clock);

  absl::string_view name() const override { return "grpc"; }
  uint32_t rank() const override { return options_.rank; }
  uint32_t size() const override { return static_cast<uint32_t>(options_.addresses.size()); }
  // Down a tree of pairs: as many rounds as the size has bits.
  absl::Status Broadcast(uint32_t root, const CollectiveBuffer& buffer,
                         MonotonicTime deadline) override;
  absl::Status Send(uint32_t to, const CollectiveBuffer& buffer, MonotonicTime deadline) override;
  absl::Status Receive(uint32_t from, const CollectiveBuffer& buffer,
                       MonotonicTime deadline) override;
  void Abort() override;

 private:
  struct Pair {
    std::unique_ptr<v1::TransferService::Stub> stub;  // dialled by the first send
    uint64_t num_sent = 0;
    uint64_t num_received = 0;
  };
  GrpcCollective(Options options, GroupMailbox* mailbox, const Clock* clock);
  absl::Status CheckRank(absl::string_view field, uint32_t rank) const;
  absl::Status CheckWhole() const;
  // `status`, after it has broken the group if it is an error.
  absl::Status Broken(absl::Status status);
  absl::Status SendNow(uint32_t to, const CollectiveBuffer& buffer, MonotonicTime deadline);
  absl::Status ReceiveNow(uint32_t from, const CollectiveBuffer& buffer, MonotonicTime deadline);

  const Options options_;
  GroupMailbox* const mailbox_;
  const Clock* const clock_;
  std::vector<Pair> pairs_;  // [rank]; of the caller, which is one at a time
  std::atomic<bool> is_broken_{false};
  Mutex mu_;
  grpc::ClientContext* sending_ ABSL_GUARDED_BY(mu_) = nullptr;  // for Abort
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_GRPC_COLLECTIVE_H_
