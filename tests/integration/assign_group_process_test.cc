// AssignGroup of a real pagetide-router over two groups of two real pagetide-workers, with a real
// store for the models. Ranks of one engine are killed and come back.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <map>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "tests/services/router_fixture.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using testing::CallWithDeadline;
using testing::ChildProcess;
using testing::Eventually;
using ::testing::HasSubstr;
using testing::kTestPageTokens;
using testing::TestPrompt;
using testing::TestShardSpec;
using testing::WorkerClient;
using Stub = v1::RouterService::Stub;

class AssignGroupProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    // At socket files: a TCP port could be another's by the time a worker starts again.
    store_ = Start("pagetide-store", {"--listen", absl::StrCat("unix:", dir_ / "store.sock"),
                                      "--data-dir", dir_ / "store", "--min-free", "1MiB"});
    ASSERT_NE(store_, nullptr);
    router_ = Start("pagetide-router",
                    {"--listen", absl::StrCat("unix:", dir_ / "router.sock"),
                     "--heartbeat-milliseconds", "100", "--store", store_->Address("grpc")});
    ASSERT_NE(router_, nullptr);
    stub_ = v1::RouterService::NewStub(MakeChannel(router_->Address("grpc")));
    for (uint32_t rank = 0; rank < 2; ++rank) {
      v1::RegisterModelRequest request;
      *request.mutable_spec() = TestShardSpec(rank, 2);
      v1::RegisterModelResponse response;
      absl::Status status;
      ASSERT_TRUE(Eventually([&] {
        status = CallWithDeadline(stub_.get(), &Stub::RegisterModel, request, &response);
        return status.ok();
      })) << status;
      auto model = ModelFromProto(response.model().spec());
      ASSERT_TRUE(model.ok()) << model.status();
      models_.push_back(std::make_shared<const Model>(*std::move(model)));
    }
  }

  std::unique_ptr<ChildProcess> Start(const std::string& program,
                                      const std::vector<std::string>& args) {
    auto process = ChildProcess::Start({.program = program, .args = args});
    EXPECT_TRUE(process.ok()) << process.status();
    return process.ok() ? *std::move(process) : nullptr;
  }

  // Worker "GROUP-RANK". What it computes stays in its frames: the router's map then has what each
  // rank knows by itself.
  void StartWorker(const std::string& group, uint32_t rank) {
    const std::string id = absl::StrCat(group, "-", rank);
    workers_[id] = Start("pagetide-worker",
                         {"--listen", absl::StrCat("unix:", dir_ / absl::StrCat(id, ".sock")),
                          "--worker-id", id, "--store", store_->Address("grpc"), "--router",
                          router_->Address("grpc"), "--write-through=false", "--pool-bytes=1MiB",
                          "--shard-group", group, "--shard-rank", absl::StrCat(rank)});
    ASSERT_NE(workers_[id], nullptr);
    addresses_[id] = workers_[id]->Address("grpc");
  }

  void StartGroups() {
    for (const char* group : {"a", "b"}) {
      for (uint32_t rank = 0; rank < 2; ++rank) StartWorker(group, rank);
    }
    ASSERT_TRUE(Eventually([&] { return NumEligible() == 2; })) << status_;
  }

  // Computes so many leading pages of the prompt on a worker.
  void Fill(const std::string& group, uint32_t rank, uint32_t num_pages) {
    WorkerClient client(addresses_[absl::StrCat(group, "-", rank)], models_[rank]);
    const auto open = client.Open(tokens_);
    ASSERT_TRUE(open.ok()) << open.status();
    const auto appended =
        client.Append(open->state(), tokens_, size_t{num_pages} * kTestPageTokens);
    ASSERT_TRUE(appended.ok()) << appended.status();
    ASSERT_TRUE(client.Close(appended->state()).ok());
  }

  v1::AssignGroupRequest Request() const {
    v1::AssignGroupRequest request;
    *request.mutable_prompt() = TestPrompt("", tokens_);
    for (const auto& model : models_) request.add_rank_models(model->digest().ToHex());
    return request;
  }
  absl::Status Assign(const v1::AssignGroupRequest& request) {
    status_ = CallWithDeadline(stub_.get(), &Stub::AssignGroup, request, &response_);
    return status_;
  }
  int NumEligible() {
    if (!Assign(Request()).ok()) return 0;
    int count = 0;
    for (const auto& group : response_.candidates()) count += group.candidate().eligible();
    return count;
  }
  const v1::Candidate* Candidate(const std::string& group) const {
    for (const auto& candidate : response_.candidates()) {
      if (candidate.shard_group() == group) return &candidate.candidate();
    }
    return nullptr;
  }

  const std::vector<uint32_t> tokens_ = testing::TestTokens(50 * kTestPageTokens);
  testing::TempDir dir_;
  std::unique_ptr<ChildProcess> store_, router_;
  std::unique_ptr<Stub> stub_;
  std::vector<std::shared_ptr<const Model>> models_;  // of the ranks; shared with clients
  std::map<std::string, std::unique_ptr<ChildProcess>> workers_;
  std::map<std::string, std::string> addresses_;
  v1::AssignGroupResponse response_;
  absl::Status status_;
};

