// `pagetide replay` as a command: flags, output, refusals. tests/integration/replay_test.cc runs it
// over real processes.
#include "cli/replay_command.h"

#include <CLI/CLI.hpp>
#include <sstream>
#include <string>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "nlohmann/json.hpp"
#include "replay/trace.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

std::string SmallTrace(TraceFormat format) {
  return absl::StrCat(PAGETIDE_SOURCE_DIR, "/tests/replay/testdata/small_", TraceFormatName(format),
                      ".jsonl");
}

absl::Status RunCommand(const std::string& flags, std::string* output) {
  CLI::App app("test");
  const CommandRunner run = AddReplayCommand(app);
  app.parse(flags);
  std::ostringstream out;
  const absl::Status status = run(out);
  *output = out.str();
  return status;
}

TEST(ReplayCommandTest, PrintsATableOrJson) {
  const std::string flags =
      absl::StrCat("replay --simulate --format weka --workers 3 --pages-per-worker 50 --trace ",
                   SmallTrace(TraceFormat::kWeka));
  std::string output;
  ASSERT_TRUE(RunCommand(flags, &output).ok());
  EXPECT_THAT(output, HasSubstr("block hit rate over shared LRU"));
  ASSERT_TRUE(RunCommand(flags + " --json --policy least_loaded --seed 9", &output).ok());
  const nlohmann::json json = nlohmann::json::parse(output);
  EXPECT_EQ(json["workers"], 3);
  EXPECT_EQ(json["policy"], "least_loaded");
  EXPECT_EQ(json["seed"], 9);
  EXPECT_EQ(json["per_worker"].size(), 3u);
  EXPECT_GT(json["hit_rate"], 0.0);
}

TEST(ReplayCommandTest, RefusesWhatItCannotDo) {
  std::string output;
  EXPECT_THAT(std::string(RunCommand("replay --trace x", &output).message()),
              HasSubstr("--simulate or --live"));
  EXPECT_THAT(std::string(RunCommand("replay --simulate --live --trace x", &output).message()),
              HasSubstr("--simulate or --live"));
  EXPECT_THAT(
      std::string(RunCommand("replay --simulate --trace x --format csv", &output).message()),
      HasSubstr("unknown name \"csv\""));
  EXPECT_EQ(RunCommand("replay --simulate --trace /does/not/exist", &output).code(),
            absl::StatusCode::kNotFound);
  const std::string live =
      absl::StrCat("replay --live --trace ", SmallTrace(TraceFormat::kMooncake));
  EXPECT_THAT(std::string(RunCommand(live + " --page-tokens 1", &output).message()),
              HasSubstr("page tokens 1 is not in [2, 4096]"));
  EXPECT_THAT(std::string(RunCommand(live + " --row-bytes 7", &output).message()),
              HasSubstr("row bytes 7"));
  EXPECT_THAT(std::string(RunCommand(live + " --prefill-rate -1", &output).message()),
              HasSubstr("prefill rate -1"));
  EXPECT_THAT(std::string(RunCommand(live + " --workers 0", &output).message()),
              HasSubstr("--workers 0 is not 1 to 64"));
  EXPECT_THAT(std::string(RunCommand(live + " --pages-per-worker 5", &output).message()),
              HasSubstr("--pages-per-worker 5: the largest request of the slice needs 2"));
  EXPECT_THAT(
      std::string(RunCommand(live + " --router 127.0.0.1:1 --workers 2", &output).message()),
      HasSubstr("behind --router"));
  EXPECT_EQ(output, "");
}

}  // namespace
}  // namespace pagetide
