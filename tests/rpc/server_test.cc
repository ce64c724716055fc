// RpcServer in process over real sockets: calls, health, reflection, channelz, metrics, limits,
// drain.
#include "rpc/server.h"

#include <gmock/gmock.h>
#include <google/protobuf/message.h>
#include <google/protobuf/text_format.h>
#include <grpcpp/generic/generic_stub.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <sys/stat.h>
#include <sys/time.h>
#include <unistd.h>

#include <future>
#include <memory>
#include <optional>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "grpc/health/v1/health.pb.h"
#include "rpc/byte_buffer.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "tests/rpc/echo_service.h"
#include "tests/rpc/rpc_test_util.h"

namespace pagetide {
namespace {

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

TEST_F(RpcServerTest, BulkChannelsHaveAConnectionOfTheirOwn) {
  TempDir dir;
  RpcServer::Options options;
  options.addresses = {"127.0.0.1:0", "unix:" + dir.path() + "/rpc.sock"};
  Start(options);
  ASSERT_TRUE(Echo("small").ok());
  size_t connections = server_->num_connections();
  std::vector<std::shared_ptr<grpc::Channel>> open;  // so that the count only grows
  for (const std::string& address : server_->addresses()) {
    auto bulk = MakeBulkChannel(address);
    ASSERT_TRUE(bulk.ok()) << bulk.status();
    open.push_back(*bulk);
    const auto stub = test::EchoService::NewStub(*bulk);
    std::string answer;
    EXPECT_TRUE(Echo("over " + address, &answer, stub.get()).ok());
    EXPECT_EQ(answer, "over " + address);
    EXPECT_EQ(server_->num_connections(), ++connections);
  }
  const auto bulk = MakeBulkChannel(server_->addresses()[1]);
  ASSERT_TRUE(bulk.ok()) << bulk.status();
  server_->Drain(absl::ZeroDuration());
  const auto stub = test::EchoService::NewStub(*bulk);
  EXPECT_EQ(Echo("gone", nullptr, stub.get()).code(), absl::StatusCode::kUnavailable);
  const absl::Status nobody = MakeBulkChannel(server_->addresses()[1]).status();
  EXPECT_EQ(nobody.code(), absl::StatusCode::kUnavailable);
  EXPECT_THAT(std::string(nobody.message()), HasSubstr(dir.path()));
  EXPECT_EQ(MakeBulkChannel("unix:").status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(RpcServerTest, DrainDoesNotWaitForIdleClientsNorForThoseThatWatchHealth) {
  Start();
  ASSERT_TRUE(Echo("then idle").ok());
  const auto channel = MakeChannel(server_->addresses()[0], {.own_connection = true});
  grpc::GenericStub generic(channel);
  grpc::ClientContext context;
  grpc::CompletionQueue queue;
  const auto watch = generic.PrepareCall(&context, "/grpc.health.v1.Health/Watch", &queue);
  watch->StartCall(nullptr);
  void* tag;
  bool ok = false;
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  watch->WriteLast(EncodeMessage(grpc::health::v1::HealthCheckRequest()), grpc::WriteOptions(),
                   nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  grpc::ByteBuffer answer;
  watch->Read(&answer, nullptr);
  ASSERT_TRUE(queue.Next(&tag, &ok) && ok);
  EXPECT_EQ(server_->num_connections(), 2u);

  const absl::Time began = absl::Now();
  server_->Drain(absl::Seconds(90));
  EXPECT_LT(absl::Now() - began, absl::Seconds(45)) << "it waited for clients that never leave";
  context.TryCancel();
  queue.Shutdown();
  while (queue.Next(&tag, &ok)) {
  }
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

// A message of a type that is linked in but has no header (the plugins' own), from text format.
std::unique_ptr<google::protobuf::Message> MakeMessage(const std::string& type,
                                                       const std::string& text = "") {
  const auto* descriptor =
      google::protobuf::DescriptorPool::generated_pool()->FindMessageTypeByName(type);
  EXPECT_NE(descriptor, nullptr) << type;
  std::unique_ptr<google::protobuf::Message> message(
      google::protobuf::MessageFactory::generated_factory()->GetPrototype(descriptor)->New());
  EXPECT_TRUE(google::protobuf::TextFormat::ParseFromString(text, message.get())) << text;
  return message;
}

// One exchange of `method`, as a stream of one message each way (which a unary call is on the
// wire).
grpc::Status CallByName(const std::string& address, const std::string& method,
                        const google::protobuf::Message& request,
                        google::protobuf::Message* response) {
  grpc::GenericStub stub(MakeChannel(address));
  grpc::ClientContext context;
  context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(10));
  grpc::CompletionQueue cq;
  auto call = stub.PrepareCall(&context, method, &cq);
  void* tag = nullptr;
  bool ok = false;
  const auto step = [&] { return cq.Next(&tag, &ok) && ok; };
  call->StartCall(nullptr);
  step();
  call->WriteLast(EncodeMessage(request), grpc::WriteOptions(), nullptr);
  step();
  grpc::ByteBuffer buffer;
  call->Read(&buffer, nullptr);
  if (step()) {
    EXPECT_TRUE(DecodeMessage(buffer, response).ok());
  }
  grpc::Status status;
  call->Finish(&status, nullptr);
  step();
  return status;
}

// An HTTP/2 frame on stream 0. Source: RFC 9113, section 4.1.
std::string Http2Frame(char type, char flags, const std::string& payload) {
  std::string frame = {0, 0, static_cast<char>(payload.size()), type, flags, 0, 0, 0, 0};
  return frame + payload;
}
constexpr char kSettingsFrame = 0x4, kPingFrame = 0x6, kGoAwayFrame = 0x7;
constexpr char kAckFlag = 0x1;
constexpr uint8_t kEnhanceYourCalm = 0xb;

// What a server answers to a client that only pings: the error code of its GOAWAY, if it sent one,
// and the number of pings that it acknowledged. Ends with the connection, or when `num_acks` came.
struct PingAnswers {
  int num_acks = 0;
  std::optional<uint8_t> go_away;
  std::string debug_data;
};
PingAnswers AnswersToPings(int port, int num_pings, int num_acks) {
  RawConnection connection(port);
  const timeval give_up{.tv_sec = 60, .tv_usec = 0};  // only a failing test ever waits that long
  setsockopt(connection.fd(), SOL_SOCKET, SO_RCVTIMEO, &give_up, sizeof(give_up));
  std::string sent = "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + Http2Frame(kSettingsFrame, 0, "");
  for (int i = 0; i < num_pings; ++i) sent += Http2Frame(kPingFrame, 0, "01234567");
  EXPECT_TRUE(connection.Send(sent));
  PingAnswers answers;
  std::string got;
  char buffer[4096];
  for (ssize_t n; (n = recv(connection.fd(), buffer, sizeof(buffer), 0)) > 0;) {
    got.append(buffer, static_cast<size_t>(n));
    while (got.size() >= 9) {
      const auto byte = [&got](size_t i) { return static_cast<uint8_t>(got[i]); };
      const size_t length = byte(0) << 16 | byte(1) << 8 | byte(2);
      if (got.size() < 9 + length) break;
      if (got[3] == kPingFrame && got[4] == kAckFlag) ++answers.num_acks;
      if (got[3] == kGoAwayFrame && length >= 8) {
        answers.go_away = byte(9 + 7);  // last stream id, then the error code, big-endian
        answers.debug_data = got.substr(9 + 8, length - 8);
      }
      got.erase(0, 9 + length);
    }
    if (answers.num_acks >= num_acks) break;
  }
  return answers;
}

TEST_F(RpcServerTest, APeerThatPingsTooOftenIsToldToCalmDownAndCutOff) {
  RpcServer::Options options;
  options.min_ping_interval = absl::Hours(1);
  Start(options);
  const PingAnswers answers = AnswersToPings(server_->port(), 20, /*num_acks=*/21);
  ASSERT_TRUE(answers.go_away.has_value()) << answers.num_acks << " pings were acknowledged";
  EXPECT_EQ(*answers.go_away, kEnhanceYourCalm);
  EXPECT_EQ(answers.debug_data, "too_many_pings");
  EXPECT_TRUE(Eventually([&] { return server_->num_connections() == 0; }));
  EXPECT_TRUE(Echo("others are served").ok());
}

TEST_F(RpcServerTest, AFewPingsAreAnswered) {
  RpcServer::Options options;
  options.min_ping_interval = absl::Hours(1);
  Start(options);
  const PingAnswers answers = AnswersToPings(server_->port(), 2, /*num_acks=*/2);
  EXPECT_EQ(answers.num_acks, 2);
  EXPECT_FALSE(answers.go_away.has_value());
}

// SERVING, NOT_SERVING, or the name of the error.
std::string HealthOf(const std::string& address, const std::string& service) {
  grpc::health::v1::HealthCheckRequest request;
  request.set_service(service);
  grpc::health::v1::HealthCheckResponse response;
  const absl::Status status =
      FromGrpcStatus(CallByName(address, "/grpc.health.v1.Health/Check", request, &response));
  if (!status.ok()) return absl::StatusCodeToString(status.code());
  return grpc::health::v1::HealthCheckResponse::ServingStatus_Name(response.status());
}

TEST_F(RpcServerTest, HealthIsPerServiceAndOfTheWhole) {
  Start();
  const std::string address = server_->addresses()[0];
  EXPECT_EQ(HealthOf(address, ""), "SERVING");
  EXPECT_EQ(HealthOf(address, "pagetide.test.EchoService"), "SERVING");
  EXPECT_EQ(HealthOf(address, "pagetide.v1.Unknown"), "NOT_FOUND");
  server_->SetServing("pagetide.test.EchoService", false);
  EXPECT_EQ(HealthOf(address, "pagetide.test.EchoService"), "NOT_SERVING");
  EXPECT_EQ(HealthOf(address, ""), "SERVING");
  EXPECT_THAT(HttpGet(server_->metrics_port(), "/healthz"), HasSubstr("200 OK"));
  server_->SetServing("", false);
  EXPECT_EQ(HealthOf(address, ""), "NOT_SERVING");
  EXPECT_THAT(HttpGet(server_->metrics_port(), "/healthz"), HasSubstr("503"));
}

TEST_F(RpcServerTest, HealthTurnsBeforeTheDoorCloses) {
  Start();
  std::string health, http, echo_health;
  absl::Status call;
  server_->OnDrain([&] {
    server_->SetServing("", true);  // too late: a drain is final
    health = HealthOf(server_->addresses()[0], "");
    echo_health = HealthOf(server_->addresses()[0], "pagetide.test.EchoService");
    http = HttpGet(server_->metrics_port(), "/healthz");
    call = Echo("still served");
  });
  server_->Drain(absl::Seconds(5));
  EXPECT_EQ(health, "NOT_SERVING");
  EXPECT_EQ(echo_health, "NOT_SERVING");
  EXPECT_THAT(http, HasSubstr("503"));
  EXPECT_TRUE(call.ok()) << call;
}

TEST_F(RpcServerTest, ReflectionListsOurServicesAndHealth) {
  Start();
  auto request =
      MakeMessage("grpc.reflection.v1alpha.ServerReflectionRequest", "list_services: '*'");
  auto response = MakeMessage("grpc.reflection.v1alpha.ServerReflectionResponse");
  const char* const kMethod = "/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo";
  ASSERT_TRUE(CallByName(server_->addresses()[0], kMethod, *request, response.get()).ok());
  const std::string list = response->ShortDebugString();
  for (const char* service :
       {"pagetide.test.EchoService", "grpc.health.v1.Health", "grpc.channelz.v1.Channelz"}) {
    EXPECT_THAT(list, HasSubstr(absl::StrCat("name: \"", service, "\"")));
    // Listed is not yet usable: the descriptor must be there too.
    auto describe = MakeMessage("grpc.reflection.v1alpha.ServerReflectionRequest",
                                absl::StrCat("file_containing_symbol: '", service, "'"));
    response->Clear();
    ASSERT_TRUE(CallByName(server_->addresses()[0], kMethod, *describe, response.get()).ok());
    EXPECT_THAT(response->ShortDebugString(), HasSubstr("file_descriptor_response")) << service;
  }
}

TEST_F(RpcServerTest, ChannelzShowsTheServer) {
  Start();
  auto response = MakeMessage("grpc.channelz.v1.GetServersResponse");
  ASSERT_TRUE(CallByName(server_->addresses()[0], "/grpc.channelz.v1.Channelz/GetServers",
                         *MakeMessage("grpc.channelz.v1.GetServersRequest"), response.get())
                  .ok());
  EXPECT_THAT(response->ShortDebugString(), HasSubstr("server_id"));
}

TEST_F(RpcServerTest, RefusesMetadataBeyondTheLimit) {
  Start();
  grpc::ClientContext context;
  context.AddMetadata("x-large", std::string(2 * kMaxMetadataBytes, 'm'));
  test::EchoResponse response;
  EXPECT_EQ(stub_->Echo(&context, test::EchoRequest(), &response).error_code(),
            grpc::StatusCode::RESOURCE_EXHAUSTED);
  // gRPC may close the connection of such a client; UNAVAILABLE is what clients retry. The server
  // itself must go on.
  absl::Status after = Echo("the server goes on");
  for (int i = 0; i < 20 && absl::IsUnavailable(after); ++i) after = Echo("the server goes on");
  EXPECT_TRUE(after.ok()) << after;
}

TEST_F(RpcServerTest, UnknownMethodIsUnimplemented) {
  Start();
  test::EchoResponse response;
  EXPECT_EQ(CallByName(server_->addresses()[0], "/pagetide.test.EchoService/Nothing",
                       test::EchoRequest(), &response)
                .error_code(),
            grpc::StatusCode::UNIMPLEMENTED);
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
