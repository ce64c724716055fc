#include "replay/simulator.h"

#include <algorithm>
#include <cmath>
#include <deque>
#include <functional>
#include <memory>
#include <queue>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "core/decaying_sum.h"
#include "core/eviction_policy.h"
#include "replay/cache_model.h"
#include "replay/trace_slice.h"

namespace pagetide {
namespace {

constexpr size_t kMaxWorkers = 4096;
constexpr size_t kMaxPagesPerWorker = size_t{1} << 28;

// One worker: a FIFO prefill queue, running decodes and a cache. Times in seconds of the trace.
class SimulatedWorker {
 public:
  SimulatedWorker(size_t capacity_pages, size_t num_pages)
      : cache_(capacity_pages, num_pages, std::make_unique<LeafFirstLru>()) {}

  // What a router would know about this worker at `now` for a request over `pages`.
  WorkerSnapshot Snapshot(double now, const TraceRequest& request, double prefill_rate) {
    while (!running_.empty() && running_.top().first <= now) {
      active_tokens_ -= running_.top().second;
      running_.pop();
    }
    WorkerSnapshot snapshot;
    snapshot.prefill_tokens_per_second = prefill_rate;
    snapshot.queue_wait = absl::Seconds(std::max(0.0, prefill_free_at_ - now));
    snapshot.recent_prefill = absl::Seconds(recent_prefill_.At(absl::Seconds(now)));
    snapshot.active_sequences = static_cast<int64_t>(running_.size());
    snapshot.active_tokens = active_tokens_;
    const size_t hits = cache_.LeadingHits(request.pages);
    if (hits > 0) snapshot.prefix.push_back({Tier::kDevice, HitTokens(hits, request)});
    return snapshot;
  }

  // Runs `request`; returns its time to first token.
  double Dispatch(double now, const TraceRequest& request, int64_t computed_tokens,
                  double prefill_rate, double decode_token_seconds) {
    const double prefill = static_cast<double>(computed_tokens) / prefill_rate;
    const double first_token_at = std::max(prefill_free_at_, now) + prefill;
    prefill_free_at_ = first_token_at;
    prefill_seconds_ += prefill;
    recent_prefill_.Add(absl::Seconds(now), prefill);
    const int64_t tokens = request.input_tokens + request.output_tokens;
    running_.emplace(
        first_token_at + decode_token_seconds * static_cast<double>(request.output_tokens), tokens);
    active_tokens_ += tokens;
    ++report_.num_requests;
    report_.num_pages += request.pages.size();
    report_.hit_pages += cache_.LeadingHits(request.pages);
    cache_.Admit(request.pages);
    return first_token_at - now;
  }

  double prefill_seconds() const { return prefill_seconds_; }
  WorkerReport Report() const {
    WorkerReport report = report_;
    report.evicted_pages = cache_.num_evicted();
    report.prefill_time = absl::Seconds(prefill_seconds_);
    return report;
  }

 private:
  static int64_t HitTokens(size_t hits, const TraceRequest& request) {
    return std::min(static_cast<int64_t>(hits) * kTracePageTokens, request.input_tokens);
  }

  using Running = std::pair<double, int64_t>;  // end, KV tokens held until then

  PageCacheModel cache_;
  double prefill_free_at_ = 0;
  double prefill_seconds_ = 0;
  DecayingSum recent_prefill_{kRecentPrefillTimeConstant};  // seconds
  std::priority_queue<Running, std::vector<Running>, std::greater<Running>> running_;
  int64_t active_tokens_ = 0;
  WorkerReport report_;
};

uint64_t SharedLruHits(const TraceSlice& trace, size_t capacity_pages) {
  PageCacheModel cache(capacity_pages, trace.num_pages, std::make_unique<LeafFirstLru>());
  uint64_t hits = 0;
  for (const TraceRequest& request : trace.requests) {
    hits += cache.LeadingHits(request.pages);
    cache.Admit(request.pages);
  }
  return hits;
}

double Share(uint64_t part, uint64_t whole) {
  return whole == 0 ? 0 : static_cast<double>(part) / static_cast<double>(whole);
}

}  // namespace

absl::Status ReplayOptions::Validate() const {
  if (num_workers < 1 || num_workers > kMaxWorkers) {
    return absl::InvalidArgumentError(
        absl::StrCat("simulate: workers ", num_workers, " is not in [1, ", kMaxWorkers, "]"));
  }
  if (pages_per_worker < 1 || pages_per_worker > kMaxPagesPerWorker) {
    return absl::InvalidArgumentError(absl::StrCat("simulate: pages per worker ", pages_per_worker,
                                                   " is not in [1, ", kMaxPagesPerWorker, "]"));
  }
  if (!std::isfinite(utilisation) || utilisation < 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("simulate: utilisation ", utilisation, " is not finite and >= 0"));
  }
  if (decode_token_time < absl::ZeroDuration() || decode_token_time > absl::Hours(1)) {
    return absl::InvalidArgumentError(absl::StrCat("simulate: decode token time ",
                                                   absl::FormatDuration(decode_token_time),
                                                   " is not in [0, 1h]"));
  }
  return absl::OkStatus();
}

