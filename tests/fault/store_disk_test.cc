// A worker over a store whose disk is slow, fails to read, fills up or refuses writes: worker and
// store service behind real gRPC servers of this process, so that the disk can be hurt. Every
// answer is typed, every row that was acknowledged is right afterwards, new work goes on.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "kvstore/remote_page_store.h"
#include "kvstore/retrying_page_store.h"
#include "kvstore/rocksdb_page_store.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/metrics.h"
#include "rpc/server.h"
#include "rpc/status_mapping.h"
#include "services/page_store_service.h"
#include "services/worker_role.h"
#include "tests/fault/faulty_disk.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;
using testing::MakeTestModel;
using testing::RegisterTestModel;
using testing::TestContext;
using testing::TestTokens;
using testing::WorkerClient;

constexpr uint64_t kFrames = 16;

class StoreDiskTest : public ::testing::Test {
 protected:
  void SetUp() override {
    RocksdbPageStoreOptions store_options;
    store_options.dir = dir_ / "store";
    store_options.file_system = &disk_;
    store_options.index_env = disk_.env();
    store_options.min_free_bytes = kMiB;
    auto engine = RocksdbPageStore::Open(store_options);
    ASSERT_TRUE(engine.ok()) << engine.status();
    engine_ = *std::move(engine);
    ASSERT_TRUE(RegisterTestModel(*model_, engine_.get()).ok());
    service_ = std::make_unique<PageStoreServiceImpl>(engine_.get(), Clock::Real());
    auto server = RpcServer::Create({}, {service_.get()}, std::make_shared<PrometheusMetrics>());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    server_->OnDrain([this] { service_->EndStreams(); });
    // As pagetide-worker opens it (services/worker_config.cc).
    ChannelOptions channel;
    channel.own_connection = true;
    remote_ = std::make_unique<RemotePageStore>(MakeChannel(server_->addresses()[0], channel));
    retrying_ = std::make_unique<RetryingPageStore>(remote_.get(), RetryPolicy());
    WorkerRole::Options worker;
    worker.worker.pool_bytes = kFrames * model_->geometry().bytes_per_page_of_tokens();
    worker.worker.deployment_secret = "a secret of tests";
    auto role = WorkerRole::Start(worker, retrying_.get(), Clock::Real());
    ASSERT_TRUE(role.ok()) << role.status();
    role_ = *std::move(role);
    client_ = std::make_unique<WorkerClient>(role_->address(), model_);
    admin_ = v1::AdminService::NewStub(client_->channel());
  }
  void TearDown() override {
    disk_.set_stuck(false);
    client_.reset();
    admin_.reset();
    role_.reset();
    retrying_.reset();
    remote_.reset();
    if (server_ != nullptr) server_->Drain(absl::Seconds(10));
  }

  absl::StatusOr<v1::SequenceState> OpenAndFill(const std::vector<uint32_t>& tokens) {
    PT_ASSIGN_OR_RETURN(const v1::OpenSequenceResponse open, client_->Open(tokens));
    PT_RETURN_IF_ERROR(client_->WaitReady(open.state().sequence_id()).status());
    PT_ASSIGN_OR_RETURN(const v1::SequenceState state, client_->Get(open.state().sequence_id()));
    PT_ASSIGN_OR_RETURN(const v1::AppendTokensResponse appended,
                        client_->Append(state, tokens, tokens.size()));
    return appended.state();
  }

  // An open sequence of two full pages and a half, none of it in a frame.
  v1::SequenceState HoldSpilled(const std::vector<uint32_t>& tokens) {
    const auto state = OpenAndFill(tokens);
    EXPECT_TRUE(state.ok()) << state.status();
    EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_pages_written_through_total", 2));
    EXPECT_TRUE(EvictAll().ok());
    const auto now = client_->Get(state->sequence_id());
    EXPECT_EQ(now->resident_pages(), 0u);
    return *now;
  }
  absl::Status EvictAll() {
    TestContext context;
    v1::EvictPagesResponse evicted;
    return FromGrpcStatus(admin_->EvictPages(&context, {}, &evicted));
  }
  absl::Status Read(const v1::SequenceState& state, const std::vector<uint32_t>& tokens) {
    return client_->Verify(state.sequence_id(), tokens, 0, tokens.size()).status();
  }
  // ReadRows of everything with a deadline.
  absl::Status ReadWithin(const v1::SequenceState& state, absl::Duration deadline) {
    TestContext context(deadline);
    v1::ReadRowsRequest request;
    request.set_sequence_id(state.sequence_id());
    const auto reader = client_->sequences().ReadRows(&context, request);
    v1::ReadRowsResponse part;
    while (reader->Read(&part)) {
    }
    return FromGrpcStatus(reader->Finish());
  }

