// Replay of a trace through the placement and eviction policies, without processes and without
// bytes.
//
// Load model: every worker prefills first in, first out; a request's time to first token is its
// wait plus the prefill of its uncached tokens; a decoded token takes decode_token_time; a worker's
// cache changes when a request is dispatched to it. The prefill rate is the one at which, without
// any cache, the workers would be busy `utilisation` of the trace's span, so results compare across
// traces.
//
// Hits: the leading run of a request's pages that its worker holds before the request's own
// insertions, summed over requests and divided by all their pages, cold start counted.
#ifndef PAGETIDE_REPLAY_SIMULATOR_H_
#define PAGETIDE_REPLAY_SIMULATOR_H_

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/time/time.h"
#include "base/clock.h"
#include "core/placement.h"
#include "replay/trace.h"

namespace pagetide {

struct ReplayOptions {
  std::string trace_path;
  TraceFormat format = TraceFormat::kMooncake;
  // The slice of the trace (replay/trace_slice.h); 0, 0: all of it.
  size_t first_request = 0;
  size_t max_requests = 0;
  size_t num_workers = 8;
  size_t pages_per_worker = 6250;
  std::string placement_policy = "predicted_ttft";
  PlacementPolicyOptions placement;
  // Of the workers without a cache; 0: 1.0 for Mooncake, 1.5 for WEKA.
  double utilisation = 0;
  absl::Duration decode_token_time = absl::Milliseconds(25);
  // Seeds the session starts of WEKA and the ties of placement.
  uint64_t seed = 1;
  // Also compute Belady's optimum of the shared cache (most of the run time on long traces).
  bool with_optimum = true;
  // Times the decisions, never the simulation. Not owned.
  const Clock* clock = Clock::Real();

  absl::Status Validate() const;
};

struct WorkerReport {
  uint64_t num_requests = 0;
  uint64_t num_pages = 0;
  uint64_t hit_pages = 0;
  uint64_t evicted_pages = 0;
  absl::Duration prefill_time;
};

struct TtftReport {
  absl::Duration mean, p50, p95, p99, max;
};
// Quantiles by nearest rank. `seconds` is not empty.
TtftReport SummariseTtft(std::vector<double> seconds);

struct ReplayReport {
  ReplayOptions options;  // with the utilisation that was used
  uint64_t num_requests = 0;
  uint64_t num_pages = 0;  // over all requests
  uint64_t num_distinct_pages = 0;
  absl::Duration span;  // first to last arrival
  double prefill_tokens_per_second = 0;

  double hit_rate = 0;
  double shared_hit_rate = 0;        // one leaf-first LRU of num_workers × pages_per_worker
  double optimal_hit_rate = 0;       // Belady on the same shared cache; 0 if not asked for
  double hit_rate_over_shared = 0;   // hit_rate / shared_hit_rate; 0 if that is 0
  double max_over_mean_prefill = 0;  // over workers, of prefill time
  TtftReport ttft;
  std::vector<WorkerReport> workers;
  // Residency look-up + placement, on this machine now. The only number that another run changes.
  double decisions_per_second = 0;

  // A table for people, and one JSON object with the same numbers (times in seconds).
  std::string ToTable() const;
  std::string ToJson() const;
};

// INVALID_ARGUMENT for bad options and bad traces, also for one whose span is zero; NOT_FOUND for a
// missing file.
absl::StatusOr<ReplayReport> Simulate(const ReplayOptions& options);

}  // namespace pagetide

#endif  // PAGETIDE_REPLAY_SIMULATOR_H_
