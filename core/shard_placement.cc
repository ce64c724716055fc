#include "core/shard_placement.h"

#include <algorithm>
#include <array>
#include <utility>
#include <vector>

namespace pagetide {
namespace {

// Steps through the runs that a rank can use.
class PrefixCursor {
 public:
  explicit PrefixCursor(const WorkerSnapshot& worker) : worker_(&worker) { SkipEmpty(); }

  bool is_at_end() const {
    if (run_ == worker_->prefix.size()) return true;
    const Tier t = tier();
    return t != Tier::kDevice && worker_->read_cost[TierIndex(t)].bytes_per_second == 0;
  }
  Tier tier() const { return worker_->prefix[run_].tier; }
  // Tokens of the present run that are left.
  int64_t tokens() const { return worker_->prefix[run_].tokens - taken_; }
  void Take(int64_t tokens) {
    taken_ += tokens;
    SkipEmpty();
  }

 private:
  void SkipEmpty() {
    while (run_ < worker_->prefix.size() && taken_ >= worker_->prefix[run_].tokens) {
      ++run_;
      taken_ = 0;
    }
  }

  const WorkerSnapshot* worker_;
  size_t run_ = 0;
  int64_t taken_ = 0;
};

int64_t UsableTokens(const WorkerSnapshot& worker) {
  int64_t tokens = 0;
  for (PrefixCursor at(worker); !at.is_at_end();) {
    const int64_t run = at.tokens();
    tokens += run;
    at.Take(run);
  }
  return tokens;
}

// Queue, load and prefill of one rank, in seconds.
double SecondsToStart(const PlacementRequest& request, const WorkerSnapshot& worker,
                      int64_t reused_tokens) {
  double seconds = absl::ToDoubleSeconds(worker.queue_wait);
  std::array<bool, kNumTiers> has_paid_latency{};
  int64_t reused = 0;
  for (PrefixCursor at(worker); reused < reused_tokens && !at.is_at_end();) {
    const int64_t tokens = std::min(at.tokens(), reused_tokens - reused);
    if (at.tier() != Tier::kDevice) {
      const TierReadCost& cost = worker.read_cost[TierIndex(at.tier())];
      if (!std::exchange(has_paid_latency[TierIndex(at.tier())], true)) {
        seconds += absl::ToDoubleSeconds(cost.latency);
      }
      seconds += static_cast<double>(tokens) * request.kv_bytes_per_token / cost.bytes_per_second;
    }
    reused += tokens;
    at.Take(tokens);
  }
  return seconds + static_cast<double>(request.prompt_tokens - reused_tokens) /
                       worker.prefill_tokens_per_second;
}

}  // namespace

WorkerSnapshot MergeRanks(absl::Span<const WorkerSnapshot> ranks) {
  WorkerSnapshot group = ranks.front();
  group.prefix.clear();
  std::vector<PrefixCursor> cursors;
  cursors.reserve(ranks.size());
  for (const WorkerSnapshot& rank : ranks) {
    group.is_admitting &= rank.is_admitting;
    group.prefill_tokens_per_second =
        std::min(group.prefill_tokens_per_second, rank.prefill_tokens_per_second);
    group.queue_wait = std::max(group.queue_wait, rank.queue_wait);
    group.recent_prefill = std::max(group.recent_prefill, rank.recent_prefill);
    group.active_sequences = std::max(group.active_sequences, rank.active_sequences);
    group.active_tokens = std::max(group.active_tokens, rank.active_tokens);
    group.capacity_tokens = std::min(group.capacity_tokens, rank.capacity_tokens);
    for (size_t t = 0; t < kNumTiers; ++t) {
      TierReadCost& cost = group.read_cost[t];
      cost.bytes_per_second = std::min(cost.bytes_per_second, rank.read_cost[t].bytes_per_second);
      cost.latency = std::max(cost.latency, rank.read_cost[t].latency);
    }
    cursors.emplace_back(rank);
  }
  // Each step ends a run of at least one rank.
  const auto is_at_end = [](const PrefixCursor& at) { return at.is_at_end(); };
  while (std::none_of(cursors.begin(), cursors.end(), is_at_end)) {
    PrefixRun run{.tier = Tier::kDevice, .tokens = cursors.front().tokens()};
    for (const PrefixCursor& at : cursors) {
      run.tier = std::max(run.tier, at.tier());
      run.tokens = std::min(run.tokens, at.tokens());
    }
    for (PrefixCursor& at : cursors) at.Take(run.tokens);
    if (!group.prefix.empty() && group.prefix.back().tier == run.tier) {
      group.prefix.back().tokens += run.tokens;
    } else {
      group.prefix.push_back(run);
    }
  }
  return group;
}

size_t LimitingRank(absl::Span<const WorkerSnapshot> ranks) {
  const auto limiting = std::min_element(
      ranks.begin(), ranks.end(),
      [](const auto& a, const auto& b) { return UsableTokens(a) < UsableTokens(b); });
  return static_cast<size_t>(limiting - ranks.begin());
}

size_t SlowestRank(const PlacementRequest& request, absl::Span<const WorkerSnapshot> ranks,
                   int64_t reused_tokens) {
  size_t slowest = 0;
  double longest = -1;
  for (size_t i = 0; i < ranks.size(); ++i) {
    const double seconds = SecondsToStart(request, ranks[i], reused_tokens);
    if (seconds > longest) {
      longest = seconds;
      slowest = i;
    }
  }
  return slowest;
}

}  // namespace pagetide
