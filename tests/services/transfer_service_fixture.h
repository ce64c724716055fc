// Two workers on loopback, and something between them that loses and changes what it is told to.
#ifndef PAGETIDE_TESTS_SERVICES_TRANSFER_SERVICE_FIXTURE_H_
#define PAGETIDE_TESTS_SERVICES_TRANSFER_SERVICE_FIXTURE_H_

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
#include "tests/support/worker_client.h"

namespace pagetide::transfer_test {

using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;

inline constexpr uint64_t kFrames = 16;

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
    if (num_commits++ > 0 && refuse_repeats) {
      return {grpc::StatusCode::RESOURCE_EXHAUSTED, "too many calls"};
    }
    if (lose_commit) return Lost();
    TestContext context;
    const grpc::Status status = stub_->CommitTransfer(&context, *request, response);
    return lose_answer ? Lost() : status;
  }
  grpc::Status AbortTransfer(grpc::ServerContext*, const v1::AbortTransferRequest* request,
                             v1::AbortTransferResponse* response) override {
    if (lose_abort) return Lost();
    TestContext context;
    v1::TransferService::Stub* const other = ask_instead;
    v1::TransferService::Stub* const asked = other != nullptr ? other : stub_.get();
    return asked->AbortTransfer(&context, *request, response);
  }

  // Another who is asked what became of a transfer, as if it listened there now.
  std::atomic<v1::TransferService::Stub*> ask_instead{nullptr};
  // Set while no call runs.
  std::function<void(v1::ReserveTransferRequest&)> change_reserve;
  std::function<void(v1::PushPagesRequest&)> change_part;
  std::atomic<bool> lose_push{false};
  std::atomic<bool> lose_commit{false};  // on its way there
  std::atomic<bool> lose_answer{false};  // of a commit, on its way back
  std::atomic<bool> lose_abort{false};
  std::atomic<bool> refuse_repeats{false};  // of a commit, without asking the target
  std::atomic<int> num_commits{0};

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

}  // namespace pagetide::transfer_test

#endif  // PAGETIDE_TESTS_SERVICES_TRANSFER_SERVICE_FIXTURE_H_
