// Router: the domain behind RouterService and WorkerRegistryService. It knows what workers and
// stores report (soft state only: a restarted router learns it again from their next streams) and
// decides which worker gets a sequence. It holds no connection and no thread; silence of a worker
// is noticed by Tick.
//
// Thread-safe. One mutex guards the tables; a decision copies what it needs under it and computes
// the placement outside.
#ifndef PAGETIDE_CORE_ROUTER_H_
#define PAGETIDE_CORE_ROUTER_H_

#include <cstddef>
#include <cstdint>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "base/mutex.h"
#include "core/decaying_sum.h"
#include "core/placement.h"
#include "core/residency_map.h"
#include "core/worker_registry.h"

namespace pagetide {

// A prompt as placement sees it.
struct RoutedPrompt {
  std::string model_digest;  // 64 hex digits
  uint32_t page_tokens = 0;
  uint32_t num_groups = 0;
  uint64_t page_bytes = 0;        // of one page of tokens in all groups
  std::vector<PrefixHint> hints;  // of its full pages, in order
  uint64_t num_tokens = 0;
};

struct AssignOptions {
  // With a request id: names the remembered answer. Ids of different tenants are apart.
  std::string tenant;
  std::string request_id;
  uint64_t request_hash = 0;  // of everything else in the request
  std::string sticky_worker_id;
  std::vector<std::string> excluded_worker_ids;
};

struct RankedWorker {
  // Shared with the registry, which may replace its own meanwhile.
  std::shared_ptr<const WorkerHello> worker;
  bool is_eligible = false;
  std::string ineligible_because;
  PlacementCandidate numbers;
};

struct PlacementTable {
  std::vector<RankedWorker>
      candidates;  // the chosen one first, then best first, ineligible ones last
  std::string policy;
  std::string explanation;
  const RankedWorker* chosen() const {
    return !candidates.empty() && candidates.front().is_eligible ? &candidates.front() : nullptr;
  }
};

struct Assignment {
  std::string assignment_id;
  std::string model_digest;
  RankedWorker chosen;
};

struct WorkerSummary {
  std::shared_ptr<const WorkerHello> hello;
  WorkerState state = WorkerState::kServing;
  WorkerLoad load;
  uint64_t resident_pages = 0;  // copies of pages, over groups and tiers
  absl::Duration since_heard;
};

class Router {
 public:
  struct Options {
    std::string router_id = "router-0";
    std::string policy = "predicted_ttft";
    PlacementPolicyOptions policy_options;
    WorkerRegistry::Options registry;
    ResidencyMap::Options residency;
    // Used until a worker has measured its own; the mean of the other workers comes first.
    double default_prefill_tokens_per_second = 2000;
    double default_store_bytes_per_second = 500e6;
    double default_host_bytes_per_second = 5e9;
    absl::Duration store_latency = absl::Milliseconds(2);
    absl::Duration host_latency = absl::Microseconds(100);
    // Answers kept for a repeated request_id.
    absl::Duration answer_retention = absl::Minutes(1);
    size_t max_answers = 65536;
    // RetryInfo of NO_WORKER.
    absl::Duration no_worker_retry_delay = absl::Milliseconds(500);
  };

  // INVALID_ARGUMENT for an unknown policy. `clock` and `metrics` outlive the router.
  static absl::StatusOr<std::unique_ptr<Router>> Create(Options options, Clock* clock,
                                                        Metrics* metrics);

  // --- reports (WorkerRegistryService, the store's watcher) ---
  struct Attached {
    AttachmentId id;
    // A stream to close, since the same worker id has attached again.
    std::optional<AttachmentId> replaced;
  };
  absl::StatusOr<Attached> Attach(WorkerHello hello);
  // Each renews the worker's liveness. FAILED_PRECONDITION (STALE_EPOCH): attach again.
  absl::Status OnLoad(AttachmentId attachment, WorkerLoad load);
  absl::Status OnSequences(AttachmentId attachment, bool is_snapshot,
                           std::span<const SequenceChange> changes);
  // Why the source must send a snapshot, or nullopt.
  absl::StatusOr<std::optional<std::string>> OnResidency(AttachmentId attachment,
                                                         const ResidencyReport& report);
  void Detach(AttachmentId attachment, absl::string_view because);
  // Call a few times a second. Returns the attachments that fell silent: their streams are to be
  // closed.
  std::vector<AttachmentId> Tick();

  // --- decisions ---
  // UNAVAILABLE (NO_WORKER) with a retry delay when nobody can take it now; INVALID_ARGUMENT when
  // it is larger than every worker's pool (POOL_TOO_SMALL) and when the request id was used with
  // another request. The same request id gives the same answer for answer_retention, as long as
  // that worker serves.
  absl::StatusOr<Assignment> Assign(const RoutedPrompt& prompt, const AssignOptions& options);
  // The table alone, without effect. `only`: these workers, or all if empty.
  absl::StatusOr<PlacementTable> Rank(const RoutedPrompt& prompt,
                                      absl::string_view sticky_worker_id,
                                      std::span<const std::string> only,
                                      std::span<const std::string> excluded) const;

  // --- observers ---
  std::vector<WorkerSummary> ListWorkers() const;
  std::optional<WorkerSummary> GetWorker(absl::string_view worker_id) const;
  std::optional<WorkerRegistry::SequencePlace> FindSequence(SequenceId id) const;
  std::vector<WorkerRegistry::SequencePlace> ListSequences(SequenceId after, size_t limit) const;
  size_t num_resident_pages() const;
  const Options& options() const { return options_; }

 private:
  struct Answer {
    uint64_t request_hash = 0;
    MonotonicTime expires;
    Assignment assignment;
  };
  using AnswerKey = std::pair<std::string, std::string>;  // tenant, request id

  Router(Options options, Clock* clock, Metrics* metrics, std::unique_ptr<PlacementPolicy> policy);
  void DropResidency(const WorkerRegistry::Departure& departure) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  WorkerSummary Summarize(const WorkerRecord& worker) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The remembered answer, if it still holds.
  absl::StatusOr<std::optional<Assignment>> FindAnswer(const AssignOptions& options)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Remember(const AssignOptions& options, const Assignment& assignment)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void DropExpiredAnswers() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  Clock* const clock_;
  const std::unique_ptr<PlacementPolicy> policy_;
  Counter* const assignments_;
  Counter* const refusals_;
  Counter* const repeats_;
  Counter* const snapshots_;
  Counter* const departures_;
  Gauge* const workers_gauge_;
  Gauge* const pages_gauge_;

  mutable Mutex mu_;
  WorkerRegistry registry_ ABSL_GUARDED_BY(mu_);
  ResidencyMap residency_ ABSL_GUARDED_BY(mu_);
  absl::flat_hash_map<AnswerKey, Answer> answers_ ABSL_GUARDED_BY(mu_);
  std::deque<AnswerKey> answer_order_ ABSL_GUARDED_BY(mu_);  // oldest first
  // Seconds of prefill that this router lately placed on each worker, by id; outlives an
  // attachment, so that a restarted worker is not flooded. At most one a known worker.
  std::map<std::string, DecayingSum, std::less<>> recent_prefill_ ABSL_GUARDED_BY(mu_);
  uint64_t next_assignment_ ABSL_GUARDED_BY(mu_) = 0;
  mutable uint64_t next_tie_seed_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_ROUTER_H_
