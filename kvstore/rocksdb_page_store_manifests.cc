// Manifests of RocksdbPageStore: saved in one step, protected, released.
#include <algorithm>
#include <utility>

#include "absl/strings/str_cat.h"
#include "base/log.h"
#include "kvstore/failpoint.h"
#include "kvstore/manifest_record.h"
#include "kvstore/rocksdb_page_store.h"
#include "kvstore/store_errors.h"
#include "kvstore/store_lock_keys.h"

namespace pagetide {

using Table = StoreDatabase::Table;

absl::StatusOr<std::optional<ManifestRecord>> RocksdbPageStore::ReadManifest(
    absl::string_view name) const {
  PT_ASSIGN_OR_RETURN(const std::optional<std::string> bytes, db_->Get(Table::kManifests, name));
  if (!bytes.has_value()) return std::optional<ManifestRecord>();
  PT_ASSIGN_OR_RETURN(ManifestRecord manifest, ParseManifest(*bytes));
  if (manifest.name != name) {
    return absl::DataLossError(
        absl::StrCat("manifest ", name, ": carries the name ", manifest.name));
  }
  return std::optional<ManifestRecord>(std::move(manifest));
}

absl::StatusOr<PutManifestResult> RocksdbPageStore::PutManifest(
    const ManifestRecord& manifest, uint64_t expected_version,
    const std::optional<WriteFence>& fence, MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckStoreName("manifest name", manifest.name));
  PT_RETURN_IF_ERROR(CheckNotFailed());
  std::vector<std::string> locks = {ManifestLock(manifest.name)};
  if (fence.has_value()) locks.push_back(RecordLock("owner", fence->ownership_key));
  const KeyedLock::Hold hold(&keys_, std::move(locks), deadline);
  PT_RETURN_IF_ERROR(hold.status());
  PT_RETURN_IF_ERROR(CheckFence(fence));
  PT_ASSIGN_OR_RETURN(const std::optional<ManifestRecord> old, ReadManifest(manifest.name));
  const uint64_t current = old.has_value() ? old->version : 0;
  if (current != expected_version) {
    // The same save, retried after its answer was lost.
    const bool may_be_made_by_it = expected_version == 0 || current == expected_version + 1;
    if (current != 0 && may_be_made_by_it && IsSameSave(*old, manifest)) {
      return PutManifestResult{true, current, {}};
    }
    return VersionMismatchError(absl::StrCat("manifest ", manifest.name), current,
                                expected_version);
  }
  uint64_t deleted_version = 0;
  if (!old.has_value()) {
    PT_ASSIGN_OR_RETURN(deleted_version, db_->ReadDeletedVersion(manifest.name));
  }
  PT_ASSIGN_OR_RETURN(const ManifestRecord next, ComposeManifest(old.has_value() ? &*old : nullptr,
                                                                 manifest, deleted_version));
  PT_ASSIGN_OR_RETURN(const RoomLedger::Hold room,
                      HoldIndexRoom(absl::StrCat("write manifest ", next.name),
                                    next.pages.size() * kManifestPageRefBytes +
                                        next.payload.size() + next.summary.size()));
  PutManifestResult result;
  const bool protects = !PT_BUG_IS_PLANTED("evict_between_check_and_manifest");
  result.missing =
      WithoutRepeats(protects ? index_.Protect(next.pages) : index_.Missing(next.pages));
  if (!result.missing.empty()) return result;
  // From here on the pages are protected; they stay so only if the manifest gets written.
  PT_FAILPOINT("manifest.protected");
  if (PT_BUG_IS_PLANTED("manifest_before_pages")) {
    PT_RETURN_IF_ERROR(db_->PutManifest(next, /*sync=*/true));
    PT_FAILPOINT("manifest.before_pages");
  }
  if (!PT_BUG_IS_PLANTED("acknowledge_before_barrier")) {
    const absl::Status durable = Barrier(Durability::kLocal, deadline);
    if (!durable.ok()) {
      index_.UnprotectWithGrace(next.pages);
      return durable;
    }
  }
  PT_FAILPOINT("manifest.pages_durable");
  if (protects) {
    result.missing = WithoutRepeats(index_.Missing(next.pages));  // quarantined during the barrier
    if (!result.missing.empty()) {
      index_.UnprotectWithGrace(next.pages);
      return result;
    }
  } else {
    index_.ProtectAnyway(next.pages);
  }
  const absl::Status written =
      db_->PutManifest(next, /*sync=*/!PT_BUG_IS_PLANTED("acknowledge_before_barrier"));
  PT_FAILPOINT("manifest.before_acknowledgement");
  // If the write failed it may still be on disk: the pages stay protected until the store is
  // reopened.
  if (!written.ok()) return Fail(written);
  expiries_.Set(next.name, next.expires_at.has_value()
                               ? std::optional(TwoClockEnd::OfNewManifest(next, *options_.clock))
                               : std::nullopt);
  if (old.has_value()) {
    index_.UnprotectWithGrace(old->pages);
  } else {
    counters_.manifests.fetch_add(1, std::memory_order_relaxed);
  }
  result.committed = true;
  result.version = next.version;
  return result;
}

