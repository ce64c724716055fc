// Router's decisions for one worker: which can start a prompt soonest.
#include <algorithm>
#include <utility>

#include "absl/algorithm/container.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "core/router.h"

namespace pagetide {
namespace {

// What makes a worker no candidate, or an empty string.
std::string WhyIneligible(const WorkerRecord& worker, const RoutedPrompt& prompt,
                          std::span<const std::string> excluded) {
  std::string why = WhyNotServing(worker);
  if (!why.empty()) return why;
  const WorkerHello& hello = *worker.hello;
  if (absl::c_linear_search(excluded, hello.worker_id)) return "excluded by the caller";
  if (prompt.num_ranks > 1 && !hello.shard_group.empty() && hello.shard_rank != prompt.rank) {
    return absl::StrCat("is rank ", hello.shard_rank, " of shard group ", hello.shard_group,
                        ", the model is rank ", prompt.rank, "'s");
  }
  return "";
}

// Mean of the rates that were measured, or `fallback`.
class MeasuredRate {
 public:
  void Add(double rate) {
    if (rate <= 0) return;
    sum_ += rate;
    ++count_;
  }
  double MeanOr(double fallback) const { return count_ == 0 ? fallback : sum_ / count_; }

 private:
  double sum_ = 0;
  int count_ = 0;
};

double MeasuredOr(double rate, double fallback) {
  return rate > 0 ? rate : fallback;
}

}  // namespace

absl::Status Router::CheckPrompt(const RoutedPrompt& prompt) {
  if (prompt.num_tokens > static_cast<uint64_t>(kMaxPlacementTokens) ||
      prompt.hints.size() > prompt.num_tokens / std::max<uint32_t>(1, prompt.page_tokens)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "prompt of ", prompt.num_tokens, " tokens with ", prompt.hints.size(), " full pages of ",
        prompt.page_tokens, " tokens; at most ", kMaxPlacementTokens, " tokens"));
  }
  return absl::OkStatus();
}

Router::FleetRates Router::MeasureRates(std::span<const WorkerRecord* const> workers) const {
  MeasuredRate prefill, host, store;
  for (const WorkerRecord* worker : workers) {
    if (!worker->load.has_value()) continue;
    prefill.Add(worker->load->prefill_tokens_per_second);
    host.Add(worker->load->host_bytes_per_second);
    store.Add(worker->load->store_bytes_per_second);
  }
  return {.prefill_tokens = prefill.MeanOr(options_.default_prefill_tokens_per_second),
          .host_bytes = host.MeanOr(options_.default_host_bytes_per_second),
          .store_bytes = store.MeanOr(options_.default_store_bytes_per_second)};
}

WorkerSnapshot Router::SnapshotOf(const WorkerRecord& worker, uint32_t page_tokens,
                                  const PageRuns& runs, const FleetRates& rates,
                                  MonotonicTime now) const {
  const WorkerLoad no_load;
  const WorkerLoad& load = worker.load.has_value() ? *worker.load : no_load;
  WorkerSnapshot snapshot;
  snapshot.prefill_tokens_per_second =
      MeasuredOr(load.prefill_tokens_per_second, rates.prefill_tokens);
  snapshot.queue_wait =
      absl::Seconds(static_cast<double>(load.queued_prefill_tokens + worker.assigned_tokens) /
                    snapshot.prefill_tokens_per_second);
  const auto recent = recent_prefill_.find(worker.hello->worker_id);
  if (recent != recent_prefill_.end()) {
    snapshot.recent_prefill = absl::Seconds(recent->second.At(now.since_boot));
  }
  snapshot.active_sequences =
      static_cast<int64_t>(std::min<uint64_t>(load.open_sequences, uint64_t{1} << 40));
  if (load.total_frames > 0) {
    // Over all models and groups: an upper bound, the worker knows better.
    snapshot.capacity_tokens = static_cast<int64_t>(
        std::min<uint64_t>(load.total_frames, uint64_t{1} << 32) * page_tokens);
  }
  snapshot.read_cost[TierIndex(Tier::kHost)] = {
      .bytes_per_second = MeasuredOr(load.host_bytes_per_second, rates.host_bytes),
      .latency = options_.host_latency};
  snapshot.read_cost[TierIndex(Tier::kStore)] = {
      .bytes_per_second = MeasuredOr(load.store_bytes_per_second, rates.store_bytes),
      .latency = options_.store_latency};
  for (const PageRun& run : runs) {
    snapshot.prefix.push_back({run.tier, int64_t{run.num_pages} * page_tokens});
  }
  return snapshot;
}

