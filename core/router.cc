#include "core/router.h"

#include <iterator>
#include <utility>

#include "base/status_macros.h"

namespace pagetide {
namespace {

// Slots swept a tick: at four ticks a second, a million slots are clean in four seconds.
constexpr size_t kSweepSlotsPerTick = 65536;

Counter* GroupCounter(Metrics* metrics, const char* outcome) {
  return metrics->GetCounter("pagetide_router_group_assignments_total",
                             "Sequences over shards that asked for a group of workers",
                             {{"outcome", outcome}});
}

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
      group_assignments_(GroupCounter(metrics, "assigned")),
      group_refusals_(GroupCounter(metrics, "refused")),
      group_repeats_(GroupCounter(metrics, "repeated")),
      snapshots_(metrics->GetCounter("pagetide_router_snapshots_requested_total",
                                     "Residency snapshots asked for after a gap or a differing "
                                     "digest")),
      departures_(metrics->GetCounter("pagetide_router_departures_total",
                                      "Attachments of workers and stores that ended")),
      workers_gauge_(metrics->GetGauge("pagetide_router_sources", "Workers and stores attached")),
      pages_gauge_(
          metrics->GetGauge("pagetide_router_resident_pages", "Pages in the residency map")),
      registry_(options_.registry, clock),
      residency_(options_.residency),
      answers_(options_.answer_retention, options_.max_answers),
      group_answers_(options_.answer_retention, options_.max_group_answers) {}

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
  const MonotonicTime now = clock_->MonotonicNow();
  answers_.DropExpired(now);
  group_answers_.DropExpired(now);
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
