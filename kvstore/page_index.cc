#include "kvstore/page_index.h"

#include <algorithm>
#include <utility>

#include "kvstore/eviction_rank.h"

namespace pagetide {

std::optional<IndexedPage> PageIndex::Find(const PageKey& key) const {
  MutexLock lock(&mu_);
  const auto it = pages_.find(key);
  if (it == pages_.end()) return std::nullopt;
  return IndexedPage{it->second.place, it->second.checksum, it->second.quarantined};
}

void PageIndex::Unlink(Entry* entry) {
  (entry->older != nullptr ? entry->older->newer : oldest_) = entry->newer;
  (entry->newer != nullptr ? entry->newer->older : newest_) = entry->older;
  entry->older = entry->newer = nullptr;
}

void PageIndex::LinkNewest(Entry* entry) {
  entry->access_number = ++last_access_number_;
  entry->older = newest_;
  entry->newer = nullptr;
  (newest_ != nullptr ? newest_->newer : oldest_) = entry;
  newest_ = entry;
}

bool PageIndex::HasChildren(const Entry& entry) const {
  if (!entry.prefix.has_value()) return false;
  const auto it = families_.find(FamilyKey(entry.prefix->digest, entry.group));
  return it != families_.end() && it->second.num_children > 0;
}

bool PageIndex::IsProtected(const PageKey& key) const {
  if (protects_.contains(key)) return true;
  const auto it = timed_.find(key);
  return it != timed_.end() && it->second.pin_end.has_value() &&
         !it->second.pin_end->HasPassed(*clock_);
}

void PageIndex::Withdraw(Entry* entry) {
  if (!std::exchange(entry->is_candidate, false)) return;
  candidates_.erase(entry);
}

void PageIndex::Consider(Entry* entry) {
  const bool is_protected = IsProtected(entry->key);
  const bool counts = is_protected && !entry->quarantined;
  if (counts != entry->is_counted_protected) {
    entry->is_counted_protected = counts;
    totals_.protected_pages += counts ? 1 : -1;
    totals_.protected_bytes += counts ? entry->place.body_bytes : -entry->place.body_bytes;
  }
  if (is_protected || (HasChildren(*entry) && !entry->quarantined)) {
    Withdraw(entry);
  } else if (!std::exchange(entry->is_candidate, true)) {
    candidates_.insert(entry);
  }
}

void PageIndex::Rerank(Entry* entry) {
  Withdraw(entry);
  entry->rank = EvictionRank(entry->access_number, pages_.size(), entry->depth, entry->priority);
  Consider(entry);
}

void PageIndex::ReconsiderKey(const PageKey& key) {
  if (const auto it = pages_.find(key); it != pages_.end()) Consider(&it->second);
}

void PageIndex::JoinFamily(Entry* entry) {
  if (!entry->prefix.has_value()) return;
  families_[FamilyKey(entry->prefix->digest, entry->group)].members.push_back(entry);
}

void PageIndex::LeaveFamily(Entry* entry) {
  if (!entry->prefix.has_value()) return;
  const auto it = families_.find(FamilyKey(entry->prefix->digest, entry->group));
  auto& members = it->second.members;
  members.erase(std::find(members.begin(), members.end(), entry));
  if (members.empty() && it->second.num_children == 0) families_.erase(it);
}

void PageIndex::CountIn(Entry* entry) {
  if (entry->parent.has_value()) {
    Family& family = families_[FamilyKey(entry->parent->digest, entry->group)];
    if (family.num_children++ == 0) {
      for (Entry* parent : family.members) Consider(parent);
    }
  }
  ++totals_.pages;
  totals_.logical_bytes += entry->place.body_bytes;
  totals_.stored_bytes += entry->place.stored_bytes;
  if (entry->ever_read) totals_.bytes_ever_read += entry->place.body_bytes;
  if (entry->prefix.has_value()) {
    feed_.Append({*entry->prefix, entry->group, entry->place.body_bytes, /*removed=*/false});
  }
}

void PageIndex::CountOut(Entry* entry) {
  if (entry->parent.has_value()) {
    const auto it = families_.find(FamilyKey(entry->parent->digest, entry->group));
    if (--it->second.num_children == 0) {
      for (Entry* parent : it->second.members) Consider(parent);
      if (it->second.members.empty()) families_.erase(it);
    }
  }
  --totals_.pages;
  totals_.logical_bytes -= entry->place.body_bytes;
  totals_.stored_bytes -= entry->place.stored_bytes;
  if (entry->ever_read) totals_.bytes_ever_read -= entry->place.body_bytes;
  if (entry->prefix.has_value()) {
    feed_.Append({*entry->prefix, entry->group, entry->place.body_bytes, /*removed=*/true});
  }
}

void PageIndex::Detach(Entry* entry) {
  if (!entry->quarantined) CountOut(entry);
  LeaveFamily(entry);
  Withdraw(entry);
}

void PageIndex::Touch(std::span<const PageKey> keys, bool read) {
  MutexLock lock(&mu_);
  for (size_t i = keys.size(); i-- > 0;) {
    const auto it = pages_.find(keys[i]);
    if (it == pages_.end()) continue;
    Entry& entry = it->second;
    Withdraw(&entry);
    Unlink(&entry);
    LinkNewest(&entry);
    Rerank(&entry);
    if (read && !entry.ever_read) {
      entry.ever_read = true;
      ++totals_.pages_ever_read;
      if (!entry.quarantined) totals_.bytes_ever_read += entry.place.body_bytes;
    }
  }
}

void PageIndex::Publish(const PageRecordMeta& meta, const PagePlace& place, bool quarantined) {
  MutexLock lock(&mu_);
  const auto [it, inserted] = pages_.try_emplace(meta.key);
  Entry& entry = it->second;
  if (!inserted) {
    Detach(&entry);
    entry.place.segment->live_bytes.fetch_sub(SegmentFiles::Footprint(entry.place.record_bytes()),
                                              std::memory_order_relaxed);
    Unlink(&entry);
  }
  entry.key = meta.key;
  entry.place = place;
  entry.checksum = meta.checksum;
  entry.prefix = meta.prefix;
  // No page is its own child, or it could never be dropped.
  entry.parent = meta.parent == meta.prefix ? std::nullopt : meta.parent;
  entry.group = meta.group;
  entry.depth = meta.depth;
  entry.quarantined = quarantined;
  put_bytes_ += SegmentFiles::Footprint(place.record_bytes());
  StartGrace(&entry);
  keys_in_[place.segment->id].push_back(meta.key);
  JoinFamily(&entry);
  LinkNewest(&entry);
  if (!quarantined) CountIn(&entry);
  Rerank(&entry);
}

bool PageIndex::Quarantine(const PageKey& key, const PagePlace& place) {
  MutexLock lock(&mu_);
  const auto it = pages_.find(key);
  if (it == pages_.end() || !it->second.place.SameAs(place)) return false;
  Entry& entry = it->second;
  if (entry.quarantined) return true;
  CountOut(&entry);
  Withdraw(&entry);  // after what may consider it, before its place in the order changes
  entry.quarantined = true;
  Consider(&entry);
  return true;
}

bool PageIndex::Relocate(const PageKey& key, const PagePlace& from, const PagePlace& to) {
  MutexLock lock(&mu_);
  const auto it = pages_.find(key);
  if (it == pages_.end() || !it->second.place.SameAs(from)) return false;
  it->second.place = to;
  keys_in_[to.segment->id].push_back(key);
  from.segment->live_bytes.fetch_sub(SegmentFiles::Footprint(from.record_bytes()),
                                     std::memory_order_relaxed);
  return true;
}

PagePlace PageIndex::EraseAt(Pages::iterator it) {
  Entry& entry = it->second;
  Detach(&entry);
  if (entry.is_counted_protected) {
    --totals_.protected_pages;
    totals_.protected_bytes -= entry.place.body_bytes;
  }
  PagePlace place = entry.place;
  place.segment->live_bytes.fetch_sub(SegmentFiles::Footprint(place.record_bytes()),
                                      std::memory_order_relaxed);
  if (entry.ever_read) --totals_.pages_ever_read;
  Unlink(&entry);
  pages_.erase(it);
  return place;
}

std::optional<PagePlace> PageIndex::Erase(const PageKey& key) {
  MutexLock lock(&mu_);
  const auto it = pages_.find(key);
  if (it == pages_.end() || IsProtected(key)) return std::nullopt;
  timed_.erase(key);
  return EraseAt(it);
}

bool PageIndex::EraseQuarantined(const PageKey& key, const PagePlace& place) {
  MutexLock lock(&mu_);
  const auto it = pages_.find(key);
  if (it == pages_.end() || !it->second.quarantined || !it->second.place.SameAs(place))
    return false;
  EraseAt(it);
  return true;
}

std::vector<PageKey> PageIndex::Missing(std::span<const ManifestPageRef> pages) const {
  std::vector<PageKey> missing;
  MutexLock lock(&mu_);
  for (const ManifestPageRef& ref : pages) {
    const auto it = pages_.find(ref.key);
    if (it == pages_.end() || !Matches(it->second, ref)) missing.push_back(ref.key);
  }
  return missing;
}

std::vector<PageKey> PageIndex::Protect(std::span<const ManifestPageRef> pages) {
  std::vector<PageKey> missing;
  MutexLock lock(&mu_);
  for (const ManifestPageRef& ref : pages) {
    const auto it = pages_.find(ref.key);
    if (it == pages_.end() || !Matches(it->second, ref)) missing.push_back(ref.key);
  }
  if (!missing.empty()) return missing;
  for (const ManifestPageRef& ref : pages) {
    if (++protects_[ref.key] == 1) ReconsiderKey(ref.key);
  }
  return missing;
}

void PageIndex::ProtectAnyway(std::span<const ManifestPageRef> pages) {
  MutexLock lock(&mu_);
  for (const ManifestPageRef& ref : pages) {
    if (++protects_[ref.key] == 1) ReconsiderKey(ref.key);
  }
}

void PageIndex::Unprotect(std::span<const ManifestPageRef> pages) {
  MutexLock lock(&mu_);
  UnprotectAll(pages, /*with_grace=*/false);
}

void PageIndex::UnprotectWithGrace(std::span<const ManifestPageRef> pages) {
  MutexLock lock(&mu_);
  UnprotectAll(pages, /*with_grace=*/true);
}

void PageIndex::UnprotectAll(std::span<const ManifestPageRef> pages, bool with_grace) {
  for (const ManifestPageRef& ref : pages) {
    const auto it = protects_.find(ref.key);
    if (it == protects_.end() || --it->second > 0) continue;
    protects_.erase(it);
    const auto page = pages_.find(ref.key);
    if (page == pages_.end()) continue;
    if (with_grace) StartGrace(&page->second);
    Consider(&page->second);
  }
}

void PageIndex::StartGrace(Entry* entry) {
  entry->put_bytes_before = put_bytes_;
  entry->grace_began = clock_->MonotonicNow();
}

bool PageIndex::SetRetention(const PageKey& key, const Retention& retention,
                             absl::Duration at_least) {
  MutexLock lock(&mu_);
  const auto it = pages_.find(key);
  if (it == pages_.end() || it->second.quarantined) return false;
  timed_.erase(key);
  if (retention.expires_at.has_value() || retention.pinned_until.has_value()) {
    Timed& timed = timed_[key];
    timed.retention = retention;
    if (retention.expires_at.has_value()) {
      timed.priority_end = TwoClockEnd::At(*retention.expires_at, *clock_, at_least);
    }
    if (retention.pinned_until.has_value()) {
      timed.pin_end = TwoClockEnd::At(*retention.pinned_until, *clock_, at_least);
    }
  }
  it->second.priority = retention.priority;
  Rerank(&it->second);
  return true;
}

std::vector<std::pair<PageKey, Retention>> PageIndex::InheritPriority(
    std::span<const ManifestPageRef> pages, uint32_t priority) {
  std::vector<std::pair<PageKey, Retention>> changed;
  MutexLock lock(&mu_);
  for (const ManifestPageRef& ref : pages) {
    const auto it = pages_.find(ref.key);
    if (it == pages_.end() || it->second.priority >= priority) continue;
    it->second.priority = priority;
    Retention retention;
    retention.priority = priority;
    if (const auto timed = timed_.find(ref.key); timed != timed_.end()) {
      retention.pinned_until = timed->second.retention.pinned_until;
      timed->second.priority_end.reset();
      timed->second.retention = retention;
    }
    Rerank(&it->second);
    changed.emplace_back(ref.key, retention);
  }
  return changed;
}

void PageIndex::ApplyExpiries() {
  MutexLock lock(&mu_);
  for (auto it = timed_.begin(); it != timed_.end();) {
    Timed& timed = it->second;
    const auto page = pages_.find(it->first);
    if (timed.priority_end.has_value() && timed.priority_end->HasPassed(*clock_)) {
      timed.priority_end.reset();
      if (page != pages_.end()) {
        page->second.priority = 0;
        Rerank(&page->second);
      }
    }
    if (timed.pin_end.has_value() && timed.pin_end->HasPassed(*clock_)) timed.pin_end.reset();
    if (page != pages_.end()) Consider(&page->second);
    if (!timed.priority_end.has_value() && !timed.pin_end.has_value()) {
      timed_.erase(it++);
    } else {
      ++it;
    }
  }
}

std::vector<PageKey> PageIndex::PickVictims(uint64_t bytes, const Grace& grace) const {
  std::vector<PageKey> victims;
  absl::flat_hash_map<FamilyKey, uint32_t> children_picked;
  // Pages whose children have all been picked, smallest rank first.
  const auto later = [](const Entry* a, const Entry* b) { return ByRank()(b, a); };
  std::vector<const Entry*> freed;
  uint64_t found = 0;
  const MonotonicTime now = clock_->MonotonicNow();
  MutexLock lock(&mu_);
  auto next = candidates_.begin();
  while (found < bytes && (next != candidates_.end() || !freed.empty())) {
    const Entry* e = nullptr;
    if (next != candidates_.end() && (freed.empty() || ByRank()(*next, freed.front()))) {
      e = *next++;
    } else {
      e = freed.front();
      std::pop_heap(freed.begin(), freed.end(), later);
      freed.pop_back();
    }
    if (!e->quarantined && put_bytes_ - e->put_bytes_before < grace.put_bytes &&
        now - e->grace_began < grace.time) {
      continue;
    }
    victims.push_back(e->key);
    found += SegmentFiles::Footprint(e->place.record_bytes());
    if (!e->parent.has_value() || e->quarantined) continue;
    const FamilyKey parent(e->parent->digest, e->group);
    const Family& family = families_.find(parent)->second;
    if (++children_picked[parent] < family.num_children) continue;
    for (const Entry* member : family.members) {
      if (member->is_counted_protected || member->is_candidate) continue;
      freed.push_back(member);
      std::push_heap(freed.begin(), freed.end(), later);
    }
  }
  return victims;
}

std::vector<PageKey> PageIndex::KeysIn(uint64_t segment) const {
  MutexLock lock(&mu_);
  const auto it = keys_in_.find(segment);
  return it == keys_in_.end() ? std::vector<PageKey>() : it->second;
}

void PageIndex::ForgetSegment(uint64_t segment) {
  MutexLock lock(&mu_);
  keys_in_.erase(segment);
}

std::vector<std::pair<PageKey, uint64_t>> PageIndex::AccessedSince(uint64_t number,
                                                                   size_t limit) const {
  std::vector<std::pair<PageKey, uint64_t>> accesses;
  MutexLock lock(&mu_);
  for (const Entry* e = newest_; e != nullptr && e->access_number > number; e = e->older) {
    if (accesses.size() >= limit) break;
    accesses.emplace_back(e->key, e->access_number);
  }
  return accesses;
}

void PageIndex::StartAccessNumbersAt(uint64_t number) {
  MutexLock lock(&mu_);
  last_access_number_ = number;
}

void PageIndex::RerankAll() {
  MutexLock lock(&mu_);
  for (auto& [key, entry] : pages_) Rerank(&entry);
}

std::vector<StoreEvent> PageIndex::Snapshot(uint64_t* next_number) const {
  MutexLock lock(&mu_);
  std::vector<StoreEvent> events;
  events.reserve(pages_.size());
  for (const auto& [key, entry] : pages_) {
    if (entry.quarantined || !entry.prefix.has_value()) continue;
    events.push_back({*entry.prefix, entry.group, entry.place.body_bytes, /*removed=*/false});
  }
  *next_number = feed_.next_number();
  return events;
}

PageIndex::Totals PageIndex::totals() const {
  MutexLock lock(&mu_);
  return totals_;
}

}  // namespace pagetide
