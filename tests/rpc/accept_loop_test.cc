// The accept loop alone and under RpcServer: addresses, caps, and the descriptor flood of
// CVE-2023-4785.
#include "rpc/accept_loop.h"

#include <fcntl.h>
#include <grpcpp/grpcpp.h>
#include <gtest/gtest.h>
#include <netinet/tcp.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "rpc/channel.h"
#include "rpc/process_tuning.h"
#include "rpc/server.h"
#include "tests/rpc/echo_service.h"
#include "tests/rpc/rpc_test_util.h"

namespace pagetide {
namespace {

TEST(ListenAddressTest, ParsesWhatItPrints) {
  const struct {
    const char* text;
    const char* printed;
    bool is_loopback;
  } kCases[] = {
      {"127.0.0.1:7100", "127.0.0.1:7100", true}, {"localhost:0", "127.0.0.1:0", true},
      {"127.9.9.9:1", "127.9.9.9:1", true},       {"[::1]:65535", "[::1]:65535", true},
      {"0.0.0.0:80", "0.0.0.0:80", false},        {"[::]:80", "[::]:80", false},
      {"10.0.0.7:80", "10.0.0.7:80", false},      {"unix:/run/p.sock", "unix:/run/p.sock", true},
  };
  for (const auto& c : kCases) {
    const absl::StatusOr<ListenAddress> a = ListenAddress::Parse(c.text);
    ASSERT_TRUE(a.ok()) << a.status();
    EXPECT_EQ(a->ToString(), c.printed);
    EXPECT_EQ(a->is_loopback, c.is_loopback) << c.text;
  }
  for (const std::string& bad :
       {std::string(""), std::string("7100"), std::string(":7100"), std::string("127.0.0.1"),
        std::string("127.0.0.1:65536"), std::string("127.0.0.1:-1"), std::string("127.0.0.1:x"),
        std::string("::1:80"), std::string("[::1:80"), std::string("example.org:80"),
        std::string("unix:"), std::string("unix:relative"), "unix:/" + std::string(200, 'p')}) {
    EXPECT_EQ(ListenAddress::Parse(bad).status().code(), absl::StatusCode::kInvalidArgument) << bad;
  }
}

class AcceptLoopTest : public ::testing::Test {
 protected:
  void Start(const AcceptLoop::Options& options, const std::string& address = "127.0.0.1:0") {
    auto loop = AcceptLoop::Create(options, {*ListenAddress::Parse(address)}, &metrics_);
    ASSERT_TRUE(loop.ok()) << loop.status();
    loop_ = *std::move(loop);
    loop_->Start([this](int, int fd) {
      MutexLock lock(&mu_);
      handed_over_.push_back(fd);
    });
  }
  ~AcceptLoopTest() override {
    loop_.reset();
    CloseAll();
  }
  size_t NumHandedOver() {
    MutexLock lock(&mu_);
    return handed_over_.size();
  }
  void CloseAll() {
    MutexLock lock(&mu_);
    for (int fd : handed_over_) close(fd);
    handed_over_.clear();
  }
  double Refused(const char* reason) {
    return metrics_.Value("pagetide_rpc_connections_refused_total", {{"reason", reason}});
  }
  int port() const { return loop_->addresses()[0].port; }

