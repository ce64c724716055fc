#include "kvstore/memory_page_store.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
#include "kvstore/manifest_record.h"
#include "kvstore/page_record.h"
#include "kvstore/store_errors.h"

namespace pagetide {

MemoryPageStore::MemoryPageStore(Options options) : options_(options), leases_(options.clock) {
  stats_.capacity_bytes = options.capacity_bytes;
  stats_.engine = "memory";
}

MemoryPageStore::~MemoryPageStore() {
  feed_.Close();
}

absl::Status MemoryPageStore::CheckDeadline(absl::string_view action,
                                            MonotonicTime deadline) const {
  if (options_.clock->MonotonicNow() < deadline) return absl::OkStatus();
  return absl::DeadlineExceededError(absl::StrCat(action, ": deadline passed"));
}

void MemoryPageStore::Report(const Held& held, bool removed) {
  if (removed) {
    --stats_.pages;
    stats_.logical_bytes -= held.meta.body_bytes;
  } else {
    ++stats_.pages;
    stats_.logical_bytes += held.meta.body_bytes;
  }
  stats_.physical_bytes = stats_.logical_bytes;
  if (held.meta.prefix.has_value()) {
    feed_.Append({*held.meta.prefix, held.meta.group, held.meta.body_bytes, removed});
  }
}

std::vector<PutPageResult> MemoryPageStore::PutPages(std::span<const PutPage> pages,
                                                     Durability level, MonotonicTime deadline) {
  std::vector<PutPageResult> results(pages.size());
  for (size_t i = 0; i < pages.size(); ++i) {
    const PageRecordMeta& meta = pages[i].meta;
    PutPageResult& result = results[i];
    result.status = CheckDeadline("put page", deadline);
    if (result.status.ok()) result.status = ValidatePutPage(pages[i]);
    if (!result.status.ok()) continue;
    auto body =
        std::make_shared<std::vector<std::byte>>(pages[i].body.begin(), pages[i].body.end());
    MutexLock lock(&mu_);
    const auto it = pages_.find(meta.key);
    if (it != pages_.end() && !it->second.quarantined) {
      result.already_present = true;
      result.checksum = it->second.meta.checksum;
      continue;
    }
    if (options_.capacity_bytes != 0 &&
        stats_.logical_bytes + meta.body_bytes > options_.capacity_bytes) {
      stats_.state = "full";
      ++stats_.pages_refused;
      result.status = StoreFullError("put page: capacity", meta.body_bytes,
                                     options_.capacity_bytes - stats_.logical_bytes);
      continue;
    }
    Held& held = pages_[meta.key];
    held = {meta,
            std::move(body),
            {pages[i].tokens.begin(), pages[i].tokens.end()},
            /*quarantined=*/false,
            held.ever_read};
    if (held.ever_read) stats_.bytes_ever_read += meta.body_bytes;
    if (!held.tokens.empty()) {
      children_[ChildRow{meta.parent->digest, meta.fingerprint, held.tokens}] = meta.key;
    }
    stats_.bytes_put_since_hit += meta.body_bytes;
    Report(held, /*removed=*/false);
    ++stats_.pages_put;
    stats_.bytes_put += meta.body_bytes;
    stats_.state = "serving";
    result.checksum = meta.checksum;
  }
  return results;
}

void MemoryPageStore::Quarantine(const PageKey& key, const std::vector<std::byte>* body) {
  MutexLock lock(&mu_);
  const auto it = pages_.find(key);
  if (it == pages_.end() || it->second.body.get() != body || it->second.quarantined) return;
  it->second.quarantined = true;
  ForgetChild(it->second);
  if (it->second.ever_read) stats_.bytes_ever_read -= it->second.meta.body_bytes;
  ++stats_.pages_quarantined;
  Report(it->second, /*removed=*/true);
}

std::vector<GetPageResult> MemoryPageStore::GetPages(std::span<const GetPage> pages,
                                                     MonotonicTime deadline) {
  std::vector<GetPageResult> results(pages.size());
  for (size_t i = 0; i < pages.size(); ++i) {
    GetPageResult& result = results[i];
    result.status = CheckDeadline("get page", deadline);
    if (!result.status.ok()) continue;
    std::shared_ptr<std::vector<std::byte>> body;
    Checksum128 checksum;
    {
      MutexLock lock(&mu_);
      const auto it = pages_.find(pages[i].key);
      if (it != pages_.end() && it->second.quarantined) result.outcome = GetOutcome::kQuarantined;
      if (it == pages_.end() || it->second.quarantined ||
          (pages[i].expected.has_value() && *pages[i].expected != it->second.meta.checksum)) {
        ++stats_.pages_missed;
        continue;
      }
      body = it->second.body;
      checksum = it->second.meta.checksum;
    }
    if (pages[i].body.size() != body->size()) {
      result.status = absl::InvalidArgumentError(
          absl::StrCat("get page ", pages[i].key.digest.ToShortHex(), ": buffer of ",
                       pages[i].body.size(), " bytes, the page has ", body->size()));
      continue;
    }
    const bool intact = CopyWithChecksum(*body, pages[i].body) == checksum;
    if (!intact) {
      Quarantine(pages[i].key, body.get());
      result.outcome = GetOutcome::kQuarantined;
    } else {
      result.outcome = GetOutcome::kHit;
      result.checksum = checksum;
    }
    MutexLock lock(&mu_);
    if (!intact) {
      ++stats_.pages_missed;
      continue;
    }
    ++stats_.pages_got;
    stats_.bytes_got += body->size();
    stats_.bytes_put_since_hit = 0;
    const auto it = pages_.find(pages[i].key);
    if (it == pages_.end() || std::exchange(it->second.ever_read, true)) continue;
    ++stats_.pages_ever_read;
    if (!it->second.quarantined) stats_.bytes_ever_read += it->second.meta.body_bytes;
  }
  return results;
}

absl::StatusOr<std::vector<LookupResult>> MemoryPageStore::LookupPages(
    std::span<const PageKey> keys, MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("look up pages", deadline));
  std::vector<LookupResult> results(keys.size());
  MutexLock lock(&mu_);
  for (size_t i = 0; i < keys.size(); ++i) {
    const auto it = pages_.find(keys[i]);
    if (it == pages_.end()) continue;
    results[i] = {!it->second.quarantined, it->second.quarantined, it->second.meta.checksum,
                  it->second.meta.body_bytes};
  }
  return results;
}

