#include "tests/support/process.h"

#include <gtest/gtest.h>
#include <signal.h>

#include <string>

#include "absl/strings/ascii.h"
#include "absl/strings/match.h"
#include "absl/strings/numbers.h"

namespace pagetide::testing {
namespace {

std::unique_ptr<ChildProcess> Shell(const std::string& script, bool wait_ready = true) {
  auto child = ChildProcess::Start({.program = "/bin/sh",
                                    .args = {"-c", script},
                                    .wait_ready = wait_ready,
                                    .ready_timeout = absl::Seconds(90)});
  EXPECT_TRUE(child.ok()) << child.status();
  return child.ok() ? *std::move(child) : nullptr;
}

TEST(ChildProcessTest, ReadyLineGivesAddresses) {
  auto child =
      Shell("echo noise; echo prog ready grpc=127.0.0.1:1 metrics=127.0.0.1:2; exec sleep 60");
  ASSERT_NE(child, nullptr);
  EXPECT_EQ(child->Address("grpc"), "127.0.0.1:1");
  EXPECT_EQ(child->Address("metrics"), "127.0.0.1:2");
  EXPECT_EQ(child->Address("none"), "");
  EXPECT_TRUE(child->IsRunning());
}

TEST(ChildProcessTest, TerminateReturnsTheExitCode) {
  auto child = Shell("trap 'exit 7' TERM; echo p ready a=b; while :; do sleep 0.05; done");
  ASSERT_NE(child, nullptr);
  auto code = child->Terminate();
  ASSERT_TRUE(code.ok()) << code.status();
  EXPECT_EQ(*code, 7);
}

TEST(ChildProcessTest, KillEndsAStoppedProgram) {
  auto child = Shell("echo p ready a=b; exec sleep 60");
  ASSERT_NE(child, nullptr);
  child->Stop();
  child->Kill();
  EXPECT_FALSE(child->IsRunning());
  EXPECT_EQ(child->Wait(absl::Seconds(60)).value(), 128 + 9);
}

TEST(ChildProcessTest, AProgramThatEndsBeforeReadyIsAnErrorWithItsOutput) {
  auto child =
      ChildProcess::Start({.program = "/bin/sh", .args = {"-c", "echo broken >&2; exit 3"}});
  ASSERT_FALSE(child.ok());
  EXPECT_EQ(child.status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_NE(child.status().message().find("code 3"), absl::string_view::npos);
  EXPECT_NE(child.status().message().find("broken"), absl::string_view::npos);
}

// The reader may not have run yet when the program is gone: on a loaded machine a test then judged
// an output that was still on its way.
TEST(ChildProcessTest, TheLogIsWholeOnceTheExitCodeIsKnown) {
  for (int run = 0; run < 50; ++run) {
    auto child = Shell("i=0; while [ $i -lt 200 ]; do echo line $i; i=$((i+1)); done; echo last",
                       /*wait_ready=*/false);
    ASSERT_NE(child, nullptr);
    ASSERT_EQ(child->Wait(absl::Seconds(60)).value_or(-1), 0);
    const std::string log = child->Log();
    ASSERT_TRUE(absl::EndsWith(log, "line 199\nlast\n")) << "run " << run << ": " << log;
  }
}

// A child of the program that lives on holds the pipe open; nobody waits for it.
TEST(ChildProcessTest, AnOrphanThatHoldsTheOutputIsNotWaitedFor) {
  auto child = Shell("sleep 60 & echo $!", /*wait_ready=*/false);
  ASSERT_NE(child, nullptr);
  ASSERT_EQ(child->Wait(absl::Seconds(30)).value_or(-1), 0);
  pid_t orphan = 0;
  ASSERT_TRUE(absl::SimpleAtoi(absl::StripAsciiWhitespace(child->Log()), &orphan)) << child->Log();
  child.reset();
  EXPECT_EQ(kill(orphan, SIGKILL), 0) << "it ended before: somebody waited for it";
}

TEST(ChildProcessTest, NoReadyLineIsADeadline) {
  auto child = ChildProcess::Start({.program = "/bin/sh",
                                    .args = {"-c", "exec sleep 60"},
                                    .ready_timeout = absl::Milliseconds(200)});
  EXPECT_EQ(child.status().code(), absl::StatusCode::kDeadlineExceeded);
}

}  // namespace
}  // namespace pagetide::testing
