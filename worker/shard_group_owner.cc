#include "worker/shard_group_owner.h"

#include <algorithm>
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

absl::Status ShardBehind(uint32_t rank, const std::string& address, uint64_t has, uint64_t wanted) {
  return WithReason(absl::FailedPreconditionError(absl::StrCat(
                        "commit shard group: rank ", rank, address.empty() ? "" : " at ", address,
                        " has ", has, " tokens, not ", wanted)),
                    "SHARD_BEHIND", {{"rank", absl::StrCat(rank)}, {"length", absl::StrCat(has)}});
}

ShardGroups::View ViewOf(const ShardGroups::Turn& turn) {
  return {turn.id(), turn.epoch(), turn.length(), turn.ranks()};
}

}  // namespace

ShardGroupOwner::ShardGroupOwner(Options options, Worker* worker, Parking* parking,
                                 RequestMemos* memos, SequenceSender* sender)
    : options_(options),
      worker_(worker),
      parking_(parking),
      memos_(memos),
      sender_(sender),
      peers_(options.max_peers),
      groups_(options.groups, &worker->clock()),
      opening_slots_({.what = "shard groups in opening",
                      .reason = "TOO_MANY_SHARD_GROUP_CALLS",
                      .in_all = options.max_opening,
                      .per_tenant = options.max_opening_of_tenant}),
      running_slots_({.what = "calls of shard groups",
                      .reason = "TOO_MANY_SHARD_GROUP_CALLS",
                      .in_all = options.max_running,
                      .per_tenant = options.max_running_of_tenant}),
      request_budget_(options.max_request_bytes),
      num_groups_gauge_(worker->metrics().GetGauge("pagetide_shard_group_open",
                                                   "Shard groups that this worker owns")),
      shared_pages_(worker->metrics().GetCounter(
          "pagetide_shard_group_shared_pages_total",
          "Pages that ranks of replicated KV got from rank 0 in place of the store")),
      failed_shares_(worker->metrics().GetCounter(
          "pagetide_shard_group_failed_shares_total",
          "Ranks of replicated KV that read the store because rank 0 could not send its pages")) {}

void ShardGroupOwner::Count(absl::string_view name, absl::string_view help,
                            const absl::Status& status) const {
  worker_->metrics()
      .GetCounter(name, help, {{"code", absl::StatusCodeToString(status.code())}})
      ->Increment();
}

absl::StatusOr<std::unique_ptr<ShardGroups::Turn>> ShardGroupOwner::TakeTurn(
    const ShardCaller& caller, const std::string& sequence_id, uint64_t epoch) {
  PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceIdFromProto(sequence_id));
  return groups_.TakeTurn(caller.tenant.name, id, epoch, caller.deadline);
}

void ShardGroupOwner::EndGroup(SequenceId id, uint64_t epoch) {
  groups_.End(id, epoch);
  num_groups_gauge_->Set(static_cast<double>(groups_.size()));
}

absl::StatusOr<ShardGroupOwner::Own> ShardGroupOwner::FindOwn(const ShardCaller& caller,
                                                              SequenceId id, uint64_t epoch) {
  if (const absl::StatusOr<ModelHost*> host = worker_->HostOfSequence(id); host.ok()) {
    const absl::StatusOr<SequenceInfo> info = (*host)->Get(caller.tenant, id);
    if (info.ok() && info->epoch == epoch) return Own{*host, *info};
  }
  EndGroup(id, epoch);
  return ShardGroups::NotFound(id, "it ended with the sequence of rank 0, which is not open here");
}

void ShardGroupOwner::EndGone() {
  for (const auto& [id, epoch] : groups_.List()) {
    if (!worker_->HostOfSequence(id).ok()) EndGroup(id, epoch);
  }
}

std::vector<ShardGroupOwner::Acknowledged> ShardGroupOwner::Acknowledge(
    const ShardCaller& caller, const std::vector<ShardRank>& ranks, uint64_t length,
    MonotonicTime deadline) {
  RankCalls<v1::AcknowledgeShardResponse> calls(&peers_, &worker_->clock());
  v1::AcknowledgeShardRequest request;
  request.set_length(length);
  for (uint32_t rank = 1; rank < ranks.size(); ++rank) {
    request.set_sequence_id(ranks[rank].sequence_id);
    request.set_epoch(ranks[rank].epoch);
    calls.Start(rank, ranks[rank].address, &ShardPeer::groups,
                &v1::ShardGroupService::Stub::PrepareAsyncAcknowledgeShard, request, deadline);
  }
  std::vector<Acknowledged> answers = calls.Wait(caller.is_cancelled);
  for (Acknowledged& answer : answers) {
    if (!answer.response.ok()) continue;
    const ShardRank& rank = ranks[answer.rank];
    const absl::Status checked =
        CheckState(answer.rank, rank.address, rank.sequence_id, answer.response->mutable_state());
    if (!checked.ok()) answer.response = checked;
  }
  return answers;
}

