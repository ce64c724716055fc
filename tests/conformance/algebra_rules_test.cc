// The rules of the algebra through the service: compaction, canonicity, saved state, and every
// refusal, after which all that the service shows of a sequence must be what it was.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "tests/conformance/sequence_algebra.h"
#include "tests/support/timing.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;
using ::pagetide::testing::Row;
using ::pagetide::testing::SequenceAlgebraTest;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;

TEST_F(SequenceAlgebraTest, A10CompactionLeavesContentsAsTheyWere) {
  Start(16, 64);
  std::vector<Row> rows;
  const auto s = Open(200, &rows);
  for (int i = 0; i < 12; ++i) {
    ASSERT_OK(Remove(s, 20 + 12 * i, 27 + 12 * i));
  }
  std::erase_if(rows, [](const Row& row) {
    return row.position >= 20 && row.position < 164 && (row.position - 20) % 12 < 7;
  });
  ExpectRows(s, rows);
  ASSERT_OK(Shift(s, 60, -1, 1000));
  for (Row& row : rows) {
    if (row.position >= 60) row.position += 1000;
  }
  uint64_t moved = 0;
  const uint64_t pages_before = client_->Get(s.sequence_id())->num_pages();
  for (const bool apply : {false, true}) {
    for (int calls = 0;; ++calls) {
      ASSERT_LT(calls, 100);
      v1::CompactSequenceRequest request;
      *request.mutable_sequence() = Ref(s);
      request.set_max_rows(32);
      request.set_apply_shifts(apply);
      auto compacted = Call(&v1::SequenceEditService::StubInterface::Compact, request);
      ASSERT_OK(compacted);
      if (compacted->moved_rows() == 0) break;
      EXPECT_LE(compacted->moved_rows(), 48);  // at most one page more than asked for, a group
      moved += compacted->moved_rows();
      ExpectRows(s, rows);
    }
  }
  EXPECT_GT(moved, 0u);
  auto state = client_->Get(s.sequence_id());
  ASSERT_OK(state);
  EXPECT_LT(state->num_pages(), pages_before);
  EXPECT_EQ(state->canonical_length(), 20);
  TestContext context;
  v1::GetBlockTableRequest request;
  request.set_sequence_id(s.sequence_id());
  v1::GetBlockTableResponse table;
  ASSERT_TRUE(client_->sequences().GetBlockTable(&context, request, &table).ok());
  for (const auto& extent : table.extents()) EXPECT_EQ(extent.pending_shift(), 0);
  ASSERT_OK(Append(s, TestTokens(5, 40), &rows));
  ExpectRows(s, rows);
}

TEST_F(SequenceAlgebraTest, EditsEndCanonicityForLaterPages) {
  Start(16, 64);
  const std::vector<uint32_t> tokens = TestTokens(1, 64);
  std::vector<Row> rows;
  const auto s = Open(64, &rows);
  ASSERT_OK(Remove(s, 16, 32));
  ASSERT_OK(Shift(s, 32, -1, -16));
  ASSERT_OK(Append(s, TestTokens(9, 32)));
  EXPECT_EQ(client_->Get(s.sequence_id())->canonical_length(), 16);
  // A prompt of the tokens that remain finds the untouched page and nothing else.
  std::vector<uint32_t> remaining(tokens.begin(), tokens.begin() + 16);
  remaining.insert(remaining.end(), tokens.begin() + 32, tokens.end());
  for (uint32_t token : TestTokens(9, 32)) remaining.push_back(token);
  auto open = client_->Open(remaining);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 16);
  // The pages of the original prompt are still what their keys say.
  open = client_->Open(tokens);
  ASSERT_OK(open);
  EXPECT_EQ(open->reuse().reused_tokens(), 63);
  ExpectRows(open->state(), std::vector<Row>(rows.begin(), rows.begin() + 63));
}

