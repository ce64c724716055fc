#include "worker/worker.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <atomic>
#include <thread>
#include <vector>

#include "base/error_info.h"
#include "kvstore/memory_page_store.h"
#include "tests/support/timing.h"
#include "worker/cpu_device.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

Model MakeModel(const std::string& name) {
  ModelSpec spec;
  spec.name = name;
  spec.weights_digest = Sha256Of(name);
  spec.geometry.page_tokens = 4;
  LayerGroupSpec group;
  group.layers = {0};
  group.kv_heads = 1;
  group.k_dim = group.v_dim = 2;
  spec.geometry.groups.push_back(group);
  auto model = Model::Create(spec);
  EXPECT_TRUE(model.ok()) << model.status();
  return *std::move(model);
}

// Records of this test hold the model's name and nothing else.
absl::StatusOr<Model> ParseName(absl::string_view record) {
  return MakeModel(std::string(record));
}

class WorkerTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kPageBytes = 4 * 2 * 2 * 2;  // tokens × (K, V) × elements × f16

  std::unique_ptr<Worker> Make(uint64_t pool_bytes, uint64_t model_pool_bytes) {
    Worker::Options options;
    options.incarnation = 5;
    options.pool_bytes = pool_bytes;
    options.model_pool_bytes = model_pool_bytes;
    auto worker = Worker::Create(options, {.device = &device_,
                                           .store = &store_,
                                           .io = &io_,
                                           .clock = Clock::Real(),
                                           .metrics = &metrics_,
                                           .parse_model = ParseName,
                                           .on_host = [this](ModelHost&) { ++hosts_made_; }});
    EXPECT_TRUE(worker.ok()) << worker.status();
    return *std::move(worker);
  }
  std::string Register(const std::string& name) {
    const std::string digest = MakeModel(name).digest().ToHex();
    EXPECT_TRUE(store_.CompareAndSetRecord("model", digest, 0, name, Soon()).ok());
    return digest;
  }
  static MonotonicTime Soon() { return Clock::Real()->MonotonicNow() + absl::Seconds(60); }

  CpuDevice device_;
  MemoryPageStore store_;
  ThreadPoolExecutor io_{{.name = "io"}};
  InMemoryMetrics metrics_;
  std::atomic<int> hosts_made_{0};  // a count, read after the joins
};

TEST_F(WorkerTest, LoadsARegisteredModelOnceThoughManyAsk) {
  auto worker = Make(64 * kPageBytes, 0);
  const std::string digest = Register("a");
  std::vector<std::thread> threads;
  std::vector<ModelHost*> hosts(8);
  for (int i = 0; i < 8; ++i) {
    threads.emplace_back([&, i] { hosts[i] = worker->HostOfModel(digest, Soon()).value(); });
  }
  for (std::thread& thread : threads) thread.join();
  EXPECT_EQ(hosts_made_, 1);
  for (ModelHost* host : hosts) EXPECT_EQ(host, hosts[0]);
  EXPECT_EQ(worker->FindHost(digest), hosts[0]);
}

TEST_F(WorkerTest, AnUnknownModelCanBeRegisteredLater) {
  auto worker = Make(64 * kPageBytes, 0);
  const std::string digest = MakeModel("late").digest().ToHex();
  const auto unknown = worker->HostOfModel(digest, Soon());
  EXPECT_EQ(GetReason(unknown.status()), "MODEL_NOT_FOUND");
  Register("late");
  EXPECT_TRUE(worker->HostOfModel(digest, Soon()).ok());
}

TEST_F(WorkerTest, ARecordOfAnotherModelIsDataLoss) {
  auto worker = Make(64 * kPageBytes, 0);
  const std::string digest = MakeModel("a").digest().ToHex();
  ASSERT_TRUE(store_.CompareAndSetRecord("model", digest, 0, "b", Soon()).ok());
  EXPECT_EQ(worker->HostOfModel(digest, Soon()).status().code(), absl::StatusCode::kDataLoss);
}

