#include "core/placement.h"

#include <cmath>
#include <limits>
#include <random>
#include <set>

#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

using ::testing::ElementsAre;
using ::testing::HasSubstr;

// 1,000 tokens/s of prefill, 1 KB a token, host at 10 MB/s (10,000 tokens/s), store at 2 MB/s
// (2,000).
WorkerSnapshot IdleWorker() {
  WorkerSnapshot worker;
  worker.prefill_tokens_per_second = 1000;
  worker.read_cost[TierIndex(Tier::kHost)] = {.bytes_per_second = 10e6};
  worker.read_cost[TierIndex(Tier::kStore)] = {.bytes_per_second = 2e6};
  return worker;
}

PlacementRequest Prompt(int64_t tokens) {
  PlacementRequest request;
  request.prompt_tokens = tokens;
  request.kv_bytes_per_token = 1000;
  return request;
}

std::unique_ptr<PlacementPolicy> Policy(absl::string_view name = "predicted_ttft",
                                        const PlacementPolicyOptions& options = {}) {
  auto policy = MakePlacementPolicy(name, options);
  EXPECT_TRUE(policy.ok()) << policy.status();
  return *std::move(policy);
}

PlacementDecision Place(const PlacementRequest& request, std::vector<WorkerSnapshot> workers,
                        absl::string_view policy = "predicted_ttft",
                        const PlacementPolicyOptions& options = {}) {
  auto decision = PlaceSequence(*Policy(policy, options), request, workers);
  EXPECT_TRUE(decision.ok()) << decision.status();
  return *std::move(decision);
}

TEST(PlacementTest, ExplainsEveryNumberOfTheScore) {
  WorkerSnapshot worker = IdleWorker();
  worker.queue_wait = absl::Seconds(2);
  worker.read_cost[TierIndex(Tier::kStore)].latency = absl::Milliseconds(100);
  worker.prefix = {{Tier::kDevice, 1000}, {Tier::kHost, 500}, {Tier::kStore, 1500}};
  const PlacementDecision decision = Place(Prompt(4000), {worker});
  ASSERT_EQ(decision.chosen(), 0u);
  const PlacementCandidate& c = decision.candidates.front();
  EXPECT_THAT(c.hit_tokens, ElementsAre(1000, 500, 1500));
  EXPECT_THAT(c.reused_tokens, ElementsAre(1000, 500, 1500));
  EXPECT_EQ(c.computed_tokens, 1000);
  EXPECT_EQ(c.queue_wait, absl::Seconds(2));
  EXPECT_NEAR(absl::ToDoubleSeconds(c.load_time), 0.05 + 0.1 + 0.75, 1e-9);
  EXPECT_NEAR(absl::ToDoubleSeconds(c.prefill_time), 1.0, 1e-9);
  EXPECT_NEAR(absl::ToDoubleSeconds(c.predicted_ttft), 3.9, 1e-9);
  EXPECT_NEAR(c.score, 2 + 0.9 + 5 * 1.0, 1e-9);
  EXPECT_THAT(
      decision.ToString(),
      HasSubstr("worker 0: score 7.900000; ttft 3.900000 s = queue 2.000000 + load 0.900000 "
                "+ prefill 1.000000 (1000 tokens); load +0 %; tokens reused/known: device "
                "1000/1000, host 500/500, store 1500/1500"));
}

TEST(PlacementTest, LoadsNothingThatIsQuickerToCompute) {
  WorkerSnapshot worker = IdleWorker();
  worker.read_cost[TierIndex(Tier::kStore)].bytes_per_second = 0.99e6;  // 990 tokens/s < 1,000
  worker.prefix = {{Tier::kHost, 512}, {Tier::kStore, 1024}};
  const PlacementDecision decision = Place(Prompt(4000), {worker});
  const PlacementCandidate& c = decision.candidates.front();
  EXPECT_THAT(c.hit_tokens, ElementsAre(0, 512, 1024));
  EXPECT_THAT(c.reused_tokens, ElementsAre(0, 512, 0));
  EXPECT_EQ(c.computed_tokens, 4000 - 512);
}

