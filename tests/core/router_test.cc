#include "core/router.h"

#include <memory>
#include <string>
#include <vector>

#include "base/error_info.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using absl::StatusCode;
using ::testing::HasSubstr;

constexpr uint32_t kPageTokens = 100;
const char* const kModel = "00000000000000000000000000000000000000000000000000000000000000aa";

PrefixHint Hint(uint32_t n) {
  return PrefixHint::Of({Sha256Of(std::to_string(n))});
}

RoutedPrompt Prompt(uint32_t num_pages, uint64_t num_tokens) {
  RoutedPrompt prompt{.model_digest = kModel,
                      .page_tokens = kPageTokens,
                      .num_groups = 1,
                      .page_bytes = 1 << 20,
                      .num_tokens = num_tokens};
  for (uint32_t i = 0; i < num_pages; ++i) prompt.hints.push_back(Hint(i));
  return prompt;
}

class RouterTest : public ::testing::Test {
 protected:
  RouterTest() {
    auto router = Router::Create({}, &clock_, &metrics_);
    EXPECT_TRUE(router.ok()) << router.status();
    router_ = *std::move(router);
  }

  AttachmentId Attach(const std::string& id, uint64_t incarnation,
                      SourceRole role = SourceRole::kWorker) {
    const auto attached = router_->Attach(
        {.worker_id = id, .incarnation = incarnation, .address = id + ":1", .role = role});
    EXPECT_TRUE(attached.ok()) << attached.status();
    return attached->id;
  }

  // A serving worker with the model and 1,000 tokens/s.
  AttachmentId Serve(const std::string& id, uint64_t incarnation) {
    const AttachmentId attachment = Attach(id, incarnation);
    EXPECT_TRUE(router_->OnLoad(attachment, Load()).ok());
    return attachment;
  }

  static WorkerLoad Load(uint64_t queued_tokens = 0) {
    return {.total_frames = 1000,
            .queued_prefill_tokens = queued_tokens,
            .prefill_tokens_per_second = 1000,
            .store_bytes_per_second = 1e9,
            .model_digests = {kModel}};
  }

  void Hold(AttachmentId attachment, uint64_t number, uint32_t begin, uint32_t end,
            Tier tier = Tier::kDevice) {
    std::vector<ResidencyDelta> changes;
    for (uint32_t i = begin; i < end; ++i) changes.push_back({.hint = Hint(i), .tier = tier});
    const auto because = router_->OnResidency(attachment, {.number = number, .changes = changes});
    ASSERT_TRUE(because.ok()) << because.status();
    EXPECT_FALSE(because->has_value()) << **because;
  }

  std::string AssignTo(const RoutedPrompt& prompt, const AssignOptions& options = {}) {
    const auto assignment = router_->Assign(prompt, options);
    return assignment.ok() ? assignment->chosen.worker->worker_id
                           : std::string(assignment.status().message());
  }

  FakeClock clock_;
  InMemoryMetrics metrics_;
  std::unique_ptr<Router> router_;
};

TEST_F(RouterTest, GoesToTheWorkerThatHoldsThePrefix) {
  Serve("w1", 1);
  Hold(Serve("w2", 2), 1, 0, 8);
  const auto assignment = router_->Assign(Prompt(10, 1050), {});
  ASSERT_TRUE(assignment.ok()) << assignment.status();
  EXPECT_EQ(assignment->chosen.worker->worker_id, "w2");
  EXPECT_EQ(assignment->chosen.numbers.reused_tokens[TierIndex(Tier::kDevice)], 800);
  EXPECT_EQ(assignment->chosen.numbers.computed_tokens, 250);
  EXPECT_EQ(assignment->model_digest, kModel);
}

TEST_F(RouterTest, TheStoreServesEveryWorker) {
  Serve("w1", 1);
  Hold(Attach("store", 9, SourceRole::kStore), 1, 0, 5, Tier::kStore);
  const auto table = router_->Rank(Prompt(10, 1050), "", {}, {});
  ASSERT_TRUE(table.ok());
  ASSERT_EQ(table->candidates.size(), 1u);  // the store is no candidate
  EXPECT_EQ(table->candidates[0].numbers.reused_tokens[TierIndex(Tier::kStore)], 500);
}

