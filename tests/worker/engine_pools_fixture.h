// EnginePools over a ModelHost, and the calls an engine makes of them.
#ifndef PAGETIDE_TESTS_WORKER_ENGINE_POOLS_FIXTURE_H_
#define PAGETIDE_TESTS_WORKER_ENGINE_POOLS_FIXTURE_H_

#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "tests/worker/model_host_fixture.h"
#include "tests/worker/test_engine.h"
#include "worker/engine_pools.h"

namespace pagetide {

inline constexpr uint32_t kPage = 8;

inline std::shared_ptr<const Model> ModelOf(int num_groups, uint32_t kv_heads, DataType type,
                                            uint32_t v_dim = 32, uint32_t window_tokens = 0) {
  ModelSpec spec = TestModel(kPage, num_groups, false, window_tokens)->spec();
  for (LayerGroupSpec& group : spec.geometry.groups) {
    group.kv_heads = kv_heads;
    group.k_dim = 32;
    group.v_dim = v_dim;
    group.k_type = group.v_type = type;
  }
  return std::make_shared<const Model>(Model::Create(std::move(spec)).value());
}

inline HostUnderTest::Setup HostSetup(std::shared_ptr<const Model> model,
                                      uint32_t num_frames = 16) {
  return {.page_tokens = kPage, .num_frames = num_frames, .model = std::move(model)};
}

// Pools over one host.
class Pools {
 public:
  explicit Pools(const HostUnderTest::Setup& setup, EnginePools::Options options = {},
                 Executor* executor = nullptr, Clock* clock = Clock::Real())
      : under(setup),
        threads({.name = "jobs", .num_threads = 4, .max_queue = 64}),
        pools(options, executor != nullptr ? executor : &threads, clock, &metrics) {}

  EnginePoolRef Register(const TestEngine& engine, const std::string& name = "e",
                         uint64_t client_id = 1) {
    auto ref = pools.Register(under.tenant, under.host, engine.Registration(name, client_id),
                              HostUnderTest::Soon());
    EXPECT_TRUE(ref.ok()) << ref.status();
    return ref.value_or(EnginePoolRef());
  }
  absl::StatusOr<EngineJobInfo> Submit(EngineJobKind kind, const EnginePoolRef& pool,
                                       std::vector<uint32_t> tokens,
                                       std::vector<EngineSlotMap> maps) {
    return pools.Submit(under.tenant, kind,
                        {.pool = pool,
                         .tokens = std::move(tokens),
                         .maps = std::move(maps),
                         .allow_full_reuse = true});
  }
  // Waits for the end of a job.
  EngineJobInfo Await(const absl::StatusOr<EngineJobInfo>& submitted) {
    EXPECT_TRUE(submitted.ok()) << submitted.status();
    if (!submitted.ok()) return {};
    EngineJobInfo last;
    const absl::Status watched = pools.Watch(under.tenant, submitted->id, HostUnderTest::Soon(),
                                             [&](const EngineJobInfo& info, bool) {
                                               last = info;
                                               return true;
                                             });
    EXPECT_TRUE(watched.ok()) << watched;
    return last;
  }
  EngineJobInfo Load(const EnginePoolRef& pool, const std::vector<uint32_t>& tokens,
                     const std::vector<EngineSlotMap>& maps) {
    return Await(Submit(EngineJobKind::kLoad, pool, tokens, maps));
  }
  EngineJobInfo Store(const EnginePoolRef& pool, const std::vector<uint32_t>& tokens,
                      const std::vector<EngineSlotMap>& maps) {
    return Await(Submit(EngineJobKind::kStore, pool, tokens, maps));
  }
  EngineJobInfo Now(const EngineJobInfo& job) {
    return pools.Get(under.tenant, job.id).value_or(EngineJobInfo());
  }
  // Pins all frames of the pool until destroyed, with a sequence of other tokens.
  ModelHost::PinnedTable HoldAllFrames(uint32_t num_frames) {
    const std::vector<uint32_t> tokens = Tokens(900'000, num_frames * kPage);
    const auto info = under.OpenAndFill(tokens);
    EXPECT_TRUE(info.ok()) << info.status();
    auto table = under.host->PinTable(under.tenant, info->id, HostUnderTest::Soon());
    EXPECT_TRUE(table.ok()) << table.status();
    return *std::move(table);
  }

  HostUnderTest under;
  InMemoryMetrics metrics;
  ThreadPoolExecutor threads;
  EnginePools pools;
};

}  // namespace pagetide

#endif  // PAGETIDE_TESTS_WORKER_ENGINE_POOLS_FIXTURE_H_
