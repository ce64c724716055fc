// AssignGroup over real gRPC on loopback, with the memory store: models, groups, bad inputs.
#include <deque>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"
#include "kvstore/memory_page_store.h"
#include "pagetide/v1/admin.grpc.pb.h"
#include "services/router_role.h"
#include "tests/services/router_fixture.h"

namespace pagetide {
namespace {

using absl::StatusCode;
using testing::CallWithDeadline;
using testing::Eventually;
using testing::HandWorker;
using ::testing::HasSubstr;
using testing::TestHello;
using testing::TestKeys;
using testing::TestLoad;
using testing::TestModelSpec;
using testing::TestPrompt;
using testing::TestShardSpec;
using testing::TestTokens;
using Stub = v1::RouterService::Stub;

class AssignGroupTest : public ::testing::Test {
 protected:
  AssignGroupTest() {
    RouterRole::Options options;
    options.server.metrics_address = "";
    options.deployment_secret = std::string(kDevelopmentSecret);
    auto role = RouterRole::Start(std::move(options), &store_, &clock_);
    EXPECT_TRUE(role.ok()) << role.status();
    role_ = *std::move(role);
    stub_ = v1::RouterService::NewStub(MakeChannel(role_->address()));
    for (uint32_t rank = 0; rank < 2; ++rank) models_.push_back(Register(TestShardSpec(rank, 2)));
  }

  v1::Model Register(const v1::ModelSpec& spec) {
    v1::RegisterModelRequest request;
    *request.mutable_spec() = spec;
    v1::RegisterModelResponse response;
    const absl::Status status =
        CallWithDeadline(stub_.get(), &Stub::RegisterModel, request, &response);
    EXPECT_TRUE(status.ok()) << status;
    return response.model();
  }

  // A worker with its rank's model; `num_pages` of the test prompt are on its device.
  HandWorker& Serve(const std::string& group, uint32_t rank, size_t num_pages = 0) {
    const std::string id = absl::StrCat(group, "-", rank);
    HandWorker& worker = *workers_.emplace_back(std::make_unique<HandWorker>(role_->address()));
    v1::AttachHello hello = TestHello(id, ++incarnation_);
    hello.set_address(id + ":1");
    hello.set_local_socket(absl::StrCat("/run/", id));
    hello.set_shard_group(group);
    hello.set_shard_rank(rank);
    EXPECT_TRUE(worker.Hello(hello) && worker.Load(TestLoad(models_[rank].model_digest())));
    auto keys = TestKeys(*ModelFromProto(models_[rank].spec()), tokens_);
    keys.resize(num_pages);
    EXPECT_TRUE(worker.Residency(worker.Report(1, keys)));
    EXPECT_TRUE(Eventually([&] {
      const v1::WorkerInfo info = Worker(id);
      return info.total_frames() > 0 && info.resident_pages() == num_pages;
    })) << id;
    return worker;
  }

  v1::WorkerInfo Worker(const std::string& id) {
    v1::GetWorkerRequest request;
    request.set_worker_id(id);
    v1::GetWorkerResponse response;
    CallWithDeadline(stub_.get(), &Stub::GetWorker, request, &response).IgnoreError();
    return response.worker();
  }

  v1::AssignGroupRequest Request(const std::string& request_id = "") {
    v1::AssignGroupRequest request;
    request.set_request_id(request_id);
    *request.mutable_prompt() = TestPrompt("", tokens_);
    for (const v1::Model& model : models_) request.add_rank_models(model.model_digest());
    return request;
  }
  absl::Status Assign(const v1::AssignGroupRequest& request, v1::AssignGroupResponse* response) {
    return CallWithDeadline(stub_.get(), &Stub::AssignGroup, request, response);
  }