TEST(PlacementTest, LatencyAloneCanMakeALoadNotWorthwhile) {
  WorkerSnapshot worker = IdleWorker();
  worker.prefix = {{Tier::kStore, 512}};  // 0.256 s against 0.512 s of prefill
  EXPECT_EQ(Place(Prompt(1000), {worker}).candidates[0].computed_tokens, 488);
  worker.read_cost[TierIndex(Tier::kStore)].latency =
      absl::Milliseconds(256);  // now equal: not less
  EXPECT_EQ(Place(Prompt(1000), {worker}).candidates[0].computed_tokens, 1000);
}

// A slow run in front of a long fast one: loading both beats stopping before it.
TEST(PlacementTest, LoadsASlowRunIfWhatLiesBehindPaysForIt) {
  WorkerSnapshot worker = IdleWorker();
  worker.read_cost[TierIndex(Tier::kStore)].bytes_per_second = 0.5e6;
  worker.prefix = {{Tier::kStore, 100}, {Tier::kDevice, 900}};
  const PlacementDecision decision = Place(Prompt(2000), {worker});
  EXPECT_THAT(decision.candidates[0].reused_tokens, ElementsAre(900, 0, 100));
  worker.prefix = {{Tier::kStore, 100}, {Tier::kDevice, 99}};
  EXPECT_THAT(Place(Prompt(2000), {worker}).candidates[0].reused_tokens, ElementsAre(0, 0, 0));
}

TEST(PlacementTest, NothingBehindAnUnreadableTierCounts) {
  WorkerSnapshot worker = IdleWorker();
  worker.read_cost[TierIndex(Tier::kStore)].bytes_per_second = 0;
  worker.prefix = {{Tier::kDevice, 100}, {Tier::kStore, 10}, {Tier::kDevice, 800}};
  EXPECT_THAT(Place(Prompt(1000), {worker}).candidates[0].reused_tokens, ElementsAre(100, 0, 0));
}

TEST(PlacementTest, OneTokenIsLeftToComputeUnlessAllMayBeReused) {
  WorkerSnapshot worker = IdleWorker();
  worker.prefix = {{Tier::kDevice, 1000}};
  PlacementRequest request = Prompt(1000);
  EXPECT_EQ(Place(request, {worker}).candidates[0].computed_tokens, 1);
  request.allow_full_reuse = true;
  EXPECT_EQ(Place(request, {worker}).candidates[0].computed_tokens, 0);
}

// The same trade as a brute force over all token counts at which a load could stop.
TEST(PlacementTest, SplitPointIsTheMinimumOverAllPrefixLengths) {
  for (int seed = 1; seed <= 300; ++seed) {
    SCOPED_TRACE(::testing::Message() << "seed " << seed);
    std::mt19937_64 rng(seed);
    WorkerSnapshot worker = IdleWorker();
    for (TierReadCost& cost : worker.read_cost) {
      cost.bytes_per_second = 1e5 * static_cast<double>(1 + rng() % 100);
      cost.latency = absl::Milliseconds(rng() % 50);
    }
    std::vector<Tier> tier_of_token;
    for (int run = 0; run < 5; ++run) {
      const Tier tier = static_cast<Tier>(rng() % kNumTiers);
      const int64_t tokens = static_cast<int64_t>(rng() % 60);
      worker.prefix.push_back({tier, tokens});
      tier_of_token.insert(tier_of_token.end(), static_cast<size_t>(tokens), tier);
    }
    const PlacementRequest request = Prompt(300);
    double best = 0.3;
    double load = 0;
    std::set<Tier> used;
    for (size_t n = 0; n < tier_of_token.size() && n < 299; ++n) {
      const TierReadCost& cost = worker.read_cost[TierIndex(tier_of_token[n])];
      if (tier_of_token[n] != Tier::kDevice) {
        if (used.insert(tier_of_token[n]).second) load += absl::ToDoubleSeconds(cost.latency);
        load += 1000 / cost.bytes_per_second;
      }
      best = std::min(best, load + static_cast<double>(300 - n - 1) / 1000);
    }
    const PlacementDecision decision = Place(request, {worker});
    EXPECT_NEAR(absl::ToDoubleSeconds(decision.candidates[0].predicted_ttft), best, 1e-6);
  }
}

