// TransferService between two workers on loopback: what goes over the wire, and moves whose answers
// are lost on the way.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <vector>

#include "tests/services/transfer_service_fixture.h"
#include "tests/support/timing.h"

namespace pagetide::transfer_test {
namespace {

using ::pagetide::testing::Eventually;
using ::testing::HasSubstr;

TEST_F(TransferServiceTest, ACopyMovesWhatTheTargetLacks) {
  const uint64_t page_bytes = model_->geometry().bytes_per_page_of_tokens();
  const v1::SequenceState state = Fill(a_, tokens_);
  Fill(b_, std::vector<uint32_t>(tokens_.begin(), tokens_.begin() + 48));
  auto sent = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_COPY, "copy-1");
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->sent_pages(), 2u);
  EXPECT_EQ(sent->sent_bytes(), 2 * page_bytes);
  EXPECT_EQ(sent->committed().pages(), 5u);
  EXPECT_EQ(sent->committed().received_bytes(), 2 * page_bytes);
  EXPECT_EQ(sent->committed().state().worker_id(), "b");
  ExpectGoesOn(b_, sent->committed().state(), tokens_);
  ExpectGoesOn(a_, state, tokens_);
  // A repeat makes no other one.
  const auto again = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_COPY, "copy-1");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->SerializeAsString(), sent->SerializeAsString());
  EXPECT_TRUE(b_.client->EventuallyStat("pagetide_worker_open_sequences", 2));
  EXPECT_EQ(b_.client->Stat("pagetide_transfer_received_bytes_total").value_or(0), 2 * page_bytes);
  EXPECT_EQ(a_.client->Stat("pagetide_transfer_sent_bytes_total").value_or(0), 2 * page_bytes);
  EXPECT_EQ(b_.client->Stat("pagetide_transfer_known_pages_total").value_or(0), 3);
}

TEST_F(TransferServiceTest, AMoveLeavesNothingBehind) {
  const v1::SequenceState state = Fill(a_, tokens_);
  auto sent = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_MOVE, "move-1");
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->committed().state().sequence_id(), state.sequence_id());
  EXPECT_EQ(sent->committed().state().epoch(), state.epoch() + 1);
  EXPECT_EQ(a_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  ExpectGoesOn(b_, sent->committed().state(), tokens_);
  const auto again = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_MOVE, "move-1");
  ASSERT_TRUE(again.ok()) << again.status();
  EXPECT_EQ(again->SerializeAsString(), sent->SerializeAsString());
  // And back, under the epoch after it.
  v1::SequenceState there = *b_.client->Get(state.sequence_id());
  auto back = b_.Send(there, a_.role->address(), v1::TRANSFER_KIND_MOVE);
  ASSERT_TRUE(back.ok()) << back.status();
  EXPECT_EQ(back->committed().state().epoch(), state.epoch() + 2);
  EXPECT_EQ(b_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
}

TEST_F(TransferServiceTest, PagesAloneAreThereForPrompts) {
  const v1::SequenceState state = Fill(a_, tokens_);
  auto sent = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_PAGES);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_FALSE(sent->committed().has_state());
  EXPECT_EQ(sent->committed().pages(), 5u);
  EXPECT_EQ(b_.client->Stat("pagetide_worker_open_sequences").value_or(1), 0);
  const auto opened = b_.client->Open(tokens_);
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reuse().device_tokens(), 64u);
  EXPECT_GT(b_.client->Verify(opened->state().sequence_id(), tokens_, 0, 64).value_or(0), 0u);
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, ASequenceWhoseOwnerTheStoreNamesIsCopiedAndNotMoved) {
  const v1::SequenceState state = Fill(a_, tokens_);
  TestContext context;
  v1::ParkSequenceRequest park;
  park.mutable_sequence()->set_sequence_id(state.sequence_id());
  park.mutable_sequence()->set_epoch(state.epoch());
  park.set_keep_open(true);
  v1::ParkSequenceResponse parked;
  ASSERT_TRUE(a_.client->sequences().ParkSequence(&context, park, &parked).ok());
  const auto refused = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_MOVE);
  EXPECT_EQ(GetReason(refused.status()), "SEQUENCE_IS_PARKED") << refused.status();
  EXPECT_EQ(b_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  const auto copied = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_COPY);
  ASSERT_TRUE(copied.ok()) << copied.status();
  ExpectGoesOn(b_, copied->committed().state(), tokens_);
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, AFlippedByteIsRefusedAndNothingChanges) {
  const v1::SequenceState state = Fill(a_, tokens_);
  const uint64_t free = b_.FreeFrames();
  lossy_->change_part = [](v1::PushPagesRequest& part) {
    if (part.page() == 3) (*part.mutable_data())[1000] ^= 1;
  };
  const auto refused = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE);
  EXPECT_TRUE(absl::IsDataLoss(refused.status())) << refused.status();
  EXPECT_EQ(GetReason(refused.status()), "PAGE_DAMAGED");
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr(lossy_->address()));
  EXPECT_EQ(b_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  EXPECT_EQ(b_.FreeFrames(), std::max(free, kFrames));  // aborted at once
  EXPECT_EQ(b_.client->Stat("pagetide_transfer_damaged_pages_total").value_or(0), 1);
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, WhatASourceLeavesExpires) {
  const v1::SequenceState state = Fill(a_, tokens_);
  lossy_->lose_push = true;
  lossy_->lose_abort = true;
  const auto refused = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE);
  EXPECT_TRUE(absl::IsUnavailable(refused.status())) << refused.status();
  ExpectGoesOn(a_, state, tokens_);
  EXPECT_TRUE(b_.client->EventuallyStat("pagetide_transfer_ended_total", 1));
  EXPECT_TRUE(Eventually([&] { return b_.FreeFrames() == kFrames; }));
}

