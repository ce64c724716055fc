#include "core/shard_placement.h"

#include <algorithm>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "absl/strings/str_cat.h"
#include "gmock/gmock.h"
#include "gtest/gtest.h"

namespace pagetide {
namespace {

// 1,000 tokens/s of prefill, 1 KB a token, host at 10 MB/s (10,000 tokens/s), store at 2 MB/s
// (2,000).
WorkerSnapshot IdleWorker() {
  WorkerSnapshot worker;
  worker.prefill_tokens_per_second = 1000;
  worker.read_cost[TierIndex(Tier::kHost)] = {.bytes_per_second = 10e6};
  worker.read_cost[TierIndex(Tier::kStore)] = {.bytes_per_second = 2e6};
  return worker;
}

PlacementRequest Request(int64_t tokens) {
  PlacementRequest request;
  request.prompt_tokens = tokens;
  request.kv_bytes_per_token = 1000;
  return request;
}

std::string Text(const absl::InlinedVector<PrefixRun, 4>& prefix) {
  std::string text;
  for (const PrefixRun& run : prefix) {
    absl::StrAppend(&text, text.empty() ? "" : " ", TierName(run.tier), ":", run.tokens);
  }
  return text;
}

TEST(ShardPlacementTest, EachNumberIsThatOfTheWorstRank) {
  WorkerSnapshot a = IdleWorker(), b = IdleWorker();
  a.queue_wait = absl::Seconds(3);
  b.queue_wait = absl::Seconds(1);
  a.prefill_tokens_per_second = 500;
  b.recent_prefill = absl::Seconds(9);
  a.active_sequences = 7;
  b.active_tokens = 8;
  a.capacity_tokens = 4000;
  b.capacity_tokens = 3000;
  a.read_cost[TierIndex(Tier::kStore)] = {.bytes_per_second = 5e6,
                                          .latency = absl::Milliseconds(4)};
  b.read_cost[TierIndex(Tier::kHost)].bytes_per_second = 0;
  for (const auto& ranks : {std::vector{a, b}, std::vector{b, a}}) {
    const WorkerSnapshot group = MergeRanks(ranks);
    EXPECT_TRUE(group.is_admitting);
    EXPECT_EQ(group.queue_wait, absl::Seconds(3));
    EXPECT_EQ(group.prefill_tokens_per_second, 500);
    EXPECT_EQ(group.recent_prefill, absl::Seconds(9));
    EXPECT_EQ(group.active_sequences, 7);
    EXPECT_EQ(group.active_tokens, 8);
    EXPECT_EQ(group.capacity_tokens, 3000);
    EXPECT_EQ(group.read_cost[TierIndex(Tier::kStore)].bytes_per_second, 2e6);
    EXPECT_EQ(group.read_cost[TierIndex(Tier::kStore)].latency, absl::Milliseconds(4));
    EXPECT_EQ(group.read_cost[TierIndex(Tier::kHost)].bytes_per_second, 0);
  }
  b.is_admitting = false;
  EXPECT_FALSE(MergeRanks({a, b}).is_admitting);
  EXPECT_FALSE(MergeRanks({b, a}).is_admitting);
}

TEST(ShardPlacementTest, ATokenIsInTheSlowestTierAndKnownAsFarAsAllKnowIt) {
  WorkerSnapshot a = IdleWorker(), b = IdleWorker(), c = IdleWorker();
  a.prefix = {{Tier::kDevice, 300}, {Tier::kStore, 300}};
  b.prefix = {{Tier::kDevice, 100}, {Tier::kHost, 300}, {Tier::kDevice, 100}};
  c.prefix = {{Tier::kDevice, 1000}};
  EXPECT_EQ(Text(MergeRanks({a, b, c}).prefix), "device:100 host:200 store:200");
  EXPECT_EQ(Text(MergeRanks({c, c}).prefix), "device:1000");
  EXPECT_EQ(LimitingRank({a, b, c}), 1u);
  EXPECT_EQ(LimitingRank({c, a, a}), 1u);
  c.prefix.clear();
  EXPECT_EQ(Text(MergeRanks({a, b, c}).prefix), "");
  EXPECT_EQ(LimitingRank({a, b, c}), 2u);
}

TEST(ShardPlacementTest, WhatARankCannotReadEndsThePrefixOfAll) {
  WorkerSnapshot a = IdleWorker(), b = IdleWorker();
  a.prefix = {{Tier::kDevice, 100}, {Tier::kHost, 100}, {Tier::kDevice, 100}};
  b.prefix = {{Tier::kDevice, 250}};
  EXPECT_EQ(LimitingRank({a, b}), 1u);
  a.read_cost[TierIndex(Tier::kHost)].bytes_per_second = 0;
  EXPECT_EQ(Text(MergeRanks({a, b}).prefix), "device:100");
  EXPECT_EQ(LimitingRank({a, b}), 0u);
}

TEST(ShardPlacementTest, TheSlowestRankIsTheOneThatTheGroupWaitsFor) {
  WorkerSnapshot a = IdleWorker(), b = IdleWorker(), c = IdleWorker();
  a.prefix = b.prefix = {{Tier::kDevice, 800}};
  c.prefix = {{Tier::kStore, 900}};  // 0.4 s for 800 tokens
  EXPECT_EQ(SlowestRank(Request(1000), {a, b, c}, 800), 2u);
  // What nobody reuses costs nobody anything.
  EXPECT_EQ(SlowestRank(Request(1000), {a, b, c}, 0), 0u);
  b.queue_wait = absl::Milliseconds(500);
  EXPECT_EQ(SlowestRank(Request(1000), {a, b, c}, 800), 1u);
  a.prefill_tokens_per_second = 250;  // 0.8 s for 200 tokens
  EXPECT_EQ(SlowestRank(Request(1000), {a, b, c}, 800), 0u);
  // The latency of a tier is paid once, though its tokens come in two runs.
  c.prefix = {{Tier::kHost, 100}, {Tier::kDevice, 100}, {Tier::kHost, 600}};
  c.read_cost[TierIndex(Tier::kHost)].latency = absl::Milliseconds(450);
  EXPECT_EQ(SlowestRank(Request(1000), {a, c}, 800), 0u);  // 0.8 against 0.45 + 0.07 + 0.2
  c.read_cost[TierIndex(Tier::kHost)].latency = absl::Milliseconds(550);
  EXPECT_EQ(SlowestRank(Request(1000), {a, c}, 800), 1u);
}

// Token by token: the tier that a rank would take each from; as long as what it can use.
std::vector<Tier> TiersOf(const WorkerSnapshot& worker) {
  std::vector<Tier> tiers;
  for (const PrefixRun& run : worker.prefix) {
    if (run.tier != Tier::kDevice && run.tokens > 0 &&
        worker.read_cost[TierIndex(run.tier)].bytes_per_second == 0) {
      break;
    }
    tiers.insert(tiers.end(), static_cast<size_t>(run.tokens), run.tier);
  }
  return tiers;
}

WorkerSnapshot RandomWorker(std::mt19937& rng, int64_t prompt_tokens) {
  const auto draw = [&](int64_t from, int64_t to) {
    return std::uniform_int_distribution<int64_t>(from, to)(rng);
  };
  WorkerSnapshot worker;
  worker.is_admitting = draw(0, 9) > 0;
  worker.prefill_tokens_per_second = static_cast<double>(draw(1, 5) * 100);
  worker.queue_wait = absl::Milliseconds(draw(0, 3) * 250);
  worker.recent_prefill = absl::Seconds(draw(0, 5));
  worker.active_sequences = draw(0, 9);
  worker.active_tokens = draw(0, 9);
  worker.capacity_tokens = draw(prompt_tokens * 9 / 10, 2 * prompt_tokens);
  for (const Tier tier : {Tier::kHost, Tier::kStore}) {
    worker.read_cost[TierIndex(tier)] = {.bytes_per_second = static_cast<double>(draw(0, 4)) * 1e6,
                                         .latency = absl::Milliseconds(draw(0, 2) * 100)};
  }
  for (int64_t left = draw(0, prompt_tokens), runs = draw(0, 6); runs > 0; --runs) {
    const int64_t tokens = draw(0, left);
    worker.prefix.push_back({static_cast<Tier>(draw(0, 2)), tokens});
    left -= tokens;
  }
  return worker;
}

TEST(ShardPlacementTest, AgreesWithAModelThatGoesTokenByToken) {
  constexpr int64_t kPrompt = 60;
  const PlacementRequest request = Request(kPrompt);
  const auto policy = MakePlacementPolicy("predicted_ttft");
  ASSERT_TRUE(policy.ok());
  int num_long_prefixes = 0, num_reused = 0;
  for (uint32_t seed = 0; seed < 2000; ++seed) {
    SCOPED_TRACE(absl::StrCat("seed ", seed));
    std::mt19937 rng(seed);
    std::vector<WorkerSnapshot> ranks;
    const size_t num_ranks = 1 + rng() % 5;
    while (ranks.size() < num_ranks) ranks.push_back(RandomWorker(rng, kPrompt));
    const WorkerSnapshot group = MergeRanks(ranks);

    // The prefix.
    std::vector<std::vector<Tier>> tiers;
    for (const WorkerSnapshot& rank : ranks) tiers.push_back(TiersOf(rank));
    size_t shortest = tiers.front().size(), limiting = 0;
    for (size_t i = 1; i < num_ranks; ++i) {
      if (tiers[i].size() < shortest) {
        shortest = tiers[i].size();
        limiting = i;
      }
    }
    std::vector<Tier> merged;
    for (const PrefixRun& run : group.prefix) {
      ASSERT_GT(run.tokens, 0);
      merged.insert(merged.end(), static_cast<size_t>(run.tokens), run.tier);
    }
    ASSERT_EQ(merged.size(), shortest);
    for (size_t token = 0; token < shortest; ++token) {
      Tier slowest = Tier::kDevice;
      for (const auto& rank : tiers) slowest = std::max(slowest, rank[token]);
      ASSERT_EQ(merged[token], slowest) << "token " << token;
    }
    for (size_t i = 1; i < group.prefix.size(); ++i) {
      EXPECT_NE(group.prefix[i].tier, group.prefix[i - 1].tier);  // no run is cut in two
    }
    EXPECT_EQ(LimitingRank(ranks), limiting);
    num_long_prefixes += shortest > 10;

    // The placement of the group as a worker, and the rank that it waits for.
    const auto decision = PlaceSequence(**policy, request, {group});
    ASSERT_TRUE(decision.ok()) << decision.status();
    const PlacementCandidate& candidate = decision->candidates.front();
    bool fits = true;
    for (const WorkerSnapshot& rank : ranks) {
      fits &= rank.is_admitting && rank.capacity_tokens >= kPrompt;
    }
    ASSERT_EQ(candidate.verdict == PlacementVerdict::kEligible, fits);
    if (!fits) continue;
    const int64_t reused = kPrompt - candidate.computed_tokens;
    ASSERT_LE(reused, static_cast<int64_t>(shortest));
    num_reused += reused > 0;
    std::vector<double> seconds;
    for (size_t i = 0; i < num_ranks; ++i) {
      double time = absl::ToDoubleSeconds(ranks[i].queue_wait);
      for (const Tier tier : {Tier::kHost, Tier::kStore}) {
        const auto n = std::count(tiers[i].begin(), tiers[i].begin() + reused, tier);
        if (n == 0) continue;
        const TierReadCost& cost = ranks[i].read_cost[TierIndex(tier)];
        time += absl::ToDoubleSeconds(cost.latency) +
                static_cast<double>(n) * request.kv_bytes_per_token / cost.bytes_per_second;
      }
      time += static_cast<double>(kPrompt - reused) / ranks[i].prefill_tokens_per_second;
      seconds.push_back(time);
    }
    const size_t slowest = SlowestRank(request, ranks, reused);
    ASSERT_LT(slowest, num_ranks);
    EXPECT_NEAR(seconds[slowest], *std::max_element(seconds.begin(), seconds.end()), 1e-9);
  }
  // Else the loop above compared nothing with nothing.
  EXPECT_GT(num_long_prefixes, 100);
  EXPECT_GT(num_reused, 100);
}

}  // namespace
}  // namespace pagetide
