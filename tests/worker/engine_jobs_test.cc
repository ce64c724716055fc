// Jobs of engines as others see them: what a drain makes of them, and that their sequences are
// their own.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <latch>
#include <random>
#include <thread>
#include <vector>

#include "base/error_info.h"
#include "tests/support/timing.h"
#include "tests/worker/engine_pools_fixture.h"
#include "tests/worker/watched_device.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;

TEST(EngineJobsTest, ADrainStopsTheJobsTellsTheirWatchersAndTakesNoMore) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF32), 4));
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4});
  const EnginePoolRef ref = pools.Register(engine);
  std::mt19937 random(12);
  const std::vector<uint32_t> tokens = Tokens(1, 2 * kPage);
  const EngineSlotMap map = engine.Allocate(0, tokens.size(), &random);
  engine.Compute(tokens, map, 0, tokens.size());
  ASSERT_EQ(pools.Store(ref, tokens, {map}).state, EngineJobState::kDone);
  pools.under.host->Quiesce();
  const ModelHost::PinnedTable held = pools.HoldAllFrames(4);
  // Three run, as many as a tenant may have, and wait for frames; one is queued.
  const uint64_t waits = pools.under.host->Counters().acquire_waits;
  std::vector<absl::StatusOr<EngineJobInfo>> jobs;
  for (int j = 0; j < 4; ++j) {
    jobs.push_back(pools.Submit(EngineJobKind::kLoad, ref, tokens,
                                {engine.Allocate(0, tokens.size(), &random)}));
    ASSERT_TRUE(jobs.back().ok()) << jobs.back().status();
  }
  ASSERT_TRUE(Eventually([&] { return pools.under.host->Counters().acquire_waits >= waits + 3; }));
  std::vector<EngineJobInfo> told(jobs.size());
  std::vector<std::thread> watchers;
  for (size_t j = 0; j < jobs.size(); ++j) {
    watchers.emplace_back([&, j] { told[j] = pools.Await(jobs[j]); });
  }
  pools.pools.Drain();
  pools.pools.Drain();
  for (std::thread& watcher : watchers) watcher.join();
  for (const EngineJobInfo& info : told) {
    EXPECT_EQ(info.state, EngineJobState::kCancelled) << info.status;
    EXPECT_EQ(GetReason(info.status), "DRAINING") << info.status;
    EXPECT_EQ(info.progress.usable_tokens, 0);
  }
  const absl::Status refused = pools.Submit(EngineJobKind::kStore, ref, tokens, {map}).status();
  EXPECT_EQ(refused.code(), absl::StatusCode::kFailedPrecondition) << refused;
  EXPECT_EQ(GetReason(refused), "DRAINING");
  EXPECT_EQ(GetReason(pools.pools
                          .Register(pools.under.tenant, pools.under.host,
                                    engine.Registration("late"), HostUnderTest::Soon())
                          .status()),
            "DRAINING");
  EXPECT_EQ(pools.pools.num_active_jobs(), 0);
  // What there is can still be asked for and ended.
  EXPECT_EQ(pools.Now(told[0]).state, EngineJobState::kCancelled);
  EXPECT_TRUE(pools.pools.Unregister(pools.under.tenant, ref, HostUnderTest::Soon()).ok());
  EXPECT_EQ(engine.WrongBytes(), 0);
}

TEST(EngineJobsTest, AWatchDoesNotHoldADrainUpThoughItsJobHasNotEnded) {
  WatchedDevice device(/*has_host_view=*/true);
  HostUnderTest::Setup setup = HostSetup(ModelOf(1, 2, DataType::kF32));
  setup.device = &device;
  Pools pools(setup);
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4});
  const EnginePoolRef ref = pools.Register(engine);
  const auto info = pools.under.OpenAndFill(Tokens(1, kPage + 3));
  ASSERT_TRUE(info.ok()) << info.status();
  // The copy of the sequence's tail, which a job takes first, does not come to an end.
  std::latch is_copying(1), may_go_on(1);
  device.OnNextCopy([&] {
    is_copying.count_down();
    may_go_on.wait();
  });
  const auto job =
      pools.pools.Submit(pools.under.tenant, EngineJobKind::kLoad,
                         {.pool = ref, .sequence = info->id, .maps = {{0, {1, 2, 3}}}});
  ASSERT_TRUE(job.ok()) << job.status();
  is_copying.wait();
  pools.pools.Drain();
  const MonotonicTime before = Clock::Real()->MonotonicNow();
  const absl::Status watched =
      pools.pools.Watch(pools.under.tenant, job->id, HostUnderTest::In(absl::Minutes(5)),
                        [](const EngineJobInfo&, bool) { return true; });
  EXPECT_LT(Clock::Real()->MonotonicNow() - before, absl::Minutes(1));
  EXPECT_EQ(watched.code(), absl::StatusCode::kFailedPrecondition) << watched;
  EXPECT_EQ(GetReason(watched), "DRAINING");
  may_go_on.count_down();
  pools.pools.Stop();
  EXPECT_EQ(pools.Now(*job).state, EngineJobState::kCancelled);
  EXPECT_EQ(engine.WrongBytes(), 0);
}

TEST(EngineJobsTest, NobodySeesTheSequencesThatJobsWorkOn) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF32), 5));
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4});
  const EnginePoolRef ref = pools.Register(engine);
  std::mt19937 random(13);
  const std::vector<uint32_t> tokens = Tokens(1, 2 * kPage);
  const EngineSlotMap map = engine.Allocate(0, tokens.size(), &random);
  engine.Compute(tokens, map, 0, tokens.size());
  ASSERT_EQ(pools.Store(ref, tokens, {map}).state, EngineJobState::kDone);
  pools.under.host->Quiesce();
  const ModelHost::PinnedTable held = pools.HoldAllFrames(5);
  // One that loads a prompt and one that stores another wait for frames.
  const uint64_t waits = pools.under.host->Counters().acquire_waits;
  const auto load =
      pools.Submit(EngineJobKind::kLoad, ref, tokens, {engine.Allocate(0, tokens.size(), &random)});
  const auto store = pools.Submit(EngineJobKind::kStore, ref, Tokens(500, 2 * kPage), {map});
  ASSERT_TRUE(load.ok() && store.ok());
  ASSERT_TRUE(Eventually([&] { return pools.under.host->Counters().acquire_waits >= waits + 2; }));
  EXPECT_EQ(pools.under.host->Load().open_sequences, 3);
  const auto listed = pools.under.host->List(pools.under.tenant, 0, 10);
  ASSERT_EQ(listed.size(), 1u);
  EXPECT_EQ(listed[0].id, held.info.id);
  // Nor does an edit of all that a tenant has open.
  const auto kept = pools.under.host->Edit(
      pools.under.tenant, std::vector<SequenceHandle>{{held.info.id, held.info.epoch, {}}},
      std::vector<SequenceEdit>{KeepOnlyEdit{{held.info.number}}});
  ASSERT_TRUE(kept.ok()) << kept.status();
  EXPECT_TRUE(kept->others.empty());
  pools.pools.Stop();
  EXPECT_EQ(pools.under.host->Load().open_sequences, 1);
  EXPECT_EQ(engine.WrongBytes(), 0);
}

}  // namespace
}  // namespace pagetide
