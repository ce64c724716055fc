#include "worker/shard_peers.h"

#include "absl/strings/str_cat.h"
#include "absl/time/time.h"
#include "base/error_info.h"
#include "base/status_context.h"
#include "core/sequence_id.h"
#include "rpc/channel.h"

namespace pagetide {
namespace {

constexpr size_t kMaxNameBytes = 256;
constexpr size_t kMaxExplanationBytes = 1024;

// In front of a character, as strings of messages are UTF-8.
void CutText(std::string* text, size_t max_bytes) {
  if (text->size() <= max_bytes) return;
  size_t end = max_bytes;
  while (end > 0 && ((*text)[end] & 0xC0) == 0x80) --end;
  text->resize(end);
}

std::string NameOf(uint32_t rank, absl::string_view address) {
  return absl::StrCat("rank ", rank, " at ", address);
}

}  // namespace

ShardPeer::ShardPeer(const std::string& address) {
  const std::shared_ptr<grpc::Channel> channel = MakeChannel(address);
  prefixes = v1::PrefixService::NewStub(channel);
  sequences = v1::SequenceService::NewStub(channel);
  edits = v1::SequenceEditService::NewStub(channel);
  groups = v1::ShardGroupService::NewStub(channel);
}

std::shared_ptr<ShardPeer> ShardPeers::At(const std::string& address) {
  // Given up outside of the lock: the end of a channel may close its connection.
  std::shared_ptr<ShardPeer> given_up;
  MutexLock lock(&mu_);
  if (const auto it = peers_.find(address); it != peers_.end()) {
    by_use_.splice(by_use_.end(), by_use_, it->second);
    return it->second->second;
  }
  if (peers_.size() >= max_peers_) {
    given_up = std::move(by_use_.front().second);
    peers_.erase(by_use_.front().first);
    by_use_.pop_front();
  }
  const auto at = by_use_.emplace(by_use_.end(), address, std::make_shared<ShardPeer>(address));
  peers_.emplace(address, at);
  return at->second;
}

size_t ShardPeers::size() const {
  MutexLock lock(&mu_);
  return peers_.size();
}

absl::Status ErrorOfRank(uint32_t rank, absl::string_view address, const absl::Status& status) {
  absl::Status named = WithContext(NameOf(rank, address), status);
  if (GetReason(status) != error_reason::kStaleEpoch) return named;
  return WithReason(
      absl::FailedPreconditionError(absl::StrCat(
          named.message(), "; its sequence has had another owner since the group was open")),
      "SHARD_STALE", {{"rank", absl::StrCat(rank)}});
}

absl::Status CheckState(uint32_t rank, absl::string_view address, absl::string_view sequence_id,
                        v1::SequenceState* state) {
  // Of an answer without a state the id is empty.
  if (!SequenceId::Parse(state->sequence_id()).ok() ||
      (!sequence_id.empty() && state->sequence_id() != sequence_id)) {
    return absl::InternalError(absl::StrCat(
        NameOf(rank, address), ": the sequence id of its answer, of ", state->sequence_id().size(),
        " bytes, is ", sequence_id.empty() ? "none" : "not that of the group's rank"));
  }
  state->DiscardUnknownFields();
  CutText(state->mutable_worker_id(), kMaxNameBytes);
  CutText(state->mutable_model_digest(), kMaxNameBytes);
  return absl::OkStatus();
}

void CutReuse(v1::PrefixReuse* reuse) {
  reuse->DiscardUnknownFields();
  CutText(reuse->mutable_explanation(), kMaxExplanationBytes);
}

RequestBudget::Held::~Held() {
  MutexLock lock(&budget_->mu_);
  budget_->held_bytes_ -= num_bytes_;
}

absl::StatusOr<std::unique_ptr<RequestBudget::Held>> RequestBudget::Take(uint64_t num_bytes) {
  MutexLock lock(&mu_);
  const bool has_room = held_bytes_ <= max_bytes_ && num_bytes <= max_bytes_ - held_bytes_;
  if (held_bytes_ > 0 && !has_room) {
    return WithRetryDelay(
        WithReason(absl::ResourceExhaustedError(absl::StrCat(
                       "shard group: requests to its other ranks need ", num_bytes, " bytes, ",
                       held_bytes_, " are held for others, the limit is ", max_bytes_)),
                   "TOO_MANY_SHARD_GROUP_CALLS"),
        absl::Seconds(1));
  }
  held_bytes_ += num_bytes;
  return std::unique_ptr<Held>(new Held(this, num_bytes));
}

}  // namespace pagetide
