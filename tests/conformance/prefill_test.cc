// FEATURES A1, A6 to A9 and A12 through a real worker process: the pool, dedup, layer-wise append,
// admission, cancellation and idempotency, racing prefills.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdio>
#include <memory>
#include <string>
#include <thread>
#include <vector>

#include "base/byte_size.h"
#include "base/error_info.h"
#include "tests/conformance/worker_process.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Eventually;
using ::pagetide::testing::MakeTestModel;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestModelOptions;
using ::pagetide::testing::TestRows;
using ::pagetide::testing::TestTokens;
using ::testing::HasSubstr;

class PrefillTest : public testing::WorkerProcessFixture {
 protected:
  absl::Status StartTest(const TestModelOptions& options, uint64_t frames,
                         uint64_t spare_bytes = 0) {
    return Start(std::make_shared<const Model>(MakeTestModel(options)), frames, spare_bytes);
  }
  // One decode step with its rows in the commit.
  absl::StatusOr<v1::SequenceState> Step(const v1::SequenceState& state,
                                         const std::vector<uint32_t>& tokens) {
    const uint64_t at = state.length();
    PT_ASSIGN_OR_RETURN(const uint64_t reservation, Reserve(state, 1, absl::Seconds(120)));
    v1::CommitStepRequest request;
    v1::CommitStepRequest::Item* item = request.add_items();
    Refer(state, item->mutable_sequence());
    item->set_reservation_id(reservation);
    item->add_tokens(tokens[at]);
    const GroupGeometry& group = model_->geometry().group(0);
    for (uint32_t layer = 0; layer < group.num_layers(); ++layer) {
      for (RowKind kind : {RowKind::kK, RowKind::kV}) {
        v1::RowPart* part = item->add_rows();
        part->set_layer(layer);
        part->set_kind(kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V);
        part->set_num_tokens(1);
        part->set_data(TestRows(group, tokens, at, at + 1, layer, kind));
      }
    }
    TestContext context;
    v1::CommitStepResponse response;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->sequences().CommitStep(&context, request, &response)));
    if (response.results(0).code() != 0) {
      return absl::InternalError(response.results(0).message());
    }
    return client_->Get(state.sequence_id());
  }
  absl::StatusOr<uint64_t> Reserve(const v1::SequenceState& state, uint32_t num_tokens,
                                   absl::Duration deadline) {
    TestContext context(deadline);
    v1::ReserveSlotsRequest request;
    v1::ReserveSlotsRequest::Item* item = request.add_items();
    Refer(state, item->mutable_sequence());
    item->set_num_tokens(num_tokens);
    v1::ReserveSlotsResponse response;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->sequences().ReserveSlots(&context, request, &response)));
    return response.slots(0).reservation_id();
  }
  absl::Status Abort(const v1::SequenceState& state, uint64_t reservation) {
    TestContext context;
    v1::AbortReservationRequest request;
    request.set_sequence_id(state.sequence_id());
    request.set_epoch(state.epoch());
    request.set_reservation_id(reservation);
    v1::AbortReservationResponse response;
    return FromGrpcStatus(client_->sequences().AbortReservation(&context, request, &response));
  }
  // The refusal of a reservation that does not get its frames. A machine that is busy may let the
  // caller's own deadline pass first: then once more.
  absl::Status Refusal(const v1::SequenceState& state, uint32_t num_tokens) {
    absl::Status status;
    Eventually([&] {
      status = Reserve(state, num_tokens, absl::Seconds(1)).status();
      return !absl::IsDeadlineExceeded(status) && GetReason(status) != "PENDING_WRITE";
    });
    return status;
  }
  // Once a call for the sequence stands in line for its frames.
  bool StandsInLine(const v1::SequenceState& state) {
    return Eventually([&] {
      const auto now = client_->Get(state.sequence_id());
      return now.ok() && now->pending_tokens() > 0;
    });
  }
  absl::StatusOr<v1::ExtendMatchResponse> Extend(const v1::SequenceState& state,
                                                 const std::vector<uint32_t>& tokens,
                                                 absl::Duration claim = absl::ZeroDuration(),
                                                 absl::Duration wait = absl::ZeroDuration(),
                                                 const std::string& request_id = "") {
    TestContext context;
    v1::ExtendMatchRequest request;
    request.set_request_id(request_id);
    Refer(state, request.mutable_sequence());
    request.set_expected_length(state.length());
    request.mutable_tokens()->Add(tokens.begin() + static_cast<ptrdiff_t>(state.length()),
                                  tokens.end());
    request.mutable_claim()->set_nanos(static_cast<int32_t>(
        absl::ToInt64Nanoseconds(claim - absl::Floor(claim, absl::Seconds(1)))));
    request.mutable_claim()->set_seconds(absl::ToInt64Seconds(claim));
    request.mutable_wait()->set_seconds(absl::ToInt64Seconds(wait));
    v1::ExtendMatchResponse response;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->prefixes().ExtendMatch(&context, request, &response)));
    return response;
  }
  uint64_t FramesInUse() {
    TestContext context;
    v1::GetMemoryBreakdownResponse response;
    EXPECT_TRUE(client_->admin().GetMemoryBreakdown(&context, {}, &response).ok());
    uint64_t used = 0;
    for (const auto& pool : response.pools()) used += pool.num_frames() - pool.free_frames();
    return used;
  }
};