v1::ShardGroup ShardGroupOwner::ToProto(const ShardGroups::View& group, const Own& own,
                                        const std::vector<Acknowledged>& others) const {
  v1::ShardGroup proto;
  proto.set_sequence_id(group.id.ToString());
  proto.set_epoch(group.epoch);
  proto.set_length(group.length);
  *proto.add_ranks()->mutable_state() = StateToProto(*worker_, *own.host, own.info);
  for (const Acknowledged& other : others) {
    v1::ShardGroup::Rank& rank = *proto.add_ranks();
    rank.set_rank(other.rank);
    rank.set_address(group.ranks[other.rank].address);
    if (other.response.ok()) {
      *rank.mutable_state() = other.response->state();
      continue;
    }
    const ShardRank& known = group.ranks[other.rank];
    rank.mutable_state()->set_sequence_id(known.sequence_id);
    rank.mutable_state()->set_epoch(known.epoch);
    rank.set_code(static_cast<int32_t>(other.response.status().code()));
    rank.set_message(std::string(other.response.status().message()));
  }
  return proto;
}

absl::StatusOr<v1::ShardGroup> ShardGroupOwner::Describe(const ShardCaller& caller,
                                                         const ShardGroups::View& group) {
  const std::vector<Acknowledged> others = Acknowledge(caller, group.ranks, 0, caller.deadline);
  PT_ASSIGN_OR_RETURN(const Own own, FindOwn(caller, group.id, group.epoch));
  return ToProto(group, own, others);
}

absl::StatusOr<v1::CommitShardGroupResponse> ShardGroupOwner::Commit(
    const ShardCaller& caller, const v1::CommitShardGroupRequest& request) {
  absl::StatusOr<v1::CommitShardGroupResponse> answer = CommitOnce(caller, request);
  Count("pagetide_shard_group_commits_total",
        "Lengths that shard groups were to have, by the code of the answer", answer.status());
  return answer;
}

absl::StatusOr<v1::CommitShardGroupResponse> ShardGroupOwner::CommitOnce(
    const ShardCaller& caller, const v1::CommitShardGroupRequest& request) {
  PT_ASSIGN_OR_RETURN(const auto slot, running_slots_.Take(caller.tenant.name));
  PT_ASSIGN_OR_RETURN(const auto turn, TakeTurn(caller, request.sequence_id(), request.epoch()));
  PT_ASSIGN_OR_RETURN(const Own before, FindOwn(caller, turn->id(), turn->epoch()));
  v1::CommitShardGroupResponse response;
  if (request.length() == turn->length()) {
    PT_ASSIGN_OR_RETURN(*response.mutable_group(), Describe(caller, ViewOf(*turn)));
    return response;
  }
  if (request.length() < turn->length()) {
    return WithReason(absl::FailedPreconditionError(
                          absl::StrCat("commit shard group: length is ", request.length(),
                                       ", the group has ", turn->length(), " tokens already")),
                      "LENGTH_MISMATCH", {{"length", absl::StrCat(turn->length())}});
  }
  const std::vector<Acknowledged> others =
      Acknowledge(caller, turn->ranks(), request.length(), caller.deadline);
  for (const Acknowledged& other : others) PT_RETURN_IF_ERROR(other.response.status());
  // Rank 0 comes last: what it has then is compared.
  absl::StatusOr<ContentDigest> own = before.host->DigestContents(
      caller.tenant, {.id = turn->id(), .epoch = turn->epoch()}, request.length());
  if (!own.ok()) {
    PT_RETURN_IF_ERROR(FindOwn(caller, turn->id(), turn->epoch()).status());
    return WithContext("rank 0", own.status());
  }
  // Of several that are behind the shortest says how far the others would have to go back.
  uint32_t shortest = 0;
  uint64_t least = own->digest ? request.length() : own->info.length;
  for (const Acknowledged& other : others) {
    if (!other.response->content_digest().empty()) continue;
    if (other.response->state().length() >= least) continue;
    shortest = other.rank;
    least = other.response->state().length();
  }
  if (least < request.length()) {
    return ShardBehind(shortest, turn->ranks()[shortest].address, least, request.length());
  }
  std::string digest;
  SetChecksum(*own->digest, &digest);
  for (const Acknowledged& other : others) {
    if (other.response->content_digest() == digest) continue;
    return WithReason(
        absl::FailedPreconditionError(absl::StrCat(
            "commit shard group: of its first ", request.length(), " tokens rank ", other.rank,
            " at ", turn->ranks()[other.rank].address,
            " has others than rank 0, or other positions or inputs, or was edited otherwise")),
        "SHARD_DIVERGED", {{"rank", absl::StrCat(other.rank)}});
  }
  turn->SetLength(request.length());
  *response.mutable_group() = ToProto(ViewOf(*turn), {before.host, own->info}, others);
  return response;
}

