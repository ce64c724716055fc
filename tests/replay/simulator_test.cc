#include "replay/simulator.h"

#include <unistd.h>

#include <cmath>
#include <filesystem>
#include <fstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

std::string SmallTrace(TraceFormat format) {
  return absl::StrCat(PAGETIDE_SOURCE_DIR, "/tests/replay/testdata/small_", TraceFormatName(format),
                      ".jsonl");
}

ReplayOptions SmallOptions(TraceFormat format) {
  ReplayOptions options;
  options.trace_path = SmallTrace(format);
  options.format = format;
  options.num_workers = 4;
  options.pages_per_worker = 60;
  return options;
}

ReplayReport RunSimulation(const ReplayOptions& options) {
  auto report = Simulate(options);
  EXPECT_TRUE(report.ok()) << report.status();
  return report.ok() ? *std::move(report) : ReplayReport{};
}

std::string WriteTrace(const std::string& lines) {
  const std::string path =
      absl::StrCat(::testing::TempDir(), "/simulator_", getpid(), "_",
                   ::testing::UnitTest::GetInstance()->current_test_info()->name(), ".jsonl");
  std::ofstream(path, std::ios::binary) << lines;
  return path;
}

// All numbers by hand. 2 pages at 0 s, the same at 1 s, the same and one more at 4 s; one worker.
// 1,024 + 1,024 + 1,536 tokens in 4 s at utilisation 1: 896 tokens/s.
TEST(SimulatorTest, FollowsTheLoadModel) {
  ReplayOptions options;
  options.trace_path = WriteTrace(
      R"({"timestamp": 0, "input_length": 1024, "output_length": 10, "hash_ids": [1, 2]}
{"timestamp": 1000, "input_length": 1024, "output_length": 10, "hash_ids": [1, 2]}
{"timestamp": 4000, "input_length": 1536, "output_length": 10, "hash_ids": [1, 2, 3]})");
  options.num_workers = 1;
  options.pages_per_worker = 10;
  const ReplayReport report = RunSimulation(options);
  EXPECT_DOUBLE_EQ(report.prefill_tokens_per_second, 896);
  EXPECT_EQ(report.num_requests, 3u);
  EXPECT_EQ(report.num_pages, 7u);
  EXPECT_EQ(report.num_distinct_pages, 3u);
  EXPECT_DOUBLE_EQ(report.hit_rate, 4.0 / 7);
  EXPECT_DOUBLE_EQ(report.shared_hit_rate, 4.0 / 7);
  EXPECT_DOUBLE_EQ(report.optimal_hit_rate, 4.0 / 7);
  // The first computes for 1024/896 s; the second waits for the rest of that and computes one token
  // for its logits; the third computes its new page.
  const double first = 1024.0 / 896;
  const double second = first - 1 + 1.0 / 896;
  const double third = 512.0 / 896;
  EXPECT_NEAR(absl::ToDoubleSeconds(report.ttft.max), first, 1e-6);
  EXPECT_NEAR(absl::ToDoubleSeconds(report.ttft.p50), third, 1e-6);
  EXPECT_NEAR(absl::ToDoubleSeconds(report.ttft.mean), (first + second + third) / 3, 1e-6);
  EXPECT_NEAR(absl::ToDoubleSeconds(report.workers[0].prefill_time), first + 1.0 / 896 + third,
              1e-6);
}

class SmallTraceTest : public ::testing::TestWithParam<TraceFormat> {};

TEST_P(SmallTraceTest, NumbersAreConsistent) {
  const ReplayReport report = RunSimulation(SmallOptions(GetParam()));
  uint64_t requests = 0, pages = 0, hits = 0;
  double prefill = 0, most = 0;
  for (const WorkerReport& worker : report.workers) {
    requests += worker.num_requests;
    pages += worker.num_pages;
    hits += worker.hit_pages;
    prefill += absl::ToDoubleSeconds(worker.prefill_time);
    most = std::max(most, absl::ToDoubleSeconds(worker.prefill_time));
    EXPECT_GT(worker.num_requests, 0u);
    EXPECT_GT(worker.evicted_pages, 0u);
  }
  EXPECT_EQ(requests, report.num_requests);
  EXPECT_EQ(pages, report.num_pages);
  EXPECT_DOUBLE_EQ(report.hit_rate, static_cast<double>(hits) / static_cast<double>(pages));
  EXPECT_NEAR(report.max_over_mean_prefill, 4 * most / prefill, 1e-6);
  EXPECT_LE(report.shared_hit_rate, report.optimal_hit_rate);
  EXPECT_LE(report.ttft.p50, report.ttft.p95);
  EXPECT_LE(report.ttft.p95, report.ttft.p99);
  EXPECT_LE(report.ttft.p99, report.ttft.max);
  EXPECT_GT(report.decisions_per_second, 0);
}

TEST_P(SmallTraceTest, SameSeedSameNumbers) {
  ReplayReport a = RunSimulation(SmallOptions(GetParam()));
  ReplayReport b = RunSimulation(SmallOptions(GetParam()));
  a.decisions_per_second = b.decisions_per_second = 0;  // the only number of this machine
  EXPECT_EQ(a.ToJson(), b.ToJson());
}

