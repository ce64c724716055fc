// Pages of transfers from one worker's GPU to another's: two workers on loopback whose frames an
// emulation of NCCL addresses (tests/services/emulated_nccl.cc), and what happens when the link
// does not do what it should.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <atomic>
#include <functional>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "pagetide/v1/session.grpc.pb.h"
#include "services/tenant.h"
#include "tests/services/collective_fixture.h"
#include "tests/services/transfer_service_fixture.h"
#include "worker/cpu_device.h"

namespace pagetide::transfer_test {
namespace {

using ::testing::HasSubstr;

constexpr char kSecret[] = "a secret of tests";

// A device whose pools GPUs address and the host does not, as those of a GPU.
class AddressedDevice final : public Device {
 public:
  absl::string_view name() const override { return "addressed"; }
  absl::StatusOr<std::unique_ptr<DevicePool>> CreatePool(uint64_t size_bytes) override {
    auto pool = cpu_.CreatePool(size_bytes);
    if (!pool.ok()) return pool.status();
    return std::make_unique<Pool>(*std::move(pool));
  }

 private:
  class Pool final : public DevicePool, public DeviceAddressed {
   public:
    explicit Pool(std::unique_ptr<DevicePool> pool) : pool_(std::move(pool)) {}
    uint64_t size_bytes() const override { return pool_->size_bytes(); }
    std::byte* host_view() override { return nullptr; }
    void* device_address() override { return pool_->host_view(); }
    absl::Status Write(uint64_t offset, std::span<const std::byte> from) override {
      return pool_->Write(offset, from);
    }
    absl::Status Read(uint64_t offset, std::span<std::byte> to) override {
      return pool_->Read(offset, to);
    }
    absl::Status Copy(uint64_t to, uint64_t from, uint64_t num_bytes) override {
      return pool_->Copy(to, from, num_bytes);
    }
    absl::Status Zero(uint64_t offset, uint64_t num_bytes) override {
      return pool_->Zero(offset, num_bytes);
    }
    absl::Status Attend(const AttentionCall& call) override { return pool_->Attend(call); }
    bool CanShift(const GroupGeometry& group) const override { return pool_->CanShift(group); }
    absl::Status ReadShifted(const GroupGeometry& group, uint64_t offset, uint32_t num_rows,
                             int32_t delta, std::span<std::byte> to) override {
      return pool_->ReadShifted(group, offset, num_rows, delta, to);
    }
    absl::Status MoveRows(const RowMove& move) override { return pool_->MoveRows(move); }
    PoolExport exported() const override { return {}; }

   private:
    const std::unique_ptr<DevicePool> pool_;
  };
  CpuDevice cpu_;
};

// NCCL's emulation, with what a test does to it. `faults` outlives it.
struct Faults {
  std::atomic<bool> never_joins{false};
  std::atomic<int> damage_page{-1};  // the n-th that is received from now on
};
class FaultyLink final : public FastLink {
 public:
  FaultyLink(int gpu, Faults* faults) : link_(Emulated(gpu), Clock::Real()), faults_(faults) {}
  absl::string_view name() const override { return link_.name(); }
  absl::Status Check() override { return link_.Check(); }
  absl::StatusOr<std::string> MakeId() override { return link_.MakeId(); }
  absl::StatusOr<std::unique_ptr<Collective>> Join(uint32_t rank, uint32_t size,
                                                   absl::string_view id,
                                                   MonotonicTime deadline) override {
    if (faults_->never_joins) return absl::DeadlineExceededError("the test does not join");
    auto joined = link_.Join(rank, size, id, deadline);
    if (!joined.ok()) return joined.status();
    return std::make_unique<FaultyGroup>(*std::move(joined), faults_);
  }