absl::StatusOr<PlacementTable> Router::Rank(const RoutedPrompt& prompt,
                                            absl::string_view sticky_worker_id,
                                            std::span<const std::string> only,
                                            std::span<const std::string> excluded) const {
  PT_RETURN_IF_ERROR(CheckPrompt(prompt));
  PlacementTable table;
  std::vector<RankedWorker> workers;      // by snapshot index
  std::vector<WorkerSnapshot> snapshots;  // what the policy sees
  PlacementRequest request{.prompt_tokens = static_cast<int64_t>(prompt.num_tokens),
                           .kv_bytes_per_token = static_cast<double>(prompt.page_bytes) /
                                                 std::max<uint32_t>(1, prompt.page_tokens)};
  {
    MutexLock lock(&mu_);
    request.tie_seed = ++next_tie_seed_;
    const MonotonicTime now = clock_->MonotonicNow();
    workers.reserve(registry_.workers().size());
    std::vector<const WorkerRecord*> records;
    records.reserve(registry_.workers().size());
    std::vector<ResidencySourceId> sources;
    bool is_model_loaded = false;
    for (const auto& [id, record] : registry_.workers()) {
      if (record.hello->role != SourceRole::kWorker) continue;
      if (!only.empty() && !absl::c_linear_search(only, id)) continue;
      RankedWorker& worker = workers.emplace_back();
      worker.worker = record.hello;
      worker.ineligible_because = WhyIneligible(record, prompt, excluded);
      records.push_back(&record);
      sources.push_back(record.source);
      is_model_loaded |= worker.ineligible_because.empty() &&
                         absl::c_linear_search(record.load->model_digests, prompt.model_digest);
    }
    const FleetRates rates = MeasureRates(records);
    const std::vector<PageRuns> runs =
        residency_.LeadingRuns(prompt.hints, prompt.num_groups, sources);
    snapshots.reserve(workers.size());
    for (size_t i = 0; i < workers.size(); ++i) {
      // A model that nobody has loaded yet may go to anybody: the worker opens a pool or refuses.
      if (workers[i].ineligible_because.empty() && is_model_loaded &&
          !records[i]->load->loads_models_on_demand &&
          !absl::c_linear_search(records[i]->load->model_digests, prompt.model_digest)) {
        workers[i].ineligible_because = "has no pool for the model, others have";
      }
      snapshots.push_back(SnapshotOf(*records[i], prompt.page_tokens, runs[i], rates, now));
      snapshots.back().is_admitting = workers[i].ineligible_because.empty();
    }
  }

  PT_ASSIGN_OR_RETURN(PlacementDecision decision, PlaceSequence(*policy_, request, snapshots));
  table.policy = std::string(policy_->name());
  table.candidates.reserve(workers.size());
  for (const PlacementCandidate& candidate : decision.candidates) {
    RankedWorker& worker = workers[candidate.worker];
    worker.is_eligible = candidate.verdict == PlacementVerdict::kEligible;
    if (candidate.verdict == PlacementVerdict::kTooSmall) {
      worker.ineligible_because =
          absl::StrCat("too small: ", snapshots[candidate.worker].capacity_tokens, " tokens fit");
    }
    worker.numbers = candidate;
    table.candidates.push_back(std::move(worker));
  }

  if (table.chosen() == nullptr) {
    table.explanation = absl::StrCat("no eligible worker among ", table.candidates.size());
    return table;
  }
  if (!sticky_worker_id.empty()) {
    const auto sticky = std::find_if(
        table.candidates.begin(), table.candidates.end(),
        [&](const RankedWorker& w) { return w.worker->worker_id == sticky_worker_id; });
    if (sticky != table.candidates.end() && sticky->is_eligible) {
      std::rotate(table.candidates.begin(), sticky, sticky + 1);
      table.explanation = absl::StrCat(sticky_worker_id, ": the caller stays with it");
      return table;
    }
    table.explanation = absl::StrCat(
        "sticky worker ", sticky_worker_id,
        " not taken: ", sticky == table.candidates.end() ? "unknown" : sticky->ineligible_because,
        "; ");
  }
  const RankedWorker& best = table.candidates.front();
  absl::StrAppend(&table.explanation, best.worker->worker_id, ": ",
                  decision.tie_loser.has_value()
                      ? absl::StrCat("drawn from ", decision.num_tied, " that tied")
                      : std::string("lowest score"),
                  "; predicted to start in ", absl::FormatDuration(best.numbers.predicted_ttft),
                  " = queue ", absl::FormatDuration(best.numbers.queue_wait), " + load ",
                  absl::FormatDuration(best.numbers.load_time), " + prefill ",
                  absl::FormatDuration(best.numbers.prefill_time), " of ",
                  best.numbers.computed_tokens, " tokens");
  return table;
}

