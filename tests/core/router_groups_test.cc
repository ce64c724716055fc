// Router::AssignGroup: which group of workers gets a sequence over shards.
#include <memory>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "core/router.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using absl::StatusCode;
using ::testing::ElementsAre;
using ::testing::HasSubstr;

constexpr uint32_t kPageTokens = 100;

PrefixHint Hint(uint32_t n) {
  return PrefixHint::Of({Sha256Of(std::to_string(n))});
}

std::string ModelOf(uint32_t rank) {
  return absl::StrCat(std::string(62, '0'), absl::Hex(rank, absl::kZeroPad2));
}

RoutedPrompt Prompt(uint32_t num_pages, uint64_t num_tokens) {
  RoutedPrompt prompt{.model_digest = ModelOf(0),
                      .page_tokens = kPageTokens,
                      .num_groups = 1,
                      .page_bytes = 1 << 20,
                      .num_tokens = num_tokens,
                      .rank = 0,
                      .num_ranks = 2};
  for (uint32_t i = 0; i < num_pages; ++i) prompt.hints.push_back(Hint(i));
  return prompt;
}

std::vector<RankModel> Models(uint32_t num_ranks = 2) {
  std::vector<RankModel> models;
  for (uint32_t i = 0; i < num_ranks; ++i) models.push_back({ModelOf(i), 1 << 20});
  return models;
}

class RouterGroupsTest : public ::testing::Test {
 protected:
  RouterGroupsTest() {
    auto router = Router::Create({}, &clock_, &metrics_);
    EXPECT_TRUE(router.ok()) << router.status();
    router_ = *std::move(router);
  }

  AttachmentId Attach(const std::string& id, const std::string& group, uint32_t rank) {
    const auto attached = router_->Attach({.worker_id = id,
                                           .incarnation = ++incarnation_,
                                           .address = id + ":1",
                                           .shard_group = group,
                                           .shard_rank = rank});
    EXPECT_TRUE(attached.ok()) << attached.status();
    return attached->id;
  }

  static WorkerLoad Load(uint32_t rank) {
    return {.total_frames = 1000,
            .prefill_tokens_per_second = 1000,
            .store_bytes_per_second = 1e9,
            .model_digests = {ModelOf(rank)}};
  }

  // Named "GROUP-RANK", with its rank's model and 1,000 tokens/s.
  AttachmentId Serve(const std::string& group, uint32_t rank) {
    const AttachmentId attachment = Attach(absl::StrCat(group, "-", rank), group, rank);
    EXPECT_TRUE(router_->OnLoad(attachment, Load(rank)).ok());
    return attachment;
  }

  void Hold(AttachmentId attachment, uint32_t begin, uint32_t end, Tier tier = Tier::kDevice) {
    std::vector<ResidencyDelta> changes;
    for (uint32_t i = begin; i < end; ++i) changes.push_back({.hint = Hint(i), .tier = tier});
    const auto because = router_->OnResidency(attachment, {.number = 1, .changes = changes});
    ASSERT_TRUE(because.ok()) << because.status();
    EXPECT_FALSE(because->has_value()) << **because;
  }

  // The group, or the text of the refusal.
  std::string AssignTo(const RoutedPrompt& prompt, const AssignGroupOptions& options = {},
                       uint32_t num_ranks = 2) {
    const auto assignment = router_->AssignGroup(prompt, Models(num_ranks), options);
    return assignment.ok() ? (*assignment)->shard_group
                           : std::string(assignment.status().message());
  }
  double Count(const std::string& outcome) const {
    return metrics_.Value("pagetide_router_group_assignments_total", {{"outcome", outcome}});
  }
  std::string StateOf(const std::string& worker) const {
    return std::string(WorkerStateName(router_->GetWorker(worker)->state));
  }

  FakeClock clock_;
  InMemoryMetrics metrics_;
  std::unique_ptr<Router> router_;
  uint64_t incarnation_ = 0;
};

