#include "kvstore/retrying_page_store.h"

#include <utility>

namespace pagetide {

template <typename Item, typename Result>
std::vector<Result> RetryingPageStore::RepeatBatch(
    std::span<const Item> items, MonotonicTime deadline,
    const std::function<std::vector<Result>(std::span<const Item>)>& batch) {
  std::vector<Result> results = batch(items);
  RetryLoop<> loop(policy_, environment_.clock, deadline, environment_.seed);
  for (;;) {
    std::vector<Item> again;
    std::vector<size_t> index;
    for (size_t i = 0; i < results.size(); ++i) {
      if (!RetryUnavailable::IsRetryable(results[i].status)) continue;
      again.push_back(items[i]);
      index.push_back(i);
    }
    if (again.empty()) return results;
    const auto pause = loop.NextPause(results[index[0]].status);
    if (!pause.has_value()) return results;
    environment_.sleep(*pause);
    std::vector<Result> repeated = batch(again);
    for (size_t i = 0; i < index.size(); ++i) results[index[i]] = std::move(repeated[i]);
  }
}

std::vector<PutPageResult> RetryingPageStore::PutPages(std::span<const PutPage> pages,
                                                       Durability level, MonotonicTime deadline) {
  return RepeatBatch<PutPage, PutPageResult>(pages, deadline, [&](std::span<const PutPage> some) {
    return inner()->PutPages(some, level, deadline);
  });
}

std::vector<GetPageResult> RetryingPageStore::GetPages(std::span<const GetPage> pages,
                                                       MonotonicTime deadline) {
  return RepeatBatch<GetPage, GetPageResult>(pages, deadline, [&](std::span<const GetPage> some) {
    return inner()->GetPages(some, deadline);
  });
}

absl::StatusOr<std::vector<LookupResult>> RetryingPageStore::LookupPages(
    std::span<const PageKey> keys, MonotonicTime deadline) {
  return Repeat(deadline, [&] { return inner()->LookupPages(keys, deadline); });
}

absl::StatusOr<std::vector<PartialResult>> RetryingPageStore::FindPartialPages(
    std::span<const PartialQuery> queries, MonotonicTime deadline) {
  return Repeat(deadline, [&] { return inner()->FindPartialPages(queries, deadline); });
}

absl::StatusOr<std::vector<PageKey>> RetryingPageStore::SetRetention(
    std::span<const PageKey> keys, const Retention& retention,
    const std::optional<WriteFence>& fence, MonotonicTime deadline) {
  return Repeat(deadline, [&] { return inner()->SetRetention(keys, retention, fence, deadline); });
}

absl::Status RetryingPageStore::Barrier(Durability level, MonotonicTime deadline) {
  return Repeat(deadline, [&] { return inner()->Barrier(level, deadline); });
}

absl::StatusOr<PutManifestResult> RetryingPageStore::PutManifest(
    const ManifestRecord& manifest, uint64_t expected_version,
    const std::optional<WriteFence>& fence, MonotonicTime deadline) {
  if (manifest.request_id.empty()) {
    return inner()->PutManifest(manifest, expected_version, fence, deadline);
  }
  return Repeat(deadline,
                [&] { return inner()->PutManifest(manifest, expected_version, fence, deadline); });
}

absl::StatusOr<ManifestRecord> RetryingPageStore::GetManifest(absl::string_view name,
                                                              MonotonicTime deadline) {
  return Repeat(deadline, [&] { return inner()->GetManifest(name, deadline); });
}

absl::StatusOr<std::vector<ManifestEntry>> RetryingPageStore::ListManifests(
    absl::string_view name_prefix, absl::string_view after, size_t limit, MonotonicTime deadline) {
  return Repeat(deadline,
                [&] { return inner()->ListManifests(name_prefix, after, limit, deadline); });
}

absl::StatusOr<StoreRecord> RetryingPageStore::GetRecord(absl::string_view kind,
                                                         absl::string_view key,
                                                         MonotonicTime deadline) {
  return Repeat(deadline, [&] { return inner()->GetRecord(kind, key, deadline); });
}

absl::StatusOr<std::vector<StoreRecord>> RetryingPageStore::ListRecords(
    absl::string_view kind, absl::string_view key_prefix, absl::string_view after, size_t limit,
    MonotonicTime deadline) {
  return Repeat(deadline,
                [&] { return inner()->ListRecords(kind, key_prefix, after, limit, deadline); });
}

absl::StatusOr<StoreLease> RetryingPageStore::AcquireLease(absl::string_view name,
                                                           uint64_t incarnation, absl::Duration ttl,
                                                           MonotonicTime deadline) {
  return Repeat(deadline, [&] { return inner()->AcquireLease(name, incarnation, ttl, deadline); });
}

absl::Status RetryingPageStore::RenewLease(const StoreLease& lease, absl::Duration ttl,
                                           MonotonicTime deadline) {
  return Repeat(deadline, [&] { return inner()->RenewLease(lease, ttl, deadline); });
}

absl::StatusOr<StoreStats> RetryingPageStore::GetStats(MonotonicTime deadline) {
  return Repeat(deadline, [&] { return inner()->GetStats(deadline); });
}

}  // namespace pagetide
