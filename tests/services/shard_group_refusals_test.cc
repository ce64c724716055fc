// What a group is not made of, and bad input.
#include <gtest/gtest.h>

#include <cctype>
#include <functional>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "tests/services/shard_group_fixture.h"
#include "worker/shard_group_owner.h"

namespace pagetide::shard_group_test {
namespace {

class ShardGroupRefusalsTest : public ShardGroupTest {
 protected:
  absl::Status OpenWith(std::function<void(v1::OpenShardGroupRequest&)> change) {
    v1::OpenShardGroupRequest request = OpenRequest(tokens_);
    change(request);
    return Open(request).status();
  }
  // Registers a model and returns its digest.
  std::string Register(const std::shared_ptr<const Model>& model) {
    EXPECT_TRUE(RegisterTestModel(*model, &store_).ok());
    return model->digest().ToHex();
  }
};

TEST_F(ShardGroupRefusalsTest, MembersAreTwoToSixtyFourWithModelsOfTheirOwn) {
  StartRanks(2);
  using Request = v1::OpenShardGroupRequest;
  const std::string digest = ranks_[1]->model->digest().ToHex();
  const auto expect_named = [&](const absl::Status& status, const std::string& what) {
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), what)) << status;
  };
  expect_named(OpenWith([](Request& r) { r.clear_members(); }), "members has 0 entries");
  expect_named(OpenWith([](Request& r) { r.mutable_members()->RemoveLast(); }), "1 entries");
  expect_named(OpenWith([](Request& r) {
                 while (r.members_size() < 65) *r.add_members() = r.members(1);
               }),
               "65 entries, must have 2 to 64");
  expect_named(OpenWith([](Request& r) { *r.add_members() = r.members(1); }),
               "members[2].model_digest is another member's too");
  expect_named(OpenWith([](Request& r) { r.mutable_members(1)->set_address(""); }),
               "members[1].address has 0 bytes");
  expect_named(
      OpenWith([](Request& r) { r.mutable_members(1)->set_address(std::string(100'000, 'a')); }),
      "members[1].address has 100000 bytes");
  expect_named(OpenWith([](Request& r) { r.mutable_members(1)->set_model_digest("no hex"); }),
               "members[1].model_digest");
  expect_named(OpenWith([](Request& r) { r.mutable_members(0)->set_model_digest(""); }),
               "members[0].model_digest");
  // The same in capitals is the same model.
  expect_named(OpenWith([&](Request& r) {
                 std::string upper = r.members(0).model_digest();
                 for (char& c : upper) c = static_cast<char>(std::toupper(c));
                 r.mutable_members(1)->set_model_digest(upper);
               }),
               "members[1].model_digest");
  // Of rank 0 the address does not matter.
  EXPECT_TRUE(OpenWith([](Request& r) { r.mutable_members(0)->set_address(""); }).ok());
  for (const std::string address :
       {"nobody", "127.0.0.1:1", "unix:/nowhere", "://", "unix:", "dns://x/y/z", "a:99999"}) {
    const absl::Status status =
        OpenWith([&](Request& r) { r.mutable_members(1)->set_address(address); });
    EXPECT_FALSE(status.ok()) << address;
    EXPECT_TRUE(absl::StrContains(status.message(), "rank 1 at ")) << address << ": " << status;
  }
  const std::string unknown(64, 'a');
  EXPECT_EQ(
      GetReason(OpenWith([&](Request& r) { r.mutable_members(1)->set_model_digest(unknown); })),
      "MODEL_NOT_FOUND");
  EXPECT_EQ(
      GetReason(OpenWith([&](Request& r) { r.mutable_members(0)->set_model_digest(unknown); })),
      "MODEL_NOT_FOUND");
  v1::LookupShardGroupRequest lookup;
  EXPECT_EQ(Call(&v1::ShardGroupService::Stub::LookupShardGroup, lookup).status().code(),
            absl::StatusCode::kInvalidArgument);
}

TEST_F(ShardGroupRefusalsTest, EachMemberHasItsOwnShardOfOneModel) {
  StartRanks(2);
  using Request = v1::OpenShardGroupRequest;
  const auto expect_mismatch = [&](const absl::Status& status, const std::string& what) {
    EXPECT_EQ(GetReason(status), "SHARD_MISMATCH") << status;
    EXPECT_TRUE(absl::StrContains(status.message(), what)) << status;
    ExpectNothingIsOpen();
  };
  // In the wrong order.
  expect_mismatch(OpenWith([&](Request& r) {
                    r.mutable_members(0)->set_model_digest(ranks_[1]->model->digest().ToHex());
                    r.mutable_members(1)->set_model_digest(ranks_[0]->model->digest().ToHex());
                  }),
                  "members[0] is rank 1 of 2");
  // A rank of a larger group.
  expect_mismatch(OpenWith([&](Request& r) {
                    r.mutable_members(1)->set_model_digest(Register(RankModel(1, 3)));
                  }),
                  "has a model of rank 1 of 3, must be rank 1 of 2");
  Kill(1);
  Start(1, false);
  ranks_[1]->address = ranks_[1]->role->address();
  // Of another model.
  expect_mismatch(OpenWith([&](Request& r) {
                    r.mutable_members(1)->set_model_digest(
                        Register(RankModel(1, 2, false, {.name = "another-model"})));
                  }),
                  "has other weights");
  // With other pages.
  Kill(1);
  Start(1, false);
  ranks_[1]->address = ranks_[1]->role->address();
  expect_mismatch(OpenWith([&](Request& r) {
                    r.mutable_members(1)->set_model_digest(
                        Register(RankModel(1, 2, false, {.page_tokens = 32})));
                  }),
                  "has pages of 32 tokens");
  EXPECT_EQ(Stat("pagetide_shard_group_open"), 0);
}

// Keys under another secret are others: neither its pages nor what it says can be compared.
TEST_F(ShardGroupRefusalsTest, ARankOfAnotherDeploymentIsNoMember) {
  StartRanks(2);
  Kill(1);
  Start(1, false, "another secret of tests");
  ranks_[1]->address = ranks_[1]->role->address();
  for (uint32_t rank = 0; rank < 2; ++rank) Know(rank, tokens_);
  const absl::Status status = Open(tokens_).status();
  EXPECT_EQ(GetReason(status), "SHARD_MISMATCH") << status;
  EXPECT_TRUE(absl::StrContains(status.message(), "deployment secret")) << status;
  ExpectNothingIsOpen();
  // Also where there is nothing to compare yet.
  v1::OpenShardGroupRequest request = OpenRequest(TestTokens(2, 200));
  request.set_no_reuse(true);
  const absl::Status empty = Open(request).status();
  EXPECT_EQ(GetReason(empty), "SHARD_MISMATCH") << empty;
  ExpectNothingIsOpen();
}

TEST_F(ShardGroupRefusalsTest, WhatARankSaysIsCheckedAndCut) {
  StartRanks(2);
  LossyMember member(ranks_[1]->address);
  ranks_[1]->address = member.address();
  member.say_too_much = true;
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  EXPECT_EQ(opened->ranks(1).explanation().size(), 1023u) << "in front of half a character";
  EXPECT_EQ(group.ranks(1).state().worker_id().size(), 255u);
  EXPECT_EQ(group.ranks(1).state().model_digest().size(), 255u);
  EXPECT_LT(opened->ByteSizeLong(), 3000u) << "and nothing that nobody knows";
  // Another's id is none of this rank's.
  member.lie_about_id = true;
  const absl::Status lied = Commit(group, 1).status();
  EXPECT_EQ(lied.code(), absl::StatusCode::kInternal) << lied;
  EXPECT_TRUE(absl::StrContains(lied.message(), "rank 1 at ")) << lied;
  const auto now = Get(group);
  ASSERT_TRUE(now.ok()) << now.status();
  EXPECT_EQ(now->ranks(1).code(), static_cast<int>(absl::StatusCode::kInternal));
  EXPECT_EQ(now->ranks(1).state().sequence_id(), group.ranks(1).state().sequence_id());
  const absl::Status none = Open(tokens_).status();
  EXPECT_EQ(none.code(), absl::StatusCode::kInternal) << none;
  EXPECT_TRUE(absl::StrContains(none.message(), "rank 1 at ")) << none;
  EXPECT_LT(none.message().size(), 500u);
  EXPECT_EQ(Stat("pagetide_shard_group_open"), 1);
}

// What the other ranks are sent is held once for each of them.
TEST_F(ShardGroupRefusalsTest, RequestsToOtherRanksAreBoundedInAll) {
  StartRanks(2);
  LossyMember member(ranks_[1]->address);
  ranks_[1]->address = member.address();
  Worker& worker = ranks_[0]->role->worker();
  ShardGroupOwner owner({.max_request_bytes = 100}, &worker, nullptr, nullptr, nullptr);
  v1::LookupShardGroupRequest request;
  SetMembers(&request);
  request.mutable_tokens()->Add(tokens_.begin(), tokens_.end());
  const auto lookup = [&] {
    const MonotonicTime deadline = worker.clock().MonotonicNow() + absl::Seconds(60);
    return owner.Lookup({worker.TenantNamed("default"), deadline, nullptr}, request).status();
  };
  member.hold_lookups = true;
  std::thread first([&] { EXPECT_TRUE(lookup().ok()) << "alone, however large it is"; });
  EXPECT_TRUE(Eventually([&] { return member.num_lookups == 1; }));
  const absl::Status full = lookup();
  EXPECT_EQ(full.code(), absl::StatusCode::kResourceExhausted) << full;
  EXPECT_EQ(GetReason(full), "TOO_MANY_SHARD_GROUP_CALLS");
  EXPECT_TRUE(GetRetryDelay(full).has_value());
  EXPECT_TRUE(absl::StrContains(full.message(), "the limit is 100")) << full;
  EXPECT_EQ(member.num_lookups, 1);
  member.hold_lookups = false;
  first.join();
  EXPECT_TRUE(lookup().ok());
}

TEST_F(ShardGroupRefusalsTest, APromptThatIsBadIsSentToNobody) {
  StartRanks(2);
  LossyMember member(ranks_[1]->address);
  ranks_[1]->address = member.address();
  const absl::Status bad = OpenWith([](v1::OpenShardGroupRequest& r) {
    r.add_inputs()->set_position(r.tokens_size());
    r.mutable_inputs(0)->set_digest(std::string(32, 'i'));
  });
  EXPECT_EQ(bad.code(), absl::StatusCode::kInvalidArgument) << bad;
  EXPECT_EQ(member.num_lookups, 0);
}

TEST_F(ShardGroupRefusalsTest, TokensAreCheckedAlsoWhereNothingIsReused) {
  const TestModelOptions small{.vocabulary_size = 100};
  for (uint32_t rank = 0; rank < 2; ++rank) {
    RankUnderTest& started = *ranks_.emplace_back(std::make_unique<RankUnderTest>());
    started.model = RankModel(rank, 2, false, small);
    ASSERT_TRUE(RegisterTestModel(*started.model, &store_).ok());
    Start(rank, false);
    started.address = started.role->address();
  }
  groups_ = v1::ShardGroupService::NewStub(ranks_[0]->client->channel());
  for (const bool no_reuse : {false, true}) {
    v1::OpenShardGroupRequest request = OpenRequest({1, 2, 100});
    request.set_no_reuse(no_reuse);
    const absl::Status status = Open(request).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    EXPECT_TRUE(absl::StrContains(status.message(), "tokens[2] = 100")) << status;
  }
  ExpectNothingIsOpen();
}

TEST_F(ShardGroupRefusalsTest, NamesThatAreNone) {
  StartRanks(2);
  for (const std::string id :
       {"", "x", "0123456789abcdef", "0123456789abcdef-zz", "0123456789abcdef-1-1"}) {
    v1::ShardGroup group;
    group.set_sequence_id(id);
    EXPECT_EQ(Get(group).status().code(), absl::StatusCode::kInvalidArgument) << id;
    EXPECT_EQ(Commit(group, 1).status().code(), absl::StatusCode::kInvalidArgument) << id;
    EXPECT_EQ(Rewind(group, 1).status().code(), absl::StatusCode::kInvalidArgument) << id;
    EXPECT_EQ(Close(group).status().code(), absl::StatusCode::kInvalidArgument) << id;
  }
  v1::ShardGroup group;
  group.set_sequence_id("0123456789abcdef-1");
  EXPECT_EQ(GetReason(Get(group).status()), "SHARD_GROUP_NOT_FOUND");
  EXPECT_EQ(GetReason(Commit(group, 1).status()), "SHARD_GROUP_NOT_FOUND");
  EXPECT_EQ(GetReason(Rewind(group, 1).status()), "SHARD_GROUP_NOT_FOUND");
  EXPECT_EQ(GetReason(Close(group).status()), "SHARD_GROUP_NOT_FOUND");
}

// Rank 0's client knows the sequences of the others too, and may do what it likes with them.
TEST_F(ShardGroupRefusalsTest, ARankWhoseSequenceIsGoneIsNamed) {
  StartRanks(2);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 20);
  ASSERT_TRUE(ranks_[1]->client->Close(group.ranks(1).state()).ok());
  const absl::Status gone = Commit(group, 20).status();
  EXPECT_EQ(gone.code(), absl::StatusCode::kNotFound);
  EXPECT_EQ(GetReason(gone), "SEQUENCE_NOT_FOUND") << gone;
  EXPECT_TRUE(absl::StrContains(gone.message(), "rank 1 at ")) << gone;
  EXPECT_EQ(LengthOf(group), 0u);
  const auto closed = Close(group);
  ASSERT_TRUE(closed.ok()) << closed.status();
  EXPECT_EQ(closed->unreachable_ranks_size(), 0);
}

}  // namespace
}  // namespace pagetide::shard_group_test
