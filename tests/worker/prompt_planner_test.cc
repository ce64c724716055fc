// Plans: the longest usable of several contexts, and an open that keeps what the plan said.
#include "worker/prompt_planner.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/worker/session_fixture.h"

namespace pagetide {
namespace {

using ::testing::HasSubstr;

MonotonicTime Soon() {
  return HostUnderTest::Soon();
}

class PromptPlannerTest : public ::testing::Test {
 protected:
  void Save(const std::vector<uint32_t>& tokens, const std::string& name) {
    SessionWorker writer(&store_, {.id = absl::StrCat("w-", name), .incarnation = ++lives_});
    auto info = writer.engine->OpenAndFill(tokens);
    ASSERT_TRUE(info.ok()) << info.status();
    ASSERT_TRUE(writer.Save(*info, name).ok());
  }
  // Plans, opens, and compares: the open must answer the plan's numbers.
  PromptPlan PlanAndOpen(SessionWorker& worker, const std::vector<uint32_t>& prompt,
                         const std::vector<std::string>& sessions,
                         std::vector<PositionedInput> inputs = {}) {
    const PromptPlanner planner(worker.sessions.get());
    const PromptRequest request{.tokens = prompt, .inputs = inputs};
    auto plan = planner.Plan(worker.tenant(), worker.host(), request, sessions, Soon());
    EXPECT_TRUE(plan.ok()) << plan.status();
    EXPECT_EQ(worker.host()->Counters().pages_restored, restored_);
    auto opened = planner.Open(worker.tenant(), worker.host(), request, plan->session,
                               plan->session_version, Soon());
    EXPECT_TRUE(opened.ok()) << opened.status();
    EXPECT_EQ(opened->reuse.reused_tokens, plan->reuse.reused_tokens);
    EXPECT_EQ(opened->reuse.device_tokens, plan->reuse.device_tokens);
    EXPECT_EQ(opened->reuse.store_tokens, plan->reuse.store_tokens);
    EXPECT_EQ(opened->reuse.shared_pages, plan->reuse.shared_pages);
    EXPECT_EQ(opened->reuse.partial_rows, plan->reuse.partial_rows);
    EXPECT_EQ(opened->reuse.limit, plan->reuse.limit);
    EXPECT_EQ(opened->reuse.explanation, plan->reuse.explanation);
    const std::vector<uint32_t> head(prompt.begin(), prompt.begin() + opened->info.length);
    if (!head.empty()) {
      EXPECT_EQ(*worker.engine->WrongRows(opened->info.id, head), 0u);
    }
    restored_ = worker.host()->Counters().pages_restored;
    EXPECT_TRUE(worker.host()->Close(worker.tenant(), opened->info.id, opened->info.epoch).ok());
    return *plan;
  }
  MemoryPageStore store_;
  uint64_t lives_ = 100;
  uint64_t restored_ = 0;
};

TEST_F(PromptPlannerTest, TheLongestUsableContextWins) {
  const std::vector<uint32_t> base = Tokens(0, 60);
  Save(base, "short");
  Save(Concat(base, Tokens(700, 18)), "long");
  Save(Concat(Tokens(0, 20), Tokens(90000, 80)), "other");
  SessionWorker worker(&store_, {});
  // Shares 75 tokens with "long", 60 with "short", 20 with "other"; by keys 64, since its token 75
  // lies in a tail, which only the session knows.
  const std::vector<uint32_t> prompt = Concat(Concat(base, Tokens(700, 15)), Tokens(8000, 20));
  PromptPlan plan = PlanAndOpen(worker, prompt, {"short", "other", "long", "none"});
  EXPECT_EQ(plan.session, "long");
  EXPECT_EQ(plan.reuse.reused_tokens, 75u);
  EXPECT_EQ(plan.reuse.shared_pages, 4u);
  EXPECT_EQ(plan.reuse.partial_rows, 11u);
  EXPECT_EQ(plan.reuse.store_tokens, 75u);
  ASSERT_EQ(plan.candidates.size(), 5u);
  EXPECT_EQ(plan.candidates[0].usable_tokens, 64u);
  EXPECT_EQ(plan.candidates[1].usable_tokens, 60u);
  EXPECT_THAT(plan.candidates[1].why_not_more, HasSubstr("ends after 60 tokens"));
  EXPECT_EQ(plan.candidates[2].usable_tokens, 20u);
  EXPECT_EQ(plan.candidates[3].usable_tokens, 75u);
  EXPECT_THAT(plan.candidates[3].why_not_more, HasSubstr("differ from token 75 on"));
  EXPECT_THAT(plan.candidates[4].why_not_more, HasSubstr("no such session"));
  // Now part of it is here.
  plan = PlanAndOpen(worker, prompt, {"long"});
  EXPECT_GT(plan.reuse.device_tokens, 0u);
}

TEST_F(PromptPlannerTest, OneTokenIsLeftAndNoSessionIsNeededWhereKeysReachAsFar) {
  const std::vector<uint32_t> base = Tokens(0, 64);
  Save(base, "s");
  SessionWorker worker(&store_, {});
  // Rows of the session's last page, which is full and so found without its name.
  PromptPlan plan = PlanAndOpen(worker, base, {"s"});
  EXPECT_EQ(plan.session, "");
  EXPECT_EQ(plan.reuse.reused_tokens, 63u);
  EXPECT_EQ(plan.reuse.limit, ReuseLimit::kWholePrompt);
  plan = PlanAndOpen(worker, Concat(base, Tokens(5000, 5)), {"s"});
  EXPECT_EQ(plan.session, "");
  EXPECT_EQ(plan.reuse.reused_tokens, 64u);
}

TEST_F(PromptPlannerTest, OtherInputsCutWhatIsUsable) {
  Save(Tokens(0, 60), "s");
  SessionWorker worker(&store_, {});
  // An image at token 30 that the session was computed without.
  PromptPlan plan = PlanAndOpen(worker, Tokens(0, 62), {"s"}, {{30, Sha256Of("image")}});
  EXPECT_LE(plan.reuse.reused_tokens, 30u);
  EXPECT_EQ(plan.candidates[1].usable_tokens, 30u);
}

TEST_F(PromptPlannerTest, AnotherAdapterReusesNothing) {
  Save(Tokens(0, 60), "s");
  SessionWorker worker(&store_, {});
  ModelSpec spec = worker.engine->model->spec();
  spec.adapter_digests = {Sha256Of("adapter")};
  ModelHost* const host = worker.worker().AddModel(*Model::Create(spec), Soon()).value();
  const PromptPlanner planner(worker.sessions.get());
  const std::vector<uint32_t> prompt = Tokens(0, 62);
  const std::vector<std::string> sessions = {"s"};
  auto plan = planner.Plan(worker.tenant(), host, {.tokens = prompt}, sessions, Soon());
  ASSERT_TRUE(plan.ok()) << plan.status();
  EXPECT_EQ(plan->reuse.reused_tokens, 0u);
  EXPECT_THAT(plan->candidates[1].why_not_more, HasSubstr("adapters"));
}

TEST_F(PromptPlannerTest, APlanThatNoLongerHoldsOpensByKeys) {
  Save(Tokens(0, 60), "s");
  SessionWorker worker(&store_, {});
  const PromptPlanner planner(worker.sessions.get());
  const std::vector<uint32_t> prompt = Tokens(0, 62);
  auto opened = planner.Open(worker.tenant(), worker.host(), {.tokens = prompt}, "s", 7, Soon());
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reuse.reused_tokens, 48u);
  opened = planner.Open(worker.tenant(), worker.host(), {.tokens = prompt}, "gone", 1, Soon());
  ASSERT_TRUE(opened.ok()) << opened.status();
  EXPECT_EQ(opened->reuse.reused_tokens, 48u);
  const std::vector<std::string> too_many(17, "s");
  EXPECT_TRUE(absl::IsInvalidArgument(
      planner.Plan(worker.tenant(), worker.host(), {.tokens = prompt}, too_many, Soon()).status()));
  const std::vector<std::string> bad = {"../s"};
  EXPECT_TRUE(absl::IsInvalidArgument(
      planner.Plan(worker.tenant(), worker.host(), {.tokens = prompt}, bad, Soon()).status()));
}

}  // namespace
}  // namespace pagetide
