// Shard groups of real workers: a kill -9 of a member between the appends and the commit leaves the
// group as it was; the group goes on in a new one from what the store has.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "kvstore/remote_page_store.h"
#include "pagetide/v1/shard_group.grpc.pb.h"
#include "rpc/channel.h"
#include "rpc/status_mapping.h"
#include "tests/support/process.h"
#include "tests/support/timing.h"
#include "tests/support/worker_client.h"

namespace pagetide {
namespace {

using ::pagetide::testing::ChildProcess;
using ::pagetide::testing::Eventually;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::RegisterTestModel;
using ::pagetide::testing::TempDir;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::pagetide::testing::WorkerClient;

constexpr uint32_t kRanks = 3;

struct RankProcess {
  std::shared_ptr<const Model> model;
  std::unique_ptr<ChildProcess> process;
  std::unique_ptr<WorkerClient> client;
};

class ShardGroupProcessTest : public ::testing::Test {
 protected:
  void SetUp() override {
    store_process_ = Start("pagetide-store", {absl::StrCat("--data-dir=", dir_ / "data")});
    RemotePageStore store(MakeChannel(store_process_->Address("grpc"), {.own_connection = true}));
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      ModelSpec spec = MakeTestModel().spec();
      spec.geometry.shard = {.kv_head_begin = 2 * rank,
                             .kv_head_end = 2 * rank + 2,
                             .rank = rank,
                             .num_ranks = kRanks};
      ranks_[rank].model = std::make_shared<const Model>(Model::Create(std::move(spec)).value());
      ASSERT_TRUE(RegisterTestModel(*ranks_[rank].model, &store).ok());
      StartRank(rank);
    }
    groups_ = v1::ShardGroupService::NewStub(ranks_[0].client->channel());
  }
  std::unique_ptr<ChildProcess> Start(const std::string& program, std::vector<std::string> args) {
    args.insert(args.end(), {"--listen=127.0.0.1:0", "--metrics-listen=127.0.0.1:0"});
    auto started = ChildProcess::Start({.program = program, .args = args});
    EXPECT_TRUE(started.ok()) << started.status();
    return started.ok() ? *std::move(started) : nullptr;
  }
  void StartRank(uint32_t rank) {
    RankProcess& started = ranks_[rank];
    started.process =
        Start("pagetide-worker",
              {absl::StrCat("--worker-id=rank-", rank),
               absl::StrCat("--store=", store_process_->Address("grpc")), "--pool-bytes=1MiB"});
    started.client =
        std::make_unique<WorkerClient>(started.process->Address("grpc"), started.model);
  }
  absl::StatusOr<v1::OpenShardGroupResponse> Open(const std::vector<uint32_t>& tokens) {
    TestContext context;
    v1::OpenShardGroupRequest request;
    for (const RankProcess& rank : ranks_) {
      v1::ShardMember& member = *request.add_members();
      member.set_address(rank.process->Address("grpc"));
      member.set_model_digest(rank.model->digest().ToHex());
    }
    request.mutable_tokens()->Add(tokens.begin(), tokens.end());
    v1::OpenShardGroupResponse response;
    const absl::Status status =
        FromGrpcStatus(groups_->OpenShardGroup(&context, request, &response));
    if (!status.ok()) return status;
    return response;
  }
  void AppendAll(const v1::ShardGroup& group, const std::vector<uint32_t>& tokens, size_t end) {
    for (uint32_t rank = 0; rank < kRanks; ++rank) {
      const auto state = ranks_[rank].client->Get(group.ranks(rank).state().sequence_id());
      ASSERT_TRUE(state.ok()) << state.status();
      const auto appended = ranks_[rank].client->Append(*state, tokens, end);
      ASSERT_TRUE(appended.ok()) << appended.status();
    }
  }
  absl::Status Commit(const v1::ShardGroup& group, uint64_t length) {
    TestContext context;
    v1::CommitShardGroupRequest request;
    request.set_sequence_id(group.sequence_id());
    request.set_epoch(group.epoch());
    request.set_length(length);
    v1::CommitShardGroupResponse response;
    return FromGrpcStatus(groups_->CommitShardGroup(&context, request, &response));
  }
  v1::ShardGroup Get(const v1::ShardGroup& group) {
    TestContext context;
    v1::GetShardGroupRequest request;
    request.set_sequence_id(group.sequence_id());
    v1::GetShardGroupResponse response;
    const grpc::Status status = groups_->GetShardGroup(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.group();
  }

  TempDir dir_;
  std::unique_ptr<ChildProcess> store_process_;
  RankProcess ranks_[kRanks];
  std::unique_ptr<v1::ShardGroupService::Stub> groups_;
  const std::vector<uint32_t> tokens_ = TestTokens(1, 200);
};

TEST_F(ShardGroupProcessTest, AMemberKilledBeforeTheCommitLeavesTheGroupAsItWas) {
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 70);
  ASSERT_TRUE(Commit(group, 70).ok());
  AppendAll(group, tokens_, 120);
  const std::string address = ranks_[1].process->Address("grpc");
  ranks_[1].process->Kill();
  const absl::Status lost = Commit(group, 120);
  EXPECT_EQ(lost.code(), absl::StatusCode::kUnavailable) << lost;
  EXPECT_TRUE(absl::StrContains(lost.message(), absl::StrCat("rank 1 at ", address))) << lost;
  const v1::ShardGroup now = Get(group);
  EXPECT_EQ(now.length(), 70u);
  ASSERT_EQ(now.ranks_size(), 3);
  EXPECT_EQ(now.ranks(0).code(), 0);
  EXPECT_EQ(now.ranks(1).code(), static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_EQ(now.ranks(2).code(), 0);
  EXPECT_EQ(now.ranks(2).state().length(), 120u) << "ahead, for nobody";

  TestContext context;
  v1::CloseShardGroupRequest close;
  close.set_sequence_id(group.sequence_id());
  close.set_epoch(group.epoch());
  v1::CloseShardGroupResponse closed;
  const grpc::Status status = groups_->CloseShardGroup(&context, close, &closed);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(closed.unreachable_ranks_size(), 1);
  EXPECT_EQ(closed.unreachable_ranks(0), 1u);

  // A new process of that rank knows what its life before put into the store.
  StartRank(1);
  const auto again = Open(tokens_);
  ASSERT_TRUE(again.ok()) << again.status();
  const uint64_t length = again->reused_tokens();
  EXPECT_EQ(length % 16, 0u);
  EXPECT_GE(length, 64u) << "4 full pages were there when the first commit answered";
  for (uint32_t rank = 0; rank < kRanks; ++rank) {
    const std::string& id = again->group().ranks(rank).state().sequence_id();
    ASSERT_TRUE(ranks_[rank].client->WaitReady(id).ok());
    EXPECT_GT(ranks_[rank].client->Verify(id, tokens_, 0, length).value_or(0), 0u) << rank;
  }
  AppendAll(again->group(), tokens_, 200);
  EXPECT_TRUE(Commit(again->group(), 200).ok());
}

// The owner's memory of the group ends with it; the members' sequences are theirs to end.
TEST_F(ShardGroupProcessTest, AGroupEndsWithItsOwner) {
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  ranks_[0].process->Kill();
  StartRank(0);
  groups_ = v1::ShardGroupService::NewStub(ranks_[0].client->channel());
  const absl::Status gone = Commit(opened->group(), 0);
  EXPECT_EQ(GetReason(gone), "SHARD_GROUP_NOT_FOUND") << gone;
  EXPECT_TRUE(ranks_[1].client->Get(opened->group().ranks(1).state().sequence_id()).ok());
  EXPECT_TRUE(Open(tokens_).ok());
}

}  // namespace
}  // namespace pagetide
