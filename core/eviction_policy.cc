#include "core/eviction_policy.h"

#include <functional>
#include <queue>

namespace pagetide {

void LeafFirstLru::OnInsert(PageId page, std::optional<PageId> parent) {
  const uint32_t node = FindOrAddNode(page);
  if (nodes_[node].is_resident) {
    OnTouch(page);
    return;
  }
  // A page is never its own ancestor: keys are chained hashes. A page given as its own parent is a
  // root.
  const bool has_parent = parent.has_value() && *parent != page;
  const uint32_t parent_node = has_parent ? FindOrAddNode(*parent) : kNone;
  nodes_[node].is_resident = true;
  nodes_[node].is_evictable = true;
  nodes_[node].last_use = ++tick_;
  ++num_resident_;
  bool is_reachable = true;
  if (parent_node != kNone) {
    RemoveCandidate(parent_node);
    LinkToParent(node, parent_node);
    is_reachable = nodes_[parent_node].is_reachable;
  }
  if (is_reachable) PropagateReachable(node, true);
  AddCandidateIfLeaf(node);
}

void LeafFirstLru::OnTouch(PageId page) {
  const uint32_t node = FindResident(page);
  if (node == kNone) return;
  RemoveCandidate(node);
  nodes_[node].last_use = ++tick_;
  AddCandidateIfLeaf(node);
}

void LeafFirstLru::SetEvictable(PageId page, bool evictable) {
  const uint32_t node = FindResident(page);
  if (node == kNone || nodes_[node].is_evictable == evictable) return;
  RemoveCandidate(node);
  nodes_[node].is_evictable = evictable;
  AddCandidateIfLeaf(node);
}

void LeafFirstLru::OnErase(PageId page) {
  const uint32_t node = FindResident(page);
  if (node == kNone) return;
  RemoveCandidate(node);
  if (nodes_[node].is_reachable) PropagateReachable(node, false);
  nodes_[node].is_resident = false;
  --num_resident_;
  const uint32_t parent = nodes_[node].parent;
  UnlinkFromParent(node);
  if (parent != kNone)
    AddCandidateIfLeaf(parent);  // a freed ghost is not resident, hence no candidate
  if (nodes_[node].num_children == 0) FreeNode(node);
}

std::vector<PageId> LeafFirstLru::PickVictims(size_t n, MayEvict may_evict) const {
  std::vector<PageId> victims;
  // Parents whose resident children are all victims already, and how many of them are.
  std::priority_queue<Rank, std::vector<Rank>, std::greater<Rank>> exposed;
  absl::flat_hash_map<uint32_t, uint32_t> num_victim_children;
  auto leaf = candidates_.begin();
  while (victims.size() < n && (leaf != candidates_.end() || !exposed.empty())) {
    Rank next;
    if (leaf != candidates_.end() && (exposed.empty() || *leaf < exposed.top())) {
      next = *leaf++;
    } else {
      next = exposed.top();
      exposed.pop();
    }
    const Node& node = nodes_[next.node];
    if (!may_evict(node.page)) continue;
    victims.push_back(node.page);
    if (node.parent == kNone) continue;
    const Node& parent = nodes_[node.parent];
    if (!parent.is_resident || !parent.is_evictable) continue;
    if (++num_victim_children[node.parent] == parent.num_children) {
      exposed.push(RankOf(node.parent));
    }
  }
  return victims;
}

std::vector<PageId> LeafFirstLru::PickAncestors(size_t n, MayEvict may_evict) const {
  std::priority_queue<Rank, std::vector<Rank>, std::greater<Rank>> exposed;
  absl::flat_hash_map<uint32_t, uint32_t> num_open;  // children that could go before it
  for (uint32_t i = 0; i < nodes_.size(); ++i) {
    const Node& node = nodes_[i];
    if (!node.is_resident || !node.is_evictable || node.num_children == 0) continue;
    uint32_t open = 0;
    for (uint32_t c = node.first_child; c != kNone; c = nodes_[c].next_sibling) {
      if (nodes_[c].is_evictable) ++open;
    }
    if (open == 0)
      exposed.push(RankOf(i));
    else
      num_open[i] = open;
  }
  std::vector<PageId> victims;
  while (victims.size() < n && !exposed.empty()) {
    const Node& node = nodes_[exposed.top().node];
    exposed.pop();
    if (!may_evict(node.page)) continue;
    victims.push_back(node.page);
    const auto parent = num_open.find(node.parent);
    if (parent != num_open.end() && --parent->second == 0) exposed.push(RankOf(parent->first));
  }
  return victims;
}

uint32_t LeafFirstLru::FindResident(PageId page) const {
  const auto it = node_of_page_.find(page);
  return it != node_of_page_.end() && nodes_[it->second].is_resident ? it->second : kNone;
}

uint32_t LeafFirstLru::FindOrAddNode(PageId page) {
  const auto [it, is_new] = node_of_page_.try_emplace(page, kNone);
  if (!is_new) return it->second;
  if (free_nodes_.empty()) {
    it->second = static_cast<uint32_t>(nodes_.size());
    nodes_.emplace_back();
  } else {
    it->second = free_nodes_.back();
    free_nodes_.pop_back();
  }
  nodes_[it->second].page = page;
  return it->second;
}

void LeafFirstLru::FreeNode(uint32_t node) {
  node_of_page_.erase(nodes_[node].page);
  nodes_[node] = Node{};
  free_nodes_.push_back(node);
}

void LeafFirstLru::LinkToParent(uint32_t node, uint32_t parent) {
  Node& child = nodes_[node];
  child.parent = parent;
  child.prev_sibling = kNone;
  child.next_sibling = nodes_[parent].first_child;
  if (child.next_sibling != kNone) nodes_[child.next_sibling].prev_sibling = node;
  nodes_[parent].first_child = node;
  ++nodes_[parent].num_children;
}

void LeafFirstLru::UnlinkFromParent(uint32_t node) {
  Node& child = nodes_[node];
  const uint32_t parent = child.parent;
  if (parent == kNone) return;
  if (child.prev_sibling != kNone) {
    nodes_[child.prev_sibling].next_sibling = child.next_sibling;
  } else {
    nodes_[parent].first_child = child.next_sibling;
  }
  if (child.next_sibling != kNone) nodes_[child.next_sibling].prev_sibling = child.prev_sibling;
  child.parent = child.prev_sibling = child.next_sibling = kNone;
  if (--nodes_[parent].num_children == 0 && !nodes_[parent].is_resident) FreeNode(parent);
}

void LeafFirstLru::RemoveCandidate(uint32_t node) {
  if (!nodes_[node].is_candidate) return;
  candidates_.erase(RankOf(node));
  nodes_[node].is_candidate = false;
}

void LeafFirstLru::AddCandidateIfLeaf(uint32_t node) {
  Node& n = nodes_[node];
  if (n.is_candidate || !n.is_resident || !n.is_evictable || n.num_children != 0) return;
  candidates_.insert(RankOf(node));
  n.is_candidate = true;
}

void LeafFirstLru::PropagateReachable(uint32_t node, bool is_reachable) {
  std::vector<uint32_t> pending = {node};
  while (!pending.empty()) {
    const uint32_t next = pending.back();
    pending.pop_back();
    if (nodes_[next].is_reachable == is_reachable) continue;
    const bool was_candidate = nodes_[next].is_candidate;
    RemoveCandidate(next);
    nodes_[next].is_reachable = is_reachable;
    if (was_candidate) AddCandidateIfLeaf(next);
    for (uint32_t c = nodes_[next].first_child; c != kNone; c = nodes_[c].next_sibling) {
      pending.push_back(c);
    }
  }
}

}  // namespace pagetide