TEST_F(PrefillTest, A1TheStartSaysWhatThePoolIs) {
  ASSERT_OK(StartTest({.page_tokens = 256, .num_layers = 3, .kv_heads = 1, .dim = 2}, 7,
                      /*spare_bytes=*/256 * 3 * 2 * 8 - 1));
  ASSERT_EQ(model_->geometry().bytes_per_page_of_tokens(), 256u * 3 * 2 * 8);
  ASSERT_OK(client_->Open({}));
  const std::string size = FormatByteSize(7 * 256 * 3 * 2 * 8);
  EXPECT_TRUE(Eventually([&] {
    const std::string log = worker_->Log();
    return log.find("7 frames x") != std::string::npos && log.find(size) != std::string::npos &&
           log.find("3 layers, K f32, V f32") != std::string::npos;
  })) << size;
}

TEST_F(PrefillTest, A6APageThatFillsTwiceIsKeptOnce) {
  ASSERT_OK(StartTest({.batch_invariant = true}, 32));
  const std::vector<uint32_t> tokens = TestTokens(1, 64);
  auto a = OpenAndFill({tokens.begin(), tokens.begin() + 40});
  ASSERT_OK(a);
  auto b = OpenAndFill({tokens.begin(), tokens.begin() + 40});
  ASSERT_OK(b);
  EXPECT_EQ(FramesInUse(), 4u);  // two shared pages, two tails
  // Both generate the same tokens: each page that fills is one page.
  for (uint64_t length = 40; length < 64; ++length) {
    a = Step(*a, tokens);
    ASSERT_OK(a);
    b = Step(*b, tokens);
    ASSERT_OK(b);
  }
  const auto of_a = BlockTable(*a), of_b = BlockTable(*b);
  ASSERT_OK(of_a);
  ASSERT_OK(of_b);
  ASSERT_EQ(of_a->extents_size(), 4);
  for (int i = 0; i < 4; ++i) {
    EXPECT_EQ(of_a->extents(i).page_id(), of_b->extents(i).page_id());
    EXPECT_EQ(of_a->extents(i).references(), 2);
  }
  EXPECT_EQ(FramesInUse(), 4u);
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_pages_deduplicated_total", 4));
  ASSERT_OK(client_->Verify(b->sequence_id(), tokens, 0, 64));
  ASSERT_OK(client_->Close(*a));
  ASSERT_OK(client_->Verify(b->sequence_id(), tokens, 0, 64));
}

