// Router, workers and store in one process: what a newcomer's `pagetide up` runs.
#include "services/in_process.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "pagetide/v1/admin.grpc.pb.h"
#include "pagetide/v1/router.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/model_codec.h"
#include "rpc/status_mapping.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;

class InProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto started =
        InProcess::Start({.dir = dir_.path(),
                          .num_workers = 2,
                          .pool_bytes = 64 * model_->geometry().bytes_per_page_of_tokens()});
    ASSERT_TRUE(started.ok()) << started.status();
    deployment_ = *std::move(started);
    router_ = v1::RouterService::NewStub(MakeChannel(deployment_->router_address()));
    TestContext context;
    v1::RegisterModelRequest request;
    *request.mutable_spec() = ToProto(model_->spec());
    v1::RegisterModelResponse response;
    const absl::Status registered =
        FromGrpcStatus(router_->RegisterModel(&context, request, &response));
    ASSERT_TRUE(registered.ok()) << registered;
  }
  v1::AssignSequenceResponse Assign(const std::vector<uint32_t>& tokens) {
    TestContext context;
    v1::AssignSequenceRequest request;
    request.mutable_prompt()->set_model(model_->digest().ToHex());
    request.mutable_prompt()->mutable_tokens()->Add(tokens.begin(), tokens.end());
    v1::AssignSequenceResponse response;
    const absl::Status assigned =
        FromGrpcStatus(router_->AssignSequence(&context, request, &response));
    EXPECT_TRUE(assigned.ok()) << assigned;
    return response;
  }

  testing::TempDir dir_;
  std::shared_ptr<const Model> model_ = std::make_shared<const Model>(MakeTestModel());
  std::unique_ptr<InProcess> deployment_;
  std::unique_ptr<v1::RouterService::Stub> router_;
};

TEST_F(InProcessTest, TheRouterLearnsOfThePagesOfAnAssignedSequence) {
  const auto tokens = TestTokens(1, 100);
  const v1::AssignSequenceResponse first = Assign(tokens);
  ASSERT_THAT(deployment_->worker_addresses(), ::testing::Contains(first.address()));
  WorkerClient client(first.address(), model_);
  auto open = client.Open(tokens);
  ASSERT_TRUE(open.ok()) << open.status();
  auto appended = client.Append(open->state(), tokens, tokens.size());
  ASSERT_TRUE(appended.ok()) << appended.status();
  ASSERT_TRUE(client.Verify(open->state().sequence_id(), tokens, 0, 100).ok());
  // The router hears of the pages a moment later.
  v1::ScoreWorkersRequest request;
  request.mutable_prompt()->set_model(model_->digest().ToHex());
  request.mutable_prompt()->mutable_tokens()->Add(tokens.begin(), tokens.end());
  v1::ScoreWorkersResponse scores;
  // Which of the two scores better depends on how fast this machine restores.
  EXPECT_TRUE(testing::Eventually([&] {
    TestContext context;
    scores.Clear();
    if (!router_->ScoreWorkers(&context, request, &scores).ok()) return false;
    if (scores.candidates_size() != 2) return false;
    const int here = scores.candidates(0).address() == first.address() ? 0 : 1;
    return scores.candidates(here).address() == first.address() &&
           scores.candidates(here).device_tokens() == 96 &&
           scores.candidates(1 - here).device_tokens() == 0;
  })) << scores.ShortDebugString();
}

TEST_F(InProcessTest, ThePagesOfOneWorkerAreRestoredByTheOther) {
  const auto tokens = TestTokens(2, 100);
  const std::vector<std::string> workers = deployment_->worker_addresses();
  WorkerClient writer(workers[0], model_);
  auto open = writer.Open(tokens);
  ASSERT_TRUE(open.ok()) << open.status();
  ASSERT_TRUE(writer.Append(open->state(), tokens, tokens.size()).ok());
  WorkerClient reader(workers[1], model_);
  std::string sequence_id;
  EXPECT_TRUE(testing::Eventually([&] {  // write-through is asynchronous
    auto other = reader.Open(tokens);
    EXPECT_TRUE(other.ok()) << other.status();
    sequence_id = other->state().sequence_id();
    auto ready = reader.WaitReady(sequence_id);
    EXPECT_TRUE(ready.ok()) << ready.status();
    return !other.ok() || !ready.ok() || *ready == 96;
  }));
  auto verified = reader.Verify(sequence_id, tokens, 0, 96);
  EXPECT_TRUE(verified.ok()) << verified.status();
}

TEST_F(InProcessTest, WhatWasServedIsThereAfterARestart) {
  const auto tokens = TestTokens(3, 100);
  {
    WorkerClient writer(deployment_->worker_addresses()[0], model_);
    auto open = writer.Open(tokens);
    ASSERT_TRUE(open.ok()) << open.status();
    ASSERT_TRUE(writer.Append(open->state(), tokens, tokens.size()).ok());
  }
  deployment_->Drain(absl::Seconds(10));
  deployment_.reset();
  SetUp();
  WorkerClient reader(deployment_->worker_addresses()[1], model_);
  auto open = reader.Open(tokens);
  ASSERT_TRUE(open.ok()) << open.status();
  EXPECT_EQ(open->reuse().store_tokens(), 96);
  auto ready = reader.WaitReady(open->state().sequence_id());
  ASSERT_TRUE(ready.ok()) << ready.status();
  EXPECT_TRUE(reader.Verify(open->state().sequence_id(), tokens, 0, *ready).ok());
}

TEST_F(InProcessTest, TheStorePublishesItsState) {
  const auto admin = v1::AdminService::NewStub(MakeChannel(deployment_->store_address()));
  v1::GetStatsResponse stats;
  EXPECT_TRUE(testing::Eventually([&] {
    TestContext context;
    stats.Clear();
    EXPECT_TRUE(admin->GetStats(&context, {}, &stats).ok());
    return stats.values().contains("pagetide_store_pages") &&
           stats.values().contains("pagetide_store_physical_bytes");
  })) << stats.ShortDebugString();
  EXPECT_THAT(deployment_->store_metrics_address(), ::testing::StartsWith("127.0.0.1:"));
  EXPECT_THAT(deployment_->worker_metrics_addresses(), ::testing::SizeIs(2));
}

TEST(InProcessOptionsTest, NameWhatIsWrong) {
  EXPECT_EQ(InProcess::Start({}).status().code(), absl::StatusCode::kInvalidArgument);
  testing::TempDir dir;
  EXPECT_EQ(InProcess::Start({.dir = dir.path(), .num_workers = 0}).status().code(),
            absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(InProcess::Start({.dir = dir.path(), .router_port = 70000}).status().code(),
            absl::StatusCode::kInvalidArgument);
  const absl::Status met = InProcess::Start({.dir = dir.path(),
                                             .num_workers = 11,
                                             .router_port = 7070,
                                             .store_port = 7090,
                                             .worker_port = 7080})
                               .status();
  EXPECT_EQ(met.code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(met.message(),
            "port 7090 is taken by one of the 11 workers, which listen on 7080 and up");
  EXPECT_EQ(InProcess::Start({.dir = dir.path(), .num_workers = 3, .worker_port = 65534})
                .status()
                .message(),
            "worker_port 65534 leaves 2 ports for 3 workers");
}

}  // namespace
}  // namespace pagetide
