// Racing prefills: two sequences with one prompt that are computed at the same time. At the
// boundaries of its chunks each takes over what the other has committed since, and one may wait for
// a page that the other has claimed.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

// A sequence that others keep changing is its caller's mistake.
constexpr int kMaxExtendTries = 16;

}  // namespace

ModelHostImpl::LongerPrompt ModelHostImpl::MakeLonger(const Sequence& sequence,
                                                      const ExtendRequest& request) const {
  LongerPrompt longer;
  longer.tokens = sequence.tokens;
  longer.tokens.insert(longer.tokens.end(), request.tokens.begin(), request.tokens.end());
  longer.inputs = sequence.inputs;
  longer.inputs.insert(longer.inputs.end(), request.inputs.begin(), request.inputs.end());
  longer.keys = sequence.keys;
  return longer;
}

uint64_t ModelHostImpl::AdoptMatch(Sequence& sequence, const LongerPrompt& longer,
                                   const Match& match) {
  const uint64_t before = sequence.length();
  const uint64_t first = before / page_tokens();
  const uint64_t after = match.num_pages * page_tokens();
  SequenceRows next = sequence;
  // References are counted when the new rows are put in place.
  next.Truncate(first * page_tokens(), page_tokens());
  for (uint64_t p = first; p < match.num_pages; ++p) {
    for (uint32_t g = 0; g < num_groups(); ++g) {
      if (!match.pages[p][g]) continue;
      next.tables[g].Append({.page = *match.pages[p][g],
                             .first_slot = 0,
                             .count = page_tokens(),
                             .first_row = p * page_tokens()});
    }
  }
  next.AppendTokens(
      std::span(longer.tokens).subspan(next.num_rows(), after - first * page_tokens()));
  next.keys.assign(longer.keys.begin(),
                   longer.keys.begin() + static_cast<std::ptrdiff_t>(match.num_pages));
  next.inputs.clear();
  for (const PositionedInput& input : longer.inputs) {
    if (input.position < after) next.inputs.push_back(input);
  }
  next.DropMasked(traits_);
  std::vector<RowsChange> change;
  change.push_back({&sequence, std::move(next)});
  AdoptRows(std::move(change), pages_);
  for (const PageTable& table : sequence.tables) {
    for (const Extent& extent : table.extents()) pages_.Touch(pages_.Get(extent.page));
  }
  SyncTails(sequence, sequence.root, page_tokens(), pages_);
  ++sequence.revision;
  counters_.tokens_extended += after - before;
  changed_.SignalAll();
  return after - before;
}

uint32_t ModelHostImpl::NumGroupsThatKnow(const PrefixKey& key) {
  uint32_t known = 0;
  for (uint32_t g = 0; g < num_groups(); ++g) known += IsKnown(g, key);
  return known;
}

bool ModelHostImpl::IsOver(const Sequence& sequence, uint64_t revision, const PrefixKey& next,
                           uint32_t known_before, MonotonicTime give_up) {
  const MonotonicTime now = clock_->MonotonicNow();
  if (now >= give_up || sequence.closed || sequence.pending || sequence.revision != revision) {
    return true;
  }
  if (NumGroupsThatKnow(next) != known_before) return true;
  return !claims_.IsHeldByOther(next, sequence.number, now);
}