  const std::vector<uint32_t> tokens_ = TestTokens(100);
  FakeClock clock_;  // hand-made workers send no heartbeats
  MemoryPageStore store_{{.clock = &clock_}};
  std::unique_ptr<RouterRole> role_;
  std::unique_ptr<Stub> stub_;
  std::vector<v1::Model> models_;
  std::deque<std::unique_ptr<HandWorker>> workers_;
  uint64_t incarnation_ = 0;
};

TEST_F(AssignGroupTest, AnswersTheGroupWhoseRanksAllKnowThePrefix) {
  Serve("all", 0, 3);
  Serve("all", 1, 4);
  Serve("one", 0, 6);
  Serve("one", 1, 0);
  v1::AssignGroupRequest request = Request();
  v1::AssignGroupResponse response;
  const absl::Status status = Assign(request, &response);
  ASSERT_TRUE(status.ok()) << status;
  EXPECT_EQ(response.shard_group(), "all");
  EXPECT_FALSE(response.assignment_id().empty());
  ASSERT_EQ(response.ranks_size(), 2);
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const auto& answered = response.ranks(static_cast<int>(rank));
    EXPECT_EQ(answered.rank(), rank);
    EXPECT_EQ(answered.worker_id(), absl::StrCat("all-", rank));
    EXPECT_EQ(answered.address(), absl::StrCat("all-", rank, ":1"));
    EXPECT_EQ(answered.local_socket(), absl::StrCat("/run/all-", rank));
    EXPECT_EQ(answered.model_digest(), models_[rank].model_digest());
  }
  ASSERT_EQ(response.candidates_size(), 2);
  const v1::GroupCandidate& chosen = response.candidates(0);
  EXPECT_EQ(chosen.shard_group(), "all");
  EXPECT_TRUE(chosen.candidate().eligible());
  EXPECT_TRUE(chosen.candidate().worker_id().empty());
  EXPECT_EQ(chosen.candidate().device_tokens(), 48u);
  EXPECT_EQ(chosen.candidate().compute_tokens(), 52u);
  EXPECT_EQ(chosen.limiting_rank(), 0u);
  EXPECT_EQ(response.candidates(1).shard_group(), "one");
  EXPECT_EQ(response.candidates(1).candidate().compute_tokens(), 100u);
  EXPECT_EQ(response.candidates(1).limiting_rank(), 1u);

  // By name, by keys, sticky and excluded.
  request.set_rank_models(0, "shard-0-of-2");
  request.set_rank_models(1, "shard-1-of-2");
  request.mutable_prompt()->set_model("shard-0-of-2");
  request.mutable_prompt()->clear_tokens();
  request.mutable_prompt()->set_num_tokens(100);
  const auto keys = TestKeys(*ModelFromProto(models_[0].spec()), tokens_);
  for (const PrefixKey& key : keys) {
    request.mutable_prompt()->add_prefix_keys(std::string(key.digest.view()));
  }
  ASSERT_TRUE(Assign(request, &response).ok());
  EXPECT_EQ(response.shard_group(), "all");
  EXPECT_EQ(response.candidates(0).candidate().device_tokens(), 48u);
  request.set_sticky_shard_group("one");
  ASSERT_TRUE(Assign(request, &response).ok());
  EXPECT_EQ(response.shard_group(), "one");
  request.clear_sticky_shard_group();
  request.add_exclude_shard_groups("all");
  ASSERT_TRUE(Assign(request, &response).ok());
  EXPECT_EQ(response.shard_group(), "one");
  EXPECT_EQ(response.candidates(1).candidate().ineligible_because(), "excluded by the caller");

