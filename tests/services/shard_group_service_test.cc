// A group over real gRPC: its length is what all ranks have.
#include <gtest/gtest.h>

#include <memory>
#include <string>
#include <vector>

#include "absl/strings/match.h"
#include "tests/services/shard_group_fixture.h"
#include "worker/shard_peers.h"

namespace pagetide::shard_group_test {
namespace {

TEST_F(ShardGroupTest, OpensAsManyTokensAsTheRankThatKnowsFewest) {
  StartRanks(3);
  // 70: the open tail is known too; 40 ends inside a page.
  Know(0, {tokens_.begin(), tokens_.begin() + 70}, /*is_closed=*/false);
  Know(1, {tokens_.begin(), tokens_.begin() + 40}, /*is_closed=*/false);
  Know(2, {tokens_.begin(), tokens_.begin() + 64}, /*is_closed=*/false);
  v1::LookupShardGroupRequest lookup;
  SetMembers(&lookup);
  lookup.mutable_tokens()->Add(tokens_.begin(), tokens_.end());
  const auto found = Call(&v1::ShardGroupService::Stub::LookupShardGroup, lookup);
  ASSERT_TRUE(found.ok()) << found.status();
  EXPECT_EQ(found->reused_tokens(), 40u);
  EXPECT_EQ(found->limiting_rank(), 1u);
  ASSERT_EQ(found->ranks_size(), 3);
  EXPECT_EQ(found->ranks(0).reused_tokens(), 70u);
  EXPECT_EQ(found->ranks(1).reused_tokens(), 40u);
  EXPECT_EQ(found->ranks(2).reused_tokens(), 64u);

  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reused_tokens(), 40u);
  EXPECT_EQ(opened->limiting_rank(), 1u);
  ASSERT_EQ(opened->group().ranks_size(), 3);
  EXPECT_EQ(opened->group().length(), 40u);
  EXPECT_EQ(opened->group().sequence_id(), opened->group().ranks(0).state().sequence_id());
  for (uint32_t rank = 0; rank < 3; ++rank) {
    const v1::ShardGroup::Rank& is = opened->group().ranks(rank);
    EXPECT_EQ(is.rank(), rank);
    EXPECT_EQ(is.state().length(), 40u);
    EXPECT_EQ(is.state().worker_id(), absl::StrCat("rank-", rank));
    EXPECT_EQ(is.code(), 0);
    EXPECT_GT(ranks_[rank]->client->Verify(is.state().sequence_id(), tokens_, 0, 40).value_or(0),
              0u);
  }
  EXPECT_EQ(Stat("pagetide_shard_group_open"), 1);
  EXPECT_EQ(Stat("pagetide_shard_group_opens_total"), 1);
}

TEST_F(ShardGroupTest, GrowsWhenAllRanksHaveTheTokensAndNotBefore) {
  StartRanks(3);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  EXPECT_EQ(group.length(), 0u);
  ASSERT_TRUE(Append(group, 0, tokens_, 50).ok());
  ASSERT_TRUE(Append(group, 1, tokens_, 30).ok());
  ASSERT_TRUE(Append(group, 2, tokens_, 40).ok());
  for (const uint64_t length : {50, 40, 31}) {
    const absl::Status behind = Commit(group, length).status();
    EXPECT_EQ(behind.code(), absl::StatusCode::kFailedPrecondition) << behind;
    EXPECT_EQ(GetReason(behind), "SHARD_BEHIND");
    EXPECT_EQ(GetReasonMetadata(behind, "rank"), "1");
    EXPECT_EQ(GetReasonMetadata(behind, "length"), "30");
    EXPECT_EQ(LengthOf(group), 0u);
  }
  const auto committed = Commit(group, 30);
  ASSERT_TRUE(committed.ok()) << committed.status();
  EXPECT_EQ(committed->group().length(), 30u);
  EXPECT_EQ(committed->group().ranks(0).state().length(), 50u) << "ahead, for nobody";
  // Rank 0 itself may be the one.
  AppendAll(group, tokens_, 50);
  ASSERT_TRUE(Append(group, 1, tokens_, 60).ok());
  ASSERT_TRUE(Append(group, 2, tokens_, 60).ok());
  const absl::Status behind = Commit(group, 60).status();
  EXPECT_EQ(GetReason(behind), "SHARD_BEHIND") << behind;
  EXPECT_EQ(GetReasonMetadata(behind, "rank"), "0");
  EXPECT_EQ(GetReasonMetadata(behind, "length"), "50");
  // A repeat is OK, a shorter length is not.
  EXPECT_TRUE(Commit(group, 50).ok());
  EXPECT_TRUE(Commit(group, 50).ok());
  EXPECT_EQ(GetReason(Commit(group, 49).status()), "LENGTH_MISMATCH");
  EXPECT_EQ(GetReasonMetadata(Commit(group, 49).status(), "length"), "50");
  EXPECT_EQ(GetReason(Commit(group, ~uint64_t{0}).status()), "SHARD_BEHIND");
  EXPECT_EQ(LengthOf(group), 50u);
}

TEST_F(ShardGroupTest, RanksWithOtherTokensDoNotCommit) {
  StartRanks(3);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 20);
  ASSERT_TRUE(Commit(group, 20).ok());
  std::vector<uint32_t> other = tokens_;
  // In the tail, and in a page that is full by then; 21 tokens are the same.
  for (const size_t length : {25, 40}) {
    other[21] ^= 1;
    ASSERT_TRUE(Append(group, 0, tokens_, length).ok());
    ASSERT_TRUE(Append(group, 1, tokens_, length).ok());
    ASSERT_TRUE(Append(group, 2, other, length).ok());
    const absl::Status diverged = Commit(group, length).status();
    EXPECT_EQ(diverged.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(GetReason(diverged), "SHARD_DIVERGED") << diverged;
    EXPECT_EQ(GetReasonMetadata(diverged, "rank"), "2");
    EXPECT_EQ(LengthOf(group), 20u);
    const auto rewound = Rewind(group, 20);
    ASSERT_TRUE(rewound.ok()) << rewound.status();
    for (const auto& rank : rewound->group().ranks()) EXPECT_EQ(rank.state().length(), 20u);
    other = tokens_;
  }
  AppendAll(group, tokens_, 40);
  EXPECT_TRUE(Commit(group, 40).ok());
}

// The same tokens over other rows: an edit that one rank alone has made.
TEST_F(ShardGroupTest, ARankThatWasEditedDoesNotCommit) {
  StartRanks(2);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 20);
  std::vector<uint32_t> with_gap(tokens_.begin(), tokens_.begin() + 20);
  with_gap.insert(with_gap.begin() + 10, 5, 99);
  // Rank 1: [0, 10) + 5 others + [10, 20), of which the 5 are removed and the gap closed.
  ASSERT_TRUE(ranks_[1]->client->Rewind(group.ranks(1).state(), 10).ok());
  ASSERT_TRUE(Append(group, 1, with_gap, 25).ok());
  TestContext context;
  v1::ShiftWindowRequest shift;
  shift.mutable_sequence()->set_sequence_id(group.ranks(1).state().sequence_id());
  shift.mutable_sequence()->set_epoch(group.ranks(1).state().epoch());
  shift.set_keep(10);
  shift.set_discard(5);
  v1::ShiftWindowResponse shifted;
  const grpc::Status status = ranks_[1]->client->edits().ShiftWindow(&context, shift, &shifted);
  ASSERT_TRUE(status.ok()) << status.error_message();
  ASSERT_EQ(shifted.state().length(), 20u);
  EXPECT_EQ(GetReason(Commit(group, 20).status()), "SHARD_DIVERGED");
  EXPECT_TRUE(Commit(group, 10).ok()) << "in front of the edit they are the same";
}

