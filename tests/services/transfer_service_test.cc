// TransferService between two workers on loopback: what goes over the wire, what is refused, and
// moves whose answers are lost on the way.
#include <gmock/gmock.h>
#include <grpcpp/server_builder.h>
#include <gtest/gtest.h>

#include <atomic>
#include <chrono>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/transfer.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

constexpr uint64_t kFrames = 16;

// Stands between two workers: forwards what the source says, and loses or changes what it is told
// to.
class LossyTarget final : public v1::TransferService::Service {
 public:
  explicit LossyTarget(const std::string& target)
      : stub_(v1::TransferService::NewStub(MakeChannel(target))) {
    grpc::ServerBuilder builder;
    builder.SetMaxReceiveMessageSize(kMaxMessageBytes);
    builder.AddListeningPort("127.0.0.1:0", grpc::InsecureServerCredentials(), &port_);
    builder.RegisterService(this);
    server_ = builder.BuildAndStart();
  }
  ~LossyTarget() override { server_->Shutdown(std::chrono::system_clock::now()); }
  std::string address() const { return absl::StrCat("127.0.0.1:", port_); }

  grpc::Status ReserveTransfer(grpc::ServerContext*, const v1::ReserveTransferRequest* request,
                               v1::ReserveTransferResponse* response) override {
    TestContext context;
    v1::ReserveTransferRequest changed = *request;
    if (change_reserve) change_reserve(changed);
    return stub_->ReserveTransfer(&context, changed, response);
  }
  grpc::Status PushPages(grpc::ServerContext*, grpc::ServerReader<v1::PushPagesRequest>* reader,
                         v1::PushPagesResponse* response) override {
    TestContext context;
    const auto writer = stub_->PushPages(&context, response);
    v1::PushPagesRequest part;
    while (reader->Read(&part)) {
      if (change_part) change_part(part);
      if (!writer->Write(part)) break;
    }
    if (lose_push) {
      context.TryCancel();
      writer->Finish();
      return Lost();
    }
    writer->WritesDone();
    return writer->Finish();
  }
  grpc::Status CommitTransfer(grpc::ServerContext*, const v1::CommitTransferRequest* request,
                              v1::CommitTransferResponse* response) override {
    if (lose_commit) return Lost();
    TestContext context;
    const grpc::Status status = stub_->CommitTransfer(&context, *request, response);
    return lose_answer ? Lost() : status;
  }
  grpc::Status AbortTransfer(grpc::ServerContext*, const v1::AbortTransferRequest* request,
                             v1::AbortTransferResponse* response) override {
    if (lose_abort) return Lost();
    TestContext context;
    return stub_->AbortTransfer(&context, *request, response);
  }

  // Set while no call runs.
  std::function<void(v1::ReserveTransferRequest&)> change_reserve;
  std::function<void(v1::PushPagesRequest&)> change_part;
  std::atomic<bool> lose_push{false};
  std::atomic<bool> lose_commit{false};  // on its way there
  std::atomic<bool> lose_answer{false};  // of a commit, on its way back
  std::atomic<bool> lose_abort{false};

 private:
  static grpc::Status Lost() { return {grpc::StatusCode::UNAVAILABLE, "lost on the way"}; }

  const std::unique_ptr<v1::TransferService::Stub> stub_;
  int port_ = 0;
  std::unique_ptr<grpc::Server> server_;
};

struct WorkerUnderTest {
  std::unique_ptr<WorkerRole> role;
  std::unique_ptr<WorkerClient> client;
  std::unique_ptr<v1::TransferService::Stub> transfers;

