#include "base/metrics.h"

#include <atomic>
#include <functional>

#include "absl/strings/str_cat.h"
#include "base/log.h"

namespace pagetide {
namespace {

class NullSeries final : public Counter, public Gauge, public Histogram {
 public:
  void Add(double) override {}
  void Set(double) override {}
  void Observe(double) override {}
};

NullSeries* Nothing() {
  static NullSeries* const series = new NullSeries;
  return series;
}

class NullMetrics final : public Metrics {
 public:
  Counter* GetCounter(absl::string_view, absl::string_view, MetricLabels) override {
    return Nothing();
  }
  Gauge* GetGauge(absl::string_view, absl::string_view, MetricLabels) override { return Nothing(); }
  Histogram* GetHistogram(absl::string_view, absl::string_view, std::vector<double>,
                          MetricLabels) override {
    return Nothing();
  }
  std::vector<MetricSample> Snapshot() const override { return {}; }
};

}  // namespace

Metrics* Metrics::Null() {
  static NullMetrics* const metrics = new NullMetrics;
  return metrics;
}

std::vector<double> LatencyBounds() {
  return {50e-6, 100e-6, 250e-6, 500e-6, 1e-3, 2.5e-3, 5e-3, 10e-3, 25e-3,
          50e-3, 100e-3, 250e-3, 500e-3, 1,    2.5,    5,    10,    30};
}

std::string FormatMetricName(absl::string_view name, const MetricLabels& labels) {
  std::string out(name);
  const char* separator = "{";
  for (const auto& [key, value] : labels) {
    absl::StrAppend(&out, separator, key, "=\"", value, "\"");
    separator = ",";
  }
  if (!labels.empty()) out.push_back('}');
  return out;
}

MetricLabels BoundLabels(MetricLabels labels, size_t num_series) {
  if (num_series >= Metrics::kMaxSeriesPerName) {
    for (auto& label : labels) label.second = "other";
  }
  return labels;
}

// One number for counters and gauges; sum and count for histograms. The atomics are relaxed: a
// reader of a statistic needs no ordering with other memory.
class InMemoryMetrics::Series final : public Counter, public Gauge, public Histogram {
 public:
  void Add(double amount) override { value_.fetch_add(amount, std::memory_order_relaxed); }
  void Set(double value) override { value_.store(value, std::memory_order_relaxed); }
  void Observe(double value) override {
    value_.fetch_add(value, std::memory_order_relaxed);
    count_.fetch_add(1, std::memory_order_relaxed);
  }
  double value() const { return value_.load(std::memory_order_relaxed); }
  double count() const { return count_.load(std::memory_order_relaxed); }

 private:
  std::atomic<double> value_{0};
  std::atomic<double> count_{0};
};

InMemoryMetrics::InMemoryMetrics() = default;
InMemoryMetrics::~InMemoryMetrics() = default;

InMemoryMetrics::Series* InMemoryMetrics::Find(absl::string_view name, char kind,
                                               MetricLabels labels) {
  MutexLock lock(&mu_);
  Family& family = families_[std::string(name)];
  if (family.kind == 0) family.kind = kind;
  if (family.kind != kind) return nullptr;
  auto found = family.series.find(labels);
  if (found == family.series.end()) {
    found = family.series.try_emplace(BoundLabels(std::move(labels), family.series.size())).first;
    if (found->second == nullptr) found->second = std::make_unique<Series>();
  }
  return found->second.get();
}

Counter* InMemoryMetrics::GetCounter(absl::string_view name, absl::string_view help,
                                     MetricLabels labels) {
  if (Series* s = Find(name, 'c', std::move(labels))) return s;
  LogError("metrics", name, " is not a counter");
  return Nothing();
}

Gauge* InMemoryMetrics::GetGauge(absl::string_view name, absl::string_view help,
                                 MetricLabels labels) {
  if (Series* s = Find(name, 'g', std::move(labels))) return s;
  LogError("metrics", name, " is not a gauge");
  return Nothing();
}

Histogram* InMemoryMetrics::GetHistogram(absl::string_view name, absl::string_view help,
                                         std::vector<double> bounds, MetricLabels labels) {
  if (Series* s = Find(name, 'h', std::move(labels))) return s;
  LogError("metrics", name, " is not a histogram");
  return Nothing();
}

std::vector<MetricSample> InMemoryMetrics::Snapshot() const {
  MutexLock lock(&mu_);
  std::vector<MetricSample> samples;
  for (const auto& [name, family] : families_) {
    for (const auto& [labels, series] : family.series) {
      if (family.kind == 'h') {
        samples.push_back({absl::StrCat(name, "_count"), labels, series->count()});
        samples.push_back({absl::StrCat(name, "_sum"), labels, series->value()});
      } else {
        samples.push_back({name, labels, series->value()});
      }
    }
  }
  return samples;
}

double InMemoryMetrics::Value(absl::string_view name, const MetricLabels& labels) const {
  for (const MetricSample& s : Snapshot()) {
    if (s.name == name && s.labels == labels) return s.value;
  }
  return 0;
}

double InMemoryMetrics::Sum(absl::string_view name) const {
  double sum = 0;
  for (const MetricSample& s : Snapshot()) {
    if (s.name == name) sum += s.value;
  }
  return sum;
}

}  // namespace pagetide