TEST_F(TransferServiceTest, AMoveWhoseAnswerIsLostIsAskedFor) {
  const v1::SequenceState state = Fill(a_, tokens_);
  lossy_->lose_answer = true;
  const auto sent = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE);
  ASSERT_TRUE(sent.ok()) << sent.status();
  EXPECT_EQ(sent->committed().state().epoch(), state.epoch() + 1);
  EXPECT_EQ(a_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  ExpectGoesOn(b_, sent->committed().state(), tokens_);
}

TEST_F(TransferServiceTest, AMoveThatNeverArrivedGoesOnHere) {
  const v1::SequenceState state = Fill(a_, tokens_);
  lossy_->lose_commit = true;
  const auto refused = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE);
  EXPECT_TRUE(absl::IsUnavailable(refused.status())) << refused.status();
  EXPECT_EQ(b_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  ExpectGoesOn(a_, state, tokens_);
  EXPECT_EQ(b_.FreeFrames(), kFrames);
}

TEST_F(TransferServiceTest, AMoveInDoubtStaysUntilItIsKnown) {
  const v1::SequenceState state = Fill(a_, tokens_);
  for (const bool was_committed : {false, true}) {
    SCOPED_TRACE(was_committed);
    lossy_->lose_answer = true;
    lossy_->lose_commit = !was_committed;
    lossy_->lose_abort = true;
    const std::string request_id = absl::StrCat("move-", was_committed);
    const auto unknown = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE, request_id);
    EXPECT_EQ(GetReason(unknown.status()), "TRANSFER_UNRESOLVED") << unknown.status();
    // Neither changed nor gone, and no other move begins.
    std::vector<uint32_t> longer = tokens_;
    longer.resize(80, 5);
    const auto refused = a_.client->Append(state, longer, longer.size());
    EXPECT_EQ(GetReason(refused.status()), error_reason::kSequenceMoved) << refused.status();
    EXPECT_GT(a_.client->Verify(state.sequence_id(), tokens_, 0, tokens_.size()).value_or(0), 0u);
    EXPECT_EQ(GetReason(a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_MOVE).status()),
              "TRANSFER_UNRESOLVED");
    lossy_->lose_abort = false;
    if (!was_committed) {
      // The worker asks by itself.
      EXPECT_TRUE(Eventually([&] {
        return a_.client->Append(state, tokens_, tokens_.size()).ok() ||
               a_.client->Rewind(state, 70).ok();
      }));
      continue;
    }
    absl::StatusOr<v1::SendSequenceResponse> sent;
    EXPECT_TRUE(Eventually([&] {
      sent = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE, request_id);
      return sent.ok();
    })) << sent.status();
    EXPECT_EQ(sent->committed().state().epoch(), state.epoch() + 1);
    EXPECT_EQ(a_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
    ExpectGoesOn(b_, sent->committed().state(), tokens_);
  }
}

TEST_F(TransferServiceTest, AMoveWhoseRepeatedCommitIsRefusedHasOneOwner) {
  // The first attempt did it, and its answer is lost; the second gets an answer that says nothing
  // of the first.
  lossy_->lose_answer = true;
  lossy_->refuse_repeats = true;
  for (const bool lose_abort : {false, true}) {
    SCOPED_TRACE(lose_abort);
    const v1::SequenceState state = Fill(a_, tokens_);
    lossy_->num_commits = 0;
    lossy_->lose_abort = lose_abort;
    auto sent = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE);
    EXPECT_GE(lossy_->num_commits, 2);
    EXPECT_TRUE(b_.client->Get(state.sequence_id()).ok());
    if (lose_abort) {
      EXPECT_EQ(GetReason(sent.status()), "TRANSFER_UNRESOLVED") << sent.status();
      std::vector<uint32_t> longer = tokens_;
      longer.resize(80, 5);
      const auto refused = a_.client->Append(state, longer, longer.size());
      EXPECT_EQ(GetReason(refused.status()), error_reason::kSequenceMoved) << refused.status();
      lossy_->lose_abort = false;
      EXPECT_TRUE(Eventually([&] {
        sent = a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE);
        return sent.ok();
      })) << sent.status();
    }
    ASSERT_TRUE(sent.ok()) << sent.status();
    EXPECT_EQ(a_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
    ExpectGoesOn(b_, sent->committed().state(), tokens_);
    ASSERT_TRUE(b_.client->Close(*b_.client->Get(state.sequence_id())).ok());
  }
}

}  // namespace
}  // namespace pagetide::transfer_test