void MemoryPageStore::ForgetChild(const Held& held) {
  if (held.tokens.empty()) return;
  children_.erase(ChildRow{held.meta.parent->digest, held.meta.fingerprint, held.tokens});
}

absl::StatusOr<std::vector<PartialResult>> MemoryPageStore::FindPartialPages(
    std::span<const PartialQuery> queries, MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("find partial pages", deadline));
  std::vector<PartialResult> results(queries.size());
  MutexLock lock(&mu_);
  for (size_t i = 0; i < queries.size(); ++i) {
    const PartialQuery& query = queries[i];
    const ChildRow from{
        query.parent.digest, query.fingerprint, {query.tokens.begin(), query.tokens.end()}};
    const auto consider = [&](const std::pair<const ChildRow, PageKey>& child) {
      mu_.AssertHeld();
      const auto& [parent, fingerprint, tokens] = child.first;
      if (parent != query.parent.digest || fingerprint != query.fingerprint) return;
      const uint64_t common = static_cast<uint64_t>(
          std::mismatch(tokens.begin(), tokens.end(), query.tokens.begin(), query.tokens.end())
              .first -
          tokens.begin());
      if (common <= results[i].common_tokens) return;
      const Held& held = pages_.at(child.second);
      results[i] = {common, child.second, held.meta.checksum, held.meta.body_bytes, tokens};
    };
    const auto next = children_.lower_bound(from);
    if (next != children_.end()) consider(*next);
    if (next != children_.begin()) consider(*std::prev(next));
  }
  return results;
}