  uint64_t FreeFrames() {
    TestContext context;
    v1::GetMemoryBreakdownResponse response;
    EXPECT_TRUE(client->admin().GetMemoryBreakdown(&context, {}, &response).ok());
    uint64_t free = 0;
    for (const auto& pool : response.pools()) free += pool.free_frames();
    return free;
  }
  absl::StatusOr<v1::SendSequenceResponse> Send(const v1::SequenceState& state,
                                                const std::string& address, v1::TransferKind kind,
                                                const std::string& request_id = "") {
    TestContext context;
    v1::SendSequenceRequest request;
    request.set_request_id(request_id);
    request.mutable_sequence()->set_sequence_id(state.sequence_id());
    request.mutable_sequence()->set_epoch(state.epoch());
    request.set_target_address(address);
    request.set_kind(kind);
    request.mutable_ttl()->set_seconds(1);
    v1::SendSequenceResponse response;
    const absl::Status status =
        FromGrpcStatus(transfers->SendSequence(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }
  std::string ReasonOfGet(const v1::SequenceState& state) {
    return GetReason(client->Get(state.sequence_id()).status());
  }
};

class TransferServiceTest : public ::testing::Test {
 protected:
  void SetUp() override {
    ASSERT_TRUE(RegisterTestModel(*model_, &store_).ok());
    Start("a", "a secret of tests", &a_);
    Start("b", "a secret of tests", &b_);
    lossy_ = std::make_unique<LossyTarget>(b_.role->address());
  }
  void Start(const std::string& id, const std::string& secret, WorkerUnderTest* worker) {
    Start(id, secret, worker, &store_);
  }
  void Start(const std::string& id, const std::string& secret, WorkerUnderTest* worker,
             PageStore* store) {
    WorkerRole::Options options;
    options.worker.id = id;
    options.worker.pool_bytes = kFrames * model_->geometry().bytes_per_page_of_tokens();
    options.worker.deployment_secret = secret;
    options.worker.host.write_through = false;
    auto role = WorkerRole::Start(options, store, Clock::Real());
    ASSERT_TRUE(role.ok()) << role.status();
    worker->role = *std::move(role);
    if (store == nullptr) {
      const auto host = worker->role->worker().AddModel(
          MakeTestModel(), Clock::Real()->MonotonicNow() + absl::Seconds(30));
      ASSERT_TRUE(host.ok()) << host.status();
    }
    worker->client = std::make_unique<WorkerClient>(worker->role->address(), model_);
    worker->transfers = v1::TransferService::NewStub(worker->client->channel());
  }
  v1::SequenceState Fill(WorkerUnderTest& worker, const std::vector<uint32_t>& tokens) {
    auto opened = worker.client->Open(tokens);
    EXPECT_TRUE(opened.ok()) << opened.status();
    auto appended = worker.client->Append(opened->state(), tokens, tokens.size());
    EXPECT_TRUE(appended.ok()) << appended.status();
    return appended.ok() ? appended->state() : v1::SequenceState();
  }
  // It can be read and appended to, by this worker's client.
  void ExpectGoesOn(WorkerUnderTest& worker, const v1::SequenceState& state,
                    std::vector<uint32_t> tokens) {
    EXPECT_GT(worker.client->Verify(state.sequence_id(), tokens, 0, tokens.size()).value_or(0), 0u);
    const auto more = TestTokens(77, 9);
    tokens.insert(tokens.end(), more.begin(), more.end());
    const auto appended = worker.client->Append(state, tokens, tokens.size());
    ASSERT_TRUE(appended.ok()) << appended.status();
    EXPECT_GT(worker.client->Verify(state.sequence_id(), tokens, 0, tokens.size()).value_or(0), 0u);
  }

  MemoryPageStore store_;
  std::shared_ptr<const Model> model_ = std::make_shared<const Model>(MakeTestModel());
  WorkerUnderTest a_, b_;
  std::unique_ptr<LossyTarget> lossy_;
  const std::vector<uint32_t> tokens_ = TestTokens(1, 70);
};

TEST_F(TransferServiceTest, ACopyMovesWhatTheTargetLacks) {
  const uint64_t page_bytes = model_->geometry().bytes_per_page_of_tokens();
  const v1::SequenceState state = Fill(a_, tokens_);
  Fill(b_, std::vector<uint32_t>(tokens_.begin(), tokens_.begin() + 48));
  auto sent = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_COPY, "copy-1");
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->sent_pages(), 2u);
  EXPECT_EQ(sent->sent_bytes(), 2 * page_bytes);
  EXPECT_EQ(sent->committed().pages(), 5u);
  EXPECT_EQ(sent->committed().received_bytes(), 2 * page_bytes);
  EXPECT_EQ(sent->committed().state().worker_id(), "b");
  ExpectGoesOn(b_, sent->committed().state(), tokens_);
  ExpectGoesOn(a_, state, tokens_);
  // A repeat makes no other one.
  const auto again = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_COPY, "copy-1");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->SerializeAsString(), sent->SerializeAsString());
  EXPECT_TRUE(b_.client->EventuallyStat("pagetide_worker_open_sequences", 2));
  EXPECT_EQ(b_.client->Stat("pagetide_transfer_received_bytes_total").value_or(0), 2 * page_bytes);
  EXPECT_EQ(a_.client->Stat("pagetide_transfer_sent_bytes_total").value_or(0), 2 * page_bytes);
  EXPECT_EQ(b_.client->Stat("pagetide_transfer_known_pages_total").value_or(0), 3);
}

