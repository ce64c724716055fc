// All ranks are open, or none: what fails on the way, what is lost, and who reads the store.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "absl/strings/match.h"
#include "tests/services/shard_group_fixture.h"

namespace pagetide::shard_group_test {
namespace {

class ShardGroupOpeningTest : public ShardGroupTest {
 protected:
  // In front of the last rank.
  void PutLossyInFront() {
    lossy_ = std::make_unique<LossyMember>(ranks_.back()->address);
    ranks_.back()->address = lossy_->address();
  }
  // Free frames of all ranks.
  std::vector<uint64_t> FreeFrames() {
    std::vector<uint64_t> free;
    for (auto& rank : ranks_) free.push_back(rank->role == nullptr ? 0 : rank->FreeFrames());
    return free;
  }

  std::unique_ptr<LossyMember> lossy_;
};

TEST_F(ShardGroupOpeningTest, WhatIsOpenIsClosedWhenTheLastRankFails) {
  StartRanks(3);
  PutLossyInFront();
  for (uint32_t rank = 0; rank < 3; ++rank) Know(rank, tokens_);
  const std::vector<uint64_t> free = FreeFrames();
  // Its open, and the question what became of it, are lost both.
  lossy_->lose_open_answers = 1000;
  const absl::Status lost = Open(tokens_).status();
  EXPECT_EQ(lost.code(), absl::StatusCode::kUnavailable) << lost;
  EXPECT_TRUE(absl::StrContains(lost.message(), absl::StrCat("rank 2 at ", lossy_->address())))
      << lost;
  EXPECT_EQ(ranks_[0]->NumSequences(), 0u);
  EXPECT_EQ(ranks_[1]->NumSequences(), 0u);
  EXPECT_EQ(ranks_[2]->NumSequences(), 1u) << "nobody knows its name; it ends when it is idle";
  EXPECT_EQ(FreeFrames(), free);
  EXPECT_EQ(Stat("pagetide_shard_group_open"), 0);
}

TEST_F(ShardGroupOpeningTest, AnOpenWhoseAnswerIsLostIsClosedToo) {
  StartRanks(2);
  PutLossyInFront();
  lossy_->lose_open_answers = 1;
  const absl::Status lost = Open(tokens_).status();
  EXPECT_EQ(lost.code(), absl::StatusCode::kUnavailable) << lost;
  EXPECT_EQ(lossy_->num_opens, 2) << "asked again what it has opened";
  ExpectNothingIsOpen();
}

TEST_F(ShardGroupOpeningTest, ADeadRankIsKnownBeforeAnythingIsOpen) {
  StartRanks(3);
  Know(0, tokens_);
  Kill(1);
  const absl::Status lost = Open(tokens_).status();
  EXPECT_EQ(lost.code(), absl::StatusCode::kUnavailable) << lost;
  EXPECT_TRUE(absl::StrContains(lost.message(), "rank 1 at ")) << lost;
  ExpectNothingIsOpen();
}

// Between the look-up and the open a rank lost what it had.
TEST_F(ShardGroupOpeningTest, BeginsAgainWhenARankGetsLess) {
  StartRanks(2);
  PutLossyInFront();
  Know(0, tokens_);
  Know(1, {tokens_.begin(), tokens_.begin() + 48});
  lossy_->claim_tokens = 96;
  lossy_->claims_left = 2;  // of the first attempt: the prompt, and the length that they agree on
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reused_tokens(), 48u);
  EXPECT_EQ(lossy_->num_opens, 2);
  for (auto& rank : ranks_) EXPECT_EQ(rank->NumSequences(), 1u);
}

TEST_F(ShardGroupOpeningTest, ReusesNothingWhenARankNeverGetsWhatItSaid) {
  StartRanks(2);
  PutLossyInFront();
  Know(0, tokens_);
  lossy_->claim_tokens = 96;
  lossy_->claims_left = 1000;
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reused_tokens(), 0u);
  EXPECT_EQ(opened->group().length(), 0u);
  for (auto& rank : ranks_) EXPECT_EQ(rank->NumSequences(), 1u);
  AppendAll(opened->group(), tokens_, 60);
  EXPECT_TRUE(Commit(opened->group(), 60).ok());
}

// As a rank does that cannot reuse exactly as many tokens as another.
TEST_F(ShardGroupOpeningTest, AsksUntilAllRanksCanReuseTheSameLength) {
  StartRanks(2);
  PutLossyInFront();
  for (uint32_t rank = 0; rank < 2; ++rank) Know(rank, tokens_);
  lossy_->one_less_left = 3;
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reused_tokens(), 189u);
  EXPECT_EQ(lossy_->num_lookups, 4);
  for (const auto& rank : opened->group().ranks()) EXPECT_EQ(rank.state().length(), 189u);
  // One that never agrees does not keep it asking.
  lossy_->one_less_left = 1000;
  lossy_->num_lookups = 0;
  const auto none = Open(tokens_);
  ASSERT_TRUE(none.ok()) << none.status();
  EXPECT_EQ(none->reused_tokens(), 0u);
  EXPECT_EQ(lossy_->num_lookups, 9);
}