TEST_F(PrefillTest, A6PagesOfAnEngineWhoseBitsDependOnTheBatchStay) {
  ASSERT_OK(StartTest({}, 32));
  const std::vector<uint32_t> tokens = TestTokens(1, 40);
  ASSERT_OK(OpenAndFill(tokens));
  auto b = OpenAndFill(tokens);
  ASSERT_OK(b);
  EXPECT_EQ(FramesInUse(), 6u);
  ASSERT_OK(client_->Verify(b->sequence_id(), tokens, 0, 40));
}

TEST_F(PrefillTest, A7LayersArriveThroughAStagingOfNoMoreThanTwo) {
  // 32 layers × 1024 tokens × 4096 B: K and V rows of 2 KiB each.
  ASSERT_OK(StartTest({.page_tokens = 256, .num_layers = 32, .kv_heads = 1, .dim = 512}, 4));
  const GroupGeometry& group = model_->geometry().group(0);
  ASSERT_EQ(group.k_row_bytes() + group.v_row_bytes(), 4096u);
  const std::vector<uint32_t> tokens = TestTokens(1, 1024);
  auto state = OpenAlone();
  ASSERT_OK(state);
  TestContext context(absl::Seconds(500));
  v1::AppendTokensResponse response;
  auto writer = client_->sequences().AppendTokens(&context, &response);
  v1::AppendTokensRequest message;
  v1::AppendHeader* header = message.mutable_header();
  Refer(*state, header->mutable_sequence());
  header->set_append_id("layers");
  header->mutable_tokens()->Add(tokens.begin(), tokens.end());
  ASSERT_TRUE(writer->Write(message));
  ASSERT_TRUE(StandsInLine(*state));
  for (uint32_t layer = 0; layer < 32; ++layer) {
    for (RowKind kind : {RowKind::kK, RowKind::kV}) {
      for (uint32_t at = 0; at < 1024; at += 512) {
        v1::RowPart* part = message.mutable_rows();
        part->set_layer(layer);
        part->set_kind(kind == RowKind::kK ? v1::ROW_KIND_K : v1::ROW_KIND_V);
        part->set_first_token(at);
        part->set_num_tokens(512);
        part->set_data(TestRows(group, tokens, at, at + 512, layer, kind));
        ASSERT_EQ(part->data().size(), 1u << 20);
        ASSERT_TRUE(writer->Write(message));
      }
    }
    if (layer % 10 != 0) continue;
    // No token is there before all layers are.
    auto during = client_->Get(state->sequence_id());
    ASSERT_OK(during);
    EXPECT_EQ(during->length(), 0);
    EXPECT_EQ(during->pending_tokens(), 1024);
  }
  writer->WritesDone();
  ASSERT_OK(FromGrpcStatus(writer->Finish()));
  EXPECT_EQ(response.state().length(), 1024);
  ASSERT_OK(client_->Verify(state->sequence_id(), tokens, 1000, 1024));
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_append_staging_peak_bytes", 1 << 20));
  auto peak = client_->Stat("pagetide_worker_append_staging_peak_bytes");
  ASSERT_OK(peak);
  EXPECT_LE(*peak, 8.0 * kMiB);
  std::printf("{\"case\":\"A7\",\"bytes\":%llu,\"staging_peak_bytes\":%.0f}\n",
              static_cast<unsigned long long>(1024ull * 32 * 4096), *peak);
}

TEST_F(PrefillTest, A8WhatNeverFitsIsToldWithItsNumbers) {
  ASSERT_OK(StartTest({}, 4));
  auto state = OpenAlone();
  ASSERT_OK(state);
  const absl::Status status = client_->Append(*state, TestTokens(1, 65), 65).status();
  EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  EXPECT_EQ(GetReason(status), "POOL_TOO_SMALL");
  EXPECT_EQ(GetReasonMetadata(status, "needed"), "5");
  EXPECT_EQ(GetReasonMetadata(status, "frames"), "4");
  EXPECT_EQ(client_->Get(state->sequence_id())->revision(), state->revision());
}

