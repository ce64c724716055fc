// Real pagetide-router and pagetide-store processes; workers are links of this process.
#include <fstream>
#include <memory>
#include <string>
#include <vector>

#include "base/error_info.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "tests/services/router_fixture.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "worker/report_journal.h"
#include "worker/router_link.h"

namespace pagetide {
namespace {

using testing::CallWithDeadline;
using testing::ChildProcess;
using testing::Eventually;
using ::testing::HasSubstr;
using testing::Promised;
using testing::TestHello;
using testing::TestKeys;
using testing::TestLoad;
using testing::TestModelSpec;
using testing::TestPrompt;
using testing::TestTokens;
using Stub = v1::RouterService::Stub;

class RouterProcessTest : public ::testing::Test {
 protected:
  std::unique_ptr<ChildProcess> Start(const std::string& program,
                                      const std::vector<std::string>& args) {
    auto process = ChildProcess::Start({.program = program, .args = args});
    EXPECT_TRUE(process.ok()) << process.status();
    return process.ok() ? *std::move(process) : nullptr;
  }

  // Both at socket files: a TCP port could be another's by the time they start again.
  void StartStore() {
    store_ = Start("pagetide-store", {"--listen", absl::StrCat("unix:", dir_ / "store.sock"),
                                      "--data-dir", dir_ / "store", "--min-free", "1MiB"});
    ASSERT_NE(store_, nullptr);
  }

  void StartRouter() {
    router_ = Start("pagetide-router",
                    {"--listen", absl::StrCat("unix:", dir_ / "router.sock"),
                     "--heartbeat-milliseconds", "100", "--store", store_->Address("grpc")});
    ASSERT_NE(router_, nullptr);
    address_ = router_->Address("grpc");
    stub_ = v1::RouterService::NewStub(MakeChannel(address_));
  }

  v1::Model Register() {
    v1::RegisterModelRequest request;
    *request.mutable_spec() = TestModelSpec();
    v1::RegisterModelResponse response;
    absl::Status status;
    EXPECT_TRUE(Eventually([&] {
      status = CallWithDeadline(stub_.get(), &Stub::RegisterModel, request, &response);
      return status.ok();
    })) << status;
    return response.model();
  }

  absl::Status Explain(const std::vector<uint32_t>& tokens,
                       v1::ExplainPlacementResponse* response) {
    v1::ExplainPlacementRequest request;
    *request.mutable_prompt() = TestPrompt("tiny", tokens);
    return CallWithDeadline(stub_.get(), &Stub::ExplainPlacement, request, response);
  }

  std::unique_ptr<RouterLink> Link(const std::string& id, uint64_t incarnation,
                                   ReportJournal* journal, const std::string& digest) {
    RouterLink::Options options{.router_address = address_, .hello = TestHello(id, incarnation)};
    options.initial_backoff = absl::Milliseconds(20);
    options.max_backoff = absl::Milliseconds(200);
    return std::make_unique<RouterLink>(options, MakeChannel(address_), journal,
                                        [digest] { return TestLoad(digest); });
  }

