// PromptPlanner: how much of a prompt need not be computed, from which of several cached contexts:
// pages found by their keys, and sessions that the caller names. The longest usable one wins; a
// longer context is cut to what it shares with the prompt. If asked, runs of a session's tokens
// that the prompt holds further in front are reused there too, approximately
// (core/reused_chunks.h).
//
// Domain: knows neither gRPC nor protobuf. Thread-safe. Sessions outlive it.
#ifndef PAGETIDE_WORKER_PROMPT_PLANNER_H_
#define PAGETIDE_WORKER_PROMPT_PLANNER_H_

#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "absl/status/statusor.h"
#include "absl/strings/string_view.h"
#include "core/reused_chunks.h"
#include "worker/model_host.h"
#include "worker/sessions.h"

namespace pagetide {

struct PromptRequest {
  std::span<const uint32_t> tokens;
  std::span<const PositionedInput> inputs;
  PromptOptions options;
  // > 0: behind the prefix that a session shares, runs of at least so many of its tokens are reused
  // at other positions.
  uint32_t min_chunk_tokens = 0;
};

struct PlanCandidate {
  std::string session;  // empty: pages found by their keys
  uint64_t version = 0;
  uint64_t usable_tokens = 0;  // of its prefix
  std::string why_not_more;
  std::vector<ReusedChunk> chunks;  // behind what it shares with the prompt
  uint64_t compute_tokens = 0;      // left by the better of the two
};

struct PromptPlan {
  PrefixReuse reuse;    // what an open by this plan reuses
  std::string session;  // where it comes from; empty: pages found by their keys
  uint64_t session_version = 0;
  // Not empty: the plan is approximate, and opens only with the same min_chunk_tokens.
  std::vector<ReusedChunk> chunks;
  std::vector<PlanCandidate> candidates;  // keys first, then the sessions in the order asked
};

class PromptPlanner {
 public:
  static constexpr size_t kMaxSessions = 16;

  explicit PromptPlanner(Sessions* sessions) : sessions_(sessions) {}

  // Pure: restores nothing. A session that cannot serve (unknown, another model or adapter) is a
  // candidate of 0 tokens that says why, one whose model refuses chunks has none and says why. The
  // plan that leaves the fewest tokens to compute wins, an exact one where both leave as many.
  // INVALID_ARGUMENT: tokens, names, too many sessions; the store's errors.
  absl::StatusOr<PromptPlan> Plan(const Tenant& tenant, ModelHost* host,
                                  const PromptRequest& prompt,
                                  std::span<const std::string> sessions,
                                  MonotonicTime deadline) const;
  // Opens from a planned session if it is still there in that version; by keys otherwise. With
  // chunks if it has some: FAILED_PRECONDITION where the model refuses them, and nothing is open.
  absl::StatusOr<OpenResult> Open(const Tenant& tenant, ModelHost* host,
                                  const PromptRequest& prompt, absl::string_view session,
                                  uint64_t session_version, MonotonicTime deadline) const;

 private:
  // What one session would give; `best` becomes it where it is better.
  absl::StatusOr<PlanCandidate> Consider(const Tenant& tenant, ModelHost* host,
                                         const PromptRequest& prompt, const std::string& name,
                                         MonotonicTime deadline, PromptPlan* best) const;

  Sessions* const sessions_;
};

}  // namespace pagetide

#endif  // PAGETIDE_WORKER_PROMPT_PLANNER_H_
