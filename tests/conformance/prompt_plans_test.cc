// FEATURES F through the service: what a plan counts, what an open by it does, and what is refused.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

#include "tests/conformance/sequence_algebra.h"

namespace pagetide {
namespace {

using ::pagetide::testing::Row;
using ::pagetide::testing::SequenceAlgebraTest;
using ::pagetide::testing::TestContext;
using ::pagetide::testing::TestTokens;
using ::testing::HasSubstr;

using Tokens = std::vector<uint32_t>;

class PromptPlansTest : public SequenceAlgebraTest {
 protected:
  void SetUp() override {}

  // A session of 40, 30 and 50 tokens; rows_ are theirs. Nothing of it stays open.
  void SaveSession(bool can_shift = true) {
    Start(16, 64, can_shift);
    const auto open = Open();
    auto state = Append(open, Session(), &rows_);
    ASSERT_OK(state);
    const auto sessions = v1::SessionService::NewStub(client_->channel());
    v1::SaveSessionRequest save;
    *save.mutable_sequence() = Ref(*state);
    save.set_name("chat");
    v1::SaveSessionResponse saved;
    TestContext context;
    ASSERT_OK(FromGrpcStatus(sessions->SaveSession(&context, save, &saved)));
    ASSERT_OK(client_->Close(*state));
  }
  static Tokens Joined(const Tokens& a, const Tokens& b) {
    Tokens all = a;
    all.insert(all.end(), b.begin(), b.end());
    return all;
  }
  Tokens Session() const { return Joined(Joined(system_, first_), second_); }
  // Without what came first.
  Tokens Prompt() const { return Joined(Joined(system_, second_), new_); }

  absl::StatusOr<v1::PlanPromptResponse> Plan(const Tokens& prompt, uint32_t min_chunk) {
    v1::PlanPromptRequest request;
    request.set_model_digest(model_->digest().ToHex());
    request.mutable_tokens()->Add(prompt.begin(), prompt.end());
    request.add_sessions("chat");
    request.set_min_chunk_tokens(min_chunk);
    v1::PlanPromptResponse response;
    TestContext context;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->prefixes().PlanPrompt(&context, request, &response)));
    return response;
  }
  absl::StatusOr<v1::OpenSequenceResponse> OpenBy(const Tokens& prompt,
                                                  const v1::PromptPlan& plan) {
    v1::OpenSequenceRequest request;
    request.set_model_digest(model_->digest().ToHex());
    request.mutable_tokens()->Add(prompt.begin(), prompt.end());
    *request.mutable_plan() = plan;
    v1::OpenSequenceResponse response;
    TestContext context;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->sequences().OpenSequence(&context, request, &response)));
    return response;
  }
  absl::StatusOr<uint64_t> FoundByKeys(const Tokens& prompt) {
    v1::LookupPrefixRequest request;
    request.set_model_digest(model_->digest().ToHex());
    request.mutable_tokens()->Add(prompt.begin(), prompt.end());
    v1::LookupPrefixResponse response;
    TestContext context;
    PT_RETURN_IF_ERROR(
        FromGrpcStatus(client_->prefixes().LookupPrefix(&context, request, &response)));
    return response.reuse().reused_tokens();
  }
  int NumOpen() {
    v1::ListWorkerSequencesResponse response;
    TestContext context;
    EXPECT_TRUE(client_->sequences().ListWorkerSequences(&context, {}, &response).ok());
    return response.sequences_size();
  }

  const Tokens system_ = TestTokens(1, 40), first_ = TestTokens(2, 30), second_ = TestTokens(3, 50),
               new_ = TestTokens(4, 5);
  std::vector<Row> rows_;
};