absl::StatusOr<ManifestRecord> RocksdbPageStore::GetManifest(absl::string_view name,
                                                             MonotonicTime deadline) {
  PT_ASSIGN_OR_RETURN(std::optional<ManifestRecord> manifest, ReadManifest(name));
  if (!manifest.has_value()) return absl::NotFoundError(absl::StrCat("manifest ", name));
  return *std::move(manifest);
}

absl::StatusOr<std::vector<ManifestEntry>> RocksdbPageStore::ListManifests(
    absl::string_view name_prefix, absl::string_view after, size_t limit, MonotonicTime deadline) {
  std::vector<ManifestEntry> entries;
  if (limit == 0) return entries;
  PT_RETURN_IF_ERROR(db_->Scan(Table::kManifestEntries, name_prefix, after,
                               [&](absl::string_view name, absl::string_view value) {
                                 absl::StatusOr<ManifestEntry> entry = ParseManifestEntry(value);
                                 // Reading it by name says what is wrong.
                                 if (entry.ok()) entries.push_back(*std::move(entry));
                                 return entries.size() < limit;
                               }));
  return entries;
}

absl::Status RocksdbPageStore::DeleteManifest(absl::string_view name, uint64_t expected_version,
                                              const std::optional<WriteFence>& fence,
                                              MonotonicTime deadline) {
  PT_RETURN_IF_ERROR(CheckNotFailed());
  std::vector<std::string> locks = {ManifestLock(name), DeletionLock(name)};
  if (fence.has_value()) locks.push_back(RecordLock("owner", fence->ownership_key));
  const KeyedLock::Hold hold(&keys_, std::move(locks), deadline);
  PT_RETURN_IF_ERROR(hold.status());
  PT_RETURN_IF_ERROR(CheckFence(fence));
  const absl::StatusOr<std::optional<ManifestRecord>> read = ReadManifest(name);
  if (absl::IsDataLoss(read.status()) || absl::IsUnimplemented(read.status())) {
    return ForgetUnreadableManifest(name, expected_version, read.status());
  }
  PT_RETURN_IF_ERROR(read.status());
  const std::optional<ManifestRecord>& old = *read;
  if (!old.has_value()) return absl::NotFoundError(absl::StrCat("delete manifest ", name));
  if (old->version != expected_version) {
    return VersionMismatchError(absl::StrCat("manifest ", name), old->version, expected_version);
  }
  return ForgetManifest(*old);
}

uint64_t RocksdbPageStore::num_unreadable_manifests() const {
  MutexLock lock(&unreadable_mu_);
  return unreadable_manifests_.size();
}

absl::Status RocksdbPageStore::ForgetUnreadableManifest(absl::string_view name,
                                                        uint64_t expected_version,
                                                        const absl::Status& cause) {
  PT_ASSIGN_OR_RETURN(const std::optional<std::string> bytes,
                      db_->Get(Table::kManifestEntries, name));
  const absl::StatusOr<ManifestEntry> entry =
      bytes.has_value() ? ParseManifestEntry(*bytes) : absl::DataLossError("there is none");
  // Where it is not known, versions of the name may repeat: what a client says is not taken for it.
  const uint64_t version = entry.ok() ? entry->version : 0;
  if (entry.ok() && version != expected_version) {
    return VersionMismatchError(absl::StrCat("manifest ", name), version, expected_version);
  }
  PT_ASSIGN_OR_RETURN(const uint64_t deleted, db_->ReadDeletedVersion(name));
  const absl::Status written = db_->DeleteManifest(name, std::max(deleted, version), {});
  if (!written.ok()) return Fail(written);
  {
    MutexLock lock(&unreadable_mu_);
    unreadable_manifests_.erase(std::string(name));
  }
  expiries_.Set(name, std::nullopt);
  counters_.manifests.fetch_sub(1, std::memory_order_relaxed);
  LogWarning("store", "manifest ", name,
             " was deleted, which could not be read: ", cause.ToString());
  return absl::OkStatus();
}

absl::Status RocksdbPageStore::ForgetManifest(const ManifestRecord& manifest) {
  PT_ASSIGN_OR_RETURN(const uint64_t deleted, db_->ReadDeletedVersion(manifest.name));
  const auto kept = index_.InheritPriority(manifest.pages, manifest.priority);
  const absl::Status written =
      db_->DeleteManifest(manifest.name, std::max(deleted, manifest.version), kept);
  if (!written.ok()) return Fail(written);
  index_.Unprotect(manifest.pages);
  expiries_.Set(manifest.name, std::nullopt);
  counters_.manifests.fetch_sub(1, std::memory_order_relaxed);
  return absl::OkStatus();
}

absl::Status RocksdbPageStore::RemoveExpiredManifests() {
  for (const std::string& name : expiries_.Passed(*options_.clock)) {
    const KeyedLock::Hold hold(&keys_, {ManifestLock(name), DeletionLock(name)});
    // It may have been written anew, with another end or none, since it was listed.
    if (!expiries_.HasPassed(name, *options_.clock)) continue;
    PT_ASSIGN_OR_RETURN(const std::optional<ManifestRecord> manifest, ReadManifest(name));
    if (!manifest.has_value()) {
      expiries_.Set(name, std::nullopt);
      continue;
    }
    PT_RETURN_IF_ERROR(ForgetManifest(*manifest));
    counters_.manifests_expired.fetch_add(1, std::memory_order_relaxed);
  }
  return absl::OkStatus();
}

}  // namespace pagetide
