// Engine pools over a real ModelHost: pages into and out of blocks of every layout, jobs in all
// their states, and pools that end while jobs run.
#include "worker/engine_pools.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <random>
#include <string>
#include <thread>

#include "base/error_info.h"
#include "tests/support/timing.h"
#include "tests/worker/engine_pools_fixture.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;
using ::testing::HasSubstr;

TEST(EnginePoolsTest, WhatOneEngineStoresAnotherOfAnotherLayoutLoads) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF16)));
  const PageGeometry& geometry = pools.under.model->geometry();
  TestEngine nhd(geometry, {.heads = EngineHeads::kNhd, .block_tokens = 4});
  TestEngine hnd(geometry,
                 {.heads = EngineHeads::kHnd, .is_block_major = true, .block_tokens = 16});
  const EnginePoolRef one = pools.Register(nhd, "one");
  const EnginePoolRef two = pools.Register(hnd, "two");
  EXPECT_NE(one.generation, two.generation);
  std::mt19937 random(1);
  const std::vector<uint32_t> tokens = Tokens(1, 5 * kPage + 3);

  const EngineSlotMap computed = nhd.Allocate(0, tokens.size(), &random);
  nhd.Compute(tokens, computed, 0, tokens.size());
  const EngineJobInfo stored = pools.Store(one, tokens, {computed});
  EXPECT_EQ(stored.state, EngineJobState::kDone) << stored.status;
  EXPECT_EQ(stored.progress.usable_tokens, 5 * kPage);
  EXPECT_EQ(stored.progress.moved_pages, 5);
  EXPECT_EQ(stored.progress.moved_bytes, 5 * geometry.bytes_per_page_of_tokens());
  EXPECT_EQ(stored.progress.known_pages, 0);

  const EngineSlotMap wanted = hnd.Allocate(0, tokens.size(), &random);
  const EngineJobInfo loaded = pools.Load(two, tokens, {wanted});
  EXPECT_EQ(loaded.state, EngineJobState::kDone) << loaded.status;
  EXPECT_EQ(loaded.progress.usable_tokens, 5 * kPage);  // the last three were never stored
  EXPECT_EQ(loaded.progress.moved_bytes, stored.progress.moved_bytes);
  ASSERT_TRUE(loaded.progress.reuse.has_value());
  EXPECT_EQ(loaded.progress.reuse->limit, ReuseLimit::kNeverStored);
  hnd.Expect(tokens, wanted, 0, 5 * kPage);
  EXPECT_EQ(hnd.WrongBytes(), 0);
  EXPECT_EQ(nhd.WrongBytes(), 0);

  // Again: nothing is copied.
  const EngineJobInfo again = pools.Store(one, tokens, {computed});
  EXPECT_EQ(again.state, EngineJobState::kDone) << again.status;
  EXPECT_EQ(again.progress.usable_tokens, 5 * kPage);
  EXPECT_EQ(again.progress.known_pages, 5);
  EXPECT_EQ(again.progress.moved_pages, 0);
  EXPECT_EQ(pools.metrics.Value("pagetide_engine_stored_pages_total"), 5);
  EXPECT_EQ(pools.metrics.Value("pagetide_engine_known_pages_total"), 5);
  EXPECT_EQ(pools.metrics.Value("pagetide_engine_loaded_pages_total"), 5);
  EXPECT_EQ(pools.metrics.Value("pagetide_engine_jobs_total",
                                {{"operation", "store"}, {"outcome", "OK"}}),
            2);
  // No sequence stays behind.
  EXPECT_EQ(pools.under.host->Load().open_sequences, 0);
}