absl::StatusOr<v1::RewindShardGroupResponse> ShardGroupOwner::Rewind(
    const ShardCaller& caller, const v1::RewindShardGroupRequest& request) {
  absl::StatusOr<v1::RewindShardGroupResponse> answer = RewindOnce(caller, request);
  Count("pagetide_shard_group_rewinds_total",
        "Shard groups that were to be cut, by the code of the answer", answer.status());
  return answer;
}

absl::StatusOr<v1::RewindShardGroupResponse> ShardGroupOwner::RewindOnce(
    const ShardCaller& caller, const v1::RewindShardGroupRequest& request) {
  PT_ASSIGN_OR_RETURN(const auto slot, running_slots_.Take(caller.tenant.name));
  PT_ASSIGN_OR_RETURN(const auto turn, TakeTurn(caller, request.sequence_id(), request.epoch()));
  PT_ASSIGN_OR_RETURN(Own own, FindOwn(caller, turn->id(), turn->epoch()));
  const uint64_t length = request.length();
  // A repeat asks for what the first of it did.
  if (length > turn->cut_length()) {
    return absl::InvalidArgumentError(absl::StrCat("rewind shard group: length is ", length,
                                                   ", must be at most the group's, ",
                                                   turn->length()));
  }
  // It alone can refuse before anything has changed.
  if (own.info.length > length) {
    const absl::StatusOr<RewindResult> cut = own.host->Rewind(
        caller.tenant, {.id = turn->id(), .epoch = turn->epoch()}, static_cast<int64_t>(length));
    if (!cut.ok()) {
      PT_RETURN_IF_ERROR(FindOwn(caller, turn->id(), turn->epoch()).status());
      return WithContext("rank 0", cut.status());
    }
    own.info = cut->info;
    worker_->NoteSequence(*own.host, own.info);
  }
  uint64_t least = std::min({length, turn->length(), own.info.length});
  turn->SetLengths(least, length);
  // Who does not answer leaves the others time to be cut.
  const MonotonicTime now = worker_->clock().MonotonicNow();
  std::vector<Acknowledged> others =
      Acknowledge(caller, turn->ranks(), 0, now + (caller.deadline - now) / 2);
  absl::Status first;  // of those that did not answer, before those that could not be cut
  for (const Acknowledged& other : others) first.Update(other.response.status());
  RankCalls<v1::RewindResponse> cuts(&peers_, &worker_->clock());
  const std::string request_id =
      absl::StrCat("shard-rewind-", absl::Hex(worker_->incarnation(), absl::kZeroPad16), "-",
                   next_request_.fetch_add(1), "-");
  for (const Acknowledged& other : others) {
    if (!other.response.ok() || other.response->state().length() <= length) continue;
    v1::RewindRequest cut;
    cut.set_request_id(absl::StrCat(request_id, other.rank));
    cut.mutable_sequence()->set_sequence_id(turn->ranks()[other.rank].sequence_id);
    cut.mutable_sequence()->set_epoch(turn->ranks()[other.rank].epoch);
    cut.set_length(static_cast<int64_t>(length));
    cuts.Start(other.rank, turn->ranks()[other.rank].address, &ShardPeer::edits,
               &v1::SequenceEditService::Stub::PrepareAsyncRewind, cut, caller.deadline);
  }
  for (auto& cut : cuts.Wait(caller.is_cancelled)) {
    const ShardRank& rank = turn->ranks()[cut.rank];
    absl::Status status = cut.response.status();
    if (status.ok()) {
      status = CheckState(cut.rank, rank.address, rank.sequence_id, cut.response->mutable_state());
    }
    if (status.ok()) {
      *others[cut.rank - 1].response->mutable_state() = std::move(*cut.response->mutable_state());
    }
    first.Update(status);
  }
  for (const Acknowledged& other : others) {
    if (other.response.ok()) least = std::min(least, other.response->state().length());
  }
  turn->SetLengths(least, length);
  PT_RETURN_IF_ERROR(first);
  v1::RewindShardGroupResponse response;
  *response.mutable_group() = ToProto(ViewOf(*turn), own, others);
  return response;
}