TEST_F(PrefillTest, A8WhatDoesNotFitNowWaitsInLineOrIsToldWhy) {
  ASSERT_OK(StartTest({}, 4));
  auto holder = OpenAlone(), large = OpenAlone(), small = OpenAlone();
  ASSERT_OK(holder);
  ASSERT_OK(large);
  ASSERT_OK(small);
  auto held = Reserve(*holder, 48, absl::Seconds(120));  // three of the four frames
  ASSERT_OK(held);
  const absl::Status status = Refusal(*large, 32);
  EXPECT_TRUE(absl::IsResourceExhausted(status)) << status;
  EXPECT_EQ(GetReason(status), "POOL_EXHAUSTED");
  EXPECT_EQ(GetReasonMetadata(status, "needed"), "2");
  EXPECT_EQ(GetReasonMetadata(status, "evictable"), "0");
  EXPECT_TRUE(GetRetryDelay(status).has_value());
  EXPECT_TRUE(
      Eventually([&] { return client_->Get(large->sequence_id())->pending_tokens() == 0; }));
  // A call that waits is not passed by one that wants a frame too, though there is one.
  absl::StatusOr<uint64_t> granted;
  std::thread waits([&] { granted = Reserve(*large, 32, absl::Seconds(120)); });
  EXPECT_TRUE(StandsInLine(*large));
  EXPECT_TRUE(absl::IsResourceExhausted(Refusal(*small, 1)));
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_frame_waits_total", 3));
  const absl::Status aborted = Abort(*holder, *held);
  waits.join();
  ASSERT_OK(aborted);
  ASSERT_OK(granted);
  ASSERT_OK(Reserve(*small, 1, absl::Seconds(120)));
}

TEST_F(PrefillTest, A8CallsThatNeedNoFramePassOneThatWaitsAtMost64Times) {
  ASSERT_OK(StartTest({}, 4));
  const std::vector<uint32_t> tokens = TestTokens(1, 16);
  auto reader = OpenAndFill(tokens);
  ASSERT_OK(reader);
  auto holder = OpenAlone(), large = OpenAlone();
  ASSERT_OK(holder);
  ASSERT_OK(large);
  auto held = Reserve(*holder, 32, absl::Seconds(120));
  ASSERT_OK(held);
  // The reader's page is pinned while a lease is on it, so that nothing can go.
  TestContext context;
  v1::GetBlockTableRequest pin;
  pin.set_sequence_id(reader->sequence_id());
  pin.mutable_lease()->set_seconds(30);
  v1::GetBlockTableResponse pinned;
  ASSERT_OK(FromGrpcStatus(client_->sequences().GetBlockTable(&context, pin, &pinned)));
  absl::StatusOr<uint64_t> granted;
  std::thread waits([&] { granted = Reserve(*large, 32, absl::Seconds(120)); });
  EXPECT_TRUE(StandsInLine(*large));
  const auto read = [&](absl::Duration deadline) {
    TestContext read_context(deadline);
    v1::ReadRowsRequest request;
    request.set_sequence_id(reader->sequence_id());
    auto stream = client_->sequences().ReadRows(&read_context, request);
    v1::ReadRowsResponse part;
    while (stream->Read(&part)) {
    }
    return FromGrpcStatus(stream->Finish());
  };
  for (int i = 0; i < 64; ++i) EXPECT_TRUE(read(absl::Seconds(120)).ok()) << i;
  const absl::Status behind = read(absl::Seconds(1));
  EXPECT_TRUE(absl::IsResourceExhausted(behind) || absl::IsDeadlineExceeded(behind)) << behind;
  const absl::Status aborted = Abort(*holder, *held);
  waits.join();
  ASSERT_OK(aborted);
  ASSERT_OK(granted);
  ASSERT_OK(read(absl::Seconds(120)));
}

