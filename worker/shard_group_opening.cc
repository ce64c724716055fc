#include "worker/shard_group_opening.h"

#include <algorithm>
#include <set>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_context.h"
#include "base/status_macros.h"
#include "worker/close_sequence.h"
#include "worker/service_support.h"
#include "worker/transfer_wire.h"

namespace pagetide {
namespace {

constexpr int kMinMembers = 2;
constexpr int kMaxMembers = 64;
constexpr size_t kMaxAddressBytes = 1024;

absl::Status ShardMismatch(absl::string_view who, absl::string_view what) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat("open shard group: ", who, what)),
                    "SHARD_MISMATCH");
}

// The call may have had its effect.
bool MayHaveOpened(const absl::Status& status) {
  return absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status) ||
         absl::IsCancelled(status) || absl::IsUnknown(status) || absl::IsInternal(status);
}

uint32_t ShortestOf(const std::vector<v1::PrefixReuse>& reuse) {
  const auto shortest = std::min_element(
      reuse.begin(), reuse.end(),
      [](const auto& a, const auto& b) { return a.reused_tokens() < b.reused_tokens(); });
  return static_cast<uint32_t>(shortest - reuse.begin());
}

}  // namespace

absl::Status ShardGroupOwner::Opening::SetMembers(
    const google::protobuf::RepeatedPtrField<v1::ShardMember>& members) {
  if (members.size() < kMinMembers || members.size() > kMaxMembers) {
    return absl::InvalidArgumentError(absl::StrCat(
        "members has ", members.size(), " entries, must have ", kMinMembers, " to ", kMaxMembers));
  }
  std::set<std::string> models;
  for (int i = 0; i < members.size(); ++i) {
    const v1::ShardMember& member = members[i];
    if (i > 0 && (member.address().empty() || member.address().size() > kMaxAddressBytes)) {
      return absl::InvalidArgumentError(absl::StrCat("members[", i, "].address has ",
                                                     member.address().size(),
                                                     " bytes, must have 1 to ", kMaxAddressBytes));
    }
    const absl::StatusOr<Digest> digest = Digest::FromHex(member.model_digest());
    if (!digest.ok()) {
      return absl::InvalidArgumentError(
          absl::StrCat("members[", i, "].model_digest: ", digest.status().message()));
    }
    // The rank is part of a model's digest.
    if (!models.insert(digest->ToHex()).second) {
      return absl::InvalidArgumentError(
          absl::StrCat("members[", i,
                       "].model_digest is another member's too: each rank has a model of its own"));
    }
    ranks_.push_back({.address = i == 0 ? "" : member.address(), .model_digest = digest->ToHex()});
  }
  PT_ASSIGN_OR_RETURN(host_,
                      owner_->worker_->HostOfModel(ranks_.front().model_digest, caller_->deadline));
  v1::PrefixReuse none;
  none.set_prompt_tokens(tokens_.size());
  none.set_explanation("reuse was not wanted");
  reuse_.assign(num_ranks(), none);
  return absl::OkStatus();
}

absl::Status ShardGroupOwner::Opening::CheckOwnShard() const {
  const ShardSpec& shard = host_->model().spec().geometry.shard;
  if (shard.rank == 0 && shard.num_ranks == num_ranks()) return absl::OkStatus();
  return ShardMismatch("members[0]", absl::StrCat(" is rank ", shard.rank, " of ", shard.num_ranks,
                                                  ", must be rank 0 of ", num_ranks()));
}

absl::Status ShardGroupOwner::Opening::HoldRequests(uint64_t request_bytes) {
  PT_ASSIGN_OR_RETURN(held_requests_,
                      owner_->request_budget_.Take(request_bytes * (num_ranks() - 1)));
  return absl::OkStatus();
}

uint32_t ShardGroupOwner::Opening::limiting_rank() const {
  return ShortestOf(reuse_);
}

std::vector<PositionedInput> ShardGroupOwner::Opening::InputsBelow(uint64_t length) const {
  std::vector<PositionedInput> inputs;
  for (const PositionedInput& input : inputs_) {
    if (length == tokens_.size() || input.position < length) inputs.push_back(input);
  }
  return inputs;
}

