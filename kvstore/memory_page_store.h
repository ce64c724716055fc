// MemoryPageStore: the reference implementation of the port, and the double for tests of its users.
// One mutex, ordered maps, nothing clever; it evicts nothing and forgets everything at exit, so
// that its levels are honest only within the process. Thread-safe.
#ifndef PAGETIDE_KVSTORE_MEMORY_PAGE_STORE_H_
#define PAGETIDE_KVSTORE_MEMORY_PAGE_STORE_H_

#include <map>
#include <memory>
#include <optional>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "base/mutex.h"
#include "core/page_store.h"
#include "kvstore/lease_book.h"
#include "kvstore/residency_feed.h"
#include "kvstore/retention.h"

namespace pagetide {

class MemoryPageStore final : public PageStore {
 public:
  struct Options {
    const Clock* clock = Clock::Real();
    // Sum of page bodies. A put beyond it is RESOURCE_EXHAUSTED. 0: not bounded.
    uint64_t capacity_bytes = 0;
  };

  explicit MemoryPageStore(Options options);
  MemoryPageStore() : MemoryPageStore(Options()) {}
  ~MemoryPageStore() override;

  std::vector<PutPageResult> PutPages(std::span<const PutPage> pages, Durability level,
                                      MonotonicTime deadline) override;
  std::vector<GetPageResult> GetPages(std::span<const GetPage> pages,
                                      MonotonicTime deadline) override;
  absl::StatusOr<std::vector<LookupResult>> LookupPages(std::span<const PageKey> keys,
                                                        MonotonicTime deadline) override;
  absl::StatusOr<uint64_t> DeletePages(std::span<const PageKey> keys,
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
  absl::Status DeleteManifest(absl::string_view name, uint64_t expected_version,
                              const std::optional<WriteFence>& fence,
                              MonotonicTime deadline) override;
  absl::StatusOr<uint64_t> CompareAndSetRecord(absl::string_view kind, absl::string_view key,
                                               uint64_t expected_version,
                                               std::optional<absl::string_view> value,
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
  absl::Status ReleaseLease(const StoreLease& lease, MonotonicTime deadline) override;
  absl::Status Watch(const WatchCallback& on_events, MonotonicTime deadline) override;
  absl::StatusOr<StoreStats> GetStats(MonotonicTime deadline) override;
  absl::StatusOr<ScrubResult> Scrub(uint64_t max_pages, MonotonicTime deadline) override;
  absl::StatusOr<uint64_t> Compact(MonotonicTime deadline) override;

  // For tests of users: flips one bit of the stored body. False if the page is absent.
  bool FlipBit(const PageKey& key, uint64_t bit);

 private:
  struct Held {
    PageRecordMeta meta;
    std::shared_ptr<std::vector<std::byte>> body;  // shared: copied out after the lock is released
    std::vector<uint32_t> tokens;                  // empty: found by its key only
    bool quarantined = false;
    bool ever_read = false;
  };
  struct HeldManifest {
    ManifestRecord record;
    std::optional<TwoClockEnd> end;
  };
  using ChildRow = std::tuple<Digest, Digest, std::vector<uint32_t>>;  // parent, component, tokens

  absl::Status CheckDeadline(absl::string_view action, MonotonicTime deadline) const;
  absl::Status CheckFence(const std::optional<WriteFence>& fence) const
      ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool IsPresent(const ManifestPageRef& ref) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  bool IsProtected(const PageKey& key) const ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Quarantine(const PageKey& key, const std::vector<std::byte>* body) ABSL_LOCKS_EXCLUDED(mu_);
  // Ends the manifest, whose version is not used for its name again.
  using Manifests = std::map<std::string, HeldManifest, std::less<>>;
  Manifests::iterator Forget(Manifests::iterator it) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  // Expired manifests go when somebody looks at manifests.
  void RemoveExpired() ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void ForgetChild(const Held& held) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);
  void Report(const Held& held, bool removed) ABSL_EXCLUSIVE_LOCKS_REQUIRED(mu_);

  const Options options_;
  LeaseBook leases_;
  mutable Mutex mu_;
  std::map<PageKey, Held> pages_ ABSL_GUARDED_BY(mu_);
  std::map<ChildRow, PageKey> children_ ABSL_GUARDED_BY(mu_);  // of pages that are not quarantined
  std::map<PageKey, TwoClockEnd> pins_ ABSL_GUARDED_BY(mu_);
  Manifests manifests_ ABSL_GUARDED_BY(mu_);
  std::map<uint32_t, uint64_t> deleted_versions_ ABSL_GUARDED_BY(mu_);  // the highest, by bucket
  std::map<std::pair<std::string, std::string>, StoreRecord> records_ ABSL_GUARDED_BY(mu_);
  StoreStats stats_ ABSL_GUARDED_BY(mu_);
  ResidencyFeed feed_;  // appended to under mu_
};

}  // namespace pagetide

#endif  // PAGETIDE_KVSTORE_MEMORY_PAGE_STORE_H_