TEST_F(TransferServiceTest, AMoveLeavesNothingBehind) {
  const v1::SequenceState state = Fill(a_, tokens_);
  auto sent = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_MOVE, "move-1");
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->committed().state().sequence_id(), state.sequence_id());
  EXPECT_EQ(sent->committed().state().epoch(), state.epoch() + 1);
  EXPECT_EQ(a_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  ExpectGoesOn(b_, sent->committed().state(), tokens_);
  const auto again = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_MOVE, "move-1");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->SerializeAsString(), sent->SerializeAsString());
  // And back, under the epoch after it.
  v1::SequenceState there = *b_.client->Get(state.sequence_id());
  auto back = b_.Send(there, a_.role->address(), v1::TRANSFER_KIND_MOVE);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->committed().state().epoch(), state.epoch() + 2);
  EXPECT_EQ(b_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
}

TEST_F(TransferServiceTest, PagesAloneAreThereForPrompts) {
  const v1::SequenceState state = Fill(a_, tokens_);
  auto sent = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_PAGES);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_FALSE(sent->committed().has_state());
  EXPECT_EQ(sent->committed().pages(), 5u);
  EXPECT_EQ(b_.client->Stat("pagetide_worker_open_sequences").value_or(1), 0);
  const auto opened = b_.client->Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reuse().device_tokens(), 64u);
  EXPECT_GT(b_.client->Verify(opened->state().sequence_id(), tokens_, 0, 64).value_or(0), 0u);
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, ASequenceWhoseOwnerTheStoreNamesIsCopiedAndNotMoved) {
  const v1::SequenceState state = Fill(a_, tokens_);
  TestContext context;
  v1::ParkSequenceRequest park;
  park.mutable_sequence()->set_sequence_id(state.sequence_id());
  park.mutable_sequence()->set_epoch(state.epoch());
  park.set_keep_open(true);
  v1::ParkSequenceResponse parked;
  ASSERT_TRUE(a_.client->sequences().ParkSequence(&context, park, &parked).ok());
  const auto refused = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_MOVE);
  EXPECT_EQ(GetReason(refused.status()), "SEQUENCE_IS_PARKED") << refused.status();
  EXPECT_EQ(b_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  const auto copied = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_COPY);
  ASSERT_TRUE(copied.ok()) << copied.status();
  ExpectGoesOn(b_, copied->committed().state(), tokens_);
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, AFlippedByteIsRefusedAndNothingChanges) {
  const v1::SequenceState state = Fill(a_, tokens_);
  const uint64_t free = b_.FreeFrames();
  lossy_->change_part = [](v1::PushPagesRequest& part) {
    if (part.page() == 3) (*part.mutable_data())[1000] ^= 1;
  };
  const auto refused = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE);
  EXPECT_TRUE(absl::IsDataLoss(refused.status())) << refused.status();
  EXPECT_EQ(GetReason(refused.status()), "PAGE_DAMAGED");
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr(lossy_->address()));
  EXPECT_EQ(b_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  EXPECT_EQ(b_.FreeFrames(), std::max(free, kFrames));  // aborted at once
  EXPECT_EQ(b_.client->Stat("pagetide_transfer_damaged_pages_total").value_or(0), 1);
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, WhatASourceLeavesExpires) {
  const v1::SequenceState state = Fill(a_, tokens_);
  lossy_->lose_push = true;
  lossy_->lose_abort = true;
  const auto refused = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE);
  EXPECT_TRUE(absl::IsUnavailable(refused.status())) << refused.status();
  ExpectGoesOn(a_, state, tokens_);
  EXPECT_TRUE(b_.client->EventuallyStat("pagetide_transfer_ended_total", 1));
  EXPECT_TRUE(Eventually([&] { return b_.FreeFrames() == kFrames; }));
}

TEST_F(TransferServiceTest, AMoveWhoseAnswerIsLostIsAskedFor) {
  const v1::SequenceState state = Fill(a_, tokens_);
  lossy_->lose_answer = true;
  const auto sent = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->committed().state().epoch(), state.epoch() + 1);
  EXPECT_EQ(a_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  ExpectGoesOn(b_, sent->committed().state(), tokens_);
}

