// Sequences whose client died or forgot them are closed, and no others.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;

class IdleSequencesTest : public ::testing::Test {
 protected:
  SequenceInfo Fill(uint32_t first, uint32_t count) {
    const auto info = t_.OpenAndFill(Tokens(first, count));
    EXPECT_TRUE(info.ok()) << info.status();
    return *info;
  }
  std::vector<SequenceId> After(absl::Duration time) { return After(time, t_); }
  std::vector<SequenceId> After(absl::Duration time, HostUnderTest& t) {
    clock_.Advance(time);
    std::vector<SequenceId> closed;
    for (const IdleSequence& idle : t.host->CloseIdle()) {
      EXPECT_EQ(idle.tenant, t.tenant.name);
      EXPECT_EQ(idle.epoch, 1u);
      closed.push_back(idle.id);
    }
    return closed;
  }

  FakeClock clock_;
  HostUnderTest t_{{.no_store = true, .sequence_idle = absl::Hours(1), .clock = &clock_}};
};

TEST_F(IdleSequencesTest, OneWithoutCallsIsClosedAndOneInUseStays) {
  const SequenceInfo used = Fill(0, 40);
  const SequenceInfo left = Fill(1000, 40);
  EXPECT_THAT(After(absl::Minutes(59)), IsEmpty());
  ASSERT_TRUE(t_.host->Get(t_.tenant, used.id).ok());  // any call is use
  EXPECT_THAT(After(absl::Minutes(2)), ElementsAre(left.id));
  EXPECT_EQ(t_.host->Counters().sequences_expired, 1u);
  EXPECT_EQ(t_.host->Load().open_sequences, 1u);
  const absl::Status gone = t_.host->Get(t_.tenant, left.id).status();
  EXPECT_EQ(GetReason(gone), "SEQUENCE_NOT_FOUND") << gone;
  EXPECT_EQ(t_.WrongRows(used.id, Tokens(0, 40)).value(), 0u);
}

TEST_F(IdleSequencesTest, ItsFullPagesAreFoundAgainAndItsTailIsFree) {
  const SequenceInfo left = Fill(0, 40);
  EXPECT_THAT(After(absl::Hours(1)), ElementsAre(left.id));
  EXPECT_EQ(t_.host->Usage()[0].tail_frames, 0u);
  const auto again = t_.host->Open(t_.tenant, Tokens(0, 40), {}, {});
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->reuse.shared_pages, 2u);
}

TEST_F(IdleSequencesTest, APendingWriteIsUse) {
  // Idle sooner than the longest lease of a reservation ends.
  HostUnderTest t{{.no_store = true, .sequence_idle = absl::Minutes(2), .clock = &clock_}};
  const auto info = t.OpenAndFill(Tokens(0, 20));
  ASSERT_TRUE(info.ok()) << info.status();
  const ReserveItem item{{info->id, info->epoch, std::nullopt}, 1};
  const auto slots =
      t.host->Reserve(t.tenant, {&item, 1}, absl::Minutes(5), false, HostUnderTest::Soon());
  ASSERT_TRUE(slots.ok()) << slots.status();
  EXPECT_THAT(After(absl::Minutes(4), t), IsEmpty());
  clock_.Advance(absl::Minutes(1));
  t.host->Tick();  // the reservation's lease is over
  EXPECT_THAT(After(absl::Seconds(119), t), IsEmpty()) << "counted from the end of the write";
  EXPECT_THAT(After(absl::Seconds(1), t), ElementsAre(info->id));
}

TEST_F(IdleSequencesTest, ACallThatRunsIsUseUntilItsEnd) {
  const SequenceInfo info = Fill(0, 40);
  bool was_told = false;
  const absl::Status watched =
      t_.host->WatchReadiness(t_.tenant, info.id, HostUnderTest::Soon(), [&](const Readiness&) {
        was_told = true;
        EXPECT_THAT(After(absl::Hours(2)), IsEmpty()) << "closed under a call";
        return true;
      });
  EXPECT_TRUE(watched.ok()) << watched;
  EXPECT_TRUE(was_told);
  EXPECT_THAT(After(absl::Minutes(59)), IsEmpty());
  EXPECT_THAT(After(absl::Minutes(1)), ElementsAre(info.id));
}

TEST_F(IdleSequencesTest, AForkIsUseOfItsSourceAndCountsForItself) {
  const SequenceInfo source = Fill(0, 20);
  clock_.Advance(absl::Minutes(59));
  const auto fork = t_.host->Fork(t_.tenant, {source.id, source.epoch, std::nullopt}, std::nullopt,
                                  HostUnderTest::Soon());
  ASSERT_TRUE(fork.ok()) << fork.status();
  EXPECT_THAT(After(absl::Minutes(59)), IsEmpty());
  ASSERT_TRUE(t_.host->Get(t_.tenant, source.id).ok());
  EXPECT_THAT(After(absl::Minutes(1)), ElementsAre(fork->info.id));
}

TEST(NeverIdleTest, ZeroMeansNever) {
  FakeClock clock;
  HostUnderTest t({.no_store = true, .sequence_idle = absl::ZeroDuration(), .clock = &clock});
  ASSERT_TRUE(t.OpenAndFill(Tokens(0, 20)).ok());
  clock.Advance(absl::Hours(24 * 365));
  EXPECT_TRUE(t.host->CloseIdle().empty());
  EXPECT_EQ(t.host->Load().open_sequences, 1u);
}

}  // namespace
}  // namespace pagetide