absl::StatusOr<v1::GetShardGroupResponse> ShardGroupOwner::Get(
    const ShardCaller& caller, const v1::GetShardGroupRequest& request) {
  PT_ASSIGN_OR_RETURN(const auto slot, running_slots_.Take(caller.tenant.name));
  PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceIdFromProto(request.sequence_id()));
  PT_ASSIGN_OR_RETURN(const ShardGroups::View group, groups_.Find(caller.tenant.name, id));
  PT_RETURN_IF_ERROR(FindOwn(caller, id, group.epoch).status());
  v1::GetShardGroupResponse response;
  PT_ASSIGN_OR_RETURN(*response.mutable_group(), Describe(caller, group));
  return response;
}

absl::StatusOr<v1::CloseShardGroupResponse> ShardGroupOwner::Close(
    const ShardCaller& caller, const v1::CloseShardGroupRequest& request) {
  PT_ASSIGN_OR_RETURN(const auto slot, running_slots_.Take(caller.tenant.name));
  const absl::StatusOr<std::unique_ptr<ShardGroups::Turn>> turn =
      TakeTurn(caller, request.sequence_id(), request.epoch());
  v1::CloseShardGroupResponse response;
  if (absl::IsNotFound(turn.status())) {
    PT_ASSIGN_OR_RETURN(const SequenceId id, SequenceIdFromProto(request.sequence_id()));
    // One of ours that is not open is closed; it may be parked, or its close have ended halfway.
    if (id.incarnation != worker_->incarnation() || worker_->HostOfSequence(id).ok()) {
      return turn.status();
    }
    PT_RETURN_IF_ERROR(
        parking_->Drop(caller.tenant, id, request.epoch(), caller.deadline).status());
    return response;
  }
  PT_RETURN_IF_ERROR(turn.status());
  const ShardGroups::View group = ViewOf(**turn);
  // Rank 0 first: while it is being moved it cannot be closed, and then the group goes on.
  absl::Status own_closed;
  if (const absl::StatusOr<Own> own = FindOwn(caller, group.id, group.epoch); own.ok()) {
    own_closed =
        WithContext("rank 0", CloseSequenceHere(worker_, parking_, memos_, caller.tenant, own->host,
                                                group.id, group.epoch, caller.deadline));
    // Where it is closed, and only what is parked of it stayed, the group ends all the same.
    if (!own_closed.ok() && FindOwn(caller, group.id, group.epoch).ok()) return own_closed;
  }
  EndGroup(group.id, group.epoch);
  RankCalls<v1::CloseSequenceResponse> calls(&peers_, &worker_->clock());
  // Whether or not the caller waits for it: nobody could ask for the rest again.
  const MonotonicTime deadline = worker_->clock().MonotonicNow() + options_.close_timeout;
  for (uint32_t rank = 1; rank < group.ranks.size(); ++rank) {
    v1::CloseSequenceRequest close;
    close.set_sequence_id(group.ranks[rank].sequence_id);
    close.set_epoch(group.ranks[rank].epoch);
    calls.Start(rank, group.ranks[rank].address, &ShardPeer::sequences,
                &v1::SequenceService::Stub::PrepareAsyncCloseSequence, close, deadline);
  }
  for (const auto& closed : calls.Wait(nullptr)) {
    // NOT_FOUND: another process serves there by now, and the sequence ended with the one before.
    if (closed.response.ok() || absl::IsNotFound(closed.response.status())) continue;
    response.add_unreachable_ranks(closed.rank);
  }
  PT_RETURN_IF_ERROR(own_closed);
  return response;
}

}  // namespace pagetide
