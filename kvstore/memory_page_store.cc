#include "kvstore/memory_page_store.h"

#include <algorithm>
#include <cstring>

#include "absl/strings/match.h"
#include "absl/strings/str_cat.h"
#include "base/status_macros.h"
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
    if (result.status.ok()) result.status = ValidatePageMeta(meta);
    if (result.status.ok() && pages[i].body.size() != meta.body_bytes) {
      result.status = absl::InvalidArgumentError(
          absl::StrCat("put page ", meta.key.digest.ToShortHex(), ": body_bytes is ",
                       meta.body_bytes, ", the body has ", pages[i].body.size()));
    }
    if (result.status.ok() && ChecksumOf(pages[i].body) != meta.checksum) {
      result.status = absl::InvalidArgumentError(
          absl::StrCat("put page ", meta.key.digest.ToShortHex(), ": the body's checksum is not ",
                       meta.checksum.ToHex()));
    }
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
      result.status = StoreFullError("put page: capacity", meta.body_bytes,
                                     options_.capacity_bytes - stats_.logical_bytes);
      continue;
    }
    Held& held = pages_[meta.key];
    held = {meta, std::move(body), /*quarantined=*/false, held.ever_read};
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
    const auto it = pages_.find(pages[i].key);
    if (it != pages_.end() && !std::exchange(it->second.ever_read, true)) ++stats_.pages_ever_read;
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

bool MemoryPageStore::IsProtected(const PageKey& key) const {
  for (const auto& [name, manifest] : manifests_) {
    for (const ManifestPageRef& ref : manifest.pages) {
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
    if (!it->second.quarantined) Report(it->second, /*removed=*/true);
    if (it->second.ever_read) --stats_.pages_ever_read;
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
  PT_RETURN_IF_ERROR(CheckFence(fence));
  const auto old = manifests_.find(manifest.name);
  const uint64_t current = old == manifests_.end() ? 0 : old->second.version;
  if (current != expected_version) {
    if (current == expected_version + 1 && !manifest.request_id.empty() &&
        old->second.request_id == manifest.request_id) {
      return PutManifestResult{true, current, {}};
    }
    return VersionMismatchError(absl::StrCat("manifest ", manifest.name), current,
                                expected_version);
  }
  PutManifestResult result;
  for (const ManifestPageRef& ref : manifest.pages) {
    if (!IsPresent(ref)) result.missing.push_back(ref.key);
  }
  if (!result.missing.empty()) return result;
  ManifestRecord& stored = manifests_[manifest.name];
  stored = manifest;
  stored.version = expected_version + 1;
  stats_.manifests = manifests_.size();
  result.committed = true;
  result.version = stored.version;
  return result;
}

absl::StatusOr<ManifestRecord> MemoryPageStore::GetManifest(absl::string_view name,
                                                            MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("get manifest", deadline));
  MutexLock lock(&mu_);
  const auto it = manifests_.find(std::string(name));
  if (it == manifests_.end()) return absl::NotFoundError(absl::StrCat("manifest ", name));
  return it->second;
}

absl::StatusOr<std::vector<ManifestRecord>> MemoryPageStore::ListManifests(
    absl::string_view name_prefix, absl::string_view after, size_t limit, MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckDeadline("list manifests", deadline));
  std::vector<ManifestRecord> out;
  MutexLock lock(&mu_);
  for (auto it = manifests_.lower_bound(std::string(std::max(name_prefix, after)));
       it != manifests_.end() && out.size() < limit; ++it) {
    if (!absl::StartsWith(it->first, name_prefix)) break;
    if (it->first <= after) continue;
    ManifestRecord& entry = out.emplace_back();
    entry.name = it->second.name;
    entry.version = it->second.version;
    entry.request_id = it->second.request_id;
    entry.saved_at = it->second.saved_at;
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
  if (it->second.version != expected_version) {
    return VersionMismatchError(absl::StrCat("manifest ", name), it->second.version,
                                expected_version);
  }
  manifests_.erase(it);
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
  return stats_;
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