TEST_F(SequenceAlgebraTest, EditsOfSpilledSequencesComeBackRight) {
  Start(16, 6);
  std::vector<std::vector<Row>> rows(5);
  std::vector<v1::SequenceState> states;
  for (size_t i = 0; i < rows.size(); ++i) states.push_back(Open(60, &rows[i], i + 1));
  for (size_t i = 0; i < rows.size(); ++i) {
    ASSERT_OK(Window(states[i], 5, [](auto& request) { request.set_discard(20); }));
    rows[i].erase(rows[i].begin() + 5, rows[i].begin() + 25);
    for (size_t r = 5; r < rows[i].size(); ++r) rows[i][r].position -= 20;
    ASSERT_OK(Append(states[i], TestTokens(50 + i, 7), &rows[i]));
  }
  for (size_t i = 0; i < rows.size(); ++i) ExpectRows(states[i], rows[i]);
}

TEST_F(SequenceAlgebraTest, AnEditedSequenceIsSavedAndLoadedAsItIs) {
  Start(16, 32);
  std::vector<Row> rows;
  const auto s = Open(70, &rows);
  ASSERT_OK(Remove(s, 20, 30));
  ASSERT_OK(Shift(s, 50, -1, 300));
  rows.erase(rows.begin() + 20, rows.begin() + 30);
  for (Row& row : rows) {
    if (row.position >= 50) row.position += 300;
  }
  const auto sessions = v1::SessionService::NewStub(client_->channel());
  v1::SaveSessionRequest save;
  *save.mutable_sequence() = Ref(s);
  save.set_name("edited");
  v1::SaveSessionResponse saved;
  TestContext save_context;
  absl::Status status = FromGrpcStatus(sessions->SaveSession(&save_context, save, &saved));
  ASSERT_OK(status);
  ASSERT_OK(client_->Close(s));
  v1::LoadSessionRequest load;
  load.set_name("edited");
  v1::LoadSessionResponse loaded;
  TestContext load_context;
  status = FromGrpcStatus(sessions->LoadSession(&load_context, load, &loaded));
  ASSERT_OK(status);
  EXPECT_EQ(loaded.state().canonical_length(), 20);
  EXPECT_EQ(loaded.state().end_position(), 370);
  ExpectRows(loaded.state(), rows);
  ASSERT_OK(Append(loaded.state(), TestTokens(6, 30), &rows));
  ExpectRows(loaded.state(), rows);
}

TEST_F(SequenceAlgebraTest, ARepeatedRequestReturnsTheFirstAnswer) {
  const auto s = Open(40);
  auto first = Remove(s, 5, 10, "once");
  ASSERT_OK(first);
  auto second = Remove(s, 5, 10, "once");
  ASSERT_OK(second);
  EXPECT_EQ(first->SerializeAsString(), second->SerializeAsString());
  EXPECT_EQ(client_->Get(s.sequence_id())->revision(), s.revision() + 1);
  EXPECT_EQ(GetReason(Remove(s, 5, 11, "once").status()), "REQUEST_ID_REUSED");
}