  testing::TempDir dir_;
  FaultyDisk disk_;
  const std::shared_ptr<const Model> model_ = std::make_shared<const Model>(MakeTestModel());
  std::unique_ptr<RocksdbPageStore> engine_;
  std::unique_ptr<PageStoreServiceImpl> service_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<RemotePageStore> remote_;
  std::unique_ptr<RetryingPageStore> retrying_;
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
  std::unique_ptr<v1::AdminService::Stub> admin_;
};

TEST_F(StoreDiskTest, AStuckDiskDelaysOnlyWhoReadsFromIt) {
  const auto tokens = TestTokens(1, 40);
  const v1::SequenceState state = HoldSpilled(tokens);
  const uint64_t reads = disk_.num_reads();
  disk_.set_stuck(true);
  // A caller that cannot wait is told so, and changes nothing …
  const absl::Status hasty = ReadWithin(state, absl::Milliseconds(50));
  EXPECT_EQ(hasty.code(), absl::StatusCode::kDeadlineExceeded) << hasty;
  EXPECT_EQ(client_->Get(state.sequence_id())->length(), 40u);
  EXPECT_EQ(client_->Get(state.sequence_id())->revision(), state.revision());
  // … new work does not wait for the disk …
  const auto other = TestTokens(2, 40);
  const auto fresh = OpenAndFill(other);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  EXPECT_TRUE(Read(*fresh, other).ok());
  // … and who waits gets the right bytes.
  disk_.set_stuck(false);
  EXPECT_TRUE(Read(state, tokens).ok());
  EXPECT_GE(disk_.num_reads(), reads + 3);
}

TEST_F(StoreDiskTest, ADiskThatCannotBeReadIsUnavailableAndLosesNothing) {
  const auto tokens = TestTokens(1, 40);
  const v1::SequenceState state = HoldSpilled(tokens);
  disk_.set_fail_reads(true);
  const absl::Status failed = ReadWithin(state, absl::Seconds(10));
  EXPECT_EQ(failed.code(), absl::StatusCode::kUnavailable) << failed;
  EXPECT_THAT(std::string(failed.message()), HasSubstr("EIO"));
  const auto now = client_->Get(state.sequence_id());
  ASSERT_TRUE(now.ok()) << now.status();
  EXPECT_EQ(now->SerializeAsString(), state.SerializeAsString());
  // A prompt over the same pages is computed instead: an error of the store is no error of the
  // open.
  const auto fresh = OpenAndFill(tokens);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  EXPECT_TRUE(Read(*fresh, tokens).ok());
  // Not taken for damage: nothing is quarantined, and the bytes are there when the disk is well.
  EXPECT_EQ(engine_->GetStats(MonotonicTime::InfiniteFuture())->pages_quarantined, 0u);
  disk_.set_fail_reads(false);
  EXPECT_TRUE(Read(state, tokens).ok());
}

TEST_F(StoreDiskTest, ADiskThatIsFullRefusesSpillsAndTakesThemAgainLater) {
  const auto tokens = TestTokens(1, 40);
  const v1::SequenceState state = HoldSpilled(tokens);
  disk_.set_full(true);
  const auto other = TestTokens(2, 64);
  const auto fresh = OpenAndFill(other);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  ASSERT_TRUE(client_->EventuallyStat("pagetide_worker_store_errors_total", 1));
  EXPECT_TRUE(Read(state, tokens).ok()) << "reads go on";
  EXPECT_TRUE(Read(*fresh, other).ok()) << "what cannot be spilled stays in its frames";
  disk_.set_full(false);
  // The worker pauses spilling for a moment after an error.
  EXPECT_TRUE(testing::Eventually([&] {
    EXPECT_TRUE(EvictAll().ok());
    return client_->Get(fresh->sequence_id())->resident_pages() == 0;
  }));
  EXPECT_TRUE(Read(*fresh, other).ok());
}

TEST_F(StoreDiskTest, AFailedSyncStopsWhatIsDurableAndNoRead) {
  const auto tokens = TestTokens(1, 40);
  const v1::SequenceState state = HoldSpilled(tokens);
  disk_.set_fail_syncs(true);
  const absl::Status barrier =
      remote_->Barrier(Durability::kLocal, Clock::Real()->MonotonicNow() + absl::Seconds(10));
  EXPECT_EQ(GetReason(barrier), "STORE_FAILED") << barrier;
  EXPECT_TRUE(Read(state, tokens).ok());
  const auto other = TestTokens(2, 64);
  const auto fresh = OpenAndFill(other);
  ASSERT_TRUE(fresh.ok()) << fresh.status();
  EXPECT_TRUE(Read(*fresh, other).ok());
}

}  // namespace
}  // namespace pagetide
