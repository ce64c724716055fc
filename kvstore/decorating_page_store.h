// DecoratingPageStore: forwards every call to another store. Decorators derive from it and override
// what they add to. The inner store outlives it.
#ifndef PAGETIDE_KVSTORE_DECORATING_PAGE_STORE_H_
#define PAGETIDE_KVSTORE_DECORATING_PAGE_STORE_H_

#include <vector>

#include "core/page_store.h"

namespace pagetide {

class DecoratingPageStore : public PageStore {
 public:
  explicit DecoratingPageStore(PageStore* inner) : inner_(inner) {}

  std::vector<PutPageResult> PutPages(std::span<const PutPage> pages, Durability level,
                                      MonotonicTime deadline) override {
    return inner_->PutPages(pages, level, deadline);
  }
  std::vector<GetPageResult> GetPages(std::span<const GetPage> pages,
                                      MonotonicTime deadline) override {
    return inner_->GetPages(pages, deadline);
  }
  absl::StatusOr<std::vector<LookupResult>> LookupPages(std::span<const PageKey> keys,
                                                        MonotonicTime deadline) override {
    return inner_->LookupPages(keys, deadline);
  }
  absl::StatusOr<uint64_t> DeletePages(std::span<const PageKey> keys,
                                       MonotonicTime deadline) override {
    return inner_->DeletePages(keys, deadline);
  }
  absl::StatusOr<std::vector<PartialResult>> FindPartialPages(std::span<const PartialQuery> queries,
                                                              MonotonicTime deadline) override {
    return inner_->FindPartialPages(queries, deadline);
  }
  absl::StatusOr<std::vector<PageKey>> SetRetention(std::span<const PageKey> keys,
                                                    const Retention& retention,
                                                    const std::optional<WriteFence>& fence,
                                                    MonotonicTime deadline) override {
    return inner_->SetRetention(keys, retention, fence, deadline);
  }
  absl::Status Barrier(Durability level, MonotonicTime deadline) override {
    return inner_->Barrier(level, deadline);
  }
  absl::StatusOr<PutManifestResult> PutManifest(const ManifestRecord& manifest,
                                                uint64_t expected_version,
                                                const std::optional<WriteFence>& fence,
                                                MonotonicTime deadline) override {
    return inner_->PutManifest(manifest, expected_version, fence, deadline);
  }
  absl::StatusOr<ManifestRecord> GetManifest(absl::string_view name,
                                             MonotonicTime deadline) override {
    return inner_->GetManifest(name, deadline);
  }
  absl::StatusOr<std::vector<ManifestEntry>> ListManifests(absl::string_view name_prefix,
                                                           absl::string_view after, size_t limit,
                                                           MonotonicTime deadline) override {
    return inner_->ListManifests(name_prefix, after, limit, deadline);
  }
  absl::Status DeleteManifest(absl::string_view name, uint64_t expected_version,
                              const std::optional<WriteFence>& fence,
                              MonotonicTime deadline) override {
    return inner_->DeleteManifest(name, expected_version, fence, deadline);
  }
  absl::StatusOr<uint64_t> CompareAndSetRecord(absl::string_view kind, absl::string_view key,
                                               uint64_t expected_version,
                                               std::optional<absl::string_view> value,
                                               MonotonicTime deadline) override {
    return inner_->CompareAndSetRecord(kind, key, expected_version, value, deadline);
  }
  absl::StatusOr<StoreRecord> GetRecord(absl::string_view kind, absl::string_view key,
                                        MonotonicTime deadline) override {
    return inner_->GetRecord(kind, key, deadline);
  }
  absl::StatusOr<std::vector<StoreRecord>> ListRecords(absl::string_view kind,
                                                       absl::string_view key_prefix,
                                                       absl::string_view after, size_t limit,
                                                       MonotonicTime deadline) override {
    return inner_->ListRecords(kind, key_prefix, after, limit, deadline);
  }
  absl::StatusOr<StoreLease> AcquireLease(absl::string_view name, uint64_t incarnation,
                                          absl::Duration ttl, MonotonicTime deadline) override {
    return inner_->AcquireLease(name, incarnation, ttl, deadline);
  }
  absl::Status RenewLease(const StoreLease& lease, absl::Duration ttl,
                          MonotonicTime deadline) override {
    return inner_->RenewLease(lease, ttl, deadline);
  }
  absl::Status ReleaseLease(const StoreLease& lease, MonotonicTime deadline) override {
    return inner_->ReleaseLease(lease, deadline);
  }
  absl::Status Watch(const WatchCallback& on_events, MonotonicTime deadline) override {
    return inner_->Watch(on_events, deadline);
  }
  absl::StatusOr<StoreStats> GetStats(MonotonicTime deadline) override {
    return inner_->GetStats(deadline);
  }
  absl::StatusOr<ScrubResult> Scrub(uint64_t max_pages, MonotonicTime deadline) override {
    return inner_->Scrub(max_pages, deadline);
  }
  absl::StatusOr<uint64_t> Compact(MonotonicTime deadline) override {
    return inner_->Compact(deadline);
  }

 protected:
  PageStore* inner() const { return inner_; }

 private:
  PageStore* const inner_;
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_DECORATING_PAGE_STORE_H_