TEST(EnginePoolsTest, RandomPrefixesInRandomLayoutsAgainstAPlainModel) {
  for (const uint32_t seed : {1u, 2u, 3u, 4u, 5u, 6u, 7u, 8u}) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 random(seed);
    const auto pick = [&](uint32_t n) { return static_cast<uint32_t>(random() % n); };
    const DataType types[] = {DataType::kF32, DataType::kF16, DataType::kQ8_0, DataType::kF8E4M3};
    const auto model = ModelOf(1 + pick(2), 1 + pick(3), types[pick(4)], pick(3) == 0 ? 0 : 64);
    Pools pools(HostSetup(model, 6 + pick(30)));
    std::vector<std::unique_ptr<TestEngine>> engines;
    std::vector<EnginePoolRef> refs;
    for (int e = 0; e < 3; ++e) {
      const uint32_t block_tokens = 1 + pick(20);
      engines.push_back(std::make_unique<TestEngine>(
          model->geometry(),
          TestEngine::Setup{.heads = pick(2) == 0 ? EngineHeads::kNhd : EngineHeads::kHnd,
                            .is_block_major = pick(2) == 0,
                            .block_tokens = block_tokens,
                            .num_blocks = 2 + 160 / block_tokens,
                            .padding = pick(2) * pick(7),
                            .names_strides = pick(2) == 0}));
      refs.push_back(pools.Register(*engines.back(), absl::StrCat("e", e)));
    }
    // Prompts that share prefixes: 3 trunks, cut at random and continued.
    std::vector<std::vector<uint32_t>> prompts;
    uint64_t stored_tokens = 0, loaded_tokens = 0;
    for (int step = 0; step < 40; ++step) {
      std::vector<uint32_t> tokens;
      if (!prompts.empty() && pick(4) != 0) {
        tokens = prompts[pick(static_cast<uint32_t>(prompts.size()))];
        tokens.resize(1 + pick(static_cast<uint32_t>(tokens.size())));
      }
      const uint32_t more = pick(static_cast<uint32_t>(121 - tokens.size()));
      tokens = Concat(tokens, Tokens(1000 * (step + 1), more));
      if (tokens.empty()) continue;
      prompts.push_back(tokens);
      const uint32_t e = pick(3);
      TestEngine& engine = *engines[e];
      if (pick(2) == 0) {
        const EngineSlotMap map = engine.Allocate(0, tokens.size(), &random);
        engine.Compute(tokens, map, 0, tokens.size());
        const EngineJobInfo job = pools.Store(refs[e], tokens, {map});
        ASSERT_EQ(job.state, EngineJobState::kDone) << job.status;
        ASSERT_EQ(job.progress.usable_tokens, tokens.size() / kPage * kPage);
        const uint64_t pages = job.progress.usable_tokens / kPage * model->geometry().num_groups();
        ASSERT_EQ(job.progress.known_pages + job.progress.moved_pages, pages);
        stored_tokens += job.progress.usable_tokens;
        engine.Free(map);
      } else {
        const uint64_t first = pick(2) * pick(static_cast<uint32_t>(tokens.size()));
        const EngineSlotMap map = engine.Allocate(first, tokens.size(), &random);
        const EngineJobInfo job = pools.Load(refs[e], tokens, {map});
        ASSERT_EQ(job.state, EngineJobState::kDone) << job.status;
        const uint64_t usable = job.progress.usable_tokens;
        ASSERT_TRUE(job.progress.reuse.has_value());
        ASSERT_EQ(usable, job.progress.reuse->reused_tokens);
        if (usable > first) {
          engine.Expect(tokens, map, first, usable);
          loaded_tokens += usable - first;
        }
        engine.Free(map);
      }
      for (const auto& each : engines) ASSERT_EQ(each->WrongBytes(), 0) << "step " << step;
    }
    EXPECT_GT(stored_tokens, 0);
    EXPECT_GT(loaded_tokens, 0);
    EXPECT_EQ(pools.under.host->Load().open_sequences, 0);
  }
}

