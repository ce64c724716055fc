#include "core/lease_table.h"

#include <map>
#include <random>
#include <string>
#include <vector>

#include "base/error_info.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using absl::Seconds;
using absl::StatusCode;

// Every transition of one name: from a state, by a call, to an outcome and a state.
TEST(LeaseTableTest, TransitionsOfOneName) {
  enum class From { kFree, kHeld, kExpired, kReleased };  // by incarnation 1, epoch 1, ttl 5 s
  enum class Call {
    kAcquireSame,
    kAcquireOther,
    kTakeOver,
    kRenew,
    kRenewOtherEpoch,
    kReleaseOther
  };
  struct Case {
    From from;
    Call call;
    StatusCode code;
    uint64_t holder;  // 0: nobody
    uint64_t epoch;
  };
  const Case cases[] = {
      {From::kFree, Call::kAcquireSame, StatusCode::kOk, 1, 1},
      {From::kFree, Call::kRenew, StatusCode::kFailedPrecondition, 0, 0},
      {From::kFree, Call::kReleaseOther, StatusCode::kOk, 0, 0},
      {From::kHeld, Call::kAcquireSame, StatusCode::kOk, 1, 1},
      {From::kHeld, Call::kAcquireOther, StatusCode::kAlreadyExists, 1, 1},
      {From::kHeld, Call::kTakeOver, StatusCode::kOk, 2, 2},
      {From::kHeld, Call::kRenew, StatusCode::kOk, 1, 1},
      {From::kHeld, Call::kRenewOtherEpoch, StatusCode::kFailedPrecondition, 1, 1},
      {From::kHeld, Call::kReleaseOther, StatusCode::kFailedPrecondition, 1, 1},
      {From::kExpired, Call::kAcquireSame, StatusCode::kOk, 1, 2},
      {From::kExpired, Call::kAcquireOther, StatusCode::kOk, 2, 2},
      {From::kExpired, Call::kTakeOver, StatusCode::kOk, 2, 2},
      {From::kExpired, Call::kRenew, StatusCode::kFailedPrecondition, 0, 0},
      {From::kExpired, Call::kReleaseOther, StatusCode::kOk, 0, 0},
      {From::kReleased, Call::kAcquireSame, StatusCode::kOk, 1, 2},
      {From::kReleased, Call::kAcquireOther, StatusCode::kOk, 2, 2},
      {From::kReleased, Call::kRenew, StatusCode::kFailedPrecondition, 0, 0},
  };
  for (const Case& c : cases) {
    SCOPED_TRACE(testing::Message()
                 << "from " << static_cast<int>(c.from) << " call " << static_cast<int>(c.call));
    FakeClock clock;
    LeaseTable table(&clock, 10);
    if (c.from != From::kFree) {
      const auto lease = table.Acquire("w1", 1, Seconds(5));
      ASSERT_TRUE(lease.ok());
      ASSERT_EQ(lease->epoch, 1u);
    }
    if (c.from == From::kExpired) clock.Advance(Seconds(5));
    if (c.from == From::kReleased) {
      ASSERT_TRUE(table.Release("w1", 1, 1).ok());
    }
    absl::Status status;
    switch (c.call) {
      case Call::kAcquireSame:
        status = table.Acquire("w1", 1, Seconds(5)).status();
        break;
      case Call::kAcquireOther:
        status = table.Acquire("w1", 2, Seconds(5)).status();
        break;
      case Call::kTakeOver:
        status = table.TakeOver("w1", 2, Seconds(5)).status();
        break;
      case Call::kRenew:
        status = table.Renew("w1", 1, 1, Seconds(5));
        break;
      case Call::kRenewOtherEpoch:
        status = table.Renew("w1", 1, 7, Seconds(5));
        break;
      case Call::kReleaseOther:
        status = table.Release("w1", 2, 9);
        break;
    }
    EXPECT_EQ(status.code(), c.code) << status;
    if (status.code() == StatusCode::kFailedPrecondition) {
      EXPECT_EQ(GetReason(status), error_reason::kStaleEpoch);
    }
    const auto lease = table.Find("w1");
    EXPECT_EQ(lease.has_value() ? lease->incarnation : 0, c.holder);
    EXPECT_EQ(lease.has_value() ? lease->epoch : 0, c.epoch);
  }
}

