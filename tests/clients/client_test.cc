// What the client decides without a worker. Against real workers: tests/integration.
#include "clients/cpp/client.h"

#include <sys/socket.h>
#include <sys/un.h>
#include <unistd.h>

#include <cstring>
#include <string>

#include "clients/cpp/local_staging.h"
#include "clients/cpp/request_id.h"
#include "gtest/gtest.h"
#include "tests/support/timing.h"

namespace pagetide {
namespace {

TEST(ClientOptionsTest, NamesExactlyOneWayIn) {
  EXPECT_EQ(Client::Create({}).status().code(), absl::StatusCode::kInvalidArgument);
  ClientOptions both;
  both.router_address = "127.0.0.1:1";
  both.worker_address = "127.0.0.1:2";
  EXPECT_EQ(Client::Create(both).status().code(), absl::StatusCode::kInvalidArgument);
  both.worker_address.clear();
  EXPECT_TRUE(Client::Create(both).ok());
}

TEST(ClientTest, DeadRouterIsUnavailableWithinTheTimeout) {
  ClientOptions options;
  options.router_address = "127.0.0.1:1";  // the tcpmux port: nobody listens
  options.call.timeout = absl::Milliseconds(300);
  auto client = Client::Create(options).value();
  const absl::Time start = absl::Now();
  const absl::Status status = client->ListWorkers().status();
  EXPECT_TRUE(absl::IsUnavailable(status) || absl::IsDeadlineExceeded(status)) << status;
  EXPECT_LT(absl::Now() - start, testing::Promised(absl::Seconds(5)));
}

TEST(ClientTest, OperationsOfTheRouterNeedOne) {
  ClientOptions options;
  options.worker_address = "127.0.0.1:1";
  auto client = Client::Create(options).value();
  EXPECT_EQ(client->ListWorkers().status().code(), absl::StatusCode::kFailedPrecondition);
  EXPECT_EQ(client->RegisterModel({}).status().code(), absl::StatusCode::kFailedPrecondition);
}

TEST(RequestIdTest, NeverRepeats) {
  EXPECT_EQ(NewRequestId().size(), 32u);
  EXPECT_NE(NewRequestId(), NewRequestId());
}

TEST(LocalStagingTest, NobodyAtTheSocketIsUnavailable) {
  const auto staging = LocalStaging::Connect("/nonexistent/pagetide.sock", 4096, absl::Seconds(1));
  EXPECT_TRUE(absl::IsUnavailable(staging.status())) << staging.status();
  const std::string long_path(200, 'x');
  EXPECT_TRUE(
      absl::IsUnavailable(LocalStaging::Connect(long_path, 4096, absl::Seconds(1)).status()));
}

TEST(LocalStagingTest, WorkerThatNeverAnswersIsGivenUpAfterTheTimeout) {
  char directory[] = "/tmp/pagetide-client-XXXXXX";
  ASSERT_NE(mkdtemp(directory), nullptr);
  const std::string path = std::string(directory) + "/s";
  const int listener = socket(AF_UNIX, SOCK_STREAM, 0);
  sockaddr_un address{};
  address.sun_family = AF_UNIX;
  std::strcpy(address.sun_path, path.c_str());
  ASSERT_EQ(bind(listener, reinterpret_cast<sockaddr*>(&address), sizeof(address)), 0);
  ASSERT_EQ(listen(listener, 1), 0);
  const auto staging = LocalStaging::Connect(path, 4096, absl::Milliseconds(100));
  EXPECT_TRUE(absl::IsDeadlineExceeded(staging.status())) << staging.status();
  close(listener);
  unlink(path.c_str());
  rmdir(directory);
}

}  // namespace
}  // namespace pagetide