TEST_F(PromptPlansTest, F1AChunkIsReusedAtAnotherPositionIfAskedFor) {
  SaveSession();
  auto plan = Plan(Prompt(), 0);
  ASSERT_OK(plan);
  EXPECT_FALSE(plan->plan().approximate());
  EXPECT_EQ(plan->plan().compute_tokens(), 55);
  EXPECT_EQ(plan->plan().chunks_size(), 0);

  plan = Plan(Prompt(), 16);
  ASSERT_OK(plan);
  EXPECT_TRUE(plan->plan().approximate());
  EXPECT_EQ(plan->plan().session(), "chat");
  EXPECT_EQ(plan->plan().min_chunk_tokens(), 16);
  EXPECT_EQ(plan->plan().compute_tokens(), 5);
  EXPECT_EQ(plan->plan().reuse().reused_tokens(), 90);
  EXPECT_EQ(plan->plan().reuse().chunk_tokens(), 50);
  ASSERT_EQ(plan->plan().chunks_size(), 1);
  EXPECT_EQ(plan->plan().chunks(0).session_begin(), 70);
  EXPECT_EQ(plan->plan().chunks(0).prompt_begin(), 40);
  EXPECT_EQ(plan->plan().chunks(0).count(), 50);
  ASSERT_EQ(plan->candidates_size(), 2);
  EXPECT_EQ(plan->candidates(1).usable_tokens(), 40);
  EXPECT_EQ(plan->candidates(1).chunks_size(), 1);
  EXPECT_EQ(plan->candidates(1).compute_tokens(), 5);
  EXPECT_EQ(NumOpen(), 0);

  auto opened = OpenBy(Prompt(), plan->plan());
  ASSERT_OK(opened);
  EXPECT_EQ(opened->state().length(), 90);
  EXPECT_EQ(opened->state().canonical_length(), 40);
  EXPECT_EQ(opened->reuse().chunk_tokens(), 50);
  // K of the chunk is what the session's tokens had at 70 to 119, turned to 40 to 89.
  std::vector<Row> rows(rows_.begin(), rows_.begin() + 40);
  rows.insert(rows.end(), rows_.begin() + 70, rows_.end());
  for (size_t i = 40; i < rows.size(); ++i) rows[i].position -= 30;
  ExpectRows(opened->state(), rows);
  EXPECT_TRUE(client_->EventuallyStat("pagetide_worker_chunk_tokens_reused_total", 50));

  // The conversation goes on, and is found by nobody from the chunk on.
  const Tokens more = Joined(new_, TestTokens(5, 60));
  ASSERT_OK(Append(opened->state(), more, &rows));
  ExpectRows(opened->state(), rows);
  auto found = FoundByKeys(Joined(Joined(system_, second_), more));
  ASSERT_OK(found);
  EXPECT_LE(*found, 40);
}

TEST_F(PromptPlansTest, F1WhatCannotShiftGivesNoChunksAndOpensNothingWithThem) {
  SaveSession(/*can_shift=*/false);
  auto plan = Plan(Prompt(), 16);
  ASSERT_OK(plan);
  EXPECT_FALSE(plan->plan().approximate());
  EXPECT_EQ(plan->plan().compute_tokens(), 55);
  EXPECT_EQ(plan->plan().min_chunk_tokens(), 0);
  ASSERT_EQ(plan->candidates_size(), 2);
  EXPECT_EQ(plan->candidates(1).chunks_size(), 0);
  EXPECT_THAT(plan->candidates(1).why_not_more(), HasSubstr("cannot be rotated"));
  // By hand.
  v1::PromptPlan wanted;
  wanted.set_session("chat");
  wanted.set_session_version(plan->candidates(1).version());
  wanted.set_min_chunk_tokens(16);
  EXPECT_EQ(GetReason(OpenBy(Prompt(), wanted).status()), "CANNOT_SHIFT");
  EXPECT_EQ(NumOpen(), 0);
  // Larger than the prompt: none of it, as if none had been asked for.
  wanted.set_min_chunk_tokens(1000);
  auto open = OpenBy(Prompt(), wanted);
  ASSERT_OK(open);
  EXPECT_EQ(open->state().length(), 40);
  plan = Plan(Prompt(), 1000);
  ASSERT_OK(plan);
  EXPECT_EQ(plan->plan().compute_tokens(), 55);
  EXPECT_THAT(plan->candidates(1).why_not_more(),
              HasSubstr("the prompt goes on for less than a chunk of 1000 tokens"));
}

}  // namespace
}  // namespace pagetide
