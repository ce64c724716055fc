#include "base/thread_group.h"

#include <gtest/gtest.h>
#include <pthread.h>

#include <atomic>
#include <latch>
#include <string>

#include "tests/support/timing.h"

namespace pagetide {
namespace {

TEST(ThreadGroupTest, ThreadsHaveTheNameAndAreWaitedFor) {
  std::atomic<int> num_over{0};
  std::string name;
  {
    ThreadGroup group("a-name-of-16-let");
    group.Start([&] {
      char buffer[16] = {};
      pthread_getname_np(pthread_self(), buffer, sizeof(buffer));
      name = buffer;
      ++num_over;
    });
    for (int i = 0; i < 7; ++i) group.Start([&] { ++num_over; });
  }
  EXPECT_EQ(num_over, 8);
  EXPECT_EQ(name, "a-name-of-16-le");
}

TEST(ThreadGroupTest, WhatEndedIsJoinedByALaterStart) {
  ThreadGroup group("group");
  for (int i = 0; i < 100; ++i) {
    std::latch over(1);
    group.Start([&] { over.count_down(); });
    over.wait();
  }
  EXPECT_TRUE(testing::Eventually([&] {
    group.Start([] {});
    return group.size() == 1;
  }));
}

}  // namespace
}  // namespace pagetide
