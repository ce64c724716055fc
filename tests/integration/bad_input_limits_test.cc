// Bad input: budgets that are too small, configurations with unknown keys.
#include <fstream>

#include "tests/integration/bad_input_fixture.h"

namespace pagetide::testing {
namespace {

using ::testing::HasSubstr;

// ---- budgets and configurations ----------------------------------------------------------------

TEST_F(BadInputTest, AFrameBudgetSmallerThanOnePageIsRefusedWithTheNumbers) {
  worker_->Kill();
  ASSERT_NO_FATAL_FAILURE(StartFleet(100));
  ExpectRefused(client_->Open({1, 2, 3}).status(), absl::StatusCode::kInvalidArgument,
                "POOL_TOO_SMALL", "100");
  ExpectRefused(client_->Open({1, 2, 3}).status(), absl::StatusCode::kInvalidArgument,
                "POOL_TOO_SMALL", "4096");
}

TEST_F(BadInputTest, APromptLargerThanEveryPoolIsRefusedAndNotRetried) {
  const Held held = Hold();  // the worker has its pool, and says so to the router
  const std::vector<uint32_t> tokens = Tokens(3, kFrames * 16 + 1);
  v1::AssignSequenceRequest assign;
  assign.mutable_prompt()->set_model(model_->digest().ToHex());
  assign.mutable_prompt()->mutable_tokens()->Add(tokens.begin(), tokens.end());
  absl::Status status;
  EXPECT_TRUE(Eventually([&] {  // until the load report is there
    TestContext context;
    v1::AssignSequenceResponse assigned;
    status = FromGrpcStatus(router_stub_->AssignSequence(&context, assign, &assigned));
    return absl::IsInvalidArgument(status);
  }));
  ExpectRefused(
      status, absl::StatusCode::kInvalidArgument, "POOL_TOO_SMALL",
      "a prompt of 257 tokens fits in none of 1 workers: w1 is too small: 256 tokens fit");
  EXPECT_FALSE(GetRetryDelay(status).has_value());
  // The worker itself says the same of an append that can never have its frames.
  const auto open = client_->Open({});
  ASSERT_TRUE(open.ok()) << open.status();
  ExpectRefused(client_->Append(open->state(), tokens, tokens.size()).status(),
                absl::StatusCode::kInvalidArgument, "POOL_TOO_SMALL", "needs 17, the pool has 16");
  ASSERT_TRUE(client_->Close(open->state()).ok());
  ExpectUnchanged(held);
}

TEST_F(BadInputTest, AnUnknownKeyInAConfigurationIsNamedWithItsLine) {
  for (const char* program : {"pagetide-worker", "pagetide-router", "pagetide-store"}) {
    const std::string path = dir_ / absl::StrCat(program, ".textproto");
    std::ofstream(path) << "# a comment\nlisten: \"127.0.0.1:0\"\nframe_budget: 3\n";
    const auto process =
        ChildProcess::Start({.program = program, .args = {absl::StrCat("--config=", path)}});
    EXPECT_EQ(process.status().code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_THAT(std::string(process.status().message()), HasSubstr(absl::StrCat(path, ":3:")));
    EXPECT_THAT(std::string(process.status().message()), HasSubstr("frame_budget"));
  }
}

}  // namespace
}  // namespace pagetide::testing
