#include "kvstore/page_index.h"

#include <algorithm>

#include "absl/container/flat_hash_set.h"

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

void PageIndex::CountIn(const Entry& entry) {
  if (entry.parent.has_value()) ++num_children_[ChildKey(entry.parent->digest, entry.group)];
  ++totals_.pages;
  totals_.logical_bytes += entry.place.body_bytes;
  if (entry.prefix.has_value()) {
    feed_.Append({*entry.prefix, entry.group, entry.place.body_bytes, /*removed=*/false});
  }
}

void PageIndex::CountOut(const Entry& entry) {
  if (entry.parent.has_value()) {
    const auto it = num_children_.find(ChildKey(entry.parent->digest, entry.group));
    if (--it->second == 0) num_children_.erase(it);
  }
  --totals_.pages;
  totals_.logical_bytes -= entry.place.body_bytes;
  if (entry.prefix.has_value()) {
    feed_.Append({*entry.prefix, entry.group, entry.place.body_bytes, /*removed=*/true});
  }
}

bool PageIndex::HasChildren(const Entry& entry) const {
  return entry.prefix.has_value() &&
         num_children_.contains(ChildKey(entry.prefix->digest, entry.group));
}

void PageIndex::Touch(std::span<const PageKey> keys, bool read) {
  MutexLock lock(&mu_);
  for (size_t i = keys.size(); i-- > 0;) {
    const auto it = pages_.find(keys[i]);
    if (it == pages_.end()) continue;
    Entry& entry = it->second;
    Unlink(&entry);
    LinkNewest(&entry);
    if (read && !entry.ever_read) {
      entry.ever_read = true;
      ++totals_.pages_ever_read;
    }
  }
}

void PageIndex::Publish(const PageRecordMeta& meta, const PagePlace& place, bool quarantined,
                        MonotonicTime now) {
  MutexLock lock(&mu_);
  const auto [it, inserted] = pages_.try_emplace(meta.key);
  Entry& entry = it->second;
  if (!inserted) {
    if (!entry.quarantined) CountOut(entry);
    entry.place.segment->live_bytes.fetch_sub(SegmentFiles::Footprint(entry.place.record_bytes()),
                                              std::memory_order_relaxed);
    Unlink(&entry);
  }
  entry.key = meta.key;
  entry.place = place;
  entry.checksum = meta.checksum;
  entry.prefix = meta.prefix;
  entry.parent = meta.parent;
  entry.group = meta.group;
  entry.quarantined = quarantined;
  put_bytes_ += SegmentFiles::Footprint(place.record_bytes());
  entry.put_bytes_before = put_bytes_;
  entry.put_at = now;
  keys_in_[place.segment->id].push_back(meta.key);
  LinkNewest(&entry);
  if (!quarantined) CountIn(entry);
}

bool PageIndex::Quarantine(const PageKey& key, const PagePlace& place) {
  MutexLock lock(&mu_);
  const auto it = pages_.find(key);
  if (it == pages_.end() || !it->second.place.SameAs(place)) return false;
  if (it->second.quarantined) return true;
  CountOut(it->second);
  it->second.quarantined = true;
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
  if (!entry.quarantined) CountOut(entry);
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
  if (it == pages_.end() || protects_.contains(key)) return std::nullopt;
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
  for (const ManifestPageRef& ref : pages) ++protects_[ref.key];
  return missing;
}

void PageIndex::ProtectAnyway(std::span<const ManifestPageRef> pages) {
  MutexLock lock(&mu_);
  for (const ManifestPageRef& ref : pages) ++protects_[ref.key];
}

void PageIndex::Unprotect(std::span<const ManifestPageRef> pages) {
  MutexLock lock(&mu_);
  for (const ManifestPageRef& ref : pages) {
    const auto it = protects_.find(ref.key);
    if (it != protects_.end() && --it->second == 0) protects_.erase(it);
  }
}

std::vector<PageKey> PageIndex::PickVictims(uint64_t bytes, const Grace& grace,
                                            MonotonicTime now) const {
  std::vector<PageKey> victims;
  absl::flat_hash_set<const Entry*> picked;
  absl::flat_hash_map<ChildKey, uint32_t> children_picked;
  uint64_t found = 0;
  // Each pass takes the leaves of what is left; a chain older than everything else needs one pass a
  // page.
  constexpr int kMaxPasses = 64;
  MutexLock lock(&mu_);
  for (int pass = 0; pass < kMaxPasses && found < bytes; ++pass) {
    const size_t before = victims.size();
    for (const Entry* e = oldest_; e != nullptr && found < bytes; e = e->newer) {
      if (protects_.contains(e->key) || picked.contains(e)) continue;
      if (put_bytes_ - e->put_bytes_before < grace.put_bytes && now - e->put_at < grace.time) {
        continue;
      }
      if (HasChildren(*e)) {
        const ChildKey self(e->prefix->digest, e->group);
        const auto it = children_picked.find(self);
        if (it == children_picked.end() || it->second < num_children_.find(self)->second) continue;
      }
      if (e->parent.has_value() && !e->quarantined) {
        ++children_picked[ChildKey(e->parent->digest, e->group)];
      }
      picked.insert(e);
      victims.push_back(e->key);
      found += SegmentFiles::Footprint(e->place.record_bytes());
    }
    if (victims.size() == before) break;
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