  testing::TempDir dir_;
  std::unique_ptr<ChildProcess> store_, router_;
  std::string address_;
  std::unique_ptr<Stub> stub_;
};

TEST_F(RouterProcessTest, ModelsAndResidencySurviveAKilledRouter) {
  StartStore();
  StartRouter();
  const v1::Model model = Register();
  const auto tokens = TestTokens(100);
  ReportJournal journal;
  for (const PrefixKey& key : TestKeys(*ModelFromProto(model.spec()), tokens)) {
    journal.OnResidencyChange(PrefixHint::Of(key), 0, Tier::kDevice, false, 1024);
  }
  const auto link = Link("w1", 1, &journal, model.model_digest());
  v1::ExplainPlacementResponse explained;
  const auto is_rebuilt = [&] {
    return Explain(tokens, &explained).ok() && explained.candidates_size() == 1 &&
           explained.candidates(0).device_tokens() == 96;
  };
  ASSERT_TRUE(Eventually(is_rebuilt));
  for (int i = 0; i < 3; ++i) {
    router_->Kill();
    const absl::Time killed = absl::Now();
    StartRouter();
    ASSERT_TRUE(Eventually(is_rebuilt)) << explained.ShortDebugString();
    EXPECT_LT(absl::Now() - killed, Promised(absl::Seconds(5)));  // P5, clients back
  }
}

TEST_F(RouterProcessTest, AKilledStoreTakesItsResidencyAlongAndComesBack) {
  StartStore();
  StartRouter();
  Register();
  const auto has_store = [&](const std::string& state) {
    v1::GetWorkerRequest request;
    request.set_worker_id("store");
    v1::GetWorkerResponse response;
    return CallWithDeadline(stub_.get(), &Stub::GetWorker, request, &response).ok() &&
           response.worker().state() == state;
  };
  ASSERT_TRUE(Eventually([&] { return has_store("serving"); }));
  store_->Kill();
  ASSERT_TRUE(Eventually([&] { return has_store("dead"); }));
  // Decisions go on; what needs the store says so.
  v1::ExplainPlacementResponse explained;
  EXPECT_TRUE(Explain(TestTokens(40), &explained).ok());
  v1::RegisterModelRequest request;
  *request.mutable_spec() = TestModelSpec("other", 'o');
  v1::RegisterModelResponse registered;
  EXPECT_EQ(CallWithDeadline(stub_.get(), &Stub::RegisterModel, request, &registered).code(),
            absl::StatusCode::kUnavailable);
  StartStore();
  EXPECT_TRUE(Eventually([&] { return has_store("serving"); }));
  EXPECT_EQ(router_->Terminate().value_or(-1), 0);
}

TEST_F(RouterProcessTest, AStoreThatHangsIsTakenForDeadUntilItGoesOn) {
  StartStore();
  StartRouter();
  v1::GetWorkerRequest request;
  request.set_worker_id("store");
  v1::GetWorkerResponse response;
  const auto has_store = [&](const std::string& state) {
    return CallWithDeadline(stub_.get(), &Stub::GetWorker, request, &response).ok() &&
           response.worker().state() == state;
  };
  ASSERT_TRUE(Eventually([&] { return has_store("serving"); }));
  // Idle, it gives signs of life.
  ASSERT_TRUE(Eventually(
      [&] { return has_store("serving") && response.worker().since_heartbeat().seconds() < 3; }));
  store_->Stop();
  EXPECT_TRUE(Eventually([&] { return has_store("dead"); }));
  store_->Continue();
  EXPECT_TRUE(Eventually([&] { return has_store("serving"); }));
}

TEST_F(RouterProcessTest, AStoppedWorkersPlaceIsTakenByAnother) {
  StartStore();
  StartRouter();
  const v1::Model model = Register();
  const auto tokens = TestTokens(100);
  ReportJournal held, empty;
  for (const PrefixKey& key : TestKeys(*ModelFromProto(model.spec()), tokens)) {
    held.OnResidencyChange(PrefixHint::Of(key), 0, Tier::kDevice, false, 1024);
  }
  auto w1 = Link("w1", 1, &held, model.model_digest());
  const auto w2 = Link("w2", 2, &empty, model.model_digest());
  v1::AssignSequenceRequest request;
  *request.mutable_prompt() = TestPrompt("tiny", tokens);
  v1::AssignSequenceResponse response;
  const auto goes_to = [&](const std::string& worker) {
    return CallWithDeadline(stub_.get(), &Stub::AssignSequence, request, &response).ok() &&
           response.worker_id() == worker;
  };
  ASSERT_TRUE(Eventually([&] { return goes_to("w1") && response.chosen().device_tokens() == 96; }));
  w1.reset();
  EXPECT_TRUE(Eventually([&] { return goes_to("w2"); }));
}

TEST_F(RouterProcessTest, DrainsOnSigtermWithWorkersAttached) {
  StartStore();
  StartRouter();
  ReportJournal journal;
  const auto link = Link("w1", 1, &journal, "");
  ASSERT_TRUE(Eventually([&] { return link->is_attached(); }));
  const auto code = router_->Terminate();
  ASSERT_TRUE(code.ok()) << code.status();
  EXPECT_EQ(*code, 0);
}

TEST_F(RouterProcessTest, RefusesWhatItCannotServe) {
  const auto fails = [&](const std::vector<std::string>& args, const char* message) {
    const auto process = ChildProcess::Start({.program = "pagetide-router", .args = args});
    EXPECT_FALSE(process.ok());
    EXPECT_THAT(std::string(process.status().message()), HasSubstr(message));
  };
  fails({"--listen", "0.0.0.0:0"}, "--deployment-secret-file");
  fails({"--listen", "127.0.0.1:0", "--deployment-secret-file", dir_ / "absent"},
        "read deployment secret");
  const std::string secret = dir_ / "secret";
  std::ofstream(secret) << "short\n";
  fails({"--listen", "127.0.0.1:0", "--deployment-secret-file", secret}, "has 5 bytes");
  std::ofstream(secret) << "a secret that is long enough\n";
  fails({"--listen", "0.0.0.0:0", "--deployment-secret-file", secret}, "--insecure");
  fails({"--listen", "127.0.0.1:0", "--policy", "coin"}, "coin");
  fails({"--listen", "127.0.0.1:0", "--no-such-flag", "1"}, "--no-such-flag");
}

}  // namespace
}  // namespace pagetide
