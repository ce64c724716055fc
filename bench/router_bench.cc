// Decisions of the router: how many a second and how long one takes, with the residency of 1 M
// pages on 64 workers, in the domain alone and through gRPC on loopback.
//
//   router_bench [--pages N] [--workers N] [--seconds S] [--runs N] [--callers N]
//
// Two fleets: "spread", where each page is on one worker and a thirty-second of them on all (system
// prompts), and "full", where every page is on every worker. A prompt has 32 pages of 256 tokens
// and a tail of 100; half of its pages are resident. Medians over the runs, which alternate between
// the cases.
#include <grpcpp/client_context.h>

#include <CLI/CLI.hpp>
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/metrics.h"
#include "core/router.h"
#include "pagetide/v1/router.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/model_codec.h"
#include "rpc/process_tuning.h"
#include "services/router_role.h"

namespace pagetide {
namespace {

struct Flags {
  uint32_t pages = 1000000;
  uint32_t workers = 64;
  double seconds = 2;
  int runs = 5;
  int callers = 16;  // calls in flight through gRPC
};

constexpr uint32_t kPageTokens = 256;
constexpr uint32_t kPromptPages = 32;
constexpr uint32_t kTailTokens = 100;

using SteadyClock = std::chrono::steady_clock;

struct Sample {
  double per_second = 0;
  double p50_us = 0;
  double p99_us = 0;
};

Sample Summarize(std::vector<double>& latencies_us, double seconds) {
  std::sort(latencies_us.begin(), latencies_us.end());
  const auto at = [&](double q) {
    return latencies_us.empty() ? 0
                                : latencies_us[static_cast<size_t>(
                                      q * static_cast<double>(latencies_us.size() - 1))];
  };
  return {static_cast<double>(latencies_us.size()) / seconds, at(0.5), at(0.99)};
}

Sample MedianOf(std::vector<Sample> samples) {
  const auto median = [&](double Sample::*field) {
    std::sort(samples.begin(), samples.end(),
              [&](const Sample& a, const Sample& b) { return a.*field < b.*field; });
    return samples[samples.size() / 2].*field;
  };
  return {median(&Sample::per_second), median(&Sample::p50_us), median(&Sample::p99_us)};
}

// Page n of the fleet: uniform, as the hash of a real key is.
PrefixHint HintOf(uint64_t n) {
  PrefixHint hint;
  std::mt19937_64 rng(n);
  for (size_t i = 0; i < hint.bytes.size(); i += 8) {
    const uint64_t word = rng();
    std::memcpy(&hint.bytes[i], &word, 8);
  }
  return hint;
}

WorkerLoad LoadOf(const std::string& model_digest) {
  return {.free_frames = 1000,
          .total_frames = 100000,
          .open_sequences = 10,
          .prefill_tokens_per_second = 5000,
          .store_bytes_per_second = 1e9,
          .host_bytes_per_second = 5e9,
          .model_digests = {model_digest}};
}

// Attaches the fleet and keeps it alive: with a heartbeat of its own thread every 100 ms, as the
// workers' reports would, so that queues do not grow without end.
class Fleet {
 public:
  Fleet(Router* router, const Flags& flags, const std::string& model_digest, bool is_full)
      : router_(router), model_digest_(model_digest) {
    const auto started = SteadyClock::now();
    std::vector<PrefixHint> hints(flags.pages);
    for (uint32_t n = 0; n < flags.pages; ++n) hints[n] = HintOf(n);
    uint64_t copies = 0;
    for (uint32_t w = 0; w < flags.workers; ++w) {
      auto attached = router->Attach({.worker_id = absl::StrCat("w", w),
                                      .incarnation = w + 1,
                                      .address = absl::StrCat("10.0.0.", w, ":7101"),
                                      .is_in_process = true});
      if (!attached.ok()) std::abort();
      attachments_.push_back(attached->id);
      std::vector<ResidencyDelta> changes;
      uint64_t number = 0;
      const auto flush = [&] {
        router->OnResidency(attached->id, {.number = ++number, .changes = changes}).IgnoreError();
        copies += changes.size();
        changes.clear();
      };
      for (uint32_t n = 0; n < flags.pages; ++n) {
        // Pages of one prompt are consecutive; a prompt is on one worker.
        const uint32_t prompt = n / kPromptPages;
        if (!is_full && prompt % 32 != 0 && prompt % flags.workers != w) continue;
        changes.push_back({.hint = hints[n]});
        if (changes.size() == 4096) flush();
      }
      flush();
    }
    load_seconds_ = std::chrono::duration<double>(SteadyClock::now() - started).count();
    copies_ = copies;
    Beat();
    heart_ = std::thread([this] {
      while (!is_stopping_.load(std::memory_order_relaxed)) {
        Beat();
        std::this_thread::sleep_for(std::chrono::milliseconds(100));
      }
    });
  }
  ~Fleet() {
    is_stopping_.store(true, std::memory_order_relaxed);
    heart_.join();
  }
  uint64_t copies() const { return copies_; }
  double load_seconds() const { return load_seconds_; }