TtftReport SummariseTtft(std::vector<double> seconds) {
  std::sort(seconds.begin(), seconds.end());
  double sum = 0;
  for (double s : seconds) sum += s;
  // Nearest rank: the smallest value that a share q of all does not exceed.
  const auto quantile = [&](double q) {
    const size_t rank = static_cast<size_t>(std::ceil(q * static_cast<double>(seconds.size())));
    return absl::Seconds(seconds[std::max<size_t>(rank, 1) - 1]);
  };
  return {absl::Seconds(sum / static_cast<double>(seconds.size())), quantile(0.50), quantile(0.95),
          quantile(0.99), absl::Seconds(seconds.back())};
}

absl::StatusOr<ReplayReport> Simulate(const ReplayOptions& options) {
  PT_RETURN_IF_ERROR(options.Validate());
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<PlacementPolicy> policy,
                      MakePlacementPolicy(options.placement_policy, options.placement));
  PT_ASSIGN_OR_RETURN(const TraceSlice trace,
                      LoadTraceSlice({.path = options.trace_path,
                                      .format = options.format,
                                      .seed = options.seed,
                                      .first_request = options.first_request,
                                      .max_requests = options.max_requests}));

  ReplayReport report;
  report.options = options;
  if (options.utilisation == 0) {
    report.options.utilisation = options.format == TraceFormat::kMooncake ? 1.0 : 1.5;
  }
  report.num_requests = trace.requests.size();
  report.num_distinct_pages = trace.num_pages;
  report.span = trace.requests.back().arrival - trace.requests.front().arrival;
  double total_tokens = 0;
  for (const TraceRequest& request : trace.requests) {
    report.num_pages += request.pages.size();
    total_tokens += static_cast<double>(request.input_tokens);
  }
  const double span = absl::ToDoubleSeconds(report.span);
  if (span <= 0 || total_tokens <= 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "simulate ", options.trace_path, ": ", report.num_requests, " requests with ", total_tokens,
        " prompt tokens in ", span, " s: the load cannot be scaled to a utilisation"));
  }
  const double rate =
      total_tokens / (static_cast<double>(options.num_workers) * span * report.options.utilisation);
  report.prefill_tokens_per_second = rate;

  std::deque<SimulatedWorker> workers;  // not movable
  for (size_t i = 0; i < options.num_workers; ++i) {
    workers.emplace_back(options.pages_per_worker, trace.num_pages);
  }
  std::vector<WorkerSnapshot> snapshots(options.num_workers);
  std::vector<double> ttft;
  ttft.reserve(trace.requests.size());
  absl::Duration decision_time;
  PlacementRequest placement;
  placement.tie_seed = options.seed * 0x9e3779b97f4a7c15u;
  for (const TraceRequest& request : trace.requests) {
    const double now = absl::ToDoubleSeconds(request.arrival);
    const MonotonicTime before = options.clock->MonotonicNow();
    placement.prompt_tokens = request.input_tokens;
    placement.max_new_tokens = request.output_tokens;
    ++placement.tie_seed;
    for (size_t i = 0; i < workers.size(); ++i) {
      snapshots[i] = workers[i].Snapshot(now, request, rate);
    }
    PT_ASSIGN_OR_RETURN(const PlacementDecision decision,
                        PlaceSequence(*policy, placement, snapshots));
    decision_time += options.clock->MonotonicNow() - before;
    const PlacementCandidate& chosen = decision.candidates.front();
    ttft.push_back(
        workers[chosen.worker].Dispatch(now, request, chosen.computed_tokens, rate,
                                        absl::ToDoubleSeconds(options.decode_token_time)));
  }

  uint64_t hits = 0;
  double max_prefill = 0;
  double sum_prefill = 0;
  for (const SimulatedWorker& worker : workers) {
    report.workers.push_back(worker.Report());
    hits += report.workers.back().hit_pages;
    max_prefill = std::max(max_prefill, worker.prefill_seconds());
    sum_prefill += worker.prefill_seconds();
  }
  const size_t shared_capacity = options.num_workers * options.pages_per_worker;
  report.hit_rate = Share(hits, report.num_pages);
  report.shared_hit_rate = Share(SharedLruHits(trace, shared_capacity), report.num_pages);
  if (options.with_optimum) {
    report.optimal_hit_rate =
        Share(OptimalHits(trace.requests, shared_capacity, trace.num_pages), report.num_pages);
  }
  if (report.shared_hit_rate > 0) {
    report.hit_rate_over_shared = report.hit_rate / report.shared_hit_rate;
  }
  if (sum_prefill > 0) {
    report.max_over_mean_prefill = max_prefill * static_cast<double>(workers.size()) / sum_prefill;
  }
  report.ttft = SummariseTtft(std::move(ttft));
  const double decision_seconds = absl::ToDoubleSeconds(decision_time);
  if (decision_seconds > 0) {
    report.decisions_per_second = static_cast<double>(report.num_requests) / decision_seconds;
  }
  return report;
}

}  // namespace pagetide
