#include "worker/prompt_planner.h"

#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"

namespace pagetide {
namespace {

struct Usable {
  uint64_t tokens = 0;
  ReuseLimit limit = ReuseLimit::kDiverged;
  std::string why;
};

// Leading tokens of a prompt that a session's rows stand for: same tokens and other inputs,
// computed at their own positions.
Usable UsableOf(const SessionState& state, const PromptRequest& prompt) {
  const std::span<const uint32_t> tokens = prompt.tokens;
  const uint64_t limit =
      tokens.size() - (prompt.options.allow_full_reuse || tokens.empty() ? 0 : 1);
  const auto differ =
      std::mismatch(tokens.begin(), tokens.end(), state.tokens.begin(), state.tokens.end());
  uint64_t common = static_cast<uint64_t>(differ.first - tokens.begin());
  const auto inputs = std::mismatch(prompt.inputs.begin(), prompt.inputs.end(),
                                    state.inputs.begin(), state.inputs.end());
  if (inputs.first != prompt.inputs.end()) {
    common = std::min(common, inputs.first->position);
  }
  if (inputs.second != state.inputs.end()) common = std::min(common, inputs.second->position);

  Usable usable{.tokens = std::min({common, state.canonical_length, limit})};
  if (usable.tokens == limit) {
    usable.limit = ReuseLimit::kWholePrompt;
    usable.why = "it covers the prompt";
  } else if (usable.tokens == state.length()) {
    usable.limit = ReuseLimit::kNeverStored;
    usable.why = absl::StrCat("the session ends after ", state.length(), " tokens");
  } else if (usable.tokens == state.canonical_length) {
    usable.why =
        absl::StrCat("its rows were edited or imported from token ", state.canonical_length, " on");
  } else {
    usable.why = absl::StrCat("tokens or other inputs differ from token ", usable.tokens, " on");
  }
  return usable;
}

// The saved rows cannot be cut to what the prompt shares with them.
bool IsLacking(const absl::Status& status) {
  const std::string reason = GetReason(status);
  return reason == error_reason::kRowsReclaimed || reason == error_reason::kCannotCut;
}

void Describe(const PromptRequest& prompt, absl::string_view session, const Usable& usable,
              PrefixReuse* reuse) {
  reuse->prompt_tokens = prompt.tokens.size();
  reuse->limit = usable.limit;
  reuse->explanation = absl::StrCat(usable.tokens, " of ", prompt.tokens.size(),
                                    " tokens reused from session ", session, ": ", usable.why);
}

}  // namespace

absl::StatusOr<PromptPlan> PromptPlanner::Plan(const Tenant& tenant, ModelHost* host,
                                               const PromptRequest& prompt,
                                               std::span<const std::string> sessions,
                                               MonotonicTime deadline) const {
  if (sessions.size() > kMaxSessions) {
    return absl::InvalidArgumentError(
        absl::StrCat("sessions has ", sessions.size(), " names, at most ", kMaxSessions));
  }
  PromptPlan plan;
  PT_ASSIGN_OR_RETURN(plan.reuse,
                      host->LookupPrefix(tenant, prompt.tokens, prompt.inputs, prompt.options));
  plan.candidates.push_back(
      {.usable_tokens = plan.reuse.reused_tokens, .why_not_more = plan.reuse.explanation});
  for (const std::string& name : sessions) {
    PlanCandidate candidate{.session = name};
    std::vector<ManifestPageRef> pages;
    const absl::StatusOr<StoredSession> session = sessions_->Read(tenant, name, &pages, deadline);
    if (absl::IsNotFound(session.status())) {
      candidate.why_not_more = "there is no such session";
      plan.candidates.push_back(std::move(candidate));
      continue;
    }
    PT_RETURN_IF_ERROR(session.status());
    candidate.version = session->version;
    if (const absl::Status same = CheckSameModel(session->state, host->model()); !same.ok()) {
      candidate.why_not_more = std::string(same.message());
      plan.candidates.push_back(std::move(candidate));
      continue;
    }
    const Usable usable = UsableOf(session->state, prompt);
    candidate.usable_tokens = usable.tokens;
    candidate.why_not_more = usable.why;
    absl::StatusOr<PrefixReuse> saved = plan.reuse;
    if (usable.tokens > plan.reuse.reused_tokens) {
      saved = host->LookupSaved(tenant, session->state, pages, usable.tokens);
      if (IsLacking(saved.status())) {
        candidate.usable_tokens = 0;
        candidate.why_not_more = std::string(saved.status().message());
      } else {
        PT_RETURN_IF_ERROR(saved.status());
      }
    }
    plan.candidates.push_back(std::move(candidate));
    if (!saved.ok() || usable.tokens <= plan.reuse.reused_tokens) continue;
    plan.reuse = *std::move(saved);
    Describe(prompt, name, usable, &plan.reuse);
    plan.session = name;
    plan.session_version = session->version;
  }
  return plan;
}

absl::StatusOr<OpenResult> PromptPlanner::Open(const Tenant& tenant, ModelHost* host,
                                               const PromptRequest& prompt,
                                               absl::string_view session_name,
                                               uint64_t session_version,
                                               MonotonicTime deadline) const {
  if (!session_name.empty() && !prompt.options.no_reuse) {
    std::vector<ManifestPageRef> pages;
    const absl::StatusOr<StoredSession> session =
        sessions_->Read(tenant, session_name, &pages, deadline);
    if (!session.ok() && !absl::IsNotFound(session.status())) return session.status();
    if (session.ok() && session->version == session_version &&
        session->state.model_digest == host->model().digest()) {
      const Usable usable = UsableOf(session->state, prompt);
      absl::StatusOr<OpenResult> result =
          host->OpenSaved(tenant, session->state, pages, usable.tokens, std::nullopt);
      // A layer group lacks what that prefix would need: the plan did not count on it.
      if (!IsLacking(result.status())) {
        if (result.ok()) Describe(prompt, session_name, usable, &result->reuse);
        return result;
      }
    }
  }
  return host->Open(tenant, prompt.tokens, prompt.inputs, prompt.options);
}

}  // namespace pagetide
