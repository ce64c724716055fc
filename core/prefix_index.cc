#include "core/prefix_index.h"

#include <algorithm>
#include <iterator>
#include <utility>

namespace pagetide {
namespace {

uint32_t CommonRun(std::span<const uint32_t> a, std::span<const uint32_t> b) {
  const size_t n = std::min(a.size(), b.size());
  return static_cast<uint32_t>(std::mismatch(a.begin(), a.begin() + n, b.begin()).first -
                               a.begin());
}

bool TokensLess(std::span<const uint32_t> a, std::span<const uint32_t> b) {
  return std::lexicographical_compare(a.begin(), a.end(), b.begin(), b.end());
}

}  // namespace

bool PrefixIndex::ByTokens::operator()(const Child& a, const Child& b) const {
  if (TokensLess(*a.tokens, *b.tokens)) return true;
  if (TokensLess(*b.tokens, *a.tokens)) return false;
  if (a.is_tail != b.is_tail) return !a.is_tail;
  return a.page < b.page;
}

bool PrefixIndex::ByTokens::operator()(const Child& a, std::span<const uint32_t> b) const {
  return TokensLess(*a.tokens, b);
}

bool PrefixIndex::ByTokens::operator()(std::span<const uint32_t> a, const Child& b) const {
  return TokensLess(a, *b.tokens);
}

void PrefixIndex::Insert(std::optional<PrefixKey> key, const PrefixKey& parent, Child child,
                         bool has_inputs) {
  Erase(child.page);  // else a tail that became full would leave its old child behind
  Entry entry{key, parent, std::move(child)};
  if (has_inputs) {
    entry.child.tokens = nullptr;
  } else {
    children_[parent].insert(entry.child);
  }
  if (key) by_key_.emplace(*key, entry.child.page);
  entries_.emplace(entry.child.page, std::move(entry));
}

bool PrefixIndex::InsertKeyed(const PrefixKey& key, const PrefixKey& parent, PageId page,
                              Tokens tokens, bool has_inputs) {
  if (by_key_.contains(key)) return false;
  Insert(key, parent, {std::move(tokens), /*is_tail=*/false, page}, has_inputs);
  return true;
}

std::optional<PageId> PrefixIndex::FindKeyed(const PrefixKey& key) const {
  const auto it = by_key_.find(key);
  if (it == by_key_.end()) return std::nullopt;
  return it->second;
}

void PrefixIndex::UpsertTail(const PrefixKey& parent, PageId page, std::vector<uint32_t> tokens,
                             bool has_inputs) {
  Insert(std::nullopt, parent,
         {std::make_shared<const std::vector<uint32_t>>(std::move(tokens)), /*is_tail=*/true, page},
         has_inputs);
}

void PrefixIndex::Erase(PageId page) {
  const auto it = entries_.find(page);
  if (it == entries_.end()) return;
  const Entry& entry = it->second;
  if (entry.key) by_key_.erase(*entry.key);
  if (entry.child.tokens != nullptr) {
    const auto siblings = children_.find(entry.parent);
    siblings->second.erase(entry.child);
    if (siblings->second.empty()) children_.erase(siblings);
  }
  entries_.erase(it);
}

std::optional<PrefixIndex::PartialMatch> PrefixIndex::LongestPartial(
    const PrefixKey& parent, std::span<const uint32_t> tokens,
    absl::FunctionRef<bool(PageId)> usable) const {
  const auto found = children_.find(parent);
  if (found == children_.end()) return std::nullopt;
  const Children& children = found->second;
  const auto place = children.lower_bound(tokens);
  const Child* best = nullptr;
  uint32_t best_common = 1;  // one row is not worth a copy
  const auto consider = [&](const Child& child, uint32_t common) {
    const bool wins = common > best_common ||
                      (best != nullptr && common == best_common &&
                       std::pair(child.is_tail, child.page) < std::pair(best->is_tail, best->page));
    if (wins) {
      best = &child;
      best_common = common;
    }
  };
  // Outward from the prompt's place the common run only gets shorter: the first usable child of a
  // side is that side's best, but for its ties.
  int refused = 0;
  for (auto it = place; it != children.end() && refused < kMaxRefused; ++it) {
    const uint32_t common = CommonRun(*it->tokens, tokens);
    if (common < best_common) break;
    if (usable(it->page)) {
      consider(*it, common);
      break;
    }
    ++refused;
  }
  // Below the prompt's place, runs of equal tokens are entered at their first child, as above.
  refused = 0;
  bool is_done = false;
  for (auto end = place; end != children.begin() && !is_done && refused < kMaxRefused;) {
    const std::span<const uint32_t> run_tokens = *std::prev(end)->tokens;
    const uint32_t common = CommonRun(run_tokens, tokens);
    if (common < best_common) break;
    const auto begin = children.lower_bound(run_tokens);
    for (auto it = begin; it != end && !is_done && refused < kMaxRefused; ++it) {
      if (usable(it->page)) {
        consider(*it, common);
        is_done = true;
      } else {
        ++refused;
      }
    }
    end = begin;
  }
  if (best == nullptr) return std::nullopt;
  return PartialMatch{best->page, best_common};
}

PrefixIndex::Tokens PrefixIndex::TokensOf(PageId page) const {
  const auto it = entries_.find(page);
  if (it == entries_.end() || it->second.child.is_tail) return nullptr;
  return it->second.child.tokens;
}

}  // namespace pagetide
