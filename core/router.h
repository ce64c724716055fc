// Router: the domain behind RouterService and WorkerRegistryService. It knows what workers and
// stores report (soft state only: a restarted router learns it again from their next streams) and
// decides which worker gets a sequence, or which group of workers one over shards. It holds no
// connection and no thread; silence of a worker is noticed by Tick.
//
// Thread-safe. One mutex guards the tables; a decision copies what it needs under it and computes
// the placement outside.
#ifndef PAGETIDE_CORE_ROUTER_H_
#define PAGETIDE_CORE_ROUTER_H_

#include <cstddef>
#include <cstdint>
#include <functional>
#include <map>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "absl/status/status.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "base/metrics.h"
#include "base/mutex.h"
#include "core/answer_memory.h"
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
  // The model is this shard of its num_ranks; 1: it is in one piece.
  uint32_t rank = 0;
  uint32_t num_ranks = 1;
};

struct AssignOptions {
  RequestName request;  // with an id: names the remembered answer
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

// The model of one rank: a shard of the prompt's.
struct RankModel {
  std::string model_digest;  // 64 hex digits
  uint64_t page_bytes = 0;   // of one page of tokens in all layer groups
};

struct AssignGroupOptions {
  RequestName request;  // with an id: names the remembered answer
  std::string sticky_shard_group;
  std::vector<std::string> excluded_shard_groups;
};

// A group of workers, one a rank, as placement saw it.
struct RankedGroup {
  std::string shard_group;
  bool is_eligible = false;
  std::string ineligible_because;  // each rank that is missing, at least some of them
  PlacementCandidate numbers;
  // Of eligible ones: that needs the longest, and that knows the shortest prefix.
  uint32_t slowest_rank = 0;
  uint32_t limiting_rank = 0;
};

struct GroupAssignment {
  std::string assignment_id;
  std::string shard_group;
  // In order of rank; shared with the registry, which may replace its own meanwhile.
  std::vector<std::shared_ptr<const WorkerHello>> workers;
  std::vector<std::string> model_digests;
  // The chosen one first, then best first, ineligible ones last.
  std::vector<RankedGroup> candidates;
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
    // Those of AssignGroup have the table of candidates: up to tens of kilobytes each.
    size_t max_group_answers = 8192;
    // RetryInfo of NO_WORKER and NO_SHARD_GROUP.
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
  // The group that can start the prompt soonest, as fast as the slowest rank and with the prefix
  // that all know: of the shard groups where each rank has exactly one live worker, which serves
  // and has the rank's model or loads it on demand. `models`: in order of rank, as CheckRankModels
  // takes them; the prompt's are rank 0's numbers. UNAVAILABLE (NO_SHARD_GROUP) with a retry delay
  // names what each group lacks; INVALID_ARGUMENT and request ids as Assign, while all its workers
  // serve. shared_ptr: the remembered answer is the one that is given.
  absl::StatusOr<std::shared_ptr<const GroupAssignment>> AssignGroup(
      const RoutedPrompt& prompt, std::span<const RankModel> models,
      const AssignGroupOptions& options);
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
  // What workers do a second, for those that have not measured it.
  struct FleetRates {
    double prefill_tokens = 0;
    double host_bytes = 0;
    double store_bytes = 0;
  };
  // A group while it is being ranked.
  struct GroupView;

  Router(Options options, Clock* clock, Metrics* metrics, std::unique_ptr<PlacementPolicy> policy);
  void DropResidency(const WorkerRegistry::Departure& departure) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  WorkerSummary Summarize(const WorkerRecord& worker) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // INVALID_ARGUMENT: more tokens than can be placed, or more full pages than tokens.
  static absl::Status CheckPrompt(const RoutedPrompt& prompt);
  // The means over those that have measured, else the defaults.
  FleetRates MeasureRates(std::span<const WorkerRecord* const> workers) const;
  // A worker for a prompt whose leading pages it can use as `runs` say; admitting.
  WorkerSnapshot SnapshotOf(const WorkerRecord& worker, uint32_t page_tokens, const PageRuns& runs,
                            const FleetRates& rates, MonotonicTime now) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // A placed prompt makes the worker's queue longer until its next load report.
  void Charge(const std::string& worker_id, const PlacementCandidate& placed)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // This attachment's process still serves: to send a retry to one that has died since would keep
  // it failing for the rest of the minute.
  bool IsServing(const WorkerHello& worker) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The remembered answer, if it still holds.
  absl::StatusOr<std::optional<Assignment>> FindAnswer(const RequestName& request)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The same; null: none.
  absl::StatusOr<std::shared_ptr<const GroupAssignment>> FindGroupAnswer(const RequestName& request)
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // The groups of attached workers, in order of name, without their snapshots.
  std::vector<GroupView> FindGroups(std::span<const RankModel> models,
                                    std::span<const std::string> excluded) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Fills in what the ranks of the groups that are whole know of the prompt.
  void TakeSnapshots(const RoutedPrompt& prompt, std::vector<GroupView>& groups) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  absl::Status RefuseGroups(const RoutedPrompt& prompt,
                            std::span<const RankedGroup> candidates) const;

  const Options options_;
  Clock* const clock_;
  const std::unique_ptr<PlacementPolicy> policy_;
  Counter* const assignments_;
  Counter* const refusals_;
  Counter* const repeats_;
  Counter* const group_assignments_;
  Counter* const group_refusals_;
  Counter* const group_repeats_;
  Counter* const snapshots_;
  Counter* const departures_;
  Gauge* const workers_gauge_;
  Gauge* const pages_gauge_;

  mutable Mutex mu_;
  WorkerRegistry registry_ ABSL_GUARDED_BY(mu_);
  ResidencyMap residency_ ABSL_GUARDED_BY(mu_);
  AnswerMemory<Assignment> answers_ ABSL_GUARDED_BY(mu_);
  AnswerMemory<std::shared_ptr<const GroupAssignment>> group_answers_ ABSL_GUARDED_BY(mu_);
  // Seconds of prefill that this router lately placed on each worker, by id; outlives an
  // attachment, so that a restarted worker is not flooded. At most one a known worker.
  std::map<std::string, DecayingSum, std::less<>> recent_prefill_ ABSL_GUARDED_BY(mu_);
  uint64_t next_assignment_ ABSL_GUARDED_BY(mu_) = 0;
  mutable uint64_t next_tie_seed_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_ROUTER_H_