TEST_F(RouterTest, AssignedTokensCountUntilTheNextLoadReport) {
  const AttachmentId w1 = Serve("w1", 1);
  Serve("w2", 2);
  // Without accounting all would go to one worker until its load report.
  int on_w1 = 0;
  for (int i = 0; i < 10; ++i) on_w1 += AssignTo(Prompt(0, 90)) == "w1";
  EXPECT_EQ(on_w1, 5);
  auto table = router_->Rank(Prompt(0, 90), "", {}, {});
  EXPECT_EQ(table->candidates[0].numbers.queue_wait, absl::Milliseconds(450));
  ASSERT_TRUE(router_->OnLoad(w1, Load()).ok());
  table = router_->Rank(Prompt(0, 90), "", {}, {});
  EXPECT_EQ(table->candidates[0].worker->worker_id, "w1");
  EXPECT_EQ(table->candidates[0].numbers.queue_wait, absl::ZeroDuration());
}

TEST_F(RouterTest, StickyWorkerIsKeptWhileItServes) {
  Hold(Serve("w1", 1), 1, 0, 8);
  const AttachmentId w2 = Serve("w2", 2);
  EXPECT_EQ(AssignTo(Prompt(8, 850), {.sticky_worker_id = "w2"}), "w2");
  WorkerLoad draining = Load();
  draining.is_draining = true;
  ASSERT_TRUE(router_->OnLoad(w2, draining).ok());
  EXPECT_EQ(AssignTo(Prompt(8, 850), {.sticky_worker_id = "w2"}), "w1");
  const auto table = router_->Rank(Prompt(8, 850), "w2", {}, {});
  EXPECT_THAT(table->explanation, HasSubstr("sticky worker w2 not taken: draining"));
}

TEST_F(RouterTest, ARepeatedRequestIdGivesTheSameAnswerForAMinute) {
  Serve("w1", 1);
  Serve("w2", 2);
  const AssignOptions options{.request = {.tenant = "t", .request_id = "r1", .request_hash = 5}};
  const auto first = router_->Assign(Prompt(0, 90), options);
  ASSERT_TRUE(first.ok());
  for (int i = 0; i < 5; ++i) {
    const auto again = router_->Assign(Prompt(0, 90), options);
    ASSERT_TRUE(again.ok());
    EXPECT_EQ(again->assignment_id, first->assignment_id);
    EXPECT_EQ(again->chosen.worker->worker_id, first->chosen.worker->worker_id);
  }
  // Another tenant's id of the same spelling is another id.
  AssignOptions other = options;
  other.request.tenant = "u";
  EXPECT_NE(router_->Assign(Prompt(0, 90), other)->assignment_id, first->assignment_id);
  AssignOptions conflicting = options;
  conflicting.request.request_hash = 6;
  EXPECT_EQ(router_->Assign(Prompt(0, 90), conflicting).status().code(),
            StatusCode::kInvalidArgument);
  // A minute later it is a new request (the workers keep reporting meanwhile).
  clock_.Advance(absl::Seconds(61));
  router_->Tick();
  Serve("w1", 3);
  EXPECT_NE(router_->Assign(Prompt(0, 90), options)->assignment_id, first->assignment_id);
}

TEST_F(RouterTest, ARepeatedRequestIdDoesNotStickToADeadWorker) {
  const AttachmentId w1 = Serve("w1", 1);
  const AssignOptions options{.request = {.request_id = "r1"}};
  ASSERT_EQ(AssignTo(Prompt(0, 90), options), "w1");
  Serve("w2", 2);
  router_->Detach(w1, "stream ended");
  EXPECT_EQ(AssignTo(Prompt(0, 90), options), "w2");
}

