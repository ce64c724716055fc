#include "replay/live_replay.h"

#include <pthread.h>

#include <algorithm>
#include <cmath>
#include <map>
#include <memory>
#include <optional>
#include <thread>
#include <utility>

#include "absl/strings/str_cat.h"
#include "absl/time/clock.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "clients/cpp/client.h"
#include "replay/live_content.h"
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

std::vector<v1::WorkerInfo> ServingWorkers(const std::vector<v1::WorkerInfo>& all) {
  std::vector<v1::WorkerInfo> serving;
  for (const v1::WorkerInfo& worker : all) {
    if (worker.role() != "store" && worker.state() == "serving") serving.push_back(worker);
  }
  return serving;
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

// One run: threads take requests in the order of the trace.
class LiveRun {
 public:
  LiveRun(const LiveReplayOptions* options, const TraceSlice* slice, Client* client,
          std::shared_ptr<const Model> model)
      : options_(options),
        slice_(slice),
        client_(client),
        model_(std::move(model)),
        content_(model_.get(), options->content_seed) {}

  // Runs all requests, on threads "replay-N".
  void Run() {
    std::vector<std::thread> threads;
    for (size_t i = 0; i < std::min(options_->concurrency, slice_->requests.size()); ++i) {
      threads.emplace_back([this] { Work(); });
      pthread_setname_np(threads.back().native_handle(), absl::StrCat("replay-", i).c_str());
    }
    for (std::thread& thread : threads) thread.join();
  }

  // After Run.
  void Report(LiveReplayReport* report) {
    MutexLock lock(&mu_);
    report->totals = totals_;
    report->first_error = first_error_;
    report->first_wrong = first_wrong_;
    if (!ttft_seconds_.empty()) report->ttft = SummariseTtft(ttft_seconds_);
  }

 private:
  struct Played {
    LiveTotals totals;
    std::optional<absl::Duration> ttft;
    std::string first_wrong;
  };

  void Work() {
    for (;;) {
      size_t index;
      {
        MutexLock lock(&mu_);
        if (next_ == slice_->requests.size()) return;
        index = next_++;
      }
      Played played;
      const absl::Status status = Play(index, &played);
      MutexLock lock(&mu_);
      totals_.Add(played.totals);
      ++totals_.requests;
      if (played.ttft) ttft_seconds_.push_back(absl::ToDoubleSeconds(*played.ttft));
      if (first_wrong_.empty()) first_wrong_ = played.first_wrong;
      if (status.ok()) continue;
      ++totals_.failed_requests;
      if (first_error_.empty()) {
        first_error_ =
            absl::StrCat("request ", options_->replay.first_request + index, " (line ",
                         slice_->requests[index].line,
                         "): ", absl::StatusCodeToString(status.code()), ": ", status.message());
      }
    }
  }

  absl::Status Play(size_t index, Played* played) {
    const TraceRequest& request = slice_->requests[index];
    const uint32_t decode =
        static_cast<uint32_t>(std::min<int64_t>(options_->decode_tokens, request.output_tokens));
    const LivePrompt prompt = content_.MakePrompt(request, options_->replay.first_request + index,
                                                  options_->own_tokens, decode);
    const std::span<const uint32_t> tokens(prompt.tokens);
    const uint32_t page_tokens = model_->geometry().page_tokens();
    LiveTotals& totals = played->totals;

    const absl::Time start = absl::Now();
    PT_ASSIGN_OR_RETURN(const std::unique_ptr<Sequence> sequence,
                        client_->Open(model_, tokens.first(prompt.prompt_tokens)));
    const uint64_t promised = sequence->length();
    PT_ASSIGN_OR_RETURN(const uint64_t reused, sequence->WaitReady());
    const v1::PrefixReuse& reuse = sequence->reuse();
    totals.prompt_tokens += prompt.prompt_tokens;
    totals.reused_tokens += reused;
    totals.trace_pages += prompt.trace_pages;
    const uint64_t hits = std::min<uint64_t>(reused / page_tokens, prompt.trace_pages);
    totals.hit_pages += hits;
    totals.device_hit_pages += std::min<uint64_t>(reuse.device_tokens() / page_tokens, hits);
    totals.declined_restores += reuse.limit() == v1::REUSE_LIMIT_SLOWER_THAN_COMPUTE ? 1 : 0;
    totals.shortened += reused < promised ? 1 : 0;

    PT_RETURN_IF_ERROR(Verify(prompt, *sequence, 0, reused, /*is_reused=*/true, played));
    const bool is_planted = options_->plant_wrong_byte && index == 0;
    for (uint64_t at = reused; at < prompt.prompt_tokens;) {
      // To the end of a page, so that all but the last append fill what they begin.
      const uint64_t end = std::min<uint64_t>(
          (at / page_tokens + options_->append_pages) * page_tokens, prompt.prompt_tokens);
      PT_RETURN_IF_ERROR(Append(prompt, at, end, is_planted && at == reused, *sequence));
      totals.computed_tokens += end - at;
      at = end;
    }
    played->ttft = absl::Now() - start;
    for (uint64_t at = prompt.prompt_tokens; at < tokens.size(); ++at) {
      PT_RETURN_IF_ERROR(Decode(prompt, at, *sequence));
      ++totals.decoded_tokens;
    }
    PT_RETURN_IF_ERROR(Verify(prompt, *sequence, reused, tokens.size(), false, played));
    return sequence->Close();
  }

  absl::Status Append(const LivePrompt& prompt, uint64_t begin, uint64_t end, bool is_planted,
                      Sequence& sequence) {
    const uint64_t num_tokens = end - begin;
    PT_ASSIGN_OR_RETURN(
        const std::unique_ptr<PendingAppend> append,
        sequence.BeginAppend(std::span<const uint32_t>(prompt.tokens).subspan(begin, num_tokens),
                             /*will_attend=*/false));
    if (options_->prefill_tokens_per_second > 0) {
      absl::SleepFor(
          absl::Seconds(static_cast<double>(num_tokens) / options_->prefill_tokens_per_second));
    }
    std::vector<std::byte> rows;
    for (uint32_t layer = 0; layer < options_->num_layers; ++layer) {
      for (const RowKind kind : {RowKind::kK, RowKind::kV}) {
        rows.resize(num_tokens * options_->row_bytes);
        content_.FillRows(prompt, layer, kind, begin, rows);
        if (is_planted && layer == 0 && kind == RowKind::kK) rows.front() ^= std::byte{1};
        PT_RETURN_IF_ERROR(append->WriteRows(0, layer, kind, 0, rows));
      }
    }
    return append->Commit().status();
  }

  absl::Status Decode(const LivePrompt& prompt, uint64_t at, Sequence& sequence) {
    PT_ASSIGN_OR_RETURN(const std::unique_ptr<PendingStep> step,
                        sequence.BeginStep(1, /*will_attend=*/false));
    std::vector<std::byte> k(options_->row_bytes);
    std::vector<std::byte> v(options_->row_bytes);
    for (uint32_t layer = 0; layer < options_->num_layers; ++layer) {
      content_.FillRows(prompt, layer, RowKind::kK, at, k);
      content_.FillRows(prompt, layer, RowKind::kV, at, v);
      PT_RETURN_IF_ERROR(step->WriteRows(0, layer, k, v));
    }
    return step->Commit(std::span<const uint32_t>(prompt.tokens).subspan(at, 1));
  }

  // Reads rows [begin, end) of all layers and compares each byte. A few pages at a time: what is
  // read stays pinned meanwhile, and a sequence may be larger than the pool.
  absl::Status Verify(const LivePrompt& prompt, Sequence& sequence, uint64_t begin, uint64_t end,
                      bool is_reused, Played* played) {
    const uint64_t step = uint64_t{options_->append_pages} * options_->page_tokens;
    uint64_t verified = 0;
    uint64_t wrong = 0;
    for (uint64_t at = begin; at < end; at += step) {
      PT_RETURN_IF_ERROR(sequence.ReadRows(
          0, at, std::min(at + step, end), {}, [&](const RowsPart& part) -> absl::Status {
            if (part.first_token + part.num_tokens > prompt.tokens.size()) {
              return absl::DataLossError(absl::StrCat("read rows up to ",
                                                      part.first_token + part.num_tokens, " of ",
                                                      prompt.tokens.size()));
            }
            const uint64_t differing = content_.CountWrongBytes(prompt, part.layer, part.kind,
                                                                part.first_token, part.bytes);
            if (differing > 0 && played->first_wrong.empty()) {
              played->first_wrong = absl::StrCat(
                  differing, " bytes of ", part.kind == RowKind::kK ? "K" : "V", " rows [",
                  part.first_token, ", ", part.first_token + part.num_tokens, ") of layer ",
                  part.layer, " of sequence ", sequence.id(), " at ", sequence.worker_id());
            }
            wrong += differing;
            verified += part.bytes.size();
            return absl::OkStatus();
          }));
    }
    const uint64_t expected =
        end <= begin ? 0 : (end - begin) * options_->num_layers * 2 * options_->row_bytes;
    if (verified != expected) {
      return absl::DataLossError(absl::StrCat("read rows [", begin, ", ", end, ") of ",
                                              sequence.id(), ": ", verified,
                                              " bytes came, expected ", expected));
    }
    played->totals.bytes_verified += verified;
    played->totals.wrong_bytes += wrong;
    if (is_reused) {
      played->totals.reused_bytes_verified += verified;
      played->totals.wrong_reused_bytes += wrong;
    }
    return absl::OkStatus();
  }

  const LiveReplayOptions* const options_;
  const TraceSlice* const slice_;
  Client* const client_;
  const std::shared_ptr<const Model> model_;  // shared with the sequences of the client
  const LiveContent content_;

  Mutex mu_;
  size_t next_ ABSL_GUARDED_BY(mu_) = 0;
  LiveTotals totals_ ABSL_GUARDED_BY(mu_);
  std::vector<double> ttft_seconds_ ABSL_GUARDED_BY(mu_);
  std::string first_error_ ABSL_GUARDED_BY(mu_);
  std::string first_wrong_ ABSL_GUARDED_BY(mu_);
};

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