TEST_F(ShardGroupTest, CommitsRewindsAndCommitsAgain) {
  StartRanks(3);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 50);
  ASSERT_TRUE(Commit(group, 50).ok());
  ASSERT_TRUE(Append(group, 2, tokens_, 60).ok());  // what the others could not
  const auto cut = Rewind(group, 50);
  ASSERT_TRUE(cut.ok()) << cut.status();
  for (const auto& rank : cut->group().ranks()) EXPECT_EQ(rank.state().length(), 50u);
  ASSERT_TRUE(Rewind(group, 33).ok());
  ASSERT_TRUE(Rewind(group, 33).ok());
  EXPECT_EQ(LengthOf(group), 33u);
  EXPECT_EQ(Rewind(group, 34).status().code(), absl::StatusCode::kInvalidArgument);
  EXPECT_EQ(Rewind(group, ~uint64_t{0}).status().code(), absl::StatusCode::kInvalidArgument);
  std::vector<uint32_t> other = tokens_;
  for (size_t i = 33; i < other.size(); ++i) other[i] ^= 1;
  AppendAll(group, other, 70);
  const auto committed = Commit(group, 70);
  ASSERT_TRUE(committed.ok()) << committed.status();
  for (uint32_t rank = 0; rank < 3; ++rank) {
    const std::string& id = group.ranks(rank).state().sequence_id();
    EXPECT_GT(ranks_[rank]->client->Verify(id, other, 0, 70).value_or(0), 0u);
  }
  EXPECT_EQ(Stat("pagetide_shard_group_rewinds_total"), 5);
  ASSERT_TRUE(Rewind(group, 0).ok());
  EXPECT_EQ(LengthOf(group), 0u);
}

