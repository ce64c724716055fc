// Replicated KV: ranks whose shard is the same as rank 0's get its pages from its frames, so that a
// group reads the store once. And the two calls that need no group.
#include <pthread.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/status_macros.h"
#include "worker/service_support.h"
#include "worker/shard_group_opening.h"

namespace pagetide {
namespace {

// One sends as fast as the network of this worker takes it; a few hide the round trips.
constexpr size_t kMaxShareThreads = 4;

bool HasSamePages(const Model& a, const Model& b) {
  const PageGeometry& x = a.geometry();
  const PageGeometry& y = b.geometry();
  if (a.identity() != b.identity() || x.page_tokens() != y.page_tokens() ||
      x.num_groups() != y.num_groups()) {
    return false;
  }
  for (uint32_t g = 0; g < x.num_groups(); ++g) {
    if (x.group(g).fingerprint() != y.group(g).fingerprint()) return false;
  }
  return true;
}

}  // namespace

std::vector<uint32_t> ShardGroupOwner::Opening::FindReplicas(MonotonicTime deadline) const {
  std::vector<uint32_t> replicas;
  for (uint32_t rank = 1; rank < num_ranks(); ++rank) {
    if (last_reuse_[rank].store_tokens() == 0) continue;
    const std::string& digest = ranks_[rank].model_digest;
    Worker* const worker = owner_->worker_;
    if (const ModelHost* host = worker->FindHost(digest)) {
      if (HasSamePages(host->model(), host_->model())) replicas.push_back(rank);
      continue;
    }
    if (!CheckCaller().ok() || worker->clock().MonotonicNow() >= deadline) return {};
    // Its registration is enough; without it the rank reads for itself.
    const absl::StatusOr<Model> model = worker->ReadModel(*Digest::FromHex(digest), deadline);
    if (model.ok() && HasSamePages(*model, host_->model())) replicas.push_back(rank);
  }
  return replicas;
}

void ShardGroupOwner::Opening::Share(std::span<const uint32_t> replicas, MonotonicTime deadline) {
  const auto failed = [&](const absl::Status& status, absl::string_view what) {
    owner_->failed_shares_->Increment();
    LogInfo("worker", "open shard group: ", what,
            " reads the store for itself: ", status.message());
  };
  // What rank 0 reads itself is read once: not by its restore and by the sends too.
  const absl::Status ready = host_->WatchReadiness(
      caller_->tenant, own_.id, deadline,
      [&](const Readiness&) { return !caller_->is_cancelled || !caller_->is_cancelled(); });
  if (!ready.ok()) {
    for (uint32_t rank : replicas) failed(ready, absl::StrCat("rank ", rank));
    return;
  }
  std::atomic<size_t> next{0};  // hands out indices; the join orders all else
  std::atomic<uint64_t> sent_pages{0};
  const auto send = [&] {
    for (size_t i = next.fetch_add(1); i < replicas.size(); i = next.fetch_add(1)) {
      const Rank& rank = ranks_[replicas[i]];
      const absl::StatusOr<v1::SendSequenceResponse> sent =
          owner_->sender_->SendPages(caller_->tenant, host_, {.id = own_.id, .epoch = own_.epoch},
                                     *Digest::FromHex(rank.model_digest), rank.address, deadline);
      if (sent.ok()) {
        sent_pages.fetch_add(sent->sent_pages());
      } else {
        failed(sent.status(), absl::StrCat("rank ", replicas[i], " at ", rank.address));
      }
    }
  };
  std::vector<std::thread> threads;
  for (size_t i = 1; i < std::min(kMaxShareThreads, replicas.size()); ++i) {
    threads.emplace_back([&send] {
      pthread_setname_np(pthread_self(), "shard-share");
      send();
    });
  }
  send();
  for (std::thread& thread : threads) thread.join();
  owner_->shared_pages_->Add(static_cast<double>(sent_pages.load()));
  shared_pages_ += sent_pages.load();
}

absl::StatusOr<v1::LookupShardGroupResponse> ShardGroupOwner::Lookup(
    const ShardCaller& caller, const v1::LookupShardGroupRequest& request) {
  PT_ASSIGN_OR_RETURN(const auto slot, opening_slots_.Take(caller.tenant.name));
  PT_ASSIGN_OR_RETURN(std::vector<PositionedInput> inputs, InputsFromProto(request.inputs()));
  Opening opening(this, &caller, TokensOf(request.tokens()), std::move(inputs));
  PT_RETURN_IF_ERROR(opening.SetMembers(request.members()));
  PT_RETURN_IF_ERROR(opening.HoldRequests(request.ByteSizeLong()));
  PT_ASSIGN_OR_RETURN(const uint64_t length, opening.FindLength(request.allow_full_reuse()));
  v1::LookupShardGroupResponse response;
  response.set_reused_tokens(length);
  response.set_limiting_rank(opening.limiting_rank());
  for (const v1::PrefixReuse& reuse : opening.reuse()) *response.add_ranks() = reuse;
  return response;
}

absl::StatusOr<v1::OpenShardGroupResponse> ShardGroupOwner::Open(
    const ShardCaller& caller, const v1::OpenShardGroupRequest& request) {
  absl::StatusOr<v1::OpenShardGroupResponse> answer =
      memos_->OncePerTenant<v1::OpenShardGroupResponse>(caller.tenant.name, request.request_id(),
                                                        DigestOfMessage(request), caller.deadline,
                                                        [&] { return OpenOnce(caller, request); });
  Count("pagetide_shard_group_opens_total", "Opens of shard groups, by the code of the answer",
        answer.status());
  return answer;
}

absl::StatusOr<v1::OpenShardGroupResponse> ShardGroupOwner::OpenOnce(
    const ShardCaller& caller, const v1::OpenShardGroupRequest& request) {
  PT_ASSIGN_OR_RETURN(const auto slot, opening_slots_.Take(caller.tenant.name));
  PT_ASSIGN_OR_RETURN(std::vector<PositionedInput> inputs, InputsFromProto(request.inputs()));
  Opening opening(this, &caller, TokensOf(request.tokens()), std::move(inputs));
  PT_RETURN_IF_ERROR(opening.SetMembers(request.members()));
  PT_RETURN_IF_ERROR(opening.CheckOwnShard());
  PT_RETURN_IF_ERROR(groups_.CheckRoom(caller.tenant.name));
  PT_RETURN_IF_ERROR(opening.HoldRequests(request.ByteSizeLong()));
  uint64_t length = 0;
  for (int attempt = 1;; ++attempt) {
    // A sequence that reuses nothing has nothing to lose.
    const bool is_last = attempt >= options_.max_opens;
    length = 0;
    if (!request.no_reuse() && !is_last) {
      PT_ASSIGN_OR_RETURN(length, opening.FindLength(request.allow_full_reuse()));
    }
    PT_ASSIGN_OR_RETURN(const bool is_open, opening.OpenAll(length, !request.no_sharing()));
    if (is_open) break;
    if (is_last) {
      return absl::AbortedError("open shard group: a rank got tokens before the group was open");
    }
  }
  PT_RETURN_IF_ERROR(opening.Add());
  num_groups_gauge_->Set(static_cast<double>(groups_.size()));
  v1::OpenShardGroupResponse response;
  *response.mutable_group() = opening.ToProto();
  response.set_reused_tokens(length);
  response.set_limiting_rank(opening.limiting_rank());
  for (const v1::PrefixReuse& reuse : opening.reuse()) *response.add_ranks() = reuse;
  response.set_shared_pages(opening.shared_pages());
  return response;
}

}  // namespace pagetide