TEST(LeaseTableTest, RenewalMovesTheExpiryAndItIsReportedOnce) {
  FakeClock clock;
  LeaseTable table(&clock, 10);
  ASSERT_TRUE(table.Acquire("w1", 1, Seconds(5)).ok());
  clock.Advance(Seconds(4));
  ASSERT_TRUE(table.Renew("w1", 1, 1, Seconds(5)).ok());
  clock.Advance(Seconds(4));
  EXPECT_TRUE(table.TakeExpired().empty());
  EXPECT_TRUE(table.Find("w1").has_value());
  clock.Advance(Seconds(1));
  EXPECT_FALSE(table.Find("w1").has_value());
  const auto expired = table.TakeExpired();
  ASSERT_EQ(expired.size(), 1u);
  EXPECT_EQ(expired[0].epoch, 1u);
  EXPECT_TRUE(table.TakeExpired().empty());
}

TEST(LeaseTableTest, RefusesEmptyArgumentsAndTooManyNames) {
  FakeClock clock;
  LeaseTable table(&clock, 1);
  EXPECT_EQ(table.Acquire("", 1, Seconds(1)).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(table.Acquire("w", 0, Seconds(1)).status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(table.Acquire("w", 1, Seconds(0)).status().code(), StatusCode::kInvalidArgument);
  ASSERT_TRUE(table.Acquire("w", 1, Seconds(1)).ok());
  EXPECT_EQ(table.Acquire("v", 1, Seconds(1)).status().code(), StatusCode::kResourceExhausted);
  table.Forget("w");  // held: stays
  EXPECT_TRUE(table.Find("w").has_value());
  clock.Advance(Seconds(1));
  table.Forget("w");
  EXPECT_TRUE(table.Acquire("v", 1, Seconds(1)).ok());
}

// Against a naive table: one owner at a time, epochs that only grow, expiry to the tick.
TEST(LeaseTableTest, RandomCallsKeepOneOwnerAndGrowingEpochs) {
  for (uint32_t seed = 1; seed <= 50; ++seed) {
    std::mt19937 rng(seed);
    FakeClock clock;
    LeaseTable table(&clock, 3);
    struct Naive {
      uint64_t holder = 0, epoch = 0;
      absl::Duration expires;
      bool reported = true;
    };
    std::map<std::string, Naive> naive;
    absl::Duration now;
    for (int step = 0; step < 400; ++step) {
      const std::string name(1, static_cast<char>('a' + rng() % 3));
      const uint64_t incarnation = 1 + rng() % 3;
      const absl::Duration ttl = Seconds(1 + rng() % 4);
      Naive& n = naive[name];
      const bool is_held = n.holder != 0 && now < n.expires;
      switch (rng() % 6) {
        case 0:
        case 1: {
          const bool take_over = rng() % 4 == 0;
          const auto lease = take_over ? table.TakeOver(name, incarnation, ttl)
                                       : table.Acquire(name, incarnation, ttl);
          if (is_held && n.holder != incarnation && !take_over) {
            ASSERT_EQ(lease.status().code(), StatusCode::kAlreadyExists) << "seed " << seed;
            break;
          }
          ASSERT_TRUE(lease.ok());
          if (!is_held || n.holder != incarnation) ++n.epoch;
          n.holder = incarnation;
          n.expires = now + ttl;
          n.reported = false;
          ASSERT_EQ(lease->epoch, n.epoch) << "seed " << seed << " step " << step;
          break;
        }
        case 2: {
          const uint64_t epoch = n.epoch - (rng() % 4 == 0 ? 1 : 0);
          const bool may = is_held && n.holder == incarnation && n.epoch == epoch;
          ASSERT_EQ(table.Renew(name, incarnation, epoch, ttl).ok(), may) << "seed " << seed;
          if (may) n.expires = now + ttl;
          break;
        }
        case 3: {
          const bool is_owner = n.holder == incarnation;
          ASSERT_EQ(table.Release(name, incarnation, n.epoch).ok(), is_owner || !is_held);
          if (is_owner) {
            n.holder = 0;
            n.reported = true;
          }
          break;
        }
        case 4: {
          size_t num_expired = 0;
          for (auto& [_, other] : naive) {
            if (other.holder != 0 && other.expires <= now && !other.reported) {
              other.reported = true;
              ++num_expired;
            }
          }
          ASSERT_EQ(table.TakeExpired().size(), num_expired) << "seed " << seed;
          break;
        }
        case 5:
          clock.Advance(Seconds(1));
          now += Seconds(1);
          break;
      }
      const auto lease = table.Find(name);
      const bool is_held_now = n.holder != 0 && now < n.expires;
      ASSERT_EQ(lease.has_value(), is_held_now) << "seed " << seed << " step " << step;
      if (lease.has_value()) {
        ASSERT_EQ(lease->incarnation, n.holder);
      }
    }
  }
}

}  // namespace
}  // namespace pagetide
