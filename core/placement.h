// Placement: which worker should get a sequence, as a pure function of what is known about the
// workers.
//
// For each worker, the predicted time to first token is
//     queue wait + min over split points of (load the prefix up to there) + (prefill the rest)
// where a split point is the end of a run of tokens that share a tier. Because the minimum is over
// all split points, nothing is loaded that is quicker to compute again, and a slow run is loaded if
// what lies behind it pays for it. A PlacementPolicy turns the prediction and the worker's load
// into a score; lowest wins.
//
// Everything here is a value or immutable: thread-safe, no clock, no state, and the same input
// gives the same answer (ties are broken from a seed in the request), so ExplainPlacement is the
// same call without effect.
#ifndef PAGETIDE_CORE_PLACEMENT_H_
#define PAGETIDE_CORE_PLACEMENT_H_

#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "absl/container/inlined_vector.h"
#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "absl/time/time.h"
#include "absl/types/span.h"
#include "core/tier.h"

namespace pagetide {

// Largest prompt that can be placed; keeps all sums far from overflow.
inline constexpr int64_t kMaxPlacementTokens = int64_t{1} << 40;

// Time constant of WorkerSnapshot::recent_prefill, the same for all workers of a fleet.
inline constexpr absl::Duration kRecentPrefillTimeConstant = absl::Hours(1);

struct PlacementRequest {
  int64_t prompt_tokens = 0;
  // Tokens the sequence may grow by; counts only against a worker's free capacity.
  int64_t max_new_tokens = 0;
  // KV bytes of one token over all layer groups and shards that the worker has to load.
  double kv_bytes_per_token = 0;
  // false: at least one prompt token is computed, since engines need its logits.
  bool allow_full_reuse = false;
  // Any number; two requests with different seeds break ties differently.
  uint64_t tie_seed = 0;
};

// `tokens` consecutive tokens of the prompt whose fastest copy, seen from the worker, is in `tier`.
struct PrefixRun {
  Tier tier = Tier::kDevice;
  int64_t tokens = 0;
};

// What it costs a worker to bring pages up to its device. Unused for Tier::kDevice.
struct TierReadCost {
  double bytes_per_second = 0;  // measured by the worker; 0: the tier cannot be read now
  absl::Duration latency;       // paid once per sequence and tier
};

// One worker as seen at one moment, for one request.
struct WorkerSnapshot {
  bool is_admitting = true;              // false: draining, dead or cut off
  double prefill_tokens_per_second = 0;  // measured; must be > 0 if admitting
  absl::Duration queue_wait;             // until a prefill that arrives now would start
  // Prefill time of what was placed on it lately: a DecayingSum with kRecentPrefillTimeConstant.
  absl::Duration recent_prefill;
  int64_t active_sequences = 0;                                   // waiting, in prefill or decoding
  int64_t active_tokens = 0;                                      // KV tokens those sequences hold
  int64_t capacity_tokens = std::numeric_limits<int64_t>::max();  // most one sequence can ever hold
  std::array<TierReadCost, kNumTiers> read_cost;
  // The longest prefix of the prompt known to be reusable, from token 0, in order.
  absl::InlinedVector<PrefixRun, 4> prefix;
};

enum class PlacementVerdict : uint8_t {
  kEligible,
  kNotAdmitting,
  kTooSmall,  // prompt + max_new_tokens can never fit
};

// One row of the table: every number that led to the score.
struct PlacementCandidate {
  size_t worker = 0;  // index into the snapshots
  PlacementVerdict verdict = PlacementVerdict::kEligible;
  std::array<int64_t, kNumTiers> hit_tokens{};     // known prefix by tier
  std::array<int64_t, kNumTiers> reused_tokens{};  // part of it that the plan uses
  int64_t computed_tokens = 0;                     // prompt - sum of reused_tokens
  absl::Duration queue_wait;
  absl::Duration load_time;       // of reused_tokens from host and store
  absl::Duration prefill_time;    // of computed_tokens
  absl::Duration predicted_ttft;  // queue_wait + load_time + prefill_time
  // recent_prefill over its mean of the eligible workers, minus 1: 0.2 is a fifth above its share.
  double load_excess = 0;
  double score = 0;  // the policy's, in seconds; lowest wins

  // One line, all the numbers.
  std::string ToString() const;
};

struct PlacementDecision {
  // Every worker once. Eligible ones first, the chosen one at the front, then by score.
  std::vector<PlacementCandidate> candidates;
  // Eligible workers whose score equals the best (1 if there was no tie).
  size_t num_tied = 0;
  // The loser of the two drawn from a tie, if there was one.
  std::optional<size_t> tie_loser;

  // Index of the chosen worker; nullopt if none is eligible.
  std::optional<size_t> chosen() const;
  // The table with the reason for the choice, a line a candidate.
  std::string ToString() const;
};

// How to weigh a worker. Implementations are immutable and pure.
class PlacementPolicy {
 public:
  virtual ~PlacementPolicy() = default;
  virtual absl::string_view name() const = 0;
  // Seconds or any other unit that is the same for all workers of one call; lower is better.
  // `candidate` has all fields but the score.
  virtual double Score(const PlacementRequest& request, const WorkerSnapshot& worker,
                       const PlacementCandidate& candidate) const = 0;
};

// Weights of predicted_ttft. The defaults were measured on public traces; docs/replay.md has the
// tables.
struct PlacementPolicyOptions {
  // Of the own prefill time. 1 is the time this request waits; more charges it for the work it
  // makes: a prefill delays all that come after it, and computing what another worker holds evicts
  // pages.
  double prefill_weight = 5.0;
  // A worker whose recent load is off its share by x is charged clamp(balance_gain × x, ±
  // balance_cap) times the prefill time of the whole prompt. 0 turns it off. Without it, idle
  // workers look all the same and long sessions pile up on some.
  double balance_gain = 5.0;
  // Bounds what balance may cost: a worker that holds more than 2 × balance_cap / prefill_weight of
  // the prompt (a tenth) on its device never loses a sequence to an idle one for balance alone.
  double balance_cap = 0.25;
};

// Names for MakePlacementPolicy, the default first:
// - predicted_ttft: queue wait + load + prefill_weight × own prefill + balance, in seconds;
// - outstanding_sum: outstanding prefill + own prefill + active tokens, in tokens; the kind of cost
//   that NVIDIA Dynamo's router minimises;
// - least_loaded: queue wait only;
// - two_choices: none, so that all tie and the less loaded of two random workers gets the sequence.
absl::Span<const absl::string_view> PlacementPolicyNames();

// INVALID_ARGUMENT for an unknown name, prefill_weight not finite and > 0, or a balance_* not
// finite and >= 0.
absl::StatusOr<std::unique_ptr<PlacementPolicy>> MakePlacementPolicy(
    absl::string_view name, const PlacementPolicyOptions& options = {});

// Ranks all workers. Equal scores are settled by two draws from the tied workers: the one with the
// shorter queue, then less recent prefill, fewer active sequences and fewer active tokens wins
// (power of two choices). INVALID_ARGUMENT if a number is negative, not finite or beyond
// kMaxPlacementTokens, or if a prefix is longer than the prompt. No eligible worker is an answer
// (chosen() is nullopt), not an error.
absl::StatusOr<PlacementDecision> PlaceSequence(const PlacementPolicy& policy,
                                                const PlacementRequest& request,
                                                absl::Span<const WorkerSnapshot> workers);

}  // namespace pagetide

#endif  // PAGETIDE_CORE_PLACEMENT_H_