  InMemoryMetrics metrics_;
  Mutex mu_;
  std::vector<int> handed_over_ ABSL_GUARDED_BY(mu_);
  std::unique_ptr<AcceptLoop> loop_;
};

TEST_F(AcceptLoopTest, SetsUpSocketsForTheServer) {
  Start({});
  RawConnection client(port());
  ASSERT_TRUE(Eventually([&] { return NumHandedOver() == 1; }));
  MutexLock lock(&mu_);
  const int fd = handed_over_[0];
  EXPECT_TRUE(fcntl(fd, F_GETFL) & O_NONBLOCK);
  EXPECT_TRUE(fcntl(fd, F_GETFD) & FD_CLOEXEC);
  for (const auto& [level, option] :
       std::vector<std::pair<int, int>>{{IPPROTO_TCP, TCP_NODELAY}, {SOL_SOCKET, SO_KEEPALIVE}}) {
    int value = 0;
    socklen_t size = sizeof(value);
    getsockopt(fd, level, option, &value, &size);
    EXPECT_NE(value, 0) << option;
  }
}

TEST_F(AcceptLoopTest, ClosesConnectionsBeyondTheCapAndRecovers) {
  AcceptLoop::Options options;
  options.max_connections = 3;
  Start(options);
  std::vector<RawConnection> open;
  for (int i = 0; i < 3; ++i) open.emplace_back(port());
  ASSERT_TRUE(Eventually([&] { return NumHandedOver() == 3; }));
  EXPECT_TRUE(RawConnection(port()).WaitForClose(absl::Seconds(60)));
  EXPECT_EQ(Refused("total_cap"), 1);
  // The owner closes one; its place is free at once, without waiting for the periodic sweep.
  {
    MutexLock lock(&mu_);
    close(handed_over_.back());
    handed_over_.pop_back();
  }
  RawConnection next(port());
  EXPECT_TRUE(Eventually([&] { return NumHandedOver() == 3; }));
  EXPECT_EQ(Refused("total_cap"), 1);
  EXPECT_EQ(loop_->num_connections(), 3u);
}

TEST_F(AcceptLoopTest, CapsOnePeer) {
  AcceptLoop::Options options;
  options.max_connections_per_peer = 2;
  Start(options);
  RawConnection a(port()), b(port());
  ASSERT_TRUE(Eventually([&] { return NumHandedOver() == 2; }));
  EXPECT_TRUE(RawConnection(port()).WaitForClose(absl::Seconds(60)));
  EXPECT_EQ(Refused("peer_cap"), 1);
  CloseAll();
  RawConnection c(port());
  EXPECT_TRUE(Eventually([&] { return NumHandedOver() == 1; }));
}

TEST_F(AcceptLoopTest, ForgetsClosedConnectionsWithinASecond) {
  Start({});
  RawConnection a(port()), b(port());
  ASSERT_TRUE(Eventually([&] { return loop_->num_connections() == 2; }));
  CloseAll();
  EXPECT_TRUE(Eventually([&] { return loop_->num_connections() == 0; }));
  EXPECT_EQ(metrics_.Value("pagetide_rpc_connections_open"), 0);
}

TEST_F(AcceptLoopTest, KeepsDescriptorsInReserve) {
  AcceptLoop::Options options;
  options.reserved_descriptors = DescriptorLimit() - 2;
  Start(options);
  RawConnection a(port()), b(port());
  ASSERT_TRUE(Eventually([&] { return NumHandedOver() == 2; }));
  EXPECT_TRUE(RawConnection(port()).WaitForClose(absl::Seconds(60)));
  EXPECT_EQ(Refused("total_cap"), 1);
}

TEST_F(AcceptLoopTest, ReplacesOnlyDeadUnixSockets) {
  TempDir dir;
  const std::string path = dir.path() + "/s";
  const std::string address = "unix:" + path;
  const auto create = [&] {
    return AcceptLoop::Create({}, {*ListenAddress::Parse(address)}, &metrics_).status();
  };
  Start({}, address);
  EXPECT_EQ(create().code(), absl::StatusCode::kFailedPrecondition) << "a live one is left alone";
  loop_.reset();
  EXPECT_NE(access(path.c_str(), F_OK), 0);

  sockaddr_storage sa{};
  const socklen_t size = ListenAddress::Parse(address)->ToSockaddr(&sa);
  const int dead = socket(AF_UNIX, SOCK_STREAM, 0);
  ASSERT_EQ(bind(dead, reinterpret_cast<sockaddr*>(&sa), size), 0);
  close(dead);
  EXPECT_TRUE(create().ok()) << "the socket of a dead process is replaced";

  close(open(path.c_str(), O_CREAT | O_WRONLY, 0600));
  EXPECT_EQ(create().code(), absl::StatusCode::kFailedPrecondition) << "a file is never removed";
  EXPECT_EQ(access(path.c_str(), F_OK), 0);
}

// The server's side of the flood, in a process of its own because the limit of descriptors is one.
// Writes its port to `port_fd`, serves until `stop_fd` ends.
[[noreturn]] void ServeWithFewDescriptors(int port_fd, int stop_fd) {
  const rlimit limit{64, 64};
  setrlimit(RLIMIT_NOFILE, &limit);
  EchoServiceImpl echo;
  RpcServer::Options options;
  options.accept.reserved_descriptors = 0;  // so that descriptors run out before the cap is reached
  options.metrics_address.clear();
  auto metrics = std::make_shared<PrometheusMetrics>();
  auto server = RpcServer::Create(options, {&echo}, metrics);
  if (!server.ok()) _exit(2);
  const int port = (*server)->port();
  if (write(port_fd, &port, sizeof(port)) != sizeof(port)) _exit(3);
  char byte;
  while (read(stop_fd, &byte, 1) > 0) {
  }
  // The test is worth nothing if descriptors never ran out.
  double refused = 0;
  for (const MetricSample& s : metrics->Snapshot()) {
    if (s.name == "pagetide_rpc_connections_refused_total" &&
        s.labels == MetricLabels{{"reason", "descriptors"}}) {
      refused = s.value;
    }
  }
  (*server)->Drain(absl::Seconds(1));
  _exit(refused > 0 ? 0 : 4);
}

TEST(DescriptorFloodTest, ServerAcceptsAgainAfterIdleConnectionsUsedUpAllDescriptors) {
  int port_pipe[2], stop_pipe[2];
  ASSERT_EQ(pipe2(port_pipe, O_CLOEXEC), 0);
  ASSERT_EQ(pipe2(stop_pipe, O_CLOEXEC), 0);
  const pid_t child = fork();  // before this process has any gRPC thread
  ASSERT_GE(child, 0);
  if (child == 0) {
    close(stop_pipe[1]);
    ServeWithFewDescriptors(port_pipe[1], stop_pipe[0]);
  }
  close(port_pipe[1]);
  close(stop_pipe[0]);
  int port = 0;
  ASSERT_EQ(read(port_pipe[0], &port, sizeof(port)), static_cast<ssize_t>(sizeof(port)));

  const auto echo = [port] {
    ChannelOptions options;
    options.own_connection = true;
    auto stub =
        test::EchoService::NewStub(MakeChannel("127.0.0.1:" + std::to_string(port), options));
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(2));
    test::EchoRequest request;
    test::EchoResponse response;
    return stub->Echo(&context, request, &response).ok();
  };
  EXPECT_TRUE(Eventually(echo));
  for (int round = 0; round < 3; ++round) {
    std::vector<RawConnection> idle;
    for (int i = 0; i < 200; ++i) idle.emplace_back(port);
    EXPECT_FALSE(echo()) << "descriptors were not used up in round " << round;
    idle.clear();
    EXPECT_TRUE(Eventually(echo)) << "dead after round " << round;
  }
  close(stop_pipe[1]);
  int wait_status = 0;
  ASSERT_EQ(waitpid(child, &wait_status, 0), child);
  ASSERT_TRUE(WIFEXITED(wait_status)) << "killed by signal " << WTERMSIG(wait_status);
  EXPECT_EQ(WEXITSTATUS(wait_status), 0) << "4: descriptors never ran out in the server";
}

TEST(ConnectionStormTest, ManyConnectionsAtOnceLeaveTheServerAlive) {
  TuneProcess();
  EchoServiceImpl echo;
  auto server = RpcServer::Create({}, {&echo}, std::make_shared<PrometheusMetrics>());
  ASSERT_TRUE(server.ok()) << server.status();
  for (int round = 0; round < 2; ++round) {
    std::vector<RawConnection> storm;
    for (int i = 0; i < 2000; ++i) storm.emplace_back((*server)->port());
  }
  auto stub = test::EchoService::NewStub(MakeChannel((*server)->addresses()[0]));
  EXPECT_TRUE(Eventually([&] {
    grpc::ClientContext context;
    context.set_deadline(std::chrono::system_clock::now() + std::chrono::seconds(2));
    test::EchoRequest request;
    test::EchoResponse response;
    return stub->Echo(&context, request, &response).ok();
  }));
}

TEST(HandshakeTest, SilentConnectionsAreCutOff) {
  EchoServiceImpl echo;
  RpcServer::Options options;
  options.handshake_timeout = absl::Milliseconds(300);
  auto server = RpcServer::Create(options, {&echo}, std::make_shared<PrometheusMetrics>());
  ASSERT_TRUE(server.ok()) << server.status();
  RawConnection silent((*server)->port());
  EXPECT_TRUE(silent.WaitForClose(absl::Seconds(60)));
  RawConnection rude((*server)->port());
  EXPECT_TRUE(rude.Send("GET / HTTP/1.1\r\nHost: x\r\n\r\n"));
  EXPECT_TRUE(rude.WaitForClose(absl::Seconds(60)));
}

}  // namespace
}  // namespace pagetide
