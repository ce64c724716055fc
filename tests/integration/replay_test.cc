// `pagetide replay` as a user runs it, on the small traces of this repository: what --live finds on
// real processes against what --simulate predicts, and that a wrong byte is noticed.
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gtest/gtest.h"
#include "tests/support/process.h"

namespace pagetide {
namespace {

using testing::ChildProcess;

std::string SmallTrace(const std::string& format) {
  return absl::StrCat(PAGETIDE_SOURCE_DIR, "/tests/replay/testdata/small_", format, ".jsonl");
}

struct Ended {
  nlohmann::json report;  // null: none was printed
  int exit_code = -1;
  std::string log;
};

Ended RunReplay(const std::string& format, const std::vector<std::string>& flags) {
  std::vector<std::string> args = {"replay",           "--json",   "--trace",
                                   SmallTrace(format), "--format", format};
  args.insert(args.end(), flags.begin(), flags.end());
  auto replay = ChildProcess::Start({.program = "pagetide", .args = args, .wait_ready = false});
  EXPECT_TRUE(replay.ok()) << replay.status();
  Ended ended;
  const auto code = (*replay)->Wait(absl::Minutes(8));
  EXPECT_TRUE(code.ok()) << code.status();
  ended.exit_code = code.value_or(-1);
  // Progress and the report share the log; the report is the only thing in braces.
  ended.log = (*replay)->Log();
  const size_t begin = ended.log.find("{\n");
  const size_t end = ended.log.rfind("\n}");
  if (begin != std::string::npos && end != std::string::npos) {
    ended.report = nlohmann::json::parse(ended.log.substr(begin, end + 2 - begin), nullptr, false);
  }
  return ended;
}

// With one request at a time nothing is computed twice, and the store forgets nothing: the fleet
// must find exactly what a cache without bound finds in the simulation.
TEST(ReplayTest, LiveFindsWhatTheSimulationPredictsAndEveryByteIsRight) {
  const std::vector<std::string> size = {"--workers=2", "--pages-per-worker=32"};
  std::vector<std::string> flags = {"--live", "--concurrency=1", "--prefill-rate=20000"};
  flags.insert(flags.end(), size.begin(), size.end());
  const Ended live = RunReplay("mooncake", flags);
  ASSERT_TRUE(live.report.is_object()) << live.log;
  EXPECT_EQ(live.exit_code, 0) << live.log;
  const nlohmann::json& report = live.report;
  EXPECT_EQ(report["ok"], true);
  EXPECT_EQ(report["requests"], 179);
  EXPECT_EQ(report["failed_requests"], 0);
  EXPECT_EQ(report["prompt_tokens"].get<int>(),
            report["reused_tokens"].get<int>() + report["computed_tokens"].get<int>());
  EXPECT_EQ(report["wrong_bytes"], 0);
  EXPECT_EQ(report["checksum_failures"], 0);
  EXPECT_EQ(report["pending_pages"], 0) << "one request at a time";
  // Every row of every sequence was read: 2 layers × K and V × 64 bytes.
  EXPECT_EQ(report["bytes_verified"].get<int>(),
            (report["prompt_tokens"].get<int>() + report["decoded_tokens"].get<int>()) * 256);
  EXPECT_EQ(report["reused_bytes_verified"].get<int>(), report["reused_tokens"].get<int>() * 256);
  // 705 pages went through 2 × 32 frames.
  EXPECT_EQ(report["frames_per_worker"], 32);
  EXPECT_GE(report["pages_written_through"].get<int>() + report["pages_spilled"].get<int>(), 705);
  EXPECT_GT(report["pages_evicted"], 100);
  // A restore that takes longer than predicted prefill is declined: it costs hits, never bytes.
  // A loaded machine declines many.
  EXPECT_LE(report["hit_rate"], report["simulated_unbounded_hit_rate"]);
  if (report["declined_restores"] == 0 && report["shortened"] == 0) {
    EXPECT_GT(report["pages_restored"], 100);
    EXPECT_NEAR(report["hit_rate"], report["simulated_unbounded_hit_rate"], 0.01);
  }
  EXPECT_LT(report["device_hit_rate"], report["hit_rate"]);

  std::vector<std::string> simulate = {"--simulate"};
  simulate.insert(simulate.end(), size.begin(), size.end());
  const Ended simulated = RunReplay("mooncake", simulate);
  ASSERT_TRUE(simulated.report.is_object()) << simulated.log;
  EXPECT_EQ(simulated.report["hit_rate"], report["simulated_hit_rate"]);
}

TEST(ReplayTest, AgentSessionsEightAtATimeThroughASmallPool) {
  const Ended live =
      RunReplay("weka", {"--live", "--concurrency=8", "--requests=80", "--append-pages=4"});
  ASSERT_TRUE(live.report.is_object()) << live.log;
  EXPECT_EQ(live.exit_code, 0) << live.log;
  EXPECT_EQ(live.report["requests"], 80);
  EXPECT_EQ(live.report["failed_requests"], 0);
  EXPECT_EQ(live.report["wrong_bytes"], 0);
  EXPECT_GT(live.report["reused_tokens"], 0);
  if (live.report["declined_restores"] == 0) {
    EXPECT_GT(live.report["pages_restored"], 0);
  }
}

TEST(ReplayTest, APlantedWrongByteIsNoticedWhereverItIsReused) {
  const Ended live = RunReplay("mooncake", {"--live", "--plant-wrong-byte", "--concurrency=1",
                                            "--requests=60", "--prefill-rate=20000"});
  ASSERT_TRUE(live.report.is_object()) << live.log;
  EXPECT_EQ(live.exit_code, 0) << live.log;
  EXPECT_EQ(live.report["failed_requests"], 0);
  // Once where it was written, and again in every sequence that reuses the page.
  EXPECT_GT(live.report["wrong_reused_bytes"], 0);
  EXPECT_GT(live.report["wrong_bytes"], live.report["wrong_reused_bytes"]);
  EXPECT_NE(live.report["first_wrong"].get<std::string>().find("1 bytes of K rows"),
            std::string::npos)
      << live.report["first_wrong"];
}

TEST(ReplayTest, RunsOnAFleetThatIsUpAndFailsWhereThereIsNone) {
  const testing::TempDir dir;
  auto up = ChildProcess::Start(
      {.program = "pagetide",
       .args = {"up", "--dir=" + dir.path(), "--workers=2", "--pool-bytes=256KiB",
                "--router-port=0", "--store-port=0", "--worker-port=0"}});
  ASSERT_TRUE(up.ok()) << up.status();
  const std::string router = (*up)->Address("router");
  for (int run = 0; run < 2; ++run) {
    const Ended live = RunReplay("mooncake", {"--live", "--requests=40", "--router=" + router});
    ASSERT_TRUE(live.report.is_object()) << live.log;
    EXPECT_EQ(live.exit_code, 0) << live.log;
    EXPECT_EQ(live.report["workers"], 2);
    EXPECT_EQ(live.report["frames_per_worker"], 64);
    EXPECT_EQ(live.report["wrong_bytes"], 0);
    // Each run has pages of its own, so the second is as cold as the first.
    EXPECT_LE(live.report["hit_rate"], live.report["simulated_unbounded_hit_rate"]);
  }
  EXPECT_EQ((*up)->Terminate().value_or(-1), 0);
  const Ended none = RunReplay("mooncake", {"--live", "--requests=40", "--router=127.0.0.1:1"});
  EXPECT_EQ(none.exit_code, 1);
  EXPECT_TRUE(none.report.is_null());
  EXPECT_NE(none.log.find("UNAVAILABLE"), std::string::npos) << none.log;
}

}  // namespace
}  // namespace pagetide