TEST_F(ShardGroupTest, ARewindThatRankZeroRefusesChangesNothing) {
  StartRanks(2);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 30);
  ASSERT_TRUE(Commit(group, 30).ok());
  TestContext context;
  v1::ReserveSlotsRequest reserve;
  v1::SequenceRef& ref = *reserve.add_items()->mutable_sequence();
  ref.set_sequence_id(group.sequence_id());
  ref.set_epoch(group.epoch());
  reserve.mutable_items(0)->set_num_tokens(1);
  v1::ReserveSlotsResponse reserved;
  ASSERT_TRUE(ranks_[0]->client->sequences().ReserveSlots(&context, reserve, &reserved).ok());
  const absl::Status refused = Rewind(group, 10).status();
  EXPECT_EQ(GetReason(refused), "PENDING_WRITE") << refused;
  EXPECT_TRUE(absl::StrContains(refused.message(), "rank 0")) << refused;
  const auto now = Get(group);
  ASSERT_TRUE(now.ok()) << now.status();
  EXPECT_EQ(now->length(), 30u);
  EXPECT_EQ(now->ranks(1).state().length(), 30u);
}

TEST_F(ShardGroupTest, ARewindThatLosesARankIsDoneByARepeat) {
  StartRanks(3);
  LossyMember lossy(ranks_[1]->address);
  ranks_[1]->address = lossy.address();
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 30);
  ASSERT_TRUE(Commit(group, 30).ok());
  lossy.lose_rewind = true;
  const absl::Status lost = Rewind(group, 10).status();
  EXPECT_EQ(lost.code(), absl::StatusCode::kUnavailable) << lost;
  EXPECT_TRUE(absl::StrContains(lost.message(), "rank 1 at ")) << lost;
  const auto now = Get(group);
  ASSERT_TRUE(now.ok()) << now.status();
  EXPECT_EQ(now->length(), 10u) << "from the first moment";
  EXPECT_EQ(now->ranks(0).state().length(), 10u);
  EXPECT_EQ(now->ranks(1).state().length(), 30u);
  EXPECT_EQ(now->ranks(2).state().length(), 10u) << "the others are cut all the same";
  lossy.lose_rewind = false;
  const auto again = Rewind(group, 10);
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->group().ranks(1).state().length(), 10u);
}

TEST_F(ShardGroupTest, ARankThatHangsKeepsNoOtherFromBeingCut) {
  StartRanks(3);
  LossyMember hung(ranks_[1]->address);
  ranks_[1]->address = hung.address();
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 30);
  ASSERT_TRUE(Commit(group, 30).ok());
  hung.hold_acknowledgements = true;
  v1::RewindShardGroupRequest request;
  request.set_sequence_id(group.sequence_id());
  request.set_epoch(group.epoch());
  request.set_length(10);
  const absl::Status late =
      Call(&v1::ShardGroupService::Stub::RewindShardGroup, request, absl::Seconds(4)).status();
  EXPECT_TRUE(absl::IsDeadlineExceeded(late)) << late;
  EXPECT_TRUE(absl::StrContains(late.message(), "rank 1 at ")) << late;
  hung.hold_acknowledgements = false;
  const auto now = Get(group);
  ASSERT_TRUE(now.ok()) << now.status();
  EXPECT_EQ(now->length(), 10u);
  EXPECT_EQ(now->ranks(1).state().length(), 30u);
  EXPECT_EQ(now->ranks(2).state().length(), 10u);
  EXPECT_TRUE(Rewind(group, 10).ok());
}