TEST_F(WorkerTest, CarvesTheBudgetAndSaysWhatIsLeft) {
  auto worker = Make(10 * kPageBytes, 4 * kPageBytes);
  EXPECT_TRUE(worker->HostOfModel(Register("a"), Soon()).ok());
  EXPECT_TRUE(worker->HostOfModel(Register("b"), Soon()).ok());
  const auto third = worker->HostOfModel(Register("c"), Soon());
  EXPECT_EQ(third.status().code(), absl::StatusCode::kResourceExhausted);
  EXPECT_THAT(std::string(third.status().message()), HasSubstr("needs 128 bytes, 64 of"));
}

TEST_F(WorkerTest, SequencesOfTwoModelsNeverShareAnId) {
  auto worker = Make(10 * kPageBytes, 4 * kPageBytes);
  ModelHost* a = worker->HostOfModel(Register("a"), Soon()).value();
  ModelHost* b = worker->HostOfModel(Register("b"), Soon()).value();
  const Tenant tenant = worker->TenantNamed("default");
  for (int i = 0; i < 3; ++i) {
    const SequenceId in_a = a->Open(tenant, {}, {}, {}).value().info.id;
    const SequenceId in_b = b->Open(tenant, {}, {}, {}).value().info.id;
    EXPECT_NE(in_a, in_b);
    EXPECT_EQ(worker->HostOfSequence(in_a).value(), a);
    EXPECT_EQ(worker->HostOfSequence(in_b).value(), b);
  }
  EXPECT_EQ(GetReason(worker->HostOfSequence({5, 999}).status()), "SEQUENCE_NOT_FOUND");
}

// Two hosts number their pages alike; their private pages must still have different names.
TEST_F(WorkerTest, SpilledTailsOfTwoModelsDoNotMeetInTheStore) {
  constexpr int kSequences = 12;  // of one tail page each, through 4 frames a model
  auto worker = Make(8 * kPageBytes, 4 * kPageBytes);
  ModelHost* hosts[2] = {worker->HostOfModel(Register("a"), Soon()).value(),
                         worker->HostOfModel(Register("b"), Soon()).value()};
  const Tenant tenant = worker->TenantNamed("default");
  const auto byte_of = [](int model, int sequence) { return std::byte(100 * model + sequence); };
  std::vector<SequenceId> ids[2];
  for (int i = 0; i < kSequences; ++i) {
    for (int m = 0; m < 2; ++m) {
      const SequenceInfo info = hosts[m]->Open(tenant, {}, {}, {}).value().info;
      const std::vector<uint32_t> tokens = {static_cast<uint32_t>(i), 7};
      const SequenceHandle handle{.id = info.id, .epoch = info.epoch};
      const auto slot = hosts[m]->BeginAppend(tenant, handle, "x", 0, tokens, {}, false, Soon());
      ASSERT_TRUE(slot.ok()) << slot.status();
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        const absl::Status written =
            hosts[m]->WriteRows(tenant, info.id, slot->pending_id, RowRun{0, 0, kind, 0, 2}, 8,
                                [&](uint64_t, std::span<std::byte> dst) {
                                  std::fill(dst.begin(), dst.end(), byte_of(m, i));
                                });
        ASSERT_TRUE(written.ok()) << written;
      }
      const auto committed = hosts[m]->Commit(tenant, handle, slot->pending_id, {});
      ASSERT_TRUE(committed.ok()) << committed.status();
      ids[m].push_back(info.id);
    }
  }
  for (int i = 0; i < kSequences; ++i) {
    for (int m = 0; m < 2; ++m) {
      const auto rows = hosts[m]->PinRows(tenant, ids[m][i], 0, 0, 0, Soon());
      ASSERT_TRUE(rows.ok()) << rows.status();
      for (const ModelHost::PinnedRows::Run& run : (*rows)->Runs(0, RowKind::kK)) {
        std::vector<std::byte> bytes(run.num_bytes);
        ASSERT_TRUE(hosts[m]->pool().Read(run.offset, bytes).ok());
        for (std::byte b : bytes) ASSERT_EQ(b, byte_of(m, i)) << "model " << m << " tail " << i;
      }
    }
  }
  EXPECT_GT(hosts[0]->Counters().pages_restored, 0);
}

