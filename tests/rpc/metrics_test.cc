// One suite over both implementations of the Metrics port, then what is special to each.
#include "rpc/metrics.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "rpc/metrics_http.h"
#include "tests/rpc/rpc_test_util.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

template <typename T>
class MetricsContractTest : public ::testing::Test {
 protected:
  double Value(const std::string& name, MetricLabels labels = {}) const {
    std::sort(labels.begin(), labels.end());
    for (const MetricSample& s : metrics_.Snapshot()) {
      MetricLabels sorted = s.labels;
      std::sort(sorted.begin(), sorted.end());
      if (s.name == name && sorted == labels) return s.value;
    }
    return -1;
  }
  T metrics_;
};
using Implementations = ::testing::Types<InMemoryMetrics, PrometheusMetrics>;
TYPED_TEST_SUITE(MetricsContractTest, Implementations);

TYPED_TEST(MetricsContractTest, SameNameAndLabelsAreOneHandle) {
  Counter* const a = this->metrics_.GetCounter("pagetide_x_total", "help", {{"k", "1"}});
  EXPECT_EQ(a, this->metrics_.GetCounter("pagetide_x_total", "help", {{"k", "1"}}));
  EXPECT_NE(a, this->metrics_.GetCounter("pagetide_x_total", "help", {{"k", "2"}}));
  a->Add(2);
  a->Increment();
  EXPECT_EQ(this->Value("pagetide_x_total", {{"k", "1"}}), 3);
  EXPECT_EQ(this->Value("pagetide_x_total", {{"k", "2"}}), 0);
}

TYPED_TEST(MetricsContractTest, GaugesAndHistograms) {
  Gauge* const gauge = this->metrics_.GetGauge("pagetide_g_bytes", "help");
  gauge->Set(10);
  gauge->Add(-3);
  EXPECT_EQ(this->Value("pagetide_g_bytes"), 7);
  Histogram* const histogram =
      this->metrics_.GetHistogram("pagetide_h_seconds", "help", LatencyBounds());
  histogram->Observe(0.5);
  histogram->Observe(absl::Milliseconds(250));
  EXPECT_EQ(this->Value("pagetide_h_seconds_count"), 2);
  EXPECT_DOUBLE_EQ(this->Value("pagetide_h_seconds_sum"), 0.75);
}

TYPED_TEST(MetricsContractTest, AnotherKindUnderOneNameCountsNothing) {
  this->metrics_.GetCounter("pagetide_x_total", "help")->Add(1);
  this->metrics_.GetGauge("pagetide_x_total", "help")->Set(99);
  this->metrics_.GetHistogram("pagetide_x_total", "help", {1})->Observe(99.0);
  EXPECT_EQ(this->Value("pagetide_x_total"), 1);
}

TYPED_TEST(MetricsContractTest, LabelSetsAreBounded) {
  for (int i = 0; i < 1000; ++i) {
    this->metrics_.GetCounter("pagetide_x_total", "help", {{"k", std::to_string(i)}})->Add(1);
  }
  EXPECT_LE(this->metrics_.Snapshot().size(), Metrics::kMaxSeriesPerName + 1);
  EXPECT_EQ(this->Value("pagetide_x_total", {{"k", "other"}}),
            1000 - static_cast<double>(Metrics::kMaxSeriesPerName));
}

TYPED_TEST(MetricsContractTest, CountsFromManyThreads) {
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([this] {
      for (int i = 0; i < 1000; ++i) this->metrics_.GetCounter("pagetide_x_total", "help")->Add(1);
    });
  }
  for (std::thread& t : threads) t.join();
  EXPECT_EQ(this->Value("pagetide_x_total"), 4000);
}

TEST(PrometheusMetricsTest, BadNamesCountNothingAndDoNotThrow) {
  PrometheusMetrics metrics;
  metrics.GetCounter("bad name", "help")->Add(1);
  metrics.GetGauge("", "help")->Set(1);
  metrics.GetHistogram("9x", "help", {1})->Observe(1.0);
  EXPECT_TRUE(metrics.Snapshot().empty());
}

TEST(MetricsHttpTest, ServesMetricsAndHealth) {
  auto metrics = std::make_shared<PrometheusMetrics>();
  metrics->GetCounter("pagetide_x_total", "What x is", {{"k", "v"}})->Add(5);
  auto http = MetricsHttpServer::Create(*ListenAddress::Parse("127.0.0.1:0"), metrics);
  ASSERT_TRUE(http.ok()) << http.status();
  const int port = (*http)->port();
  const std::string page = HttpGet(port, "/metrics");
  EXPECT_THAT(page, StartsWith("HTTP/1.1 200"));
  EXPECT_THAT(page, HasSubstr("# HELP pagetide_x_total What x is\n"));
  EXPECT_THAT(page, HasSubstr("pagetide_x_total{k=\"v\"} 5\n"));
  EXPECT_THAT(HttpGet(port, "/healthz"), StartsWith("HTTP/1.1 200"));
  (*http)->SetHealthy(false);
  EXPECT_THAT(HttpGet(port, "/healthz"), StartsWith("HTTP/1.1 503"));
  EXPECT_THAT(HttpGet(port, "/etc/passwd"), StartsWith("HTTP/1.1 404"));
  auto second = MetricsHttpServer::Create(
      *ListenAddress::Parse("127.0.0.1:" + std::to_string(port)), metrics);
  EXPECT_EQ(second.status().code(), absl::StatusCode::kUnavailable);
}

}  // namespace
}  // namespace pagetide