TEST_F(PrefillTest, A9CancelKeepsCommittedPages) {
  ASSERT_OK(StartTest({}, 16));
  const std::vector<uint32_t> tokens = TestTokens(1, 64);
  auto state = OpenAndFill({tokens.begin(), tokens.begin() + 32});
  ASSERT_OK(state);
  {
    TestContext context;
    v1::AppendTokensResponse response;
    auto writer = client_->sequences().AppendTokens(&context, &response);
    v1::AppendTokensRequest message;
    v1::AppendHeader* header = message.mutable_header();
    Refer(*state, header->mutable_sequence());
    header->set_append_id("cancelled");
    header->set_expected_length(32);
    header->mutable_tokens()->Add(tokens.begin() + 32, tokens.end());
    ASSERT_TRUE(writer->Write(message));
    ASSERT_TRUE(StandsInLine(*state));
    context.TryCancel();
    EXPECT_EQ(writer->Finish().error_code(), grpc::StatusCode::CANCELLED);
  }
  EXPECT_TRUE(Eventually([&] {
    const auto now = client_->Get(state->sequence_id());
    return now.ok() && now->pending_tokens() == 0;
  }));
  EXPECT_EQ(client_->Get(state->sequence_id())->length(), 32);
  ASSERT_OK(client_->Close(*state));
  EXPECT_EQ(ReusedTokens(tokens).value_or(0), 32u);
}

TEST_F(PrefillTest, A9ARequestIdGivesTheFirstAnswerAgainForTheLast32) {
  ASSERT_OK(StartTest({}, 16));
  const std::vector<uint32_t> tokens = TestTokens(1, 64);
  auto start = OpenAlone();
  ASSERT_OK(start);
  std::vector<v1::AppendTokensResponse> first = {{}};
  *first[0].mutable_state() = *start;
  for (size_t i = 1; i <= 33; ++i) {
    auto appended = client_->Append(first.back().state(), tokens, i, absl::StrCat("r", i));
    ASSERT_OK(appended);
    first.push_back(*appended);
  }
  const uint64_t revision = first.back().state().revision();
  for (size_t i = 2; i <= 33; ++i) {
    auto again = client_->Append(first[i - 1].state(), tokens, i, absl::StrCat("r", i));
    ASSERT_OK(again);
    EXPECT_EQ(again->SerializeAsString(), first[i].SerializeAsString()) << i;
  }
  // Forgotten, and so tried again: its expected length says that it is of the past.
  EXPECT_EQ(GetReason(client_->Append(first[0].state(), tokens, 1, "r1").status()),
            "LENGTH_MISMATCH");
  const absl::Status reused = client_->Append(first[32].state(), tokens, 34, "r33").status();
  EXPECT_TRUE(absl::IsInvalidArgument(reused)) << reused;
  EXPECT_EQ(GetReason(reused), "REQUEST_ID_REUSED");
  EXPECT_EQ(client_->Get(start->sequence_id())->revision(), revision);
}

TEST_F(PrefillTest, A12WhatOthersCommittedIsTakenOverAtAChunkBoundary) {
  ASSERT_OK(StartTest({.page_tokens = 256, .num_layers = 1}, 16));
  const std::vector<uint32_t> tokens = TestTokens(1, 1000);
  auto a = OpenAlone(), b = OpenAlone();
  ASSERT_OK(a);
  ASSERT_OK(b);
  auto chunk = client_->Append(*b, tokens, 256);
  ASSERT_OK(chunk);
  EXPECT_EQ(Extend(chunk->state(), tokens)->extended_tokens(), 0);
  ASSERT_OK(client_->Append(*a, tokens, 800));
  auto longer = Extend(chunk->state(), tokens, {}, {}, "extend");
  ASSERT_OK(longer);
  EXPECT_EQ(longer->extended_tokens(), 512);
  EXPECT_EQ(longer->state().length(), 768);
  // The first answer again, and no second effect.
  auto again = Extend(chunk->state(), tokens, {}, {}, "extend");
  ASSERT_OK(again);
  EXPECT_EQ(again->SerializeAsString(), longer->SerializeAsString());
  auto done = client_->Append(longer->state(), tokens, 1000);
  ASSERT_OK(done);
  EXPECT_EQ(done->appended_tokens(), 232);
  ASSERT_OK(client_->Verify(b->sequence_id(), tokens, 0, 1000));
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_tokens_extended_total", 512));
}