TEST_F(SequenceAlgebraTest, RefusalsChangeNothing) {
  std::vector<Row> rows;
  const auto s = Open(300, &rows);
  const auto t = Open(100, nullptr, 2);
  constexpr int64_t kMin = std::numeric_limits<int64_t>::min();
  constexpr int64_t kMax = std::numeric_limits<int64_t>::max();
  v1::SequenceState stale = s, unknown = s;
  stale.set_epoch(s.epoch() + 1);
  unknown.set_sequence_id(absl::StrCat(s.sequence_id().substr(0, 17), "ffffff"));
  const std::string before = DigestOf(s) + DigestOf(t);
  struct Case {
    const char* what;
    absl::StatusCode code;
    const char* reason;
    absl::Status status;
  };
  const auto window = [&](int64_t keep, std::function<void(v1::ShiftWindowRequest&)> amount) {
    return Window(s, keep, amount).status();
  };
  const auto kInvalid = absl::StatusCode::kInvalidArgument;
  const auto kFailed = absl::StatusCode::kFailedPrecondition;
  const std::vector<Case> cases = {
      {"a range that begins behind its end", kInvalid, "", Remove(s, 9, 8).status()},
      {"an unknown sequence", absl::StatusCode::kNotFound, "SEQUENCE_NOT_FOUND",
       Remove(unknown, 0, 1).status()},
      {"a stale epoch", kFailed, "STALE_EPOCH", Remove(stale, 0, 1).status()},
      {"a stale epoch of the source", kFailed, "STALE_EPOCH", Copy(stale, t, 0, 1).status()},
      {"source and target the same", kInvalid, "", Copy(s, s, 0, 1).status()},
      {"an occupied position", kFailed, "POSITION_OCCUPIED", Copy(s, t, 50, 60).status()},
      {"a shift onto others", kFailed, "POSITION_OCCUPIED", Shift(s, 100, -1, -1).status()},
      {"a shift past 2^31", kInvalid, "", Shift(s, 0, -1, int64_t{1} << 31).status()},
      {"a shift to 2^31", kInvalid, "", Shift(s, 0, -1, 2147483647 - 298).status()},
      {"the least shift", kInvalid, "", Shift(s, 0, -1, kMin).status()},
      {"the greatest shift", kInvalid, "", Shift(s, 0, -1, kMax).status()},
      {"a mode that is none", kInvalid, "",
       Shift(s, 0, -1, 1, static_cast<v1::OnShared>(9)).status()},
      {"divisor 0", kInvalid, "", Divide(s, 0, -1, 0).status()},
      {"a negative divisor", kInvalid, "", Divide(s, 0, -1, -2).status()},
      {"positions that meet", kFailed, "POSITION_OCCUPIED", Divide(s, 10, -1, 2).status()},
      {"no amount", kInvalid, "", window(1, [](auto&) {})},
      {"keep < 0", kInvalid, "", window(-1, [](auto& r) { r.set_discard(1); })},
      {"keep above the length", kInvalid, "", window(301, [](auto& r) { r.set_discard(0); })},
      {"discard above the rest", kInvalid, "", window(1, [](auto& r) { r.set_discard(300); })},
      {"fraction above 1", kInvalid, "", window(1, [](auto& r) { r.set_fraction(1.01); })},
      {"no fraction", kInvalid, "", window(1, [](auto& r) { r.set_fraction(std::nan("")); })},
      {"rewind behind the end", kInvalid, "", client_->Rewind(s, 301).status()},
      {"rewind to -1", kInvalid, "", client_->Rewind(s, -1).status()},
      {"keep only nothing", kInvalid, "", KeepOnly({}).status()},
      {"keep only unknown", absl::StatusCode::kNotFound, "SEQUENCE_NOT_FOUND",
       KeepOnly({s, unknown}).status()},
  };
  for (const Case& c : cases) {
    EXPECT_EQ(c.status.code(), c.code) << c.what << ": " << c.status;
    if (*c.reason != 0) {
      EXPECT_EQ(GetReason(c.status), c.reason) << c.what << ": " << c.status;
    }
    EXPECT_FALSE(c.status.message().empty()) << c.what;
  }
  v1::RemoveRangeRequest old;
  *old.mutable_sequence() = Ref(s);
  old.mutable_sequence()->set_expected_revision(s.revision() + 1);
  old.set_p1(-1);
  EXPECT_EQ(GetReason(Call(&v1::SequenceEditService::StubInterface::RemoveRange, old).status()),
            "REVISION_MISMATCH");
  EXPECT_EQ(DigestOf(s) + DigestOf(t), before);
}

TEST_F(SequenceAlgebraTest, NoEditWhileAWriteIsPending) {
  const auto s = Open(20);
  const auto t = Open(30, nullptr, 2);
  v1::ReserveSlotsRequest reserve;
  *reserve.add_items()->mutable_sequence() = Ref(s);
  reserve.mutable_items(0)->set_num_tokens(2);
  v1::ReserveSlotsResponse slots;
  TestContext context;
  ASSERT_TRUE(client_->sequences().ReserveSlots(&context, reserve, &slots).ok());
  const std::string before = DigestOf(s) + DigestOf(t);
  for (const absl::Status& status :
       {Remove(s, 0, 3).status(), Shift(s, 0, -1, 3).status(), Divide(s, 0, -1, 2).status(),
        Copy(t, s, 25, 30).status(), KeepOnly({t}).status(), Clear(s, true).status(),
        Reorder({s, t}, {1, 0}, false).status(), client_->Rewind(s, 3).status()}) {
    EXPECT_EQ(GetReason(status), "PENDING_WRITE") << status;
  }
  EXPECT_EQ(DigestOf(s) + DigestOf(t), before);
  // As a source it does no harm: its committed rows do not change.
  ASSERT_OK(Copy(s, Open(), 0, -1));
}

