#include "core/router.h"

#include <algorithm>
#include <iterator>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

// Slots swept a tick: at four ticks a second, a million slots are clean in four seconds.
constexpr size_t kSweepSlotsPerTick = 65536;

bool Contains(std::span<const std::string> list, absl::string_view item) {
  return std::any_of(list.begin(), list.end(), [&](const std::string& s) { return s == item; });
}

// What makes a worker no candidate, or an empty string.
std::string WhyIneligible(const WorkerRecord& worker, std::span<const std::string> excluded) {
  if (worker.state == WorkerState::kDead) return "dead";
  if (worker.state == WorkerState::kDraining) return "draining";
  if (!worker.load.has_value()) return "has not reported its load yet";
  if (Contains(excluded, worker.hello->worker_id)) return "excluded by the caller";
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

}  // namespace

absl::StatusOr<std::unique_ptr<Router>> Router::Create(Options options, Clock* clock,
                                                       Metrics* metrics) {
  PT_ASSIGN_OR_RETURN(auto policy, MakePlacementPolicy(options.policy, options.policy_options));
  return std::unique_ptr<Router>(new Router(std::move(options), clock, metrics, std::move(policy)));
}

Router::Router(Options options, Clock* clock, Metrics* metrics,
               std::unique_ptr<PlacementPolicy> policy)
    : options_(std::move(options)),
      clock_(clock),
      policy_(std::move(policy)),
      assignments_(metrics->GetCounter("pagetide_router_assignments_total",
                                       "Sequences assigned to a worker")),
      refusals_(metrics->GetCounter("pagetide_router_refusals_total",
                                    "Assignments refused because no worker could take them")),
      repeats_(metrics->GetCounter("pagetide_router_repeated_requests_total",
                                   "Assignments answered from a repeated request id")),
      snapshots_(metrics->GetCounter("pagetide_router_snapshots_requested_total",
                                     "Residency snapshots asked for after a gap or a differing "
                                     "digest")),
      departures_(metrics->GetCounter("pagetide_router_departures_total",
                                      "Attachments of workers and stores that ended")),
      workers_gauge_(metrics->GetGauge("pagetide_router_sources", "Workers and stores attached")),
      pages_gauge_(
          metrics->GetGauge("pagetide_router_resident_pages", "Pages in the residency map")),
      registry_(options_.registry, clock),
      residency_(options_.residency) {}

// --- reports ---

absl::StatusOr<Router::Attached> Router::Attach(WorkerHello hello) {
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(const ResidencySourceId source, residency_.AddSource(hello.incarnation));
  auto attached = registry_.Attach(std::move(hello), source);
  if (!attached.ok()) {
    residency_.RemoveSource(source);
    return attached.status();
  }
  Attached result{.id = attached->id};
  if (attached->replaced.has_value()) {
    DropResidency(*attached->replaced);
    result.replaced = attached->replaced->attachment;
  }
  workers_gauge_->Set(static_cast<double>(residency_.num_sources()));
  return result;
}

absl::Status Router::OnLoad(AttachmentId attachment, WorkerLoad load) {
  MutexLock lock(&mu_);
  PT_RETURN_IF_ERROR(registry_.Heard(attachment));
  return registry_.RecordLoad(attachment, std::move(load));
}

absl::Status Router::OnSequences(AttachmentId attachment, bool is_snapshot,
                                 std::span<const SequenceChange> changes) {
  MutexLock lock(&mu_);
  PT_RETURN_IF_ERROR(registry_.Heard(attachment));
  return registry_.RecordSequences(attachment, is_snapshot, changes);
}

absl::StatusOr<std::optional<std::string>> Router::OnResidency(AttachmentId attachment,
                                                               const ResidencyReport& report) {
  MutexLock lock(&mu_);
  PT_RETURN_IF_ERROR(registry_.Heard(attachment));
  PT_ASSIGN_OR_RETURN(const ResidencySourceId source, registry_.SourceOf(attachment));
  ResidencyMap::ApplyResult result = residency_.Apply(source, report);
  pages_gauge_->Set(static_cast<double>(residency_.num_pages()));
  if (result.outcome != ResidencyMap::Outcome::kNeedSnapshot) return std::nullopt;
  snapshots_->Increment();
  return std::move(result.because);
}

void Router::Detach(AttachmentId attachment, absl::string_view because) {
  MutexLock lock(&mu_);
  if (auto departure = registry_.Detach(attachment, because)) DropResidency(*departure);
}

