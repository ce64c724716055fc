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

// Leading tokens of a prompt that may be reused at all.
uint64_t LimitOf(const PromptRequest& prompt) {
  const uint64_t tokens = prompt.tokens.size();
  return tokens - (prompt.options.allow_full_reuse || tokens == 0 ? 0 : 1);
}

// Leading tokens of a prompt that a session's rows stand for: same tokens and other inputs,
// computed at their own positions.
Usable UsableOf(const SessionState& state, const PromptRequest& prompt) {
  const std::span<const uint32_t> tokens = prompt.tokens;
  const uint64_t limit = LimitOf(prompt);
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

// Chunks of a session behind the prefix that it shares.
struct Chunks {
  std::vector<ReusedChunk> list;
  std::string why;  // in addition to why the prefix is no longer
};

Chunks ChunksOf(const SessionState& state, const PromptRequest& prompt, const Usable& prefix) {
  Chunks chunks;
  if (prompt.min_chunk_tokens == 0 || prefix.limit == ReuseLimit::kWholePrompt) return chunks;
  if (!state.positions.empty()) {
    chunks.why = "; no chunks of it: its rows were edited to stand at other positions";
    return chunks;
  }
  // Which images the rows behind the canonical ones were computed with is not known.
  const uint64_t known = prompt.inputs.empty() ? state.length() : state.canonical_length;
  chunks.list = FindChunks({std::span(state.tokens).first(known), state.inputs},
                           {prompt.tokens.first(LimitOf(prompt)), prompt.inputs}, prefix.tokens,
                           prompt.min_chunk_tokens);
  if (!chunks.list.empty()) {
    const bool is_most = chunks.list.size() == kMaxReusedChunks;
    chunks.why = absl::StrCat("; ", ChunkTokens(chunks.list), " more in ", chunks.list.size(),
                              is_most ? " chunks (no plan has more)" : " chunks", ", approximate");
  } else if (LimitOf(prompt) < prefix.tokens + prompt.min_chunk_tokens) {
    chunks.why = absl::StrCat("; the prompt goes on for less than a chunk of ",
                              prompt.min_chunk_tokens, " tokens");
  } else {
    chunks.why = absl::StrCat("; none of its tokens behind them are the prompt's next ",
                              prompt.min_chunk_tokens);
  }
  return chunks;
}

// The saved rows cannot be cut to what the prompt shares with them.
bool IsLacking(const absl::Status& status) {
  const std::string reason = GetReason(status);
  return reason == error_reason::kRowsReclaimed || reason == error_reason::kCannotCut;
}

// The model or the saved rows do not allow a chunk elsewhere.
bool IsRefusal(const absl::Status& status) {
  return IsLacking(status) || GetReason(status) == error_reason::kCannotShift;
}

void Describe(const PromptRequest& prompt, absl::string_view session, const Usable& usable,
              PrefixReuse* reuse) {
  reuse->prompt_tokens = prompt.tokens.size();
  reuse->limit = usable.limit;
  reuse->explanation = absl::StrCat(usable.tokens, " of ", prompt.tokens.size(),
                                    " tokens reused from session ", session, ": ", usable.why);
}

void Describe(const PromptRequest& prompt, absl::string_view session, const Usable& usable,
              const Chunks& chunks, PrefixReuse* reuse) {
  Describe(prompt, session, usable, reuse);
  if (reuse->reused_tokens == LimitOf(prompt)) reuse->limit = ReuseLimit::kWholePrompt;
  reuse->explanation += chunks.why;
}

}  // namespace

absl::StatusOr<PlanCandidate> PromptPlanner::Consider(const Tenant& tenant, ModelHost* host,
                                                      const PromptRequest& prompt,
                                                      const std::string& name,
                                                      MonotonicTime deadline,
                                                      PromptPlan* best) const {
  PlanCandidate candidate{.session = name, .compute_tokens = prompt.tokens.size()};
  std::vector<ManifestPageRef> pages;
  const absl::StatusOr<StoredSession> session = sessions_->Read(tenant, name, &pages, deadline);
  if (absl::IsNotFound(session.status())) {
    candidate.why_not_more = "there is no such session";
    return candidate;
  }
  PT_RETURN_IF_ERROR(session.status());
  candidate.version = session->version;
  if (const absl::Status same = CheckSameModel(session->state, host->model()); !same.ok()) {
    candidate.why_not_more = std::string(same.message());
    return candidate;
  }
  const auto adopt = [&](PrefixReuse reuse, std::vector<ReusedChunk> chunks) {
    best->reuse = std::move(reuse);
    best->session = name;
    best->session_version = session->version;
    best->chunks = std::move(chunks);
  };

  const Usable usable = UsableOf(session->state, prompt);
  candidate.usable_tokens = usable.tokens;
  candidate.why_not_more = usable.why;
  if (usable.tokens > 0) {
    absl::StatusOr<PrefixReuse> saved =
        host->LookupSaved(tenant, session->state, pages, usable.tokens);
    if (IsLacking(saved.status())) {
      candidate.usable_tokens = 0;
      candidate.why_not_more = std::string(saved.status().message());
    } else {
      PT_RETURN_IF_ERROR(saved.status());
      const bool is_better = usable.tokens > best->reuse.reused_tokens ||
                             (usable.tokens == best->reuse.reused_tokens && !best->chunks.empty());
      if (is_better) {
        Describe(prompt, name, usable, &*saved);
        adopt(*std::move(saved), {});
      }
    }
  }
  candidate.compute_tokens -= candidate.usable_tokens;

  Chunks chunks = ChunksOf(session->state, prompt, usable);
  if (chunks.list.empty()) {
    candidate.why_not_more += chunks.why;
    return candidate;
  }
  absl::StatusOr<PrefixReuse> saved =
      host->LookupSavedChunks(tenant, session->state, pages, chunks.list);
  if (IsRefusal(saved.status())) {
    absl::StrAppend(&candidate.why_not_more, "; no chunks of it: ", saved.status().message());
    return candidate;
  }
  PT_RETURN_IF_ERROR(saved.status());
  candidate.why_not_more += chunks.why;
  candidate.chunks = chunks.list;
  candidate.compute_tokens = prompt.tokens.size() - saved->reused_tokens;
  if (saved->reused_tokens > best->reuse.reused_tokens) {
    Describe(prompt, name, usable, chunks, &*saved);
    adopt(*std::move(saved), std::move(chunks.list));
  }
  return candidate;
}

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
      {.usable_tokens = plan.reuse.reused_tokens,
       .why_not_more = plan.reuse.explanation,
       .compute_tokens = plan.reuse.prompt_tokens - plan.reuse.reused_tokens});
  for (const std::string& name : sessions) {
    PT_ASSIGN_OR_RETURN(PlanCandidate candidate,
                        Consider(tenant, host, prompt, name, deadline, &plan));
    plan.candidates.push_back(std::move(candidate));
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
      if (const Chunks chunks = ChunksOf(session->state, prompt, usable); !chunks.list.empty()) {
        // Whoever asks for chunks is told why not, rather than given something else.
        PT_ASSIGN_OR_RETURN(OpenResult result,
                            host->OpenSavedChunks(tenant, session->state, pages, chunks.list));
        Describe(prompt, session_name, usable, chunks, &result.reuse);
        return result;
      }
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