TEST(EnginePoolsTest, OfAWindowOnlyTheRowsThatAreLeftAreWritten) {
  // Group 0 is full attention, group 1 a window of 10.
  Pools pools(HostSetup(ModelOf(2, 2, DataType::kF32, 32, 10), 32));
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4, .num_blocks = 64});
  const EnginePoolRef ref = pools.Register(engine);
  std::mt19937 random(3);
  const std::vector<uint32_t> tokens = Tokens(1, 6 * kPage);
  const EngineSlotMap map = engine.Allocate(0, tokens.size(), &random);
  engine.Compute(tokens, map, 0, tokens.size());
  ASSERT_EQ(pools.Store(ref, tokens, {map}).state, EngineJobState::kDone);
  // The window's blocks begin where its engine has them.
  const EngineSlotMap full = engine.Allocate(0, tokens.size(), &random);
  const EngineSlotMap window = engine.Allocate(36, tokens.size(), &random);
  const EngineJobInfo job = pools.Load(ref, tokens, {full, window});
  ASSERT_EQ(job.state, EngineJobState::kDone) << job.status;
  EXPECT_EQ(job.progress.usable_tokens, tokens.size());
  engine.ExpectGroup(0, tokens, full, 0, tokens.size());
  engine.ExpectGroup(1, tokens, window, 36, tokens.size());
  EXPECT_EQ(engine.WrongBytes(), 0);
  // The next token sees row 39: blocks that begin behind it are of no use, and nothing is written.
  const EngineJobInfo behind =
      pools.Load(ref, tokens, {full, engine.Allocate(40, tokens.size(), &random)});
  EXPECT_EQ(behind.state, EngineJobState::kFailed);
  EXPECT_EQ(GetReason(behind.status), "WINDOW_NOT_MAPPED");
  EXPECT_EQ(behind.progress.usable_tokens, 0u);
  EXPECT_EQ(behind.progress.moved_bytes, 0u);
  EXPECT_EQ(engine.WrongBytes(), 0);
}

TEST(EnginePoolsTest, RowsOfAnOpenSequenceAreLoadedTailAndAll) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF32)));
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4});
  const EnginePoolRef ref = pools.Register(engine);
  std::mt19937 random(4);
  const std::vector<uint32_t> tokens = Tokens(1, 2 * kPage + 5);
  const auto info = pools.under.OpenAndFill(tokens);
  ASSERT_TRUE(info.ok()) << info.status();
  const EngineSlotMap map = engine.Allocate(3, tokens.size(), &random);
  const auto submitted = pools.pools.Submit(pools.under.tenant, EngineJobKind::kLoad,
                                            {.pool = ref, .sequence = info->id, .maps = {map}});
  const EngineJobInfo job = pools.Await(submitted);
  ASSERT_EQ(job.state, EngineJobState::kDone) << job.status;
  EXPECT_EQ(job.progress.usable_tokens, tokens.size());
  engine.Expect(tokens, map, 3, tokens.size());
  EXPECT_EQ(engine.WrongBytes(), 0);
  // Fewer rows than it has, and more.
  const auto few = pools.pools.Submit(
      pools.under.tenant, EngineJobKind::kLoad,
      {.pool = ref, .sequence = info->id, .num_rows = 4, .maps = {{3, {map.blocks[0]}}}});
  EXPECT_EQ(pools.Await(few).progress.usable_tokens, 4);
  const auto many =
      pools.pools.Submit(pools.under.tenant, EngineJobKind::kLoad,
                         {.pool = ref, .sequence = info->id, .num_rows = 100, .maps = {map}});
  EXPECT_EQ(many.status().code(), absl::StatusCode::kInvalidArgument) << many.status();
  // A sequence whose rows were moved: what is loaded was turned.
  const Tenant stranger{"stranger", DeriveTenantSalt("secret", "stranger")};
  const auto theirs = pools.pools.Submit(stranger, EngineJobKind::kLoad,
                                         {.pool = ref, .sequence = info->id, .maps = {map}});
  EXPECT_EQ(theirs.status().code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(pools.pools.Get(stranger, job.id).status().code(), absl::StatusCode::kNotFound);
}

