// `pagetide demo` as a user runs it: over real processes, all checks of its own, and the numbers
// that FEATURES.md A5 states.
#include <nlohmann/json.hpp>
#include <string>
#include <vector>

#include "gtest/gtest.h"
#include "tests/support/process.h"

namespace pagetide {
namespace {

using testing::ChildProcess;

// Runs the command to its end; the JSON object that it printed.
nlohmann::json RunDemo(const std::vector<std::string>& flags, int* exit_code) {
  std::vector<std::string> args = {"demo", "--json"};
  args.insert(args.end(), flags.begin(), flags.end());
  auto demo = ChildProcess::Start({.program = "pagetide", .args = args, .wait_ready = false});
  EXPECT_TRUE(demo.ok()) << demo.status();
  const auto code = (*demo)->Wait(absl::Minutes(4));
  EXPECT_TRUE(code.ok()) << code.status();
  *exit_code = code.value_or(-1);
  // Progress and the report share the log; the report is the only thing in braces.
  const std::string log = (*demo)->Log();
  const size_t begin = log.find("{\n");
  const size_t end = log.rfind("\n}");
  if (begin == std::string::npos || end == std::string::npos) return nullptr;
  return nlohmann::json::parse(log.substr(begin, end + 2 - begin), nullptr, false);
}

TEST(DemoTest, EverySceneReusesRestoresAndAgreesWithTheOracleBitForBit) {
  int exit_code = -1;
  const nlohmann::json report = RunDemo({}, &exit_code);
  ASSERT_TRUE(report.is_object());
  EXPECT_EQ(exit_code, 0) << report["checks"].dump(2);
  EXPECT_EQ(report["ok"], true);
  EXPECT_EQ(report["wrong_bytes"], 0);
  ASSERT_EQ(report["scenes"].size(), 6u);
  for (const auto& scene : report["scenes"]) {
    EXPECT_GT(scene["reused_tokens"], 0) << scene["name"];
    EXPECT_GT(scene["pages_restored"], 0) << scene["name"];
    EXPECT_EQ(scene["logits_identical"], true) << scene["name"];
    for (const auto& request : scene["requests"]) EXPECT_GT(request["bytes_compared"], 0);
  }
  const auto& cases = report["scenes"][0]["requests"];
  ASSERT_EQ(cases.size(), 3u);
  const int computed[] = {680, 81, 82};
  const int reused[] = {0, 600, 600};
  const int pages[] = {4, 2, 2};
  const int copied[] = {0, 88, 88};
  for (int i = 0; i < 3; ++i) {
    EXPECT_EQ(cases[i]["computed_tokens"], computed[i]) << i;
    EXPECT_EQ(cases[i]["reused_tokens"], reused[i]) << i;
    EXPECT_EQ(cases[i]["new_pages"], pages[i]) << i;
    EXPECT_EQ(cases[i]["copied_rows"], copied[i]) << i;
  }
}

TEST(DemoTest, OnePlantedBitWithChecksumsOffChangesTheLogits) {
  int exit_code = -1;
  const nlohmann::json report = RunDemo({"--plant-flip"}, &exit_code);
  ASSERT_TRUE(report.is_object());
  EXPECT_EQ(exit_code, 0) << report["checks"].dump(2);
  EXPECT_EQ(report["scenes"][0]["logits_identical"], false);
  EXPECT_GT(report["wrong_bytes"], 0);
}

TEST(DemoTest, MissingTextsAreNamedAndTheExitCodeSaysSo) {
  int exit_code = -1;
  const nlohmann::json report = RunDemo({"--texts=/nonexistent"}, &exit_code);
  ASSERT_TRUE(report.is_object());
  EXPECT_EQ(exit_code, 1);
  EXPECT_NE(report.dump().find("/nonexistent/Apache-2.0"), std::string::npos);
}

}  // namespace
}  // namespace pagetide