std::vector<AttachmentId> Router::Tick() {
  MutexLock lock(&mu_);
  std::vector<AttachmentId> silent;
  for (const auto& departure : registry_.TakeExpired()) {
    DropResidency(departure);
    silent.push_back(departure.attachment);
  }
  residency_.Sweep(kSweepSlotsPerTick);
  pages_gauge_->Set(static_cast<double>(residency_.num_pages()));
  DropExpiredAnswers();
  for (auto it = recent_prefill_.begin(); it != recent_prefill_.end();) {
    it = registry_.Find(it->first) == nullptr ? recent_prefill_.erase(it) : std::next(it);
  }
  return silent;
}

void Router::DropResidency(const WorkerRegistry::Departure& departure) {
  residency_.RemoveSource(departure.source);
  departures_->Increment();
  workers_gauge_->Set(static_cast<double>(residency_.num_sources()));
}

// --- decisions ---

absl::StatusOr<PlacementTable> Router::Rank(const RoutedPrompt& prompt,
                                            absl::string_view sticky_worker_id,
                                            std::span<const std::string> only,
                                            std::span<const std::string> excluded) const {
  if (prompt.num_tokens > static_cast<uint64_t>(kMaxPlacementTokens) ||
      prompt.hints.size() > prompt.num_tokens / std::max<uint32_t>(1, prompt.page_tokens)) {
    return absl::InvalidArgumentError(absl::StrCat(
        "prompt of ", prompt.num_tokens, " tokens with ", prompt.hints.size(), " full pages of ",
        prompt.page_tokens, " tokens; at most ", kMaxPlacementTokens, " tokens"));
  }
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
    MeasuredRate prefill, store, host;
    bool is_model_loaded = false;
    for (const auto& [id, record] : registry_.workers()) {
      if (record.hello->role != SourceRole::kWorker) continue;
      if (!only.empty() && !Contains(only, id)) continue;
      RankedWorker& worker = workers.emplace_back();
      worker.worker = record.hello;
      worker.ineligible_because = WhyIneligible(record, excluded);
      records.push_back(&record);
      sources.push_back(record.source);
      if (!record.load.has_value()) continue;
      prefill.Add(record.load->prefill_tokens_per_second);
      store.Add(record.load->store_bytes_per_second);
      host.Add(record.load->host_bytes_per_second);
      is_model_loaded |= worker.ineligible_because.empty() &&
                         Contains(record.load->model_digests, prompt.model_digest);
    }
    const WorkerLoad no_load;
    std::vector<PageRuns> runs = residency_.LeadingRuns(prompt.hints, prompt.num_groups, sources);

    snapshots.resize(workers.size());
    for (size_t i = 0; i < workers.size(); ++i) {
      WorkerSnapshot& snapshot = snapshots[i];
      const WorkerLoad& load = records[i]->load.has_value() ? *records[i]->load : no_load;
      // A model that nobody has loaded yet may go to anybody: the worker opens a pool or refuses.
      if (workers[i].ineligible_because.empty() && is_model_loaded &&
          !load.loads_models_on_demand && !Contains(load.model_digests, prompt.model_digest)) {
        workers[i].ineligible_because = "has no pool for the model, others have";
      }
      snapshot.is_admitting = workers[i].ineligible_because.empty();
      snapshot.prefill_tokens_per_second =
          load.prefill_tokens_per_second > 0
              ? load.prefill_tokens_per_second
              : prefill.MeanOr(options_.default_prefill_tokens_per_second);
      snapshot.queue_wait = absl::Seconds(
          static_cast<double>(load.queued_prefill_tokens + records[i]->assigned_tokens) /
          snapshot.prefill_tokens_per_second);
      const auto recent = recent_prefill_.find(records[i]->hello->worker_id);
      if (recent != recent_prefill_.end()) {
        snapshot.recent_prefill = absl::Seconds(recent->second.At(now.since_boot));
      }
      snapshot.active_sequences =
          static_cast<int64_t>(std::min<uint64_t>(load.open_sequences, uint64_t{1} << 40));
      if (load.total_frames > 0) {
        // Over all models and groups: an upper bound, the worker knows better.
        snapshot.capacity_tokens = static_cast<int64_t>(
            std::min<uint64_t>(load.total_frames, uint64_t{1} << 32) * prompt.page_tokens);
      }
      snapshot.read_cost[TierIndex(Tier::kHost)] = {
          .bytes_per_second = load.host_bytes_per_second > 0
                                  ? load.host_bytes_per_second
                                  : host.MeanOr(options_.default_host_bytes_per_second),
          .latency = options_.host_latency};
      snapshot.read_cost[TierIndex(Tier::kStore)] = {
          .bytes_per_second = load.store_bytes_per_second > 0
                                  ? load.store_bytes_per_second
                                  : store.MeanOr(options_.default_store_bytes_per_second),
          .latency = options_.store_latency};
      for (const PageRun& run : runs[i]) {
        snapshot.prefix.push_back({run.tier, int64_t{run.num_pages} * prompt.page_tokens});
      }
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
  if (!options.request_id.empty()) {
    MutexLock lock(&mu_);
    PT_ASSIGN_OR_RETURN(auto answer, FindAnswer(options));
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
  if (!options.request_id.empty()) {
    // A twin of this request may have been answered since: both must get the same answer.
    PT_ASSIGN_OR_RETURN(auto answer, FindAnswer(options));
    if (answer.has_value()) {
      repeats_->Increment();
      return *std::move(answer);
    }
  }
  assignment.assignment_id = absl::StrCat(options_.router_id, "-", absl::Hex(++next_assignment_));
  registry_.AddAssignedTokens(assignment.chosen.worker->worker_id,
                              static_cast<uint64_t>(assignment.chosen.numbers.computed_tokens));
  recent_prefill_.try_emplace(assignment.chosen.worker->worker_id, kRecentPrefillTimeConstant)
      .first->second.Add(clock_->MonotonicNow().since_boot,
                         absl::ToDoubleSeconds(assignment.chosen.numbers.prefill_time));
  if (!options.request_id.empty()) Remember(options, assignment);
  assignments_->Increment();
  return assignment;
}

absl::StatusOr<std::optional<Assignment>> Router::FindAnswer(const AssignOptions& options) {
  const auto it = answers_.find(AnswerKey(options.tenant, options.request_id));
  if (it == answers_.end() || it->second.expires <= clock_->MonotonicNow()) return std::nullopt;
  if (it->second.request_hash != options.request_hash) {
    return absl::InvalidArgumentError(
        absl::StrCat("assign sequence: request_id ", options.request_id,
                     " was used with another request less than ",
                     absl::FormatDuration(options_.answer_retention), " ago"));
  }
  // To send a retry to a worker that has died since would keep it failing for the rest of the
  // minute.
  const WorkerHello& chosen = *it->second.assignment.chosen.worker;
  const WorkerRecord* worker = registry_.Find(chosen.worker_id);
  if (worker == nullptr || worker->state != WorkerState::kServing ||
      worker->hello->incarnation != chosen.incarnation) {
    return std::nullopt;
  }
  return it->second.assignment;
}

void Router::Remember(const AssignOptions& options, const Assignment& assignment) {
  const AnswerKey key(options.tenant, options.request_id);
  const bool is_new = !answers_.contains(key);
  if (is_new) {
    while (!answer_order_.empty() && answers_.size() >= options_.max_answers) {
      answers_.erase(answer_order_.front());
      answer_order_.pop_front();
    }
    answer_order_.push_back(key);
  }
  answers_[key] = {.request_hash = options.request_hash,
                   .expires = clock_->MonotonicNow() + options_.answer_retention,
                   .assignment = assignment};
}

void Router::DropExpiredAnswers() {
  const MonotonicTime now = clock_->MonotonicNow();
  while (!answer_order_.empty()) {
    const auto it = answers_.find(answer_order_.front());
    if (it->second.expires > now) break;
    answers_.erase(it);
    answer_order_.pop_front();
  }
}

// --- observers ---

WorkerSummary Router::Summarize(const WorkerRecord& worker) const {
  WorkerSummary summary{.hello = worker.hello,
                        .state = worker.state,
                        .load = worker.load.value_or(WorkerLoad{}),
                        .since_heard = clock_->MonotonicNow() - worker.last_heard};
  if (const auto stats = residency_.StatsOf(worker.source)) {
    for (uint64_t copies : stats->copies) summary.resident_pages += copies;
  }
  return summary;
}

std::vector<WorkerSummary> Router::ListWorkers() const {
  MutexLock lock(&mu_);
  std::vector<WorkerSummary> workers;
  for (const auto& [id, worker] : registry_.workers()) workers.push_back(Summarize(worker));
  return workers;
}

std::optional<WorkerSummary> Router::GetWorker(absl::string_view worker_id) const {
  MutexLock lock(&mu_);
  const WorkerRecord* worker = registry_.Find(worker_id);
  if (worker == nullptr) return std::nullopt;
  return Summarize(*worker);
}

std::optional<WorkerRegistry::SequencePlace> Router::FindSequence(SequenceId id) const {
  MutexLock lock(&mu_);
  return registry_.FindSequence(id);
}

std::vector<WorkerRegistry::SequencePlace> Router::ListSequences(SequenceId after,
                                                                 size_t limit) const {
  MutexLock lock(&mu_);
  return registry_.ListSequences(after, limit);
}

size_t Router::num_resident_pages() const {
  MutexLock lock(&mu_);
  return residency_.num_pages();
}

}  // namespace pagetide
