// Tests of base/mutex.h, base/status_macros.h, base/strong_id.h, base/check.h and base/log.h.
#include <string>
#include <thread>
#include <type_traits>
#include <vector>

#include "absl/container/flat_hash_set.h"
#include "base/check.h"
#include "base/log.h"
#include "base/mutex.h"
#include "base/status_macros.h"
#include "base/strong_id.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

struct Counter {
  Mutex mu;
  CondVar changed;
  int value ABSL_GUARDED_BY(mu) = 0;
};

TEST(MutexTest, ExcludesAndWakes) {
  Counter counter;
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 1000; ++i) {
        MutexLock lock(&counter.mu);
        ++counter.value;
        counter.changed.SignalAll();
      }
    });
  }
  {
    MutexLock lock(&counter.mu);
    while (counter.value < 4000) counter.changed.Wait(&counter.mu);
    EXPECT_EQ(counter.value, 4000);
  }
  for (std::thread& thread : threads) thread.join();
}

TEST(MutexTest, AWaitWithoutASignalTimesOutHoldingTheMutex) {
  Counter counter;
  MutexLock lock(&counter.mu);
  // Wake-ups may be spurious, so only the time-out itself is certain to come.
  while (counter.changed.WaitWithTimeout(&counter.mu, absl::Milliseconds(1))) {
  }
  while (counter.changed.WaitWithTimeout(&counter.mu, -absl::InfiniteDuration())) {
  }
  bool was_locked = true;
  std::thread([&] {
    if (counter.mu.TryLock()) {
      was_locked = false;
      counter.mu.Unlock();
    }
  }).join();
  EXPECT_TRUE(was_locked);
}

TEST(MutexTest, AnInfiniteWaitIsWoken) {
  Counter counter;
  std::thread waker([&] {
    MutexLock lock(&counter.mu);
    counter.value = 1;
    counter.changed.Signal();
  });
  {
    MutexLock lock(&counter.mu);
    while (counter.value == 0) {
      counter.changed.WaitWithTimeout(&counter.mu, absl::InfiniteDuration());
    }
    EXPECT_EQ(counter.value, 1);
  }
  waker.join();
}

absl::StatusOr<int> Half(int n) {
  if (n % 2 != 0) return absl::InvalidArgumentError("odd");
  return n / 2;
}

absl::StatusOr<int> Quarter(int n, int* steps) {
  PT_ASSIGN_OR_RETURN(const int half, Half(n));
  ++*steps;
  PT_ASSIGN_OR_RETURN(const int quarter, Half(half));
  ++*steps;
  return quarter;
}

absl::Status Check(int n, bool* passed) {
  PT_RETURN_IF_ERROR(Half(n).status());
  *passed = true;
  return absl::OkStatus();
}

TEST(StatusMacrosTest, ReturnTheFirstError) {
  int steps = 0;
  EXPECT_EQ(Quarter(12, &steps).value(), 3);
  EXPECT_EQ(steps, 2);
  steps = 0;
  EXPECT_EQ(Quarter(6, &steps).status().message(), "odd");
  EXPECT_EQ(steps, 1);
  bool passed = false;
  EXPECT_FALSE(Check(3, &passed).ok());
  EXPECT_FALSE(passed);
  EXPECT_TRUE(Check(4, &passed).ok());
  EXPECT_TRUE(passed);
}

using AppleId = StrongId<struct AppleTag>;
using PearId = StrongId<struct PearTag>;
static_assert(!std::is_convertible_v<uint64_t, AppleId>);
static_assert(!std::is_convertible_v<AppleId, uint64_t>);
static_assert(!std::is_constructible_v<AppleId, PearId>);
static_assert(sizeof(AppleId) == sizeof(uint64_t));

TEST(StrongIdTest, ComparesAndHashesByValue) {
  EXPECT_LT(AppleId(1), AppleId(2));
  EXPECT_EQ(AppleId(), AppleId(0));
  const absl::flat_hash_set<AppleId> ids = {AppleId(1), AppleId(2), AppleId(1)};
  EXPECT_EQ(ids.size(), 2u);
}

TEST(CheckDeathTest, ABrokenInvariantEndsTheProcessAndNamesItself) {
  PT_CHECK(1 + 1 == 2);
  EXPECT_DEATH(PT_CHECK(1 + 1 == 3), "broken invariant: 1 \\+ 1 == 3");
}

TEST(LogTest, TheLevelDecidesWhatIsWritten) {
  EXPECT_EQ(SetLogLevel("loud").code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(SetLogLevel("warning").ok());
  EXPECT_FALSE(IsLogged(LogLevel::kInfo));
  EXPECT_TRUE(IsLogged(LogLevel::kWarning));
  testing::internal::CaptureStderr();
  LogInfo("test", "hidden ", 1);
  LogWarning("test", "shown ", 2);
  LogError("test", "braces {} are text");
  const std::string text = testing::internal::GetCapturedStderr();
  EXPECT_THAT(text, testing::Not(testing::HasSubstr("hidden")));
  EXPECT_THAT(text, testing::HasSubstr("W test: shown 2\n"));
  EXPECT_THAT(text, testing::HasSubstr("E test: braces {} are text\n"));
  ASSERT_TRUE(SetLogLevel("info").ok());
}

}  // namespace
}  // namespace pagetide