TEST_F(ShardGroupOpeningTest, ReusesNothingWhereNoneIsWanted) {
  StartRanks(2);
  for (uint32_t rank = 0; rank < 2; ++rank) Know(rank, tokens_);
  v1::OpenShardGroupRequest request = OpenRequest(tokens_);
  request.set_no_reuse(true);
  const auto opened = Open(request);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->group().length(), 0u);
  EXPECT_EQ(opened->ranks_size(), 2);
  request.set_no_reuse(false);
  request.set_allow_full_reuse(true);
  const auto full = Open(request);
  ASSERT_TRUE(full.ok()) << full.status();
  // 200 tokens are 12 pages and a tail, which went with its sequence.
  EXPECT_EQ(full->group().length(), 192u);
  EXPECT_TRUE(Open(std::vector<uint32_t>()).ok()) << "an empty prompt";
}

TEST_F(ShardGroupOpeningTest, ImagesAreInputsOfAllRanks) {
  StartRanks(2);
  v1::OpenShardGroupRequest request = OpenRequest(tokens_);
  v1::InputDigest& input = *request.add_inputs();
  input.set_position(5);
  input.set_digest(std::string(32, 'i'));
  for (uint32_t rank = 0; rank < 2; ++rank) Know(rank, tokens_);
  // Their tokens are known, with no image among them.
  const auto opened = Open(request);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->group().length(), 0u);
  request.mutable_inputs(0)->set_position(tokens_.size());
  EXPECT_EQ(Open(request).status().code(), absl::StatusCode::kInvalidArgument);
  request.mutable_inputs(0)->set_position(5);
  request.mutable_inputs(0)->set_digest("short");
  EXPECT_EQ(Open(request).status().code(), absl::StatusCode::kInvalidArgument);
}

TEST_F(ShardGroupOpeningTest, ARepeatGetsTheSameGroup) {
  StartRanks(2);
  v1::OpenShardGroupRequest request = OpenRequest(tokens_);
  request.set_request_id("once");
  const auto first = Open(request);
  const auto second = Open(request);
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  EXPECT_EQ(first->SerializeAsString(), second->SerializeAsString());
  for (auto& rank : ranks_) EXPECT_EQ(rank->NumSequences(), 1u);
  request.set_no_reuse(true);
  EXPECT_EQ(GetReason(Open(request).status()), "REQUEST_ID_REUSED");
  // A failure is no answer: the next attempt opens.
  request.set_request_id("twice");
  Kill(1);
  EXPECT_FALSE(Open(request).ok());
  Start(1, /*write_through=*/false);
  ranks_[1]->address = ranks_[1]->role->address();
  request.mutable_members(1)->set_address(ranks_[1]->address);
  EXPECT_TRUE(Open(request).ok());
}

TEST_F(ShardGroupOpeningTest, NothingIsLeftOfACallerThatLeft) {
  StartRanks(2);
  PutLossyInFront();
  lossy_->hold_opens = true;
  v1::OpenShardGroupRequest request = OpenRequest(tokens_);
  request.set_no_reuse(true);
  const absl::Status late =
      Call(&v1::ShardGroupService::Stub::OpenShardGroup, request, absl::Milliseconds(300)).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(late)) << late;
  EXPECT_TRUE(Eventually([&] { return ranks_[0]->NumSequences() == 0; }));
  EXPECT_TRUE(Eventually([&] { return Stat("pagetide_shard_group_opens_total") == 1; }));
  TestContext context;
  v1::OpenShardGroupResponse response;
  std::thread canceller([&] {
    EXPECT_TRUE(Eventually([&] { return ranks_[0]->NumSequences() == 1; }));
    context.TryCancel();
  });
  EXPECT_EQ(groups_->OpenShardGroup(&context, request, &response).error_code(),
            grpc::StatusCode::CANCELLED);
  canceller.join();
  lossy_->hold_opens = false;
  EXPECT_TRUE(Eventually([&] { return Stat("pagetide_shard_group_opens_total") == 2; }));
  ExpectNothingIsOpen();
}

// Accepts calls and never answers.
TEST_F(ShardGroupOpeningTest, ARankThatHangsKeepsNoOtherFromBeingClosed) {
  StartRanks(3);
  PutLossyInFront();
  lossy_->hold_opens = true;
  v1::OpenShardGroupRequest request = OpenRequest(tokens_);
  request.set_no_reuse(true);
  const absl::Status late =
      Call(&v1::ShardGroupService::Stub::OpenShardGroup, request, absl::Milliseconds(300)).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(late)) << late;
  // The call has ended: what was to be closed is.
  EXPECT_TRUE(Eventually([&] { return Stat("pagetide_shard_group_opens_total") == 1; }));
  EXPECT_EQ(lossy_->num_opens, 2) << "asked again, in vain";
  ExpectNothingIsOpen();
  lossy_->hold_opens = false;
}