TEST_F(RouterGroupsTest, AnswersAWorkerARankWithItsModel) {
  Serve("a", 1);
  Serve("a", 0);
  Serve("alone", 0);
  const auto assignment = router_->AssignGroup(Prompt(0, 90), Models(), {});
  ASSERT_TRUE(assignment.ok()) << assignment.status();
  const GroupAssignment& group = **assignment;
  EXPECT_EQ(group.shard_group, "a");
  ASSERT_EQ(group.workers.size(), 2u);
  EXPECT_EQ(group.workers[0]->worker_id, "a-0");
  EXPECT_EQ(group.workers[1]->worker_id, "a-1");
  EXPECT_THAT(group.model_digests, ElementsAre(ModelOf(0), ModelOf(1)));
  ASSERT_EQ(group.candidates.size(), 2u);
  EXPECT_TRUE(group.candidates[0].is_eligible);
  EXPECT_FALSE(group.candidates[1].is_eligible);
  EXPECT_EQ(group.candidates[1].shard_group, "alone");
  EXPECT_EQ(group.candidates[1].ineligible_because, "rank 1: no worker");
  EXPECT_EQ(Count("assigned"), 1);
}

TEST_F(RouterGroupsTest, PrefersWhatAllRanksKnowToWhatOneKnows) {
  Hold(Serve("all", 0), 0, 3);
  Hold(Serve("all", 1), 0, 4);
  Hold(Serve("one", 0), 0, 9);
  Hold(Serve("one", 1), 0, 1);
  const auto assignment = router_->AssignGroup(Prompt(10, 1050), Models(), {});
  ASSERT_TRUE(assignment.ok()) << assignment.status();
  const auto& candidates = (*assignment)->candidates;
  ASSERT_EQ(candidates.size(), 2u);
  EXPECT_EQ(candidates[0].shard_group, "all");
  EXPECT_EQ(candidates[0].numbers.reused_tokens[TierIndex(Tier::kDevice)], 300);
  EXPECT_EQ(candidates[0].numbers.computed_tokens, 750);
  EXPECT_EQ(candidates[0].limiting_rank, 0u);
  EXPECT_EQ(candidates[1].shard_group, "one");
  EXPECT_EQ(candidates[1].numbers.computed_tokens, 950);
  EXPECT_EQ(candidates[1].limiting_rank, 1u);
}

TEST_F(RouterGroupsTest, AGroupIsAsSlowAsItsSlowestRank) {
  Serve("even", 0);
  Serve("even", 1);
  Serve("uneven", 0);
  const AttachmentId slow = Serve("uneven", 1);
  WorkerLoad load = Load(1);
  load.queued_prefill_tokens = 50;
  ASSERT_TRUE(router_->OnLoad(slow, load).ok());
  const auto assignment = router_->AssignGroup(Prompt(0, 90), Models(), {});
  ASSERT_TRUE(assignment.ok()) << assignment.status();
  const auto& candidates = (*assignment)->candidates;
  EXPECT_EQ(candidates[0].shard_group, "even");
  EXPECT_EQ(candidates[0].slowest_rank, 0u);
  EXPECT_EQ(candidates[1].numbers.queue_wait, absl::Milliseconds(50));
  EXPECT_EQ(candidates[1].slowest_rank, 1u);
}

TEST_F(RouterGroupsTest, TheRankWithTheLargestPagesDecidesWhatALoadTakes) {
  Hold(Serve("a", 0), 0, 9, Tier::kStore);
  Hold(Serve("a", 1), 0, 9, Tier::kStore);
  std::vector<RankModel> models = Models();
  models[1].page_bytes = 10 << 20;
  const auto assignment = router_->AssignGroup(Prompt(9, 950), models, {});
  ASSERT_TRUE(assignment.ok()) << assignment.status();
  EXPECT_NEAR(absl::ToDoubleSeconds((*assignment)->candidates[0].numbers.load_time),
              9 * 10 * 1.048576e6 / 1e9 + 0.002, 1e-6);
}

