// PrefixIndex: finds the pages of one layer group by key, and by parent and tokens. The children of
// a parent are kept in the order of their tokens, so that the longest common run with a prompt
// stands beside the prompt's own place: two neighbours are compared, however many children a system
// prompt has. Not thread-safe.
#ifndef PAGETIDE_CORE_PREFIX_INDEX_H_
#define PAGETIDE_CORE_PREFIX_INDEX_H_

#include <cstdint>
#include <memory>
#include <optional>
#include <span>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "core/ids.h"
#include "core/keys.h"

namespace pagetide {

class PrefixIndex {
 public:
  using Tokens = std::shared_ptr<const std::vector<uint32_t>>;  // shared by the groups' indexes

  // A full page. Replaces what was known of the page; false, and nothing changes, if the key is
  // taken. Pages with other inputs (images) are found by key only.
  bool InsertKeyed(const PrefixKey& key, const PrefixKey& parent, PageId page, Tokens tokens,
                   bool has_inputs);
  std::optional<PageId> FindKeyed(const PrefixKey& key) const;
  // A canonical tail: a child of `parent` with its committed tokens, without a key. Replaces what
  // was known of the page.
  void UpsertTail(const PrefixKey& parent, PageId page, std::vector<uint32_t> tokens,
                  bool has_inputs);
  // Ignored if the page is not in the index.
  void Erase(PageId page);

  struct PartialMatch {
    PageId page;
    uint32_t common_tokens = 0;
  };
  // The child of `parent` that has the longest common run with `tokens`, at least 2. Of the two
  // neighbours with equal runs, and of children with equal tokens, keyed pages win over tails, then
  // the older page. Refused neighbours are passed, at most kMaxRefused a side.
  std::optional<PartialMatch> LongestPartial(const PrefixKey& parent,
                                             std::span<const uint32_t> tokens,
                                             absl::FunctionRef<bool(PageId)> usable) const;
  // The tokens of a full page that can be found by them; null for a tail, for a page with other
  // inputs and for one that is not in the index.
  Tokens TokensOf(PageId page) const;
  size_t size() const { return entries_.size(); }

 private:
  static constexpr int kMaxRefused = 8;

  struct Child {
    Tokens tokens;
    bool is_tail = false;
    PageId page;
  };
  struct ByTokens {
    using is_transparent = void;
    bool operator()(const Child& a, const Child& b) const;
    bool operator()(const Child& a, std::span<const uint32_t> b) const;
    bool operator()(std::span<const uint32_t> a, const Child& b) const;
  };
  using Children = absl::btree_set<Child, ByTokens>;
  struct Entry {
    std::optional<PrefixKey> key;
    PrefixKey parent;
    Child child;  // tokens null: not among the children
  };

  void Insert(std::optional<PrefixKey> key, const PrefixKey& parent, Child child, bool has_inputs);

  absl::flat_hash_map<PrefixKey, PageId> by_key_;
  absl::flat_hash_map<PrefixKey, Children> children_;
  absl::flat_hash_map<PageId, Entry> entries_;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_PREFIX_INDEX_H_