  v1::GetStatsResponse stats;
  const auto admin = v1::AdminService::NewStub(MakeChannel(role_->address()));
  ASSERT_TRUE(CallWithDeadline(admin.get(), &v1::AdminService::Stub::GetStats,
                               v1::GetStatsRequest(), &stats)
                  .ok());
  EXPECT_EQ(stats.values().at("pagetide_router_group_assignments_total{outcome=\"assigned\"}"), 4);
}

TEST_F(AssignGroupTest, AGroupThatLacksARankIsRefusedWithItsReason) {
  v1::AssignGroupResponse response;
  Serve("a", 0);
  const absl::Status refused = Assign(Request(), &response);
  EXPECT_EQ(refused.code(), StatusCode::kUnavailable);
  EXPECT_EQ(GetReason(refused), error_reason::kNoShardGroup);
  EXPECT_TRUE(GetRetryDelay(refused).has_value());
  EXPECT_THAT(std::string(refused.message()), HasSubstr("a (rank 1: no worker)"));
  Serve("a", 1);
  ASSERT_TRUE(Assign(Request(), &response).ok());
  // A second process that claims a rank.
  HandWorker twin(role_->address());
  v1::AttachHello hello = TestHello("twin", 77);
  hello.set_shard_group("a");
  hello.set_shard_rank(1);
  ASSERT_TRUE(twin.Hello(hello));
  ASSERT_TRUE(Eventually([&] { return !Assign(Request(), &response).ok(); }));
  EXPECT_THAT(std::string(Assign(Request(), &response).message()),
              HasSubstr("a (rank 1: two live workers, a-1 and twin)"));
}

TEST_F(AssignGroupTest, TheLongestRefusalFitsIntoItsStatus) {
  const auto long_name = [](const std::string& start) {
    return start + std::string(127 - start.size(), 'x') + "z";
  };
  v1::AssignGroupRequest request;
  *request.mutable_prompt() = TestPrompt("", tokens_);
  for (uint32_t rank = 0; rank < 64; ++rank) {
    request.add_rank_models(Register(TestShardSpec(rank, 64)).model_digest());
  }
  for (int group = 0; group < 12; ++group) {
    for (uint32_t rank = 0; rank < 4; ++rank) {
      auto worker = std::make_unique<HandWorker>(role_->address());
      const std::string id = long_name(absl::StrCat("w", group, "-", rank, "-"));
      v1::AttachHello hello = TestHello(id, ++incarnation_);
      hello.set_shard_group(long_name(absl::StrCat("g", group, "-")));
      hello.set_shard_rank(rank / 2);  // two of each
      ASSERT_TRUE(worker->Hello(hello));
      workers_.push_back(std::move(worker));
      ASSERT_TRUE(Eventually([&] { return Worker(id).worker_id() == id; }));
    }
  }
  v1::AssignGroupResponse response;
  const absl::Status refused = Assign(request, &response);
  EXPECT_EQ(refused.code(), StatusCode::kUnavailable) << refused;
  EXPECT_EQ(GetReason(refused), error_reason::kNoShardGroup);
  EXPECT_THAT(std::string(refused.message()), HasSubstr("rank 0: two live workers"));
}

TEST_F(AssignGroupTest, ARepeatedRequestIdGivesTheSameAnswer) {
  for (const char* group : {"a", "b"}) {
    for (uint32_t rank = 0; rank < 2; ++rank) Serve(group, rank);
  }
  v1::AssignGroupResponse first, again;
  ASSERT_TRUE(Assign(Request("r1"), &first).ok());
  ASSERT_TRUE(Assign(Request("r1"), &again).ok());
  EXPECT_EQ(first.SerializeAsString(), again.SerializeAsString());
  const std::function<void(v1::AssignGroupRequest&)> others[] = {
      [](v1::AssignGroupRequest& r) {  // another tail behind the same full pages
        r.mutable_prompt()->set_tokens(99, r.prompt().tokens(99) ^ 1);
      },
      [](v1::AssignGroupRequest& r) { r.set_sticky_shard_group("b"); },
      [](v1::AssignGroupRequest& r) { r.add_exclude_shard_groups("c"); },
      [](v1::AssignGroupRequest& r) { r.set_rank_models(0, "shard-0-of-2"); },
  };
  for (const auto& change : others) {
    v1::AssignGroupRequest other = Request("r1");
    change(other);
    const absl::Status refused = Assign(other, &again);
    EXPECT_EQ(refused.code(), StatusCode::kInvalidArgument);
    EXPECT_THAT(std::string(refused.message()), HasSubstr("request_id r1"));
  }
}

TEST_F(AssignGroupTest, BadRequestsAreNamedWithTheirNumbers) {
  Serve("a", 0);
  Serve("a", 1);
  Register(TestModelSpec());
  v1::ModelSpec other = TestShardSpec(1, 2);
  other.set_name("other-weights");
  other.set_weights_digest(std::string(32, 'o'));
  Register(other);
  other = TestShardSpec(1, 2);
  other.set_name("other-pages");
  other.mutable_geometry()->set_page_tokens(32);
  Register(other);
  Register(TestShardSpec(1, 3));
  struct Case {
    std::function<void(v1::AssignGroupRequest&)> spoil;
    const char* message;
    StatusCode code = StatusCode::kInvalidArgument;
  };
  const auto second = [](const std::string& model) {
    return [model](v1::AssignGroupRequest& r) { r.set_rank_models(1, model); };
  };
  const Case cases[] = {
      {[](auto& r) { r.clear_rank_models(); }, "rank_models has 0 entries, 2 to 64 expected"},
      {[](auto& r) { r.mutable_rank_models()->RemoveLast(); }, "rank_models has 1 entries"},
      {[](auto& r) {
         for (int i = 0; i < 63; ++i) r.add_rank_models("shard-1-of-2");
       },
       "rank_models has 65 entries"},
      {second(""), "rank_models[1] is empty"},
      {second("nobody"), "model nobody is not registered", StatusCode::kNotFound},
      {second("shard-0-of-2"), "rank_models[1] is the shard of rank 0"},
      {second("shard-1-of-3"), "rank_models[1] is a shard of num_ranks = 3, 2 models were given"},
      {second("tiny"), "rank_models[1] is a shard of num_ranks = 1"},
      {second("other-weights"), "rank_models[1] has identity "},
      {second("other-pages"), "rank_models[1] has page_tokens = 32, rank 0 has 16"},
      {[](auto& r) { r.mutable_rank_models()->SwapElements(0, 1); },
       "rank_models[0] is the shard of rank 1"},
      {[](auto& r) { r.mutable_prompt()->set_model("shard-1-of-2"); }, "prompt.model is "},
      {[](auto& r) { r.mutable_prompt()->set_model("nobody"); }, "model nobody is not registered",
       StatusCode::kNotFound},
      {[](auto& r) { r.mutable_prompt()->clear_tokens(); }, "neither tokens nor num_tokens"},
      {[](auto& r) { r.mutable_prompt()->set_tokens(3, 1000); }, "prompt.tokens[3]"},
      {[](auto& r) { r.set_request_id(std::string(129, 'r')); }, "request_id has 129 bytes"},
      {[](auto& r) {
         for (int i = 0; i < 1025; ++i) r.add_exclude_shard_groups("b");
       },
       "exclude_shard_groups has 1025 entries, at most 1024"},
      {[](auto& r) {
         r.mutable_prompt()->clear_tokens();
         r.mutable_prompt()->set_num_tokens(~uint64_t{0});
       },
       "at most 1099511627776 tokens"},
  };
  v1::AssignGroupResponse response;
  for (const Case& c : cases) {
    v1::AssignGroupRequest request = Request();
    c.spoil(request);
    const absl::Status status = Assign(request, &response);
    EXPECT_EQ(status.code(), c.code) << c.message;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message));
  }
  EXPECT_TRUE(Assign(Request(), &response).ok());
}