// A client may have cut a rank in front of the group's length.
TEST_F(ShardGroupTest, ARewoundGroupIsAsLongAsItsShortestRank) {
  StartRanks(3);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 30);
  ASSERT_TRUE(Commit(group, 30).ok());
  ASSERT_TRUE(ranks_[1]->client->Rewind(group.ranks(1).state(), 5).ok());
  EXPECT_EQ(Commit(group, 30)->group().length(), 30u) << "nothing is compared for it";
  for (int i = 0; i < 2; ++i) {
    const auto cut = Rewind(group, 20);
    ASSERT_TRUE(cut.ok()) << cut.status() << ": a repeat too";
    EXPECT_EQ(cut->group().length(), 5u);
    EXPECT_EQ(cut->group().ranks(2).state().length(), 20u);
  }
  EXPECT_EQ(Rewind(group, 21).status().code(), absl::StatusCode::kInvalidArgument);
  ASSERT_TRUE(ranks_[0]->client->Rewind(*ranks_[0]->client->Get(group.sequence_id()), 3).ok());
  EXPECT_EQ(Rewind(group, 5)->group().length(), 3u) << "rank 0's own";
}

// The owner of the group has not changed: a caller that takes STALE_EPOCH for it would give up.
TEST_F(ShardGroupTest, ARankOfAnotherEpochIsStaleAndNotTheGroup) {
  StartRanks(3);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 30);
  TestContext park_context;
  v1::ParkSequenceRequest park;
  park.mutable_sequence()->set_sequence_id(group.ranks(2).state().sequence_id());
  park.mutable_sequence()->set_epoch(group.ranks(2).state().epoch());
  v1::ParkSequenceResponse parked;
  const auto sequences = v1::SequenceService::NewStub(ranks_[2]->client->channel());
  ASSERT_TRUE(sequences->ParkSequence(&park_context, park, &parked).ok());
  TestContext resume_context;
  v1::ResumeSequenceRequest resume;
  resume.set_sequence_id(group.ranks(2).state().sequence_id());
  v1::ResumeSequenceResponse resumed;
  ASSERT_TRUE(sequences->ResumeSequence(&resume_context, resume, &resumed).ok());
  for (const absl::Status& stale : {Commit(group, 30).status(), Rewind(group, 0).status()}) {
    EXPECT_EQ(stale.code(), absl::StatusCode::kFailedPrecondition);
    EXPECT_EQ(GetReason(stale), "SHARD_STALE") << stale;
    EXPECT_EQ(GetReasonMetadata(stale, "rank"), "2");
    EXPECT_TRUE(absl::StrContains(stale.message(), "rank 2 at ")) << stale;
  }
}

// What is parked of rank 0 cannot be dropped: its sequence is closed all the same.
TEST_F(ShardGroupTest, ClosesAllRanksWhenTheStoreKeepsWhatIsParked) {
  StartRanks(2);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 30);
  TestContext context;
  v1::ParkSequenceRequest park;
  park.mutable_sequence()->set_sequence_id(group.sequence_id());
  park.mutable_sequence()->set_epoch(group.epoch());
  park.set_keep_open(true);
  v1::ParkSequenceResponse parked;
  ASSERT_TRUE(ranks_[0]->client->sequences().ParkSequence(&context, park, &parked).ok());
  ranks_[0]->store->lose_deletes = true;
  for (int i = 0; i < 2; ++i) {
    const absl::Status kept = Close(group).status();
    EXPECT_EQ(kept.code(), absl::StatusCode::kUnavailable) << kept << ": nor by a repeat";
    ExpectNothingIsOpen();
  }
  EXPECT_EQ(GetReason(Get(group).status()), "SHARD_GROUP_NOT_FOUND");
  ranks_[0]->store->lose_deletes = false;
  EXPECT_TRUE(Close(group).ok());
  const auto left =
      store_.ListManifests("parked/", "", 10, Clock::Real()->MonotonicNow() + absl::Seconds(60));
  ASSERT_TRUE(left.ok()) << left.status();
  EXPECT_EQ(left->size(), 0u);
}

