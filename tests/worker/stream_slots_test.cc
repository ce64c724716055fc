#include "worker/stream_slots.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "base/error_info.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

TEST(StreamSlotsTest, NoTenantHoldsThemAll) {
  StreamSlots slots(
      {.what = "imports", .reason = "TOO_MANY_IMPORTS", .in_all = 3, .per_tenant = 2});
  std::vector<std::unique_ptr<StreamSlots::Slot>> held;
  for (int i = 0; i < 2; ++i) {
    auto slot = slots.Take("a");
    ASSERT_TRUE(slot.ok()) << slot.status();
    held.push_back(*std::move(slot));
  }
  const absl::Status third = slots.Take("a").status();
  EXPECT_TRUE(absl::IsResourceExhausted(third));
  EXPECT_EQ(GetReason(third), "TOO_MANY_IMPORTS");
  EXPECT_THAT(std::string(third.message()),
              HasSubstr("2 imports of this tenant are running, the limit is 2"));
  EXPECT_EQ(GetRetryDelay(third), absl::Seconds(1));
  auto other = slots.Take("b");
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_THAT(std::string(slots.Take("c").status().message()),
              HasSubstr("3 imports are running, the limit is 3"));
  EXPECT_EQ(slots.num_taken(), 3u);
  held.pop_back();
  EXPECT_TRUE(slots.Take("c").ok());  // and given back at once
  EXPECT_TRUE(slots.Take("a").ok());
  held.clear();
  other->reset();
  EXPECT_EQ(slots.num_taken(), 0u);
}

TEST(StreamSlotsTest, ManyThreadsNeverHoldMoreThanTheLimits) {
  StreamSlots slots({.in_all = 5, .per_tenant = 3});
  std::atomic<uint32_t> held{0}, of_tenant[2] = {}, taken{0}, refused{0};
  std::atomic<bool> is_wrong{false};
  std::vector<std::thread> threads;
  for (uint32_t t = 0; t < 8; ++t) {
    threads.emplace_back([&, tenant = t % 2] {
      for (int i = 0; i < 2000; ++i) {
        auto slot = slots.Take(tenant == 0 ? "a" : "b");
        if (!slot.ok()) {
          ++refused;
          std::this_thread::yield();
          continue;
        }
        ++taken;
        if (++held > 5 || ++of_tenant[tenant] > 3) is_wrong = true;
        std::this_thread::yield();
        --of_tenant[tenant];
        --held;
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_FALSE(is_wrong);
  EXPECT_EQ(taken + refused, 16000u);
  EXPECT_GT(taken, 0u);
  EXPECT_EQ(slots.num_taken(), 0u);
}

}  // namespace
}  // namespace pagetide