 private:
  class FaultyGroup final : public Collective {
   public:
    FaultyGroup(std::unique_ptr<Collective> group, Faults* faults)
        : group_(std::move(group)), faults_(faults) {}
    absl::string_view name() const override { return group_->name(); }
    uint32_t rank() const override { return group_->rank(); }
    uint32_t size() const override { return group_->size(); }
    absl::Status Broadcast(uint32_t root, const CollectiveBuffer& buffer,
                           MonotonicTime deadline) override {
      return group_->Broadcast(root, buffer, deadline);
    }
    absl::Status Send(uint32_t to, const CollectiveBuffer& buffer,
                      MonotonicTime deadline) override {
      return group_->Send(to, buffer, deadline);
    }
    absl::Status Receive(uint32_t from, const CollectiveBuffer& buffer,
                         MonotonicTime deadline) override {
      const absl::Status status = group_->Receive(from, buffer, deadline);
      if (!status.ok() || faults_->damage_page-- != 0) return status;
      std::byte wrong{0};
      if (absl::Status read = buffer.Read(buffer.num_bytes / 2, {&wrong, 1}); !read.ok()) {
        return read;
      }
      wrong ^= std::byte{0x10};
      return buffer.Write(buffer.num_bytes / 2, {&wrong, 1});
    }
    void Abort() override { group_->Abort(); }

   private:
    const std::unique_ptr<Collective> group_;
    Faults* const faults_;
  };
  NcclLink link_;
  Faults* const faults_;
};

class FrameLinkTest : public TransferServiceTest {
 protected:
  void SetUp() override {
    setenv("EMULATED_NCCL_LEAVES_TOGETHER", "1", 1);
    ASSERT_TRUE(RegisterTestModel(*model_, &store_).ok());
  }
  // gpu -1: without a link.
  void StartLinked(const std::string& id, int gpu, WorkerUnderTest* worker,
                   uint64_t min_bytes = 1) {
    WorkerRole::Options options;
    options.worker.id = id;
    options.worker.pool_bytes = kFrames * model_->geometry().bytes_per_page_of_tokens();
    options.worker.deployment_secret = kSecret;
    options.worker.host.write_through = false;
    options.make_device = [] { return std::make_unique<AddressedDevice>(); };
    if (gpu >= 0) {
      options.make_link = [gpu, faults = &faults_] {
        return std::make_unique<FaultyLink>(gpu, faults);
      };
    }
    options.frame_link.min_bytes = min_bytes;
    options.frame_link.page_timeout = absl::Milliseconds(300);
    auto role = WorkerRole::Start(std::move(options), &store_, Clock::Real());
    ASSERT_TRUE(role.ok()) << role.status();
    worker->role = *std::move(role);
    worker->client = std::make_unique<WorkerClient>(worker->role->address(), model_);
    worker->transfers = v1::TransferService::NewStub(worker->client->channel());
  }
  static double Linked(WorkerUnderTest& worker) {
    return worker.client->Stat("pagetide_transfer_link_received_pages_total").value_or(0);
  }
  static double LinkSends(WorkerUnderTest& worker, const std::string& code) {
    return worker.client->Stat("pagetide_transfer_link_sends_total{code=\"" + code + "\"}")
        .value_or(0);
  }
  // The pages went by gRPC, and the sequence is there.
  void ExpectSentWithoutLink(v1::TransferKind kind) {
    const v1::SequenceState state = Fill(a_, tokens_);
    const auto sent = a_.Send(state, b_.role->address(), kind);
    ASSERT_TRUE(sent.ok()) << sent.status();
    EXPECT_EQ(sent->sent_pages(), 5u);
    EXPECT_EQ(sent->committed().received_pages(), 5u);
    ExpectGoesOn(b_, sent->committed().state(), tokens_);
  }