TEST(EnginePoolsTest, BadRequestsAreRefusedAndChangeNothing) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF32)));
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4, .num_blocks = 8});
  const EnginePoolRef ref = pools.Register(engine);
  const std::vector<uint32_t> tokens = Tokens(1, 8);
  struct Bad {
    absl::StatusCode code;
    std::string reason;
    std::string says;
    EnginePools::Request request;
  };
  const std::vector<EngineSlotMap> good = {{0, {1, 2}}};
  const std::vector<Bad> bad = {
      {absl::StatusCode::kInvalidArgument, "", "tokens is empty", {.pool = ref, .maps = good}},
      {absl::StatusCode::kInvalidArgument,
       "",
       "blocks[1] is 0",
       {.pool = ref, .tokens = tokens, .maps = {{0, {1, 0}}}}},
      {absl::StatusCode::kInvalidArgument,
       "",
       "blocks[0] is 8",
       {.pool = ref, .tokens = tokens, .maps = {{0, {8, 1}}}}},
      {absl::StatusCode::kInvalidArgument,
       "",
       "block 3 twice",
       {.pool = ref, .tokens = tokens, .maps = {{0, {3, 3}}}}},
      {absl::StatusCode::kInvalidArgument,
       "",
       "time_limit",
       {.pool = ref, .tokens = tokens, .maps = good, .time_limit = absl::Minutes(11)}},
      {absl::StatusCode::kNotFound,
       "ENGINE_POOL_NOT_FOUND",
       "\"other\"",
       {.pool = {"other", ref.generation}, .tokens = tokens, .maps = good}},
      {absl::StatusCode::kFailedPrecondition,
       "STALE_GENERATION",
       "generation",
       {.pool = {ref.name, ref.generation + 1}, .tokens = tokens, .maps = good}},
  };
  for (const EngineJobKind kind : {EngineJobKind::kLoad, EngineJobKind::kStore}) {
    for (const Bad& each : bad) {
      const absl::Status status =
          pools.pools.Submit(pools.under.tenant, kind, each.request).status();
      EXPECT_EQ(status.code(), each.code) << status;
      EXPECT_EQ(GetReason(status), each.reason);
      EXPECT_THAT(std::string(status.message()), HasSubstr(each.says));
    }
  }
  EXPECT_EQ(pools.pools.num_active_jobs(), 0);
  EXPECT_EQ(engine.WrongBytes(), 0);
  for (const std::string& id : {std::string(), std::string("x"), std::string("0000000000000000-1"),
                                std::string("0000000000000000-")}) {
    EXPECT_EQ(GetReason(pools.pools.Get(pools.under.tenant, id).status()), "ENGINE_JOB_NOT_FOUND");
    EXPECT_EQ(GetReason(pools.pools.Cancel(pools.under.tenant, id, {}).status()),
              "ENGINE_JOB_NOT_FOUND");
  }
  EXPECT_FALSE(pools.pools
                   .Register(pools.under.tenant, pools.under.host, engine.Registration("No Name"),
                             HostUnderTest::Soon())
                   .ok());
}

TEST(EnginePoolsTest, AStoreThatBeginsBehindWhatIsKnownFailsAndSaysSo) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF32)));
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4});
  const EnginePoolRef ref = pools.Register(engine);
  std::mt19937 random(5);
  const std::vector<uint32_t> tokens = Tokens(1, 4 * kPage);
  const EngineSlotMap map = engine.Allocate(0, tokens.size(), &random);
  engine.Compute(tokens, map, 0, tokens.size());
  EngineSlotMap behind{2 * kPage, {map.blocks.begin() + 4, map.blocks.end()}};
  const EngineJobInfo refused = pools.Store(ref, tokens, {behind});
  EXPECT_EQ(refused.state, EngineJobState::kFailed);
  EXPECT_EQ(GetReason(refused.status), "PREFIX_UNKNOWN") << refused.status;
  EXPECT_EQ(refused.progress.moved_pages, 0);
  // Chunk by chunk, as a chunked prefill does, it is fine.
  const std::vector<uint32_t> half(tokens.begin(), tokens.begin() + 2 * kPage);
  const EngineSlotMap front{0, {map.blocks.begin(), map.blocks.begin() + 4}};
  EXPECT_EQ(pools.Store(ref, half, {front}).progress.moved_pages, 2);
  const EngineJobInfo rest = pools.Store(ref, tokens, {behind});
  EXPECT_EQ(rest.state, EngineJobState::kDone) << rest.status;
  EXPECT_EQ(rest.progress.known_pages, 2);
  EXPECT_EQ(rest.progress.moved_pages, 2);
  // Less than a page: nothing to store, and no error.
  const EngineJobInfo little = pools.Store(ref, Tokens(1, 5), {{0, {1, 2}}});
  EXPECT_EQ(little.state, EngineJobState::kDone);
  EXPECT_EQ(little.progress.usable_tokens, 0);
}