absl::StatusOr<Assignment> Router::Assign(const RoutedPrompt& prompt,
                                          const AssignOptions& options) {
  if (!options.request.request_id.empty()) {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(auto answer, FindAnswer(options.request));
    if (answer.has_value()) {
      repeats_->Increment();
      return *std::move(answer);
    }
  }
  PT_ASSIGN_OR_RETURN(PlacementTable table,
                      Rank(prompt, options.sticky_worker_id, {}, options.excluded_worker_ids));
  if (table.chosen() == nullptr) {
    refusals_->Increment();
    // Waiting helps against dead and draining workers; not against a prompt that fits nowhere.
    const bool is_too_large =
        !table.candidates.empty() &&
        std::all_of(table.candidates.begin(), table.candidates.end(), [](const RankedWorker& w) {
          return w.numbers.verdict == PlacementVerdict::kTooSmall;
        });
    if (is_too_large) {
      return WithReason(
          absl::InvalidArgumentError(absl::StrCat(
              "assign sequence: a prompt of ", prompt.num_tokens, " tokens fits in none of ",
              table.candidates.size(), " workers: ", table.candidates.front().worker->worker_id,
              " is ", table.candidates.front().ineligible_because)),
          error_reason::kPoolTooSmall);
    }
    std::string reasons;
    for (const RankedWorker& w : table.candidates) {
      if (reasons.size() > 512) break;
      absl::StrAppend(&reasons, reasons.empty() ? ": " : ", ", w.worker->worker_id, " ",
                      w.ineligible_because);
    }
    return WithRetryDelay(WithReason(absl::UnavailableError(absl::StrCat(
                                         "assign sequence: ", table.explanation, reasons)),
                                     error_reason::kNoWorker),
                          options_.no_worker_retry_delay);
  }
  Assignment assignment{.model_digest = prompt.model_digest,
                        .chosen = std::move(table.candidates.front())};
  MutexLock lock(&mu_);
  if (!options.request.request_id.empty()) {
    // A twin of this request may have been answered since: both must get the same answer.
    PT_ASSIGN_OR_RETURN(auto answer, FindAnswer(options.request));
    if (answer.has_value()) {
      repeats_->Increment();
      return *std::move(answer);
    }
  }
  assignment.assignment_id = absl::StrCat(options_.router_id, "-", absl::Hex(++next_assignment_));
  Charge(assignment.chosen.worker->worker_id, assignment.chosen.numbers);
  if (!options.request.request_id.empty()) {
    answers_.Remember(options.request, assignment, clock_->MonotonicNow());
  }
  assignments_->Increment();
  return assignment;
}

void Router::Charge(const std::string& worker_id, const PlacementCandidate& placed) {
  registry_.AddAssignedTokens(worker_id, static_cast<uint64_t>(placed.computed_tokens));
  recent_prefill_.try_emplace(worker_id, kRecentPrefillTimeConstant)
      .first->second.Add(clock_->MonotonicNow().since_boot,
                         absl::ToDoubleSeconds(placed.prefill_time));
}

bool Router::IsServing(const WorkerHello& worker) const {
  const WorkerRecord* const record = registry_.Find(worker.worker_id);
  return record != nullptr && record->state == WorkerState::kServing &&
         record->hello->incarnation == worker.incarnation;
}

absl::StatusOr<std::optional<Assignment>> Router::FindAnswer(const RequestName& request) {
  PT_ASSIGN_OR_RETURN(const Assignment* const answer,
                      answers_.Find(request, clock_->MonotonicNow()));
  if (answer == nullptr || !IsServing(*answer->chosen.worker)) return std::nullopt;
  return *answer;
}

}  // namespace pagetide
