// PrometheusMetrics: the Metrics port over a prometheus-cpp registry. Thread-safe.
#ifndef PAGETIDE_RPC_METRICS_H_
#define PAGETIDE_RPC_METRICS_H_

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/string_view.h"
#include "base/metrics.h"

namespace pagetide {

class PrometheusMetrics final : public Metrics {
 public:
  PrometheusMetrics();
  ~PrometheusMetrics() override;

  Counter* GetCounter(absl::string_view name, absl::string_view help,
                      MetricLabels labels = {}) override;
  Gauge* GetGauge(absl::string_view name, absl::string_view help,
                  MetricLabels labels = {}) override;
  Histogram* GetHistogram(absl::string_view name, absl::string_view help,
                          std::vector<double> bounds, MetricLabels labels = {}) override;
  std::vector<MetricSample> Snapshot() const override;

  // The text exposition format of Prometheus, version 0.0.4.
  std::string ExposeText() const;

 private:
  class Impl;  // keeps prometheus-cpp out of the headers
  const std::unique_ptr<Impl> impl_;
};

}  // namespace pagetide

#endif  // PAGETIDE_RPC_METRICS_H_