  Faults faults_;
  WorkerUnderTest c_;
};

TEST_F(FrameLinkTest, FullPagesGoFromGpuToGpuAndTheTailByGrpc) {
  StartLinked("a", 0, &a_);
  StartLinked("b", 1, &b_);
  for (const v1::TransferKind kind : {v1::TRANSFER_KIND_COPY, v1::TRANSFER_KIND_MOVE}) {
    const std::vector<uint32_t> tokens = TestTokens(kind, 70);
    const v1::SequenceState state = Fill(a_, tokens);
    const double before = Linked(b_);
    const auto sent = a_.Send(state, b_.role->address(), kind);
    ASSERT_TRUE(sent.ok()) << sent.status();
    EXPECT_EQ(sent->sent_pages(), 5u);
    EXPECT_EQ(sent->sent_bytes(), 5 * model_->geometry().bytes_per_page_of_tokens());
    EXPECT_EQ(Linked(b_), before + 4);
    ExpectGoesOn(b_, sent->committed().state(), tokens);
  }
  EXPECT_EQ(a_.client->Stat("pagetide_transfer_link_sent_pages_total").value_or(0), 8);
  EXPECT_EQ(LinkSends(a_, "OK"), 2);
  EXPECT_EQ(b_.client->Stat("pagetide_transfer_received_pages_total").value_or(0), 10);
}

TEST_F(FrameLinkTest, OnlyWhatTheTargetLacksGoesOverTheLink) {
  StartLinked("a", 0, &a_);
  StartLinked("b", 1, &b_);
  const v1::SequenceState state = Fill(a_, tokens_);
  Fill(b_, std::vector<uint32_t>(tokens_.begin(), tokens_.begin() + 32));
  const auto sent = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_PAGES);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(Linked(b_), 2);
  const auto opened = b_.client->Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_GE(opened->state().length(), 64u);
  EXPECT_GT(b_.client->Verify(opened->state().sequence_id(), tokens_, 0, 64).value_or(0), 0u);
}

TEST_F(FrameLinkTest, ATargetWithoutALinkGetsAllByGrpc) {
  StartLinked("a", 0, &a_);
  StartLinked("b", -1, &b_);
  ExpectSentWithoutLink(v1::TRANSFER_KIND_COPY);
  EXPECT_EQ(LinkSends(a_, "OK"), 0);
}

TEST_F(FrameLinkTest, FewBytesAreNotWorthACommunicator) {
  StartLinked("a", 0, &a_, 5 * model_->geometry().bytes_per_page_of_tokens());
  StartLinked("b", 1, &b_);
  ExpectSentWithoutLink(v1::TRANSFER_KIND_COPY);  // four of the five pages lie whole in frames
  EXPECT_EQ(Linked(b_), 0);
}

TEST_F(FrameLinkTest, TwoWorkersOnOneGpuFallBackToGrpc) {
  StartLinked("a", 3, &a_);
  StartLinked("b", 3, &b_);
  ExpectSentWithoutLink(v1::TRANSFER_KIND_MOVE);
  EXPECT_EQ(Linked(b_), 0);
  EXPECT_EQ(LinkSends(a_, "FAILED_PRECONDITION"), 1);
}

TEST_F(FrameLinkTest, AWrongByteOnTheLinkIsSeenAndThePagesComeByGrpc) {
  StartLinked("a", 0, &a_);
  StartLinked("b", 1, &b_);
  faults_.damage_page = 2;
  ExpectSentWithoutLink(v1::TRANSFER_KIND_MOVE);
  EXPECT_EQ(Linked(b_), 2);
  EXPECT_EQ(LinkSends(a_, "DATA_LOSS"), 1);
  EXPECT_EQ(b_.client->Stat("pagetide_transfer_damaged_pages_total").value_or(0), 1);
}

TEST_F(FrameLinkTest, AnEndThatDoesNotJoinCostsItsTimeAndNotTheTransfer) {
  StartLinked("a", 0, &a_);
  StartLinked("b", 1, &b_);
  faults_.never_joins = true;
  ExpectSentWithoutLink(v1::TRANSFER_KIND_MOVE);
  EXPECT_EQ(LinkSends(a_, "DEADLINE_EXCEEDED"), 1);
}

TEST_F(FrameLinkTest, ReceivePagesRefusesWhoProvesNothingAndWhatItDidNotAskFor) {
  StartLinked("a", 0, &a_);
  StartLinked("b", 1, &b_);
  StartLinked("c", -1, &c_);
  const TenantSalt salt = TenantSalts(kSecret).SaltOf("default");
  const auto receive = [&](WorkerUnderTest& worker,
                           const std::function<void(v1::ReceivePagesRequest&)>& change,
                           bool is_proven = true) {
    v1::ReceivePagesRequest request;
    request.set_transfer_id("none");
    request.set_link("nccl");
    request.mutable_join_timeout()->set_nanos(100'000'000);
    request.add_pages(0);
    change(request);
    if (is_proven) {
      request.set_proof(std::string(ProveLink(request.transfer_id(), request.link(), salt).view()));
    }
    TestContext context;
    v1::ReceivePagesResponse response;
    const auto reader = worker.transfers->ReceivePages(&context, request);
    while (reader->Read(&response)) EXPECT_FALSE(response.link_id().empty());
    return FromGrpcStatus(reader->Finish());
  };
  const auto nothing = [](v1::ReceivePagesRequest&) {};
  EXPECT_EQ(GetReason(receive(b_, nothing, /*is_proven=*/false)), "NOT_PROVEN");
  EXPECT_EQ(GetReason(receive(b_, nothing)), "TRANSFER_NOT_FOUND");
  EXPECT_EQ(GetReason(receive(c_, nothing)), "NO_LINK");
  EXPECT_EQ(GetReason(receive(b_, [](auto& r) { r.set_link("rdma"); })), "NO_LINK");
  for (const absl::Status& bad : {
           receive(b_, [](auto& r) { r.clear_join_timeout(); }),
           receive(b_, [](auto& r) { r.mutable_join_timeout()->set_seconds(11); }),
           receive(b_, [](auto& r) { r.mutable_join_timeout()->set_seconds(-1); }),
       }) {
    EXPECT_TRUE(absl::IsInvalidArgument(bad)) << bad;
  }
  // A transfer that is open: nobody joins, and it is as it was.
  const v1::SequenceState state = Fill(a_, tokens_);
  lossy_ = std::make_unique<LossyTarget>(b_.role->address());
  std::string transfer_id;
  lossy_->change_part = [&](v1::PushPagesRequest& part) {
    if (part.transfer_id().empty()) return;
    transfer_id = part.transfer_id();
  };
  lossy_->lose_push = true;
  lossy_->lose_abort = true;
  EXPECT_FALSE(a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_COPY).ok());
  ASSERT_FALSE(transfer_id.empty());
  const absl::Status alone = receive(b_, [&](auto& r) { r.set_transfer_id(transfer_id); });
  EXPECT_TRUE(absl::IsDeadlineExceeded(alone)) << alone;
}