TEST_F(TransferServiceTest, AMoveThatNeverArrivedGoesOnHere) {
  const v1::SequenceState state = Fill(a_, tokens_);
  lossy_->lose_commit = true;
  const auto refused = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE);
  EXPECT_TRUE(absl::IsUnavailable(refused.status())) << refused.status();
  EXPECT_EQ(b_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  ExpectGoesOn(a_, state, tokens_);
  EXPECT_EQ(b_.FreeFrames(), kFrames);
}

TEST_F(TransferServiceTest, AMoveInDoubtStaysUntilItIsKnown) {
  const v1::SequenceState state = Fill(a_, tokens_);
  for (const bool was_committed : {false, true}) {
    SCOPED_TRACE(was_committed);
    lossy_->lose_answer = true;
    lossy_->lose_commit = !was_committed;
    lossy_->lose_abort = true;
    const std::string request_id = absl::StrCat("move-", was_committed);
    const auto unknown = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE, request_id);
    EXPECT_EQ(GetReason(unknown.status()), "TRANSFER_UNRESOLVED") << unknown.status();
    // Neither changed nor gone, and no other move begins.
    std::vector<uint32_t> longer = tokens_;
    longer.resize(80, 5);
    const auto refused = a_.client->Append(state, longer, longer.size());
    EXPECT_EQ(GetReason(refused.status()), error_reason::kSequenceMoved) << refused.status();
    EXPECT_GT(a_.client->Verify(state.sequence_id(), tokens_, 0, tokens_.size()).value_or(0), 0u);
    EXPECT_EQ(GetReason(a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_MOVE).status()),
              "TRANSFER_UNRESOLVED");
    lossy_->lose_abort = false;
    if (!was_committed) {
      // The worker asks by itself.
      EXPECT_TRUE(Eventually([&] {
        return a_.client->Append(state, tokens_, tokens_.size()).ok() ||
               a_.client->Rewind(state, 70).ok();
      }));
      continue;
    }
    absl::StatusOr<v1::SendSequenceResponse> sent;
    EXPECT_TRUE(Eventually([&] {
      sent = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE, request_id);
      return sent.ok();
    })) << sent.status();
    EXPECT_EQ(sent->committed().state().epoch(), state.epoch() + 1);
    EXPECT_EQ(a_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
    ExpectGoesOn(b_, sent->committed().state(), tokens_);
  }
}

