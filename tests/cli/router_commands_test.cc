// The router's subcommands against a router on loopback.
#include "cli/router_commands.h"

#include <CLI/CLI.hpp>
#include <algorithm>
#include <memory>
#include <sstream>
#include <string>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kvstore/memory_page_store.h"
#include "services/router_role.h"
#include "tests/services/router_fixture.h"

namespace pagetide {
namespace {

using testing::Eventually;
using testing::HandWorker;
using ::testing::HasSubstr;
using testing::TestHello;
using testing::TestLoad;
using testing::TestModelSpec;

class RouterCommandsTest : public ::testing::Test {
 protected:
  RouterCommandsTest() {
    RouterRole::Options options;
    options.server.metrics_address = "";
    options.deployment_secret = std::string(kDevelopmentSecret);
    auto role = RouterRole::Start(std::move(options), &store_, &clock_);
    EXPECT_TRUE(role.ok()) << role.status();
    role_ = *std::move(role);
    v1::RegisterModelRequest request;
    *request.mutable_spec() = TestModelSpec();
    v1::RegisterModelResponse response;
    const auto stub = v1::RouterService::NewStub(MakeChannel(role_->address()));
    EXPECT_TRUE(testing::CallWithDeadline(stub.get(), &v1::RouterService::Stub::RegisterModel,
                                          request, &response)
                    .ok());
    digest_ = response.model().model_digest();
  }

  absl::Status Run(CommandRunner (*add)(CLI::App&), std::vector<std::string> args,
                   std::string* text) {
    CLI::App app;
    const CommandRunner runner = add(app);
    args.insert(args.end(), {"--router", role_->address()});
    std::reverse(args.begin(), args.end());  // as CLI11 takes them
    try {
      app.parse(args);
    } catch (const CLI::ParseError& error) {
      return absl::InvalidArgumentError(error.what());
    }
    std::ostringstream out;
    const absl::Status status = runner(out);
    *text = out.str();
    return status;
  }

  FakeClock clock_;  // hand-made workers send no heartbeats
  MemoryPageStore store_{{.clock = &clock_}};
  std::unique_ptr<RouterRole> role_;
  std::string digest_;
};

TEST_F(RouterCommandsTest, PrintsWorkersSequencesModelsAndPlacements) {
  HandWorker worker(role_->address());
  ASSERT_TRUE(worker.Hello(TestHello("w1", 1)) && worker.Load(TestLoad(digest_)));
  v1::SequenceReport report;
  report.add_changes()->set_sequence_id(SequenceId{1, 0xab}.ToString());
  ASSERT_TRUE(worker.Sequences(report));
  std::string text;
  ASSERT_TRUE(Eventually([&] {
    return Run(AddSequencesCommand, {"sequences"}, &text).ok() &&
           text.find("0000000000000001-ab") != std::string::npos;
  })) << text;
  ASSERT_TRUE(Run(AddWorkersCommand, {"workers"}, &text).ok());
  EXPECT_THAT(text, HasSubstr("w1     worker  serving  127.0.0.1:1  -"));
  ASSERT_TRUE(Run(AddModelsCommand, {"models"}, &text).ok());
  EXPECT_THAT(text, HasSubstr(digest_ + "  tiny"));
  ASSERT_TRUE(
      Run(AddExplainCommand, {"explain", "--model", "tiny", "--tokens", "1,2,3"}, &text).ok());
  EXPECT_THAT(text, HasSubstr("predicted_ttft: w1: lowest score"));
  ASSERT_TRUE(
      Run(AddExplainCommand, {"explain", "--model", "tiny", "--text", "hello", "--json"}, &text)
          .ok());
  EXPECT_THAT(text, HasSubstr("\"compute_tokens\": \"5\""));
  ASSERT_TRUE(Run(AddWorkersCommand, {"workers", "--json"}, &text).ok());
  EXPECT_THAT(text, HasSubstr("\"worker_id\": \"w1\""));
}

TEST_F(RouterCommandsTest, WorkersShowTheirShard) {
  HandWorker worker(role_->address());
  v1::AttachHello hello = TestHello("w1", 1);
  hello.set_shard_group("engine-7");
  hello.set_shard_rank(3);
  ASSERT_TRUE(worker.Hello(hello));
  std::string text;
  EXPECT_TRUE(Eventually([&] {
    return Run(AddWorkersCommand, {"workers"}, &text).ok() &&
           text.find("engine-7 rank 3") != std::string::npos;
  })) << text;
}

TEST_F(RouterCommandsTest, FailuresAreStatuses) {
  std::string text;
  EXPECT_EQ(Run(AddExplainCommand, {"explain", "--model", "nobody", "--tokens", "1"}, &text).code(),
            absl::StatusCode::kNotFound);
  EXPECT_EQ(Run(AddExplainCommand, {"explain", "--tokens", "1"}, &text).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Run(AddExplainCommand, {"explain", "--model", "tiny", "--tokens", "-1"}, &text).code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Run(AddExplainCommand, {"explain", "--model", "tiny"}, &text).code(),
            absl::StatusCode::kInvalidArgument);
}

}  // namespace
}  // namespace pagetide