TEST_F(AssignGroupProcessTest, PrefersWhatBothRanksKnowAndSurvivesAKilledRank) {
  StartGroups();
  Fill("a", 0, 49);
  Fill("a", 1, 49);
  Fill("b", 0, 50);
  ASSERT_TRUE(Eventually([&] {
    return Assign(Request()).ok() && response_.shard_group() == "a" &&
           Candidate("a")->device_tokens() == 49 * kTestPageTokens;
  })) << status_
      << response_.ShortDebugString();
  ASSERT_EQ(response_.ranks_size(), 2);
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const auto& answered = response_.ranks(static_cast<int>(rank));
    const std::string id = absl::StrCat("a-", rank);
    EXPECT_EQ(answered.rank(), rank);
    EXPECT_EQ(answered.worker_id(), id);
    EXPECT_EQ(answered.address(), addresses_[id]);
    EXPECT_EQ(answered.model_digest(), models_[rank]->digest().ToHex());
  }
  ASSERT_EQ(response_.candidates_size(), 2);
  // Rank 0 of the other group knows more than both of these, for nothing.
  EXPECT_EQ(response_.candidates(1).shard_group(), "b");
  EXPECT_EQ(response_.candidates(1).limiting_rank(), 1u);
  EXPECT_EQ(Candidate("b")->compute_tokens(), tokens_.size());

  // The answer opens: each rank has what was promised.
  for (const auto& rank : response_.ranks()) {
    WorkerClient client(rank.address(), models_[rank.rank()]);
    const auto open = client.Open(tokens_);
    ASSERT_TRUE(open.ok()) << open.status();
    EXPECT_EQ(open->state().length(), 49 * kTestPageTokens);
  }

  v1::AssignGroupRequest named = Request();
  named.set_request_id("r1");
  ASSERT_TRUE(Assign(named).ok());
  const v1::AssignGroupResponse first = response_;
  ASSERT_TRUE(Assign(named).ok());
  EXPECT_EQ(response_.SerializeAsString(), first.SerializeAsString());

  workers_["a-1"]->Kill();
  ASSERT_TRUE(Eventually([&] { return Assign(Request()).ok() && response_.shard_group() == "b"; }))
      << status_;
  ASSERT_NE(Candidate("a"), nullptr);
  EXPECT_FALSE(Candidate("a")->eligible());
  EXPECT_EQ(Candidate("a")->ineligible_because(), "rank 1: a-1 dead");
  ASSERT_TRUE(Assign(named).ok());  // not to the group that is gone
  EXPECT_EQ(response_.shard_group(), "b");

  workers_["b-0"]->Kill();
  ASSERT_TRUE(Eventually([&] { return !Assign(Request()).ok(); }));
  EXPECT_EQ(status_.code(), absl::StatusCode::kUnavailable);
  EXPECT_EQ(GetReason(status_), error_reason::kNoShardGroup);
  EXPECT_THAT(std::string(status_.message()), HasSubstr("a (rank 1: a-1 dead)"));
  EXPECT_THAT(std::string(status_.message()), HasSubstr("b (rank 0: b-0 dead)"));

  StartWorker("a", 1);
  ASSERT_TRUE(Eventually([&] { return Assign(Request()).ok(); })) << status_;
  EXPECT_EQ(response_.shard_group(), "a");
  EXPECT_EQ(Candidate("a")->compute_tokens(), tokens_.size());  // what it knew went with it
  EXPECT_EQ(response_.candidates(0).limiting_rank(), 1u);
  StartWorker("b", 0);
  EXPECT_TRUE(Eventually([&] { return NumEligible() == 2; })) << status_;
}

