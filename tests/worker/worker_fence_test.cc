#include "worker/worker_fence.h"

#include <gtest/gtest.h>

#include <functional>
#include <optional>
#include <utility>

#include "base/error_info.h"
#include "kvstore/decorating_page_store.h"
#include "kvstore/memory_page_store.h"

namespace pagetide {
namespace {

// One life of the worker "a".
struct Life {
  Life(uint64_t incarnation, PageStore* store, Clock* clock)
      : lease({.name = "worker/a", .incarnation = incarnation}, store, clock),
        fence("a", incarnation, &lease, store) {}
  StoreLeaseKeeper lease;
  WorkerFence fence;
};

class WorkerFenceTest : public ::testing::Test {
 protected:
  MonotonicTime Soon() const { return clock_.MonotonicNow() + absl::Seconds(1); }
  absl::Status Write(const WriteFence& fence) {
    const std::string name = "m" + std::to_string(++names_);
    return store_.PutManifest({.name = name}, 0, fence, Soon()).status();
  }
  FakeClock clock_;
  MemoryPageStore store_{{.clock = &clock_}};
  int names_ = 0;
};

TEST_F(WorkerFenceTest, AStaleLifeWritesNothingHoweverLate) {
  Life first(1, &store_, &clock_);
  first.lease.Step();
  const auto old_fence = first.fence.Get(Soon());
  ASSERT_TRUE(old_fence.ok()) << old_fence.status();
  EXPECT_EQ(old_fence->epoch, 1u);
  EXPECT_TRUE(Write(*old_fence).ok());
  // It stops; its lease runs out; the same worker starts anew.
  clock_.Advance(absl::Seconds(6));
  Life second(2, &store_, &clock_);
  second.lease.Step();
  const auto new_fence = second.fence.Get(Soon());
  ASSERT_TRUE(new_fence.ok()) << new_fence.status();
  EXPECT_EQ(new_fence->epoch, 2u);
  EXPECT_TRUE(Write(*new_fence).ok());
  // The write that was under way when it stopped, and a new one.
  EXPECT_EQ(GetReason(Write(*old_fence)), error_reason::kStaleEpoch);
  first.lease.Step();
  EXPECT_EQ(GetReason(first.fence.Get(Soon()).status()), error_reason::kStaleEpoch);
}

TEST_F(WorkerFenceTest, ALeaseRegainedIsANewPeriod) {
  Life life(1, &store_, &clock_);
  life.lease.Step();
  const WriteFence before = life.fence.Get(Soon()).value();
  clock_.Advance(absl::Seconds(6));
  EXPECT_TRUE(absl::IsUnavailable(life.fence.Get(Soon()).status()));
  life.lease.Step();
  const auto after = life.fence.Get(Soon());
  ASSERT_TRUE(after.ok()) << after.status();
  EXPECT_GT(after->epoch, before.epoch);
  EXPECT_EQ(GetReason(Write(before)), error_reason::kStaleEpoch);
  EXPECT_TRUE(Write(*after).ok());
}

// Calls a hook once, in front of the first read of a record: a writer that stalls there.
class StallingStore final : public DecoratingPageStore {
 public:
  explicit StallingStore(PageStore* inner) : DecoratingPageStore(inner) {}
  absl::StatusOr<StoreRecord> GetRecord(absl::string_view kind, absl::string_view key,
                                        MonotonicTime deadline) override {
    if (stall) std::exchange(stall, nullptr)();
    return DecoratingPageStore::GetRecord(kind, key, deadline);
  }
  std::function<void()> stall;
};

TEST_F(WorkerFenceTest, AStaleLifeThatStalledInItsFirstFenceTakesNothingBack) {
  StallingStore stalling(&store_);
  Life first(1, &stalling, &clock_);
  first.lease.Step();
  Life second(2, &store_, &clock_);
  std::optional<WriteFence> live;
  stalling.stall = [&] {
    clock_.Advance(absl::Seconds(6));
    second.lease.Step();
    live = second.fence.Get(Soon()).value();
  };
  EXPECT_EQ(GetReason(first.fence.Get(Soon() + absl::Seconds(60)).status()),
            error_reason::kStaleEpoch);
  ASSERT_TRUE(live.has_value());
  EXPECT_TRUE(Write(*live).ok());
  EXPECT_EQ(second.fence.Get(Soon())->epoch, live->epoch);
}

TEST_F(WorkerFenceTest, ValuesNameTheGrantTheyWereWrittenUnder) {
  EXPECT_EQ(LeaseEpochOf(FenceValue("taken over by worker/a lease 7", 12)), 12u);
  EXPECT_EQ(LeaseEpochOf("taken over by worker/a"), 0u);
  EXPECT_EQ(LeaseEpochOf(""), 0u);
}

TEST_F(WorkerFenceTest, RenewalsKeepThePeriod) {
  Life life(1, &store_, &clock_);
  life.lease.Step();
  const WriteFence before = life.fence.Get(Soon()).value();
  for (int i = 0; i < 10; ++i) {
    clock_.Advance(absl::Seconds(2));
    life.lease.Step();
  }
  EXPECT_EQ(life.fence.Get(Soon())->epoch, before.epoch);
}

TEST_F(WorkerFenceTest, WithoutALeaseItIsUnavailable) {
  Life life(1, &store_, &clock_);
  EXPECT_TRUE(absl::IsUnavailable(life.fence.Get(clock_.MonotonicNow()).status()));
}

}  // namespace
}  // namespace pagetide
