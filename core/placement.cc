#include "core/placement.h"

#include <algorithm>
#include <cmath>
#include <tuple>
#include <utility>

#include "absl/status/status.h"
#include "absl/strings/str_cat.h"
#include "absl/strings/str_format.h"
#include "absl/strings/str_join.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

// SplitMix64: turns consecutive seeds into independent draws. Source: Steele, Lea, Flood, OOPSLA
// 2014.
uint64_t NextRandom(uint64_t& state) {
  uint64_t z = (state += 0x9e3779b97f4a7c15u);
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

bool IsFiniteAndNotNegative(double x) {
  return std::isfinite(x) && x >= 0;
}

absl::Status ValidateRequest(const PlacementRequest& request) {
  for (const auto& [field, value] : {std::pair("prompt_tokens", request.prompt_tokens),
                                     std::pair("max_new_tokens", request.max_new_tokens)}) {
    if (value < 0 || value > kMaxPlacementTokens) {
      return absl::InvalidArgumentError(absl::StrCat("place sequence: ", field, " ", value,
                                                     " is not in [0, ", kMaxPlacementTokens, "]"));
    }
  }
  if (!IsFiniteAndNotNegative(request.kv_bytes_per_token)) {
    return absl::InvalidArgumentError(absl::StrCat("place sequence: kv_bytes_per_token ",
                                                   request.kv_bytes_per_token,
                                                   " is not finite and >= 0"));
  }
  return absl::OkStatus();
}

absl::Status ValidateWorker(const PlacementRequest& request, size_t index,
                            const WorkerSnapshot& worker) {
  const auto error = [index](auto&&... parts) {
    return absl::InvalidArgumentError(
        absl::StrCat("place sequence: worker ", index, ": ", parts...));
  };
  const double rate = worker.prefill_tokens_per_second;
  if (!IsFiniteAndNotNegative(rate) || (worker.is_admitting && rate == 0)) {
    return error("prefill_tokens_per_second ", rate, " is not finite and > 0");
  }
  for (const auto& [field, value] : {std::pair("queue_wait", worker.queue_wait),
                                     std::pair("recent_prefill", worker.recent_prefill)}) {
    if (value < absl::ZeroDuration() || value == absl::InfiniteDuration()) {
      return error(field, " ", absl::FormatDuration(value), " is not finite and >= 0");
    }
  }
  for (const auto& [field, value] : {std::pair("active_sequences", worker.active_sequences),
                                     std::pair("active_tokens", worker.active_tokens),
                                     std::pair("capacity_tokens", worker.capacity_tokens)}) {
    if (value < 0) return error(field, " ", value, " < 0");
  }
  for (size_t t = 0; t < kNumTiers; ++t) {
    const TierReadCost& cost = worker.read_cost[t];
    if (!IsFiniteAndNotNegative(cost.bytes_per_second) || cost.latency < absl::ZeroDuration()) {
      return error("read_cost of ", TierName(static_cast<Tier>(t)), ": ", cost.bytes_per_second,
                   " bytes/s, latency ", absl::FormatDuration(cost.latency));
    }
  }
  int64_t known = 0;
  for (const PrefixRun& run : worker.prefix) {
    if (TierIndex(run.tier) >= kNumTiers) {
      return error("prefix names tier ", TierIndex(run.tier), " of ", kNumTiers);
    }
    if (run.tokens < 0 || run.tokens > request.prompt_tokens - known) {
      return error("a prefix run of ", run.tokens, " ", TierName(run.tier), " tokens after ", known,
                   " in a prompt of ", request.prompt_tokens);
    }
    known += run.tokens;
  }
  return absl::OkStatus();
}

PlacementVerdict VerdictOn(const PlacementRequest& request, const WorkerSnapshot& worker) {
  if (!worker.is_admitting) return PlacementVerdict::kNotAdmitting;
  if (request.prompt_tokens + request.max_new_tokens > worker.capacity_tokens) {
    return PlacementVerdict::kTooSmall;
  }
  return PlacementVerdict::kEligible;
}

// Chooses the split point and fills in everything but the score.
void PlanPrefix(const PlacementRequest& request, const WorkerSnapshot& worker,
                PlacementCandidate& candidate) {
  for (const PrefixRun& run : worker.prefix) {
    candidate.hit_tokens[TierIndex(run.tier)] += run.tokens;
  }
  const int64_t reusable =
      std::max<int64_t>(0, request.prompt_tokens - (request.allow_full_reuse ? 0 : 1));
  const double rate = worker.prefill_tokens_per_second;
  const auto prefill_seconds = [&](int64_t reused) {
    return static_cast<double>(request.prompt_tokens - reused) / rate;
  };

  double load = 0;
  int64_t reused = 0;
  std::array<int64_t, kNumTiers> reused_by_tier{};
  std::array<bool, kNumTiers> has_paid_latency{};
  // The split at 0: load nothing, compute all.
  double best_load = 0;
  int64_t best_reused = 0;
  for (const PrefixRun& run : worker.prefix) {
    const int64_t tokens = std::min(run.tokens, reusable - reused);
    if (tokens == 0) continue;
    const size_t tier = TierIndex(run.tier);
    if (run.tier != Tier::kDevice) {
      const TierReadCost& cost = worker.read_cost[tier];
      if (cost.bytes_per_second == 0) break;  // what lies behind cannot be reached
      if (!std::exchange(has_paid_latency[tier], true)) load += absl::ToDoubleSeconds(cost.latency);
      load += static_cast<double>(tokens) * request.kv_bytes_per_token / cost.bytes_per_second;
    }
    reused += tokens;
    reused_by_tier[tier] += tokens;
    if (load + prefill_seconds(reused) < best_load + prefill_seconds(best_reused)) {
      best_load = load;
      best_reused = reused;
      candidate.reused_tokens = reused_by_tier;
    }
  }
  candidate.computed_tokens = request.prompt_tokens - best_reused;
  candidate.queue_wait = worker.queue_wait;
  candidate.load_time = absl::Seconds(best_load);
  candidate.prefill_time = absl::Seconds(prefill_seconds(best_reused));
  candidate.predicted_ttft = candidate.queue_wait + candidate.load_time + candidate.prefill_time;
}

// Moves the winner of a tie among the first `num_tied` candidates to the front.
void BreakTie(absl::Span<const WorkerSnapshot> workers, uint64_t seed,
              PlacementDecision& decision) {
  const size_t n = decision.num_tied;
  if (n < 2) return;
  // Two distinct draws; the bias of % is below 2^-50 for any fleet.
  size_t first = NextRandom(seed) % n;
  size_t second = NextRandom(seed) % (n - 1);
  if (second >= first) ++second;
  const auto load = [&](size_t position) {
    const WorkerSnapshot& worker = workers[decision.candidates[position].worker];
    return std::tuple(worker.queue_wait, worker.recent_prefill, worker.active_sequences,
                      worker.active_tokens);
  };
  if (load(second) < load(first)) std::swap(first, second);
  decision.tie_loser = decision.candidates[second].worker;
  const auto begin = decision.candidates.begin();
  std::rotate(begin, begin + static_cast<ptrdiff_t>(first),
              begin + static_cast<ptrdiff_t>(first) + 1);
}

class PredictedTtftPolicy final : public PlacementPolicy {
 public:
  explicit PredictedTtftPolicy(const PlacementPolicyOptions& options) : options_(options) {}
  absl::string_view name() const override { return "predicted_ttft"; }
  double Score(const PlacementRequest& request, const WorkerSnapshot& worker,
               const PlacementCandidate& candidate) const override {
    const double whole_prefill =
        static_cast<double>(request.prompt_tokens) / worker.prefill_tokens_per_second;
    const double balance = std::clamp(options_.balance_gain * candidate.load_excess,
                                      -options_.balance_cap, options_.balance_cap);
    return absl::ToDoubleSeconds(candidate.queue_wait) +
           absl::ToDoubleSeconds(candidate.load_time) +
           options_.prefill_weight * absl::ToDoubleSeconds(candidate.prefill_time) +
           balance * whole_prefill;
  }

 private:
  const PlacementPolicyOptions options_;
};

class OutstandingSumPolicy final : public PlacementPolicy {
 public:
  absl::string_view name() const override { return "outstanding_sum"; }
  double Score(const PlacementRequest&, const WorkerSnapshot& worker,
               const PlacementCandidate& candidate) const override {
    return absl::ToDoubleSeconds(candidate.queue_wait) * worker.prefill_tokens_per_second +
           static_cast<double>(candidate.computed_tokens) +
           static_cast<double>(worker.active_tokens);
  }
};

class LeastLoadedPolicy final : public PlacementPolicy {
 public:
  absl::string_view name() const override { return "least_loaded"; }
  double Score(const PlacementRequest&, const WorkerSnapshot&,
               const PlacementCandidate& candidate) const override {
    return absl::ToDoubleSeconds(candidate.queue_wait);
  }
};

class TwoChoicesPolicy final : public PlacementPolicy {
 public:
  absl::string_view name() const override { return "two_choices"; }
  double Score(const PlacementRequest&, const WorkerSnapshot&,
               const PlacementCandidate&) const override {
    return 0;
  }
};

constexpr absl::string_view kPolicyNames[] = {"predicted_ttft", "outstanding_sum", "least_loaded",
                                              "two_choices"};

}  // namespace

