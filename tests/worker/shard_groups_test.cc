// The table of groups: turns, bounds, tenants, ends.
#include "worker/shard_groups.h"

#include <gtest/gtest.h>

#include <atomic>
#include <thread>
#include <vector>

#include "base/error_info.h"

namespace pagetide {
namespace {

MonotonicTime In(absl::Duration d) {
  return Clock::Real()->MonotonicNow() + d;
}

ShardGroups::View Group(uint64_t number, uint64_t epoch = 1) {
  return {.id = {7, number},
          .epoch = epoch,
          .length = 0,
          .ranks = {{"", "a", 1}, {"127.0.0.1:1", "b", 2}}};
}

TEST(ShardGroupsTest, FindsWhatWasAdded) {
  ShardGroups groups({}, Clock::Real());
  ASSERT_TRUE(groups.Add("t", Group(1)).ok());
  const auto found = groups.Find("t", {7, 1});
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->epoch, 1u);
  ASSERT_EQ(found->ranks.size(), 2u);
  EXPECT_EQ(found->ranks[1].address, "127.0.0.1:1");
  EXPECT_EQ(found->ranks[1].sequence_id, "b");
  EXPECT_EQ(found->ranks[1].epoch, 2u);
  {
    const auto turn = groups.TakeTurn("t", {7, 1}, 1, In(absl::Seconds(1)));
    ASSERT_TRUE(turn.ok()) << turn.status();
    EXPECT_EQ((*turn)->length(), 0u);
    (*turn)->SetLength(9);
    EXPECT_EQ((*turn)->length(), 9u);
  }
  EXPECT_EQ(groups.Find("t", {7, 1})->length, 9u);
}

TEST(ShardGroupsTest, AnotherTenantsGroupIsNotThere) {
  ShardGroups groups({}, Clock::Real());
  ASSERT_TRUE(groups.Add("t", Group(1)).ok());
  EXPECT_EQ(GetReason(groups.Find("other", {7, 1}).status()), "SHARD_GROUP_NOT_FOUND");
  // Nor does it learn whether the epoch is right.
  for (const uint64_t epoch : {1, 2}) {
    const auto turn = groups.TakeTurn("other", {7, 1}, epoch, In(absl::Seconds(1)));
    EXPECT_EQ(GetReason(turn.status()), "SHARD_GROUP_NOT_FOUND");
  }
}

TEST(ShardGroupsTest, ATurnOfAnotherEpochIsStale) {
  ShardGroups groups({}, Clock::Real());
  ASSERT_TRUE(groups.Add("t", Group(1, 3)).ok());
  const auto turn = groups.TakeTurn("t", {7, 1}, 2, In(absl::Seconds(1)));
  EXPECT_EQ(GetReason(turn.status()), "STALE_EPOCH");
  EXPECT_EQ(GetReasonMetadata(turn.status(), "epoch"), "3");
  groups.End({7, 1}, 2);
  EXPECT_EQ(groups.size(), 1u) << "only the life that was meant ends";
  // The next life of the sequence takes the place of the one before.
  ASSERT_TRUE(groups.Add("t", Group(1, 5)).ok());
  EXPECT_EQ(groups.size(), 1u);
  EXPECT_EQ(groups.Find("t", {7, 1})->epoch, 5u);
}

TEST(ShardGroupsTest, IsBoundedInAllAndByTenant) {
  ShardGroups groups({.max_groups = 3, .max_groups_of_tenant = 2}, Clock::Real());
  ASSERT_TRUE(groups.Add("t", Group(1)).ok());
  ASSERT_TRUE(groups.Add("t", Group(2)).ok());
  for (const absl::Status& full : {groups.CheckRoom("t"), groups.Add("t", Group(3))}) {
    EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted);
    EXPECT_EQ(GetReason(full), "TOO_MANY_SHARD_GROUPS");
    EXPECT_TRUE(GetRetryDelay(full).has_value());
  }
  ASSERT_TRUE(groups.CheckRoom("u").ok());
  ASSERT_TRUE(groups.Add("u", Group(4)).ok());
  EXPECT_EQ(GetReason(groups.Add("u", Group(5))), "TOO_MANY_SHARD_GROUPS");
  groups.End({7, 2}, 1);
  EXPECT_TRUE(groups.Add("t", Group(5)).ok());
  EXPECT_EQ(groups.size(), 3u);
  EXPECT_EQ(groups.List().size(), 3u);
}

TEST(ShardGroupsTest, OneCallHasTheTurnAndTheNextWaitsForIt) {
  ShardGroups groups({}, Clock::Real());
  ASSERT_TRUE(groups.Add("t", Group(1)).ok());
  ASSERT_TRUE(groups.Add("t", Group(2)).ok());
  auto first = groups.TakeTurn("t", {7, 1}, 1, In(absl::Seconds(1)));
  ASSERT_TRUE(first.ok()) << first.status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(
      groups.TakeTurn("t", {7, 1}, 1, In(absl::Milliseconds(10))).status()));
  EXPECT_TRUE(groups.Find("t", {7, 1}).ok()) << "looking takes no turn";
  EXPECT_TRUE(groups.TakeTurn("t", {7, 2}, 1, In(absl::Seconds(1))).ok()) << "another group";
  std::atomic<bool> has_turn{false};
  std::thread second([&] {
    const auto turn = groups.TakeTurn("t", {7, 1}, 1, In(absl::Seconds(60)));
    EXPECT_TRUE(turn.ok()) << turn.status();
    has_turn = true;
  });
  EXPECT_FALSE(has_turn);
  first->reset();
  second.join();
  EXPECT_TRUE(has_turn);
}

TEST(ShardGroupsTest, WhoWaitsForAGroupThatEndsLearnsSo) {
  ShardGroups groups({}, Clock::Real());
  ASSERT_TRUE(groups.Add("t", Group(1)).ok());
  const auto turn = groups.TakeTurn("t", {7, 1}, 1, In(absl::Seconds(1)));
  ASSERT_TRUE(turn.ok()) << turn.status();
  std::thread waiter([&] {
    const auto late = groups.TakeTurn("t", {7, 1}, 1, In(absl::Seconds(60)));
    EXPECT_EQ(GetReason(late.status()), "SHARD_GROUP_NOT_FOUND") << late.status();
  });
  groups.End({7, 1}, 1);
  waiter.join();
  // The one that has the turn is not disturbed, and changes nothing any more.
  (*turn)->SetLength(5);
  EXPECT_EQ((*turn)->ranks().size(), 2u);
  EXPECT_EQ(groups.size(), 0u);
}

TEST(ShardGroupsTest, TurnsAreTakenByManyAtOnce) {
  ShardGroups groups({}, Clock::Real());
  ASSERT_TRUE(groups.Add("t", Group(1)).ok());
  constexpr int kThreads = 8;
  constexpr int kTurns = 200;
  std::vector<std::thread> threads;
  for (int i = 0; i < kThreads; ++i) {
    threads.emplace_back([&] {
      for (int n = 0; n < kTurns; ++n) {
        const auto turn = groups.TakeTurn("t", {7, 1}, 1, In(absl::Seconds(60)));
        ASSERT_TRUE(turn.ok()) << turn.status();
        (*turn)->SetLength((*turn)->length() + 1);  // in two steps
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(groups.Find("t", {7, 1})->length, uint64_t{kThreads} * kTurns);
}

}  // namespace
}  // namespace pagetide