TEST_F(FrameLinkTest, ATailThatACheckpointSealedGoesByGrpc) {
  StartLinked("a", 0, &a_);
  StartLinked("b", 1, &b_);
  // Frames that hold rows already.
  const std::vector<uint32_t> before = TestTokens(9, kFrames * 16);
  const v1::SequenceState full = Fill(a_, before);
  ASSERT_TRUE(a_.client->Close(full).ok());
  const v1::SequenceState state = Fill(a_, tokens_);
  const auto sessions = v1::SessionService::NewStub(a_.client->channel());
  TestContext context;
  v1::CreateCheckpointRequest request;
  request.mutable_sequence()->set_sequence_id(state.sequence_id());
  request.mutable_sequence()->set_epoch(state.epoch());
  request.set_tier(v1::TIER_DEVICE);
  v1::CreateCheckpointResponse response;
  const absl::Status made =
      FromGrpcStatus(sessions->CreateCheckpoint(&context, request, &response));
  ASSERT_TRUE(made.ok()) << made;
  const auto sent = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_COPY);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(Linked(b_), 4);
  EXPECT_EQ(LinkSends(a_, "OK"), 1);
  EXPECT_EQ(b_.client->Stat("pagetide_transfer_damaged_pages_total").value_or(0), 0);
  EXPECT_GT(b_.client->Verify(sent->committed().state().sequence_id(), tokens_, 0, tokens_.size())
                .value_or(0),
            0u);
}

}  // namespace
}  // namespace pagetide::transfer_test