TEST_F(RouterGroupsTest, AnAssignmentCountsOnEveryRank) {
  Serve("a", 0);
  Serve("a", 1);
  Serve("b", 0);
  Serve("b", 1);
  int on_a = 0;
  for (int i = 0; i < 10; ++i) on_a += AssignTo(Prompt(0, 90)) == "a";
  EXPECT_EQ(on_a, 5);
  // The shards of rank 1 feel it, too.
  RoutedPrompt of_rank_1 = Prompt(0, 90);
  of_rank_1.model_digest = ModelOf(1);
  of_rank_1.rank = 1;
  const auto table = router_->Rank(of_rank_1, "", {}, {});
  ASSERT_TRUE(table.ok());
  EXPECT_EQ(table->candidates[0].numbers.queue_wait, absl::Milliseconds(450));
  EXPECT_EQ(table->candidates[1].numbers.queue_wait, absl::Milliseconds(450));
}

TEST_F(RouterGroupsTest, WhatAGroupLacksIsSaid) {
  const auto none = router_->AssignGroup(Prompt(0, 90), Models(), {});
  EXPECT_EQ(none.status().code(), StatusCode::kUnavailable);
  EXPECT_EQ(GetReason(none.status()), error_reason::kNoShardGroup);
  EXPECT_TRUE(GetRetryDelay(none.status()).has_value());
  EXPECT_THAT(std::string(none.status().message()), HasSubstr("belongs to a shard group"));

  const AttachmentId a0 = Serve("a", 0);
  EXPECT_THAT(AssignTo(Prompt(0, 90)), HasSubstr("among 1: a (rank 1: no worker)"));
  const AttachmentId a1 = Attach("a-1", "a", 1);
  EXPECT_THAT(AssignTo(Prompt(0, 90)), HasSubstr("a (rank 1: a-1 has not reported its load yet)"));
  WorkerLoad load = Load(1);
  load.model_digests = {ModelOf(0)};
  ASSERT_TRUE(router_->OnLoad(a1, load).ok());
  EXPECT_THAT(AssignTo(Prompt(0, 90)),
              HasSubstr("a (rank 1: a-1 has no pool for its model 000000000000…)"));
  load.loads_models_on_demand = true;
  ASSERT_TRUE(router_->OnLoad(a1, load).ok());
  EXPECT_EQ(AssignTo(Prompt(0, 90)), "a");
  load = Load(1);
  load.is_draining = true;
  ASSERT_TRUE(router_->OnLoad(a1, load).ok());
  EXPECT_THAT(AssignTo(Prompt(0, 90)), HasSubstr("a (rank 1: a-1 draining)"));
  ASSERT_TRUE(router_->OnLoad(a1, Load(1)).ok());
  EXPECT_EQ(AssignTo(Prompt(0, 90)), "a");
  router_->Detach(a0, "gone");
  router_->Detach(a1, "gone");
  EXPECT_THAT(AssignTo(Prompt(0, 90)), HasSubstr("a (rank 0: a-0 dead; rank 1: a-1 dead)"));
  Serve("a", 0);
  Serve("a", 1);
  EXPECT_EQ(AssignTo(Prompt(0, 90)), "a");
  EXPECT_THAT(AssignTo(Prompt(0, 90), {.excluded_shard_groups = {"a"}}),
              HasSubstr("a (excluded by the caller)"));
  EXPECT_EQ(Count("refused"), 7);
}

TEST_F(RouterGroupsTest, TwoLiveWorkersOfOneRankMakeTheGroupIneligible) {
  Serve("a", 0);
  Serve("a", 1);
  const AttachmentId twin = Attach("twin", "a", 1);
  EXPECT_THAT(AssignTo(Prompt(0, 90)), HasSubstr("a (rank 1: two live workers, a-1 and twin)"));
  router_->Detach(twin, "gone");
  EXPECT_EQ(AssignTo(Prompt(0, 90)), "a");
  // A dead one does not stand in the way of its successor.
  router_->Detach(Serve("a", 1), "gone");
  EXPECT_EQ(StateOf("a-1"), "dead");
  ASSERT_TRUE(router_->OnLoad(Attach("successor", "a", 1), Load(1)).ok());
  EXPECT_EQ(AssignTo(Prompt(0, 90)), "a");
}