absl::StatusOr<std::vector<PageKey>> MemoryPageStore::SetRetention(
    std::span<const PageKey> keys, const Retention& retention,
    const std::optional<WriteFence>& fence, MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("set retention", deadline));
  PT_RETURN_IF_ERROR(ValidateRetention(retention, options_.clock->WallNow()));
  std::vector<PageKey> missing;
  MutexLock lock(&mu_);
  PT_RETURN_IF_ERROR(CheckFence(fence));
  for (const PageKey& key : keys) {
    const auto it = pages_.find(key);
    if (it == pages_.end() || it->second.quarantined) {
      missing.push_back(key);
      continue;
    }
    pins_.erase(key);
    if (retention.pinned_until.has_value()) {
      pins_.emplace(key, TwoClockEnd::At(*retention.pinned_until, *options_.clock));
    }
  }
  return missing;
}

bool MemoryPageStore::IsProtected(const PageKey& key) const {
  const auto pin = pins_.find(key);
  if (pin != pins_.end() && !pin->second.HasPassed(*options_.clock)) return true;
  for (const auto& [name, manifest] : manifests_) {
    for (const ManifestPageRef& ref : manifest.record.pages) {
      if (ref.key == key) return true;
    }
  }
  return false;
}

absl::StatusOr<uint64_t> MemoryPageStore::DeletePages(std::span<const PageKey> keys,
                                                      MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("delete pages", deadline));
  uint64_t deleted = 0;
  MutexLock lock(&mu_);
  for (const PageKey& key : keys) {
    const auto it = pages_.find(key);
    if (it == pages_.end() || IsProtected(key)) continue;
    if (!it->second.quarantined) {
      Report(it->second, /*removed=*/true);
      ForgetChild(it->second);
      if (it->second.ever_read) stats_.bytes_ever_read -= it->second.meta.body_bytes;
    }
    if (it->second.ever_read) --stats_.pages_ever_read;
    pins_.erase(key);
    pages_.erase(it);
    ++deleted;
  }
  return deleted;
}

absl::Status MemoryPageStore::Barrier(Durability level, MonotonicTime deadline) {
  return absl::OkStatus();
}

absl::Status MemoryPageStore::CheckFence(const std::optional<WriteFence>& fence) const {
  if (!fence.has_value()) return absl::OkStatus();
  const auto it = records_.find({"owner", fence->ownership_key});
  const uint64_t epoch = it == records_.end() ? 0 : it->second.version;
  if (epoch == fence->epoch) return absl::OkStatus();
  return StaleEpochError(absl::StrCat("owner of ", fence->ownership_key), epoch, fence->epoch);
}

bool MemoryPageStore::IsPresent(const ManifestPageRef& ref) const {
  const auto it = pages_.find(ref.key);
  return it != pages_.end() && !it->second.quarantined && it->second.meta.checksum == ref.checksum;
}

absl::StatusOr<PutManifestResult> MemoryPageStore::PutManifest(
    const ManifestRecord& manifest, uint64_t expected_version,
    const std::optional<WriteFence>& fence, MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("put manifest", deadline));
  PT_RETURN_IF_ERROR(CheckStoreName("manifest name", manifest.name));
  MutexLock lock(&mu_);
  RemoveExpired();
  PT_RETURN_IF_ERROR(CheckFence(fence));
  const auto old = manifests_.find(manifest.name);
  const ManifestRecord* const present = old == manifests_.end() ? nullptr : &old->second.record;
  const uint64_t current = present == nullptr ? 0 : present->version;
  if (current != expected_version) {
    const bool may_be_made_by_it = expected_version == 0 || current == expected_version + 1;
    if (current != 0 && may_be_made_by_it && IsSameSave(*present, manifest)) {
      return PutManifestResult{true, current, {}};
    }
    return VersionMismatchError(absl::StrCat("manifest ", manifest.name), current,
                                expected_version);
  }
  const auto deleted = deleted_versions_.find(VersionBucketOf(manifest.name));
  PT_ASSIGN_OR_RETURN(
      ManifestRecord next,
      ComposeManifest(present, manifest, deleted == deleted_versions_.end() ? 0 : deleted->second));
  PutManifestResult result;
  for (const ManifestPageRef& ref : next.pages) {
    if (!IsPresent(ref)) result.missing.push_back(ref.key);
  }
  result.missing = WithoutRepeats(result.missing);
  if (!result.missing.empty()) return result;
  result.committed = true;
  result.version = next.version;
  HeldManifest& stored = manifests_[manifest.name];
  stored.end.reset();
  if (next.expires_at.has_value()) {
    stored.end = TwoClockEnd::OfNewManifest(next, *options_.clock);
  }
  stored.record = std::move(next);
  stats_.manifests = manifests_.size();
  return result;
}

