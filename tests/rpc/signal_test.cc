// A whole life under SIGTERM in a process of its own: signals are process-wide.
#include "rpc/signal.h"

#include <gtest/gtest.h>
#include <signal.h>
#include <sys/wait.h>
#include <unistd.h>

#include <thread>

#include "absl/time/clock.h"

namespace pagetide {
namespace {

// Forks, runs `body` in the child and returns its wait status.
template <typename Body>
int RunInChild(Body body) {
  const pid_t child = fork();
  if (child == 0) _exit(body());
  int status = 0;
  EXPECT_EQ(waitpid(child, &status, 0), child);
  return status;
}

TEST(TerminationSignalTest, ComesToTheWaiterAndTheProcessExitsZero) {
  for (const int signal_number : {SIGTERM, SIGINT}) {
    const int status = RunInChild([signal_number] {
      TerminationSignal termination;
      std::thread worker([] { absl::SleepFor(absl::Milliseconds(50)); });  // inherits the mask
      kill(getpid(), signal_number);
      const int got = termination.Wait();
      worker.join();
      return got == signal_number ? 0 : 1;
    });
    ASSERT_TRUE(WIFEXITED(status)) << "killed by " << WTERMSIG(status);
    EXPECT_EQ(WEXITSTATUS(status), 0);
  }
}

TEST(TerminationSignalTest, WaitForTellsTimeoutFromSignal) {
  const int status = RunInChild([] {
    TerminationSignal termination;
    if (termination.WaitFor(absl::Milliseconds(20)).has_value()) return 1;
    kill(getpid(), SIGTERM);
    return termination.WaitFor(absl::Seconds(10)) == SIGTERM ? 0 : 2;
  });
  ASSERT_TRUE(WIFEXITED(status));
  EXPECT_EQ(WEXITSTATUS(status), 0);
}

TEST(TerminationSignalTest, SecondSignalEndsTheProcessOnceDefaultIsRestored) {
  const int status = RunInChild([] {
    TerminationSignal termination;
    kill(getpid(), SIGTERM);
    termination.Wait();
    termination.RestoreDefault();
    kill(getpid(), SIGTERM);
    absl::SleepFor(absl::Seconds(10));
    return 0;
  });
  ASSERT_TRUE(WIFSIGNALED(status));
  EXPECT_EQ(WTERMSIG(status), SIGTERM);
}

}  // namespace
}  // namespace pagetide