TEST(PlacementTest, WarmWorkerWinsOverAnIdleColdOne) {
  WorkerSnapshot warm = IdleWorker();
  warm.prefix = {{Tier::kDevice, 600}};
  warm.recent_prefill = absl::Seconds(30);  // all of the fleet's recent work
  const PlacementDecision decision = Place(Prompt(681), {IdleWorker(), warm});
  EXPECT_EQ(decision.chosen(), 1u);
  EXPECT_DOUBLE_EQ(decision.candidates[0].load_excess, 1.0);
  EXPECT_DOUBLE_EQ(decision.candidates[1].load_excess, -1.0);
}

// The bound that PlacementPolicyOptions::balance_cap promises: above a tenth of the prompt, warmth
// wins.
TEST(PlacementTest, BalanceIsCapped) {
  WorkerSnapshot warm = IdleWorker();
  warm.recent_prefill = absl::Hours(1);
  warm.prefix = {{Tier::kDevice, 101}};
  EXPECT_EQ(Place(Prompt(1000), {IdleWorker(), warm}).chosen(), 1u);
  warm.prefix = {{Tier::kDevice, 99}};
  EXPECT_EQ(Place(Prompt(1000), {IdleWorker(), warm}).chosen(), 0u);
}

TEST(PlacementTest, LongQueueLosesToRecomputingElsewhere) {
  WorkerSnapshot warm = IdleWorker();
  warm.prefix = {{Tier::kDevice, 900}};
  warm.queue_wait = absl::Seconds(10);
  EXPECT_EQ(Place(Prompt(1000), {warm, IdleWorker()}).chosen(), 1u);
  warm.queue_wait = absl::Seconds(4);  // below 5 × 0.9 s of prefill
  EXPECT_EQ(Place(Prompt(1000), {warm, IdleWorker()}).chosen(), 0u);
  EXPECT_EQ(Place(Prompt(1000), {warm, IdleWorker()}, "least_loaded").chosen(), 1u);
}

TEST(PlacementTest, OutstandingSumAddsQueueOwnPrefillAndActiveTokens) {
  WorkerSnapshot worker = IdleWorker();
  worker.queue_wait = absl::Seconds(2);
  worker.active_tokens = 300;
  worker.prefix = {{Tier::kDevice, 400}};
  EXPECT_NEAR(Place(Prompt(1000), {worker}, "outstanding_sum").candidates[0].score,
              2000 + 600 + 300, 1e-6);
}

TEST(PlacementTest, IneligibleWorkersAreListedLastWithTheReason) {
  WorkerSnapshot draining = IdleWorker();
  draining.is_admitting = false;
  WorkerSnapshot small = IdleWorker();
  small.capacity_tokens = 1099;
  PlacementRequest request = Prompt(1000);
  request.max_new_tokens = 100;
  const PlacementDecision decision = Place(request, {draining, small, IdleWorker()});
  EXPECT_EQ(decision.chosen(), 2u);
  ASSERT_EQ(decision.candidates.size(), 3u);
  EXPECT_EQ(decision.candidates[1].verdict, PlacementVerdict::kNotAdmitting);
  EXPECT_EQ(decision.candidates[2].verdict, PlacementVerdict::kTooSmall);
  EXPECT_THAT(decision.ToString(), HasSubstr("worker 1: too small"));

  const PlacementDecision none = Place(request, {draining, small});
  EXPECT_EQ(none.chosen(), std::nullopt);
  EXPECT_EQ(none.num_tied, 0u);
  EXPECT_THAT(none.ToString(), HasSubstr("no eligible worker among 2"));
  EXPECT_EQ(Place(request, {}).chosen(), std::nullopt);
}

TEST(PlacementTest, TieGoesToTheLessLoadedOfTwoDraws) {
  std::vector<WorkerSnapshot> workers(3, IdleWorker());
  workers[0].active_sequences = 7;
  std::set<size_t> winners;
  for (uint64_t seed = 0; seed < 200; ++seed) {
    PlacementRequest request = Prompt(1000);
    request.tie_seed = seed;
    const PlacementDecision decision = Place(request, workers);
    EXPECT_EQ(decision.num_tied, 3u);
    ASSERT_TRUE(decision.tie_loser.has_value());
    EXPECT_NE(*decision.tie_loser, *decision.chosen());
    winners.insert(*decision.chosen());
  }
  EXPECT_THAT(winners, ElementsAre(1, 2));  // the busiest loses every draw; the others share
}