TEST_F(RouterGroupsTest, ALargeFleetIsRefusedInABoundedText) {
  for (int group = 0; group < 40; ++group) {
    Attach(absl::StrCat("w", group, std::string(100, 'w')),
           absl::StrCat("g", group, std::string(100, 'g')), 5);
  }
  const std::string text = AssignTo(Prompt(0, 90), {}, 64);
  EXPECT_THAT(text, HasSubstr("among 40: g0g"));
  EXPECT_THAT(text, HasSubstr("; rank 3: no worker; and 60 more ranks)"));
  EXPECT_THAT(text, HasSubstr(" more"));
  EXPECT_LT(text.size(), 2000u);
}

TEST_F(RouterGroupsTest, ASmallerModelLeavesTheOtherRanksAlone) {
  for (uint32_t rank = 0; rank < 4; ++rank) Serve("a", rank);
  router_->Detach(Serve("a", 3), "gone");
  EXPECT_EQ(AssignTo(Prompt(0, 90), {}, 3), "a");
  EXPECT_THAT(AssignTo(Prompt(0, 90), {}, 4), HasSubstr("rank 3: a-3 dead"));
}

TEST_F(RouterGroupsTest, StickyGroupIsKeptWhileAllOfItServes) {
  Hold(Serve("a", 0), 0, 8);
  Hold(Serve("a", 1), 0, 8);
  Serve("b", 0);
  const AttachmentId b1 = Serve("b", 1);
  EXPECT_EQ(AssignTo(Prompt(8, 850)), "a");
  EXPECT_EQ(AssignTo(Prompt(8, 850), {.sticky_shard_group = "b"}), "b");
  EXPECT_EQ(AssignTo(Prompt(8, 850), {.sticky_shard_group = "unknown"}), "a");
  EXPECT_EQ(AssignTo(Prompt(8, 850), {.excluded_shard_groups = {"a"}}), "b");
  router_->Detach(b1, "gone");
  EXPECT_EQ(AssignTo(Prompt(8, 850), {.sticky_shard_group = "b"}), "a");
}

TEST_F(RouterGroupsTest, ARepeatedRequestIdGivesTheSameAnswerWhileAllItsWorkersServe) {
  Serve("a", 0);
  const AttachmentId a1 = Serve("a", 1);
  const AssignGroupOptions options{
      .request = {.tenant = "t", .request_id = "r1", .request_hash = 5}};
  const auto first = router_->AssignGroup(Prompt(0, 90), Models(), options);
  ASSERT_TRUE(first.ok()) << first.status();
  Serve("b", 0);
  Serve("b", 1);
  for (int i = 0; i < 5; ++i) {
    const auto again = router_->AssignGroup(Prompt(0, 90), Models(), options);
    ASSERT_TRUE(again.ok()) << again.status();
    EXPECT_EQ(*again, *first);
  }
  EXPECT_EQ(Count("assigned"), 1);
  EXPECT_EQ(Count("repeated"), 5);
  AssignGroupOptions other = options;
  other.request.tenant = "u";
  EXPECT_NE((*router_->AssignGroup(Prompt(0, 90), Models(), other))->assignment_id,
            (*first)->assignment_id);
  other = options;
  other.request.request_hash = 6;
  EXPECT_EQ(router_->AssignGroup(Prompt(0, 90), Models(), other).status().code(),
            StatusCode::kInvalidArgument);
  // One of its workers has died: a retry goes elsewhere, and that is then what is remembered.
  router_->Detach(a1, "gone");
  const auto moved = router_->AssignGroup(Prompt(0, 90), Models(), options);
  ASSERT_TRUE(moved.ok()) << moved.status();
  EXPECT_EQ((*moved)->shard_group, "b");
  EXPECT_EQ(*router_->AssignGroup(Prompt(0, 90), Models(), options), *moved);
  clock_.Advance(absl::Seconds(61));
  router_->Tick();
  Serve("b", 0);
  Serve("b", 1);
  EXPECT_NE((*router_->AssignGroup(Prompt(0, 90), Models(), options))->assignment_id,
            (*moved)->assignment_id);
}

