// Clients that set no deadline, begin a stream and fall silent: what they hold comes back when the
// call's time is up. On a clock that the test moves.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "base/byte_size.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/status_mapping.h"
#include "services/worker_role.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"
#include "worker/service_support.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;
using ::testing::HasSubstr;

class StalledStreamsTest : public ::testing::Test {
 protected:
  static constexpr uint64_t kFrames = 32;

  void SetUp() override {
    ASSERT_TRUE(RegisterTestModel(*model_, &store_).ok());
    WorkerRole::Options options;
    options.worker.pool_bytes = kFrames * model_->geometry().bytes_per_page_of_tokens();
    auto role = WorkerRole::Start(options, &store_, &clock_);
    ASSERT_TRUE(role.ok()) << role.status();
    role_ = *std::move(role);
    client_ = std::make_unique<WorkerClient>(role_->address(), model_);
  }
  v1::GetMemoryBreakdownResponse::Pool Pool() {
    TestContext context;
    v1::GetMemoryBreakdownResponse response;
    EXPECT_TRUE(client_->admin().GetMemoryBreakdown(&context, {}, &response).ok());
    return response.pools_size() == 1 ? response.pools(0) : v1::GetMemoryBreakdownResponse::Pool();
  }
  static void ExpectTimeIsUp(const grpc::Status& status, const char* what) {
    EXPECT_EQ(status.error_code(), grpc::StatusCode::DEADLINE_EXCEEDED) << status.error_message();
    EXPECT_THAT(status.error_message(), HasSubstr(what));
  }

  // A page is 1 MiB: no window or buffer on the way holds a sequence of many.
  const std::shared_ptr<const Model> model_ = std::make_shared<const Model>(
      MakeTestModel({.page_tokens = 16, .num_layers = 4, .kv_heads = 16, .dim = 128}));
  FakeClock clock_;
  MemoryPageStore store_{{.clock = &clock_}};
  std::unique_ptr<WorkerRole> role_;
  std::unique_ptr<WorkerClient> client_;
};

TEST_F(StalledStreamsTest, AnAppendOfWhichNothingComesGivesItsFramesBack) {
  const auto open = client_->Open({});
  ASSERT_TRUE(open.ok()) << open.status();
  const auto tokens = TestTokens(1, kFrames * 16);
  grpc::ClientContext context;  // without a deadline
  v1::AppendTokensResponse response;
  const auto stream = client_->sequences().AppendTokens(&context, &response);
  v1::AppendTokensRequest message;
  v1::AppendHeader& header = *message.mutable_header();
  header.mutable_sequence()->set_sequence_id(open->state().sequence_id());
  header.mutable_sequence()->set_epoch(open->state().epoch());
  header.set_append_id("a");
  header.mutable_tokens()->Add(tokens.begin(), tokens.end());
  ASSERT_TRUE(stream->Write(message));
  ASSERT_TRUE(Eventually([&] { return Pool().free_frames() == 0; }));
  clock_.Advance(kDefaultCallTime);
  EXPECT_TRUE(Eventually([&] { return Pool().free_frames() == kFrames; }));
  ExpectTimeIsUp(stream->Finish(), "append tokens");
  EXPECT_TRUE(client_->EventuallyStat("pagetide_rpc_overdue_streams_total", 1));
  // As if it had never been: others can have it all.
  const auto now = client_->Get(open->state().sequence_id());
  ASSERT_TRUE(now.ok()) << now.status();
  EXPECT_EQ(now->length(), 0u);
  EXPECT_EQ(now->pending_tokens(), 0u);
  const auto appended = client_->Append(*now, tokens, 17);
  EXPECT_TRUE(appended.ok()) << appended.status();
}

TEST_F(StalledStreamsTest, AReaderThatStopsReadingLosesItsPins) {
  const auto open = client_->Open({});
  ASSERT_TRUE(open.ok()) << open.status();
  const auto tokens = TestTokens(2, kFrames * 16);
  const auto appended = client_->Append(open->state(), tokens, tokens.size());
  ASSERT_TRUE(appended.ok()) << appended.status();
  grpc::ClientContext context;  // without a deadline
  v1::ReadRowsRequest request;
  request.set_sequence_id(open->state().sequence_id());
  const auto stream = client_->sequences().ReadRows(&context, request);
  v1::ReadRowsResponse rows;
  ASSERT_TRUE(stream->Read(&rows));
  EXPECT_EQ(Pool().pinned_frames(), kFrames);
  clock_.Advance(kDefaultCallTime);
  EXPECT_TRUE(Eventually([&] { return Pool().pinned_frames() == 0; }));
  // What had arrived before is there to read, then the end is.
  while (stream->Read(&rows)) {
  }
  ExpectTimeIsUp(stream->Finish(), "read rows");
}

TEST_F(StalledStreamsTest, AnImportThatStopsSendingMakesRoomForAnother) {
  const auto sessions = v1::SessionService::NewStub(client_->channel());
  grpc::ClientContext context;  // without a deadline
  v1::ImportSequenceResponse response;
  const auto stream = sessions->ImportSequence(&context, &response);
  v1::ImportSequenceRequest message;
  message.mutable_header()->set_model_digest(model_->digest().ToHex());
  ASSERT_TRUE(stream->Write(message));
  // The worker is at it: it has made the model's pool.
  ASSERT_TRUE(Eventually([&] { return Pool().num_frames() == kFrames; }));
  clock_.Advance(kDefaultCallTime);
  ExpectTimeIsUp(stream->Finish(), "import sequence");
}

}  // namespace
}  // namespace pagetide
