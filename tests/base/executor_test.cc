#include "base/executor.h"

#include <pthread.h>

#include <atomic>
#include <latch>
#include <string>
#include <thread>
#include <vector>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;

TEST(ManualExecutorTest, RunsInOrderAndOnlyWhenTold) {
  ManualExecutor executor;
  std::vector<int> ran;
  ASSERT_TRUE(executor.Schedule([&] { ran.push_back(1); }).ok());
  // A task may schedule another.
  ASSERT_TRUE(executor
                  .Schedule([&] {
                    ran.push_back(2);
                    ASSERT_TRUE(executor.Schedule([&] { ran.push_back(3); }).ok());
                  })
                  .ok());
  EXPECT_EQ(executor.QueueLength(), 2u);
  EXPECT_TRUE(executor.RunOne());
  EXPECT_THAT(ran, ElementsAre(1));
  executor.RunAll();
  EXPECT_THAT(ran, ElementsAre(1, 2, 3));
  EXPECT_FALSE(executor.RunOne());
}

TEST(ThreadPoolExecutorTest, RefusesWhenTheQueueIsFull) {
  ThreadPoolExecutor pool({.name = "test", .num_threads = 1, .max_queue = 2});
  std::latch started(1), go(1);
  ASSERT_TRUE(pool.Schedule([&] {
                    started.count_down();
                    go.wait();
                  })
                  .ok());
  started.wait();  // the only thread is busy, the queue empty
  std::atomic<int> ran{0};
  EXPECT_TRUE(pool.Schedule([&] { ++ran; }).ok());
  EXPECT_TRUE(pool.Schedule([&] { ++ran; }).ok());
  EXPECT_EQ(pool.QueueLength(), 2u);
  const absl::Status full = pool.Schedule([&] { ++ran; });
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(full.message()), testing::HasSubstr("2 tasks"));
  go.count_down();
  pool.Stop();
  EXPECT_EQ(ran, 2);
}

TEST(ThreadPoolExecutorTest, StopRunsWhatWasAcceptedAndRefusesTheRest) {
  std::atomic<int> ran{0};
  ThreadPoolExecutor pool({.name = "test", .num_threads = 3, .max_queue = 1000});
  for (int i = 0; i < 500; ++i) ASSERT_TRUE(pool.Schedule([&] { ++ran; }).ok());
  pool.Stop();
  EXPECT_EQ(ran, 500);
  EXPECT_EQ(pool.Schedule([&] { ++ran; }).code(), absl::StatusCode::kUnavailable);
  pool.Stop();
  EXPECT_EQ(ran, 500);
}

TEST(ThreadPoolExecutorTest, ManyThreadsMaySchedule) {
  std::atomic<int> accepted{0}, ran{0};
  {
    ThreadPoolExecutor pool({.name = "test", .num_threads = 2, .max_queue = 8});
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
      threads.emplace_back([&] {
        for (int i = 0; i < 500; ++i) {
          if (pool.Schedule([&] { ++ran; }).ok()) ++accepted;
        }
      });
    }
    for (std::thread& thread : threads) thread.join();
  }
  EXPECT_EQ(ran, accepted);
  EXPECT_GT(ran, 0);
}

TEST(ThreadPoolExecutorTest, NamesItsThreads) {
  ThreadPoolExecutor pool({.name = "restore", .num_threads = 1});
  char name[16] = "";
  ASSERT_TRUE(pool.Schedule([&] { pthread_getname_np(pthread_self(), name, sizeof(name)); }).ok());
  pool.Stop();
  EXPECT_STREQ(name, "restore/0");
}

}  // namespace
}  // namespace pagetide
