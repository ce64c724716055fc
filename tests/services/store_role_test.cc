// A whole store in this process: what operators see of it.
#include "services/store_role.h"

#include <gmock/gmock.h>
#include <grpcpp/impl/codegen/client_unary_call.h>
#include <gtest/gtest.h>

#include <memory>
#include <string>

#include "grpc/health/v1/health.pb.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "rpc/channel.h"
#include "tests/contract/test_page.h"
#include "tests/fault/faulty_disk.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;
using ::pagetide::testing::TestContext;

class StoreRoleTest : public ::testing::Test {
 protected:
  void SetUp() override {
    StoreRole::Options options;
    options.engine.dir = dir_.path();
    options.engine.file_system = &disk_;
    options.engine.index_env = disk_.env();
    options.state_period = absl::Milliseconds(10);
    auto role = StoreRole::Start(options, Clock::Real());
    ASSERT_TRUE(role.ok()) << role.status();
    role_ = *std::move(role);
  }
  absl::Status Put(uint64_t number) {
    const TestPage page = MakeTestPage(number);
    const PutPage put = page.put();
    return role_->store()
        ->PutPages({&put, 1}, Durability::kLocal, MonotonicTime::InfiniteFuture())[0]
        .status;
  }
  // A metric as the store's AdminService tells it; -1: it is not there.
  double Metric(const std::string& name) {
    TestContext context;
    v1::GetStatsResponse stats;
    const auto admin = v1::AdminService::NewStub(MakeChannel(role_->address()));
    EXPECT_TRUE(admin->GetStats(&context, {}, &stats).ok());
    const auto found = stats.values().find(name);
    return found == stats.values().end() ? -1 : found->second;
  }
  std::string HealthOf(const std::string& service) {
    TestContext context;
    grpc::health::v1::HealthCheckRequest request;
    request.set_service(service);
    grpc::health::v1::HealthCheckResponse response;
    const auto channel = MakeChannel(role_->address());
    const grpc::Status status = grpc::internal::BlockingUnaryCall(
        channel.get(),
        grpc::internal::RpcMethod("/grpc.health.v1.Health/Check",
                                  grpc::internal::RpcMethod::NORMAL_RPC),
        &context, request, &response);
    if (!status.ok()) return status.error_message();
    return grpc::health::v1::HealthCheckResponse::ServingStatus_Name(response.status());
  }

  testing::TempDir dir_;
  FaultyDisk disk_;
  std::unique_ptr<StoreRole> role_;
};

TEST_F(StoreRoleTest, PublishesWhatItHolds) {
  EXPECT_TRUE(Eventually([&] { return Metric("pagetide_store_pages") == 0; }));
  ASSERT_TRUE(Put(1).ok());
  EXPECT_TRUE(Eventually([&] { return Metric("pagetide_store_pages") == 1; }));
  EXPECT_THAT(role_->metrics_address(), ::testing::StartsWith("127.0.0.1:"));
}

TEST_F(StoreRoleTest, TurnsNotServingWhenTheDiskRefusesAWrite) {
  ASSERT_TRUE(Put(1).ok());
  EXPECT_EQ(HealthOf("pagetide.v1.PageStoreService"), "SERVING");
  disk_.set_fail_syncs(true);
  EXPECT_FALSE(Put(2).ok());
  EXPECT_TRUE(
      Eventually([&] { return HealthOf("pagetide.v1.PageStoreService") == "NOT_SERVING"; }));
  EXPECT_EQ(HealthOf(""), "SERVING") << "reads go on";
}

}  // namespace
}  // namespace pagetide