TEST_F(ShardGroupTest, ADeadRankStopsCommitsAndIsNamed) {
  StartRanks(3);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 30);
  ASSERT_TRUE(Commit(group, 20).ok());
  Kill(2);
  const absl::Status lost = Commit(group, 30).status();
  EXPECT_EQ(lost.code(), absl::StatusCode::kUnavailable) << lost;
  EXPECT_TRUE(absl::StrContains(lost.message(), absl::StrCat("rank 2 at ", ranks_[2]->address)))
      << lost;
  const auto now = Get(group);
  ASSERT_TRUE(now.ok()) << now.status();
  EXPECT_EQ(now->length(), 20u);
  EXPECT_EQ(now->ranks(0).code(), 0);
  EXPECT_EQ(now->ranks(1).code(), 0);
  EXPECT_EQ(now->ranks(2).code(), static_cast<int>(absl::StatusCode::kUnavailable));
  EXPECT_FALSE(now->ranks(2).message().empty());
  EXPECT_EQ(now->ranks(2).state().sequence_id(), group.ranks(2).state().sequence_id());
  // A length that it has already is OK, whoever can be asked.
  EXPECT_TRUE(Commit(group, 20).ok());
  const auto closed = Close(group);
  ASSERT_TRUE(closed.ok()) << closed.status();
  ASSERT_EQ(closed->unreachable_ranks_size(), 1);
  EXPECT_EQ(closed->unreachable_ranks(0), 2u);
  ExpectNothingIsOpen();
}

TEST_F(ShardGroupTest, ClosesAllRanksAndARepeatIsOk) {
  StartRanks(3);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 30);
  v1::ShardGroup stale = group;
  stale.set_epoch(group.epoch() + 1);
  EXPECT_EQ(GetReason(Close(stale).status()), "STALE_EPOCH");
  EXPECT_EQ(GetReason(Commit(stale, 30).status()), "STALE_EPOCH");
  EXPECT_EQ(GetReason(Rewind(stale, 0).status()), "STALE_EPOCH");
  const auto closed = Close(group);
  ASSERT_TRUE(closed.ok()) << closed.status();
  EXPECT_EQ(closed->unreachable_ranks_size(), 0);
  ExpectNothingIsOpen();
  EXPECT_TRUE(Close(group).ok());
  EXPECT_EQ(GetReason(Get(group).status()), "SHARD_GROUP_NOT_FOUND");
  EXPECT_EQ(GetReason(Commit(group, 30).status()), "SHARD_GROUP_NOT_FOUND");
  EXPECT_EQ(GetReason(Rewind(group, 0).status()), "SHARD_GROUP_NOT_FOUND");
  EXPECT_EQ(Stat("pagetide_shard_group_open"), 0);
}

TEST_F(ShardGroupTest, EndsWithTheSequenceOfRankZero) {
  StartRanks(2);
  const auto first = Open(tokens_);
  const auto second = Open(tokens_);
  ASSERT_TRUE(first.ok()) << first.status();
  ASSERT_TRUE(second.ok()) << second.status();
  ASSERT_TRUE(ranks_[0]->client->Close(first->group().ranks(0).state()).ok());
  EXPECT_EQ(GetReason(Get(first->group()).status()), "SHARD_GROUP_NOT_FOUND");
  EXPECT_EQ(Stat("pagetide_shard_group_open"), 1);
  // Without any call on it too.
  ASSERT_TRUE(ranks_[0]->client->Close(second->group().ranks(0).state()).ok());
  EXPECT_TRUE(Eventually([&] { return Stat("pagetide_shard_group_open") == 0; }));
  // One that is open and no group's is none.
  const auto plain = ranks_[0]->client->Open(tokens_);
  ASSERT_TRUE(plain.ok()) << plain.status();
  v1::ShardGroup none;
  none.set_sequence_id(plain->state().sequence_id());
  none.set_epoch(plain->state().epoch());
  EXPECT_EQ(GetReason(Close(none).status()), "SHARD_GROUP_NOT_FOUND");
  EXPECT_TRUE(ranks_[0]->client->Get(plain->state().sequence_id()).ok());
}