TEST_F(AssignGroupTest, WorkersShowTheirGroupAndBadOnesAreRefused) {
  Serve("a", 1);
  EXPECT_EQ(Worker("a-1").shard_group(), "a");
  EXPECT_EQ(Worker("a-1").shard_rank(), 1u);
  struct Case {
    const char* group;
    uint32_t rank;
    const char* message;
  };
  for (const Case& c : {Case{"No Good", 0, "shard_group"}, Case{"a", 64, "shard_rank = 64"},
                        Case{"", 1, "shard_rank = 1 without a shard_group"}}) {
    HandWorker worker(role_->address());
    v1::AttachHello hello = TestHello("bad", 9);
    hello.set_shard_group(c.group);
    hello.set_shard_rank(c.rank);
    worker.Hello(hello);
    const absl::Status status = FromGrpcStatus(worker.ReadToEnd());
    EXPECT_EQ(status.code(), StatusCode::kInvalidArgument) << c.message;
    EXPECT_THAT(std::string(status.message()), HasSubstr(c.message));
  }
}

TEST_F(AssignGroupTest, AShardIsNotAssignedAloneToAnotherRanksWorker) {
  Serve("a", 0);
  v1::AssignSequenceRequest request;
  *request.mutable_prompt() = TestPrompt("shard-1-of-2", tokens_);
  v1::AssignSequenceResponse response;
  const absl::Status refused =
      CallWithDeadline(stub_.get(), &Stub::AssignSequence, request, &response);
  EXPECT_EQ(GetReason(refused), error_reason::kNoWorker);
  EXPECT_THAT(std::string(refused.message()),
              HasSubstr("a-0 is rank 0 of shard group a, the model is rank 1's"));
  request.mutable_prompt()->set_model("shard-0-of-2");
  ASSERT_TRUE(CallWithDeadline(stub_.get(), &Stub::AssignSequence, request, &response).ok());
  EXPECT_EQ(response.worker_id(), "a-0");
}

}  // namespace
}  // namespace pagetide
