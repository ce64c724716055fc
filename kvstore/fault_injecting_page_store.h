// FaultInjectingPageStore: a store that is down, slow or full on demand, for tests of its users.
// Thread-safe. The inner store outlives it.
#ifndef PAGETIDE_KVSTORE_FAULT_INJECTING_PAGE_STORE_H_
#define PAGETIDE_KVSTORE_FAULT_INJECTING_PAGE_STORE_H_

#include <algorithm>
#include <utility>
#include <vector>

#include "absl/time/clock.h"
#include "base/mutex.h"
#include "kvstore/decorating_page_store.h"

namespace pagetide {

class FaultInjectingPageStore final : public DecoratingPageStore {
 public:
  explicit FaultInjectingPageStore(PageStore* inner) : DecoratingPageStore(inner) {}

  // What the next `num_calls` calls answer instead of being made (0: until told otherwise). OK:
  // none.
  void FailWith(absl::Status status, int num_calls = 0) {
    MutexLock lock(&mu_);
    failure_ = std::move(status);
    calls_left_ = num_calls;
  }
  // Every call takes this long more, but no longer than its deadline allows.
  void DelayBy(absl::Duration delay) {
    MutexLock lock(&mu_);
    delay_ = delay;
  }
  uint64_t num_failed() const {
    MutexLock lock(&mu_);
    return num_failed_;
  }

  std::vector<PutPageResult> PutPages(std::span<const PutPage> pages, Durability level,
                                      MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (fault.ok()) return inner()->PutPages(pages, level, deadline);
    std::vector<PutPageResult> results(pages.size());
    for (PutPageResult& result : results) result.status = fault;
    return results;
  }
  std::vector<GetPageResult> GetPages(std::span<const GetPage> pages,
                                      MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (fault.ok()) return inner()->GetPages(pages, deadline);
    std::vector<GetPageResult> results(pages.size());
    for (GetPageResult& result : results) result.status = fault;
    return results;
  }
  absl::StatusOr<std::vector<LookupResult>> LookupPages(std::span<const PageKey> keys,
                                                        MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (!fault.ok()) return fault;
    return inner()->LookupPages(keys, deadline);
  }
  absl::StatusOr<std::vector<PartialResult>> FindPartialPages(std::span<const PartialQuery> queries,
                                                              MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (!fault.ok()) return fault;
    return inner()->FindPartialPages(queries, deadline);
  }
  absl::StatusOr<std::vector<PageKey>> SetRetention(std::span<const PageKey> keys,
                                                    const Retention& retention,
                                                    const std::optional<WriteFence>& fence,
                                                    MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (!fault.ok()) return fault;
    return inner()->SetRetention(keys, retention, fence, deadline);
  }
  absl::Status Barrier(Durability level, MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    return fault.ok() ? inner()->Barrier(level, deadline) : fault;
  }
  absl::StatusOr<PutManifestResult> PutManifest(const ManifestRecord& manifest,
                                                uint64_t expected_version,
                                                const std::optional<WriteFence>& fence,
                                                MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (!fault.ok()) return fault;
    return inner()->PutManifest(manifest, expected_version, fence, deadline);
  }
  absl::StatusOr<ManifestRecord> GetManifest(absl::string_view name,
                                             MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (!fault.ok()) return fault;
    return inner()->GetManifest(name, deadline);
  }
  absl::StatusOr<std::vector<ManifestEntry>> ListManifests(absl::string_view name_prefix,
                                                           absl::string_view after, size_t limit,
                                                           MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (!fault.ok()) return fault;
    return inner()->ListManifests(name_prefix, after, limit, deadline);
  }
  absl::Status DeleteManifest(absl::string_view name, uint64_t expected_version,
                              const std::optional<WriteFence>& fence,
                              MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (!fault.ok()) return fault;
    return inner()->DeleteManifest(name, expected_version, fence, deadline);
  }
  absl::StatusOr<StoreRecord> GetRecord(absl::string_view kind, absl::string_view key,
                                        MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (!fault.ok()) return fault;
    return inner()->GetRecord(kind, key, deadline);
  }
  absl::StatusOr<uint64_t> CompareAndSetRecord(absl::string_view kind, absl::string_view key,
                                               uint64_t expected_version,
                                               std::optional<absl::string_view> value,
                                               MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (!fault.ok()) return fault;
    return inner()->CompareAndSetRecord(kind, key, expected_version, value, deadline);
  }
  absl::StatusOr<StoreLease> AcquireLease(absl::string_view name, uint64_t incarnation,
                                          absl::Duration ttl, MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    if (!fault.ok()) return fault;
    return inner()->AcquireLease(name, incarnation, ttl, deadline);
  }
  absl::Status RenewLease(const StoreLease& lease, absl::Duration ttl,
                          MonotonicTime deadline) override {
    const absl::Status fault = Next(deadline);
    return fault.ok() ? inner()->RenewLease(lease, ttl, deadline) : fault;
  }

 private:
  absl::Status Next(MonotonicTime deadline) {
    absl::Duration delay;
    absl::Status failure;
    {
      MutexLock lock(&mu_);
      delay = delay_;
      failure = failure_;
      if (!failure_.ok()) {
        ++num_failed_;
        if (calls_left_ > 0 && --calls_left_ == 0) failure_ = absl::OkStatus();
      }
    }
    if (delay > absl::ZeroDuration()) {
      const absl::Duration left = deadline - Clock::Real()->MonotonicNow();
      absl::SleepFor(std::min(delay, std::max(left, absl::ZeroDuration())));
      if (left <= delay) return absl::DeadlineExceededError("store is slow: deadline passed");
    }
    return failure;
  }

  mutable Mutex mu_;
  absl::Status failure_ ABSL_GUARDED_BY(mu_);
  int calls_left_ ABSL_GUARDED_BY(mu_) = 0;
  absl::Duration delay_ ABSL_GUARDED_BY(mu_) = absl::ZeroDuration();
  uint64_t num_failed_ ABSL_GUARDED_BY(mu_) = 0;
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_FAULT_INJECTING_PAGE_STORE_H_