MemoryPageStore::Manifests::iterator MemoryPageStore::Forget(Manifests::iterator it) {
  uint64_t& deleted = deleted_versions_[VersionBucketOf(it->first)];
  deleted = std::max(deleted, it->second.record.version);
  return manifests_.erase(it);
}

void MemoryPageStore::RemoveExpired() {
  for (auto it = manifests_.begin(); it != manifests_.end();) {
    if (it->second.end.has_value() && it->second.end->HasPassed(*options_.clock)) {
      it = Forget(it);
      ++stats_.manifests_expired;
    } else {
      ++it;
    }
  }
  stats_.manifests = manifests_.size();
}

absl::StatusOr<ManifestRecord> MemoryPageStore::GetManifest(absl::string_view name,
                                                            MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("get manifest", deadline));
  MutexLock lock(&mu_);
  RemoveExpired();
  const auto it = manifests_.find(std::string(name));
  if (it == manifests_.end()) return absl::NotFoundError(absl::StrCat("manifest ", name));
  return it->second.record;
}

absl::StatusOr<std::vector<ManifestEntry>> MemoryPageStore::ListManifests(
    absl::string_view name_prefix, absl::string_view after, size_t limit, MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("list manifests", deadline));
  std::vector<ManifestEntry> out;
  MutexLock lock(&mu_);
  RemoveExpired();
  for (auto it = manifests_.lower_bound(std::string(std::max(name_prefix, after)));
       it != manifests_.end() && out.size() < limit; ++it) {
    if (!absl::StartsWith(it->first, name_prefix)) break;
    if (it->first <= after) continue;
    out.push_back(EntryOf(it->second.record));
  }
  return out;
}

absl::Status MemoryPageStore::DeleteManifest(absl::string_view name, uint64_t expected_version,
                                             const std::optional<WriteFence>& fence,
                                             MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("delete manifest", deadline));
  MutexLock lock(&mu_);
  PT_RETURN_IF_ERROR(CheckFence(fence));
  const auto it = manifests_.find(std::string(name));
  if (it == manifests_.end()) return absl::NotFoundError(absl::StrCat("delete manifest ", name));
  if (it->second.record.version != expected_version) {
    return VersionMismatchError(absl::StrCat("manifest ", name), it->second.record.version,
                                expected_version);
  }
  Forget(it);
  stats_.manifests = manifests_.size();
  return absl::OkStatus();
}

absl::StatusOr<uint64_t> MemoryPageStore::CompareAndSetRecord(
    absl::string_view kind, absl::string_view key, uint64_t expected_version,
    std::optional<absl::string_view> value, MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("write record", deadline));
  PT_RETURN_IF_ERROR(CheckStoreName("record kind", kind));
  PT_RETURN_IF_ERROR(CheckStoreName("record key", key));
  if (value.has_value() && value->size() > kMaxRecordValueBytes) {
    return absl::InvalidArgumentError(
        absl::StrCat("record value has ", value->size(), " bytes, at most ", kMaxRecordValueBytes));
  }
  const std::pair<std::string, std::string> row{std::string(kind), std::string(key)};
  MutexLock lock(&mu_);
  const auto it = records_.find(row);
  const uint64_t current = it == records_.end() ? 0 : it->second.version;
  if (current != expected_version) {
    return VersionMismatchError(absl::StrCat("record ", kind, "/", key), current, expected_version);
  }
  if (value.has_value()) {
    records_[row] = {row.second, expected_version + 1, std::string(*value)};
  } else {
    records_.erase(row);
  }
  return expected_version + 1;
}

absl::StatusOr<StoreRecord> MemoryPageStore::GetRecord(absl::string_view kind,
                                                       absl::string_view key,
                                                       MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("get record", deadline));
  MutexLock lock(&mu_);
  const auto it = records_.find({std::string(kind), std::string(key)});
  if (it == records_.end()) return absl::NotFoundError(absl::StrCat("record ", kind, "/", key));
  return it->second;
}