std::string PlacementCandidate::ToString() const {
  switch (verdict) {
    case PlacementVerdict::kNotAdmitting:
      return absl::StrCat("worker ", worker, ": not admitting");
    case PlacementVerdict::kTooSmall:
      return absl::StrCat("worker ", worker, ": too small");
    case PlacementVerdict::kEligible:
      break;
  }
  std::string tiers;
  for (size_t t = 0; t < kNumTiers; ++t) {
    absl::StrAppend(&tiers, t == 0 ? "" : ", ", TierName(static_cast<Tier>(t)), " ",
                    reused_tokens[t], "/", hit_tokens[t]);
  }
  return absl::StrFormat(
      "worker %d: score %.6f; ttft %.6f s = queue %.6f + load %.6f + prefill %.6f (%d tokens); "
      "load %+.0f %%; tokens reused/known: %s",
      worker, score, absl::ToDoubleSeconds(predicted_ttft), absl::ToDoubleSeconds(queue_wait),
      absl::ToDoubleSeconds(load_time), absl::ToDoubleSeconds(prefill_time), computed_tokens,
      100 * load_excess, tiers);
}

std::optional<size_t> PlacementDecision::chosen() const {
  if (candidates.empty() || candidates.front().verdict != PlacementVerdict::kEligible) {
    return std::nullopt;
  }
  return candidates.front().worker;
}

