// Router's decisions for a group of workers: which engine can start a prompt over shards soonest.
#include <algorithm>
#include <map>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "absl/types/span.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "core/rank_models.h"
#include "core/router.h"
#include "core/shard_placement.h"

namespace pagetide {
namespace {

// What a text of reasons names at most: a fleet may have dozens of groups of dozens of ranks.
// gRPC carries a status in a header of at most 8 KiB, the text in it twice.
constexpr size_t kMaxFaultsNamed = 4;
constexpr size_t kMaxReasonBytes = 512;  // after which no further group is named

using WorkersOfRank = std::vector<const WorkerRecord*>;

// The worker that serves a rank with its model, or why there is none.
struct RankServer {
  const WorkerRecord* worker = nullptr;
  std::string fault;
};

// `workers`: all that are known of the rank, dead ones among them.
RankServer ServerOf(const WorkersOfRank& workers, const RankModel& model) {
  const WorkerRecord* live = nullptr;
  for (const WorkerRecord* worker : workers) {
    if (worker->state == WorkerState::kDead) continue;
    if (live != nullptr) {
      return {.fault = absl::StrCat("two live workers, ", live->hello->worker_id, " and ",
                                    worker->hello->worker_id)};
    }
    live = worker;
  }
  if (workers.empty()) return {.fault = "no worker"};
  const WorkerRecord& worker = live != nullptr ? *live : *workers.front();
  const std::string& id = worker.hello->worker_id;
  const std::string why = WhyNotServing(worker);
  if (!why.empty()) return {.fault = absl::StrCat(id, " ", why)};
  if (!worker.load->loads_models_on_demand &&
      !absl::c_linear_search(worker.load->model_digests, model.model_digest)) {
    return {.fault = absl::StrCat(id, " has no pool for its model ",
                                  model.model_digest.substr(0, 12), "…")};
  }
  return {.worker = &worker};
}

}  // namespace

struct Router::GroupView {
  std::string name;
  std::string ineligible_because;                           // empty: each rank has a server
  std::vector<const WorkerRecord*> servers;                 // in order of rank, while mu_ is held
  std::vector<std::shared_ptr<const WorkerHello>> workers;  // of the servers; outlives the lock
  std::vector<WorkerSnapshot> ranks;                        // of the servers
};

std::vector<Router::GroupView> Router::FindGroups(std::span<const RankModel> models,
                                                  std::span<const std::string> excluded) const {
  std::map<absl::string_view, std::vector<WorkersOfRank>> ranks_of;
  for (const auto& [id, record] : registry_.workers()) {
    const WorkerHello& hello = *record.hello;
    if (hello.shard_group.empty()) continue;
    std::vector<WorkersOfRank>& ranks = ranks_of[hello.shard_group];
    ranks.resize(models.size());
    // A group may have more ranks than this model: the others have no part in it.
    if (hello.shard_rank < ranks.size()) ranks[hello.shard_rank].push_back(&record);
  }
  std::vector<GroupView> groups;
  groups.reserve(ranks_of.size());
  for (const auto& [name, ranks] : ranks_of) {
    GroupView& group = groups.emplace_back();
    group.name = std::string(name);
    if (absl::c_linear_search(excluded, name)) {
      group.ineligible_because = "excluded by the caller";
      continue;
    }
    size_t num_faults = 0;
    for (size_t rank = 0; rank < ranks.size(); ++rank) {
      RankServer server = ServerOf(ranks[rank], models[rank]);
      if (server.worker != nullptr) {
        group.servers.push_back(server.worker);
        group.workers.push_back(server.worker->hello);
      } else if (++num_faults <= kMaxFaultsNamed) {
        absl::StrAppend(&group.ineligible_because, group.ineligible_because.empty() ? "" : "; ",
                        "rank ", rank, ": ", server.fault);
      }
    }
    if (num_faults > kMaxFaultsNamed) {
      absl::StrAppend(&group.ineligible_because, "; and ", num_faults - kMaxFaultsNamed,
                      " more ranks");
    }
  }
  return groups;
}

void Router::TakeSnapshots(const RoutedPrompt& prompt, std::vector<GroupView>& groups) const {
  std::vector<const WorkerRecord*> all;
  for (const auto& [id, record] : registry_.workers()) {
    if (record.hello->role == SourceRole::kWorker) all.push_back(&record);
  }
  const FleetRates rates = MeasureRates(all);
  std::vector<ResidencySourceId> sources;
  for (const GroupView& group : groups) {
    if (!group.ineligible_because.empty()) continue;
    for (const WorkerRecord* server : group.servers) sources.push_back(server->source);
  }
  // Shards agree on prefix keys, and their layer groups have the same numbers.
  const std::vector<PageRuns> runs =
      residency_.LeadingRuns(prompt.hints, prompt.num_groups, sources);
  const MonotonicTime now = clock_->MonotonicNow();
  size_t next = 0;
  for (GroupView& group : groups) {
    if (!group.ineligible_because.empty()) continue;
    group.ranks.reserve(group.servers.size());
    for (const WorkerRecord* server : group.servers) {
      group.ranks.push_back(SnapshotOf(*server, prompt.page_tokens, runs[next++], rates, now));
    }
  }
}

absl::StatusOr<std::shared_ptr<const GroupAssignment>> Router::AssignGroup(
    const RoutedPrompt& prompt, std::span<const RankModel> models,
    const AssignGroupOptions& options) {
  PT_RETURN_IF_ERROR(CheckPrompt(prompt));
  if (models.size() < kMinShardRanks || models.size() > kMaxShardRanks) {
    return absl::InvalidArgumentError(absl::StrCat("assign group: ", models.size(), " ranks, ",
                                                   kMinShardRanks, " to ", kMaxShardRanks,
                                                   " expected"));
  }
  // What the rank with the largest pages has to load.
  uint64_t page_bytes = 0;
  for (const RankModel& model : models) page_bytes = std::max(page_bytes, model.page_bytes);
  PlacementRequest request{.prompt_tokens = static_cast<int64_t>(prompt.num_tokens),
                           .kv_bytes_per_token = static_cast<double>(page_bytes) /
                                                 std::max<uint32_t>(1, prompt.page_tokens)};
  std::vector<GroupView> groups;
  {
    MutexLock lock(&mu_);
    if (!options.request.request_id.empty()) {
      PT_ASSIGN_OR_RETURN(auto answer, FindGroupAnswer(options.request));
      if (answer != nullptr) {
        group_repeats_->Increment();
        return answer;
      }
    }
    request.tie_seed = ++next_tie_seed_;
    groups = FindGroups(models, options.excluded_shard_groups);
    TakeSnapshots(prompt, groups);
    for (GroupView& group : groups) group.servers.clear();  // the registry's, from here on
  }

  std::vector<WorkerSnapshot> snapshots;
  snapshots.reserve(groups.size());
  for (const GroupView& group : groups) {
    snapshots.push_back(group.ineligible_because.empty() ? MergeRanks(group.ranks)
                                                         : WorkerSnapshot{.is_admitting = false});
  }
  PT_ASSIGN_OR_RETURN(const PlacementDecision decision,
                      PlaceSequence(*policy_, request, snapshots));

  auto assignment = std::make_shared<GroupAssignment>();
  std::vector<RankedGroup>& candidates = assignment->candidates;
  candidates.reserve(groups.size());
  for (const PlacementCandidate& candidate : decision.candidates) {
    const GroupView& group = groups[candidate.worker];
    RankedGroup& ranked = candidates.emplace_back();
    ranked.shard_group = group.name;
    ranked.ineligible_because = group.ineligible_because;
    ranked.numbers = candidate;
    ranked.is_eligible = candidate.verdict == PlacementVerdict::kEligible;
    if (candidate.verdict == PlacementVerdict::kTooSmall) {
      ranked.ineligible_because =
          absl::StrCat("too small: ", snapshots[candidate.worker].capacity_tokens, " tokens fit");
    }
    if (!ranked.is_eligible) continue;
    ranked.limiting_rank = static_cast<uint32_t>(LimitingRank(group.ranks));
    ranked.slowest_rank = static_cast<uint32_t>(
        SlowestRank(request, group.ranks, request.prompt_tokens - candidate.computed_tokens));
  }
  const auto sticky =
      std::find_if(candidates.begin(), candidates.end(), [&](const RankedGroup& group) {
        return group.is_eligible && group.shard_group == options.sticky_shard_group;
      });
  if (sticky != candidates.end()) std::rotate(candidates.begin(), sticky, sticky + 1);
  if (candidates.empty() || !candidates.front().is_eligible) {
    group_refusals_->Increment();
    return RefuseGroups(prompt, candidates);
  }

  const RankedGroup& chosen = candidates.front();
  assignment->shard_group = chosen.shard_group;
  assignment->workers = std::move(groups[chosen.numbers.worker].workers);
  for (const RankModel& model : models) assignment->model_digests.push_back(model.model_digest);
  MutexLock lock(&mu_);
  if (!options.request.request_id.empty()) {
    // A twin of this request may have been answered since: both must get the same answer.
    PT_ASSIGN_OR_RETURN(auto answer, FindGroupAnswer(options.request));
    if (answer != nullptr) {
      group_repeats_->Increment();
      return answer;
    }
  }
  assignment->assignment_id = absl::StrCat(options_.router_id, "-", absl::Hex(++next_assignment_));
  for (const auto& worker : assignment->workers) Charge(worker->worker_id, chosen.numbers);
  if (!options.request.request_id.empty()) {
    group_answers_.Remember(options.request, assignment, clock_->MonotonicNow());
  }
  group_assignments_->Increment();
  return assignment;
}

absl::Status Router::RefuseGroups(const RoutedPrompt& prompt,
                                  std::span<const RankedGroup> candidates) const {
  // Waiting helps against dead and draining workers; not against a prompt that fits nowhere.
  const bool is_too_large =
      !candidates.empty() &&
      std::all_of(candidates.begin(), candidates.end(), [](const RankedGroup& group) {
        return group.numbers.verdict == PlacementVerdict::kTooSmall;
      });
  if (is_too_large) {
    return WithReason(
        absl::InvalidArgumentError(absl::StrCat("assign group: a prompt of ", prompt.num_tokens,
                                                " tokens fits in none of ", candidates.size(),
                                                " shard groups: ", candidates.front().shard_group,
                                                " is ", candidates.front().ineligible_because)),
        error_reason::kPoolTooSmall);
  }
  std::string text = "assign group: no worker has said that it belongs to a shard group";
  if (!candidates.empty()) {
    text = absl::StrCat("assign group: no eligible shard group among ", candidates.size());
    size_t num_named = 0;
    for (; num_named < candidates.size() && text.size() < kMaxReasonBytes; ++num_named) {
      const RankedGroup& group = candidates[num_named];
      absl::StrAppend(&text, num_named == 0 ? ": " : ", ", group.shard_group, " (",
                      group.ineligible_because, ")");
    }
    if (num_named < candidates.size()) {
      absl::StrAppend(&text, " and ", candidates.size() - num_named, " more");
    }
  }
  return WithRetryDelay(WithReason(absl::UnavailableError(text), error_reason::kNoShardGroup),
                        options_.no_worker_retry_delay);
}

absl::StatusOr<std::shared_ptr<const GroupAssignment>> Router::FindGroupAnswer(
    const RequestName& request) {
  PT_ASSIGN_OR_RETURN(const auto* const answer,
                      group_answers_.Find(request, clock_->MonotonicNow()));
  if (answer == nullptr) return nullptr;
  for (const auto& worker : (*answer)->workers) {
    if (!IsServing(*worker)) return nullptr;
  }
  return *answer;
}

}  // namespace pagetide
