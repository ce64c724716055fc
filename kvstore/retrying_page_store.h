// RetryingPageStore: repeats calls that answered UNAVAILABLE, with back-off, within their deadline.
//
// Pages are write-once and reads are pure: a batch repeats only its pages that were UNAVAILABLE. Of
// the compare-and-set calls, a manifest with a request_id is repeated (the store recognises it) and
// leases are (the same incarnation is granted again); others are not: the first attempt may have
// happened, and a repeat would answer VERSION_MISMATCH to a call that succeeded. Thread-safe. The
// inner store outlives it.
#ifndef PAGETIDE_KVSTORE_RETRYING_PAGE_STORE_H_
#define PAGETIDE_KVSTORE_RETRYING_PAGE_STORE_H_

#include <functional>
#include <vector>

#include "kvstore/decorating_page_store.h"
#include "rpc/retry.h"

namespace pagetide {

class RetryingPageStore final : public DecoratingPageStore {
 public:
  RetryingPageStore(PageStore* inner, const RetryPolicy& policy,
                    RetryEnvironment environment = RetryEnvironment())
      : DecoratingPageStore(inner), policy_(policy), environment_(std::move(environment)) {}

  std::vector<PutPageResult> PutPages(std::span<const PutPage> pages, Durability level,
                                      MonotonicTime deadline) override;
  std::vector<GetPageResult> GetPages(std::span<const GetPage> pages,
                                      MonotonicTime deadline) override;
  absl::StatusOr<std::vector<LookupResult>> LookupPages(std::span<const PageKey> keys,
                                                        MonotonicTime deadline) override;
  absl::StatusOr<std::vector<PartialResult>> FindPartialPages(std::span<const PartialQuery> queries,
                                                              MonotonicTime deadline) override;
  absl::StatusOr<std::vector<PageKey>> SetRetention(std::span<const PageKey> keys,
                                                    const Retention& retention,
                                                    const std::optional<WriteFence>& fence,
                                                    MonotonicTime deadline) override;
  absl::Status Barrier(Durability level, MonotonicTime deadline) override;
  absl::StatusOr<PutManifestResult> PutManifest(const ManifestRecord& manifest,
                                                uint64_t expected_version,
                                                const std::optional<WriteFence>& fence,
                                                MonotonicTime deadline) override;
  absl::StatusOr<ManifestRecord> GetManifest(absl::string_view name,
                                             MonotonicTime deadline) override;
  absl::StatusOr<std::vector<ManifestEntry>> ListManifests(absl::string_view name_prefix,
                                                           absl::string_view after, size_t limit,
                                                           MonotonicTime deadline) override;
  absl::StatusOr<StoreRecord> GetRecord(absl::string_view kind, absl::string_view key,
                                        MonotonicTime deadline) override;
  absl::StatusOr<std::vector<StoreRecord>> ListRecords(absl::string_view kind,
                                                       absl::string_view key_prefix,
                                                       absl::string_view after, size_t limit,
                                                       MonotonicTime deadline) override;
  absl::StatusOr<StoreLease> AcquireLease(absl::string_view name, uint64_t incarnation,
                                          absl::Duration ttl, MonotonicTime deadline) override;
  absl::Status RenewLease(const StoreLease& lease, absl::Duration ttl,
                          MonotonicTime deadline) override;
  absl::StatusOr<StoreStats> GetStats(MonotonicTime deadline) override;

 private:
  // Repeats `call` while it answers UNAVAILABLE and the deadline allows.
  template <typename Call>
  auto Repeat(MonotonicTime deadline, Call call) {
    return CallWithRetry(
        policy_, deadline - environment_.clock->MonotonicNow(),
        [&](absl::Duration) { return call(); }, environment_);
  }
  // Calls `batch` for those whose status is UNAVAILABLE, until there are none.
  template <typename Item, typename Result>
  std::vector<Result> RepeatBatch(
      std::span<const Item> items, MonotonicTime deadline,
      const std::function<std::vector<Result>(std::span<const Item>)>& batch);

  const RetryPolicy policy_;
  const RetryEnvironment environment_;
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_RETRYING_PAGE_STORE_H_