std::string PlacementDecision::ToString() const {
  std::string reason;
  if (!chosen().has_value()) {
    reason = absl::StrCat("no eligible worker among ", candidates.size());
  } else if (tie_loser.has_value()) {
    reason = absl::StrCat("worker ", *chosen(), ": ", num_tied, " tied, drawn against worker ",
                          *tie_loser, ", not more loaded");
  } else {
    reason = absl::StrCat("worker ", *chosen(), ": lowest score");
  }
  return absl::StrCat(reason, "\n",
                      absl::StrJoin(candidates, "\n", [](std::string* out, const auto& candidate) {
                        absl::StrAppend(out, candidate.ToString());
                      }));
}

absl::Span<const absl::string_view> PlacementPolicyNames() {
  return kPolicyNames;
}

absl::StatusOr<std::unique_ptr<PlacementPolicy>> MakePlacementPolicy(
    absl::string_view name, const PlacementPolicyOptions& options) {
  if (!std::isfinite(options.prefill_weight) || options.prefill_weight <= 0 ||
      !IsFiniteAndNotNegative(options.balance_gain) ||
      !IsFiniteAndNotNegative(options.balance_cap)) {
    return absl::InvalidArgumentError(
        absl::StrCat("make placement policy: prefill_weight ", options.prefill_weight,
                     " must be > 0, balance_gain ", options.balance_gain, " and balance_cap ",
                     options.balance_cap, " >= 0, all finite"));
  }
  if (name == "predicted_ttft") return std::make_unique<PredictedTtftPolicy>(options);
  if (name == "outstanding_sum") return std::make_unique<OutstandingSumPolicy>();
  if (name == "least_loaded") return std::make_unique<LeastLoadedPolicy>();
  if (name == "two_choices") return std::make_unique<TwoChoicesPolicy>();
  return absl::InvalidArgumentError(absl::StrCat("make placement policy: unknown name \"", name,
                                                 "\"; known: ", absl::StrJoin(kPolicyNames, ", ")));
}

absl::StatusOr<PlacementDecision> PlaceSequence(const PlacementPolicy& policy,
                                                const PlacementRequest& request,
                                                absl::Span<const WorkerSnapshot> workers) {
  PT_RETURN_IF_ERROR(ValidateRequest(request));
  PlacementDecision decision;
  decision.candidates.reserve(workers.size());
  absl::Duration recent_prefill;  // of the eligible workers
  double num_eligible = 0;
  for (size_t i = 0; i < workers.size(); ++i) {
    PT_RETURN_IF_ERROR(ValidateWorker(request, i, workers[i]));
    PlacementCandidate& candidate = decision.candidates.emplace_back();
    candidate.worker = i;
    candidate.verdict = VerdictOn(request, workers[i]);
    if (candidate.verdict != PlacementVerdict::kEligible) continue;
    PlanPrefix(request, workers[i], candidate);
    recent_prefill += workers[i].recent_prefill;
    ++num_eligible;
  }
  for (PlacementCandidate& candidate : decision.candidates) {
    if (candidate.verdict != PlacementVerdict::kEligible) continue;
    const WorkerSnapshot& worker = workers[candidate.worker];
    if (recent_prefill > absl::ZeroDuration()) {
      candidate.load_excess =
          num_eligible * absl::FDivDuration(worker.recent_prefill, recent_prefill) - 1;
    }
    candidate.score = policy.Score(request, worker, candidate);
  }
  const auto rank = [](const PlacementCandidate& c) {
    return std::tuple(c.verdict, c.score, c.worker);
  };
  std::sort(decision.candidates.begin(), decision.candidates.end(),
            [&](const auto& a, const auto& b) { return rank(a) < rank(b); });
  while (decision.num_tied < decision.candidates.size() &&
         decision.candidates[decision.num_tied].verdict == PlacementVerdict::kEligible &&
         decision.candidates[decision.num_tied].score == decision.candidates.front().score) {
    ++decision.num_tied;
  }
  BreakTie(workers, request.tie_seed, decision);
  return decision;
}

}  // namespace pagetide