TEST(PlacementTest, SameInputSameAnswer) {
  std::vector<WorkerSnapshot> workers(8, IdleWorker());
  PlacementRequest request = Prompt(1000);
  request.tie_seed = 42;
  EXPECT_EQ(Place(request, workers).ToString(), Place(request, workers).ToString());
}

TEST(PlacementTest, DrawsAreSpreadEvenly) {
  const std::vector<WorkerSnapshot> workers(4, IdleWorker());
  std::vector<int> wins(4);
  for (uint64_t seed = 0; seed < 4000; ++seed) {
    PlacementRequest request = Prompt(1000);
    request.tie_seed = seed;
    ++wins[*Place(request, workers, "two_choices").chosen()];
  }
  for (int n : wins) EXPECT_NEAR(n, 1000, 150);  // 5 sigma
}

TEST(PlacementTest, BadNumbersAreNamed) {
  const auto error = [](const PlacementRequest& request, const WorkerSnapshot& worker) {
    const absl::Status status = PlaceSequence(*Policy(), request, {IdleWorker(), worker}).status();
    EXPECT_EQ(status.code(), absl::StatusCode::kInvalidArgument) << status;
    return std::string(status.message());
  };
  const double nan = std::nan("");
  PlacementRequest request = Prompt(-1);
  EXPECT_THAT(error(request, IdleWorker()), HasSubstr("prompt_tokens -1"));
  request = Prompt(kMaxPlacementTokens + 1);
  EXPECT_THAT(error(request, IdleWorker()), HasSubstr("prompt_tokens"));
  request = Prompt(10);
  request.max_new_tokens = std::numeric_limits<int64_t>::max();
  EXPECT_THAT(error(request, IdleWorker()), HasSubstr("max_new_tokens"));
  request = Prompt(10);
  request.kv_bytes_per_token = nan;
  EXPECT_THAT(error(request, IdleWorker()), HasSubstr("kv_bytes_per_token"));

  WorkerSnapshot worker = IdleWorker();
  worker.prefill_tokens_per_second = 0;
  EXPECT_THAT(error(Prompt(10), worker), HasSubstr("worker 1: prefill_tokens_per_second 0"));
  worker = IdleWorker();
  worker.queue_wait = -absl::Seconds(1);
  EXPECT_THAT(error(Prompt(10), worker), HasSubstr("queue_wait -1s"));
  worker = IdleWorker();
  worker.recent_prefill = absl::InfiniteDuration();
  EXPECT_THAT(error(Prompt(10), worker), HasSubstr("recent_prefill inf"));
  worker = IdleWorker();
  worker.active_tokens = -5;
  EXPECT_THAT(error(Prompt(10), worker), HasSubstr("active_tokens -5"));
  worker = IdleWorker();
  worker.read_cost[TierIndex(Tier::kStore)].bytes_per_second = nan;
  EXPECT_THAT(error(Prompt(10), worker), HasSubstr("read_cost of store"));
  worker = IdleWorker();
  worker.prefix = {{Tier::kDevice, 6}, {Tier::kHost, 5}};
  EXPECT_THAT(error(Prompt(10), worker),
              HasSubstr("a prefix run of 5 host tokens after 6 in a prompt of 10"));
  worker.prefix = {{Tier::kDevice, -1}};
  EXPECT_THAT(error(Prompt(10), worker), HasSubstr("a prefix run of -1"));
  worker.prefix = {{static_cast<Tier>(9), 1}};
  EXPECT_THAT(error(Prompt(10), worker), HasSubstr("tier 9 of 3"));
}

TEST(PlacementTest, EveryListedPolicyCanBeMadeAndNoOther) {
  for (absl::string_view name : PlacementPolicyNames()) EXPECT_EQ(Policy(name)->name(), name);
  EXPECT_THAT(std::string(MakePlacementPolicy("fastest").status().message()),
              HasSubstr("unknown name \"fastest\"; known: predicted_ttft"));
  EXPECT_FALSE(MakePlacementPolicy("predicted_ttft", {.prefill_weight = 0}).ok());
  EXPECT_FALSE(MakePlacementPolicy("predicted_ttft", {.balance_gain = -1}).ok());
  EXPECT_FALSE(MakePlacementPolicy("predicted_ttft", {.balance_cap = std::nan("")}).ok());
}

}  // namespace
}  // namespace pagetide