TEST_F(PrefillTest, A12AClaimMakesTheSecondWaitAndEndsByItself) {
  ASSERT_OK(StartTest({.page_tokens = 256, .num_layers = 1}, 16));
  const std::vector<uint32_t> tokens = TestTokens(1, 600);
  auto a = OpenAlone(), b = OpenAlone();
  ASSERT_OK(a);
  ASSERT_OK(b);
  auto first = Extend(*a, tokens, absl::Seconds(60));
  ASSERT_OK(first);
  EXPECT_EQ(first->claim(), v1::CLAIM_STATE_GRANTED);
  EXPECT_EQ(Extend(*b, tokens, absl::Seconds(60))->claim(), v1::CLAIM_STATE_HELD);
  absl::StatusOr<v1::ExtendMatchResponse> second;
  std::thread waits([&] { second = Extend(*b, tokens, absl::Seconds(60), absl::Seconds(60)); });
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_compute_claim_waits_total", 1));
  const absl::Status appended = client_->Append(*a, tokens, 600).status();
  waits.join();
  ASSERT_OK(appended);
  ASSERT_OK(second);
  EXPECT_EQ(second->extended_tokens(), 512);
  ASSERT_OK(client_->Verify(b->sequence_id(), tokens, 0, 512));
  // Whoever claims and then says nothing holds nobody up for longer than the claim.
  auto c = OpenAlone(), d = OpenAlone();
  ASSERT_OK(c);
  ASSERT_OK(d);
  const std::vector<uint32_t> other = TestTokens(2, 600);
  EXPECT_EQ(Extend(*c, other, absl::Milliseconds(100))->claim(), v1::CLAIM_STATE_GRANTED);
  EXPECT_EQ(Extend(*d, other, absl::Seconds(60), absl::Seconds(60))->claim(),
            v1::CLAIM_STATE_GRANTED);
}

TEST_F(PrefillTest, A12BadInputIsRefusedAndChangesNothing) {
  ASSERT_OK(StartTest({.vocabulary_size = 1u << 31}, 16));
  const std::vector<uint32_t> tokens = TestTokens(1, 64);
  auto state = OpenAndFill({tokens.begin(), tokens.begin() + 20});
  ASSERT_OK(state);
  v1::SequenceState wrong = *state;
  wrong.set_length(19);
  EXPECT_EQ(GetReason(Extend(wrong, tokens).status()), "LENGTH_MISMATCH");
  wrong = *state;
  wrong.set_epoch(9);
  EXPECT_EQ(GetReason(Extend(wrong, tokens).status()), "STALE_EPOCH");
  for (const absl::Status& status :
       {Extend(*state, {tokens.begin(), tokens.begin() + 20}).status(),
        Extend(*state, tokens, absl::Seconds(61)).status(),
        Extend(*state, tokens, {}, absl::Seconds(61)).status(),
        Extend(*state, std::vector<uint32_t>(30, 1u << 31)).status()}) {
    EXPECT_TRUE(absl::IsInvalidArgument(status)) << status;
  }
  EXPECT_EQ(client_->Get(state->sequence_id())->SerializeAsString(), state->SerializeAsString());
}

}  // namespace
}  // namespace pagetide