absl::StatusOr<std::vector<v1::PrefixReuse>> ShardGroupOwner::Opening::AskReuse(
    uint64_t length, bool allow_full_reuse) {
  const std::vector<PositionedInput> inputs = InputsBelow(length);
  // First: it checks the prompt, which the others are not sent then.
  PT_ASSIGN_OR_RETURN(const PrefixReuse own,
                      host_->LookupPrefix(caller_->tenant, tokens_.first(length), inputs,
                                          {.allow_full_reuse = allow_full_reuse}));
  v1::LookupPrefixRequest request;
  request.mutable_tokens()->Add(tokens_.begin(), tokens_.begin() + length);
  for (const PositionedInput& input : inputs) {
    v1::InputDigest& proto = *request.add_inputs();
    proto.set_position(input.position);
    proto.set_digest(input.digest.ToBytes());
  }
  request.set_allow_full_reuse(allow_full_reuse);
  RankCalls<v1::LookupPrefixResponse> calls(&owner_->peers_, &owner_->worker_->clock());
  for (uint32_t rank = 1; rank < num_ranks(); ++rank) {
    request.set_model_digest(ranks_[rank].model_digest);
    calls.Start(rank, ranks_[rank].address, &ShardPeer::prefixes,
                &v1::PrefixService::Stub::PrepareAsyncLookupPrefix, request, caller_->deadline);
  }
  std::vector<v1::PrefixReuse> reuse = {ReuseToProto(own)};
  for (auto& answer : calls.Wait(caller_->is_cancelled)) {
    PT_RETURN_IF_ERROR(answer.response.status());
    CutReuse(answer.response->mutable_reuse());
    reuse.push_back(std::move(*answer.response->mutable_reuse()));
  }
  return reuse;
}

absl::StatusOr<uint64_t> ShardGroupOwner::Opening::FindLength(bool allow_full_reuse) {
  PT_ASSIGN_OR_RETURN(reuse_, AskReuse(tokens_.size(), allow_full_reuse));
  uint64_t length = std::min<uint64_t>(reuse_[limiting_rank()].reused_tokens(), tokens_.size());
  // Windows, states and rows of a page that begins alike: a rank that can reuse more need not be
  // able to reuse exactly so many.
  for (int i = 0; length > 0 && i < owner_->options_.max_lookups; ++i) {
    PT_ASSIGN_OR_RETURN(last_reuse_, AskReuse(length, /*allow_full_reuse=*/true));
    const uint64_t shortest = last_reuse_[ShortestOf(last_reuse_)].reused_tokens();
    if (shortest >= length) return length;
    length = shortest;
  }
  return 0;
}

absl::Status ShardGroupOwner::Opening::CheckCaller() const {
  if (caller_->is_cancelled && caller_->is_cancelled()) {
    return absl::CancelledError("open shard group: the caller left");
  }
  if (owner_->worker_->clock().MonotonicNow() < caller_->deadline) return absl::OkStatus();
  return absl::DeadlineExceededError("open shard group: the deadline passed");
}

absl::Status ShardGroupOwner::Opening::OpenOwn(uint64_t length) {
  // All of the prompt where nothing is reused, so that it is checked all the same.
  const uint64_t num_tokens = length > 0 ? length : tokens_.size();
  PT_ASSIGN_OR_RETURN(
      const OpenResult opened,
      host_->Open(caller_->tenant, tokens_.first(num_tokens), InputsBelow(num_tokens),
                  {.allow_full_reuse = true, .no_reuse = length == 0}));
  own_ = opened.info;
  ranks_[0].state = StateToProto(*owner_->worker_, *host_, own_);
  owner_->worker_->NoteSequence(*host_, own_);
  return absl::OkStatus();
}

v1::OpenSequenceRequest ShardGroupOwner::Opening::OpenRequest(uint32_t rank) const {
  v1::OpenSequenceRequest request;
  request.set_request_id(absl::StrCat(open_id_, "-", rank));
  request.set_model_digest(ranks_[rank].model_digest);
  request.mutable_tokens()->Add(tokens_.begin(), tokens_.begin() + length_);
  for (const PositionedInput& input : inputs_) {
    if (input.position >= length_) continue;
    v1::InputDigest& proto = *request.add_inputs();
    proto.set_position(input.position);
    proto.set_digest(input.digest.ToBytes());
  }
  request.set_allow_full_reuse(true);
  request.set_no_reuse(length_ == 0);
  return request;
}