TEST_F(TransferServiceTest, OnlyAWorkerOfTheDeploymentIsBelieved) {
  const v1::SequenceState state = Fill(a_, tokens_);
  WorkerUnderTest stranger;
  Start("c", "another secret of tests", &stranger);
  const auto refused = a_.Send(state, stranger.role->address(), v1::TRANSFER_KIND_COPY);
  EXPECT_TRUE(absl::IsPermissionDenied(refused.status())) << refused.status();
  EXPECT_EQ(GetReason(refused.status()), "NOT_PROVEN");
  // Nor is anything that was changed on the way.
  const auto denied = [&](std::function<void(v1::ReserveTransferRequest&)> change) {
    lossy_->change_reserve = std::move(change);
    return a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE).status();
  };
  using Request = v1::ReserveTransferRequest;
  for (const absl::Status& status : {denied([](Request& r) { r.set_epoch(9); }),
                                     denied([](Request& r) { r.set_kind(v1::TRANSFER_KIND_COPY); }),
                                     denied([](Request& r) { r.mutable_pages(1)->set_rows(3); }),
                                     denied([](Request& r) { (*r.mutable_state())[40] ^= 1; }),
                                     denied([](Request& r) { r.clear_proof(); }),
                                     denied([](Request& r) { r.mutable_pages()->RemoveLast(); })}) {
    EXPECT_EQ(GetReason(status), "NOT_PROVEN") << status;
  }
  for (const absl::Status& status :
       {denied([](Request& r) { r.set_kind(v1::TRANSFER_KIND_UNSPECIFIED); }),
        denied([](Request& r) { r.set_kind(static_cast<v1::TransferKind>(9)); }),
        denied([](Request& r) { r.mutable_pages(0)->clear_key(); }),
        denied([](Request& r) { r.mutable_pages(0)->mutable_checksum()->pop_back(); }),
        denied([](Request& r) { r.set_sequence_id("nothing"); }),
        denied([](Request& r) { r.set_model_digest(std::string(64, '0')); }),
        denied([](Request& r) { r.mutable_ttl()->set_seconds(61); }),
        denied([](Request& r) { r.mutable_ttl()->set_nanos(-1); })}) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  }
  EXPECT_EQ(b_.FreeFrames(), kFrames);
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, WhatCannotBeSentIsRefused) {
  const v1::SequenceState state = Fill(a_, tokens_);
  const std::string b = b_.role->address();
  v1::SequenceState stale = state;
  stale.set_epoch(9);
  EXPECT_EQ(GetReason(a_.Send(stale, b, v1::TRANSFER_KIND_COPY).status()),
            error_reason::kStaleEpoch);
  v1::SequenceState unknown = state;
  unknown.set_sequence_id("00000000000000ff-1");
  EXPECT_EQ(GetReason(a_.Send(unknown, b, v1::TRANSFER_KIND_MOVE).status()), "SEQUENCE_NOT_FOUND");
  for (const std::string& address : {std::string(), std::string(2000, 'x')}) {
    EXPECT_TRUE(absl::IsInvalidArgument(a_.Send(state, address, v1::TRANSFER_KIND_COPY).status()));
  }
  EXPECT_TRUE(
      absl::IsInvalidArgument(a_.Send(state, b, static_cast<v1::TransferKind>(9)).status()));
  // Nobody listens there.
  EXPECT_TRUE(absl::IsUnavailable(a_.Send(state, "127.0.0.1:1", v1::TRANSFER_KIND_MOVE).status()));
  // It is open there already: here.
  EXPECT_TRUE(
      absl::IsAlreadyExists(a_.Send(state, a_.role->address(), v1::TRANSFER_KIND_MOVE).status()));
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, AFullTargetSaysHowMuchIsNeededAndFree) {
  // Without a store what an open sequence holds stays in its frames.
  WorkerUnderTest full_worker;
  Start("d", "a secret of tests", &full_worker, /*store=*/nullptr);
  Fill(full_worker, TestTokens(9, 13 * 16));
  const v1::SequenceState state = Fill(a_, tokens_);
  TestContext context(absl::Milliseconds(500));
  v1::SendSequenceRequest request;
  request.mutable_sequence()->set_sequence_id(state.sequence_id());
  request.mutable_sequence()->set_epoch(state.epoch());
  request.set_target_address(full_worker.role->address());
  v1::SendSequenceResponse response;
  const absl::Status full =
      FromGrpcStatus(a_.transfers->SendSequence(&context, request, &response));
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_EQ(GetReasonMetadata(full, "needed"), "5");
  EXPECT_EQ(GetReasonMetadata(full, "free"), "3");
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, RawCallsWithBadInputAreRefused) {
  const auto push = [&](const std::vector<v1::PushPagesRequest>& parts) {
    TestContext context;
    v1::PushPagesResponse response;
    const auto writer = b_.transfers->PushPages(&context, &response);
    for (const v1::PushPagesRequest& part : parts) {
      if (!writer->Write(part)) break;
    }
    writer->WritesDone();
    return FromGrpcStatus(writer->Finish());
  };
  EXPECT_TRUE(absl::IsInvalidArgument(push({})));
  v1::PushPagesRequest part;
  EXPECT_EQ(GetReason(push({part})), "TRANSFER_NOT_FOUND");
  part.set_transfer_id(std::string(100'000, 'x'));
  EXPECT_EQ(GetReason(push({part})), "TRANSFER_NOT_FOUND");
  TestContext commit_context, abort_context, reserve_context;
  v1::CommitTransferResponse committed;
  EXPECT_EQ(
      GetReason(FromGrpcStatus(b_.transfers->CommitTransfer(&commit_context, {}, &committed))),
      "TRANSFER_NOT_FOUND");
  v1::AbortTransferResponse aborted;
  EXPECT_TRUE(b_.transfers->AbortTransfer(&abort_context, {}, &aborted).ok());
  EXPECT_FALSE(aborted.has_committed());
  v1::ReserveTransferResponse reserved;
  EXPECT_TRUE(absl::IsInvalidArgument(
      FromGrpcStatus(b_.transfers->ReserveTransfer(&reserve_context, {}, &reserved))));
}

}  // namespace
}  // namespace pagetide