TEST_F(RouterTest, RememberedAnswersAreBounded) {
  auto router = Router::Create({.max_answers = 3}, &clock_, Metrics::Null());
  ASSERT_TRUE(router.ok());
  const auto attached = (*router)->Attach({.worker_id = "w1", .incarnation = 1, .address = "a"});
  ASSERT_TRUE((*router)->OnLoad(attached->id, Load()).ok());
  const auto assign = [&](const std::string& id) {
    return (*router)->Assign(Prompt(0, 90), {.request = {.request_id = id}})->assignment_id;
  };
  const std::string first = assign("r0");
  for (int i = 1; i <= 3; ++i) assign("r" + std::to_string(i));
  EXPECT_NE(assign("r0"), first);  // the oldest made room
  EXPECT_EQ(assign("r3"), assign("r3"));
}

TEST_F(RouterTest, NobodyThereIsUnavailableWithARetryDelay) {
  const auto none = router_->Assign(Prompt(0, 90), {});
  EXPECT_EQ(none.status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(GetReason(none.status()), error_reason::kNoWorker);
  EXPECT_TRUE(GetRetryDelay(none.status()).has_value());
  Attach("w1", 1);  // attached, but has not said what it can do
  EXPECT_THAT(AssignTo(Prompt(0, 90)), HasSubstr("w1 has not reported its load yet"));
  Serve("w1", 2);
  EXPECT_THAT(AssignTo(Prompt(0, 90), {.excluded_worker_ids = {"w1"}}),
              HasSubstr("w1 excluded by the caller"));
  EXPECT_EQ(metrics_.Value("pagetide_router_refusals_total"), 3);
}

TEST_F(RouterTest, AModelGoesWhereItsPoolIsAndToAnybodyIfNobodyHasOne) {
  const AttachmentId w1 = Serve("w1", 1);
  WorkerLoad without = Load();
  without.model_digests.clear();
  ASSERT_TRUE(router_->OnLoad(Attach("w2", 2), without).ok());
  for (int i = 0; i < 5; ++i) EXPECT_EQ(AssignTo(Prompt(0, 900)), "w1");
  WorkerLoad on_demand = without;
  on_demand.loads_models_on_demand = true;
  ASSERT_TRUE(router_->OnLoad(Attach("w2", 3), on_demand).ok());
  EXPECT_EQ(AssignTo(Prompt(0, 900)), "w2");  // no longer refused, and idle
  router_->Detach(w1, "gone");
  ASSERT_TRUE(router_->OnLoad(Attach("w2", 4), without).ok());
  EXPECT_EQ(AssignTo(Prompt(0, 900)), "w2");
}

TEST_F(RouterTest, ASilentWorkerDiesAndItsPagesVanish) {
  const AttachmentId w1 = Serve("w1", 1);
  Hold(w1, 1, 0, 8);
  const SequenceChange sequence{.id = {1, 1}, .model_digest = kModel, .length = 7};
  ASSERT_TRUE(router_->OnSequences(w1, true, {&sequence, 1}).ok());
  const AttachmentId w2 = Serve("w2", 2);
  ASSERT_TRUE(router_->FindSequence({1, 1}).has_value());
  clock_.Advance(absl::Seconds(2));
  ASSERT_TRUE(router_->OnLoad(w2, Load()).ok());
  EXPECT_TRUE(router_->Tick().empty());
  clock_.Advance(absl::Seconds(1));
  EXPECT_THAT(router_->Tick(), ::testing::ElementsAre(w1));
  EXPECT_EQ(router_->GetWorker("w1")->state, WorkerState::kDead);
  EXPECT_EQ(router_->GetWorker("w1")->resident_pages, 0u);
  EXPECT_FALSE(router_->FindSequence({1, 1}).has_value());
  EXPECT_EQ(AssignTo(Prompt(8, 850)), "w2");
  // What the dead process still sends is refused; a new stream brings it back.
  EXPECT_EQ(GetReason(router_->OnLoad(w1, Load())), error_reason::kStaleEpoch);
  Serve("w1", 1);
  EXPECT_EQ(router_->GetWorker("w1")->state, WorkerState::kServing);
}

TEST_F(RouterTest, TheLaterProcessWithOneIdWins) {
  const AttachmentId old_stream = Serve("w1", 1);
  Hold(old_stream, 1, 0, 8);
  const auto attached = router_->Attach({.worker_id = "w1", .incarnation = 2, .address = "new:1"});
  ASSERT_TRUE(attached.ok());
  EXPECT_EQ(attached->replaced, old_stream);
  EXPECT_EQ(router_->GetWorker("w1")->resident_pages, 0u);
  EXPECT_EQ(GetReason(router_->OnLoad(old_stream, Load())), error_reason::kStaleEpoch);
  router_->Detach(old_stream, "late");  // must not kill the new one
  EXPECT_EQ(router_->GetWorker("w1")->state, WorkerState::kServing);
}

TEST_F(RouterTest, DeadWorkersAreForgottenInTheEnd) {
  router_->Detach(Serve("w1", 1), "gone");
  EXPECT_EQ(router_->ListWorkers().size(), 1u);
  clock_.Advance(absl::Minutes(10));
  router_->Tick();
  EXPECT_TRUE(router_->ListWorkers().empty());
}

TEST_F(RouterTest, AGapAsksForASnapshot) {
  const AttachmentId w1 = Serve("w1", 1);
  Hold(w1, 1, 0, 2);
  const auto because = router_->OnResidency(w1, {.number = 4});
  ASSERT_TRUE(because.ok());
  EXPECT_TRUE(because->has_value());
  EXPECT_EQ(metrics_.Value("pagetide_router_snapshots_requested_total"), 1);
}

TEST_F(RouterTest, SequencesAreListedInOrderOverWorkers) {
  const AttachmentId w1 = Serve("w1", 1), w2 = Serve("w2", 2);
  std::vector<SequenceChange> changes;
  for (uint64_t n = 1; n <= 5; ++n) changes.push_back({.id = {1, n}, .length = n});
  ASSERT_TRUE(router_->OnSequences(w1, true, changes).ok());
  for (auto& c : changes) c.id.incarnation = 2;
  ASSERT_TRUE(router_->OnSequences(w2, true, changes).ok());
  const SequenceChange closed{.id = {1, 2}, .is_closed = true};
  ASSERT_TRUE(router_->OnSequences(w1, false, {&closed, 1}).ok());
  std::vector<SequenceId> seen;
  SequenceId after;
  for (;;) {
    const auto page = router_->ListSequences(after, 4);
    if (page.empty()) break;
    for (const auto& place : page) seen.push_back(place.id);
    after = page.back().id;
  }
  EXPECT_EQ(seen.size(), 9u);
  EXPECT_TRUE(std::is_sorted(seen.begin(), seen.end()));
  EXPECT_EQ(router_->FindSequence({2, 3})->owner->worker_id, "w2");
  EXPECT_FALSE(router_->FindSequence({1, 2}).has_value());
}

TEST_F(RouterTest, BadHellosAndLoadsAreRefused) {
  EXPECT_EQ(
      router_->Attach({.worker_id = "No Good", .incarnation = 1, .address = "a"}).status().code(),
      StatusCode::kInvalidArgument);
  EXPECT_EQ(router_->Attach({.worker_id = "w", .incarnation = 0, .address = "a"}).status().code(),
            StatusCode::kInvalidArgument);
  EXPECT_EQ(router_->Attach({.worker_id = "w", .incarnation = 1}).status().code(),
            StatusCode::kInvalidArgument);
  const AttachmentId w1 = Serve("w1", 1);
  WorkerLoad load = Load();
  load.prefill_tokens_per_second = -1;
  EXPECT_EQ(router_->OnLoad(w1, load).code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(AssignTo(Prompt(0, 90)), "w1");  // the earlier report holds
}

TEST_F(RouterTest, APromptWithMorePagesThanTokensIsRefused) {
  Serve("w1", 1);
  EXPECT_EQ(router_->Assign(Prompt(10, 999), {}).status().code(), StatusCode::kInvalidArgument);
  EXPECT_TRUE(router_->Assign(Prompt(10, 1000), {}).ok());
}

}  // namespace
}  // namespace pagetide
