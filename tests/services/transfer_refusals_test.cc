// What TransferService refuses: who is not believed, what cannot be sent, bad input.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "tests/services/transfer_service_fixture.h"

namespace pagetide::transfer_test {
namespace {

TEST_F(TransferServiceTest, OnlyAWorkerOfTheDeploymentIsBelieved) {
  const v1::SequenceState state = Fill(a_, tokens_);
  WorkerUnderTest stranger;
  Start("c", "another secret of tests", &stranger);
  const auto refused = a_.Send(state, stranger.role->address(), v1::TRANSFER_KIND_COPY);
  EXPECT_TRUE(absl::IsPermissionDenied(refused.status())) << refused.status();
  EXPECT_EQ(GetReason(refused.status()), "NOT_PROVEN");
  // Nor is anything that was changed on the way.
  const auto denied = [&](std::function<void(v1::ReserveTransferRequest&)> change) {
    lossy_->change_reserve = std::move(change);
    return a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE).status();
  };
  using Request = v1::ReserveTransferRequest;
  for (const absl::Status& status : {denied([](Request& r) { r.set_epoch(9); }),
                                     denied([](Request& r) { r.set_kind(v1::TRANSFER_KIND_COPY); }),
                                     denied([](Request& r) { r.mutable_pages(1)->set_rows(3); }),
                                     denied([](Request& r) { (*r.mutable_state())[40] ^= 1; }),
                                     denied([](Request& r) { r.clear_proof(); }),
                                     denied([](Request& r) { r.mutable_pages()->RemoveLast(); })}) {
    EXPECT_EQ(GetReason(status), "NOT_PROVEN") << status;
  }
  for (const absl::Status& status :
       {denied([](Request& r) { r.set_kind(v1::TRANSFER_KIND_UNSPECIFIED); }),
        denied([](Request& r) { r.set_kind(static_cast<v1::TransferKind>(9)); }),
        denied([](Request& r) { r.mutable_pages(0)->clear_key(); }),
        denied([](Request& r) { r.mutable_pages(0)->mutable_checksum()->pop_back(); }),
        denied([](Request& r) { r.set_sequence_id("nothing"); }),
        denied([](Request& r) { r.set_model_digest(std::string(64, '0')); }),
        denied([](Request& r) { r.mutable_ttl()->set_seconds(61); }),
        denied([](Request& r) { r.mutable_ttl()->set_nanos(-1); })}) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  }
  EXPECT_EQ(b_.FreeFrames(), kFrames);
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, WhatCannotBeSentIsRefused) {
  const v1::SequenceState state = Fill(a_, tokens_);
  const std::string b = b_.role->address();
  v1::SequenceState stale = state;
  stale.set_epoch(9);
  EXPECT_EQ(GetReason(a_.Send(stale, b, v1::TRANSFER_KIND_COPY).status()),
            error_reason::kStaleEpoch);
  v1::SequenceState unknown = state;
  unknown.set_sequence_id("00000000000000ff-1");
  EXPECT_EQ(GetReason(a_.Send(unknown, b, v1::TRANSFER_KIND_MOVE).status()), "SEQUENCE_NOT_FOUND");
  for (const std::string& address : {std::string(), std::string(2000, 'x')}) {
    EXPECT_TRUE(absl::IsInvalidArgument(a_.Send(state, address, v1::TRANSFER_KIND_COPY).status()));
  }
  EXPECT_TRUE(
      absl::IsInvalidArgument(a_.Send(state, b, static_cast<v1::TransferKind>(9)).status()));
  // Nobody listens there.
  EXPECT_TRUE(absl::IsUnavailable(a_.Send(state, "127.0.0.1:1", v1::TRANSFER_KIND_MOVE).status()));
  // It is open there already: here.
  EXPECT_TRUE(
      absl::IsAlreadyExists(a_.Send(state, a_.role->address(), v1::TRANSFER_KIND_MOVE).status()));
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, AFullTargetSaysHowMuchIsNeededAndFree) {
  // Without a store what an open sequence holds stays in its frames.
  WorkerUnderTest full_worker;
  Start("d", "a secret of tests", &full_worker, /*store=*/nullptr);
  Fill(full_worker, TestTokens(9, 13 * 16));
  const v1::SequenceState state = Fill(a_, tokens_);
  TestContext context(absl::Milliseconds(500));
  v1::SendSequenceRequest request;
  request.mutable_sequence()->set_sequence_id(state.sequence_id());
  request.mutable_sequence()->set_epoch(state.epoch());
  request.set_target_address(full_worker.role->address());
  v1::SendSequenceResponse response;
  const absl::Status full =
      FromGrpcStatus(a_.transfers->SendSequence(&context, request, &response));
  EXPECT_TRUE(absl::IsResourceExhausted(full)) << full;
  EXPECT_EQ(GetReasonMetadata(full, "needed"), "5");
  EXPECT_EQ(GetReasonMetadata(full, "free"), "3");
  ExpectGoesOn(a_, state, tokens_);
}

TEST_F(TransferServiceTest, RawCallsWithBadInputAreRefused) {
  const auto push = [&](const std::vector<v1::PushPagesRequest>& parts) {
    TestContext context;
    v1::PushPagesResponse response;
    const auto writer = b_.transfers->PushPages(&context, &response);
    for (const v1::PushPagesRequest& part : parts) {
      if (!writer->Write(part)) break;
    }
    writer->WritesDone();
    return FromGrpcStatus(writer->Finish());
  };
  EXPECT_TRUE(absl::IsInvalidArgument(push({})));
  v1::PushPagesRequest part;
  EXPECT_EQ(GetReason(push({part})), "TRANSFER_NOT_FOUND");
  part.set_transfer_id(std::string(100'000, 'x'));
  EXPECT_EQ(GetReason(push({part})), "TRANSFER_NOT_FOUND");
  TestContext commit_context, abort_context, reserve_context;
  v1::CommitTransferResponse committed;
  EXPECT_EQ(
      GetReason(FromGrpcStatus(b_.transfers->CommitTransfer(&commit_context, {}, &committed))),
      "TRANSFER_NOT_FOUND");
  v1::AbortTransferResponse aborted;
  EXPECT_TRUE(b_.transfers->AbortTransfer(&abort_context, {}, &aborted).ok());
  EXPECT_FALSE(aborted.has_committed());
  v1::ReserveTransferResponse reserved;
  EXPECT_TRUE(absl::IsInvalidArgument(
      FromGrpcStatus(b_.transfers->ReserveTransfer(&reserve_context, {}, &reserved))));
}

}  // namespace
}  // namespace pagetide::transfer_test