absl::StatusOr<ExtendResult> ModelHostImpl::ExtendMatch(const Tenant& tenant,
                                                        const SequenceHandle& handle,
                                                        const ExtendRequest& request,
                                                        MonotonicTime deadline) {
  if (request.tokens.empty()) return absl::InvalidArgumentError("tokens is empty");
  PT_RETURN_IF_ERROR(ValidateTokens(request.tokens, request.inputs, request.expected_length));
  const PromptOptions options{.allow_full_reuse = request.allow_full_reuse,
                              .whole_pages_only = true};
  const auto extend = [&]() -> absl::StatusOr<ExtendResult> {
    MutexLock lock(&mu_);
    const MonotonicTime give_up = std::min(deadline, clock_->MonotonicNow() + request.wait);
    bool has_waited = false;
    for (int tries = 0; tries < kMaxExtendTries;) {
      PT_ASSIGN_OR_RETURN(SequencePtr sequence, FindForChange(tenant, handle));
      PT_RETURN_IF_ERROR(CutIfLost(*sequence));
      if (request.expected_length != sequence->length()) {
        return WithReason(absl::FailedPreconditionError(absl::StrCat(
                              "extend sequence ", handle.id.ToString(), ": expected_length ",
                              request.expected_length, " != length ", sequence->length())),
                          "LENGTH_MISMATCH", {{"length", absl::StrCat(sequence->length())}});
      }
      // The second: rows that come from elsewhere are private from the first on.
      if (!sequence->is_canonical() || sequence->canonical_limit <= sequence->length()) {
        return WithReason(absl::FailedPreconditionError(absl::StrCat(
                              "extend sequence ", handle.id.ToString(),
                              ": an edit moved its rows from ", sequence->canonical_rows(), " of ",
                              sequence->length(), " on: no page of others ", "can follow them")),
                          "NOT_CANONICAL",
                          {{"canonical_length", absl::StrCat(sequence->canonical_rows())}});
      }
      // Hashed and looked up without the lock, or with it given up in between: what was found
      // counts only for the sequence as it was.
      const uint64_t revision = sequence->revision;
      LongerPrompt longer = MakeLonger(*sequence, request);
      mu_.Unlock();
      std::vector<PrefixKey> keys =
          PrefixKeysOf(sequence->root, longer.tokens, page_tokens(), longer.inputs);
      mu_.Lock();
      longer.keys = std::move(keys);
      PT_ASSIGN_OR_RETURN(const Match match, MatchPrompt(tenant, sequence->root, longer.tokens,
                                                         longer.inputs, longer.keys, options));
      if (sequence->closed || sequence->pending != nullptr || sequence->revision != revision) {
        ++tries;
        continue;  // FindForChange says what is the matter
      }
      ExtendResult result;
      if (match.num_pages * page_tokens() > sequence->length()) {
        result.extended_tokens = AdoptMatch(*sequence, longer, match);
        result.restoring_pages = Prefetch(*sequence);
      }
      const uint64_t next = sequence->length() / page_tokens();
      if (request.claim > absl::ZeroDuration() && next < longer.keys.size()) {
        const MonotonicTime now = clock_->MonotonicNow();
        const ComputeClaims::Answer claim =
            claims_.Claim(longer.keys[next], sequence->number, now, request.claim);
        result.claim = claim.is_granted ? ClaimState::kGranted : ClaimState::kHeld;
        result.claim_left = claim.ends - now;
        if (claim.is_granted) ++counters_.claims_granted;
        if (!claim.is_granted && result.extended_tokens == 0 && now < give_up) {
          if (num_waiting_claims_ >= options_.max_waiting_calls) {
            return WithRetryDelay(
                absl::ResourceExhaustedError(absl::StrCat("extend: ", num_waiting_claims_,
                                                          " calls wait for claims already")),
                absl::Milliseconds(100));
          }
          if (!std::exchange(has_waited, true)) ++counters_.claims_waited_for;
          ++num_waiting_claims_;
          // A page that is known already and could not be used is not what is waited for.
          const uint32_t known_before = NumGroupsThatKnow(longer.keys[next]);
          while (!IsOver(*sequence, revision, longer.keys[next], known_before, give_up)) {
            changed_.WaitWithTimeout(&mu_, kLookAgain);
          }
          --num_waiting_claims_;
          continue;
        }
      }
      result.info = InfoOf(*sequence);
      return result;
    }
    return absl::AbortedError(
        absl::StrCat("extend sequence ", handle.id.ToString(), ": it kept changing; retry"));
  };
  absl::StatusOr<ExtendResult> result = extend();
  Flush();
  return result;
}

}  // namespace pagetide
