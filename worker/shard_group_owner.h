// ShardGroupOwner: the worker of rank 0 of a shard group: it asks the workers of the other ranks,
// and decides what all of them have. Its own rank it serves by the domain, the others by the public
// services of their workers.
//
// Thread-safe. What the constructor takes outlives it.
#ifndef PAGETIDE_WORKER_SHARD_GROUP_OWNER_H_
#define PAGETIDE_WORKER_SHARD_GROUP_OWNER_H_

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/metrics.h"
#include "pagetide/v1/shard_group.pb.h"
#include "worker/parking.h"
#include "worker/request_memos.h"
#include "worker/sequence_sender.h"
#include "worker/shard_groups.h"
#include "worker/shard_peers.h"
#include "worker/stream_slots.h"
#include "worker/worker.h"

namespace pagetide {

// Who calls, until when, and whether they still do.
struct ShardCaller {
  Tenant tenant;
  MonotonicTime deadline;
  std::function<bool()> is_cancelled;  // may be null
};

class ShardGroupOwner {
 public:
  struct Options {
    ShardGroups::Options groups;
    size_t max_peers = 1024;
    // For closing what others had opened before an open failed, and for the others' part of a
    // close.
    absl::Duration close_timeout = absl::Seconds(3);
    // How long an open waits at most for rank 0's restore, and for its pages to be with the other
    // ranks; and never longer than half of what its caller gives it.
    absl::Duration share_timeout = absl::Seconds(10);
    // Until all ranks can reuse the same length, which is at most what all said before; then 0.
    int max_lookups = 8;
    // A rank may have lost what it said it had. The last of them reuses nothing.
    int max_opens = 3;
    uint32_t max_opening = 128;
    uint32_t max_opening_of_tenant = 64;
    uint32_t max_running = 1024;
    uint32_t max_running_of_tenant = 512;
    // Of the prompts that all opens and look-ups hold for the other ranks, once for each rank. One
    // that has more runs alone.
    uint64_t max_request_bytes = uint64_t{1} << 30;
  };
  ShardGroupOwner(Options options, Worker* worker, Parking* parking, RequestMemos* memos,
                  SequenceSender* sender);

  // Errors: see ShardGroupService.
  absl::StatusOr<v1::LookupShardGroupResponse> Lookup(const ShardCaller& caller,
                                                      const v1::LookupShardGroupRequest& request);
  absl::StatusOr<v1::OpenShardGroupResponse> Open(const ShardCaller& caller,
                                                  const v1::OpenShardGroupRequest& request);
  absl::StatusOr<v1::CommitShardGroupResponse> Commit(const ShardCaller& caller,
                                                      const v1::CommitShardGroupRequest& request);
  absl::StatusOr<v1::RewindShardGroupResponse> Rewind(const ShardCaller& caller,
                                                      const v1::RewindShardGroupRequest& request);
  absl::StatusOr<v1::GetShardGroupResponse> Get(const ShardCaller& caller,
                                                const v1::GetShardGroupRequest& request);
  absl::StatusOr<v1::CloseShardGroupResponse> Close(const ShardCaller& caller,
                                                    const v1::CloseShardGroupRequest& request);
  // Groups end whose sequence of rank 0 is not open any more. From a ticker.
  void EndGone();
  size_t num_groups() const { return groups_.size(); }

 private:
  class Opening;  // shard_group_opening.cc
  using Acknowledged = RankCalls<v1::AcknowledgeShardResponse>::Answer;
  // Rank 0's sequence, which is open here.
  struct Own {
    ModelHost* host = nullptr;
    SequenceInfo info;
  };

  absl::StatusOr<v1::OpenShardGroupResponse> OpenOnce(const ShardCaller& caller,
                                                      const v1::OpenShardGroupRequest& request);
  absl::StatusOr<v1::CommitShardGroupResponse> CommitOnce(
      const ShardCaller& caller, const v1::CommitShardGroupRequest& request);
  absl::StatusOr<v1::RewindShardGroupResponse> RewindOnce(
      const ShardCaller& caller, const v1::RewindShardGroupRequest& request);

  absl::StatusOr<std::unique_ptr<ShardGroups::Turn>> TakeTurn(const ShardCaller& caller,
                                                              const std::string& sequence_id,
                                                              uint64_t epoch);
  // NOT_FOUND (SHARD_GROUP_NOT_FOUND), and the group has ended, when it is not open any more.
  absl::StatusOr<Own> FindOwn(const ShardCaller& caller, SequenceId id, uint64_t epoch);
  void EndGroup(SequenceId id, uint64_t epoch);
  // Of all ranks but rank 0, in order: answers[i] is of rank i + 1.
  std::vector<Acknowledged> Acknowledge(const ShardCaller& caller,
                                        const std::vector<ShardRank>& ranks, uint64_t length,
                                        MonotonicTime deadline);
  // Each rank as it is now.
  absl::StatusOr<v1::ShardGroup> Describe(const ShardCaller& caller,
                                          const ShardGroups::View& group);
  v1::ShardGroup ToProto(const ShardGroups::View& group, const Own& own,
                         const std::vector<Acknowledged>& others) const;
  void Count(absl::string_view name, absl::string_view help, const absl::Status& status) const;

  const Options options_;
  Worker* const worker_;
  Parking* const parking_;
  RequestMemos* const memos_;
  SequenceSender* const sender_;
  ShardPeers peers_;
  ShardGroups groups_;
  StreamSlots opening_slots_;
  StreamSlots running_slots_;
  RequestBudget request_budget_;
  Gauge* const num_groups_gauge_;
  Counter* const shared_pages_;
  Counter* const failed_shares_;
  std::atomic<uint64_t> next_request_{1};  // its own order matters to nobody
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SHARD_GROUP_OWNER_H_