absl::StatusOr<std::vector<StoreRecord>> MemoryPageStore::ListRecords(absl::string_view kind,
                                                                      absl::string_view key_prefix,
                                                                      absl::string_view after,
                                                                      size_t limit,
                                                                      MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("list records", deadline));
  std::vector<StoreRecord> out;
  MutexLock lock(&mu_);
  for (auto it =
           records_.lower_bound({std::string(kind), std::string(std::max(key_prefix, after))});
       it != records_.end() && out.size() < limit; ++it) {
    if (it->first.first != kind || !absl::StartsWith(it->first.second, key_prefix)) break;
    if (it->first.second <= after) continue;
    out.push_back(it->second);
  }
  return out;
}

absl::StatusOr<StoreLease> MemoryPageStore::AcquireLease(absl::string_view name,
                                                         uint64_t incarnation, absl::Duration ttl,
                                                         MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("acquire lease", deadline));
  MutexLock lock(&mu_);  // proposal and grant are one step
  PT_ASSIGN_OR_RETURN(StoreLease lease, leases_.Propose(name, incarnation, ttl));
  leases_.Grant(lease, ttl);
  return lease;
}

absl::Status MemoryPageStore::RenewLease(const StoreLease& lease, absl::Duration ttl,
                                         MonotonicTime deadline) {
  return leases_.Renew(lease, ttl);
}

absl::Status MemoryPageStore::ReleaseLease(const StoreLease& lease, MonotonicTime deadline) {
  return leases_.Release(lease);
}

absl::Status MemoryPageStore::Watch(const WatchCallback& on_events, MonotonicTime deadline) {
  return FollowResidency(
      &feed_, options_.clock, deadline,
      [this](uint64_t* next_number) {
        std::vector<StoreEvent> held;
        MutexLock lock(&mu_);
        for (const auto& [key, page] : pages_) {
          if (page.quarantined || !page.meta.prefix.has_value()) continue;
          held.push_back({*page.meta.prefix, page.meta.group, page.meta.body_bytes, false});
        }
        *next_number = feed_.next_number();
        return held;
      },
      on_events);
}

absl::StatusOr<StoreStats> MemoryPageStore::GetStats(MonotonicTime deadline) {
  MutexLock lock(&mu_);
  RemoveExpired();
  StoreStats stats = stats_;
  stats.stored_bytes = stats.logical_bytes;
  for (const auto& [key, held] : pages_) {
    if (held.quarantined || !IsProtected(key)) continue;
    ++stats.protected_pages;
    stats.protected_bytes += held.meta.body_bytes;
  }
  return stats;
}

absl::StatusOr<ScrubResult> MemoryPageStore::Scrub(uint64_t max_pages, MonotonicTime deadline) {
  std::vector<std::pair<PageKey, Held>> held;
  {
    MutexLock lock(&mu_);
    for (const auto& entry : pages_) {
      if (max_pages != 0 && held.size() >= max_pages) break;
      if (!entry.second.quarantined) held.push_back(entry);
    }
  }
  ScrubResult result;
  for (const auto& [key, page] : held) {
    PT_RETURN_IF_ERROR(CheckDeadline("scrub", deadline));
    if (ChecksumOf(*page.body) != page.meta.checksum) {
      Quarantine(key, page.body.get());
      ++result.quarantined_pages;
    }
    ++result.verified_pages;
    result.verified_bytes += page.body->size();
  }
  MutexLock lock(&mu_);
  stats_.pages_scrubbed += result.verified_pages;
  return result;
}

absl::StatusOr<uint64_t> MemoryPageStore::Compact(MonotonicTime deadline) {
  return 0;
}

bool MemoryPageStore::FlipBit(const PageKey& key, uint64_t bit) {
  MutexLock lock(&mu_);
  const auto it = pages_.find(key);
  if (it == pages_.end()) return false;
  // A copy, because a reader may hold the old one.
  auto flipped = std::make_shared<std::vector<std::byte>>(*it->second.body);
  const uint64_t at = bit % (flipped->size() * 8);
  (*flipped)[at / 8] ^= std::byte{1} << (at % 8);
  it->second.body = std::move(flipped);
  return true;
}

}  // namespace pagetide
