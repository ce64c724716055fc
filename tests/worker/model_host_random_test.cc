// ModelHost against what must be: random calls on sequences that share prefixes, through a pool
// much smaller than what they hold; and the same from several threads.
#include <gtest/gtest.h>

#include <cstdio>
#include <cstdlib>
#include <latch>
#include <map>
#include <random>
#include <thread>

#include "absl/strings/numbers.h"
#include "tests/worker/model_host_fixture.h"

namespace pagetide {
namespace {

uint64_t Seed() {
  uint64_t seed = 20261121;
  if (const char* text = std::getenv("PAGETIDE_TEST_SEED")) {
    if (!absl::SimpleAtoi(text, &seed)) ADD_FAILURE() << "PAGETIDE_TEST_SEED is not a number";
  }
  std::printf("seed %llu\n", static_cast<unsigned long long>(seed));
  return seed;
}

// Prompts from a small family: few distinct blocks, so that prefixes meet and part inside pages.
std::vector<uint32_t> RandomPrompt(std::mt19937_64& rng, uint32_t max_blocks) {
  std::vector<uint32_t> tokens;
  const uint32_t blocks = 1 + rng() % max_blocks;
  for (uint32_t b = 0; b < blocks; ++b) {
    const uint32_t kind = rng() % 2;
    const uint32_t length = b < 3 ? 13 : 5 + 4 * (rng() % 3);
    for (uint32_t i = 0; i < length; ++i) tokens.push_back(kind * 100 + i);
  }
  return tokens;
}

// With a model that drops pages that fill twice, and with one that keeps them.
class RandomCalls : public ::testing::TestWithParam<bool> {};
INSTANTIATE_TEST_SUITE_P(Numerics, RandomCalls, ::testing::Bool());

TEST_P(RandomCalls, EveryRowIsAlwaysWhatItsTokensSay) {
  std::mt19937_64 rng(Seed());
  HostUnderTest t(
      {.page_tokens = 8, .num_groups = 2, .num_frames = 20, .batch_invariant = GetParam()});
  std::map<uint64_t, std::pair<SequenceInfo, std::vector<uint32_t>>> open;
  uint64_t num_reused = 0, num_checked = 0;
  const auto pick = [&]() { return std::next(open.begin(), rng() % open.size()); };
  for (int step = 0; step < 10000; ++step) {
    const uint32_t what = rng() % 100;
    if (open.size() < 4 || (what < 15 && open.size() < 24)) {
      const std::vector<uint32_t> prompt = RandomPrompt(rng, 6);
      PrefixReuse reuse;
      auto info = t.OpenAndFill(prompt, &reuse);
      ASSERT_TRUE(info.ok()) << step << ": " << info.status();
      num_reused += reuse.reused_tokens;
      open[info->id.number] = {*info, prompt};
    } else if (what < 40) {
      auto& [info, tokens] = pick()->second;
      if (tokens.size() > 100) continue;
      const uint32_t n = 1 + rng() % 12;
      for (uint32_t i = 0; i < n; ++i) tokens.push_back(rng() % 3 * 100 + i);
      if (rng() % 2 == 0) {
        auto longer = t.host->ExtendMatch(
            t.tenant, {info.id, info.epoch, std::nullopt},
            {.expected_length = info.length, .tokens = std::span(tokens).subspan(info.length)},
            t.Soon());
        ASSERT_TRUE(longer.ok()) << step << ": " << longer.status();
        info = longer->info;
      }
      auto next = rng() % 2 == 0 ? t.Append(info, tokens) : t.Step(info, tokens);
      ASSERT_TRUE(next.ok()) << step << ": " << next.status();
      info = *next;
    } else if (what < 50 && open.size() < 20) {
      const auto& [info, tokens] = pick()->second;
      const uint64_t length = rng() % (tokens.size() + 1);
      auto fork = t.host->Fork(t.tenant, {info.id, info.epoch, std::nullopt}, length, t.Soon());
      ASSERT_TRUE(fork.ok()) << step << ": " << fork.status();
      open[fork->info.id.number] = {fork->info,
                                    std::vector<uint32_t>(tokens.begin(), tokens.begin() + length)};
    } else if (what < 64) {
      auto& [info, tokens] = pick()->second;
      const uint64_t length = rng() % (tokens.size() + 1);
      auto cut = t.host->Rewind(t.tenant, {info.id, info.epoch, std::nullopt}, length);
      ASSERT_TRUE(cut.ok()) << step << ": " << cut.status();
      tokens.resize(length);
      info = cut->info;
    } else if (what < 76) {
      auto it = pick();
      ASSERT_TRUE(t.host->Close(t.tenant, it->second.first.id, it->second.first.epoch).ok());
      open.erase(it);
    } else if (what < 80) {
      ASSERT_TRUE(t.host->EvictPages(rng() % 4, t.Soon()).ok());
    } else if (what < 82) {
      t.host->ClearCache(false);
    } else if (what < 84) {
      t.host->Tick();
    } else {
      const auto& [info, tokens] = pick()->second;
      auto wrong = t.WrongRows(info.id, tokens);
      ASSERT_TRUE(wrong.ok()) << step << ": " << wrong.status();
      ASSERT_EQ(*wrong, 0u) << step;
      ++num_checked;
    }
  }
  for (const auto& [number, entry] : open) {
    ASSERT_EQ(t.WrongRows(entry.first.id, entry.second).value(), 0u);
    ASSERT_TRUE(t.host->Close(t.tenant, entry.first.id, entry.first.epoch).ok());
  }
  t.host->Quiesce();
  t.host->ClearCache(false);
  for (const PoolUsage& usage : t.host->Usage()) EXPECT_EQ(usage.free_frames, usage.num_frames);
  const HostCounters counters = t.host->Counters();
  EXPECT_EQ(counters.checksum_failures, 0u);
  // The run must have gone where it meant to go.
  EXPECT_GT(num_reused, 500u);
  EXPECT_GT(num_checked, 300u);
  EXPECT_GT(counters.pages_restored, 300u);
  EXPECT_GT(counters.rows_copied, 300u);
  EXPECT_GT(counters.tokens_extended, 100u);
  if (GetParam())
    EXPECT_GT(counters.pages_deduplicated, 30u);
  else
    EXPECT_EQ(counters.pages_deduplicated, 0u);
}

TEST(ModelHostRandomTest, TwoHundredSequencesEightThreadsSixteenFrames) {
  constexpr int kThreads = 8;
  constexpr int kPerThread = 25;
  const uint64_t seed = Seed();
  HostUnderTest t({.page_tokens = 16, .num_frames = 16});
  std::latch all_open(kThreads);
  std::vector<std::thread> threads;
  std::atomic<uint64_t> rows_checked{0};  // relaxed: read after the joins
  for (int n = 0; n < kThreads; ++n) {
    threads.emplace_back([&, n] {
      std::mt19937_64 rng(seed + n);
      std::vector<std::pair<SequenceInfo, std::vector<uint32_t>>> open;
      for (int i = 0; i < kPerThread; ++i) {
        // 2 to 6 pages; half of them begin like those of the other threads.
        std::vector<uint32_t> tokens = Tokens(i % 2 == 0 ? i * 1000 : n * 1000000 + i * 1000, 20);
        const uint32_t more = 12 + rng() % 60;
        for (uint32_t j = 0; j < more; ++j) tokens.push_back(n * 10000 + rng() % 5000);
        auto info = t.OpenAndFill(tokens);
        ASSERT_TRUE(info.ok()) << info.status();
        open.emplace_back(*info, tokens);
      }
      all_open.arrive_and_wait();  // all 200 are open at once
      for (int round = 0; round < 2; ++round) {
        for (auto& [info, tokens] : open) {
          auto wrong = t.WrongRows(info.id, tokens);
          ASSERT_TRUE(wrong.ok()) << wrong.status();
          ASSERT_EQ(*wrong, 0u);
          rows_checked.fetch_add(tokens.size(), std::memory_order_relaxed);
          if (round == 1) continue;
          tokens.push_back(77);
          auto next = t.Step(info, tokens);
          ASSERT_TRUE(next.ok()) << next.status();
          info = *next;
        }
      }
      for (const auto& [info, tokens] : open) {
        ASSERT_TRUE(t.host->Close(t.tenant, info.id, info.epoch).ok());
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  t.host->Quiesce();
  t.host->ClearCache(false);
  EXPECT_EQ(t.host->Usage()[0].free_frames, 16u);
  EXPECT_GT(rows_checked.load(), 10000u);
  EXPECT_GT(t.host->Counters().pages_restored, 200u);
}

}  // namespace
}  // namespace pagetide
