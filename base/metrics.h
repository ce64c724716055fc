// Metrics: the port through which every part counts. Domain code sees this header only;
// rpc/metrics.h exports to Prometheus, InMemoryMetrics serves tests, Metrics::Null() those who do
// not care.
//
// Names are pagetide_<part>_<what>_{total,bytes,seconds}. Label values come from bounded sets; the
// implementations keep at most kMaxSeriesPerName series a name and count the rest under "other".
// All classes are thread-safe. A handle lives as long as the Metrics that gave it: take it once, in
// a constructor, and keep the pointer; looking it up takes a lock, using it does not.
#ifndef PAGETIDE_BASE_METRICS_H_
#define PAGETIDE_BASE_METRICS_H_

#include <cstddef>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "base/mutex.h"

namespace pagetide {

using MetricLabels = std::vector<std::pair<std::string, std::string>>;

// Only goes up.
class Counter {
 public:
  virtual ~Counter() = default;
  virtual void Add(double amount) = 0;
  void Increment() { Add(1); }
};

class Gauge {
 public:
  virtual ~Gauge() = default;
  virtual void Set(double value) = 0;
  virtual void Add(double amount) = 0;
};

class Histogram {
 public:
  virtual ~Histogram() = default;
  virtual void Observe(double value) = 0;
  void Observe(absl::Duration d) { Observe(absl::ToDoubleSeconds(d)); }
};

// One number of a snapshot. Histograms give two: name_count and name_sum.
struct MetricSample {
  std::string name;
  MetricLabels labels;
  double value = 0;
};

class Metrics {
 public:
  static constexpr size_t kMaxSeriesPerName = 256;

  virtual ~Metrics() = default;
  // The same name and labels give the same handle. A name that is already of another kind, or not
  // [a-z][a-z0-9_]*, gives a handle that counts nothing, and logs the mistake.
  virtual Counter* GetCounter(absl::string_view name, absl::string_view help,
                              MetricLabels labels = {}) = 0;
  virtual Gauge* GetGauge(absl::string_view name, absl::string_view help,
                          MetricLabels labels = {}) = 0;
  // `bounds`: upper bounds of the buckets, ascending; those of the first call for a name hold.
  virtual Histogram* GetHistogram(absl::string_view name, absl::string_view help,
                                  std::vector<double> bounds, MetricLabels labels = {}) = 0;
  // Everything counted so far, ordered by name.
  virtual std::vector<MetricSample> Snapshot() const = 0;

  // Counts nothing; lives for ever.
  static Metrics* Null();
};

// 50 µs … 30 s, about three a decade: for RPC and storage latencies.
std::vector<double> LatencyBounds();

// "name{a="x",b="y"}", or the bare name without labels. Labels in the order given.
std::string FormatMetricName(absl::string_view name, const MetricLabels& labels);

// Keeps plain numbers. For tests and for GetStats of a process without an exporter.
class InMemoryMetrics final : public Metrics {
 public:
  InMemoryMetrics();
  ~InMemoryMetrics() override;

  Counter* GetCounter(absl::string_view name, absl::string_view help,
                      MetricLabels labels = {}) override;
  Gauge* GetGauge(absl::string_view name, absl::string_view help,
                  MetricLabels labels = {}) override;
  Histogram* GetHistogram(absl::string_view name, absl::string_view help,
                          std::vector<double> bounds, MetricLabels labels = {}) override;
  std::vector<MetricSample> Snapshot() const override;

  // The value of a counter or gauge; of name_count and name_sum for histograms. 0 if never used.
  double Value(absl::string_view name, const MetricLabels& labels = {}) const;
  // The sum over all label sets of a name.
  double Sum(absl::string_view name) const;

 private:
  class Series;
  Series* Find(absl::string_view name, char kind, MetricLabels labels);

  mutable Mutex mu_;
  // name → kind ('c', 'g', 'h') and label set → series.
  struct Family {
    char kind = 0;
    std::map<MetricLabels, std::unique_ptr<Series>> series;
  };
  std::map<std::string, Family, std::less<>> families_ ABSL_GUARDED_BY(mu_);
};

// For implementations: bounds the label sets of one name. Returns `labels`, or the same keys with
// the value "other" when `num_series` already reached the limit.
MetricLabels BoundLabels(MetricLabels labels, size_t num_series);

}  // namespace pagetide

#endif  // PAGETIDE_BASE_METRICS_H_