TEST(EnginePoolsTest, AStoreSaysNothingAboutPrefillsAndRestoresNothing) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF32), 16));
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4});
  const EnginePoolRef ref = pools.Register(engine);
  std::mt19937 random(11);
  const std::vector<uint32_t> tokens = Tokens(1, 12 * kPage);
  const EngineSlotMap map = engine.Allocate(0, tokens.size(), &random);
  engine.Compute(tokens, map, 0, tokens.size());
  const std::vector<uint32_t> half(tokens.begin(), tokens.begin() + 6 * kPage);
  const EngineSlotMap front{0, {map.blocks.begin(), map.blocks.begin() + 12}};
  ASSERT_EQ(pools.Store(ref, half, {front}).progress.moved_pages, 6);
  // The copies came at once, which no prefill does: a restore would never seem worth its while.
  EXPECT_EQ(pools.under.host->Load().prefill_tokens_per_second, 0);
  pools.under.host->Quiesce();
  ASSERT_TRUE(pools.under.host->EvictPages(0, HostUnderTest::Soon()).ok());
  const EngineJobInfo rest = pools.Store(ref, tokens, {map});
  EXPECT_EQ(rest.state, EngineJobState::kDone) << rest.status;
  EXPECT_EQ(rest.progress.known_pages, 6);
  EXPECT_EQ(rest.progress.moved_pages, 6);
  pools.under.host->Quiesce();
  EXPECT_EQ(pools.under.host->Counters().pages_restored, 0);
  EXPECT_EQ(pools.under.host->Counters().tokens_reused, 0);
}

TEST(EnginePoolsTest, EnginesAtWorkAtOnceGetWhatIsTheirs) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF16), 8));
  const PageGeometry& geometry = pools.under.model->geometry();
  std::vector<std::thread> threads;
  for (uint32_t e = 0; e < 3; ++e) {
    threads.emplace_back([&, e] {
      std::mt19937 random(e);
      TestEngine engine(geometry, {.heads = e == 1 ? EngineHeads::kHnd : EngineHeads::kNhd,
                                   .is_block_major = e == 2,
                                   .block_tokens = 4 + e,
                                   .num_blocks = 64});
      EnginePoolRef ref = pools.Register(engine, absl::StrCat("e", e), e + 1);
      for (int step = 0; step < 15; ++step) {
        // Prompts that all three use.
        const uint32_t which = random() % 4;
        const std::vector<uint32_t> tokens =
            Concat(Tokens(1, 2 * kPage), Tokens(1000 * which, 1 + random() % (5 * kPage)));
        const EngineSlotMap map = engine.Allocate(0, tokens.size(), &random);
        if (random() % 2 == 0) {
          engine.Compute(tokens, map, 0, tokens.size());
          const EngineJobInfo job = pools.Store(ref, tokens, {map});
          EXPECT_EQ(job.state, EngineJobState::kDone) << job.status;
        } else {
          const EngineJobInfo job = pools.Load(ref, tokens, {map});
          EXPECT_EQ(job.state, EngineJobState::kDone) << job.status;
          engine.Expect(tokens, map, 0, job.progress.usable_tokens);
        }
        EXPECT_EQ(engine.WrongBytes(), 0) << "engine " << e << ", step " << step;
        engine.Free(map);
        if (step % 5 == 4) {
          const EnginePoolRef before = ref;
          ref = pools.Register(engine, before.name, e + 1);
          EXPECT_GT(ref.generation, before.generation);
        }
      }
      EXPECT_TRUE(pools.pools.Unregister(pools.under.tenant, ref, HostUnderTest::Soon()).ok());
    });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(pools.pools.num_pools(), 0);
  EXPECT_EQ(pools.under.host->Load().open_sequences, 0);
}

