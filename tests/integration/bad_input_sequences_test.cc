// Bad input: unknown models and sequences, wrong epochs.
#include "tests/integration/bad_input_fixture.h"

namespace pagetide::testing {
namespace {

using ::testing::HasSubstr;

// ---- unknown model or sequence -----------------------------------------------------------------

TEST_F(BadInputTest, AnUnknownModelIsNotFoundEverywhere) {
  const Held held = Hold();
  const auto other = std::make_shared<const Model>(MakeTestModel({.name = "never-registered"}));
  const std::string digest = other->digest().ToHex();
  const std::string shown = digest.substr(0, 8);
  WorkerClient stranger(worker_->Address("grpc"), other);
  ExpectRefused(stranger.Open({1, 2, 3}).status(), absl::StatusCode::kNotFound, "MODEL_NOT_FOUND",
                shown);
  v1::LookupPrefixRequest lookup;
  lookup.set_model_digest(digest);
  lookup.add_tokens(1);
  v1::LookupPrefixResponse found;
  TestContext lookup_context;
  ExpectRefused(FromGrpcStatus(client_->prefixes().LookupPrefix(&lookup_context, lookup, &found)),
                absl::StatusCode::kNotFound, "MODEL_NOT_FOUND", shown);
  v1::AssignSequenceRequest assign;
  assign.mutable_prompt()->set_model(digest);
  assign.mutable_prompt()->add_tokens(1);
  v1::AssignSequenceResponse assigned;
  TestContext assign_context;
  ExpectRefused(FromGrpcStatus(router_stub_->AssignSequence(&assign_context, assign, &assigned)),
                absl::StatusCode::kNotFound, "MODEL_NOT_FOUND", shown);
  ExpectUnchanged(held);
}

TEST_F(BadInputTest, AnUnknownSequenceIsNotFoundInEveryCall) {
  const Held held = Hold();
  // Of this worker but never opened, and of no worker that ever was.
  const std::string incarnation = held.state.sequence_id().substr(0, 16);
  for (const std::string& id :
       {absl::StrCat(incarnation, "-ffff"), std::string("00000000000000aa-1")}) {
    v1::SequenceState unknown = held.state;
    unknown.set_sequence_id(id);
    v1::SequenceRef ref;
    ref.set_sequence_id(id);
    ref.set_epoch(1);
    std::vector<absl::Status> answers = {
        client_->Get(id).status(),
        client_->WaitReady(id).status(),
        client_->Append(unknown, held.tokens, kLength + 1).status(),
        client_->Fork(unknown, 1).status(),
        client_->Rewind(unknown, 1).status(),
        client_->Verify(id, held.tokens, 0, 1).status(),
        Reserve(ref, 1).status(),
    };
    v1::GetBlockTableRequest table;
    table.set_sequence_id(id);
    v1::GetBlockTableResponse extents;
    TestContext table_context;
    answers.push_back(
        FromGrpcStatus(client_->sequences().GetBlockTable(&table_context, table, &extents)));
    v1::AttendRequest attend;
    attend.set_sequence_id(id);
    v1::AttendResponse attended;
    TestContext attend_context;
    answers.push_back(
        FromGrpcStatus(client_->sequences().Attend(&attend_context, attend, &attended)));
    v1::CommitStepRequest::Item item = StepItem(held, 1);
    *item.mutable_sequence() = ref;
    answers.push_back(CommitStep(item));
    for (size_t i = 0; i < answers.size(); ++i) {
      SCOPED_TRACE(i);
      ExpectRefused(answers[i], absl::StatusCode::kNotFound, "SEQUENCE_NOT_FOUND", id);
    }
  }
  v1::RouterGetSequenceRequest get;
  get.set_sequence_id("00000000000000aa-1");
  v1::RouterGetSequenceResponse got;
  TestContext context;
  ExpectRefused(FromGrpcStatus(router_stub_->GetSequence(&context, get, &got)),
                absl::StatusCode::kNotFound, "SEQUENCE_NOT_FOUND", "00000000000000aa-1");
  for (const char* nonsense : {"", "x", "00000000000000aa", "00000000000000aa-", "-1",
                               "0000000000000000aa-1", "00000000000000aa-1 "}) {
    SCOPED_TRACE(nonsense);
    ExpectInvalid(client_->Get(nonsense).status(), "sequence_id");
  }
  ExpectUnchanged(held);
}

// ---- wrong epoch -------------------------------------------------------------------------------

TEST_F(BadInputTest, AWrongEpochIsStaleInEveryCallThatChangesAnything) {
  const Held held = Hold();
  for (const uint64_t delta : {uint64_t{1}, ~uint64_t{0}}) {  // one later, one earlier
    v1::SequenceState stale = held.state;
    stale.set_epoch(held.state.epoch() + delta);
    const std::string numbers = absl::StrCat("epoch ", stale.epoch(), " != ", held.state.epoch());
    const absl::Status answers[] = {client_->Append(stale, held.tokens, kLength + 1).status(),
                                    client_->Rewind(stale, 3).status(),
                                    client_->Fork(stale, 3).status(), client_->Close(stale),
                                    Reserve(Ref(held, delta), 1).status()};
    for (const absl::Status& status : answers) {
      ExpectRefused(status, absl::StatusCode::kFailedPrecondition, "STALE_EPOCH", numbers);
    }
  }
  v1::SequenceRef ref = Ref(held);
  ref.set_expected_revision(held.state.revision() + 1);
  ExpectRefused(Reserve(ref, 1).status(), absl::StatusCode::kFailedPrecondition,
                "REVISION_MISMATCH", absl::StrCat("revision ", held.state.revision() + 1, " != "));
  ExpectUnchanged(held);
}

// A former owner that still writes must not reach the rows that the owner has staged.
TEST_F(BadInputTest, AWrongEpochDoesNotTouchStagedRows) {
  Held held = Hold();
  const auto slots = Reserve(Ref(held), 1);
  ASSERT_TRUE(slots.ok()) << slots.status();
  const uint64_t reservation = slots->slots(0).reservation_id();
  // The owner stages its rows under a step that is refused for a missing one.
  v1::CommitStepRequest::Item staged = StepItem(held, reservation);
  const v1::RowPart last = staged.rows(3);
  staged.mutable_rows()->RemoveLast();
  ExpectRefused(CommitStep(staged), absl::StatusCode::kFailedPrecondition, "ROWS_MISSING", "");
  v1::CommitStepRequest::Item stale = StepItem(held, reservation);
  *stale.mutable_sequence() = Ref(held, 1);
  for (v1::RowPart& part : *stale.mutable_rows()) part.set_data(std::string(kRowBytes, 'x'));
  ExpectRefused(CommitStep(stale), absl::StatusCode::kFailedPrecondition, "STALE_EPOCH", "epoch");
  v1::AttendRequest attend;
  attend.set_sequence_id(held.state.sequence_id());
  attend.set_epoch(held.state.epoch() + 1);
  attend.set_reservation_id(reservation);
  attend.set_num_queries(1);
  attend.set_query_heads(2);
  attend.set_first_position(held.state.length());
  attend.set_queries(std::string(2 * 8 * 4, '\0'));
  attend.set_k_rows(std::string(kRowBytes, 'x'));
  attend.set_v_rows(std::string(kRowBytes, 'x'));
  v1::AttendResponse attended;
  TestContext context;
  ExpectRefused(FromGrpcStatus(client_->sequences().Attend(&context, attend, &attended)),
                absl::StatusCode::kFailedPrecondition, "STALE_EPOCH", "epoch");
  // The owner sends what was missing, and nothing else.
  staged.clear_rows();
  *staged.add_rows() = last;
  const absl::Status committed = CommitStep(staged);
  ASSERT_TRUE(committed.ok()) << committed;
  ExpectRowsRight(held, held.state.length() + 1);
}

}  // namespace
}  // namespace pagetide::testing
