// Which calls the client repeats by itself when a worker is away for a moment.
#include <gtest/gtest.h>

#include <atomic>
#include <memory>

#include "clients/cpp/client.h"
#include "pagetide/v1/sequence_edit.grpc.pb.h"
#include "pagetide/v1/session.grpc.pb.h"
#include "rpc/metrics.h"
#include "rpc/server.h"

namespace pagetide {
namespace {

const grpc::Status kAway(grpc::StatusCode::UNAVAILABLE, "the store is away");

class AwaySessions final : public v1::SessionService::Service {
 public:
  grpc::Status DeleteSession(grpc::ServerContext*, const v1::DeleteSessionRequest*,
                             v1::DeleteSessionResponse*) override {
    ++num_calls;
    return kAway;
  }
  std::atomic<int> num_calls{0};
};

class AwayEdits final : public v1::SequenceEditService::Service {
 public:
  grpc::Status UnpinRange(grpc::ServerContext*, const v1::UnpinRangeRequest*,
                          v1::UnpinRangeResponse*) override {
    ++num_calls;
    return kAway;
  }
  std::atomic<int> num_calls{0};
};

class ClientRetriesTest : public ::testing::Test {
 protected:
  void SetUp() override {
    auto server =
        RpcServer::Create({}, {&sessions_, &edits_}, std::make_shared<PrometheusMetrics>());
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    ClientOptions options;
    options.worker_address = server_->addresses().front();
    options.call.retry.max_attempts = 3;
    options.call.retry.initial_backoff = absl::Milliseconds(1);
    auto client = Client::Create(options);
    ASSERT_TRUE(client.ok()) << client.status();
    client_ = *std::move(client);
  }

  AwaySessions sessions_;
  AwayEdits edits_;
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<Client> client_;
};

TEST_F(ClientRetriesTest, ADeletionOfAVersionIsRepeatedAndOneOfAnyVersionIsNot) {
  EXPECT_EQ(client_->DeleteSession("s", 7).status().code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(sessions_.num_calls.exchange(0), 3);
  EXPECT_EQ(client_->DeleteSession("s", std::nullopt).status().code(),
            absl::StatusCode::kUnavailable);
  EXPECT_EQ(sessions_.num_calls, 1) << "the second would have deleted what came after the first";
}

TEST_F(ClientRetriesTest, AnUnpinIsNotRepeated) {
  EXPECT_EQ(client_->Unpin("p").code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(edits_.num_calls, 1);
}

}  // namespace
}  // namespace pagetide