TEST(EnginePoolsTest, ALoadThatWaitsForFramesIsCancelledAtOnce) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF32), 4));
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4});
  const EnginePoolRef ref = pools.Register(engine);
  std::mt19937 random(6);
  const std::vector<uint32_t> tokens = Tokens(1, 2 * kPage);
  const EngineSlotMap map = engine.Allocate(0, tokens.size(), &random);
  engine.Compute(tokens, map, 0, tokens.size());
  ASSERT_EQ(pools.Store(ref, tokens, {map}).state, EngineJobState::kDone);
  pools.under.host->Quiesce();
  ModelHost::PinnedTable held = pools.HoldAllFrames(4);

  const EngineSlotMap wanted = engine.Allocate(0, tokens.size(), &random);
  const auto submitted = pools.Submit(EngineJobKind::kLoad, ref, tokens, {wanted});
  ASSERT_TRUE(submitted.ok()) << submitted.status();
  // It is in line for frames that nobody gives back.
  ASSERT_TRUE(Eventually([&] { return pools.under.host->Counters().acquire_waits > 0; }));
  EXPECT_EQ(pools.Now(*submitted).state, EngineJobState::kRunning);
  const auto cancelled =
      pools.pools.Cancel(pools.under.tenant, submitted->id, HostUnderTest::Soon());
  ASSERT_TRUE(cancelled.ok()) << cancelled.status();
  EXPECT_EQ(cancelled->state, EngineJobState::kCancelled) << cancelled->status;
  EXPECT_EQ(cancelled->progress.usable_tokens, 0);
  // A second time, and one that was done, are fine.
  EXPECT_EQ(pools.pools.Cancel(pools.under.tenant, submitted->id, {})->state,
            EngineJobState::kCancelled);
  EXPECT_EQ(engine.WrongBytes(), 0);
  EXPECT_EQ(pools.under.host->Load().open_sequences, 1);

  held.pages.reset();
  ASSERT_TRUE(pools.under.host->Close(pools.under.tenant, held.info.id, held.info.epoch).ok());
  const EngineJobInfo loaded = pools.Load(ref, tokens, {wanted});
  EXPECT_EQ(loaded.state, EngineJobState::kDone) << loaded.status;
  engine.Expect(tokens, wanted, 0, tokens.size());
  EXPECT_EQ(engine.WrongBytes(), 0);
}

TEST(EnginePoolsTest, AJobThatIsLateKeepsWhatItHas) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF32), 4));
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4});
  const EnginePoolRef ref = pools.Register(engine);
  std::mt19937 random(7);
  const std::vector<uint32_t> tokens = Tokens(1, 2 * kPage);
  const EngineSlotMap map = engine.Allocate(0, tokens.size(), &random);
  engine.Compute(tokens, map, 0, tokens.size());
  ModelHost::PinnedTable held = pools.HoldAllFrames(4);
  // A store that waits for frames until its time is up.
  auto submitted = pools.pools.Submit(
      pools.under.tenant, EngineJobKind::kStore,
      {.pool = ref, .tokens = tokens, .maps = {map}, .time_limit = absl::Milliseconds(50)});
  const EngineJobInfo late = pools.Await(submitted);
  EXPECT_EQ(late.state, EngineJobState::kFailed);
  EXPECT_TRUE(absl::IsResourceExhausted(late.status) || absl::IsDeadlineExceeded(late.status))
      << late.status;
  EXPECT_EQ(late.progress.usable_tokens, 0);
  const auto reuse =
      pools.under.host->LookupPrefix(pools.under.tenant, tokens, {}, {.allow_full_reuse = true});
  ASSERT_TRUE(reuse.ok());
  EXPECT_EQ(reuse->reused_tokens, 0);
}