class ReplicatedRanksTest : public ShardGroupOpeningTest {
 protected:
  void SetUp() override { StartRanks(3, /*is_replicated=*/true, /*write_through=*/true); }
  // 12 pages that only the store has.
  void StoreOnly() {
    Know(0, tokens_);
    EXPECT_TRUE(Eventually([&] {
      return store_.GetStats(Clock::Real()->MonotonicNow() + absl::Seconds(5))->pages >= 12;
    }));
    for (auto& rank : ranks_) {
      TestContext context;
      v1::ClearCacheResponse response;
      ASSERT_TRUE(rank->client->admin().ClearCache(&context, {}, &response).ok());
      rank->store->num_read = 0;
    }
  }
  void ExpectAllHave(const v1::ShardGroup& group, uint64_t length) {
    for (uint32_t rank = 0; rank < ranks_.size(); ++rank) {
      const std::string& id = group.ranks(rank).state().sequence_id();
      ASSERT_TRUE(ranks_[rank]->client->WaitReady(id).ok());
      EXPECT_GT(ranks_[rank]->client->Verify(id, tokens_, 0, length).value_or(0), 0u) << rank;
    }
  }
};

TEST_F(ReplicatedRanksTest, TheStoreIsReadOnce) {
  StoreOnly();
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reused_tokens(), 192u);
  EXPECT_EQ(opened->ranks(1).store_tokens(), 192u);
  EXPECT_EQ(opened->shared_pages(), 24u) << "12 to each of the two";
  ExpectAllHave(opened->group(), 192);
  EXPECT_EQ(ranks_[0]->store->num_read, 12u);
  EXPECT_EQ(ranks_[1]->store->num_read, 0u);
  EXPECT_EQ(ranks_[2]->store->num_read, 0u);
  EXPECT_EQ(Stat("pagetide_shard_group_shared_pages_total"), 24);
  EXPECT_EQ(Stat("pagetide_shard_group_failed_shares_total"), 0);
}

TEST_F(ReplicatedRanksTest, EachReadsTheStoreWhereSharingIsNotWanted) {
  StoreOnly();
  v1::OpenShardGroupRequest request = OpenRequest(tokens_);
  request.set_no_sharing(true);
  const auto opened = Open(request);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->shared_pages(), 0u);
  ExpectAllHave(opened->group(), 192);
  for (auto& rank : ranks_) EXPECT_EQ(rank->store->num_read, 12u);
}

// In front of rank 2 nothing takes transfers.
TEST_F(ReplicatedRanksTest, ARankThatCannotBeSentToReadsTheStore) {
  StoreOnly();
  PutLossyInFront();
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reused_tokens(), 192u);
  EXPECT_EQ(opened->shared_pages(), 12u);
  ExpectAllHave(opened->group(), 192);
  EXPECT_EQ(ranks_[0]->store->num_read, 12u);
  EXPECT_EQ(ranks_[1]->store->num_read, 0u);
  EXPECT_EQ(ranks_[2]->store->num_read, 12u);
  EXPECT_EQ(Stat("pagetide_shard_group_failed_shares_total"), 1);
}

// Whether ranks are replicated is looked up in the time for sharing; who cannot say shares nothing.
TEST_F(ReplicatedRanksTest, AStoreThatDoesNotSayWhoIsReplicatedKeepsNobodyFromOpening) {
  StoreOnly();
  ranks_[0]->store->num_model_reads = 0;
  ranks_[0]->store->num_late_model_reads = 0;
  ranks_[0]->store->lose_models = true;
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reused_tokens(), 192u);
  EXPECT_EQ(opened->shared_pages(), 0u);
  ExpectAllHave(opened->group(), 192);
  EXPECT_EQ(ranks_[0]->store->num_model_reads, 2);
  EXPECT_EQ(ranks_[0]->store->num_late_model_reads, 0);
}

// Pages of other heads are not theirs, however alike the rest is.
TEST_F(ShardGroupOpeningTest, RanksWithHeadsOfTheirOwnReadTheirOwnPages) {
  StartRanks(2, /*is_replicated=*/false, /*write_through=*/true);
  for (uint32_t rank = 0; rank < 2; ++rank) Know(rank, tokens_);
  EXPECT_TRUE(Eventually([&] {
    return store_.GetStats(Clock::Real()->MonotonicNow() + absl::Seconds(5))->pages >= 24;
  }));
  for (auto& rank : ranks_) {
    TestContext context;
    v1::ClearCacheResponse response;
    ASSERT_TRUE(rank->client->admin().ClearCache(&context, {}, &response).ok());
    rank->store->num_read = 0;
  }
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reused_tokens(), 192u);
  EXPECT_EQ(opened->shared_pages(), 0u);
  for (uint32_t rank = 0; rank < 2; ++rank) {
    const std::string& id = opened->group().ranks(rank).state().sequence_id();
    ASSERT_TRUE(ranks_[rank]->client->WaitReady(id).ok());
    EXPECT_EQ(ranks_[rank]->store->num_read, 12u);
  }
}

}  // namespace
}  // namespace pagetide::shard_group_test
