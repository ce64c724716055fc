#include "rpc/call_metrics.h"

#include <array>
#include <atomic>
#include <string>
#include <utility>

#include "absl/container/flat_hash_map.h"
#include "absl/status/status.h"
#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/strip.h"
#include "base/clock.h"

namespace pagetide {
namespace {

constexpr int kNumCodes = 17;  // gRPC's status codes, 0 … 16

// The handles of one method. A counter of a code is made when the code first occurs.
class MethodMetrics {
 public:
  MethodMetrics(Metrics* metrics, absl::string_view method)
      : metrics_(metrics),
        method_(method),
        latency_(metrics->GetHistogram("pagetide_rpc_latency_seconds",
                                       "Time from arrival of a call to its status", LatencyBounds(),
                                       {{"method", method_}})) {}

  void Record(int code, absl::Duration latency) {
    if (code < 0 || code >= kNumCodes) code = static_cast<int>(absl::StatusCode::kUnknown);
    // Two threads may both look the counter up; they get the same handle.
    Counter* counter = by_code_[code].load(std::memory_order_acquire);
    if (counter == nullptr) {
      counter = metrics_->GetCounter(
          "pagetide_rpc_calls_total", "Calls ended, by status code",
          {{"method", method_},
           {"code", absl::StatusCodeToString(static_cast<absl::StatusCode>(code))}});
      by_code_[code].store(counter, std::memory_order_release);
    }
    counter->Increment();
    latency_->Observe(latency);
  }

 private:
  Metrics* const metrics_;
  const std::string method_;
  Histogram* const latency_;
  std::array<std::atomic<Counter*>, kNumCodes> by_code_{};
};

class CallMetrics final : public grpc::experimental::Interceptor {
 public:
  // `running` may be null.
  CallMetrics(MethodMetrics* method, RunningCalls* running)
      : method_(method), running_(running), start_(Clock::Real()->MonotonicNow()) {
    if (running_ != nullptr) running_->Add();
  }
  // Goes with the call, whose status was sent.
  ~CallMetrics() override {
    if (!is_recorded_) Record(static_cast<int>(absl::StatusCode::kCancelled));
    if (running_ != nullptr) running_->Remove();
  }
  void Intercept(grpc::experimental::InterceptorBatchMethods* batch) override {
    if (batch->QueryInterceptionHookPoint(
            grpc::experimental::InterceptionHookPoints::PRE_SEND_STATUS)) {
      Record(batch->GetSendStatus().error_code());
    }
    batch->Proceed();
  }

 private:
  void Record(int code) {
    is_recorded_ = true;
    method_->Record(code, Clock::Real()->MonotonicNow() - start_);
  }

  MethodMetrics* const method_;
  RunningCalls* const running_;
  const MonotonicTime start_;
  bool is_recorded_ = false;  // batches of one call are intercepted one after another
};

class CallMetricsFactory final : public grpc::experimental::ServerInterceptorFactoryInterface {
 public:
  CallMetricsFactory(Metrics* metrics, RunningCalls* running)
      : metrics_(metrics), running_(running) {}

  grpc::experimental::Interceptor* CreateServerInterceptor(
      grpc::experimental::ServerRpcInfo* info) override {
    const absl::string_view name = absl::StripPrefix(info->method(), "/");
    MutexLock lock(&mu_);
    auto found = methods_.find(name);
    if (found == methods_.end()) {
      found = methods_.emplace(name, std::make_unique<MethodMetrics>(metrics_, name)).first;
    }
    const bool is_ours = !absl::StartsWith(name, "grpc.");
    return new CallMetrics(found->second.get(), is_ours ? running_ : nullptr);
  }

 private:
  Metrics* const metrics_;
  RunningCalls* const running_;
  Mutex mu_;
  // Grows only by registered methods: gRPC creates no interceptor for a method it does not know.
  absl::flat_hash_map<std::string, std::unique_ptr<MethodMetrics>> methods_ ABSL_GUARDED_BY(mu_);
};

}  // namespace

std::unique_ptr<grpc::experimental::ServerInterceptorFactoryInterface> MakeCallMetricsInterceptor(
    Metrics* metrics, RunningCalls* running) {
  return std::make_unique<CallMetricsFactory>(metrics, running);
}

}  // namespace pagetide
