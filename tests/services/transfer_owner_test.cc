// A moved sequence has one owner, whatever else is asked for while it moves.
#include <gtest/gtest.h>

#include <functional>
#include <string>
#include <utility>
#include <vector>

#include "absl/strings/match.h"
#include "kvstore/decorating_page_store.h"
#include "tests/services/transfer_service_fixture.h"
#include "tests/support/timing.h"

namespace pagetide::transfer_test {
namespace {

using ::pagetide::testing::Eventually;

// Lets a test act while a park makes the ownership record.
class HookedStore final : public DecoratingPageStore {
 public:
  explicit HookedStore(PageStore* inner) : DecoratingPageStore(inner) {}
  absl::StatusOr<uint64_t> CompareAndSetRecord(absl::string_view kind, absl::string_view key,
                                               uint64_t expected_version,
                                               std::optional<absl::string_view> value,
                                               MonotonicTime deadline) override {
    if (before_own && absl::StartsWith(key, "sequence/")) std::exchange(before_own, nullptr)();
    return inner()->CompareAndSetRecord(kind, key, expected_version, value, deadline);
  }
  std::function<void()> before_own;
};

absl::StatusOr<v1::ParkSequenceResponse> Park(WorkerUnderTest& worker,
                                              const v1::SequenceState& state,
                                              bool keep_open = false) {
  TestContext context;
  v1::ParkSequenceRequest request;
  request.mutable_sequence()->set_sequence_id(state.sequence_id());
  request.mutable_sequence()->set_epoch(state.epoch());
  request.set_keep_open(keep_open);
  v1::ParkSequenceResponse response;
  const absl::Status status =
      FromGrpcStatus(worker.client->sequences().ParkSequence(&context, request, &response));
  if (!status.ok()) return status;
  return response;
}

absl::StatusOr<v1::ResumeSequenceResponse> Resume(WorkerUnderTest& worker, const std::string& id) {
  TestContext context;
  v1::ResumeSequenceRequest request;
  request.set_sequence_id(id);
  v1::ResumeSequenceResponse response;
  const absl::Status status =
      FromGrpcStatus(worker.client->sequences().ResumeSequence(&context, request, &response));
  if (!status.ok()) return status;
  return response;
}

TEST_F(TransferServiceTest, AMovedSequenceIsParkedAtTheTargetAndResumedAtTheSource) {
  const v1::SequenceState state = Fill(a_, tokens_);
  const auto sent = a_.Send(state, b_.role->address(), v1::TRANSFER_KIND_MOVE);
  ASSERT_TRUE(sent.ok()) << sent.status();
  const auto parked = Park(b_, sent->committed().state());
  ASSERT_TRUE(parked.ok()) << parked.status();
  const auto resumed = Resume(a_, state.sequence_id());
  ASSERT_TRUE(resumed.ok()) << resumed.status();
  EXPECT_EQ(b_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  ExpectGoesOn(a_, *a_.client->Get(state.sequence_id()), tokens_);
}

TEST_F(TransferServiceTest, AParkThatOverlapsAMoveLeavesNoSecondOwner) {
  HookedStore store(&store_);
  WorkerUnderTest c;
  Start("c", "a secret of tests", &c, &store);
  const v1::SequenceState state = Fill(c, tokens_);
  absl::Status moved;
  // Behind the park's snapshot.
  store.before_own = [&] {
    moved = c.Send(state, b_.role->address(), v1::TRANSFER_KIND_MOVE).status();
  };
  const auto parked = Park(c, state);
  ASSERT_TRUE(parked.ok()) << parked.status();
  EXPECT_TRUE(absl::IsAborted(moved)) << moved;
  EXPECT_EQ(GetReason(moved), "SEQUENCE_IS_PARKED");
  EXPECT_EQ(b_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  EXPECT_EQ(c.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
  ASSERT_TRUE(Resume(c, state.sequence_id()).ok());
  ExpectGoesOn(c, *c.client->Get(state.sequence_id()), tokens_);
  // One that came to nothing is in nobody's way.
  const v1::SequenceState other = Fill(c, TestTokens(3, 40));
  v1::SequenceState stale = other;
  stale.set_epoch(9);
  EXPECT_FALSE(Park(c, stale).ok());
  EXPECT_TRUE(c.Send(other, b_.role->address(), v1::TRANSFER_KIND_MOVE).ok());
}

TEST_F(TransferServiceTest, WhileItIsBeingMovedItIsNotParked) {
  const v1::SequenceState state = Fill(a_, tokens_);
  lossy_->lose_answer = true;
  lossy_->lose_abort = true;
  EXPECT_EQ(GetReason(a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE).status()),
            "TRANSFER_UNRESOLVED");
  for (const bool keep_open : {false, true}) {
    EXPECT_EQ(GetReason(Park(a_, state, keep_open).status()), error_reason::kSequenceMoved);
  }
  lossy_->lose_abort = false;
  EXPECT_TRUE(Eventually([&] { return a_.ReasonOfGet(state) == "SEQUENCE_NOT_FOUND"; }));
  EXPECT_EQ(GetReason(Resume(a_, state.sequence_id()).status()), "SEQUENCE_NOT_FOUND");
  ExpectGoesOn(b_, *b_.client->Get(state.sequence_id()), tokens_);
}

TEST_F(TransferServiceTest, ACloseDuringAMoveIsRefusedAndNotForgotten) {
  const v1::SequenceState state = Fill(a_, tokens_);
  lossy_->lose_answer = true;
  lossy_->lose_abort = true;
  EXPECT_EQ(GetReason(a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE).status()),
            "TRANSFER_UNRESOLVED");
  const absl::Status refused = a_.client->Close(state);
  EXPECT_EQ(GetReason(refused), error_reason::kSequenceMoved) << refused;
  lossy_->lose_abort = false;
  EXPECT_TRUE(Eventually([&] { return a_.ReasonOfGet(state) == "SEQUENCE_NOT_FOUND"; }));
  ASSERT_TRUE(b_.client->Close(*b_.client->Get(state.sequence_id())).ok());
  EXPECT_EQ(b_.ReasonOfGet(state), "SEQUENCE_NOT_FOUND");
}

TEST_F(TransferServiceTest, NotThereFromAnotherProcessAtTheAddressEndsNothing) {
  const v1::SequenceState state = Fill(a_, tokens_);
  lossy_->lose_answer = true;
  // Another worker; then another life of the same one.
  WorkerUnderTest others[2];
  for (WorkerUnderTest& other : others) {
    const std::string id = &other == others ? "c" : "b";
    SCOPED_TRACE(id);
    Start(id, "a secret of tests", &other);
    lossy_->ask_instead = other.transfers.get();
    for (int i = 0; i < 3; ++i) {
      EXPECT_EQ(GetReason(a_.Send(state, lossy_->address(), v1::TRANSFER_KIND_MOVE).status()),
                "TRANSFER_UNRESOLVED");
    }
    std::vector<uint32_t> longer = tokens_;
    longer.resize(80, 5);
    EXPECT_EQ(GetReason(a_.client->Append(state, longer, longer.size()).status()),
              error_reason::kSequenceMoved);
  }
  lossy_->ask_instead = nullptr;
  EXPECT_TRUE(Eventually([&] { return a_.ReasonOfGet(state) == "SEQUENCE_NOT_FOUND"; }));
  ExpectGoesOn(b_, *b_.client->Get(state.sequence_id()), tokens_);
}

}  // namespace
}  // namespace pagetide::transfer_test