TEST_F(AssignGroupProcessTest, AnswersThroughAChangeOfRouterAndAStopOfOneRank) {
  StartGroups();
  // A rank that is stopped in good order takes its group out of service, too.
  EXPECT_EQ(workers_["b-1"]->Terminate().value_or(-1), 0);
  ASSERT_TRUE(Eventually([&] {
    return Assign(Request()).ok() && Candidate("b") != nullptr && !Candidate("b")->eligible();
  })) << status_;
  EXPECT_THAT(Candidate("b")->ineligible_because(), HasSubstr("rank 1: b-1 "));
  // A router that starts again learns the groups from their workers.
  router_->Kill();
  router_ = Start("pagetide-router", {"--listen", absl::StrCat("unix:", dir_ / "router.sock"),
                                      "--store", store_->Address("grpc")});
  ASSERT_NE(router_, nullptr);
  ASSERT_TRUE(Eventually([&] { return Assign(Request()).ok(); })) << status_;
  EXPECT_EQ(response_.shard_group(), "a");
  // Another process that claims a rank which is served.
  workers_["twin"] =
      Start("pagetide-worker", {"--listen", absl::StrCat("unix:", dir_ / "twin.sock"),
                                "--worker-id", "twin", "--store", store_->Address("grpc"),
                                "--router", router_->Address("grpc"), "--shard-group", "a"});
  ASSERT_NE(workers_["twin"], nullptr);
  EXPECT_TRUE(Eventually([&] {
    return absl::StrContains(Assign(Request()).message(),
                             "a (rank 0: two live workers, a-0 and twin)");
  })) << status_;
}

TEST_F(AssignGroupProcessTest, BadInputsAreRefusedByWorkerAndRouter) {
  const auto fails = [&](const std::vector<std::string>& args, const char* message) {
    const auto process = ChildProcess::Start({.program = "pagetide-worker", .args = args});
    EXPECT_FALSE(process.ok());
    EXPECT_THAT(std::string(process.status().message()), HasSubstr(message));
  };
  fails({"--shard-rank", "1"}, "shard_rank is 1 without a shard_group");
  fails({"--shard-group", "a", "--shard-rank", "64"}, "shard_rank is 64, must be 0 to 63");
  fails({"--shard-group", "Not A Name"}, "shard_group has 10 characters");

  v1::AssignGroupRequest request = Request();
  request.mutable_rank_models()->SwapElements(0, 1);
  EXPECT_EQ(Assign(request).code(), absl::StatusCode::kInvalidArgument);
  EXPECT_THAT(std::string(status_.message()), HasSubstr("rank_models[0] is the shard of rank 1"));
  request.mutable_rank_models()->RemoveLast();
  EXPECT_EQ(Assign(request).code(), absl::StatusCode::kInvalidArgument);
  request = Request();
  request.set_rank_models(1, "nobody");
  EXPECT_EQ(GetReason(Assign(request)), error_reason::kModelNotFound);
  EXPECT_EQ(GetReason(Assign(Request())), error_reason::kNoShardGroup);
}

}  // namespace
}  // namespace pagetide
