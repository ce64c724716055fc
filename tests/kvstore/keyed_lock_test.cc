#include "kvstore/keyed_lock.h"

#include <gtest/gtest.h>

#include <memory>
#include <thread>

namespace pagetide {
namespace {

TEST(KeyedLockTest, AWaitEndsAtItsDeadlineAndHoldsNothing) {
  FakeClock clock;
  KeyedLock lock(&clock);
  auto first = std::make_unique<KeyedLock::Hold>(&lock, std::vector<std::string>{"a"});
  ASSERT_TRUE(first->status().ok());
  {
    const KeyedLock::Hold second(&lock, {"a", "b"}, clock.MonotonicNow());
    EXPECT_EQ(second.status().code(), absl::StatusCode::kDeadlineExceeded);
    const KeyedLock::Hold third(&lock, {"b"}, clock.MonotonicNow());
    EXPECT_TRUE(third.status().ok()) << "the second holds none of its keys";
  }
  first.reset();
  const KeyedLock::Hold again(&lock, {"a", "b"}, clock.MonotonicNow());
  EXPECT_TRUE(again.status().ok()) << "what gave up gave nothing back that it did not have";
}

TEST(KeyedLockTest, AWaiterGetsTheKeysWhenTheirHolderLetsGo) {
  KeyedLock lock(Clock::Real());
  auto first = std::make_unique<KeyedLock::Hold>(&lock, std::vector<std::string>{"a", "b"});
  absl::Status got = absl::UnknownError("never ran");
  std::thread waiter([&] {
    const KeyedLock::Hold second(&lock, {"b"}, Clock::Real()->MonotonicNow() + absl::Seconds(60));
    got = second.status();
  });
  first.reset();
  waiter.join();
  EXPECT_TRUE(got.ok()) << got;
}

}  // namespace
}  // namespace pagetide
