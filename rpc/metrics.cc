#include "rpc/metrics.h"

#include <prometheus/counter.h>
#include <prometheus/gauge.h>
#include <prometheus/histogram.h>
#include <prometheus/registry.h>
#include <prometheus/text_serializer.h>

#include <algorithm>
#include <map>
#include <sstream>
#include <utility>

#include "absl/strings/ascii.h"
#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "base/mutex.h"

namespace pagetide {
namespace {

class PrometheusCounter final : public Counter {
 public:
  explicit PrometheusCounter(prometheus::Counter* counter) : counter_(counter) {}
  void Add(double amount) override { counter_->Increment(amount); }

 private:
  prometheus::Counter* const counter_;
};

class PrometheusGauge final : public Gauge {
 public:
  explicit PrometheusGauge(prometheus::Gauge* gauge) : gauge_(gauge) {}
  void Set(double value) override { gauge_->Set(value); }
  void Add(double amount) override { gauge_->Increment(amount); }

 private:
  prometheus::Gauge* const gauge_;
};

class PrometheusHistogram final : public Histogram {
 public:
  explicit PrometheusHistogram(prometheus::Histogram* histogram) : histogram_(histogram) {}
  void Observe(double value) override { histogram_->Observe(value); }

 private:
  prometheus::Histogram* const histogram_;
};

bool IsGoodName(absl::string_view name) {
  if (name.empty() || !absl::ascii_islower(name[0])) return false;
  for (char c : name) {
    if (!absl::ascii_islower(c) && !absl::ascii_isdigit(c) && c != '_') return false;
  }
  return true;
}

prometheus::Labels ToPrometheus(const MetricLabels& labels) {
  return prometheus::Labels(labels.begin(), labels.end());
}

}  // namespace

// One family a name. prometheus-cpp throws on a name of another kind and on bad names: both are
// checked here first, so that no exception crosses.
class PrometheusMetrics::Impl {
 public:
  enum class Kind { kCounter, kGauge, kHistogram };
  struct Family {
    Kind kind;
    prometheus::Family<prometheus::Counter>* counters = nullptr;
    prometheus::Family<prometheus::Gauge>* gauges = nullptr;
    prometheus::Family<prometheus::Histogram>* histograms = nullptr;
    std::vector<double> bounds;
    std::map<MetricLabels, std::unique_ptr<Counter>> counter_series;
    std::map<MetricLabels, std::unique_ptr<Gauge>> gauge_series;
    std::map<MetricLabels, std::unique_ptr<Histogram>> histogram_series;
  };

  // Null when the name is bad or of another kind.
  Family* Find(absl::string_view name, absl::string_view help, Kind kind,
               std::vector<double> bounds) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu) {
    auto found = families.find(name);
    if (found == families.end()) {
      if (!IsGoodName(name)) return nullptr;
      Family family{kind};
      const std::string n(name), h(help);
      switch (kind) {
        case Kind::kCounter:
          family.counters = &prometheus::BuildCounter().Name(n).Help(h).Register(registry);
          break;
        case Kind::kGauge:
          family.gauges = &prometheus::BuildGauge().Name(n).Help(h).Register(registry);
          break;
        case Kind::kHistogram:
          family.histograms = &prometheus::BuildHistogram().Name(n).Help(h).Register(registry);
          family.bounds = std::move(bounds);
          break;
      }
      found = families.emplace(n, std::move(family)).first;
    }
    return found->second.kind == kind ? &found->second : nullptr;
  }

  // The handle under `labels`, made by `make(prometheus labels)` at the first call.
  template <typename Handle, typename Make>
  static Handle* Series(std::map<MetricLabels, std::unique_ptr<Handle>>* series,
                        MetricLabels labels, Make make) {
    auto found = series->find(labels);
    if (found == series->end()) {
      found = series->try_emplace(BoundLabels(std::move(labels), series->size())).first;
      if (found->second == nullptr) found->second = make(ToPrometheus(found->first));
    }
    return found->second.get();
  }

  prometheus::Registry registry;
  Mutex mu;
  std::map<std::string, Family, std::less<>> families ABSL_GUARDED_BY(mu);
};

PrometheusMetrics::PrometheusMetrics() : impl_(std::make_unique<Impl>()) {}
PrometheusMetrics::~PrometheusMetrics() = default;

Counter* PrometheusMetrics::GetCounter(absl::string_view name, absl::string_view help,
                                       MetricLabels labels) {
  {
    MutexLock lock(&impl_->mu);
    if (Impl::Family* f = impl_->Find(name, help, Impl::Kind::kCounter, {})) {
      return Impl::Series(&f->counter_series, std::move(labels), [f](const prometheus::Labels& l) {
        return std::make_unique<PrometheusCounter>(&f->counters->Add(l));
      });
    }
  }
  LogError("metrics", "'", name, "' cannot be a counter: bad name or another kind");
  return Metrics::Null()->GetCounter(name, help);
}

Gauge* PrometheusMetrics::GetGauge(absl::string_view name, absl::string_view help,
                                   MetricLabels labels) {
  {
    MutexLock lock(&impl_->mu);
    if (Impl::Family* f = impl_->Find(name, help, Impl::Kind::kGauge, {})) {
      return Impl::Series(&f->gauge_series, std::move(labels), [f](const prometheus::Labels& l) {
        return std::make_unique<PrometheusGauge>(&f->gauges->Add(l));
      });
    }
  }
  LogError("metrics", "'", name, "' cannot be a gauge: bad name or another kind");
  return Metrics::Null()->GetGauge(name, help);
}

Histogram* PrometheusMetrics::GetHistogram(absl::string_view name, absl::string_view help,
                                           std::vector<double> bounds, MetricLabels labels) {
  {
    MutexLock lock(&impl_->mu);
    if (Impl::Family* f = impl_->Find(name, help, Impl::Kind::kHistogram, std::move(bounds))) {
      return Impl::Series(
          &f->histogram_series, std::move(labels), [f](const prometheus::Labels& l) {
            return std::make_unique<PrometheusHistogram>(&f->histograms->Add(l, f->bounds));
          });
    }
  }
  LogError("metrics", "'", name, "' cannot be a histogram: bad name or another kind");
  return Metrics::Null()->GetHistogram(name, help, {});
}

std::vector<MetricSample> PrometheusMetrics::Snapshot() const {
  std::vector<MetricSample> samples;
  for (const prometheus::MetricFamily& family : impl_->registry.Collect()) {
    for (const prometheus::ClientMetric& metric : family.metric) {
      MetricLabels labels;
      for (const auto& label : metric.label) labels.emplace_back(label.name, label.value);
      if (family.type == prometheus::MetricType::Histogram) {
        samples.push_back({absl::StrCat(family.name, "_count"), labels,
                           static_cast<double>(metric.histogram.sample_count)});
        samples.push_back({absl::StrCat(family.name, "_sum"), labels, metric.histogram.sample_sum});
      } else {
        samples.push_back({family.name, labels,
                           family.type == prometheus::MetricType::Counter ? metric.counter.value
                                                                          : metric.gauge.value});
      }
    }
  }
  std::stable_sort(samples.begin(), samples.end(),
                   [](const MetricSample& a, const MetricSample& b) { return a.name < b.name; });
  return samples;
}

std::string PrometheusMetrics::ExposeText() const {
  std::ostringstream out;
  prometheus::TextSerializer().Serialize(out, impl_->registry.Collect());
  return out.str();
}

}  // namespace pagetide