absl::Status ShardGroupOwner::Opening::TakeState(uint32_t rank, v1::OpenSequenceResponse answer) {
  PT_RETURN_IF_ERROR(CheckState(rank, ranks_[rank].address, "", answer.mutable_state()));
  ranks_[rank].state = std::move(*answer.mutable_state());
  return absl::OkStatus();
}

absl::Status ShardGroupOwner::Opening::OpenOthers() {
  RankCalls<v1::OpenSequenceResponse> calls(&owner_->peers_, &owner_->worker_->clock());
  for (uint32_t rank = 1; rank < num_ranks(); ++rank) {
    ranks_[rank].is_tried = true;
    calls.Start(rank, ranks_[rank].address, &ShardPeer::sequences,
                &v1::SequenceService::Stub::PrepareAsyncOpenSequence, OpenRequest(rank),
                caller_->deadline);
  }
  absl::Status first;
  for (auto& answer : calls.Wait(caller_->is_cancelled)) {
    Rank& rank = ranks_[answer.rank];
    if (answer.response.ok()) {
      first.Update(TakeState(answer.rank, *std::move(answer.response)));
    } else {
      rank.is_tried = MayHaveOpened(answer.response.status());
      first.Update(answer.response.status());
    }
  }
  return first;
}

absl::Status ShardGroupOwner::Opening::CheckShard(uint32_t rank,
                                                  const v1::AcknowledgeShardResponse& said) const {
  const Model& model = host_->model();
  const std::string who = absl::StrCat("rank ", rank, " at ", ranks_[rank].address);
  if (said.shard().rank() != rank || said.shard().num_ranks() != num_ranks()) {
    return ShardMismatch(
        who, absl::StrCat(" has a model of rank ", said.shard().rank(), " of ",
                          said.shard().num_ranks(), ", must be rank ", rank, " of ", num_ranks()));
  }
  if (said.page_tokens() != model.geometry().page_tokens()) {
    return ShardMismatch(who, absl::StrCat(" has pages of ", said.page_tokens(),
                                           " tokens, rank 0 of ", model.geometry().page_tokens()));
  }
  if (said.model_identity() == model.identity().ToBytes()) return absl::OkStatus();
  return ShardMismatch(who, " has other weights, tokenizer, adapters or numerics than rank 0");
}

absl::StatusOr<bool> ShardGroupOwner::Opening::CompareAll() {
  std::vector<ShardRank> ranks(1);
  for (uint32_t rank = 1; rank < num_ranks(); ++rank) {
    const v1::SequenceState& state = *ranks_[rank].state;
    ranks.push_back({ranks_[rank].address, state.sequence_id(), state.epoch()});
  }
  others_ = owner_->Acknowledge(*caller_, ranks, length_, caller_->deadline);
  absl::StatusOr<ContentDigest> own =
      host_->DigestContents(caller_->tenant, {.id = own_.id, .epoch = own_.epoch}, length_);
  bool is_whole = true;
  // What a restore found damaged or gone is not reused by the next attempt.
  const auto is_shorter = [](const absl::Status& status) {
    return GetReason(status) == "PREFIX_LOST";
  };
  for (const Acknowledged& other : others_) {
    if (is_shorter(other.response.status())) {
      is_whole = false;
      continue;
    }
    PT_RETURN_IF_ERROR(other.response.status());
    PT_RETURN_IF_ERROR(CheckShard(other.rank, *other.response));
    is_whole = is_whole && other.response->state().length() == length_;
  }
  if (is_shorter(own.status())) return false;
  if (!own.ok()) return WithContext("rank 0", own.status());
  own_ = own->info;
  if (!is_whole || own_.length != length_ || !own->digest) return false;
  std::string digest;
  SetChecksum(*own->digest, &digest);
  for (const Acknowledged& other : others_) {
    if (other.response->content_digest() == digest) continue;
    return ShardMismatch(absl::StrCat("rank ", other.rank, " at ", ranks_[other.rank].address),
                         " has other keys than rank 0 for the same tokens: is it of another "
                         "deployment secret?");
  }
  return true;
}

