#include "worker/store_lease.h"

#include <gtest/gtest.h>

#include "kvstore/memory_page_store.h"
#include "tests/support/timing.h"

namespace pagetide {
namespace {

using State = StoreLeaseKeeper::State;

class StoreLeaseTest : public ::testing::Test {
 protected:
  StoreLeaseKeeper::Options Options(uint64_t incarnation) const {
    return {.name = "worker/a",
            .incarnation = incarnation,
            .ttl = absl::Seconds(5),
            .margin = absl::Milliseconds(500)};
  }
  FakeClock clock_;
  MemoryPageStore store_{{.clock = &clock_}};
};

TEST_F(StoreLeaseTest, IsHeldFromTheGrantUntilShortBeforeTheStoreLetsGo) {
  StoreLeaseKeeper keeper(Options(1), &store_, &clock_);
  EXPECT_EQ(keeper.state(), State::kAcquiring);
  EXPECT_EQ(keeper.Step(), absl::Seconds(5) / 3);
  EXPECT_TRUE(keeper.IsHeld());
  EXPECT_EQ(keeper.epoch(), 1);
  clock_.Advance(absl::Milliseconds(4499));
  EXPECT_TRUE(keeper.IsHeld());
  clock_.Advance(absl::Milliseconds(1));
  EXPECT_EQ(keeper.state(), State::kLost);
  // The store still holds it for us: nobody else gets it in between.
  StoreLeaseKeeper other(Options(2), &store_, &clock_);
  other.Step();
  EXPECT_EQ(other.state(), State::kHeldByOther);
}

TEST_F(StoreLeaseTest, RenewalsKeepIt) {
  StoreLeaseKeeper keeper(Options(1), &store_, &clock_);
  for (int i = 0; i < 20; ++i) {
    const absl::Duration wait = keeper.Step();
    clock_.Advance(wait);
    EXPECT_TRUE(keeper.IsHeld()) << i;
  }
  EXPECT_EQ(keeper.epoch(), 1);
}

TEST_F(StoreLeaseTest, APausedProcessStopsBelievingAndTheNextEpochIsAnothers) {
  StoreLeaseKeeper paused(Options(1), &store_, &clock_);
  paused.Step();
  clock_.Advance(absl::Seconds(10));  // twice the time to live
  EXPECT_FALSE(paused.IsHeld());
  StoreLeaseKeeper other(Options(2), &store_, &clock_);
  other.Step();
  EXPECT_TRUE(other.IsHeld());
  EXPECT_EQ(other.epoch(), 2);
  paused.Step();
  EXPECT_EQ(paused.state(), State::kHeldByOther);
  EXPECT_FALSE(paused.last_error().ok());
}

TEST_F(StoreLeaseTest, StopGivesItBackAtOnce) {
  StoreLeaseKeeper keeper(Options(1), &store_, &clock_);
  keeper.Step();
  keeper.Stop();
  EXPECT_FALSE(keeper.IsHeld());
  StoreLeaseKeeper other(Options(2), &store_, &clock_);
  other.Step();
  EXPECT_TRUE(other.IsHeld());
}

TEST_F(StoreLeaseTest, TheThreadAcquiresAndEndsWithTheKeeper) {
  MemoryPageStore store;
  StoreLeaseKeeper keeper(Options(1), &store, Clock::Real());
  keeper.Start();
  EXPECT_TRUE(testing::Eventually([&] { return keeper.IsHeld(); }));
}

}  // namespace
}  // namespace pagetide