// One worker has nothing to choose: it is the shared cache.
TEST_P(SmallTraceTest, OneWorkerIsTheSharedCache) {
  ReplayOptions options = SmallOptions(GetParam());
  options.num_workers = 1;
  options.pages_per_worker = 240;
  const ReplayReport report = RunSimulation(options);
  EXPECT_EQ(report.hit_rate, report.shared_hit_rate);
  EXPECT_EQ(report.max_over_mean_prefill, 1);
}

TEST_P(SmallTraceTest, PlacementByPrefixBeatsPlacementByLoadAlone) {
  ReplayOptions options = SmallOptions(GetParam());
  const ReplayReport by_prefix = RunSimulation(options);
  for (const char* policy : {"least_loaded", "two_choices"}) {
    options.placement_policy = policy;
    const ReplayReport by_load = RunSimulation(options);
    EXPECT_GT(by_prefix.hit_rate, 1.1 * by_load.hit_rate) << policy;
    EXPECT_LT(by_prefix.ttft.p95, by_load.ttft.p95) << policy;
  }
}

INSTANTIATE_TEST_SUITE_P(Formats, SmallTraceTest,
                         ::testing::Values(TraceFormat::kMooncake, TraceFormat::kWeka),
                         [](const auto& info) { return std::string(TraceFormatName(info.param)); });

TEST(SimulatorTest, BadOptionsAreNamed) {
  const auto error = [](auto change) {
    ReplayOptions options = SmallOptions(TraceFormat::kMooncake);
    change(options);
    const absl::Status status = Simulate(options).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  EXPECT_THAT(error([](ReplayOptions& o) { o.num_workers = 0; }), HasSubstr("workers 0"));
  EXPECT_THAT(error([](ReplayOptions& o) { o.num_workers = size_t{1} << 40; }),
              HasSubstr("workers 1099511627776"));
  EXPECT_THAT(error([](ReplayOptions& o) { o.pages_per_worker = 0; }),
              HasSubstr("pages per worker 0"));
  EXPECT_THAT(error([](ReplayOptions& o) { o.utilisation = std::nan(""); }),
              HasSubstr("utilisation nan"));
  EXPECT_THAT(error([](ReplayOptions& o) { o.placement_policy = "best"; }),
              HasSubstr("unknown name \"best\""));
  EXPECT_THAT(error([](ReplayOptions& o) { o.format = TraceFormat::kWeka; }),
              HasSubstr(":1: field bs: missing"));
}

TEST(SimulatorTest, ASliceIsATraceOfItsOwn) {
  ReplayOptions options = SmallOptions(TraceFormat::kMooncake);
  options.first_request = 50;
  options.max_requests = 40;
  const ReplayReport slice = RunSimulation(options);
  EXPECT_EQ(slice.num_requests, 40u);
  options.max_requests = 1000;
  EXPECT_EQ(RunSimulation(options).num_requests, 179u - 50);
  options.first_request = 179;
  EXPECT_THAT(std::string(Simulate(options).status().message()),
              HasSubstr("first request 179 of 179"));
}

TEST(SimulatorTest, TraceWithoutASpanCannotBeScaled) {
  ReplayOptions options;
  options.trace_path =
      WriteTrace(R"({"timestamp": 5, "input_length": 9, "output_length": 1, "hash_ids": [1]})");
  EXPECT_THAT(std::string(Simulate(options).status().message()),
              HasSubstr("1 requests with 9 prompt tokens in 0 s"));
}

// The bars of docs/replay.md on the public traces, which are not part of the repository.
struct PublicTrace {
  const char* file;
  TraceFormat format;
  double max_over_mean_prefill;
};

class PublicTraceTest : public ::testing::TestWithParam<std::tuple<PublicTrace, uint64_t>> {};

TEST_P(PublicTraceTest, KeepsTheHitsOfOneSharedCacheAndBalancesTheLoad) {
  const auto& [trace, seed] = GetParam();
  ReplayOptions options;
  options.trace_path = absl::StrCat(PAGETIDE_SOURCE_DIR, "/../shared/traces/", trace.file);
  if (!std::filesystem::exists(options.trace_path)) {
    GTEST_SKIP() << "no public trace " << options.trace_path;
  }
  options.format = trace.format;
  options.seed = seed;
  const ReplayReport report = RunSimulation(options);
  EXPECT_GE(report.hit_rate_over_shared, 0.95);
  EXPECT_LE(report.max_over_mean_prefill, trace.max_over_mean_prefill);
  EXPECT_LE(report.hit_rate, report.optimal_hit_rate);
}

INSTANTIATE_TEST_SUITE_P(
    Traces, PublicTraceTest,
    ::testing::Combine(::testing::Values(PublicTrace{"mooncake_conversation_h1.jsonl",
                                                     TraceFormat::kMooncake, 1.05},
                                         PublicTrace{"weka_even_sessions.jsonl", TraceFormat::kWeka,
                                                     1.12}),
                       ::testing::Values(1, 2, 3)),
    [](const auto& info) {
      return absl::StrCat(TraceFormatName(std::get<0>(info.param).format), "_seed",
                          std::get<1>(info.param));
    });

}  // namespace
}  // namespace pagetide
