#include "base/periodic_task.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <string>

#include "tests/support/timing.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;

TEST(PeriodicTaskTest, CallsAgainAndAgainOnItsOwnThread) {
  std::atomic<int> num_calls{0};
  std::string thread_name;  // read after the thread has ended
  {
    PeriodicTask task("a-task-with-a-long-name", absl::Milliseconds(1), [&] {
      char name[16] = {};
      pthread_getname_np(pthread_self(), name, sizeof(name));
      if (++num_calls >= 2) thread_name = name;  // the first call may be faster than the name
    });
    EXPECT_TRUE(Eventually([&] { return num_calls >= 100; }));
  }
  EXPECT_EQ(thread_name, "a-task-with-a-l");
}

TEST(PeriodicTaskTest, EndsInTheMiddleOfAPause) {
  std::atomic<int> num_calls{0};
  const absl::Time began = absl::Now();
  {
    PeriodicTask task("task", absl::Hours(24), [&] { ++num_calls; });
    EXPECT_TRUE(Eventually([&] { return num_calls > 0; }));
  }
  EXPECT_LT(absl::Now() - began, absl::Hours(1));
}

}  // namespace
}  // namespace pagetide