TEST(EnginePoolsTest, ALostPageShortensTheLoad) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF32), 8));
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4});
  const EnginePoolRef ref = pools.Register(engine);
  std::mt19937 random(8);
  const std::vector<uint32_t> tokens = Tokens(1, 8 * kPage);
  const EngineSlotMap map = engine.Allocate(0, tokens.size(), &random);
  engine.Compute(tokens, map, 0, tokens.size());
  ASSERT_EQ(pools.Store(ref, tokens, {map}).state, EngineJobState::kDone);
  engine.Free(map);
  pools.under.host->Quiesce();
  ASSERT_TRUE(pools.under.host->EvictPages(0, HostUnderTest::Soon()).ok());
  // The sixth page's record is damaged in the store, which its look-up does not see.
  const Tenant& tenant = pools.under.tenant;
  const PrefixKey root = RootPrefixKey(tenant.salt, pools.under.model->identity(), kPage);
  const std::vector<PrefixKey> keys = PrefixKeysOf(root, tokens, kPage, {});
  const PageKey damaged =
      MakePageKey(keys[5], pools.under.model->geometry().group(0).fingerprint());
  ASSERT_TRUE(pools.under.own_store.FlipBit(damaged, 77));
  const EngineSlotMap wanted = engine.Allocate(0, tokens.size(), &random);
  const EngineJobInfo job = pools.Load(ref, tokens, {wanted});
  const uint64_t usable = job.progress.usable_tokens;
  EXPECT_EQ(usable, 5 * kPage) << job.status;
  EXPECT_EQ(job.state, EngineJobState::kFailed);
  EXPECT_EQ(GetReason(job.status), "PREFIX_LOST") << job.status;
  engine.Expect(tokens, wanted, 0, usable);
  EXPECT_EQ(engine.WrongBytes(), 0);
}

TEST(EnginePoolsTest, ARegistrationEndsTheOneBeforeWithItsJobs) {
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF32), 4));
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4});
  const EnginePoolRef before = pools.Register(engine);
  std::mt19937 random(9);
  const std::vector<uint32_t> tokens = Tokens(1, 2 * kPage);
  const EngineSlotMap map = engine.Allocate(0, tokens.size(), &random);
  engine.Compute(tokens, map, 0, tokens.size());
  ASSERT_EQ(pools.Store(before, tokens, {map}).state, EngineJobState::kDone);
  pools.under.host->Quiesce();
  const ModelHost::PinnedTable held = pools.HoldAllFrames(4);
  const auto running = pools.Submit(EngineJobKind::kLoad, before, tokens, {{0, {1, 2, 3, 4}}});
  ASSERT_TRUE(Eventually([&] { return pools.under.host->Counters().acquire_waits > 0; }));

  const EnginePoolRef after = pools.Register(engine, "e", 2);
  EXPECT_GT(after.generation, before.generation);
  EXPECT_EQ(pools.pools.num_active_jobs(), 0);
  EXPECT_EQ(pools.Now(*running).state, EngineJobState::kCancelled);
  EXPECT_THAT(std::string(pools.Now(*running).status.message()), HasSubstr("registered again"));
  EXPECT_EQ(GetReason(pools.Submit(EngineJobKind::kLoad, before, tokens, {map}).status()),
            "STALE_GENERATION");
  EXPECT_EQ(GetReason(pools.pools.Unregister(pools.under.tenant, before, HostUnderTest::Soon())),
            "STALE_GENERATION");
  // The client of the first registration leaves: the second is another's.
  pools.pools.DropClient(1);
  EXPECT_EQ(pools.pools.num_pools(), 1);
  const auto last = pools.Submit(EngineJobKind::kLoad, after, tokens, {{0, {1, 2, 3, 4}}});
  ASSERT_TRUE(last.ok()) << last.status();
  pools.pools.DropClient(2);
  EXPECT_EQ(pools.pools.num_pools(), 0);
  EXPECT_EQ(pools.Await(last).state, EngineJobState::kCancelled);
  EXPECT_EQ(GetReason(pools.Submit(EngineJobKind::kLoad, after, tokens, {map}).status()),
            "ENGINE_POOL_NOT_FOUND");
  EXPECT_TRUE(pools.pools.Unregister(pools.under.tenant, after, HostUnderTest::Soon()).ok());
  EXPECT_EQ(engine.WrongBytes(), 0);
  EXPECT_EQ(pools.metrics.Value("pagetide_engine_pools"), 0);
}

