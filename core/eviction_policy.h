// EvictionPolicy: the order in which a tier gives up its resident pages, and nothing else. The
// owner of the tier reports what happens to its pages; the policy answers which of them to evict
// next. It holds no page bytes, evicts nothing itself and reads no clock: recency is the order of
// the calls.
//
// Not thread-safe: the owner calls it under the lock that guards its residency table.
//
// The rule every implementation keeps (DESIGN rule "tail-first eviction"): a page with resident
// children is not a victim unless all of them are earlier victims of the same answer, and a page
// that is not evictable (pinned, leased, in flight) never is, which also protects all its
// ancestors. So if children are inserted after their parents, the resident set stays closed under
// "prefix of".
#ifndef PAGETIDE_CORE_EVICTION_POLICY_H_
#define PAGETIDE_CORE_EVICTION_POLICY_H_

#include <cstddef>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "absl/container/btree_set.h"
#include "absl/container/flat_hash_map.h"
#include "absl/functional/function_ref.h"
#include "absl/strings/string_view.h"
#include "core/ids.h"

namespace pagetide {

class EvictionPolicy {
 public:
  // True if the owner lets this page go now. Asked at most once per page and call.
  using MayEvict = absl::FunctionRef<bool(PageId)>;

  virtual ~EvictionPolicy() = default;

  // `page` became resident: evictable, and the most recently used. `parent` is the page before it
  // in its prefix; nullopt for the first page of a prefix and for private pages without one. A
  // parent that is not resident makes `page` an orphan until that parent is inserted. A page that
  // is resident already is only touched; `parent` must then be what it was.
  virtual void OnInsert(PageId page, std::optional<PageId> parent) = 0;
  // `page` was hit. To keep a prefix together, touch each of its pages. Ignored if not resident.
  virtual void OnTouch(PageId page) = 0;
  // Pins (false) or releases (true) `page`. The owner counts pins; this is the state. Recency is
  // unchanged. Ignored if not resident.
  virtual void SetEvictable(PageId page, bool evictable) = 0;
  // `page` left the tier: evicted, quarantined or cleared. Its resident children, if any, become
  // orphans. Ignored if not resident.
  virtual void OnErase(PageId page) = 0;

  // Up to `n` victims, first to go first. Changes nothing: the owner calls OnErase for each it
  // really evicts, in this order. Fewer than n means that no more may go.
  virtual std::vector<PageId> PickVictims(size_t n, MayEvict may_evict) const = 0;
  // The last resort, when PickVictims gives too few: up to `n` evictable pages in front of pages
  // that may not go. An edited sequence may use a page without those in front of it; they would
  // stay for as long as it runs, and it might need their frames. O(resident pages).
  virtual std::vector<PageId> PickAncestors(size_t n, MayEvict may_evict) const = 0;

  virtual absl::string_view name() const = 0;
  virtual size_t num_resident() const = 0;
};

// Leaf-first LRU: orphans first (no look-up can reach them), then the least recently used page
// among those without resident children. O(1) to touch a page with children, O(log resident pages)
// for a leaf; PickVictims is O(n log n) plus the refused pages it passes.
class LeafFirstLru final : public EvictionPolicy {
 public:
  void OnInsert(PageId page, std::optional<PageId> parent) override;
  void OnTouch(PageId page) override;
  void SetEvictable(PageId page, bool evictable) override;
  void OnErase(PageId page) override;
  std::vector<PageId> PickVictims(size_t n, MayEvict may_evict) const override;
  std::vector<PageId> PickAncestors(size_t n, MayEvict may_evict) const override;
  absl::string_view name() const override { return "leaf_first_lru"; }
  size_t num_resident() const override { return num_resident_; }

 private:
  static constexpr uint32_t kNone = ~uint32_t{0};

  // A resident page, or a ghost: the missing parent that resident orphans wait for. A ghost lives
  // as long as it has children. Nodes sit in a slab and link to each other by index.
  struct Node {
    PageId page;
    uint64_t last_use = 0;    // tick of the last insert or touch; unique among resident pages
    uint32_t parent = kNone;  // node of the parent, resident or ghost; kNone: first of its prefix
    uint32_t first_child = kNone;
    uint32_t prev_sibling = kNone;
    uint32_t next_sibling = kNone;
    uint32_t num_children = 0;  // all resident
    bool is_resident = false;
    bool is_evictable = false;
    bool is_reachable = false;  // resident, and so are all its ancestors
    bool is_candidate = false;  // has an entry in candidates_
  };

  // Order of eviction: orphans before reachable pages, then the least recently used.
  struct Rank {
    bool is_reachable;
    uint64_t last_use;
    uint32_t node;
    friend auto operator<=>(const Rank&, const Rank&) = default;
  };

  Rank RankOf(uint32_t node) const {
    return {nodes_[node].is_reachable, nodes_[node].last_use, node};
  }
  // The node of a resident page, or kNone.
  uint32_t FindResident(PageId page) const;
  // The node of `page`, resident or ghost; makes a ghost if there is none.
  uint32_t FindOrAddNode(PageId page);
  void FreeNode(uint32_t node);
  void LinkToParent(uint32_t node, uint32_t parent);
  // Unlinks from its parent and frees that parent if it was a ghost with no other child.
  void UnlinkFromParent(uint32_t node);
  // Every change of a field that Rank or candidacy depends on happens between these two.
  void RemoveCandidate(uint32_t node);
  void AddCandidateIfLeaf(uint32_t node);
  // Sets is_reachable for the resident subtree under and including `node`. O(subtree whose state
  // changes).
  void PropagateReachable(uint32_t node, bool is_reachable);

  std::vector<Node> nodes_;
  std::vector<uint32_t> free_nodes_;
  absl::flat_hash_map<PageId, uint32_t> node_of_page_;
  absl::btree_set<Rank> candidates_;  // resident, evictable, no resident child
  size_t num_resident_ = 0;
  uint64_t tick_ = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_CORE_EVICTION_POLICY_H_
