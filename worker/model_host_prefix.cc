// Prefixes: what of a prompt is known, and opening a sequence over it.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/error_info.h"
#include "base/status_macros.h"
#include "worker/model_host_impl.h"

namespace pagetide {
namespace {

absl::string_view LimitText(ReuseLimit limit) {
  switch (limit) {
    case ReuseLimit::kWholePrompt:
      return "the whole prompt is known";
    case ReuseLimit::kNeverStored:
      return "the next page was never stored here or in the store";
    case ReuseLimit::kDiverged:
      return "the tokens differ from every known page from here on";
    case ReuseLimit::kQuarantined:
      return "the next page is there but failed its checksum";
    case ReuseLimit::kStoreUnavailable:
      return "the store did not answer in time";
    case ReuseLimit::kSlowerThanCompute:
      return "restoring the next page is predicted to be slower than recomputing it";
    case ReuseLimit::kGroup:
      return "one layer group knows less than the others";
    case ReuseLimit::kNoFrame:
      return "part of the next page is known, but no frame is free to copy it to";
  }
  return "";
}

bool HasInputIn(std::span<const PositionedInput> inputs, uint64_t begin, uint64_t end) {
  for (const PositionedInput& input : inputs) {
    if (input.position >= begin && input.position < end) return true;
  }
  return false;
}

// A page that one layer group lacks and another one has.
struct PageLack {
  uint64_t page = 0;
  uint32_t group = 0;
};

}  // namespace

bool ModelHostImpl::IsKnown(uint32_t group, const PrefixKey& key) {
  const Page* page = pages_.FindKeyed(group, key);
  return page != nullptr && page->state() != PageState::kQuarantined;
}

ModelHostImpl::UsablePages ModelHostImpl::FindUsablePages(const std::vector<PrefixKey>& keys,
                                                          uint64_t max_pages) {
  UsablePages usable;
  // Groups that forget nothing need all pages in front.
  uint64_t longest = max_pages;
  for (uint32_t g = 0; g < num_groups(); ++g) {
    if (traits_[g].forgets()) continue;
    uint64_t p = 0;
    while (p < longest && IsKnown(g, keys[p])) ++p;
    longest = p;
  }
  if (longest < max_pages) {
    bool is_known = false;
    for (uint32_t g = num_groups(); g-- > 0;) {
      if (IsKnown(g, keys[longest])) {
        is_known = true;
      } else if (!traits_[g].forgets()) {
        usable.limiting_group = g;
      }
    }
    if (!is_known) usable.limiting_group.reset();  // that page is nobody's
  }
  // A group that forgets needs the last of them, a state group the very last, and what a ring
  // keeps. A page that it lacks is needed for every length from there to here: the next that may do
  // ends in front of it.
  usable.num_pages = longest;
  for (uint32_t g = 0; g < num_groups();) {
    const uint64_t kept = std::min(KeptPages(g), usable.num_pages);
    uint64_t p = 0;
    while (p < kept && IsKnown(g, keys[p])) ++p;
    if (p == kept) {
      p = std::max(kept, FirstNeededPage(g, usable.num_pages));
      while (p < usable.num_pages && IsKnown(g, keys[p])) ++p;
    }
    if (p == usable.num_pages) {
      ++g;
      continue;
    }
    usable.num_pages = p;
    usable.limiting_group = g;
    g = 0;  // at another length the groups in front may lack a page too
  }
  return usable;
}

void ModelHostImpl::TouchKnownPages(const std::vector<PrefixKey>& keys, uint64_t num_pages) {
  for (uint64_t p = num_pages; p-- > 0;) {
    for (uint32_t g = 0; g < num_groups(); ++g) {
      if (const Page* page = pages_.FindKeyed(g, keys[p])) pages_.TouchKnown(*page);
    }
  }
}

absl::StatusOr<ModelHostImpl::Match> ModelHostImpl::MatchPrompt(
    const Tenant& tenant, const PrefixKey& root, std::span<const uint32_t> tokens,
    std::span<const PositionedInput> inputs, const std::vector<PrefixKey>& keys,
    const PromptOptions& options) {
  const uint32_t page_size = page_tokens();
  const uint64_t limit =
      options.allow_full_reuse ? tokens.size() : tokens.size() - std::min<size_t>(tokens.size(), 1);
  const uint64_t max_pages = limit / page_size;
  const MonotonicTime store_deadline = clock_->MonotonicNow() + options_.lookup_timeout;

  // The store is asked once, for all pages from the first that is not known here.
  ReuseLimit cause = ReuseLimit::kNeverStored;
  std::optional<PageLack> stored_lack;
  uint64_t unknown = max_pages;
  for (uint64_t p = 0; p < unknown; ++p) {
    for (uint32_t g = 0; g < num_groups(); ++g) {
      if (!IsKnown(g, keys[p])) unknown = p;
    }
  }
  if (unknown < max_pages && store_ != nullptr && !options.skip_store) {
    std::vector<PageKey> asked;
    for (uint64_t p = unknown; p < max_pages; ++p) {
      for (uint32_t g = 0; g < num_groups(); ++g) {
        asked.push_back(MakePageKey(keys[p], Geometry(g).fingerprint()));
      }
    }
    TouchKnownPages(keys, unknown);
    mu_.Unlock();
    const absl::StatusOr<std::vector<LookupResult>> found =
        store_->LookupPages(asked, store_deadline);
    mu_.Lock();
    if (!found.ok()) {
      ++counters_.store_errors;
      last_store_error_ = found.status();
      cause = ReuseLimit::kStoreUnavailable;
    } else {
      // Full-attention groups end the run; a window group may know the pages behind a gap.
      bool is_run = true;
      for (uint64_t p = unknown; p < max_pages && is_run; ++p) {
        const std::span<const LookupResult> page_results(&(*found)[(p - unknown) * num_groups()],
                                                         num_groups());
        bool is_known = false;
        for (uint32_t g = num_groups(); g-- > 0;) {
          const LookupResult& result = page_results[g];
          if ((result.present && result.body_bytes == Geometry(g).stored_page_bytes()) ||
              IsKnown(g, keys[p])) {
            is_known = true;
          } else if (!traits_[g].forgets()) {
            if (result.quarantined) cause = ReuseLimit::kQuarantined;
            is_run = false;
            stored_lack = {p, g};
          }
        }
        if (!is_known) stored_lack.reset();
        if (!is_run) break;
        auto page_tokens_copy = std::make_shared<const std::vector<uint32_t>>(
            tokens.begin() + p * page_size, tokens.begin() + (p + 1) * page_size);
        for (uint32_t g = 0; g < num_groups(); ++g) {
          const LookupResult& result = page_results[g];
          if (!result.present || result.body_bytes != Geometry(g).stored_page_bytes()) continue;
          const Page* parent = p == 0 ? nullptr : pages_.FindKeyed(g, keys[p - 1]);
          pages_.AdoptStored(g, tenant.name, page_size, static_cast<uint32_t>(p),
                             parent ? std::optional(parent->id()) : std::nullopt, keys[p],
                             p == 0 ? root : keys[p - 1], asked[(p - unknown) * num_groups() + g],
                             result.checksum, page_tokens_copy,
                             HasInputIn(inputs, p * page_size, (p + 1) * page_size));
        }
      }
    }
  }

  // Before pages are chosen, since asking gives the mutex up.
  if (cause != ReuseLimit::kStoreUnavailable && !options.skip_store && !options.whole_pages_only) {
    const uint64_t at = FindUsablePages(keys, max_pages).num_pages * page_size;
    const uint64_t end = std::min<uint64_t>(limit, at + page_size);
    AdoptPartialFromStore(tenant, root, keys, at / page_size, tokens.subspan(at, end - at),
                          HasInputIn(inputs, at, end), store_deadline);
  }

  Match match;
  PrefixReuse& reuse = match.reuse;
  reuse.prompt_tokens = tokens.size();
  UsablePages usable = FindUsablePages(keys, max_pages);
  if (stored_lack && stored_lack->page == usable.num_pages && !usable.limiting_group) {
    usable.limiting_group = stored_lack->group;
  }
  TouchKnownPages(keys, usable.num_pages);
  const auto is_stored_only = [&](uint64_t p, uint64_t num_pages) {
    for (uint32_t g = 0; g < num_groups(); ++g) {
      if (!IsNeeded(g, p, num_pages)) continue;
      mu_.AssertHeld();
      if (pages_.FindKeyed(g, keys[p])->state() == PageState::kStored) return true;
    }
    return false;
  };
  // Never slower than recomputing: one decision for all pages that must come from the store.
  uint64_t store_bytes = 0;
  uint64_t store_pages = 0;
  uint64_t first_stored = usable.num_pages;
  for (uint64_t p = usable.num_pages; p-- > 0;) {
    if (!is_stored_only(p, usable.num_pages)) continue;
    ++store_pages;
    first_stored = p;
    for (uint32_t g = 0; g < num_groups(); ++g) {
      if (!IsNeeded(g, p, usable.num_pages)) continue;
      if (pages_.FindKeyed(g, keys[p])->state() == PageState::kStored) {
        store_bytes += Geometry(g).stored_page_bytes();
      }
    }
  }
  if (store_pages > 0 && !options.is_copied) {
    const RestoreEstimate estimate =
        EstimateRestore(store_bytes, store_meter_.per_second(), store_pages * page_size,
                        prefill_meter_.per_second());
    if (!estimate.worth_it) {
      // At a shorter length a window group may need other pages, which only the store has as well.
      while (first_stored < usable.num_pages) {
        usable = FindUsablePages(keys, first_stored);
        first_stored = 0;
        while (first_stored < usable.num_pages && !is_stored_only(first_stored, usable.num_pages)) {
          ++first_stored;
        }
      }
      cause = ReuseLimit::kSlowerThanCompute;
    }
  }
  match.num_pages = usable.num_pages;
  for (uint64_t p = 0; p < usable.num_pages; ++p) {
    std::vector<std::optional<PageId>>& ids = match.pages.emplace_back(num_groups());
    bool is_readable = true;
    for (uint32_t g = 0; g < num_groups(); ++g) {
      if (!IsNeeded(g, p, usable.num_pages)) continue;
      const Page& page = *pages_.FindKeyed(g, keys[p]);
      ids[g] = page.id();
      is_readable = is_readable && page.is_readable();
    }
    (is_readable ? reuse.device_tokens : reuse.store_tokens) += page_size;
  }
  reuse.shared_pages = usable.num_pages;
  reuse.reused_tokens = reuse.shared_pages * page_size;
  reuse.limit = cause;
  if (usable.limiting_group && cause == ReuseLimit::kNeverStored) {
    reuse.limit = ReuseLimit::kGroup;
    reuse.limiting_group = *usable.limiting_group;
  }

  // Rows of one more page that begins alike.
  const uint64_t at = reuse.reused_tokens;
  const std::span<const uint32_t> rest = tokens.subspan(at, limit - at);
  if (cause != ReuseLimit::kSlowerThanCompute && !options.whole_pages_only && rest.size() >= 2 &&
      !HasInputIn(inputs, at, at + std::min<uint64_t>(rest.size(), page_size))) {
    const PrefixKey& parent = reuse.shared_pages == 0 ? root : keys[reuse.shared_pages - 1];
    uint32_t common = page_size;
    bool is_tail = false;
    std::optional<uint32_t> whole_group;
    for (uint32_t g = 0; g < num_groups() && common > 0; ++g) {
      if (traits_[g].is_whole) {
        whole_group = whole_group.value_or(g);
        continue;
      }
      const auto found = pages_.index(g).LongestPartial(
          parent, rest.subspan(0, std::min<size_t>(rest.size(), page_size)), [this](PageId id) {
            mu_.AssertHeld();
            const Page* page = pages_.Find(id);
            if (page == nullptr || page->state() == PageState::kQuarantined) return false;
            // A tail may be copied only right now, from its frame.
            return page->is_full() || page->is_readable();
          });
      if (!found) {
        common = 0;
        break;
      }
      common = std::min(common, found->common_tokens);
      is_tail = is_tail || !pages_.Get(found->page).is_full();
      match.partial.push_back(found->page);
    }
    // One tail among them means that all are copied now, so all must be in frames now: a layer
    // group's own best page may be a full one that only the store has.
    const bool is_copyable =
        std::all_of(match.partial.begin(), match.partial.end(), [this](PageId id) {
          mu_.AssertHeld();
          return pages_.Get(id).is_readable();
        });
    if (whole_group) {
      // Others may know rows of the next page; of a page or state that is whole only all helps.
      if (common >= 2 && !match.partial.empty() && reuse.limit != ReuseLimit::kGroup) {
        reuse.limit = ReuseLimit::kGroup;
        reuse.limiting_group = *whole_group;
      }
      common = 0;
    }
    if (common >= 2 && is_tail && !is_copyable) {
      common = 0;
      reuse.limit = ReuseLimit::kNoFrame;
    }
    // The whole page is read for the rows that are wanted of it.
    uint64_t read_bytes = 0;
    for (uint32_t g = 0; g < match.partial.size(); ++g) {
      if (!pages_.Get(match.partial[g]).is_readable()) {
        read_bytes += Geometry(g).stored_page_bytes();
      }
    }
    if (common >= 2 && read_bytes > 0 &&
        !EstimateRestore(read_bytes, store_meter_.per_second(), common, prefill_meter_.per_second())
             .worth_it) {
      common = 0;
      reuse.limit = ReuseLimit::kSlowerThanCompute;
    }
    if (common >= 2) {
      match.is_partial_tail = is_tail;
      reuse.partial_rows = common;
      reuse.reused_tokens += common;
      const bool is_stored_only =
          std::any_of(match.partial.begin(), match.partial.end(), [this](PageId id) {
            mu_.AssertHeld();
            return !pages_.Get(id).is_readable();
          });
      (is_stored_only ? reuse.store_tokens : reuse.device_tokens) += common;
      if (reuse.limit == ReuseLimit::kNeverStored) reuse.limit = ReuseLimit::kDiverged;
    } else {
      match.partial.clear();
    }
  }
  if (reuse.reused_tokens == limit) reuse.limit = ReuseLimit::kWholePrompt;
  reuse.explanation = absl::StrCat(reuse.reused_tokens, " of ", reuse.prompt_tokens,
                                   " tokens reused: ", LimitText(reuse.limit));
  return match;
}

void ModelHostImpl::AdoptPartialFromStore(const Tenant& tenant, const PrefixKey& root,
                                          const std::vector<PrefixKey>& keys, uint64_t at_page,
                                          std::span<const uint32_t> next, bool has_inputs,
                                          MonotonicTime deadline) {
  if (store_ == nullptr || next.size() < 2 || has_inputs) return;
  const PrefixKey parent = at_page == 0 ? root : keys[at_page - 1];
  std::vector<PartialQuery> queries;
  std::vector<uint32_t> known(num_groups(), 0);
  bool is_known = true;
  for (uint32_t g = 0; g < num_groups(); ++g) {
    if (traits_[g].is_whole) return;  // only all of its page helps
    const auto found = pages_.index(g).LongestPartial(parent, next, [this](PageId id) {
      mu_.AssertHeld();
      const Page* page = pages_.Find(id);
      return page != nullptr && page->state() != PageState::kQuarantined;
    });
    if (found) known[g] = found->common_tokens;
    is_known = is_known && known[g] == next.size();
    queries.push_back({parent, Geometry(g).fingerprint(), next});
  }
  const MonotonicTime now = clock_->MonotonicNow();
  // A deadline that the look-up of full pages used up says nothing about the store.
  if (is_known || now < ask_partial_again_at_ || now >= deadline) return;
  TouchKnownPages(keys, at_page);
  mu_.Unlock();
  const absl::StatusOr<std::vector<PartialResult>> found =
      store_->FindPartialPages(queries, deadline);
  mu_.Lock();
  if (!found.ok()) {
    ++counters_.store_errors;
    last_store_error_ = found.status();
    ask_partial_again_at_ = clock_->MonotonicNow() + options_.store_backoff;
    return;
  }
  for (uint32_t g = 0; g < num_groups(); ++g) {
    const PartialResult& result = (*found)[g];
    // One that does not fit our geometry or whose tokens do not make its key is not ours to use.
    if (result.common_tokens < 2 || result.common_tokens <= known[g] ||
        result.tokens.size() != page_tokens() ||
        result.body_bytes != Geometry(g).stored_page_bytes()) {
      continue;
    }
    const PrefixKey prefix = NextPrefixKey(parent, result.tokens);
    if (MakePageKey(prefix, Geometry(g).fingerprint()) != result.key) continue;
    const Page* before = at_page == 0 ? nullptr : pages_.FindKeyed(g, parent);
    pages_.AdoptStored(g, tenant.name, page_tokens(), static_cast<uint32_t>(at_page),
                       before ? std::optional(before->id()) : std::nullopt, prefix, parent,
                       result.key, result.checksum,
                       std::make_shared<const std::vector<uint32_t>>(result.tokens),
                       /*has_inputs=*/false);
  }
}

absl::StatusOr<PrefixReuse> ModelHostImpl::LookupPrefix(const Tenant& tenant,
                                                        std::span<const uint32_t> tokens,
                                                        std::span<const PositionedInput> inputs,
                                                        const PromptOptions& options) {
  PT_RETURN_IF_ERROR(ValidateTokens(tokens, inputs, 0));
  const PrefixKey root = RootPrefixKey(tenant.salt, model_->identity(), page_tokens());
  const std::vector<PrefixKey> keys = PrefixKeysOf(root, tokens, page_tokens(), inputs);
  MutexLock lock(&mu_);
  PT_ASSIGN_OR_RETURN(Match match, MatchPrompt(tenant, root, tokens, inputs, keys, options));
  pages_.TrimKnown();
  return match.reuse;
}

absl::StatusOr<OpenResult> ModelHostImpl::Open(const Tenant& tenant,
                                               std::span<const uint32_t> tokens,
                                               std::span<const PositionedInput> inputs,
                                               const PromptOptions& options) {
  PT_RETURN_IF_ERROR(ValidateTokens(tokens, inputs, 0));
  auto sequence = std::make_shared<Sequence>();
  sequence->tenant = tenant.name;
  sequence->root = RootPrefixKey(tenant.salt, model_->identity(), page_tokens());
  sequence->tables.resize(num_groups());
  const std::vector<PrefixKey> keys = PrefixKeysOf(sequence->root, tokens, page_tokens(), inputs);
  OpenResult result;
  {
    MutexLock lock(&mu_);
    if (sequences_.size() >= options_.max_open_sequences) {
      return WithRetryDelay(
          WithReason(absl::ResourceExhaustedError(absl::StrCat("open sequence: ", sequences_.size(),
                                                               " are open, the limit is ",
                                                               options_.max_open_sequences)),
                     "TOO_MANY_SEQUENCES"),
          absl::Seconds(1));
    }
    Match match;
    match.reuse.prompt_tokens = tokens.size();
    match.reuse.explanation = "reuse was not wanted";
    if (!options.no_reuse && !options.is_private) {
      PT_ASSIGN_OR_RETURN(match,
                          MatchPrompt(tenant, sequence->root, tokens, inputs, keys, options));
    }
    PrefixReuse& reuse = match.reuse;
    for (uint64_t p = 0; p < match.num_pages; ++p) {
      for (uint32_t g = 0; g < num_groups(); ++g) {
        if (!match.pages[p][g]) continue;
        Page& page = pages_.Get(*match.pages[p][g]);
        pages_.Ref(page);
        pages_.Touch(page);
        sequence->tables[g].Append({.page = page.id(),
                                    .first_slot = 0,
                                    .count = page_tokens(),
                                    .first_row = p * page_tokens()});
      }
    }
    const uint64_t base = match.num_pages * page_tokens();
    if (!match.partial.empty() && !match.is_partial_tail) {
      // Leading rows of a full page: referenced now, copied when the first row behind them is
      // written.
      for (uint32_t g = 0; g < num_groups(); ++g) {
        Page& page = pages_.Get(match.partial[g]);
        pages_.Ref(page);
        pages_.Touch(page);
        sequence->tables[g].Append({.page = page.id(),
                                    .first_slot = 0,
                                    .count = static_cast<uint32_t>(reuse.partial_rows),
                                    .first_row = base});
      }
    } else if (!match.partial.empty()) {
      // Rows of another sequence's tail, which may change after this call: copied now, or not used.
      std::vector<FramePool::Grant> grants;
      for (uint32_t g = 0; g < num_groups(); ++g) pages_.Pin(pages_.Get(match.partial[g]));
      for (uint32_t g = 0; g < num_groups() && line_.empty() && MakeRoomNow(g, 1); ++g) {
        const std::optional<FramePool::Grant> grant = pages_.AllocateFrame(g, tenant.name);
        if (!grant) break;
        grants.push_back(*grant);
      }
      bool is_copied = grants.size() == num_groups();
      if (is_copied) {
        std::vector<FrameId> from;
        for (PageId id : match.partial) from.push_back(pages_.Get(id).frame());
        mu_.Unlock();
        for (uint32_t g = 0; g < num_groups() && is_copied; ++g) {
          is_copied =
              ZeroIfNeeded(g, grants[g]).ok() &&
              CopyRows(g, from[g], grants[g].frame, static_cast<uint32_t>(reuse.partial_rows)).ok();
        }
        mu_.Lock();
        // One of them may have been found damaged meanwhile.
        is_copied = is_copied &&
                    std::none_of(match.partial.begin(), match.partial.end(), [this](PageId id) {
                      mu_.AssertHeld();
                      return pages_.Get(id).state() == PageState::kQuarantined;
                    });
      }
      for (uint32_t g = 0; g < num_groups(); ++g) {
        if (is_copied) {
          const PageTable& table = sequence->tables[g];
          Page& copy = pages_.CreateTail(
              g, tenant.name, grants[g].frame, static_cast<uint32_t>(match.num_pages),
              table.empty() ? std::nullopt : std::optional(table.back().page));
          copy.SetRows(static_cast<uint32_t>(reuse.partial_rows));
          sequence->tables[g].Append({.page = copy.id(),
                                      .first_slot = 0,
                                      .count = static_cast<uint32_t>(reuse.partial_rows),
                                      .first_row = base});
        } else if (g < grants.size()) {
          pages_.ReleaseFrame(g, grants[g].frame);
        }
        pages_.Unpin(pages_.Get(match.partial[g]));
      }
      if (is_copied) {
        counters_.rows_copied += reuse.partial_rows;
        counters_.pages_created += num_groups();
      } else {
        reuse.reused_tokens -= reuse.partial_rows;
        reuse.device_tokens -= reuse.partial_rows;
        reuse.partial_rows = 0;
        reuse.limit = ReuseLimit::kNoFrame;
        reuse.explanation = absl::StrCat(reuse.reused_tokens, " of ", reuse.prompt_tokens,
                                         " tokens reused: ", LimitText(reuse.limit));
      }
    }
    const uint64_t length = reuse.reused_tokens;
    sequence->tokens.assign(tokens.begin(), tokens.begin() + length);
    sequence->keys.assign(keys.begin(), keys.begin() + length / page_tokens());
    for (const PositionedInput& input : inputs) {
      if (input.position < length) sequence->inputs.push_back(input);
    }
    if (options.is_private) sequence->canonical_limit = 0;
    sequence->keeps_masked_rows = options.keeps_masked_rows;
    sequence->is_unlisted = options.is_unlisted;
    AddSequence(sequence);
    if (!options.is_copied) counters_.tokens_reused += length;
    if (!options.is_copied) result.restoring_pages = Prefetch(*sequence);
    result.info = InfoOf(*sequence);
    result.reuse = std::move(reuse);
    changed_.SignalAll();
  }
  Flush();
  return result;
}

}  // namespace pagetide