absl::StatusOr<bool> ShardGroupOwner::Opening::OpenAll(uint64_t length, bool is_sharing) {
  PT_RETURN_IF_ERROR(CheckCaller());
  length_ = length;
  open_id_ =
      absl::StrCat("shard-open-", absl::Hex(owner_->worker_->incarnation(), absl::kZeroPad16), "-",
                   owner_->next_request_.fetch_add(1));
  PT_RETURN_IF_ERROR(WithContext("rank 0", OpenOwn(length)));
  bool is_whole = own_.length == length;
  if (is_whole) {
    if (is_sharing && length > 0) {
      const MonotonicTime now = owner_->worker_->clock().MonotonicNow();
      if (!share_deadline_) {
        share_deadline_ =
            now + std::min(owner_->options_.share_timeout, (caller_->deadline - now) / 2);
      }
      const std::vector<uint32_t> replicas = FindReplicas(*share_deadline_);
      if (!replicas.empty()) Share(replicas, *share_deadline_);
    }
    PT_RETURN_IF_ERROR(OpenOthers());
    PT_ASSIGN_OR_RETURN(is_whole, CompareAll());
  }
  if (!is_whole) CloseAll();
  return is_whole;
}

absl::Status ShardGroupOwner::Opening::Add() {
  PT_RETURN_IF_ERROR(CheckCaller());
  group_ = {.id = own_.id, .epoch = own_.epoch, .length = length_};
  for (const Rank& rank : ranks_) {
    group_.ranks.push_back({rank.address, rank.state->sequence_id(), rank.state->epoch()});
  }
  PT_RETURN_IF_ERROR(owner_->groups_.Add(caller_->tenant.name, group_));
  for (Rank& rank : ranks_) {
    rank.is_tried = false;
    rank.state.reset();
  }
  return absl::OkStatus();
}

v1::ShardGroup ShardGroupOwner::Opening::ToProto() const {
  return owner_->ToProto(group_, {host_, own_}, others_);
}

void ShardGroupOwner::Opening::StartClose(RankCalls<v1::CloseSequenceResponse>* calls,
                                          uint32_t rank, MonotonicTime deadline) {
  v1::CloseSequenceRequest close;
  close.set_sequence_id(ranks_[rank].state->sequence_id());
  close.set_epoch(ranks_[rank].state->epoch());
  calls->Start(rank, ranks_[rank].address, &ShardPeer::sequences,
               &v1::SequenceService::Stub::PrepareAsyncCloseSequence, close, deadline);
  ranks_[rank].state.reset();
}

void ShardGroupOwner::Opening::CloseAll() {
  // Whatever became of the caller. Who does not answer takes no time from who does.
  const MonotonicTime now = owner_->worker_->clock().MonotonicNow();
  const MonotonicTime deadline = now + owner_->options_.close_timeout;
  RankCalls<v1::CloseSequenceResponse> closes(&owner_->peers_, &owner_->worker_->clock());
  // The same request again tells what the first of it opened.
  RankCalls<v1::OpenSequenceResponse> asks(&owner_->peers_, &owner_->worker_->clock());
  for (uint32_t rank = 1; rank < num_ranks(); ++rank) {
    if (ranks_[rank].state) {
      StartClose(&closes, rank, deadline);
    } else if (ranks_[rank].is_tried) {
      asks.Start(rank, ranks_[rank].address, &ShardPeer::sequences,
                 &v1::SequenceService::Stub::PrepareAsyncOpenSequence, OpenRequest(rank),
                 now + owner_->options_.close_timeout / 2);
    }
    ranks_[rank].is_tried = false;
  }
  if (!ranks_.empty() && ranks_[0].state) {
    CloseSequenceHere(owner_->worker_, owner_->parking_, owner_->memos_, caller_->tenant, host_,
                      own_.id, own_.epoch, deadline)
        .IgnoreError();  // its client is nobody: if not now, it ends when it has been idle
    ranks_[0].state.reset();
  }
  for (auto& asked : asks.Wait(nullptr)) {
    if (!asked.response.ok() || !TakeState(asked.rank, *std::move(asked.response)).ok()) continue;
    StartClose(&closes, asked.rank, deadline);
  }
  closes.Wait(nullptr);
}

}  // namespace pagetide