TEST_F(RouterGroupsTest, RememberedAnswersAreBounded) {
  auto router = Router::Create({.max_group_answers = 3}, &clock_, Metrics::Null());
  ASSERT_TRUE(router.ok());
  router_ = *std::move(router);
  Serve("a", 0);
  Serve("a", 1);
  const auto assign = [&](const std::string& id) {
    return (*router_->AssignGroup(Prompt(0, 90), Models(), {.request = {.request_id = id}}))
        ->assignment_id;
  };
  const std::string first = assign("r0");
  for (int i = 1; i <= 3; ++i) assign(absl::StrCat("r", i));
  EXPECT_NE(assign("r0"), first);  // the oldest made room
  EXPECT_EQ(assign("r3"), assign("r3"));
}

TEST_F(RouterGroupsTest, APromptThatFitsInNoGroupIsInvalid) {
  Serve("a", 0);
  const AttachmentId a1 = Serve("a", 1);
  WorkerLoad load = Load(1);
  load.total_frames = 2;
  ASSERT_TRUE(router_->OnLoad(a1, load).ok());
  const auto refused = router_->AssignGroup(Prompt(0, 300), Models(), {});
  EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument);
  EXPECT_EQ(GetReason(refused.status()), error_reason::kPoolTooSmall);
  EXPECT_THAT(std::string(refused.status().message()), HasSubstr("a is too small: 200 tokens fit"));
  EXPECT_EQ(AssignTo(Prompt(0, 200)), "a");
  EXPECT_EQ(router_->AssignGroup(Prompt(10, 999), Models(), {}).status().code(),
            StatusCode::kInvalidArgument);
  for (const uint32_t num_ranks : {0u, 1u, 65u}) {
    EXPECT_EQ(router_->AssignGroup(Prompt(0, 90), Models(num_ranks), {}).status().code(),
              StatusCode::kInvalidArgument);
  }
}

TEST_F(RouterGroupsTest, AShardGoesAloneOnlyToItsRankOrToAWorkerWithoutGroup) {
  const AttachmentId a1 = Serve("a", 1);
  WorkerLoad all = Load(0);
  all.model_digests = {ModelOf(0), ModelOf(1)};
  ASSERT_TRUE(router_->OnLoad(a1, all).ok());
  const auto refused = router_->Assign(Prompt(0, 90), {});
  EXPECT_EQ(GetReason(refused.status()), error_reason::kNoWorker);
  EXPECT_THAT(std::string(refused.status().message()),
              HasSubstr("a-1 is rank 1 of shard group a, the model is rank 0's"));
  RoutedPrompt of_rank_1 = Prompt(0, 90);
  of_rank_1.rank = 1;
  EXPECT_EQ(router_->Assign(of_rank_1, {})->chosen.worker->worker_id, "a-1");
  // A model in one piece goes anywhere.
  RoutedPrompt whole = Prompt(0, 90);
  whole.num_ranks = 1;
  EXPECT_EQ(router_->Assign(whole, {})->chosen.worker->worker_id, "a-1");
  ASSERT_TRUE(router_->OnLoad(Attach("free", "", 0), all).ok());
  for (int i = 0; i < 5; ++i) {
    EXPECT_EQ(router_->Assign(Prompt(0, 90), {})->chosen.worker->worker_id, "free");
  }
}

TEST_F(RouterGroupsTest, BadGroupsAndRanksAreRefusedAtTheHello) {
  struct Case {
    WorkerHello hello;
    const char* message;
  };
  const Case cases[] = {
      {{.shard_group = "No Good"}, "shard_group"},
      {{.shard_group = "a", .shard_rank = 64}, "shard_rank = 64, must be 0 to 63"},
      {{.shard_rank = 1}, "shard_rank = 1 without a shard_group"},
      {{.role = SourceRole::kStore, .shard_group = "a"}, "shard_group of a store"},
  };
  for (Case c : cases) {
    c.hello.worker_id = "w";
    c.hello.incarnation = 1;
    c.hello.address = "w:1";
    const auto refused = router_->Attach(c.hello);
    EXPECT_EQ(refused.status().code(), StatusCode::kInvalidArgument) << c.message;
    EXPECT_THAT(std::string(refused.status().message()), HasSubstr(c.message));
  }
  EXPECT_TRUE(router_->ListWorkers().empty());
  Attach("w", "a", 63);
  EXPECT_EQ(router_->GetWorker("w")->hello->shard_rank, 63u);
}

}  // namespace
}  // namespace pagetide