TEST_F(WorkerTest, OptionsNameWhatIsWrong) {
  Worker::Options options;
  EXPECT_TRUE(options.Validate().ok());
  options.pool_bytes = 0;
  EXPECT_THAT(std::string(options.Validate().message()), HasSubstr("pool_bytes is 0"));
  options = {};
  options.id = "UPPER";
  EXPECT_EQ(options.Validate().code(), absl::StatusCode::kInvalidArgument);
  options = {};
  options.host.spill_low_watermark = 2;
  EXPECT_EQ(options.Validate().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(WorkerTest, TheTickerFeedsTheMetricsAndEndsLeases) {
  auto worker = Make(64 * kPageBytes, 0);
  ASSERT_TRUE(worker->HostOfModel(Register("a"), Soon()).ok());
  std::atomic<bool> ended{false};  // set by the ticker, polled below
  ASSERT_TRUE(worker->leases().Add({}, absl::Milliseconds(20), [&] { ended = true; }).ok());
  worker->Start();
  EXPECT_TRUE(testing::Eventually([&] {
    return ended && metrics_.Sum("pagetide_worker_models") == 1 &&
           metrics_.Sum("pagetide_worker_frames") == 64 + 64;  // all and free
  })) << ended
      << " " << metrics_.Sum("pagetide_worker_models") << " "
      << metrics_.Sum("pagetide_worker_frames");
}

TEST_F(WorkerTest, AnIdleSequenceThatWasResumedAtOnceIsNotToldClosed) {
  Mutex mu;
  std::vector<std::string> events;
  ModelHost* host = nullptr;
  Worker::Options options;
  options.incarnation = 5;
  options.pool_bytes = 64 * kPageBytes;
  options.host.sequence_idle = absl::Milliseconds(50);
  Worker::Ports ports{.device = &device_,
                      .store = &store_,
                      .io = &io_,
                      .clock = Clock::Real(),
                      .metrics = &metrics_,
                      .parse_model = ParseName};
  const Tenant tenant{"default", DeriveTenantSalt("secret", "default")};
  std::unique_ptr<StateSnapshot> saved;
  ports.on_sequence_idle = [&](const IdleSequence& idle) {
    MutexLock lock(&mu);
    events.push_back("idle");
    if (events.size() > 1) return;
    // A call of the client that came just then.
    const auto resumed = host->OpenSaved(tenant, saved->state(), {}, std::nullopt,
                                         SequenceIdentity{idle.id, idle.epoch + 2});
    EXPECT_TRUE(resumed.ok()) << resumed.status();
  };
  ports.on_sequence_closed = [&](SequenceId) {
    MutexLock lock(&mu);
    events.push_back("closed");
  };
  auto worker = Worker::Create(options, ports);
  ASSERT_TRUE(worker.ok()) << worker.status();
  host = (*worker)->HostOfModel(Register("a"), Soon()).value();
  const auto opened = host->Open(tenant, {}, {}, {});
  ASSERT_TRUE(opened.ok()) << opened.status();
  auto snapshot = host->Snapshot(tenant, {opened->info.id, opened->info.epoch}, std::nullopt);
  ASSERT_TRUE(snapshot.ok()) << snapshot.status();
  saved = *std::move(snapshot);
  (*worker)->Start();
  EXPECT_TRUE(testing::Eventually([&] {
    MutexLock lock(&mu);
    return !events.empty() && events.back() == "closed" &&
           std::count(events.begin(), events.end(), "idle") == 2;
  }));
  (*worker)->Stop();
  EXPECT_THAT(events, ::testing::ElementsAre("idle", "idle", "closed"));
  saved.reset();  // before its host
}

}  // namespace
}  // namespace pagetide
