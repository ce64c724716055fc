// RpcServer in process over real sockets: calls, health, reflection, channelz, metrics, limits,
// drain.
#include "rpc/server.h"

#include <gmock/gmock.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <unistd.h>

#include <future>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/error_info.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "tests/rpc/echo_service.h"
#include "tests/rpc/rpc_test_util.h"

namespace pagetide {
namespace {

using ::testing::Contains;
using ::testing::HasSubstr;

class RpcServerTest : public ::testing::Test {
 protected:
  void Start(RpcServer::Options options = {}) {
    auto server = RpcServer::Create(options, {&echo_}, metrics_);
    ASSERT_TRUE(server.ok()) << server.status();
    server_ = *std::move(server);
    stub_ = test::EchoService::NewStub(MakeChannel(server_->addresses()[0]));
  }

  absl::Status Echo(const std::string& text, std::string* answer = nullptr,
                    test::EchoService::Stub* stub = nullptr) {
    test::EchoRequest request;
    request.set_text(text);
    return Call(request, answer, stub);
  }
  absl::Status Call(const test::EchoRequest& request, std::string* answer = nullptr,
                    test::EchoService::Stub* stub = nullptr) {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
    test::EchoResponse response;
    const grpc::Status status =
        (stub != nullptr ? stub : stub_.get())->Echo(&context, request, &response);
    if (answer != nullptr) *answer = response.text();
    return FromGrpcStatus(status);
  }

  EchoServiceImpl echo_;
  std::shared_ptr<PrometheusMetrics> metrics_ = std::make_shared<PrometheusMetrics>();
  std::unique_ptr<RpcServer> server_;
  std::unique_ptr<test::EchoService::Stub> stub_;
};

TEST_F(RpcServerTest, ServesCallsOverTcpAndUnixSockets) {
  TempDir dir;
  const std::string path = dir.path() + "/rpc.sock";
  RpcServer::Options options;
  options.addresses = {"127.0.0.1:0", "unix:" + path, "[::1]:0"};
  Start(options);
  ASSERT_EQ(server_->addresses().size(), 3u);
  std::vector<std::unique_ptr<test::EchoService::Stub>> stubs;
  for (const std::string& address : server_->addresses()) {
    stubs.push_back(test::EchoService::NewStub(MakeChannel(address)));
    std::string answer;
    EXPECT_TRUE(Echo("over " + address, &answer, stubs.back().get()).ok());
    EXPECT_EQ(answer, "over " + address);
  }
  EXPECT_EQ(server_->num_connections(), 3u);
  struct stat st {};
  ASSERT_EQ(stat(path.c_str(), &st), 0);
  EXPECT_EQ(st.st_mode & 0777, 0600u);
  server_->Drain(absl::Seconds(5));
  EXPECT_NE(stat(path.c_str(), &st), 0) << "socket file is left behind";
}

TEST_F(RpcServerTest, CarriesReasonAndRetryDelayToTheClient) {
  Start();
  test::EchoRequest request;
  request.set_text("append to sequence 7: epoch 3 is not 4");
  request.set_fail_code(static_cast<int>(absl::StatusCode::kFailedPrecondition));
  request.set_fail_reason("STALE_EPOCH");
  (*request.mutable_labels())["epoch"] = "4";
  request.set_retry_delay_ms(1500);
  const absl::Status status = Call(request);
  EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(status.message(), request.text());
  EXPECT_EQ(GetReason(status), "STALE_EPOCH");
  EXPECT_EQ(GetReasonMetadata(status, "epoch"), "4");
  EXPECT_EQ(GetRetryDelay(status), absl::Milliseconds(1500));
}

TEST_F(RpcServerTest, CountsCallsByMethodAndCode) {
  Start();
  EXPECT_TRUE(Echo("x").ok());
  EXPECT_TRUE(Echo("x").ok());
  test::EchoRequest request;
  request.set_fail_code(5);
  EXPECT_FALSE(Call(request).ok());
  const std::string text = metrics_->ExposeText();
  EXPECT_THAT(text, HasSubstr("pagetide_rpc_calls_total{code=\"OK\",method=\"pagetide.test."
                              "EchoService/Echo\"} 2"));
  EXPECT_THAT(text, HasSubstr("pagetide_rpc_calls_total{code=\"NOT_FOUND\",method=\"pagetide.test."
                              "EchoService/Echo\"} 1"));
  EXPECT_THAT(text, HasSubstr("pagetide_rpc_latency_seconds_count{method=\"pagetide.test."
                              "EchoService/Echo\"} 3"));
}

TEST_F(RpcServerTest, RefusesToListenBeyondLoopbackInPlaintext) {
  RpcServer::Options options;
  options.addresses = {"0.0.0.0:0"};
  EXPECT_EQ(RpcServer::Create(options, {&echo_}, metrics_).status().code(),
            absl::StatusCode::kFailedPrecondition);
  options.addresses = {"127.0.0.1:0"};
  options.metrics_address = "0.0.0.0:0";
  EXPECT_EQ(RpcServer::Create(options, {&echo_}, metrics_).status().code(),
            absl::StatusCode::kFailedPrecondition);
  options.allow_insecure = true;
  options.addresses = {"0.0.0.0:0"};
  EXPECT_TRUE(RpcServer::Create(options, {&echo_}, metrics_).ok());
}

TEST_F(RpcServerTest, AddressInUseIsRefused) {
  Start();
  RpcServer::Options options;
  options.addresses = {server_->addresses()[0]};
  EXPECT_EQ(RpcServer::Create(options, {&echo_}, metrics_).status().code(),
            absl::StatusCode::kFailedPrecondition);
  EXPECT_TRUE(Echo("still here").ok());
}

TEST_F(RpcServerTest, DrainLetsRunningStreamsEndAndRefusesNewCalls) {
  Start();
  grpc::ClientContext context;
  auto stream = stub_->Chat(&context);
  test::EchoRequest request;
  test::EchoResponse response;
  request.set_text("before");
  ASSERT_TRUE(stream->Write(request) && stream->Read(&response));

  std::promise<void> began;
  server_->OnDrain([&] { began.set_value(); });
  std::thread drain([&] { server_->Drain(absl::Seconds(20)); });
  began.get_future().wait();
  request.set_text("during");
  EXPECT_TRUE(stream->Write(request) && stream->Read(&response)) << "an open stream goes on";
  EXPECT_EQ(response.text(), "during");
  EXPECT_TRUE(stream->WritesDone());
  EXPECT_TRUE(stream->Finish().ok());
  drain.join();
  EXPECT_EQ(Echo("after").code(), absl::StatusCode::kUnavailable);
}

TEST_F(RpcServerTest, DrainCancelsStreamsThatOutliveItsTimeout) {
  Start();
  grpc::ClientContext context;
  auto stream = stub_->Chat(&context);
  test::EchoRequest request;
  test::EchoResponse response;
  ASSERT_TRUE(stream->Write(request) && stream->Read(&response));
  server_->Drain(absl::Milliseconds(200));
  EXPECT_FALSE(stream->Read(&response));
  EXPECT_FALSE(stream->Finish().ok());
}

}  // namespace
}  // namespace pagetide