 private:
  void Beat() {
    for (AttachmentId id : attachments_) {
      router_->OnLoad(id, LoadOf(model_digest_)).IgnoreError();
    }
  }

  Router* const router_;
  const std::string model_digest_;
  std::vector<AttachmentId> attachments_;
  uint64_t copies_ = 0;
  double load_seconds_ = 0;
  std::atomic<bool> is_stopping_{false};  // relaxed: only asks the thread to end
  std::thread heart_;
};

// The n-th prompt: its first half resident.
RoutedPrompt PromptOf(uint64_t n, const Flags& flags, const Model& model) {
  RoutedPrompt prompt{.model_digest = model.digest().ToHex(),
                      .page_tokens = kPageTokens,
                      .num_groups = 1,
                      .page_bytes = model.geometry().bytes_per_page_of_tokens(),
                      .num_tokens = kPromptPages * kPageTokens + kTailTokens};
  const uint64_t first = n % (flags.pages / kPromptPages) * kPromptPages;
  for (uint32_t i = 0; i < kPromptPages; ++i) {
    prompt.hints.push_back(HintOf(i < kPromptPages / 2 ? first + i : ~(first + i)));
  }
  return prompt;
}

Sample RunDomain(Router& router, const Flags& flags, const std::vector<RoutedPrompt>& prompts,
                 int num_threads) {
  std::vector<std::vector<double>> latencies(num_threads);
  std::vector<std::thread> threads;
  const auto started = SteadyClock::now();
  const auto end = started + std::chrono::duration<double>(flags.seconds);
  for (int t = 0; t < num_threads; ++t) {
    threads.emplace_back([&, t] {
      for (uint64_t n = t;; n += num_threads) {
        const auto before = SteadyClock::now();
        if (before >= end) return;
        if (!router.Assign(prompts[n * 7919 % prompts.size()], {}).ok()) std::abort();
        latencies[t].push_back(
            std::chrono::duration<double, std::micro>(SteadyClock::now() - before).count());
      }
    });
  }
  for (auto& thread : threads) thread.join();
  std::vector<double> all;
  for (const auto& l : latencies) all.insert(all.end(), l.begin(), l.end());
  return Summarize(all, std::chrono::duration<double>(SteadyClock::now() - started).count());
}

// `callers` threads with one call in flight each, over 4 connections.
Sample RunGrpc(const std::string& address, const Flags& flags,
               const std::vector<v1::AssignSequenceRequest>& requests) {
  std::vector<std::vector<double>> latencies(flags.callers);
  std::vector<std::shared_ptr<grpc::Channel>> channels;
  for (int i = 0; i < 4; ++i) channels.push_back(MakeChannel(address, {.own_connection = true}));
  std::vector<std::thread> threads;
  const auto started = SteadyClock::now();
  const auto end = started + std::chrono::duration<double>(flags.seconds);
  for (int t = 0; t < flags.callers; ++t) {
    threads.emplace_back([&, t] {
      const auto stub = v1::RouterService::NewStub(channels[t % channels.size()]);
      for (uint64_t n = t;; n += flags.callers) {
        const auto before = SteadyClock::now();
        if (before >= end) return;
        grpc::ClientContext context;
        v1::AssignSequenceResponse response;
        const grpc::Status status =
            stub->AssignSequence(&context, requests[n * 7919 % requests.size()], &response);
        if (!status.ok()) {
          std::fprintf(stderr, "AssignSequence: %s\n", status.error_message().c_str());
          std::abort();
        }
        latencies[t].push_back(
            std::chrono::duration<double, std::micro>(SteadyClock::now() - before).count());
      }
    });
  }
  for (auto& thread : threads) thread.join();
  std::vector<double> all;
  for (const auto& l : latencies) all.insert(all.end(), l.begin(), l.end());
  return Summarize(all, std::chrono::duration<double>(SteadyClock::now() - started).count());
}

Model BenchModel() {
  v1::ModelSpec spec;
  spec.set_name("bench");
  spec.set_weights_digest(std::string(32, 'w'));
  spec.set_tokenizer_digest(std::string(32, 't'));
  v1::LayerGroup& group = *spec.mutable_geometry()->add_groups();
  group.set_kind(v1::LayerGroup::KIND_FULL);
  for (int i = 0; i < 32; ++i) group.add_layers(i);
  group.set_k_type(v1::DATA_TYPE_F16);
  group.set_v_type(v1::DATA_TYPE_F16);
  group.set_kv_heads(8);
  group.set_k_dim(128);
  group.set_v_dim(128);
  return *ModelFromProto(spec);
}

int Main(int argc, char** argv) {
  TuneProcess();
  Flags flags;
  CLI::App app{"Decisions of the router a second"};
  app.add_option("--pages", flags.pages)->capture_default_str();
  app.add_option("--workers", flags.workers)->capture_default_str();
  app.add_option("--seconds", flags.seconds)->capture_default_str();
  app.add_option("--runs", flags.runs)->capture_default_str();
  app.add_option("--callers", flags.callers)->capture_default_str();
  CLI11_PARSE(app, argc, argv);
  const Model model = BenchModel();

  std::printf(
      "| fleet | path | in flight | decisions/s | p50 µs | p99 µs |\n|---|---|---|---|---|---|\n");
  for (const bool is_full : {false, true}) {
    RouterRole::Options options;
    options.deployment_secret = "a secret of the benchmark";
    options.server.metrics_address = "";
    auto role = RouterRole::Start(options, nullptr, Clock::Real());
    if (!role.ok()) return 1;
    const auto stub = v1::RouterService::NewStub(MakeChannel((*role)->address()));
    v1::RegisterModelRequest request;
    *request.mutable_spec() = ToProto(model.spec());
    v1::RegisterModelResponse registered;
    grpc::ClientContext context;
    if (!stub->RegisterModel(&context, request, &registered).ok()) return 1;
    const Fleet fleet(&(*role)->router(), flags, registered.model().model_digest(), is_full);

    std::vector<RoutedPrompt> prompts;
    std::vector<v1::AssignSequenceRequest> by_keys, by_tokens;
    std::mt19937 rng(1);
    for (uint64_t n = 0; n < 2000; ++n) {
      prompts.push_back(PromptOf(n * 15, flags, model));
      v1::Prompt& keys = *by_keys.emplace_back().mutable_prompt();
      keys.set_model("bench");
      keys.set_num_tokens(prompts.back().num_tokens);
      for (const PrefixHint& hint : prompts.back().hints) {
        keys.add_prefix_keys(std::string(hint.view()));
      }
      if (n >= 200) continue;
      v1::Prompt& tokens = *by_tokens.emplace_back().mutable_prompt();
      tokens.set_model("bench");
      for (uint64_t i = 0; i < prompts.back().num_tokens; ++i) tokens.add_tokens(rng() % 100000);
    }
    std::vector<Sample> domain_1, domain_2, grpc_keys, grpc_tokens;
    for (int run = 0; run < flags.runs; ++run) {
      domain_1.push_back(RunDomain((*role)->router(), flags, prompts, 1));
      domain_2.push_back(RunDomain((*role)->router(), flags, prompts, 2));
      grpc_keys.push_back(RunGrpc((*role)->address(), flags, by_keys));
      grpc_tokens.push_back(RunGrpc((*role)->address(), flags, by_tokens));
    }
    const char* name = is_full ? "full" : "spread";
    const auto print = [&](const char* path, int in_flight, const std::vector<Sample>& samples) {
      const Sample m = MedianOf(samples);
      std::printf("| %s | %s | %d | %.0f | %.0f | %.0f |\n", name, path, in_flight, m.per_second,
                  m.p50_us, m.p99_us);
    };
    print("domain", 1, domain_1);
    print("domain", 2, domain_2);
    print("gRPC, prefix keys", flags.callers, grpc_keys);
    print("gRPC, tokens", flags.callers, grpc_tokens);
    std::printf("<!-- %s: %llu copies of %zu pages reported in %.1f s -->\n", name,
                static_cast<unsigned long long>(fleet.copies()),
                (*role)->router().num_resident_pages(), fleet.load_seconds());
    std::fflush(stdout);
  }
  return 0;
}

}  // namespace
}  // namespace pagetide

int main(int argc, char** argv) {
  return pagetide::Main(argc, argv);
}