// The sequence of rank 0 may come back under its id: that is another life.
TEST_F(ShardGroupTest, EndsWhenRankZeroIsMoved) {
  StartRanks(2);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 30);
  ASSERT_TRUE(Commit(group, 30).ok());
  const auto move = [](RankUnderTest& from, const v1::SequenceState& state,
                       const std::string& address) {
    TestContext context;
    v1::SendSequenceRequest request;
    request.mutable_sequence()->set_sequence_id(state.sequence_id());
    request.mutable_sequence()->set_epoch(state.epoch());
    request.set_target_address(address);
    request.set_kind(v1::TRANSFER_KIND_MOVE);
    v1::SendSequenceResponse response;
    const auto stub = v1::TransferService::NewStub(from.client->channel());
    const grpc::Status status = stub->SendSequence(&context, request, &response);
    EXPECT_TRUE(status.ok()) << status.error_message();
    return response.committed().state();
  };
  const v1::SequenceState there =
      move(*ranks_[0], group.ranks(0).state(), ranks_[1]->role->address());
  RankUnderTest& other = *ranks_[1];
  const v1::SequenceState back = move(other, there, ranks_[0]->role->address());
  ASSERT_EQ(back.sequence_id(), group.sequence_id());
  ASSERT_EQ(back.epoch(), group.epoch() + 2);
  EXPECT_EQ(GetReason(Commit(group, 30).status()), "SHARD_GROUP_NOT_FOUND");
}

// Only what a rank's sequence is: nobody has to be in a group for it.
TEST_F(ShardGroupTest, AcknowledgesWhatASequenceHolds) {
  StartRanks(2);
  const auto opened = Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  const v1::ShardGroup& group = opened->group();
  AppendAll(group, tokens_, 40);
  const auto ask = [&](uint32_t rank, uint64_t length, uint64_t epoch) {
    TestContext context;
    v1::AcknowledgeShardRequest request;
    request.set_sequence_id(group.ranks(rank).state().sequence_id());
    request.set_epoch(epoch);
    request.set_length(length);
    v1::AcknowledgeShardResponse response;
    const auto stub = v1::ShardGroupService::NewStub(ranks_[rank]->client->channel());
    const absl::Status status =
        FromGrpcStatus(stub->AcknowledgeShard(&context, request, &response));
    return status.ok() ? absl::StatusOr<v1::AcknowledgeShardResponse>(response) : status;
  };
  const auto own = ask(0, 40, 1);
  const auto other = ask(1, 40, 1);
  ASSERT_TRUE(own.ok()) << own.status();
  ASSERT_TRUE(other.ok()) << other.status();
  EXPECT_EQ(own->content_digest().size(), 16u);
  EXPECT_EQ(own->content_digest(), other->content_digest());
  EXPECT_NE(own->content_digest(), ask(0, 39, 1)->content_digest());
  EXPECT_EQ(own->page_tokens(), kPageTokens);
  EXPECT_EQ(own->model_identity(), other->model_identity());
  EXPECT_EQ(other->shard().rank(), 1u);
  EXPECT_EQ(other->shard().num_ranks(), 2u);
  EXPECT_EQ(other->state().length(), 40u);
  const auto too_long = ask(1, 41, 1);
  ASSERT_TRUE(too_long.ok()) << too_long.status();
  EXPECT_EQ(too_long->content_digest(), "");
  EXPECT_EQ(too_long->state().length(), 40u);
  EXPECT_EQ(GetReason(ask(1, 40, 2).status()), "STALE_EPOCH");
}

TEST(ShardPeersTest, KeepsTheLastUsed) {
  ShardPeers peers(2);
  const std::shared_ptr<ShardPeer> a = peers.At("127.0.0.1:1");
  const std::shared_ptr<ShardPeer> b = peers.At("127.0.0.1:2");
  EXPECT_EQ(peers.At("127.0.0.1:1"), a);
  peers.At("127.0.0.1:3");
  EXPECT_EQ(peers.size(), 2u);
  EXPECT_EQ(peers.At("127.0.0.1:1"), a);
  EXPECT_NE(peers.At("127.0.0.1:2"), b) << "it had to go; who uses it still can";
}

}  // namespace
}  // namespace pagetide::shard_group_test