TEST(EnginePoolsTest, QueuesAreBoundedAndBlocksHaveOneWriter) {
  ManualExecutor executor;
  FakeClock clock;
  EnginePools::Options options;
  options.max_jobs = 4;
  options.max_jobs_per_tenant = 3;
  options.max_pools_per_tenant = 2;
  options.max_ended_per_tenant = 3;
  Pools pools(HostSetup(ModelOf(1, 2, DataType::kF32)), options, &executor, &clock);
  TestEngine engine(pools.under.model->geometry(), {.block_tokens = 4});
  const EnginePoolRef ref = pools.Register(engine);
  const EnginePoolRef other = pools.Register(engine, "other");
  const auto third = pools.pools.Register(pools.under.tenant, pools.under.host,
                                          engine.Registration("third"), HostUnderTest::Soon());
  EXPECT_EQ(GetReason(third.status()), "TOO_MANY_ENGINE_POOLS") << third.status();

  const std::vector<uint32_t> tokens = Tokens(1, 8);
  const auto submit = [&](EngineJobKind kind, const EnginePoolRef& pool,
                          std::vector<uint32_t> blocks) {
    return pools.Submit(kind, pool, tokens, {{0, std::move(blocks)}});
  };
  const auto load = submit(EngineJobKind::kLoad, ref, {1, 2});
  ASSERT_TRUE(load.ok()) << load.status();
  EXPECT_EQ(GetReason(submit(EngineJobKind::kStore, ref, {3, 2}).status()), "BLOCK_BUSY");
  EXPECT_EQ(GetReason(submit(EngineJobKind::kLoad, ref, {1, 3}).status()), "BLOCK_BUSY");
  ASSERT_TRUE(submit(EngineJobKind::kLoad, other, {1, 2}).ok());  // another pool's
  const auto store = submit(EngineJobKind::kStore, ref, {3, 4});
  ASSERT_TRUE(store.ok());
  const auto refused = submit(EngineJobKind::kStore, ref, {3, 4});  // may be read by two
  EXPECT_EQ(GetReason(refused.status()), "TOO_MANY_ENGINE_JOBS") << refused.status();
  EXPECT_EQ(pools.metrics.Value("pagetide_engine_jobs", {{"state", "queued"}}), 3);

  // One that waits in the queue ends at once, and its blocks are free.
  EXPECT_EQ(pools.pools.Cancel(pools.under.tenant, load->id, {})->state,
            EngineJobState::kCancelled);
  EXPECT_EQ(pools.pools.num_active_jobs(), 2);
  const auto second_reader = submit(EngineJobKind::kStore, ref, {3, 4});
  ASSERT_TRUE(second_reader.ok()) << second_reader.status();
  EXPECT_EQ(GetReason(submit(EngineJobKind::kLoad, ref, {4, 5}).status()), "TOO_MANY_ENGINE_JOBS");

  // Late before anybody ran them.
  clock.Advance(absl::Seconds(31));
  EXPECT_EQ(pools.Now(*store).state, EngineJobState::kFailed);
  EXPECT_TRUE(absl::IsDeadlineExceeded(pools.Now(*store).status));
  EXPECT_EQ(pools.pools.num_active_jobs(), 0);
  executor.RunAll();
  // The last three that ended are remembered, for ten minutes.
  EXPECT_FALSE(pools.pools.Get(pools.under.tenant, load->id).ok());
  EXPECT_TRUE(pools.pools.Get(pools.under.tenant, second_reader->id).ok());
  clock.Advance(absl::Minutes(10));
  EXPECT_FALSE(pools.pools.Get(pools.under.tenant, second_reader->id).ok());
  EXPECT_EQ(pools.metrics.Value("pagetide_engine_jobs_total",
                                {{"operation", "store"}, {"outcome", "DEADLINE_EXCEEDED"}}),
            2);
  executor.RunAll();
}

}  // namespace
}  // namespace pagetide
