// ShardGroupOwner::Opening: one group on its way to being open: what its ranks can reuse, and the
// sequences that are open for it, which are closed again unless the group comes to be. Private to
// the owner.
#ifndef PAGETIDE_WORKER_SHARD_GROUP_OPENING_H_
#define PAGETIDE_WORKER_SHARD_GROUP_OPENING_H_

#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "worker/shard_group_owner.h"

namespace pagetide {

// For one thread. Lives no longer than the call.
class ShardGroupOwner::Opening {
 public:
  Opening(ShardGroupOwner* owner, const ShardCaller* caller, std::span<const uint32_t> tokens,
          std::vector<PositionedInput> inputs)
      : owner_(owner), caller_(caller), tokens_(tokens), inputs_(std::move(inputs)) {}
  ~Opening() { CloseAll(); }

  // INVALID_ARGUMENT (members), errors of Worker::HostOfModel.
  absl::Status SetMembers(const google::protobuf::RepeatedPtrField<v1::ShardMember>& members);
  // FAILED_PRECONDITION (SHARD_MISMATCH).
  absl::Status CheckOwnShard() const;
  // Counts the requests to the other ranks, each of about so many bytes, while this lives.
  // RESOURCE_EXHAUSTED (TOO_MANY_SHARD_GROUP_CALLS).
  absl::Status HoldRequests(uint64_t request_bytes);
  // What all ranks can reuse of the prompt.
  absl::StatusOr<uint64_t> FindLength(bool allow_full_reuse);
  // Opens all ranks with `length` tokens. False: a rank could not reuse so many any more, and none
  // is open. `is_sharing`: rank 0 sends ranks with the same shard what they would read from the
  // store.
  absl::StatusOr<bool> OpenAll(uint64_t length, bool is_sharing);
  // The group comes to be.
  absl::Status Add();

  // What each rank can reuse by itself, which rank the least, and pages sent in place of the store.
  const std::vector<v1::PrefixReuse>& reuse() const { return reuse_; }
  uint32_t limiting_rank() const;
  uint64_t shared_pages() const { return shared_pages_; }
  v1::ShardGroup ToProto() const;

 private:
  struct Rank {
    std::string address;
    std::string model_digest;
    bool is_tried = false;  // it may be open, though it did not say so
    std::optional<v1::SequenceState> state;
  };

  uint32_t num_ranks() const { return static_cast<uint32_t>(ranks_.size()); }
  std::vector<PositionedInput> InputsBelow(uint64_t length) const;
  // Of the first `length` tokens, by each rank.
  absl::StatusOr<std::vector<v1::PrefixReuse>> AskReuse(uint64_t length, bool allow_full_reuse);
  absl::Status OpenOwn(uint64_t length);
  v1::OpenSequenceRequest OpenRequest(uint32_t rank) const;
  // Ranks whose pages are the same as rank 0's and that would read some from the store. None when
  // that is not known by `deadline`.
  std::vector<uint32_t> FindReplicas(MonotonicTime deadline) const;
  void Share(std::span<const uint32_t> replicas, MonotonicTime deadline);
  absl::Status OpenOthers();
  absl::Status TakeState(uint32_t rank, v1::OpenSequenceResponse answer);
  void StartClose(RankCalls<v1::CloseSequenceResponse>* calls, uint32_t rank,
                  MonotonicTime deadline);
  // False: one is shorter than it was opened.
  absl::StatusOr<bool> CompareAll();
  absl::Status CheckShard(uint32_t rank, const v1::AcknowledgeShardResponse& said) const;
  absl::Status CheckCaller() const;
  void CloseAll();

  ShardGroupOwner* const owner_;
  const ShardCaller* const caller_;
  const std::span<const uint32_t> tokens_;
  const std::vector<PositionedInput> inputs_;
  ModelHost* host_ = nullptr;  // of rank 0's model
  std::vector<Rank> ranks_;
  std::vector<v1::PrefixReuse> reuse_;       // of the whole prompt
  std::vector<v1::PrefixReuse> last_reuse_;  // of the length that all agreed on
  std::string open_id_;                      // of this attempt
  uint64_t length_ = 0;
  SequenceInfo own_;  // if ranks_[0].state
  std::vector<Acknowledged> others_;
  ShardGroups::View group_;  // once it came to be
  uint64_t shared_pages_ = 0;
  std::optional<MonotonicTime> share_deadline_;  // of all attempts, from the first share
  std::unique_ptr<RequestBudget::Held> held_requests_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_SHARD_GROUP_OPENING_H_
