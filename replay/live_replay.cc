#include "replay/live_replay.h"

#include <algorithm>
#include <cmath>
#include <memory>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/status_macros.h"
#include "clients/cpp/client.h"
#include "clients/cpp/serving_workers.h"
#include "replay/live_run.h"
#include "replay/trace_slice.h"

namespace pagetide {
namespace {

constexpr size_t kMaxConcurrency = 256;
// Workers publish their counters a few times a second, and pages may still be on their way down.
constexpr absl::Duration kCountersInterval = absl::Milliseconds(250);
constexpr int kMaxCounterReads = 20;

template <typename Number>
absl::Status CheckRange(absl::string_view field, Number value, Number min, Number max) {
  if (value >= min && value <= max) return absl::OkStatus();
  return absl::InvalidArgumentError(
      absl::StrCat("replay live: ", field, " ", value, " is not in [", min, ", ", max, "]"));
}

absl::StatusOr<LiveCounters> ReadCounters(
    const std::vector<std::shared_ptr<WorkerConnection>>& workers) {
  LiveCounters sum;
  for (const std::shared_ptr<WorkerConnection>& worker : workers) {
    PT_ASSIGN_OR_RETURN(const auto stats, worker->GetStats());
    const auto add = [&stats](const char* name, uint64_t* value) {
      const auto found = stats.find(name);
      if (found != stats.end()) *value += static_cast<uint64_t>(found->second);
    };
    add("pagetide_worker_pages_spilled_total", &sum.pages_spilled);
    add("pagetide_worker_pages_written_through_total", &sum.pages_written_through);
    add("pagetide_worker_pages_restored_total", &sum.pages_restored);
    add("pagetide_worker_pages_evicted_total", &sum.pages_evicted);
    add("pagetide_worker_checksum_failures_total", &sum.checksum_failures);
  }
  return sum;
}

bool IsSame(const LiveCounters& a, const LiveCounters& b) {
  return a.pages_spilled == b.pages_spilled && a.pages_written_through == b.pages_written_through &&
         a.pages_restored == b.pages_restored && a.pages_evicted == b.pages_evicted;
}

absl::StatusOr<LiveCounters> ReadSettledCounters(
    const std::vector<std::shared_ptr<WorkerConnection>>& workers) {
  PT_ASSIGN_OR_RETURN(LiveCounters last, ReadCounters(workers));
  for (int i = 1; i < kMaxCounterReads; ++i) {
    absl::SleepFor(kCountersInterval);
    PT_ASSIGN_OR_RETURN(const LiveCounters now, ReadCounters(workers));
    if (IsSame(now, last)) return now;
    last = now;
  }
  return last;
}

// Frames of the model's pool at the worker that has most of them: pools of a fleet are alike, and a
// worker that no request reached has none yet.
absl::StatusOr<size_t> FramesOf(const Model& model,
                                const std::vector<std::shared_ptr<WorkerConnection>>& workers) {
  uint64_t frames = 0;
  for (const std::shared_ptr<WorkerConnection>& worker : workers) {
    PT_ASSIGN_OR_RETURN(const v1::GetMemoryBreakdownResponse memory,
                        CallUnary(worker->call_options(), worker->admin(),
                                  &v1::AdminService::StubInterface::GetMemoryBreakdown,
                                  v1::GetMemoryBreakdownRequest()));
    for (const auto& pool : memory.pools()) {
      if (pool.model_digest() == model.digest().ToHex()) {
        frames = std::max<uint64_t>(frames, pool.num_frames());
      }
    }
  }
  return frames;
}

absl::StatusOr<TraceSlice> LoadSlice(const ReplayOptions& options) {
  return LoadTraceSlice({.path = options.trace_path,
                         .format = options.format,
                         .seed = options.seed,
                         .first_request = options.first_request,
                         .max_requests = options.max_requests});
}

absl::StatusOr<double> SimulatedHitRate(ReplayOptions options, size_t num_workers,
                                        size_t pages_per_worker) {
  options.num_workers = num_workers;
  options.pages_per_worker = pages_per_worker;
  options.with_optimum = false;
  PT_ASSIGN_OR_RETURN(const ReplayReport report, Simulate(options));
  return report.hit_rate;
}

}  // namespace

absl::Status LiveReplayOptions::Validate() const {
  PT_RETURN_IF_ERROR(CheckRange<size_t>("concurrency", concurrency, 1, kMaxConcurrency));
  PT_RETURN_IF_ERROR(CheckRange<uint32_t>("page tokens", page_tokens, 2, 4096));
  PT_RETURN_IF_ERROR(CheckRange<uint32_t>("layers", num_layers, 1, 256));
  PT_RETURN_IF_ERROR(CheckRange<uint32_t>("row bytes", row_bytes, 2, 65536));
  PT_RETURN_IF_ERROR(CheckRange<uint32_t>("own tokens", own_tokens, 1, 65536));
  PT_RETURN_IF_ERROR(CheckRange<uint32_t>("decode tokens", decode_tokens, 0, 65536));
  PT_RETURN_IF_ERROR(CheckRange<uint32_t>("append pages", append_pages, 1, 4096));
  if (row_bytes % 2 != 0) {
    return absl::InvalidArgumentError(
        absl::StrCat("replay live: row bytes ", row_bytes, " are not whole f16 elements"));
  }
  if (!std::isfinite(prefill_tokens_per_second) || prefill_tokens_per_second < 0) {
    return absl::InvalidArgumentError(absl::StrCat(
        "replay live: prefill rate ", prefill_tokens_per_second, " is not finite and >= 0"));
  }
  return absl::OkStatus();
}

absl::StatusOr<ModelSpec> LiveReplayOptions::MakeModelSpec() const {
  PT_RETURN_IF_ERROR(Validate());
  ModelSpec spec;
  spec.name = "replay";
  spec.weights_digest = Sha256Of("pagetide replay: rows derived from page keys, version 1");
  spec.tokenizer_digest = Sha256Of("pagetide replay: tokens derived from page numbers, version 1");
  spec.geometry.page_tokens = page_tokens;
  LayerGroupSpec group;
  for (uint32_t layer = 0; layer < num_layers; ++layer) group.layers.push_back(layer);
  group.kv_heads = 1;
  group.k_dim = group.v_dim = row_bytes / 2;
  spec.geometry.groups.push_back(std::move(group));
  // A name stands for one digest: each geometry has its own.
  PT_ASSIGN_OR_RETURN(const Model model, Model::Create(spec));
  spec.name = absl::StrCat("replay-", model.digest().ToShortHex());
  return spec;
}

void LiveTotals::Add(const LiveTotals& other) {
  requests += other.requests;
  failed_requests += other.failed_requests;
  prompt_tokens += other.prompt_tokens;
  reused_tokens += other.reused_tokens;
  computed_tokens += other.computed_tokens;
  decoded_tokens += other.decoded_tokens;
  trace_pages += other.trace_pages;
  hit_pages += other.hit_pages;
  device_hit_pages += other.device_hit_pages;
  pending_pages += other.pending_pages;
  device_elsewhere_pages += other.device_elsewhere_pages;
  declined_restores += other.declined_restores;
  shortened += other.shortened;
  bytes_verified += other.bytes_verified;
  reused_bytes_verified += other.reused_bytes_verified;
  wrong_bytes += other.wrong_bytes;
  wrong_reused_bytes += other.wrong_reused_bytes;
}

absl::StatusOr<uint64_t> LargestRequestFrames(const LiveReplayOptions& options) {
  PT_RETURN_IF_ERROR(options.Validate());
  PT_ASSIGN_OR_RETURN(const TraceSlice slice, LoadSlice(options.replay));
  size_t pages = 0;
  for (const TraceRequest& request : slice.requests) pages = std::max(pages, request.pages.size());
  const uint64_t own_tokens = uint64_t{options.own_tokens} + options.decode_tokens;
  return pages + (own_tokens + options.page_tokens - 1) / options.page_tokens;
}

absl::StatusOr<LiveReplayReport> RunLiveReplay(const LiveReplayOptions& options) {
  PT_ASSIGN_OR_RETURN(const ModelSpec spec, options.MakeModelSpec());
  PT_ASSIGN_OR_RETURN(const TraceSlice slice, LoadSlice(options.replay));
  LiveReplayReport report;
  report.options = options;
  // Also refuses a slice that cannot be simulated before anything is sent.
  PT_ASSIGN_OR_RETURN(report.simulated_unbounded_hit_rate,
                      SimulatedHitRate(options.replay, 1, std::max<size_t>(slice.num_pages, 1)));
  std::vector<bool> is_named(slice.num_pages, false);
  for (const TraceRequest& request : slice.requests) {
    for (const PageId page : request.pages) is_named[page.value()] = true;
  }
  report.distinct_pages = std::count(is_named.begin(), is_named.end(), true);

  ClientOptions client_options;
  client_options.router_address = options.router_address;
  PT_ASSIGN_OR_RETURN(const std::unique_ptr<Client> client,
                      Client::Create(std::move(client_options)));
  PT_ASSIGN_OR_RETURN(const std::vector<v1::WorkerInfo> all, client->ListWorkers());
  std::vector<std::shared_ptr<WorkerConnection>> workers;
  for (const v1::WorkerInfo& worker : ServingWorkers(all)) {
    workers.push_back(client->ConnectWorker(worker.address(), worker.local_socket()));
  }
  if (workers.empty()) {
    return absl::UnavailableError(
        absl::StrCat("replay live: router ", options.router_address, " knows no serving worker"));
  }
  PT_ASSIGN_OR_RETURN(std::shared_ptr<const Model> model, client->RegisterModel(spec));
  report.num_workers = workers.size();
  report.page_bytes = model->geometry().bytes_per_page_of_tokens();
  PT_ASSIGN_OR_RETURN(const LiveCounters before, ReadCounters(workers));

  LiveRun run(&options, &slice, client.get(), model);
  const absl::Time start = absl::Now();
  run.Run();
  report.took = absl::Now() - start;
  run.Report(&report);

  PT_ASSIGN_OR_RETURN(const LiveCounters after, ReadSettledCounters(workers));
  report.counters = {after.pages_spilled - before.pages_spilled,
                     after.pages_written_through - before.pages_written_through,
                     after.pages_restored - before.pages_restored,
                     after.pages_evicted - before.pages_evicted,
                     after.checksum_failures - before.checksum_failures};
  PT_ASSIGN_OR_RETURN(report.frames_per_worker, FramesOf(*model, workers));
  if (report.frames_per_worker > 0) {
    PT_ASSIGN_OR_RETURN(
        report.simulated_hit_rate,
        SimulatedHitRate(options.replay, report.num_workers, report.frames_per_worker));
  }
  return report;
}

}  // namespace pagetide