TEST_F(SequenceAlgebraTest, NoEditWhileAnAppendIsOpen) {
  const auto s = Open(20);
  const auto t = Open(30, nullptr, 2);
  const std::string before = DigestOf(s) + DigestOf(t);
  TestContext context;
  v1::AppendTokensResponse response;
  auto writer = client_->sequences().AppendTokens(&context, &response);
  v1::AppendTokensRequest message;
  *message.mutable_header()->mutable_sequence() = Ref(s);
  message.mutable_header()->set_append_id("open");
  message.mutable_header()->set_expected_length(20);
  message.mutable_header()->add_tokens(7);
  ASSERT_TRUE(writer->Write(message));
  ASSERT_TRUE(Eventually([&] { return client_->Get(s.sequence_id())->pending_tokens() == 1; }));
  std::vector<v1::SequenceEdit> edits(1);
  edits[0].mutable_rewind()->set_length(3);
  for (const absl::Status& status :
       {Remove(s, 0, 3).status(), Shift(s, 0, -1, 3).status(), Divide(s, 0, -1, 2).status(),
        Window(s, 2, [](auto& r) { r.set_discard(3); }).status(), Edit(s, edits).status(),
        Copy(t, s, 25, 30).status(), KeepOnly({t}).status(), Clear(s, true).status(),
        Reorder({s, t}, {1, 0}, false).status(), client_->Rewind(s, 3).status()}) {
    EXPECT_EQ(status.code(), absl::StatusCode::kFailedPrecondition) << status;
    EXPECT_EQ(GetReason(status), "PENDING_WRITE") << status;
  }
  context.TryCancel();
  EXPECT_FALSE(writer->Finish().ok());
  EXPECT_TRUE(Eventually([&] { return client_->Get(s.sequence_id())->pending_tokens() == 0; }));
  EXPECT_EQ(DigestOf(s) + DigestOf(t), before);
  ASSERT_OK(Remove(s, 0, 3));
}

TEST_F(SequenceAlgebraTest, NothingGoesBehindTheLastPosition) {
  std::vector<Row> rows;
  const auto s = Open(20, &rows);
  constexpr int64_t kLast = 2147483647;
  ASSERT_OK(Shift(s, 0, -1, kLast - 20));  // one position is left
  for (Row& row : rows) row.position += kLast - 20;
  EXPECT_EQ(client_->Get(s.sequence_id())->end_position(), kLast);
  const std::string before = DigestOf(s);
  for (const absl::Status& status :
       {Append(s, {1, 2}).status(), Reserve(s, 2, {}).status(), Shift(s, 0, -1, 2).status(),
        Shift(s, 5, -1, kLast).status()}) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
    EXPECT_NE(status.message().find("2147483647"), std::string::npos) << status;
  }
  EXPECT_EQ(DigestOf(s), before);
  ASSERT_OK(Append(s, {1}));
  EXPECT_TRUE(absl::IsInvalidArgument(Append(s, {2}).status()));
  EXPECT_EQ(ExtentOf(s), absl::StrCat("[", kLast - 20, ", ", kLast, "] 21 contiguous; [",
                                      kLast - 20, ", ", kLast, "] 21 contiguous; "));
}

TEST_F(SequenceAlgebraTest, RowsThatCannotTurnCannotMove) {
  Start(16, 16, /*can_shift=*/false);
  const auto s = Open(20);
  const std::string before = DigestOf(s);
  for (const absl::Status& status : {Shift(s, 0, -1, 3).status(), Divide(s, 0, -1, 2).status(),
                                     Window(s, 2, [](auto& r) { r.set_discard(3); }).status()}) {
    EXPECT_EQ(GetReason(status), "CANNOT_SHIFT") << status;
  }
  EXPECT_EQ(DigestOf(s), before);
  ASSERT_OK(Remove(s, 3, 5));  // they can be cut
}

}  // namespace
}  // namespace pagetide
